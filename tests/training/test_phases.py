"""Runs in phases of different sizes, and evaluations that a signal cuts short."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from jepa import JEPAAgent, JEPAConfig, load_encoder
from jepa.config import ConfigError
from jepa.evaluation.samples import Samples
from jepa.objectives.jepa import JEPA
from jepa.runs.checkpoint import find, load_model
from jepa.runs.metrics import read_json, read_rows
from jepa.training.run import Run

pytestmark = pytest.mark.slow

TINY = [
    "image_size=16", "encoder.patch_size=8", "encoder.embed_dim=24", "encoder.depth=1", "encoder.num_heads=2",
    "predictor.width=24", "predictor.depth=1", "mask=random", "mask.ratio=0.5", "dataset.num_samples=64",
    "batch_size=8", "num_workers=0", "logger=none", "log_every=1", "evaluator=[diagnostics]",
    "evaluation.train_samples=16", "evaluation.val_samples=16",
]  # fmt: skip
GROWING = "phases=[{share:0.5,image_size:16},{share:0.5,image_size:32,micro_batch_size:4}]"


def agent(folder: Path, *overrides: str) -> JEPAAgent:
    return JEPAAgent(JEPAConfig(*TINY, *overrides), folder=folder)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_model(find(folder))


def tokens_by_step(folder: Path) -> dict[int, float]:
    return {int(row["step"]): row["mask/context_tokens"] for row in read_rows(folder) if "mask/context_tokens" in row}


def test_a_later_phase_goes_on_with_the_weights_at_another_size(tmp_path: Path) -> None:
    agent(tmp_path / "run", "steps=8", "eval_every=4", GROWING).train()
    rows = read_rows(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(9))
    assert tokens_by_step(tmp_path / "run") == {0: 2.0, 4: 2.0, 8: 8.0}
    assert load_encoder(tmp_path / "run").clip_shape == (3, 1, 32, 32)
    agent(tmp_path / "first", "steps=8", "eval_every=4", GROWING.replace("32", "16")).train()
    first = load_model(tmp_path / "first" / "checkpoints" / "step_00000008")
    assert first.keys() == weights(tmp_path / "run").keys()
    losses = [[row["train/loss"] for row in read_rows(tmp_path / name)[1:]] for name in ("run", "first")]
    assert losses[0][:4] == losses[1][:4]
    assert losses[0][4:] != losses[1][4:]


@pytest.mark.parametrize("step", [3, 4, 6])
def test_a_run_stopped_in_any_phase_ends_with_the_weights_of_an_undisturbed_one(
    tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["steps=8", "eval_every=8", "save_every=3", GROWING]
    agent(tmp_path / "whole", *options).train()
    stop_at(step, monkeypatch)
    agent(tmp_path / "stopped", *options).train()
    monkeypatch.undo()
    assert read_json(tmp_path / "stopped" / "run.json")["status"] == "stopped"
    agent(tmp_path / "stopped", *options).train()
    whole, stopped = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert [name for name in whole if not torch.equal(whole[name], stopped[name])] == []


def test_a_run_is_resumed_in_a_phase_of_longer_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    longer = "phases=[{share:0.5,num_frames:4},{share:0.5,num_frames:8}]"
    options = ["encoder=temporal", "dataset=moving_digits", "dataset.side=16", "num_frames=2", longer]
    options += ["steps=4", "eval_every=4"]
    agent(tmp_path / "whole", *options).train()
    stop_at(3, monkeypatch)
    agent(tmp_path / "stopped", *options).train()
    monkeypatch.undo()
    agent(tmp_path / "stopped", *options).train()
    assert load_encoder(tmp_path / "stopped").clip_shape == (3, 8, 16, 16)
    whole, stopped = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert [name for name in whole if not torch.equal(whole[name], stopped[name])] == []


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal arrives in the middle of step `step`, counted from 1."""
    after_step = JEPA.after_step

    def interrupted(self: JEPA, number: int) -> dict[str, float]:
        if number + 1 == step:
            signal.raise_signal(signal.SIGTERM)
        return after_step(self, number)

    monkeypatch.setattr(JEPA, "after_step", interrupted)


def test_a_signal_in_the_last_step_finishes_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signum_at_end = iter([True])
    log = Run.log

    def logged(self: Run, step: int, metrics: dict[str, float]) -> None:
        log(self, step, metrics)
        if step == 4 and "perf/evaluation_s" in metrics and next(signum_at_end, False):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Run, "log", logged)
    agent(tmp_path / "run", "steps=4", "eval_every=4").train()
    assert read_json(tmp_path / "run" / "run.json")["status"] == "finished"


@pytest.mark.parametrize("at", [0, 4, 8])
def test_an_evaluation_that_a_signal_cuts_short_is_made_up_for(
    tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["steps=8", "eval_every=4", "evaluation.batch_size=4"]
    batches, calls = Samples.batches, []

    def interrupted(self: Samples, *arguments: object, **more: object):
        calls.append(None)
        for number, batch in enumerate(batches(self, *arguments, **more)):
            if number == 1 and len(measured := tokens_by_step(tmp_path / "run")) == at // 4 and at not in measured:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    monkeypatch.setattr(Samples, "batches", interrupted)
    agent(tmp_path / "run", *options).train()
    assert calls
    assert read_json(tmp_path / "run" / "run.json")["status"] == "stopped"
    assert at not in tokens_by_step(tmp_path / "run")
    monkeypatch.undo()
    agent(tmp_path / "run", *options).train()
    assert read_json(tmp_path / "run" / "run.json")["status"] == "finished"
    assert list(tokens_by_step(tmp_path / "run")) == [0, 4, 8]


def test_a_phase_without_a_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"phases\[0\].share=0.01"):
        agent(tmp_path / "run", "steps=8", "phases=[{share:0.01},{share:0.99,image_size:32}]").train()

"""Runs with a dictionary as stem: fitted before step 0, kept in the checkpoint, used by every command."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from tiny_agent import TINY, agent

import jepa
from jepa.benchmark.protocol import evaluate
from jepa.config import ConfigError, compose_eval
from jepa.data.transforms import EvalTransform
from jepa.encoders.pretrained import open_encoder
from jepa.evaluation.samples import Split
from jepa.evaluation.stems import read_clips
from jepa.exporters.export import export_encoder
from jepa.runs.checkpoint import find, load_model
from jepa.runs.metrics import read_rows

pytestmark = pytest.mark.slow

DICTIONARY = ["encoder.stem=dictionary", "encoder.stem_width=16"]
VIEWS = [
    *("mask=none", "predictor=projector", "predictor.hidden_dim=16", "predictor.output_dim=8", "augment.views=2"),
    *("objective.target=none", "regularizer=vicreg", "regularizer.vicreg.of=predicted"),
    "regularizer.vicreg.invariance=1",
]
NOT_ON_COMMAND_LINE = ("predictor.width", "predictor.depth", "mask.ratio")


def stem_of(folder: Path, prefix: str = "context_encoder.stem.") -> dict[str, torch.Tensor]:
    return load_model(find(folder), prefix)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outputs") / "outputs" / "finished"
    agent(folder, *DICTIONARY, "steps=4", "eval_every=4", "save_every=2").train()
    return folder


def test_a_dictionary_is_fitted_once_and_the_same_in_both_encoders(finished: Path, tmp_path: Path) -> None:
    stem = stem_of(finished)
    assert stem["mean"].any()
    for name, tensor in stem_of(finished, "target_encoder.stem.").items():
        assert torch.equal(tensor, stem[name]), name
    agent(tmp_path / "again", *DICTIONARY, "steps=2", "evaluator=[]").train()
    for name, tensor in stem_of(tmp_path / "again").items():
        assert torch.equal(tensor, stem[name]), name
    agent(tmp_path / "other", *DICTIONARY, "steps=2", "evaluator=[]", "seed=1").train()
    assert not torch.equal(stem_of(tmp_path / "other")["filters"], stem["filters"])


def test_a_resumed_run_keeps_its_dictionary(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    agent(tmp_path / "a", *DICTIONARY, "steps=2", "evaluator=[]").train()
    before = stem_of(tmp_path / "a")
    assert "dictionary: 16 filters from 96 samples" in caplog.text
    caplog.clear()
    agent(tmp_path / "a", *DICTIONARY, "steps=4", "evaluator=[]").train()
    assert "dictionary:" not in caplog.text
    for name, tensor in stem_of(tmp_path / "a").items():
        assert torch.equal(tensor, before[name]), name


def test_filters_train_in_the_last_part_of_a_run(tmp_path: Path) -> None:
    late = [*DICTIONARY, *VIEWS, "steps=4", "evaluator=[]", "save_every=2", "keep=9", "encoder.stem_frozen=0.5"]
    run = jepa.JEPAAgent(jepa.JEPAConfig(*without_masks(), *late), folder=tmp_path / "a")
    run.train()
    half = load_model(tmp_path / "a/checkpoints/step_00000002", "context_encoder.stem.")
    end = load_model(tmp_path / "a/checkpoints/step_00000004", "context_encoder.stem.")
    assert not torch.equal(half["filters"], end["filters"])
    assert torch.equal(half["offset"], end["offset"])


def without_masks() -> list[str]:
    return [override for override in TINY if not override.startswith(NOT_ON_COMMAND_LINE)]


def test_clips_have_filters_in_space_and_time(tmp_path: Path) -> None:
    clips = [
        *("encoder=temporal", "encoder.patch_size=8", "encoder.tubelet_size=2", "encoder.depth=1"),
        *("dataset=moving_digits", "num_frames=4", "mask=temporal", "steps=2", "evaluator=[]"),
    ]
    overrides = [override for override in without_masks() if "depth" not in override]
    run = jepa.JEPAAgent(jepa.JEPAConfig(*overrides, *DICTIONARY, *clips, "predictor.width=16"), folder=tmp_path / "a")
    run.train()
    assert stem_of(tmp_path / "a")["filters"].shape == (16, 6, 6, 6)  # three channels of two frames


def test_probes_read_what_their_readout_says(tmp_path: Path) -> None:
    evaluators = [
        *("evaluator=[linear,knn,linear_sgd]", "evaluator.linear.readout=grid2", "evaluator.knn.readout=tokens"),
        *("evaluator.linear_sgd.readout=layers", "evaluator.linear_sgd.epochs=1"),
    ]
    agent(tmp_path / "a", *DICTIONARY, "steps=2", "eval_every=2", *evaluators).train()
    rows = read_rows(tmp_path / "a")
    assert {"probe/linear_top1", "probe/knn_top1", "probe/linear_sgd_top1"} <= rows[-1].keys()
    assert "baseline/pixels_linear_top1" in rows[0]


def test_jepa_eval_has_the_dictionary_as_a_floor_and_fits_that_of_an_untrained_encoder(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished.parents[1])
    overrides = [
        *("run=outputs/finished", "task=[linear]", "dataset.num_samples=96", "num_workers=0", "device=cpu"),
        *("floors=[dictionary,untrained]", "train_samples=64", "test_samples=32", "precision=fp32"),
    ]
    folder = evaluate(compose_eval([*overrides, "readout=grid2"]))
    text = (folder / "eval.md").read_text()
    assert "linear, of 64, grid2" in text
    assert "cells of a dictionary of 128 filters" in text
    assert "averaged over each quarter of the picture" in text
    rows = {row["title"]: row for row in json.loads((folder / "eval.json").read_text())["rows"]}
    assert {"dictionary", "untrained", "finished"} <= rows.keys()


def test_a_dictionary_needs_whole_cells(
    finished: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(finished.parents[1])
    odd = ["task=knn", "image_size=30", "dataset.num_samples=96", "num_workers=0", "device=cpu", "name=odd"]
    with pytest.raises(
        ConfigError, match=r"cells have 4 pixels a side and do not fill pictures of 30 x 30; give image_"
    ):
        evaluate(compose_eval(["run=dictionary", *odd]))
    folder = evaluate(compose_eval(["run=pixels", "floors=[dictionary]", *odd]))
    assert (
        "dictionary: its cells have 4 pixels a side and do not fill pictures of 30 x 30; it is left out" in caplog.text
    )
    assert [row["title"] for row in json.loads((folder / "eval.json").read_text())["rows"]] == ["pixels"]


@pytest.mark.parametrize("format", ["safetensors", "onnx", "torch_export"])
def test_it_is_exported(format: str, finished: Path, tmp_path: Path) -> None:
    exported = export_encoder(str(finished), format, tmp_path / format)  # compares tokens with the encoder's
    assert exported.difference <= 1e-4 * max(1.0, exported.largest)
    if format == "safetensors":
        encoder = open_encoder(str(tmp_path / format))
        assert torch.equal(encoder.stem.filters, open_encoder(str(finished)).stem.filters)


@pytest.mark.parametrize("format", ["timm", "transformers"])
def test_formats_that_cannot_hold_it_refuse_it_with_those_that_can(format: str, finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no encoder.stem but linear; use safetensors, onnx or torch_export"):
        export_encoder(str(finished), format, tmp_path / format)
    assert not (tmp_path / format).exists()


def test_it_is_fine_tuned_with_its_filters_as_they_were(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    kept = [override for override in TINY if override.startswith(("image_size", "dataset", "num_workers", "logger"))]
    overrides = ["encoder=pretrained", f"encoder.weights={finished}", "objective=classify", "batch_size=8"]
    run = jepa.JEPAAgent(
        jepa.JEPAConfig(*kept, *overrides, "steps=2", "evaluator=[]", "mask=none", "precision=fp32"),
        folder=tmp_path / "tuned",
    )
    run.train()
    assert "dictionary:" not in caplog.text
    before, after = open_encoder(str(finished)), open_encoder(str(tmp_path / "tuned"))
    assert torch.equal(before.stem.filters, after.stem.filters)
    assert torch.equal(before.stem.mean, after.stem.mean)
    assert not torch.equal(before.embed.weight, after.embed.weight)


def test_images_among_clips_are_repeated_in_batches_of_images_alone() -> None:
    class Mixed:
        """Clips after more images than a batch has."""

        classes, channels, mean, std = (), 3, (0.5,) * 3, (0.25,) * 3

        def __len__(self) -> int:
            return 600

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return torch.full((3, 4 if index == 0 else 1, 8, 8), index % 256, dtype=torch.uint8), -1

        def describe(self, index: int) -> str:
            return str(index)

        def validation(self) -> None:
            return None

    transform = EvalTransform(image_size=(8, 8), mean=(0.5,) * 3, std=(0.25,) * 3)
    split = Split(dataset=Mixed(), name="training", indices=tuple(range(600)))
    batches = list(read_clips(split, transform, 4))
    assert torch.cat(batches).shape == (600, 3, 4, 8, 8)
    assert max(map(len, batches)) == 64, "more than 256 pictures are in memory together"

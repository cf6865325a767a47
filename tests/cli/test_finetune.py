"""The fine-tuned probe: it learns, depends only on its seed, and does not affect the run."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from checked import checked
from synthetic_features import snapshot_of
from tiny_agent import agent
from torch import nn
from toy_model import CPU

from jepa.evaluation.finetune import FineTuning
from jepa.evaluation.linear import LinearProbe
from jepa.evaluation.types import Features
from jepa.reports.run_table import table_columns, table_rows
from jepa.runs.checkpoint import find, load_model
from jepa.runs.metrics import read_rows
from jepa.training.run import Run

SETTINGS = {"epochs": 20, "batch_size": 16, "lr": 0.02, "weight_decay": 0.0, "warmup_ratio": 0.1}


class Blind(nn.Module):
    """[b, C, T, H, W] -> [b, 1, 8] of two pixels; with the initial weights no probe can say whether they are equal."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.hidden = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 8))
        nn.init.zeros_(self.hidden[0].weight)

    def forward(self, clips):
        return self.hidden(clips.flatten(1)[:, :2])[:, None]


def alike(num, seed):
    """Clips of two pixels of value 1 or -1, and whether they are the same."""
    signs = torch.randint(0, 2, (num, 2), generator=torch.Generator().manual_seed(seed)).float() * 2 - 1
    return signs[:, :, None, None, None], (signs[:, 0] == signs[:, 1]).long()


def snapshot_with(backbone, *, labels=None, seed=0):
    (clips, train_labels), (val_clips, val_labels) = alike(96, 1), alike(40, 2)
    train_labels = train_labels if labels is None else labels

    def crops(batch_size, generator):
        for rows in torch.randperm(len(clips), generator=generator).split(batch_size):
            yield clips[rows], train_labels[rows]

    tuning = SimpleNamespace(
        encoder=SimpleNamespace(encoder=backbone, session=CPU), seed=seed, crops=crops,
        train=SimpleNamespace(split=SimpleNamespace(indices=range(len(clips)))), clips=lambda: val_clips.split(7),
    )  # fmt: skip
    with torch.no_grad():
        features = [Features(backbone(x).mean(1), y) for x, y in ((clips, train_labels), (val_clips, val_labels))]
    return replace(snapshot_of(*features), tuning=tuning)


def test_it_learns_what_no_probe_of_frozen_features_can():
    snapshot = snapshot_with(Blind())
    assert LinearProbe()(snapshot).metrics["probe/linear_top1"] < 75
    assert FineTuning(**SETTINGS)(snapshot).metrics["probe/finetune_top1"] == 100


def test_the_encoder_its_modes_and_the_random_state_stay_as_they_were():
    backbone = Blind().eval().requires_grad_(False)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    snapshot = snapshot_with(backbone)
    state = torch.get_rng_state()
    FineTuning(**SETTINGS)(snapshot)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert not backbone.training
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_it_is_pure_in_the_seed():
    tuner = FineTuning(**(SETTINGS | {"epochs": 1}))
    snapshots = [snapshot_with(Blind(), seed=seed) for seed in (0, 0, 1)]
    answers = [tuner.tune(s.tuning, tuner.task(s.train, s.val)) for s in snapshots]
    assert torch.equal(answers[0], answers[1])


def test_samples_without_a_label_teach_nothing_and_are_not_judged(caplog):
    labels = alike(96, 1)[1]
    labels[::2] = -1
    assert FineTuning(**SETTINGS)(snapshot_with(Blind(), labels=labels)).metrics["probe/finetune_top1"] == 100
    tuner, unlabelled = FineTuning(**SETTINGS), snapshot_with(Blind(), labels=torch.full((96,), -1))
    assert tuner(unlabelled).metrics == tuner(unlabelled).metrics == {}
    assert [record.message for record in caplog.records] == ["finetune probe skipped: the data set has no labels"]
    assert FineTuning(**SETTINGS)(replace(snapshot_with(Blind()), tuning=None)).metrics == {}


def test_the_rate_warms_up_and_falls_to_zero():
    tuner = FineTuning(**SETTINGS)
    rates = [tuner.lr_at(step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.002)
    assert max(rates) == rates[9] == pytest.approx(0.02)
    assert rates[100] == pytest.approx(0)


@pytest.mark.parametrize("change", [{"epochs": 0}, {"lr": 0.0}, {"weight_decay": -1.0}, {"warmup_ratio": 1.0}])
def test_impossible_values_are_refused_by_name(change):
    (key, value), *_ = change.items()
    with pytest.raises(ValueError, match=f"{key}={value:g}"):
        checked(FineTuning, **(SETTINGS | change))


def test_it_is_made_before_the_first_and_after_the_last_step():
    tuner, probe = FineTuning(**SETTINGS), LinearProbe()
    run = SimpleNamespace(evaluators=[tuner, probe], plan=SimpleNamespace(total_steps=9))
    assert [Run.due_evaluators(run, step) for step in (0, 3, 9)] == [[tuner, probe], [probe], [tuner, probe]]  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_run_does_not_notice_it(tmp_path):
    options = ["steps=4", "eval_every=2", "save_every=4", "encoder.drop_path=0.1"]
    agent(tmp_path / "without", *options, "evaluator=knn").train()
    agent(tmp_path / "with", *options, "evaluator=[knn,finetune]", "evaluator.finetune.epochs=1").train()
    one, two = (load_model(find(tmp_path / n)) for n in ("with", "without"))
    assert all(torch.equal(one[name], two[name]) for name in two)
    rows = read_rows(tmp_path / "with")
    assert [row["step"] for row in rows if "probe/finetune_top1" in row] == [0, 4]
    place = [column.head for column in table_columns(rows)].index("fine-tuned")
    assert dict(table_rows(rows))["untrained encoder"][place] == rows[0]["probe/finetune_top1"]

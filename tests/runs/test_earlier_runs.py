"""A run, a checkpoint and an export that commit 6045985 wrote still resume, load and are evaluated.

tests/files/earlier_run is that run after 2 of 4 steps. earlier_run_expected.json has what the same commit measured in
steps 3 and 4, and the tokens of its last checkpoint for one image. earlier_export is its export in our own format.
"""

import json
import shutil
from pathlib import Path

import forked
import pytest
import torch

from jepa import load_encoder
from jepa.benchmark.protocol import evaluate
from jepa.config import compose_eval
from jepa.runs.metrics import read_rows

FILES = Path(__file__).parents[1] / "files"
EXPECTED = json.loads((FILES / "earlier_run_expected.json").read_text())
IMAGE = torch.linspace(0, 1, 3 * 16 * 16).view(1, 3, 16, 16)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """The earlier run after its command was run again."""
    top = tmp_path_factory.mktemp("earlier")
    folder = top / "outputs" / "earlier"
    shutil.copytree(FILES / "earlier_run", folder)
    (folder / "checkpoints" / "last").symlink_to("step_00000002")
    overrides = [
        *("name=earlier", "steps=4", "epochs=1", "batch_size=8", "image_size=16", "num_workers=0", "logger=none"),
        *("encoder.patch_size=4", "encoder.embed_dim=8", "encoder.depth=1", "encoder.num_heads=2", "keep=9"),
        *("predictor.width=8", "predictor.depth=1", "mask=random", "mask.ratio=0.5", "log_every=1", "save_every=2"),
        *("dataset.num_samples=32", "dataset.side=16", "dataset.val_samples=32", "evaluator=[knn,diagnostics]"),
        *("evaluation.train_samples=32", "evaluation.val_samples=32", "device=cpu", "precision=fp32"),
    ]
    output = top / "output"
    assert forked.status(forked.command("train", overrides), top, output) == 0, output.read_text()
    assert "resuming from" in output.read_text()
    return folder


def assert_close(tokens):
    torch.testing.assert_close(tokens.flatten(), torch.tensor(EXPECTED["tokens"]), rtol=1e-3, atol=1e-4)


def test_an_earlier_run_is_resumed_to_the_figures_that_it_would_have_had(resumed):
    rows = [row for row in read_rows(resumed) if row["step"] > 2]
    assert [row["step"] for row in rows] == [row["step"] for row in EXPECTED["rows"]]
    for row, expected in zip(rows, EXPECTED["rows"], strict=True):
        assert {name: value for name, value in row.items() if name in expected} == pytest.approx(expected, rel=1e-3)
        assert all(name.startswith("perf/") for name in row.keys() - expected.keys())


def test_the_checkpoint_that_it_ends_with_gives_the_same_tokens(resumed):
    assert_close(load_encoder(resumed)(IMAGE))


def test_an_earlier_export_gives_the_same_tokens():
    assert_close(load_encoder(FILES / "earlier_export")(IMAGE))


def test_an_earlier_checkpoint_is_evaluated(resumed, monkeypatch):
    monkeypatch.chdir(resumed.parents[1])
    checkpoint = resumed / "checkpoints" / "step_00000002"
    small = [
        "train_samples=32",
        "test_samples=32",
        "num_workers=0",
        "device=cpu",
        "floors=[]",
        "dataset.num_samples=64",
    ]
    folder = evaluate(compose_eval([f"run={checkpoint}", "task=[knn]", "name=eval", *small]))
    results = json.loads((folder / "eval.json").read_text())
    assert 0 <= results["rows"][0]["top1"] <= 100

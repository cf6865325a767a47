"""A data set with a field of its own and an objective that learns from it, each with its YAML file."""

from __future__ import annotations

import re
import sys
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked
import pytest
import torch

from jepa.config import ConfigError, compose
from jepa.data.embedded import Shapes
from jepa.data.loader import batches
from jepa.runs.metrics import read_rows
from jepa.training.assemble import needed_fields

GUIDE = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()


def from_guide(name: str) -> str:
    """The code block of CONTRIBUTING.md that begins with the name of its file."""
    (code,) = re.findall(rf"```python\n# {re.escape(name)}\n(.*?)```", GUIDE, re.DOTALL)
    return code


FILES = {
    "walks.py": from_guide("walks.py"),
    "inverse_dynamics.py": from_guide("inverse_dynamics.py"),
    "conf/dataset/walks.yaml": "# a dot that walks; its steps are known\n_target_: walks.Walks\nnum_samples: 64\n",
    "conf/objective/inverse_dynamics.yaml": "# actions, from the clip\n_target_: inverse_dynamics.InverseDynamics\n",
}
SMALL = [
    "num_frames=4", "image_size=32", "encoder.patch_size=8", "encoder.embed_dim=16", "encoder.depth=1",
    "encoder.num_heads=2", "augment.crop_scale=[1,1]", "augment.crop_aspect=[1,1]", "augment.flip=false",
    "batch_size=8", "steps=2", "log_every=1", "num_workers=0", "logger=none", "name=run",
]  # fmt: skip


@pytest.fixture
def own(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def jepa_train(folder: Path, *overrides: str) -> tuple[int, str]:
    """Status and output of the command in a process that finds the user's modules."""

    def run() -> int:
        sys.path.insert(0, str(folder))
        return forked.command("train", ["--config-dir", "conf", *SMALL, *overrides])()

    return forked.status(run, folder, folder / "output"), (folder / "output").read_text()


def test_an_objective_learns_from_a_field_that_only_its_data_set_knows(own: Path) -> None:
    status, output = jepa_train(own, "encoder=temporal", "dataset=walks", "objective=inverse_dynamics")
    assert status == 0, output
    rows = [row for row in read_rows(own / "outputs" / "run") if "train/error" in row]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["train/error"] == row["train/loss"] > 0 for row in rows)


def test_data_without_the_field_are_refused_with_both_names(own: Path) -> None:
    status, output = jepa_train(own, "encoder=temporal", "dataset=moving_digits", "objective=inverse_dynamics")
    assert status == 2
    assert "InverseDynamics learns from actions, and MovingDigits has none" in output
    assert "Traceback" not in output


def test_the_refusal_names_the_choices_that_have_the_field() -> None:
    refusal = "Detector learns from boxes, and Shapes has none"
    with pytest.raises(ConfigError, match=f"{refusal}; choose dataset=coco or voc"):
        compose(["objective=detect", "dataset=shapes"])
    config: Any = SimpleNamespace(objective={"_target_": "jepa.objectives.detect.Detector"})
    dataset: Any = Shapes(num_samples=4, val_samples=4)
    with pytest.raises(ConfigError, match=refusal):
        needed_fields(config, dataset)


def test_actions_belong_to_the_frames_that_were_drawn(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(own)
    import walks  # pyright: ignore[reportMissingImports]

    dataset: Any = walks.Walks(num_frames=5)
    stream = batches(dataset, batch_size=16, seed=0, num_workers=0, fields=dataset.fields)
    stored = list(islice(stream, 5))  # more than an epoch
    stream.close()
    for batch in stored:
        positions = batch.pixels[:, 0].flatten(2).argmax(dim=2)  # [B, T]
        steps = torch.stack([(positions // 32).diff(dim=1), (positions % 32).diff(dim=1)], dim=2)
        wrapped = (steps + 16) % 32 - 16
        assert torch.equal(wrapped.float(), batch.fields["actions"])
    assert not torch.equal(stored[0].fields["actions"], stored[4].fields["actions"])


def test_an_objective_that_is_no_objective_is_refused_by_name(own: Path) -> None:
    source = own / "inverse_dynamics.py"
    source.write_text(source.read_text().replace("(Objective)", "(nn.Module)"))
    status, output = jepa_train(own, "encoder=temporal", "dataset=walks", "objective=inverse_dynamics")
    assert status == 2
    assert "objective: InverseDynamics must derive from jepa.objectives.base.Objective" in output

"""Rules of jepa-eval, jepa-export, jepa-collect and jepa-plan at their borders: the last valid value, the first not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from jepa.config import Composer, command_rules
from jepa.config.command_rules import MARK, output_folder, overwrite_error, planner_error, runs_discrete

TIMM = "run=timm:vit_tiny_patch16_224"
CIFAR = ["dataset=cifar10", "dataset.root_path=/data"]


def faults(command: str, overrides: Sequence[str]) -> str:
    """All errors, but for those of data that are not here."""
    errors = Composer(None, command).check(overrides).errors
    return "\n".join(error for error in errors if not error.startswith("dataset."))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([TIMM], ""),
        ([TIMM, "task=[]"], "names nothing; valid: knn"),
        ([TIMM, "task=knnn"], "no such task 'knnn'; did you mean \"knn\"?"),
        (["run=[]"], "names nothing to judge"),
        (["run=[[a]]"], "is no path; give the path of a run"),
        (["run=[untrained]", "image_size=32"], "no run is beside it"),
        (["run=[timm:vit_tiny_patch16_224,untrained]"], ""),
        (["run=pixels", "image_size=32"], ""),
        (["run=pixels", "image_size=32", "task=attentive"], "attentive needs an encoder; use knn or linear"),
        (["run=pixels"], "image_size must be given where no encoder says what it sees"),
        (["run=./nothing"], "or one of pixels, hog, dictionary, untrained"),
        (["run=timm:nothing_at_all", "floors=[pixles]"], "no such floors 'pixles'; did you mean \"pixels\"?"),
        ([TIMM, "shots=0"], "must be a share above 0 and below 1"),
        ([TIMM, "shots=0.5"], ""),
        ([TIMM, "shots=1"], ""),
        ([TIMM, "shots=1.0"], "must be a share above 0 and below 1"),
        ([TIMM, "shots=1.5"], "must be a share above 0 and below 1"),
        ([TIMM, "task=linear", "evaluator=knn"], "evaluator=linear is not among those chosen"),
        ([TIMM, "task=linear", "solver=sgd", "evaluator=linear"], "evaluator=linear_sgd is not among those chosen"),
        ([TIMM, "image_size=[1,2,3]"], "takes a number of pixels, or [height, width]"),
    ],
)
def test_an_evaluation_is_refused_in_words_or_not_at_all(overrides: list[str], expected: str) -> None:
    found = faults("eval", [*overrides, *CIFAR])
    assert expected in found
    assert bool(found) == bool(expected)


def test_hog_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for spec, expected in ((None, True), (object(), False)):
        monkeypatch.setattr(command_rules, "find_spec", lambda name, spec=spec: spec)
        found = faults("eval", ["run=hog", "image_size=32", *CIFAR])
        assert ("hog needs scikit-image" in found) == expected


def test_a_path_that_exists_or_names_its_kind_is_taken_for_no_baseline(tmp_path: Path) -> None:
    (tmp_path / "pixle").mkdir()
    for run in (str(tmp_path / "pixle"), f"hf:{tmp_path.name}"):
        found = faults("eval", [f"run={run}", *CIFAR])
        assert found
        assert "or one of pixels" not in found


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([TIMM, "output=no-such-folder"], ""),
        ([TIMM], "has no run folder to write into; give output=FOLDER"),
        ([TIMM, "output=no-such-folder", "format=onxx"], 'no such format; did you mean "onnx"?'),
        ([TIMM, "output=no-such-folder", "push_to_hub=owner/name.2-b"], ""),
        ([TIMM, "output=no-such-folder", "push_to_hub=name"], "takes OWNER/NAME"),
        ([TIMM, "output=no-such-folder", "push_to_hub=a/b/c"], "takes OWNER/NAME"),
    ],
)
def test_an_export_is_refused_in_words_or_not_at_all(overrides: list[str], expected: str) -> None:
    found = faults("export", overrides)
    assert expected in found
    assert bool(found) == bool(expected)


def test_only_a_folder_that_is_empty_or_an_earlier_export_is_written_over(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    assert overwrite_error(folder) == ""
    folder.mkdir()
    assert overwrite_error(folder) == ""
    (folder / "README.md").write_text("mine")
    assert "is not empty and not from jepa-export" in overwrite_error(folder)
    (folder / "README.md").write_text(f"card\n{MARK}\n")
    (folder / "config.json").touch()
    assert overwrite_error(folder) == ""
    (folder / "thesis.txt").touch()
    assert "holds more than an export (thesis.txt)" in overwrite_error(folder)
    assert "is a file" in overwrite_error(folder / "config.json")


def test_an_export_goes_into_the_run_folder_also_from_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "last").mkdir(parents=True)
    for run in (tmp_path, tmp_path / "checkpoints" / "last"):
        assert output_folder(str(run), "onnx", None) == tmp_path / "export" / "onnx"
    assert output_folder(str(tmp_path), "onnx", "elsewhere") == Path("elsewhere")
    assert output_folder("timm:x", "onnx", None) is None


@pytest.mark.parametrize("key", ["source", "export"])
@pytest.mark.parametrize(
    ("value", "is_valid"),
    [("lerobot:x", True), ("minari:/a:b", True), ("lerobot:", False), ("lerobot", False), ("csv:x", False)],
)
def test_recordings_are_named_by_kind_and_path(key: str, value: str, is_valid: bool) -> None:
    assert ("takes KIND:PATH" in faults("collect", ["env=two_rooms", f"{key}='{value}'"])) != is_valid


WORLDS: dict[str, dict[str, Any]] = {
    "plane": {"world": {"num_actions": 0}}, "keys": {"world": {"num_actions": 3}}, "images": {"step": 1}, "damaged": {},
}  # fmt: skip


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs whose names say what their state.json holds."""
    monkeypatch.setattr(command_rules.checkpoints, "locate", lambda path: path if path.name in WORLDS else None)
    monkeypatch.setattr(command_rules.checkpoints, "quiet_state", lambda path: WORLDS[path.name])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["run=plane"], ""),
        (["run=damaged"], ""),
        (["run=nothing"], "nothing holds no checkpoint"),
        (["run=images"], "holds no world model"),
        (["run=[plane,keys]"], "keys has discrete actions, which CEM does not plan; use planner=categorical_cem"),
        (["run=keys", "planner=categorical_cem"], ""),
        (["run=plane", "planner=categorical_cem"], "has continuous actions"),
        (["run=keys", "planner=policy"], ""),
        (["run=plane", "planner=policy"], ""),
        ([], "run and experiment: give one of them"),
        (["run=plane", "experiment=two_rooms"], "run and experiment: give one of them"),
        (["experiment=two_rooms"], ""),
        (["run=plane", "baselines=[]"], ""),
        (["run=plane", "baselines=[randm]"], 'did you mean "random"?'),
        (["run=plane", "planner.horizon=60", "budget=60"], ""),
        (["run=plane", "planner.horizon=61", "budget=60"], "a plan is longer than an episode"),
        (["run=plane", "planner.execute=16"], ""),
        (["run=plane", "planner.execute=17"], "more steps are executed than planned"),
        (["run=plane", "encoders=[jepa]"], "needs compare=encoders"),
        (["run=plane", "compare=encoders"], "give experiment= instead of run="),
        (["experiment=two_rooms", "compare=encoders"], ""),
        (["experiment=two_rooms", "compare=worlds"], "no such comparison; valid: encoders"),
        (["experiment=two_rooms", "compare=encoders", "encoders=[]"], "names nothing; valid: jepa"),
        (["experiment=two_rooms", "compare=encoders", "encoders=[jepa,timm:vit_tiny_patch16_224]"], ""),
        (["experiment=two_rooms", "compare=encoders", "encoders=[maee]"], 'did you mean "mae"?'),
    ],
)
def test_a_plan_is_refused_in_words_or_not_at_all(overrides: list[str], expected: str, states: None) -> None:
    found = faults("plan", overrides)
    assert expected in found
    assert bool(found) == bool(expected)


def test_the_first_run_with_a_world_says_how_actions_are(states: None) -> None:
    assert runs_discrete(None) is None
    assert runs_discrete("nothing") is None
    assert runs_discrete(["images", "keys", "plane"]) is True
    assert runs_discrete("plane") is False
    assert not list(planner_error("jepa.planning.cem.CEM", "x", None))

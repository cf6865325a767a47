"""Damage in the folders of jepa-plan, jepa-rl and jepa-play: refused by name, with a remedy that works."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from fault_commands import DREAMING, PLANNING, Place, arguments, prepare
from hostile_files import bounded_memory, changed, damaged, refused_or_read
from hypothesis import HealthCheck, given, settings

from jepa.cli.plan import main as plan
from jepa.cli.play import main as play
from jepa.cli.rl import main as rl
from jepa.envs.two_rooms import TwoRooms
from jepa.envs.types import BatchedEnv
from jepa.errors import RunError
from jepa.planning import report as plan_report
from jepa.planning.run import read_results
from jepa.planning.world import load_world
from jepa.rl import report as rl_report
from jepa.rl.policy import load_actor
from jepa.runs.checkpoint import with_checksum

FEW = settings(
    max_examples=150, deadline=None, database=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
AGAIN = [*DREAMING, "name=earlier"]
PLAY = arguments("play", Place())[1]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with a run of this kind in outputs/earlier, made once; of a world also plans in outputs/plans."""
    folders: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp(kind)
            prepare(folders[kind], kind)
        return folders[kind]

    return folder


@pytest.fixture
def policy(prepared: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of jepa-rl that may be damaged."""
    shutil.copytree(prepared("policy") / "outputs", tmp_path / "outputs", symlinks=True)
    monkeypatch.chdir(tmp_path)
    return Path("outputs/earlier")


@pytest.fixture
def world(prepared: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of jepa-train with a world model that may be damaged."""
    shutil.copytree(prepared("world") / "outputs", tmp_path / "outputs", symlinks=True)
    monkeypatch.chdir(tmp_path)
    return Path("outputs/earlier")


def last_state(run: Path) -> Path:
    return max(run.glob("checkpoints/step_*/state.json"))


def change_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(with_checksum(content) if path.name == "state.json" else content))


def without_times(results: dict[str, Any]) -> dict[str, Any]:
    return results | {"rows": [{k: v for k, v in row.items() if k != "seconds"} for row in results["rows"]]}


def test_results_of_policies(policy: Path) -> None:
    path = policy / "results.json"
    content = json.loads(path.read_text())

    @FEW
    @given(data=changed(content).map(lambda value: json.dumps(value).encode()) | damaged(path.read_bytes()))
    def check(data: bytes) -> None:
        path.write_bytes(data)
        refused_or_read(lambda: rl_report.terminal(rl_report.read(path), policy), "results.json")

    check()


def test_results_of_plans(world: Path) -> None:
    assert plan([f"run={world}", *PLANNING, "name=plans"]) == 0
    path, env = Path("outputs/plans/results.json"), cast(BatchedEnv, TwoRooms())
    content = json.loads(path.read_text())

    @FEW
    @given(data=changed(content).map(lambda value: json.dumps(value).encode()) | damaged(path.read_bytes()))
    def check(data: bytes) -> None:
        path.write_bytes(data)

        def read() -> None:
            results = read_results(path.parent, content["tasks"], env)
            plan_report.terminal(results, path.parent)
            plan_report.success_chart(results, env)

        refused_or_read(read, "results.json")

    check()


def test_damaged_results_are_computed_again_once_they_are_removed(policy: Path, capsys) -> None:
    path = policy / "results.json"
    before = json.loads(path.read_text())
    path.write_text("{")
    assert rl(AGAIN) == 1
    assert "results.json cannot be read" in capsys.readouterr().err.replace("\n", " ")
    path.unlink()
    assert rl(AGAIN) == 0
    assert without_times(json.loads(path.read_text()))["rows"] == without_times(before)["rows"]


@pytest.mark.parametrize("what", ["policy", "world"])
def test_resume_previous_trains_again_what_followed_a_damaged_checkpoint(what: str, policy: Path, capsys) -> None:
    run = policy if what == "policy" else policy / "world"
    damaged_one = last_state(run).parent
    (damaged_one / "config.yaml").write_text("seed: 5")
    assert rl(AGAIN) == 1
    assert "is whole: resume=previous" in capsys.readouterr().err
    assert play(PLAY) == 1
    assert rl([*AGAIN, "resume=previous"]) == 0
    assert last_state(run).parent == damaged_one
    assert damaged_one.with_name(f"damaged-{damaged_one.name}").is_dir()
    assert play(PLAY) == 0


def test_a_finished_policy_is_not_begun_again_where_resume_is_false(policy: Path, capsys) -> None:
    assert rl([*AGAIN, "resume=false"]) == 2
    assert "outputs/earlier exists already" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["gone", "cut off"])
def test_heads_that_are_lost_are_fitted_again(damage: str, policy: Path, capsys) -> None:
    path = policy / "world" / "heads.json"
    before = json.loads(path.read_text())
    if damage == "cut off":
        path.write_text(path.read_text()[:20])
        assert rl(AGAIN) == 1
        assert "remove it, and the heads are fitted again" in capsys.readouterr().err
    path.unlink()
    assert rl(AGAIN) == 0
    assert json.loads(path.read_text()) == before


@pytest.mark.parametrize("value", [{}, [], 3, None])
def test_a_damaged_state_is_not_taken_for_a_run_without_a_policy(value: Any, policy: Path, capsys) -> None:
    last_state(policy).write_text(json.dumps(value))
    assert play(PLAY) == 1
    errors = capsys.readouterr().err
    assert last_state(policy).parent.name in errors
    assert "holds no policy" not in errors


@pytest.mark.parametrize("number", [10**7, 10**12])
def test_sizes_of_a_policy_beyond_its_tensors_take_no_memory(number: int, policy: Path) -> None:
    change_json(last_state(policy), lambda state: state["policy"].update(num_features=number))
    with bounded_memory(), pytest.raises(RunError, match=r"step_\d+: .* by its description, .* in the file"):
        load_actor(policy)


@pytest.mark.parametrize("number", [10**7, 10**12])
@pytest.mark.parametrize("name", ["width", "state_dim", "depth"])
def test_sizes_of_a_world_beyond_its_tensors_take_no_memory(name: str, number: int, world: Path) -> None:
    change_json(last_state(world), lambda state: state["world"]["predictor"].update({name: number}))
    with bounded_memory(), pytest.raises(RunError, match=r"state\.json: world"):
        load_world(world)


@pytest.mark.parametrize("number", [10**7, 10**12])
def test_sizes_of_heads_beyond_their_tensors_take_no_memory(number: int, world: Path) -> None:
    change_json(world / "heads.json", lambda facts: facts["heads"].update(value=number))
    with bounded_memory(), pytest.raises(RunError, match=r"heads\.json: value: .* by its description"):
        load_world(world)


def test_a_video_that_cannot_be_written_is_named(policy: Path, capsys) -> None:
    (policy / "play" / "play.mp4").mkdir(parents=True)
    assert play(PLAY) == 1
    assert "outputs/earlier/play/play.mp4: Is a directory" in capsys.readouterr().err

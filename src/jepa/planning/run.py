"""jepa-plan: baselines, planners and policies on the same tasks, one row each, saved as soon as it is known."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from jepa.config import PlanConfig, build_with, factory
from jepa.config.files import read_json
from jepa.data.episodes import Episodes
from jepa.data.identity import changes, identity
from jepa.envs.policies import StickyRandom
from jepa.envs.types import BatchedEnv, EnvTraits, Task, stored_node
from jepa.errors import ConfigError
from jepa.planning import protocol, report
from jepa.planning.cem import CEM
from jepa.planning.control import Blind, Controller, Function, HeadController, Planning, TruePlanning
from jepa.planning.costs import TOWARDS_GOALS
from jepa.planning.plannability import plannability
from jepa.planning.protocol import (
    NUM_TIMED,
    SCHEMA,
    Played,
    frozen_tasks,
    mean_row,
    play,
    row,
    write_json,
)
from jepa.planning.world import World, digest_of, load_world
from jepa.reports.console import header_line
from jepa.runs.metrics import read_config
from jepa.runs.state import find, read_state

log = logging.getLogger(__name__)


@dataclass
class Contender:
    """A row of the table before it is run."""

    policy: str
    cost: str
    label: str
    """Name of the run whose world it uses; empty if it uses none."""
    seed: int
    make: Callable[[], Controller]
    settings: Mapping[str, Any]
    world: World | None = None

    @cached_property
    def key(self) -> str:
        """Rows with this key are not run again; those of a world that was trained further are."""
        world = [self.label, digest_of(self.world)] if self.world else self.label
        values = [self.policy, self.cost, world, self.seed, self.settings]
        return json.dumps(values, sort_keys=True, default=str)


def plan(config: PlanConfig, worlds: Mapping[str, Path], encoders: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Evaluate the planner with every world and the baselines in outputs/NAME; returns the content of results.json.

    `worlds` are the run folders by label, `encoders` the names of their encoders if those are compared. Raises
    ConfigError if the environment does not fit the worlds.
    """
    folder = Path("outputs", config.name)
    loaded = {label: load_world(path) for label, path in worlds.items()}
    env = make_env(config, loaded)
    for label, world in loaded.items():
        check(world, env, label, config)
    tasks, digest = frozen_tasks(folder, env, config.episodes, config.seed)
    results = read_results(folder, digest, env)
    results["world"] = {label: asdict(world.contract) for label, world in loaded.items()}
    print(header(config, folder, worlds, env, len(tasks)), file=sys.stderr, flush=True)
    current, num_played = [], 0
    for contender in contenders(config, env, loaded, worlds):
        done = next((found for found in results["rows"] if found.get("key") == contender.key), None)
        if done is None:
            done = add_row(config, env, contender, tasks, results)
            print(report.row_lines(done, with_head=not num_played), flush=True)
            num_played += 1
        current.append(done)
        if encoders and contender.label:
            current[-1]["encoder"] = encoders[contender.label]
    for label in [label for label in loaded if label not in results["plannable"]]:
        results["plannable"][label] = plannability(loaded[label], costs_of(config), env, data_of(worlds[label]))
        write_json(folder / "results.json", results)
    results["rows"] = with_means(results["rows"])
    results.pop("encoders", None)
    if encoders:
        results["encoders"] = by_encoder(current, planner_name(config), results["plannable"])
    write_json(folder / "results.json", results)
    report.write(folder, config, results, env, loaded, costs_of(config), tasks)
    return results


def header(config: PlanConfig, folder: Path, worlds: Mapping[str, Path], env: BatchedEnv, num_tasks: int) -> str:
    lines = {
        "plan": f"{folder}: {planner_name(config)} with cost {'+'.join(config.cost)} in {type(env).__name__}",
        "world": ", ".join(map(str, worlds.values())),
        "tasks": f"{num_tasks:,} episodes of at most {config.budget} steps; a row for each policy when it is done",
        "report": f"{folder / 'plan.html'}, written at the end",
        "Ctrl-C": "stops; rows that are done are kept, and the same command goes on",
    }
    return "\n".join(header_line(label, text) for label, text in lines.items())


def add_row(
    config: PlanConfig, env: BatchedEnv, contender: Contender, tasks: Sequence[Task], results: dict[str, Any]
) -> dict[str, Any]:
    """Run a contender; its row, film strips and plans are saved at once."""
    folder = Path("outputs", config.name)
    log.info("%s %s", contender.policy, f"({contender.label})" if contender.label else "")
    done, played, controller = run_one(config, env, contender, tasks)
    if config.open_loop:
        save_plans(folder, contender.label, controller)
    report.save_strips(folder, contender, played, controller, env, tasks, config.videos)
    results["rows"] = [*(found for found in results["rows"] if not is_older(found, done)), done]
    results["plannable"].pop(contender.label, None)
    write_json(folder / "results.json", results)
    return done


def run_one(
    config: PlanConfig, env: BatchedEnv, contender: Contender, tasks: Sequence[Task]
) -> tuple[dict, Played, Controller]:
    """The row of a contender on all tasks; a few tasks are run alone to time an episode at batch 1."""
    controller = contender.make()
    before = contender.world.num_rows if contender.world else 0
    budget = budget_of(config, controller)
    played = play(env, controller, tasks, budget=budget, num_shown=min(config.videos, len(tasks)))
    rows = (contender.world.num_rows - before if contender.world else 0) / len(tasks)
    alone = [play(env, contender.make(), [task], budget=budget).seconds for task in tasks[:NUM_TIMED]]
    seconds = sum(alone) / len(alone)
    result = row(
        contender.policy, contender.cost, contender.seed, played, seconds_per_episode=seconds, predictor_rows=rows
    )
    return {**result, "world": contender.label, "key": contender.key}, played, controller


def is_older(found: Mapping[str, Any], done: Mapping[str, Any]) -> bool:
    """True if a row is of the same contender as the new one, with the world as it was before."""
    keys = [json.loads(result["key"]) for result in (found, done)]
    return found["world"] == done["world"] and all(keys[0][part] == keys[1][part] for part in (0, 1, 4))


def budget_of(config: PlanConfig, controller: Controller) -> int:
    """Steps of an episode: with `open_loop` a planner gets those of one plan."""
    if not (config.open_loop and isinstance(controller, Planning)):
        return config.budget
    return min(config.budget, controller.planner.horizon * controller.world.contract.block)


def save_plans(folder: Path, label: str, controller: Controller) -> None:
    """plans.json: the actions of the first plan of every task, by world."""
    if isinstance(controller, Planning):
        path = folder / "plans.json"
        plans = read_json(path) if path.exists() else {}
        write_json(path, plans | {label: controller.first_plans().tolist()})


def contenders(
    config: PlanConfig, env: BatchedEnv, worlds: Mapping[str, World], folders: Mapping[str, Path]
) -> Iterator[Contender]:
    """The baselines that exist, then policies and the planner with every world."""
    traits, settings = EnvTraits.of(env), {"budget": config.budget}
    wanted = config.baselines
    functions: dict[str, Controller] = {"random": Blind(StickyRandom(), env.actions)}
    if traits.expert:
        functions["expert"] = Function(traits.expert)
    if traits.straight_line:
        functions["straight_line"] = Function(traits.straight_line)
    for name in ("random", "straight_line", "expert"):
        if name in wanted and name in functions:
            yield Contender(name, "", "", config.seed, lambda name=name: functions[name], settings)
    if "true_dynamics" in wanted and traits.simulate and not env.actions.is_discrete:
        for name, distance in (("euclid", traits.distance), ("path", traits.path_length)):
            if distance:
                make = lambda distance=distance: TruePlanning(traits, env.actions, CEM(), distance, config.seed)  # noqa: E731
                yield Contender(f"true_dynamics_{name}", "", "", config.seed, make, settings)
    planner, cost = planner_name(config), "+".join(config.cost)
    for label, world in worlds.items():
        seed = int(read_config(folders[label]).get("seed", 0))
        for name in ("clone", "policy"):
            if (name in wanted or name == planner) and name in world.heads and traits.task:
                yield Contender(
                    name, "", label, seed, lambda name=name, world=world: HeadController(world, name), settings, world
                )
        if planner == "policy":
            continue
        details = settings | {"planner": config.planner, "cost": config.cost, "open_loop": config.open_loop}
        make = lambda world=world: Planning(world, planner_of(config), costs_of(config), config.seed)  # noqa: E731
        yield Contender(planner, cost, label, seed, make, details, world)


def planner_of(config: PlanConfig) -> Any:
    planner = factory(config.planner)()
    if config.open_loop:
        planner.execute = planner.horizon
    return planner


def planner_name(config: PlanConfig) -> str:
    return config.planner["_target_"].split(".")[-2]


def costs_of(config: PlanConfig) -> dict[str, Any]:
    return {name: factory(node)() for name, node in config.cost.items()}


def make_env(config: PlanConfig, worlds: Mapping[str, World]) -> BatchedEnv:
    """The environment of the configuration, else that of the episodes of the first world."""
    if config.env:
        return build_with(config.env)
    label, world = next(iter(worlds.items()))
    if not world.contract.env:
        raise ConfigError(
            [f"env: the episodes of {label} are recordings, of no environment that could be acted in; give env="]
        )
    return build_with(dict(stored_node(world.contract.env, Path(label, "state.json"))))


def check(world: World, env: BatchedEnv, label: str, config: PlanConfig) -> None:
    """Raises ConfigError where environment, planner and costs do not fit the world."""
    try:
        world.contract.check(env)
        towards = [name for name, cost in costs_of(config).items() if isinstance(cost, TOWARDS_GOALS)]
        if towards and not EnvTraits.of(env).task:
            raise ValueError(f"cost={towards[0]}: {type(env).__name__} has no goals; choose cost=return or cost=reward")
        Planning(world, planner_of(config), costs_of(config))
    except (ConfigError, ValueError) as error:
        raise ConfigError([f"{label}: {error}"]) from error


def data_of(run: Path) -> Episodes | None:
    """The windows that a run was trained on; None, with a line that says why, if others or none are there now."""
    config, reason = read_config(run), "are not there any more"
    node, before = config.get("dataset", {}), read_state(find(run)).get("data")
    names = ("path", "frame_skip", "hop", "val_ratio", "episodes")
    if (Path(str(node.get("path"))).expanduser() / "store.json").exists():
        try:
            data = Episodes(num_frames=config["num_frames"], **{name: node[name] for name in names if name in node})
            if not (differences := changes(before, identity(data)) if before else []):
                return data
            reason = f"have changed ({differences[0]})"
        except ValueError as error:
            reason = f"have changed ({error})"
    log.warning("%s: the episodes in %s %s: its predictions are not measured", run, node.get("path"), reason)
    return None


def read_results(folder: Path, digest: str, env: BatchedEnv) -> dict[str, Any]:
    """Earlier results on the same tasks, without means; empty results if there are none."""
    path = folder / "results.json"
    if not path.exists():
        return {"schema": SCHEMA, "tasks": digest, "world": {}, "rows": [], "plannable": {}}
    fields = {"tasks": str, "rows": list[dict], "plannable": Mapping[str, dict]}
    results = protocol.read_results(path, fields, partial(report.check, env=env), check_rows)
    if results["tasks"] != digest:
        raise ConfigError(
            [f"{path} has results on other tasks ({results['tasks'][:18]}, now {digest[:18]}); give another name="]
        )
    results["rows"] = [found for found in results["rows"] if found["seed"] is not None]
    return results


def check_rows(results: Mapping[str, Any]) -> None:
    """Raises LookupError, TypeError or ValueError for rows that cannot be averaged or compared by their keys."""
    for found in results["rows"]:
        if found["seed"] is not None:
            mean_row([found])
            _, _, _, _, _ = json.loads(found["key"])


def with_means(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """All rows, and the mean over world seeds of rows that differ in nothing else, with seed null."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for found in rows:
        if found["world"]:
            policy, cost, _, _, settings = json.loads(found["key"])
            groups.setdefault(json.dumps([policy, cost, settings, found.get("encoder")]), []).append(found)
    means = [
        mean_row(group) | {"world": ""} | {key: group[0][key] for key in ("encoder",) if key in group[0]}
        for group in groups.values() if len({row["seed"] for row in group}) > 1
    ]  # fmt: skip
    return [*rows, *means]


def by_encoder(
    rows: Sequence[dict[str, Any]], planner: str, plannable: Mapping[str, Mapping[str, float]]
) -> list[dict[str, Any]]:
    """A row for each encoder: the planner's success over its worlds together, and the means of their figures."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for found in rows:
        if found["policy"] == planner and "encoder" in found:
            groups.setdefault(found["encoder"], []).append(found)
    table = []
    for encoder, group in groups.items():
        figures = [plannable[found["world"]] for found in group]
        names = [name for name in figures[0] if all(name in figure for figure in figures)]
        means = {name: sum(figure[name] for figure in figures) / len(figures) for name in names}
        merged = {key: value for key, value in mean_row(group).items() if key not in ("seed", "outcomes")}
        table.append({"encoder": encoder, "worlds": [found["world"] for found in group], **merged, "plannable": means})
    return table

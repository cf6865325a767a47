"""jepa-rl: collect, train a world, train a policy in its dreams, evaluate; all in one folder that goes on where it was.

outputs/NAME/replay holds the episodes, world/ the run of jepa-train that trains the world, checkpoints/ actor, critic
and optimizer. Every part is a function of the seed and of what was before it, and is saved before the next one begins.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from jepa.agent import train
from jepa.config import (
    Composer,
    ConfigError,
    RLConfig,
    TrainConfig,
    as_config_errors,
    build_with,
    factory,
    override_literal,
    to_dataclass,
    to_yaml,
)
from jepa.data.episode_store import Episode, EpisodeStore
from jepa.envs.types import BatchedEnv
from jepa.errors import Interrupted, RunError
from jepa.evaluation.types import Logger
from jepa.parallel.device import device_name
from jepa.parallel.environment import requeue
from jepa.parallel.session import Session
from jepa.parallel.signals import FROM_SCHEDULERS, SIGNALS, Interrupt, listen
from jepa.planning.protocol import SCHEMA, write_json
from jepa.rl import evaluate, report
from jepa.rl.dreams import DreamWorld, load_dream_world
from jepa.rl.film import film
from jepa.rl.follow import follow
from jepa.rl.learn import learn, make_learner
from jepa.rl.policy import Actor
from jepa.rl.replay import extend, first_frames, remember
from jepa.rl.truth import compared_returns, doubts, own_rewards, truth
from jepa.runs import checkpoint
from jepa.runs.folder import RunFolder, open_folder
from jepa.runs.metrics import FolderLogger

log = logging.getLogger(__name__)
KEPT_OF_WORLD = "keep=12"
"""Checkpoints of the world, so that the one that the policy was trained in stays until the next round has its own."""


@dataclass(frozen=True)
class Parts:
    """Where the rounds of a run end, as totals from its beginning."""

    env_steps: list[int]
    world_steps: list[int]
    policy_steps: list[int]

    @classmethod
    def of(cls, config: RLConfig) -> Parts:
        """Equal shares, but for first_steps; world and policy are trained in proportion, at least a step in each."""
        count = config.rounds
        first = config.first_steps or config.env_steps // count
        ends = [first + (config.env_steps - first) * number // max(1, count - 1) for number in range(count)]
        ends[-1] = config.env_steps
        shares = (
            [number + 1 + (total - count) * end // ends[-1] for number, end in enumerate(ends)]
            for total in (config.world_steps, config.policy_steps)
        )
        return cls(ends, *shares)

    def round_of(self, policy_step: int) -> int:
        """The round in which this step of the policy is the next."""
        return sum(end <= policy_step for end in self.policy_steps)


def world_config(config: RLConfig, number: int, composer: Composer, frame_shape: Sequence[int]) -> TrainConfig:
    """The training of the world up to the end of a round, on frames of this shape. Raises ConfigError."""
    replay, steps = Path("outputs", config.name, "replay"), Parts.of(config).world_steps[number]
    shared = [f"dataset.path={override_literal(replay)}", f"seed={config.seed}", f"steps={steps}"]
    if not (replay / "store.json").exists():  # so that the rest can be checked before anything is collected
        nodes = {name: override_literal(getattr(config, name)) for name in ("env", "policy")}
        shared += ["dataset.episodes=1", *(f"dataset.{name}={node}" for name, node in nodes.items())]
    given = [f"image_size={override_literal(list(frame_shape[1:]))}", f"device={config.device}", KEPT_OF_WORLD]
    if config.rounds > 1:  # the run gets longer in each round: its learning rate must not have ended
        given += ["schedule=constant", "schedule.final_ratio=1.0"]
    if config.resume == "previous":
        given.append("resume=previous")
    chosen = [*config.world["overrides"], *given, *config.world["settings"], *config.train, *shared]
    try:
        result = to_dataclass(composer.compose(chosen))
    except ConfigError as error:
        raise ConfigError([f"training of the world: {text}" for text in error.errors]) from error
    result.name = f"{config.name}/world"
    return result


def run(config: RLConfig, composer: Composer) -> dict[str, Any]:
    """Train and evaluate in outputs/NAME; returns the content of results.json. Raises ConfigError."""
    folder = Path("outputs", config.name)
    device = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    )
    session = Session(device, bf16=False)
    with as_config_errors():
        env = build_with(config.env)
    world_config(config, 0, composer, env.frame_shape)  # is refused before anything is collected
    with (
        open_folder(folder, config=asdict(config), resume=config.resume, session=session) as run_dir,
        listen() as interrupt,
    ):
        trainer = Trainer(config, composer, folder, session, run_dir, env, interrupt)
        run_dir.begin(to_yaml(config))
        print(report.header(config, folder, trainer.kind), file=sys.stderr, flush=True)
        results = None
        try:
            trainer.train()
            results = trainer.finish()
        except Interrupted:
            log.info("stopped by %s: everything is saved", signal.Signals(interrupt.signum).name)
        finally:
            trainer.close()
        if results is None:
            if interrupt.signum in FROM_SCHEDULERS:
                requeue(os.environ)
            raise KeyboardInterrupt
        return results


def run_all(configs: Mapping[str, RLConfig], folder: Path, composer: Composer) -> dict[str, Any]:
    """Runs by what they differ in, as "seed=1"; their rows and the means over seeds are written into `folder`."""
    rows: list[dict[str, Any]] = []
    for label, config in configs.items():
        log.info("%s", label)
        others = ",".join(part for part in label.split(",") if not part.startswith("seed="))
        rows += [found | {"run": others} for found in run(config, composer)["rows"]]
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for found in rows:
        groups.setdefault((found["run"], found["policy"], str(found["env_steps"])), []).append(found)
    means = [evaluate.mean_row(group) | {"run": group[0]["run"]} for group in groups.values() if len(group) > 1]
    results = {"schema": SCHEMA, "world": {}, "rows": [*rows, *means], "history": []}
    write_json(folder / "results.json", results)
    report.write(folder, folder.name, results, [])
    return results


class Trainer:
    """The rounds of a run in its folder."""

    def __init__(
        self, config: RLConfig, composer: Composer, folder: Path, session: Session, run_dir: RunFolder,
        env: BatchedEnv, interrupt: Interrupt,
    ) -> None:  # fmt: skip
        self.config, self.composer, self.folder, self.session, self.run_dir = config, composer, folder, session, run_dir
        self.env, self.interrupt, self.device, self.parts = env, interrupt, session.device, Parts.of(config)
        self.results_path = folder / "results.json"
        self.writer = checkpoint.Writer(folder, session, keep=config.keep)
        self.last = checkpoint.latest(folder)
        state = checkpoint.peek(self.last) if self.last else {}
        self.step: int = state.get("step", 0)
        self.actor: Actor | None = None
        self.world_name, self.has_printed = "", False  # the checkpoint of the world that the actor knows
        arguments: dict[str, Any] = {
            "folder": folder, "config": asdict(config), "run_id": run_dir.facts["run_id"],
            "resume_step": self.step if self.last else None,
        }  # fmt: skip
        self.loggers: list[Logger] = [FolderLogger(**arguments, device=device_name(self.device))]
        self.loggers += [factory(node)(**arguments) for node in config.logger.values()]

    def train(self) -> None:
        """The rounds that are left."""
        number = self.parts.round_of(self.step)
        if 0 < number < self.config.rounds or (number and not self.is_evaluated()):
            self.load(self.folder / "world" / "checkpoints" / self.policy_facts()["world"])
            if self.step == self.parts.policy_steps[number - 1]:
                self.evaluate_if_due(number - 1)
        for current in range(number, self.config.rounds):
            self.collect(current)
            self.train_policy(current, *self.train_world(current))
            self.evaluate_if_due(current)

    def collect(self, number: int) -> None:
        """By the first policy, later by the one of the round before."""
        config, num_steps = self.config, self.parts.env_steps[number]
        with self.interrupt.at_once():
            extend(
                self.folder / "replay", env=self.env, policy=self.actor_that_explores, num_steps=num_steps,
                episode_steps=config.episode_steps, seed=config.seed,
            )  # fmt: skip

    def actor_that_explores(self) -> Any:
        if self.actor is None:
            return build_with(self.config.policy)
        actor = self.actor
        return Actor(actor.world, actor.model, history=actor.history, sees=actor.sees, explore=self.config.explore)

    def train_world(self, number: int) -> tuple[DreamWorld, str]:
        """The world after its part of the training in this round, and the name of its checkpoint."""
        config = world_config(self.config, number, self.composer, self.env.frame_shape)
        status = train(config, self.folder / "world", self.interrupt)
        if status - 128 in SIGNALS:
            self.interrupt.signum = self.interrupt.signum or status - 128  # of processes that were started for it
            raise Interrupted
        if status:
            raise RunError(f"{self.folder / 'world'}: its training ended with status {status}; see the messages above")
        last = checkpoint.find(self.folder / "world")
        return load_dream_world(last).to(self.device), last.name

    def load(self, place: Path) -> None:
        """The policy of the last checkpoint, in the world that it was trained in."""
        world = load_dream_world(place, dreams=False).to(self.device)
        self.world_name = place.name
        model, optimizer = make_learner(self.config, world, self.device)
        assert self.last is not None
        checkpoint.restore(self.last, model, optimizer, None)
        self.set_actor(world, model)
        self.optimizer = optimizer

    def set_actor(self, world: DreamWorld, model: Any) -> None:
        config = self.config
        self.actor = Actor(world, model, history=config.history, sees=config.sees, greedy=config.greedy)

    def train_policy(self, number: int, world: DreamWorld, world_name: str) -> None:
        """From the weights of the round before, or from those of a checkpoint within this one."""
        config, store, before = self.config, EpisodeStore(self.folder / "replay"), self.actor
        model, optimizer = make_learner(config, world, self.device)
        if before is not None:
            model.load_state_dict(before.model.state_dict())
            optimizer.load_state_dict(self.optimizer.state_dict())
        elif self.last is not None:
            checkpoint.restore(self.last, model, optimizer, None)
        with self.interrupt.at_once():
            memory = remember(world, store, range(len(store)), self.device)
            if before is not None and world_name != self.world_name:
                follow(model, before, world, memory, store, seed=config.seed, step=self.step)
        self.world_name = world_name
        self.set_actor(world, model)
        self.optimizer = optimizer
        self.step = learn(
            config, world, memory, model, optimizer, first_step=self.step, end_step=self.parts.policy_steps[number],
            interrupt=self.interrupt, log=self.log, save=self.save,
        )  # fmt: skip
        if self.interrupt.signum:
            raise Interrupted

    def policy_facts(self) -> dict[str, Any]:
        """What it takes to load the policy, of the last checkpoint."""
        assert self.last is not None
        return checkpoint.peek(self.last)["policy"]

    def save(self, step: int) -> None:
        actor = self.actor
        assert actor is not None
        facts = {
            "num_features": len(actor.model.actor.mean), "history": actor.history, "sees": actor.sees,
            "world": self.world_name,
        }  # fmt: skip
        tensors = checkpoint.training_tensors(actor.model, self.optimizer, None)
        self.writer.save(step=step, tensors=tensors, config=to_yaml(self.config), state={"policy": facts})
        self.last = checkpoint.latest(self.folder)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        steps = {"env_steps": float(self.parts.env_steps[self.parts.round_of(step - 1)])}
        for logger in self.loggers:
            logger.log(step, {**steps, **metrics})

    def read_results(self) -> dict[str, Any]:
        return report.read(self.results_path)

    def is_evaluated(self) -> bool:
        return any(found["step"] == self.step for found in self.read_results()["history"])

    def evaluate_if_due(self, number: int) -> None:
        """The policy after a round, unless that was done before."""
        is_last = number + 1 == self.config.rounds
        if not (is_last or (number + 1) % self.config.eval_every == 0) or self.is_evaluated():
            return
        results = self.read_results()
        with self.interrupt.at_once():
            found, figures = self.evaluate(number)
        self.log(
            self.step,
            {f"eval/{name}": found[name] for name in ("mean_return", "mean_steps", "success") if name in found},
        )
        self.log(self.step, {f"truth/{name}": value for name, value in figures.items()})
        entry = {"step": self.step, "env_steps": self.parts.env_steps[number], "truth": figures}
        results["history"].append(entry | {name: value for name, value in found.items() if name != "outcomes"})
        results["truth"] = figures | {"doubts": doubts(figures)}
        results["world"] = asdict(self.actor.world.contract) if self.actor else {}
        results["rows"] = [row for row in results["rows"] if row["policy"] != found["policy"]] + [found]
        write_json(self.results_path, results)
        self.show(found)

    def show(self, found: Mapping[str, Any]) -> None:
        """The row of a policy, or of a round, on the console."""
        print(report.row_lines(found, with_head=not self.has_printed), flush=True)
        self.has_printed = True

    def evaluate(self, number: int) -> tuple[dict[str, Any], dict[str, float]]:
        """The row of the policy, and what is true of the world."""
        config, actor = self.config, self.actor
        assert actor is not None
        log.info("evaluating %s episodes after %s steps", config.eval_episodes, f"{self.parts.env_steps[number]:,}")
        found, episodes = self.played(self.kind, actor, self.parts.env_steps[number])
        store = EpisodeStore(self.folder / "replay")
        held_out = held_out_numbers(len(store), world_config(config, number, self.composer, self.env.frame_shape))
        figures = truth(actor.world, store, held_out, remember(actor.world, store, held_out, self.device))
        begun = first_frames(actor.world, episodes, self.device)
        figures |= compared_returns(actor, episodes, begun, seed=config.seed, steps=config.episode_steps)
        figures |= own_rewards(actor.world, episodes, self.device)
        return found, figures

    @property
    def kind(self) -> str:
        """ "jepa" or "iris": the name of the policy's row."""
        return "jepa" if any("objective=dynamics" in one for one in self.config.world["overrides"]) else "iris"

    def played(self, name: str, policy: Any, env_steps: int) -> tuple[dict[str, Any], list[Episode]]:
        """The row of a policy, and its episodes."""
        config = self.config
        episodes, seconds = evaluate.play_episodes(
            self.env, policy, num_episodes=config.eval_episodes, episode_steps=config.episode_steps, seed=config.seed
        )
        measured = {"seed": config.seed, "env_steps": env_steps, "seconds": seconds}
        return evaluate.row(name, episodes, success_return=config.success_return, **measured), episodes

    def finish(self) -> dict[str, Any]:
        """Baselines, films and the page."""
        results = self.read_results()
        for name, env_steps, make in self.baselines():
            if not any(found["policy"] == name and found["env_steps"] == env_steps for found in results["rows"]):
                log.info("%s, %s steps", name, f"{env_steps:,}")
                with self.interrupt.at_once():
                    results["rows"].append(self.played(name, make(), env_steps)[0])
                write_json(self.results_path, results)
                self.show(results["rows"][-1])
        with self.interrupt.at_once():
            films = self.films()
        report.write(self.folder, self.config.name, results, films)
        return results

    def baselines(self) -> Iterator[tuple[str, int, Callable[[], Any]]]:
        """Name, steps of the environment, and the policy."""
        config = self.config
        if "random" in config.baselines:
            yield "random", 0, partial(build_with, config.policy)
        for name in config.baselines:
            if name.startswith("ppo"):
                encoder = self.folder / "world" if name == "ppo_features" else None
                for steps in (config.env_steps * factor for factor in config.ppo_steps):
                    yield name, steps, partial(self.ppo, steps, encoder)

    def ppo(self, steps: int, encoder: Path | None) -> Any:
        from jepa.rl.baselines import ppo_policy  # needs an extra

        config = self.config
        return ppo_policy(
            config.env, steps=steps, seed=config.seed, episode_steps=config.episode_steps, encoder=encoder
        )

    def films(self) -> list[Any]:
        actor = self.actor
        if actor is None:
            self.train_world(self.config.rounds - 1)  # is finished; heads that are not there are fitted again
            self.load(self.folder / "world" / "checkpoints" / self.policy_facts()["world"])
            actor = self.actor
        assert actor is not None
        steps, seed = min(self.config.episode_steps, report.MAX_SHOWN), self.config.seed
        return [film(self.env, actor, steps=steps, seed=seed + 1000 * n) for n in range(self.config.videos)]

    def close(self) -> None:
        self.run_dir.end(self.interrupt.signum)
        for logger in self.loggers:
            logger.close(self.run_dir.status)
        self.env.close()


def held_out_numbers(count: int, config: TrainConfig) -> range:
    """The episodes that the world was not trained on; all if there are too few to hold any out."""
    held_out = round(config.dataset.get("val_ratio", 0) * count)
    return range(count - held_out, count) if held_out else range(count)

"""Controllers: what acts in an environment to reach goals, from a random policy to planning with a world model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from jepa.envs.types import EnvTraits
from jepa.planning.costs import total
from jepa.planning.fit import decoded
from jepa.planning.steps import WorldSteps
from jepa.planning.types import Cost, Imagined, Moments, Planner, PlannerTraits, Search
from jepa.planning.world import World
from jepa.seeding import generator
from jepa.types import ActionSpace

FILMED = 8
"""Number of first episodes whose imagined states are kept."""


class Goals(NamedTuple):
    """Of B episodes."""

    frames: np.ndarray
    """uint8 [B, C, H, W]"""
    states: np.ndarray
    """float32 [B, S]: what the simulator knows"""


class Controller(Protocol):
    """Acts in B episodes at once; an action depends on its own episode alone."""

    def begin(self, goals: Goals, seeds: Sequence[int], num_steps: int) -> None: ...

    def act(self, step: int, frames: np.ndarray, states: np.ndarray, active: np.ndarray) -> np.ndarray:
        """Frames uint8 [B, C, H, W] and states [B, S] -> actions of the environment, [B, A] or [B].

        Actions of episodes that are not `active`, bool [B], are not used.
        """
        ...


class Function:
    """Actions from a function of true states and goals: the straight line, or an expert."""

    def __init__(self, function: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
        self.function = function

    def begin(self, goals: Goals, seeds: Sequence[int], num_steps: int) -> None:
        self.goals = goals

    def act(self, step: int, frames: np.ndarray, states: np.ndarray, active: np.ndarray) -> np.ndarray:
        return self.function(states, self.goals.states)


class Blind:
    """A policy for collecting, which knows no goal."""

    def __init__(self, policy: Any, space: ActionSpace) -> None:
        self.policy, self.space = policy, space

    def begin(self, goals: Goals, seeds: Sequence[int], num_steps: int) -> None:
        self.policy.begin(self.space, seeds, num_steps)

    def act(self, step: int, frames: np.ndarray, states: np.ndarray, active: np.ndarray) -> np.ndarray:
        return self.policy.act(step, frames, states)


class HeadController:
    """The policy or the clone of a world: one forward pass a step."""

    def __init__(self, world: World, head: str) -> None:
        self.world, self.head = world, world.heads[head]

    def begin(self, goals: Goals, seeds: Sequence[int], num_steps: int) -> None:
        self.goals = one_by_one(self.world.encode, goals.frames)
        self.seen: list[Tensor] = []

    @torch.no_grad()
    def act(self, step: int, frames: np.ndarray, states: np.ndarray, active: np.ndarray) -> np.ndarray:
        self.seen.append(one_by_one(self.world.encode, frames))
        choose = partial(head_actions, self.world, self.head)
        actions = one_by_one(choose, last_states(self.seen, self.world.history, self.world.contract.block), self.goals)
        return first_of_block(self.world.unscale(actions), self.world)


class Planning:
    """Model predictive control: plan, execute the first steps of the plan, plan again from what is seen then."""

    def __init__(self, world: World, planner: Planner, costs: Mapping[str, Cost], seed: int = 0) -> None:
        self.world, self.planner, self.costs, self.seed = world, planner, costs, seed
        needs = [name for cost in costs.values() for name in cost.needs]
        needs += ["policy"] * (PlannerTraits.of(planner).warm_start == "policy")
        needs += PlannerTraits.of(planner).needs
        if missing := [name for name in needs if name not in world.heads]:
            raise ValueError(f"planner, cost: the world has no head {missing[0]}; add it to objective.heads and fit it")

    def begin(self, goals: Goals, seeds: Sequence[int], num_steps: int) -> None:
        self.goals = one_by_one(self.world.encode, goals.frames)
        self.seen: list[Tensor] = []
        self.done: list[Tensor] = []
        self.plan: Tensor | None = None
        self.first: Tensor | None = None
        self.imagined: list[Tensor] = []
        self.seeds = list(seeds)

    @torch.no_grad()
    def act(self, step: int, frames: np.ndarray, states: np.ndarray, active: np.ndarray) -> np.ndarray:
        """Frames before the first action of a block of actions are seen by the world."""
        position, part = divmod(step, self.world.contract.block)
        if part == 0:
            self.seen.append(one_by_one(self.world.encode, frames))
            if position % self.planner.execute == 0:
                self._plan(step, active)
            assert self.plan is not None
            self.done.append(self.plan[:, position % self.planner.execute])
            self.imagined.append(self.outcome[:, position % self.planner.execute])
        actions = self.world.unscale(self.done[-1])
        return (actions if self.world.contract.block == 1 else actions[:, part]).numpy()

    def _plan(self, step: int, active: np.ndarray) -> None:
        world, planner = self.world, self.planner
        generators = [generator(self.seed, step, seed, "plan") for seed in self.seeds]
        history = self._history()
        search = Search(
            cost=lambda candidates: self._cost(candidates, history, active), horizon=planner.horizon,
            size=plan_size(world), num_actions=world.contract.actions.num_actions, generators=generators,
            warm_start=self._warm_start(history),
            steps=list(self._steps(active)) if "metric" in PlannerTraits.of(planner).needs else (),
        )  # fmt: skip
        self.plan = planner(search)
        self.first = self.plan if self.first is None else self.first
        past = torch.cat([history[1], self.plan], dim=1)[:FILMED]
        self.outcome = world.rollout(history[0][:FILMED], world.unscale(past))  # [n, H, S, Z]

    def first_plans(self) -> np.ndarray:
        """Actions of the environment of the first plan of each episode: [B, H, A], or [B, H] if they are discrete."""
        assert self.first is not None
        return self.world.unscale(self.first).numpy()

    def film(self, episode: int, num_frames: int) -> Tensor | None:
        """uint8 [T, C, h, w]: the imagined frames of an episode, after the true first one; None without a decoder."""
        if "decoder" not in self.world.heads or self.world.contract.block > 1 or episode >= FILMED:
            return None
        states = torch.stack([self.seen[0][episode], *(imagined[episode] for imagined in self.imagined)])[:num_frames]
        return decoded(self.world.heads["decoder"](states.flatten(1)), self.world.contract.frame_shape[0])

    def _steps(self, active: np.ndarray) -> Iterator[WorldSteps | None]:
        """Of each episode; None for those that are over."""
        moments = zip(*(self._history(decision) for decision in range(len(self.seen))), strict=True)
        states, actions = (torch.stack(parts, dim=1) for parts in moments)  # [B, t, h, S, Z], [B, t, h - 1, A]
        for row, goal in enumerate(self.goals):
            past, done = Moments(states[row], actions[row]), [action[row] for action in self.done]
            yield WorldSteps(self.world, self.costs, goal, past, done) if active[row] else None

    def _history(self, decision: int | None = None) -> tuple[Tensor, Tensor]:
        """At a decision, by default now: the last states [B, h, S, Z] and the actions between them [B, h - 1, A].

        Actions before the first are 0.
        """
        count, decision = self.world.history, len(self.done) if decision is None else decision
        idle = torch.zeros(len(self.seeds), plan_size(self.world))
        if self.world.contract.actions.is_discrete:
            idle = idle.long()
        done = [*[idle] * (count - 1), *self.done[:decision]][decision:]
        return last_states(self.seen[: decision + 1], count), torch.stack(done, dim=1) if done else idle[:, None][:, :0]

    def _warm_start(self, history: tuple[Tensor, Tensor]) -> Tensor | None:
        if PlannerTraits.of(self.planner).warm_start == "policy":
            return policy_plan(self.world, history, self.goals, self.planner.horizon)
        if self.plan is None:
            return None
        rest = self.plan[:, self.planner.execute :]
        padding = self.plan[:, -1:] if self.world.contract.actions.is_discrete else torch.zeros_like(self.plan[:, :1])
        return torch.cat([rest, padding.expand(-1, self.plan.shape[1] - rest.shape[1], -1)], dim=1)

    def _cost(self, candidates: Tensor, history: tuple[Tensor, Tensor], active: np.ndarray) -> Tensor:
        """[B, N, H, A] -> [B, N]; one episode after the other, so that a plan is the same in any batch, bit for bit."""
        idle = torch.zeros(candidates.shape[1])
        rows = enumerate(candidates)
        return torch.stack(
            [self._cost_of(row, row_candidates, history) if active[row] else idle for row, row_candidates in rows]
        )

    def _cost_of(self, row: int, candidates: Tensor, history: tuple[Tensor, Tensor]) -> Tensor:
        """[N, H, A] -> [N]"""
        states, past = (part[row].expand(len(candidates), *part.shape[1:]) for part in history)
        actions = self.world.unscale(torch.cat([past, candidates], dim=1))
        imagined = Imagined(self.world.rollout(states, actions), states[0], self.goals[row], candidates)
        return total(self.costs, self.world, imagined)


class TruePlanning:
    """As Planning, with the simulator's own dynamics and a distance of true states: a bound that knows everything."""

    def __init__(
        self, traits: EnvTraits, space: ActionSpace, planner: Planner, distance: Callable, seed: int = 0
    ) -> None:
        self.traits, self.space, self.planner, self.distance, self.seed = traits, space, planner, distance, seed

    def begin(self, goals: Goals, seeds: Sequence[int], num_steps: int) -> None:
        self.goals, self.seeds = goals, list(seeds)
        self.plan: Tensor | None = None

    def act(self, step: int, frames: np.ndarray, states: np.ndarray, active: np.ndarray) -> np.ndarray:
        part = step % self.planner.execute
        if part == 0:
            rest = None if self.plan is None else self.plan[:, self.planner.execute :]
            if rest is not None:
                rest = torch.cat([rest, torch.zeros(len(rest), self.planner.execute, rest.shape[2])], dim=1)
            generators = [generator(self.seed, step, seed, "plan") for seed in self.seeds]
            size = self.space.size
            search = Search(lambda plans: self._cost(plans, states), self.planner.horizon, size, 0, generators, rest)
            self.plan = self.planner(search)
        assert self.plan is not None
        return self.space.unscale(self.plan[:, part].numpy())

    def _cost(self, candidates: Tensor, states: np.ndarray) -> Tensor:
        """[B, N, H, A] -> [B, N]: the distances after all steps, summed"""
        batch, count, horizon, _ = candidates.shape
        now, goals = (np.repeat(values, count, axis=0) for values in (states, self.goals.states))
        costs = np.zeros(batch * count)
        assert self.traits.simulate is not None
        for step in range(horizon):
            now = self.traits.simulate(now, self.space.unscale(candidates[:, :, step].flatten(0, 1).numpy()))
            costs += self.distance(now, goals)
        return torch.from_numpy(costs).float().unflatten(0, (batch, count))


def one_by_one(function: Callable[..., Tensor], *batches: Any) -> Tensor:
    """The function of each row by itself: the same bits in any batch, other than products of many rows."""
    return torch.cat([function(*(batch[row : row + 1] for batch in batches)) for row in range(len(batches[0]))])


def plan_size(world: World) -> int:
    """Numbers of an action of a plan; discrete actions have one for each action of a block."""
    space, block = world.contract.actions, world.contract.block
    return block if space.is_discrete else block * space.size


def last_states(seen: Sequence[Tensor], count: int, stride: int = 1) -> Tensor:
    """Of the states [B, S, Z] at each step the last ones [B, count, S, Z]; the first is repeated if there are fewer."""
    places = range(len(seen) - 1 - stride * (count - 1), len(seen), stride)
    return torch.stack([seen[max(0, place)] for place in places], dim=1)


def head_actions(world: World, head: nn.Module, states: Tensor, goals: Tensor) -> Tensor:
    """The last states [B, h, S, Z], goals [B, S, Z] -> actions [B, A] in [-1, 1], or the likeliest, long [B, block]"""
    outputs = head(states.flatten(1), goals.flatten(1))
    if world.contract.actions.is_discrete:
        return outputs.unflatten(1, (world.contract.block, -1)).argmax(dim=2)
    return outputs.clamp(-1, 1)


def first_of_block(actions: Tensor, world: World) -> np.ndarray:
    return (actions if world.contract.block == 1 else actions[:, 0]).numpy()


def policy_plan(world: World, history: tuple[Tensor, Tensor], goals: Tensor, horizon: int) -> Tensor:
    """The actions [B, H, A] of the policy head in imagination, after the last states and the actions between them."""
    states, actions = history
    for _ in range(horizon):
        chosen = head_actions(world, world.heads["policy"], states, goals)
        actions = torch.cat([actions, chosen[:, None]], dim=1)
        following = world.step(states, world.unscale(actions[:, -world.history :]))
        states = torch.cat([states[:, 1:], following[:, None]], dim=1)
    return actions[:, world.history - 1 :]

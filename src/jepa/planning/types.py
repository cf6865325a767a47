"""What planners, costs and worlds hand to each other.

Legend of shape letters: B episodes, N candidates, H steps of a plan, A numbers of an action or block of actions,
S state tokens, Z their width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Generator, Tensor

from jepa.planning.heads import windows_of
from jepa.types import Traits


class Search(NamedTuple):
    """What a planner minimises over, for several episodes at once."""

    cost: Callable[[Tensor], Tensor]
    """Candidates [B, N, H, A] in [-1, 1], or whole numbers [B, N, H, block] -> costs [B, N]; differentiable"""
    horizon: int
    size: int
    """A, or the block if actions are discrete."""
    num_actions: int
    """0 for continuous actions."""
    generators: Sequence[Generator]
    """One for each episode, so that a plan does not depend on what it is batched with."""
    warm_start: Tensor | None = None
    """[B, H, A] or [B, H, block]: the rest of the last plan, or the actions of a policy"""
    steps: Sequence[Steps | None] = ()
    """For planners that need the head metric: one for each episode, None for those that are over"""


class Moments(NamedTuple):
    """What dynamics read at n times, before the action that is to come."""

    states: Tensor
    """[n, h, S, Z]: the last states"""
    actions: Tensor
    """[n, h - 1, A]: those between them"""


class Steps(Protocol):
    """Single steps of one episode, imagined by a world (jepa.planning.steps)."""

    past: Moments
    """Of all t decisions so far; the last one is to be made now."""
    done: Sequence[Tensor]
    """t - 1 of [A]: the actions taken before"""
    choices: Tensor
    """[n, A] in [-1, 1] or long [n, block]: full-size actions in all directions, or all discrete ones"""

    def step(self, moments: Moments, actions: Tensor) -> Moments:
        """n moments and the action after each, [n, A] in [-1, 1] or long [n, block] -> the next n moments"""
        ...

    def costs_of(self, moments: Moments, actions: Tensor, following: Moments) -> Tensor:
        """Of being at the moments that follow: [n]"""
        ...

    def places(self, moments: Moments) -> Tensor:
        """[n, k]: distances between them count steps"""
        ...


class Planner(Protocol):
    """Minimises the cost of a sequence of actions: -> plans [B, H, A] in [-1, 1], or long [B, H, block]."""

    horizon: int
    """Steps of a plan."""
    execute: int
    """Steps that are executed before the next plan is made."""

    def __call__(self, search: Search) -> Tensor: ...


@dataclass(frozen=True)
class PlannerTraits(Traits):
    """Optional attributes of a planner."""

    is_discrete: bool | None = False
    """True if it plans discrete actions, and only those; None if it plans any."""
    needs: Sequence[str] = ()
    """Names of the heads of the world that it reads itself."""
    warm_start: str = "plan"
    """"plan": the rest of the last plan; "policy": the actions of the world's policy head"""


class Imagined(NamedTuple):
    """Candidates of one episode, as a cost sees them."""

    states: Tensor
    """[N, H, S, Z]: predicted states after each action"""
    history: Tensor
    """[h, S, Z], or those of each candidate [N, h, S, Z]: the last known states, before the first action"""
    goal: Tensor
    """[S, Z]"""
    actions: Tensor
    """[N, H, A] in [-1, 1], or long [N, H, block]"""

    @property
    def seen(self) -> Tensor:
        """What heads read after each action, [N, H, h S Z]: the states of the last frames, known and predicted ones."""
        known = self.history[..., 1:, :, :]
        known = known.expand(len(self.states), *known.shape[-3:])
        return windows_of(torch.cat([known, self.states], dim=1), known.shape[1] + 1)


class Cost(Protocol):
    """Costs [N] of imagined candidates; attribute `needs`: names of the heads of the world that it reads."""

    needs: Sequence[str]

    def __call__(self, world: Any, imagined: Imagined) -> Tensor: ...

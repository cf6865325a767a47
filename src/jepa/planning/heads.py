"""Small networks on the frozen states of a world model: values, distances, policies, probes, rewards, pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa.layers.two_hot import NUM_BINS, TwoHot
from jepa.types import ActionSpace

WIDTH, DEPTH = 256, 2
"""Width and number of hidden layers of a head."""
LR = 1e-3
BATCH_SIZE = 512
GAMMA = 0.97
"""Discount of a step in values and returns, unless a run says another."""
EXPECTILE = 0.9
"""Of values and returns: they are optimistic about which action is taken."""
NEAR = 0.1
"""Expectile of the temporal distance: of the ways between two frames the shorter ones count."""
AVERAGE = 0.98
"""Momentum of the average of the value that its targets are computed with."""
OTHER_GOALS, OWN_GOALS = 0.3, 0.65
"""Shares of goals that are frames of any episode, and later frames of their state's own; the rest are the state."""
TEMPERATURE = 10.0
"""Of the advantage that weights the actions of a policy."""
MAX_WEIGHT = 100.0
STATES_IN = {
    "value": 2, "distance": 2, "policy": 2, "clone": 2, "probe": 1, "reward": 1, "continuation": 1, "return": 1,
    "decoder": 1,
}  # fmt: skip
"""Number of states that each head reads: two are a state and a goal.

The state is that of the last frames, as many as the world's history; goals and pictures are of one frame.
"""


LEARNT_SOON = {"probe", "decoder"}
"""Heads that are fitted for a quarter of the steps."""
DISCOUNTED = {"value", "return"}
"""Heads that count what is far ahead less."""
READ_DREAMS = {"value", "distance", "return"}
"""Heads that are fitted on states imagined some steps before, too."""


class Recordings(NamedTuple):
    """Frozen states of all frames of some episodes, one episode after the other; F frames."""

    states: Tensor
    """float32 [F, D]"""
    ends: Tensor
    """long [F]: index of the last frame of the episode that each frame belongs to"""
    actions: Tensor
    """float32 [F, A] in [-1, 1], or one-hot codes: the action after each frame; zeros after the last of an episode"""
    rewards: Tensor
    """float32 [F]: of the transition that led to each frame; 0 for the first of an episode"""
    terminated: Tensor
    """float32 [F]: 1 if that transition ended the world"""
    simulator: Tensor
    """float32 [F, Q]: what the simulator knows"""
    frames: Tensor
    """float32 [F or 0, P]: small pictures in [0, 1], flattened, for the decoder"""
    space: ActionSpace
    history: int = 1
    """Frames that heads read"""
    predicted: Tensor | None = None
    """float32 [F, D]: each state as predicted from the one before it; None takes the states themselves"""
    imagined: Tensor | None = None
    """float32 [F, D]: each state as predicted from one some steps before it; None takes the states themselves"""

    def seen(self, rows: Tensor) -> Tensor:
        """What heads read at the frames `rows` [n]: [n, h D]; the first of an episode is repeated at its start."""
        first = torch.searchsorted(self.ends, self.ends[rows])
        past = rows[:, None] + torch.arange(1 - self.history, 1)
        return self.states[torch.maximum(past, first[:, None])].flatten(1)

    def foreseen(self, rows: Tensor) -> Tensor:
        """As `seen`, with the state of the frame itself as it is predicted one step before."""
        return self._ending(rows, self.predicted)

    def dreamt(self, rows: Tensor) -> Tensor:
        """As `seen`, with the state of the frame itself as it is imagined some steps before, as the end of a plan."""
        return self._ending(rows, self.imagined)

    def _ending(self, rows: Tensor, states: Tensor | None) -> Tensor:
        last = self.states if states is None else states
        return torch.cat([self.seen(rows)[:, : -last.shape[1]], last[rows]], dim=1)

    @property
    def transitions(self) -> Tensor:
        """Indices of the frames that have a successor."""
        return torch.nonzero(torch.arange(len(self.states)) < self.ends)[:, 0]


class MLPHead(nn.Module):
    """Standardised states, concatenated, to `size` numbers by an MLP with layer normalisation."""

    mean: Tensor
    std: Tensor
    offset: Tensor
    scale: Tensor

    def __init__(self, state_size: int, num_states: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("mean", torch.zeros(state_size))
        self.register_buffer("std", torch.ones(state_size))
        self.register_buffer("offset", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))
        sizes = [num_states * state_size, *[WIDTH] * DEPTH]
        layers = [(nn.Linear(inputs, outputs), nn.LayerNorm(outputs), nn.GELU()) for inputs, outputs in pairwise(sizes)]
        self.layers = nn.Sequential(*(module for layer in layers for module in layer), nn.Linear(WIDTH, size))

    def standardise_by(self, states: Tensor) -> None:
        self.mean.copy_(states.mean(dim=0))
        self.std.copy_(states.std(dim=0).clamp(min=1e-4))

    def forward(self, *states: Tensor) -> Tensor:
        """States of one or several frames [.., D] or [.., h D], num_states in all -> [.., size]"""
        hidden = torch.cat(states, dim=-1).unflatten(-1, (-1, len(self.mean)))
        hidden = ((hidden - self.mean) / self.std).flatten(-2)
        return self.offset + self.scale * self.layers(hidden)


class RewardHead(MLPHead):
    """The expected reward [.., 1], from a distribution over bins: a rare one is not smoothed over others."""

    def __init__(self, state_size: int, num_states: int) -> None:
        super().__init__(state_size, num_states, NUM_BINS)
        self.code = TwoHot()

    def forward(self, *states: Tensor) -> Tensor:
        return self.code.mean(super().forward(*states))[..., None]

    def loss(self, states: Tensor, rewards: Tensor) -> Tensor:
        """[n, h D], [n] -> cross-entropies [n]"""
        return self.code.loss(super().forward(states), rewards)


def build_head(name: str, state_size: int, size: int, history: int = 1) -> MLPHead:
    """Raises KeyError for an unknown name."""
    num_states = STATES_IN[name] + (0 if name == "decoder" else history - 1)
    return RewardHead(state_size, num_states) if name == "reward" else MLPHead(state_size, num_states, size)


def windows_of(states: Tensor, history: int) -> Tensor:
    """States of frames [n, T, S, Z] -> what heads read at all but the first h - 1 of them: [n, T - h + 1, h S Z]"""
    return states.flatten(2).unfold(1, history, 1).mT.flatten(2)


def fit(
    head: nn.Module, loss: Callable[[Tensor], Tensor], rows: Tensor, num_steps: int, random: torch.Generator,
    average: nn.Module | None = None,
) -> float:  # fmt: skip
    """Minimise `loss(indices)` over batches drawn from `rows`; returns the mean loss of the last tenth.

    An `average` of the head, which the loss may read, follows it.
    """
    optimizer = torch.optim.AdamW(head.parameters(), lr=LR, weight_decay=1e-4)
    losses = []
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1, (step + 1) / 100) * (1 + math.cos(math.pi * step / num_steps)) / 2
        value = loss(rows[torch.randint(len(rows), (BATCH_SIZE,), generator=random)])
        if average is not None:
            with torch.no_grad():
                torch._foreach_lerp_(list(average.parameters()), list(head.parameters()), 1 - AVERAGE)  # pyright: ignore
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        losses.append(value.detach())
    return torch.stack(losses[-max(1, num_steps // 10) :]).mean().item()


def expectile_loss(error: Tensor, expectile: float) -> Tensor:
    """Mean of squared errors; positive ones are weighted by `expectile`, others by 1 - `expectile`."""
    return (torch.where(error > 0, expectile, 1 - expectile) * error.square()).mean()


def later(data: Recordings, rows: Tensor, random: torch.Generator) -> Tensor:
    """A later frame of the same episode for each frame [n] that has a successor"""
    ahead = torch.rand(len(rows), generator=random) * (data.ends[rows] - rows)
    return torch.minimum(rows + 1 + ahead.floor().long(), data.ends[rows])


def mixed_goals(data: Recordings, rows: Tensor, random: torch.Generator) -> Tensor:
    """Goals for the frames `rows` [n]: frames of any episode, later frames of their own, or themselves."""
    kind = torch.rand(len(rows), generator=random)
    other = torch.randint(len(data.states), (len(rows),), generator=random)
    goals = torch.where(kind < OTHER_GOALS, other, later(data, rows, random))
    return torch.where(kind < OTHER_GOALS + OWN_GOALS, goals, rows)


class Fit(NamedTuple):
    """What the loss of a head reads, besides the rows [n] of a batch."""

    head: Any
    data: Recordings
    random: torch.Generator
    fitted: Mapping[str, MLPHead]
    """Heads that were fitted before."""
    average: Any
    """Of the head of a value."""
    target: Tensor | None
    """float32 [F, Q]: what a head without a loss of its own predicts of each frame"""
    gamma: float
    """Discount of a step"""


def value_loss(fit: Fit, rows: Tensor) -> Tensor:
    """Goal-conditioned value: minus the discounted number of steps to the goal, on the best known way.

    Implicit V-learning (HIQL, Park et al. 2023, equation 5): the expectile of -1 + gamma V(next state, goal). Where the
    goal was reached later in the same episode, the number of steps that it took is a bound (optimality tightening, He
    et al. 2017), without which values spread by one step an update. Such values were proposed as planning costs of
    JEPAs in arXiv:2601.00844. It is fitted on encoded and on predicted states, since plans are made of predicted ones.
    """
    data = fit.data
    is_last = rows == data.ends[rows]  # what was reached there is all that is known of it
    goals = torch.where(is_last, rows, mixed_goals(data, rows, fit.random))
    after, goal = data.seen(torch.where(is_last, rows, rows + 1)), data.states[goals]
    with torch.no_grad():
        following = -1 + fit.gamma * fit.average(after, goal)[:, 0].clamp(-1 / (1 - fit.gamma), 0)
        reached_in = torch.where((goals >= rows) & (goals <= data.ends[rows]), goals - rows, torch.inf)
        target = torch.maximum(following, -(1 - fit.gamma**reached_in) / (1 - fit.gamma))
    errors = (target - fit.head(read(rows), goal)[:, 0] for read in (data.seen, data.dreamt))
    return torch.stack([expectile_loss(error, EXPECTILE) for error in errors]).mean()


def distance_loss(fit: Fit, rows: Tensor) -> Tensor:
    """Temporal distance: a low expectile of the logarithm of the number of steps between two frames of an episode.

    It is fitted on encoded and on predicted states.
    """
    data = fit.data
    goals = later(data, rows, fit.random)
    steps = (goals - rows).float().log1p()
    predicted = (F.softplus(fit.head(read(rows), data.states[goals])[:, 0]) for read in (data.seen, data.dreamt))
    return torch.stack([expectile_loss(steps - guess.log1p(), NEAR) for guess in predicted]).mean()


def clone_loss(fit: Fit, rows: Tensor) -> Tensor:
    """Goal-conditioned behaviour cloning: the action on the way to a later frame of the same episode."""
    data = fit.data
    goals = later(data, rows, fit.random)
    return action_error(fit.head(data.seen(rows), data.states[goals]), data.actions[rows], data.space).mean()


def policy_loss(fit: Fit, rows: Tensor) -> Tensor:
    """Goal-conditioned inverse dynamics (GC-IDM), towards goals anywhere.

    Each action is weighted by exp(temperature * advantage) of the value (AWR, Peng et al. 2019): how much nearer to the
    goal it led.
    """
    data, value = fit.data, fit.fitted["value"]
    goals = mixed_goals(data, rows, fit.random)
    state, after, goal = data.seen(rows), data.seen(rows + 1), data.states[goals]
    with torch.no_grad():
        advantage = value(after, goal)[:, 0] - value(state, goal)[:, 0]
        weight = (TEMPERATURE * advantage).exp().clamp(max=MAX_WEIGHT)
    error = action_error(fit.head(state, goal), data.actions[rows], data.space)
    return (weight * error).sum() / weight.sum()


def action_error(predicted: Tensor, actions: Tensor, space: ActionSpace) -> Tensor:
    """[n, A], [n, A] -> [n]: squared error, or the cross-entropy of discrete actions"""
    if not space.is_discrete:
        return (predicted - actions).square().mean(dim=1)
    choices = (len(actions), -1, space.num_actions)
    return -(actions.reshape(choices) * predicted.reshape(choices).log_softmax(dim=2)).sum(dim=(1, 2))


def return_loss(fit: Fit, rows: Tensor) -> Tensor:
    """The discounted sum of the rewards after a state, if good actions are taken.

    Implicit V-learning (IQL, Kostrikov et al. 2022): the expectile of reward + gamma V(next state). It is fitted on
    encoded and on predicted states, since plans end in predicted ones.
    """
    data, after = fit.data, rows + 1
    with torch.no_grad():
        following = (1 - data.terminated[after]) * fit.average(data.seen(after))[:, 0]
        target = data.rewards[after] + fit.gamma * following
    errors = (target - fit.head(read(rows))[:, 0] for read in (data.seen, data.dreamt))
    return torch.stack([expectile_loss(error, EXPECTILE) for error in errors]).mean()


def reward_loss(fit: Fit, rows: Tensor) -> Tensor:
    """The reward of a transition, read from the state as it is foreseen, which the action alone decides.

    In the one that followed, other things may be visible, such as the next goal.
    """
    return fit.head.loss(fit.data.foreseen(rows), fit.data.rewards[rows]).mean()


def continuation_loss(fit: Fit, rows: Tensor) -> Tensor:
    """The logit of going on after a state."""
    return F.binary_cross_entropy_with_logits(fit.head(fit.data.foreseen(rows))[:, 0], 1 - fit.data.terminated[rows])


def regression_loss(fit: Fit, rows: Tensor) -> Tensor:
    """Squared error of the standardised target."""
    assert fit.target is not None
    return ((fit.head(fit.data.seen(rows)) - fit.target[rows]) / fit.head.scale).square().mean()


LOSSES: dict[str, Callable[[Fit, Tensor], Tensor]] = {
    "value": value_loss, "distance": distance_loss, "policy": policy_loss, "clone": clone_loss,
    "continuation": continuation_loss, "return": return_loss, "reward": reward_loss,
}  # fmt: skip
OF_TRANSITIONS = {"distance", "policy", "clone", "return"}
"""Heads that are fitted on frames with a successor alone."""


def fit_head(
    name: str, data: Recordings, fitted: Mapping[str, MLPHead], num_steps: int, seed: int, gamma: float = GAMMA
) -> tuple[MLPHead, float]:
    """A fitted head, and its last loss. `fitted` has the heads before it; a policy needs the value."""
    target = {"probe": data.simulator, "decoder": data.frames}.get(name)
    size = data.actions.shape[1] if name in ("policy", "clone") else 1 if target is None else target.shape[1]
    random = torch.Generator().manual_seed(seed)
    data = data._replace(history=1) if name == "decoder" else data
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = build_head(name, data.states.shape[1], size, data.history)
    head.standardise_by(data.states)
    if target is not None:
        head.offset.copy_(target.mean(dim=0))
        head.scale.copy_(target.std(dim=0).clamp(min=1e-4))
    average = deepcopy(head).requires_grad_(False) if name in ("value", "return") else None
    loss = partial(LOSSES.get(name, regression_loss), Fit(head, data, random, fitted, average, target, gamma))
    rows = data.transitions if name in OF_TRANSITIONS else torch.arange(len(data.states))
    steps = -(-num_steps // 4) if name in LEARNT_SOON else num_steps
    last = fit(head, loss, rows, steps, random, average)
    return head.requires_grad_(False).eval(), last

"""Actor and critic on features of a world, and their loss on imagined steps (DreamerV3, Hafner et al. 2023)."""

from __future__ import annotations

from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal, kl_divergence

from jepa.layers.two_hot import NUM_BINS, TwoHot
from jepa.planning.heads import MLPHead
from jepa.rl.returns import lambda_returns, still_alive
from jepa.types import ActionSpace

UNIFORM = 0.01
"""Share of a uniform distribution in that of discrete actions, so that none becomes impossible."""
MIN_STD, MAX_STD = 0.1, 1.0
"""Of continuous actions in [-1, 1]."""
SLOW = 0.98
"""Momentum of the average of the critic that values what comes after an imagined step."""
SPREAD = 0.99
"""Momentum of the average of the spread of returns."""
LOW, HIGH = 0.05, 0.95
"""Quantiles of the returns whose difference is their spread."""


class DreamtSteps(NamedTuple):
    """Of H steps in B dreams; step t leads from frame t to frame t + 1."""

    features: Tensor
    """float32 [H + 1, B, F]"""
    choices: Tensor
    """[H, B, A] as drawn, also beyond [-1, 1], or long [H, B]"""
    rewards: Tensor
    """float32 [H, B]"""
    goes_on: Tensor
    """float32 [H, B]"""


class ActorCritic(nn.Module):
    """A distribution over actions and the value of a state, from F features.

    Discrete actions have a categorical distribution; continuous ones, scaled to [-1, 1], a normal one around a tanh.
    """

    spread: Tensor

    def __init__(self, *, num_features: int, space: ActionSpace) -> None:
        super().__init__()
        self.space = space
        self.actor = MLPHead(num_features, 1, space.num_actions or 2 * space.size)
        self.critic = MLPHead(num_features, 1, NUM_BINS)
        for head in (self.actor, self.critic):
            nn.init.zeros_(head.layers[-1].weight)  # pyright: ignore  (at first every action is as likely, worth nothing)
            nn.init.zeros_(head.layers[-1].bias)  # pyright: ignore
        self.slow_critic = deepcopy(self.critic).requires_grad_(False)
        self.code = TwoHot()
        self.register_buffer("spread", torch.ones(()))

    def standardise_by(self, features: Tensor) -> None:
        """Of the world's states, [n, F]."""
        for head in (self.actor, self.critic, self.slow_critic):
            head.standardise_by(features)

    def probabilities(self, features: Tensor) -> Tensor:
        """[.., F] -> probabilities of discrete actions [.., n]"""
        return (1 - UNIFORM) * self.actor(features).softmax(dim=-1) + UNIFORM / self.space.num_actions

    def normal(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """[.., F] -> means and standard deviations of continuous actions [.., A]"""
        mean, std = self.actor(features).chunk(2, dim=-1)
        return mean.tanh(), MIN_STD + (MAX_STD - MIN_STD) * (std + 2).sigmoid()

    @torch.no_grad()
    def choose(self, features: Tensor, random: Generator | None) -> Tensor:
        """[B, F] -> choices drawn with `random`, else the likeliest: [B, A] around [-1, 1], or long [B]"""
        if self.space.is_discrete:
            shares = self.probabilities(features)
            if random is None:
                return shares.argmax(-1)
            return shares.to(random.device).multinomial(1, generator=random)[:, 0].to(shares.device)
        mean, std = self.normal(features)
        if random is None:
            return mean
        return mean + std * torch.randn(mean.shape, generator=random, device=random.device).to(mean.device)

    def actions_at(self, features: Tensor) -> Distribution:
        """Of the actions at features [.., F]."""
        if self.space.is_discrete:
            return Categorical(probs=self.probabilities(features), validate_args=False)
        return Independent(Normal(*self.normal(features), validate_args=False), 1, validate_args=False)

    def returns_at(self, features: Tensor) -> Distribution:
        """Of the returns at features [.., F], over the bins of the critic."""
        return Categorical(logits=self.critic(features) + self.code.prior, validate_args=False)

    @torch.no_grad()
    def after_step(self) -> None:
        """The slow critic follows the critic."""
        slow, fast = list(self.slow_critic.parameters()), list(self.critic.parameters())
        torch._foreach_lerp_(slow, fast, 1 - SLOW)  # pyright: ignore


def divergence(known: ActorCritic, model: ActorCritic, before: Tensor, after: Tensor) -> Tensor:
    """How far `model` on the features `after` [n, F] is from `known` on the features `before` [n, F], a scalar.

    The sum of the Kullback-Leibler divergences of the actions and of the distributions of returns.
    """
    with torch.no_grad():
        wanted, worth = known.actions_at(before), known.returns_at(before)
    actions, returns = model.actions_at(after), model.returns_at(after)
    return (kl_divergence(wanted, actions) + kl_divergence(worth, returns)).mean()


def loss(
    model: ActorCritic, imagined: DreamtSteps, *, gamma: float, lam: float, entropy: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of actor and critic, and metrics.

    The actor learns by REINFORCE: the advantage of action t is the lambda-return of step t minus the value of the state
    t in which it was chosen, divided by the spread of returns where that is above 1. Steps after a likely end weigh
    less. The critic learns the distribution of the returns.
    """
    states = imagined.features[:-1]
    with torch.no_grad():
        values = model.code.mean(model.slow_critic(imagined.features))  # [H + 1, B]
        returns = lambda_returns(imagined.rewards, imagined.goes_on, values, gamma=gamma, lam=lam)
        alive = still_alive(imagined.goes_on)
        low, high = returns.flatten().quantile(torch.tensor([LOW, HIGH], device=returns.device))
        model.spread.lerp_(high - low, 1 - SPREAD)
        advantages = (returns - values[:-1]) / model.spread.clamp(min=1)
    actions = model.actions_at(states)
    log_probs, entropies = actions.log_prob(imagined.choices), actions.entropy()
    actor = -(alive * (log_probs * advantages + entropy * entropies)).sum() / alive.sum()
    critic = (alive * model.code.loss(model.critic(states), returns)).sum() / alive.sum()
    metrics = {
        "actor": actor, "critic": critic, "entropy": entropies.mean(), "return": returns[0].mean(),
        "value": values[0].mean(), "reward": imagined.rewards.mean(), "length": alive.sum(dim=0).mean(),
        "spread": model.spread,
    }  # fmt: skip
    return actor + critic, {name: value.detach().clone() for name, value in metrics.items()}

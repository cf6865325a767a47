"""Actor and critic: distributions, credit to the state in which an action was chosen, and what a policy learns."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from jepa.rl.actor_critic import ActorCritic, DreamtSteps, divergence, loss
from jepa.types import ActionSpace

DISCRETE = ActionSpace(num_actions=3)
CONTINUOUS = ActionSpace(low=(-1.0, 0.0), high=(1.0, 10.0))
H, B, F = 3, 4, 5
SETTINGS = {"gamma": 0.9, "lam": 0.95, "entropy": 1e-3}


def model(space: ActionSpace = DISCRETE) -> ActorCritic:
    torch.manual_seed(0)
    result = ActorCritic(num_features=F, space=space)
    for head in (result.actor, result.critic, result.slow_critic):
        torch.nn.init.normal_(head.layers[-1].weight, std=0.1)  # pyright: ignore
    return result


def imagined(space: ActionSpace = DISCRETE) -> DreamtSteps:
    random = torch.Generator().manual_seed(1)
    choices = torch.randint(3, (H, B), generator=random) if space.is_discrete else torch.rand(H, B, 2, generator=random)
    features = torch.randn(H + 1, B, F, generator=random)
    return DreamtSteps(features, choices, torch.rand(H, B, generator=random), torch.full((H, B), 0.9))


def gradient_of_logits(policy: ActorCritic, steps: DreamtSteps) -> Tensor:
    """Of the actor's outputs for each state: [H + 1, B, n]"""
    policy.spread.fill_(0)  # advantages are divided by it where it is above 1
    kept = []
    handle = policy.actor.register_forward_hook(lambda module, inputs, output: kept.append(output))
    total, _ = loss(policy, steps, **SETTINGS)
    handle.remove()
    (logits,) = kept
    assert logits.shape[:2] == (H, B)
    return torch.autograd.grad(total, logits)[0]


def test_every_parameter_learns_and_the_slow_critic_follows() -> None:
    for space in (DISCRETE, CONTINUOUS):
        policy = model(space)
        loss(policy, imagined(space), **SETTINGS)[0].backward()
        lacking = [name for name, value in policy.named_parameters() if value.requires_grad and value.grad is None]
        assert not lacking
        assert all(value.grad is None for value in policy.slow_critic.parameters())
        before = policy.slow_critic.layers[0].weight.clone()  # pyright: ignore
        with torch.no_grad():
            policy.critic.layers[0].weight.add_(1.0)  # pyright: ignore
        policy.after_step()
        assert torch.allclose(policy.slow_critic.layers[0].weight, before + 0.02, atol=1e-6)  # pyright: ignore


def test_credit_goes_to_the_state_in_which_the_action_was_chosen() -> None:
    """A better reward of step 1 makes the action of step 1 likelier in state 1, and changes nothing in state 2."""
    policy, steps = model(), imagined()
    better = steps._replace(rewards=steps.rewards.clone())
    better.rewards[1] += 1.0
    change = gradient_of_logits(policy, better) - gradient_of_logits(policy, steps)
    taken = change.gather(2, steps.choices[..., None])[..., 0]
    assert (taken[:2] < 0).all()  # descent makes what was done before the reward likelier
    assert torch.equal(change[2], torch.zeros_like(change[2]))


def test_what_comes_after_the_end_teaches_nothing() -> None:
    policy, steps = model(), imagined()
    ended = steps._replace(goes_on=steps.goes_on.clone())
    ended.goes_on[0] = 0.0
    assert torch.equal(gradient_of_logits(policy, ended)[1:], torch.zeros(H - 1, B, 3))


def test_the_last_features_are_a_bootstrap_alone() -> None:
    policy, steps = model(), imagined()
    changed = steps._replace(features=steps.features.clone())
    changed.features[-1] += 3.0
    one, other = loss(policy, steps, **SETTINGS)[1], loss(policy, changed, **SETTINGS)[1]
    assert one["entropy"] == other["entropy"]
    assert one["return"] != other["return"]


def test_a_bandit_is_solved() -> None:
    for space in (DISCRETE, CONTINUOUS):
        torch.manual_seed(0)
        policy = ActorCritic(num_features=F, space=space)
        optimizer = torch.optim.Adam([p for p in policy.parameters() if p.requires_grad], lr=3e-3)
        random = torch.Generator().manual_seed(0)
        features = torch.zeros(2, 64, F)
        for _ in range(150):
            choices = policy.choose(features[0], random)[None]
            good = choices == 2 if space.is_discrete else -(choices[..., 1] - 0.5).square()
            total, _ = loss(policy, DreamtSteps(features, choices, good.float(), torch.zeros(1, 64)), **SETTINGS)
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            policy.after_step()
        if space.is_discrete:
            assert policy.probabilities(features[0, 0])[2] > 0.9
        else:
            assert policy.normal(features[0, 0])[0][1].item() == pytest.approx(0.5, abs=0.1)


def test_continuous_choices_fill_the_bounds_of_the_environment() -> None:
    policy = model(CONTINUOUS)
    ends = policy.space.unscale(torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))
    assert ends.tolist() == [[-1.0, 0.0], [1.0, 10.0]]
    drawn = policy.space.unscale(policy.choose(torch.randn(200, F), torch.Generator().manual_seed(0)))
    assert (drawn >= torch.tensor(CONTINUOUS.low)).all()
    assert (drawn <= torch.tensor(CONTINUOUS.high)).all()


def test_the_numbers_of_an_action_count_together() -> None:
    policy, features, choices = model(CONTINUOUS), torch.randn(6, F), torch.rand(6, 2)
    mean, std = policy.normal(features)
    squares = -(((choices - mean) / std).square() / 2 + std.log() + 0.5 * math.log(2 * math.pi))
    assert torch.allclose(policy.actions_at(features).log_prob(choices), squares.sum(dim=-1), atol=1e-5)
    policy = model()
    found = policy.actions_at(features).log_prob(torch.tensor([0, 1, 2, 0, 1, 2])).exp()
    assert torch.allclose(found, policy.probabilities(features)[range(6), [0, 1, 2, 0, 1, 2]], atol=1e-6)


@pytest.mark.parametrize("space", [DISCRETE, CONTINUOUS])
def test_policies_diverge_by_what_they_do_and_by_what_they_expect(space: ActionSpace) -> None:
    known, other, features = model(space), model(space), torch.randn(6, F)
    assert divergence(known, other, features, features).item() == pytest.approx(0, abs=1e-6)
    for head in (other.actor, other.critic):
        before = head.layers[-1].bias.clone()  # pyright: ignore
        head.layers[-1].bias.data[len(before) // 2] += 3  # pyright: ignore
        assert divergence(known, other, features, features) > 0.005
        head.layers[-1].bias.data.copy_(before)  # pyright: ignore

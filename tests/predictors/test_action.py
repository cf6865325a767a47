"""The action-conditioned predictor: shapes, what a prediction sees, rollouts, how actions are scaled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from jepa.layers.actions import ActionEncoder
from jepa.predictors.action import ActionPredictor
from jepa.types import ActionSpace, Field, PatchGrid

GRID, D, B = PatchGrid(1, 2, 3), 8, 4
CONTINUOUS = ActionSpace(low=(-4.0, 0.0), high=(4.0, 10.0))
DISCRETE = ActionSpace(num_actions=5)
KINDS = [("pooled", "mlp"), ("pooled", "gru"), ("pooled", "transformer"), ("tokens", "transformer")]


def field(space: ActionSpace, block: int = 1, steps: int = 6) -> Field:
    return Field(shape=(steps, *((block,) if block > 1 else ()), *space.shape), space=space)


def make(space: ActionSpace = CONTINUOUS, block: int = 1, **changes: Any) -> ActionPredictor:
    """A predictor whose output depends on all of its inputs."""
    torch.manual_seed(0)
    options = {"state_dim": 5, "width": 12, "depth": 2, "num_heads": 2, **changes}
    predictor = ActionPredictor(grid=GRID, embed_dim=D, fields={"actions": field(space, block)}, **options)
    with torch.no_grad():
        for parameter in predictor.dynamics.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return predictor.eval()


def draw_actions(space: ActionSpace, steps: int, block: int = 1, seed: int = 1) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    shape = (B, steps, *((block,) if block > 1 else ()), *space.shape)
    if space.is_discrete:
        return torch.randint(space.num_actions, shape, generator=random)
    low, high = torch.tensor(space.low), torch.tensor(space.high)
    return low + torch.rand(shape, generator=random) * (high - low)


def draw_states(predictor: ActionPredictor, frames: int, seed: int = 2) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(B, frames, predictor.num_state_tokens, predictor.state_dim, generator=random)


@pytest.mark.parametrize("history", [1, 2, 3])
@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("space", [CONTINUOUS, DISCRETE], ids=["continuous", "discrete"])
@pytest.mark.parametrize(("state", "model"), KINDS)
def test_a_rollout_is_single_steps_each_from_the_prediction_before(
    state: str, model: str, space: ActionSpace, block: int, history: int
) -> None:
    predictor, steps = make(space, block, state=state, model=model, history=history), 4
    states, actions = draw_states(predictor, history), draw_actions(space, history - 1 + steps, block)
    following = predictor.rollout(states, actions)
    tokens, width = (1, 5) if state == "pooled" else (GRID.num_tokens, D)
    assert following.shape == (B, steps, tokens, width)
    assert predictor.state_size == tokens * width
    seen = list(states.unbind(dim=1))
    for step in range(steps):
        last = torch.stack(seen[-history:], dim=1)
        seen.append(predictor.step(last, actions[:, step : step + history]))
        torch.testing.assert_close(following[:, step], seen[-1])


@pytest.mark.parametrize(("state", "model"), KINDS)
def test_a_prediction_depends_on_every_state_and_action_of_the_history(state: str, model: str) -> None:
    predictor = make(state=state, model=model, history=3)
    states = draw_states(predictor, 3).requires_grad_()
    actions = draw_actions(CONTINUOUS, 3).requires_grad_()
    predictor.step(states, actions).square().sum().backward()
    assert states.grad is not None
    assert actions.grad is not None
    assert (states.grad.abs().sum(dim=(2, 3)) > 1e-6).all()
    assert (actions.grad.abs().sum(dim=2) > 1e-6).all()


@pytest.mark.parametrize(("state", "model"), KINDS)
def test_what_comes_before_the_history_and_after_a_step_does_not_matter(state: str, model: str) -> None:
    predictor, history = make(state=state, model=model, history=2), 2
    states, actions = draw_states(predictor, history), draw_actions(CONTINUOUS, 5)
    following = predictor.rollout(states, actions)
    changed = actions.clone()
    changed[:, 3:] = draw_actions(CONTINUOUS, 2, seed=9)
    torch.testing.assert_close(predictor.rollout(states, changed)[:, :2], following[:, :2], rtol=0, atol=0)
    assert not torch.allclose(predictor.rollout(states, changed)[:, 2], following[:, 2])
    continued = torch.cat([states[:, 1:], following[:, :1]], dim=1)
    torch.testing.assert_close(predictor.rollout(continued, actions[:, 1:]), following[:, 1:])


@pytest.mark.parametrize("frame", [1, 2])
def test_no_token_of_the_transformer_sees_a_later_frame(frame: int) -> None:
    predictor = make(state="tokens", model="transformer", history=3)
    blocks: Any = predictor.dynamics.blocks
    states, actions = draw_states(predictor, 3), draw_actions(CONTINUOUS, 3)
    outputs: list[Tensor] = []
    blocks[-1].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    predictor.step(states, actions)
    later_states, later_actions = states.clone(), actions.clone()
    later_states[:, frame:] += 1
    later_actions[:, frame:] -= 1
    predictor.step(later_states, later_actions)
    seen, changed = (output.unflatten(1, (3, GRID.num_tokens)) for output in outputs)
    torch.testing.assert_close(changed[:, :frame], seen[:, :frame], rtol=0, atol=0)
    assert not torch.allclose(changed[:, frame:], seen[:, frame:])


@pytest.mark.parametrize(("state", "model"), KINDS)
def test_normalised_states_have_mean_0_and_variance_1_encoded_and_predicted(state: str, model: str) -> None:
    predictor = make(state=state, model=model, normalize=True)
    encoded = predictor.project(torch.randn(B, 3, GRID.num_tokens, D))
    predicted = predictor.rollout(encoded[:, :1], draw_actions(CONTINUOUS, 2))
    for states in (encoded, predicted):
        torch.testing.assert_close(states.mean(dim=-1), torch.zeros(states.shape[:-1]), atol=1e-5, rtol=0)
        torch.testing.assert_close(states.var(dim=-1, correction=0), torch.ones(states.shape[:-1]), atol=2e-2, rtol=0)


def test_states_of_frames_are_independent_of_each_other_and_of_the_batch() -> None:
    for state in ("pooled", "tokens"):
        predictor = make(state=state, model="transformer")
        tokens = torch.randn(B, 3, GRID.num_tokens, D)
        torch.testing.assert_close(predictor.project(tokens)[1:2, 2:], predictor.project(tokens[1:2, 2:]))


def test_a_pooled_state_tells_where_a_token_is() -> None:
    tokens = torch.zeros(2, 1, GRID.num_tokens, D)
    tokens[0, 0, 0], tokens[1, 0, 3] = 1.0, 1.0
    one, other = make().project(tokens)
    assert (one - other).abs().max() > 1e-3


def test_bounds_are_scaled_to_minus_one_and_one() -> None:
    encoder = ActionEncoder(field=field(CONTINUOUS), width=4)
    actions = torch.tensor([[-4.0, 0.0], [4.0, 10.0], [0.0, 5.0], [2.0, 2.5]])
    expected = torch.tensor([[-1.0, -1.0], [1.0, 1.0], [0.0, 0.0], [0.5, -0.5]])
    torch.testing.assert_close(encoder.scale(actions), expected)


def test_discrete_actions_are_one_hot_codes() -> None:
    encoder = ActionEncoder(field=field(DISCRETE), width=4)
    torch.testing.assert_close(encoder.scale(torch.tensor([[3, 0]])), torch.eye(5)[[3, 0]][None])


@pytest.mark.parametrize("space", [CONTINUOUS, DISCRETE], ids=["continuous", "discrete"])
def test_a_block_of_actions_has_one_code_that_depends_on_each_and_on_their_order(space: ActionSpace) -> None:
    encoder = ActionEncoder(field=field(space, block=3), width=6)
    actions = draw_actions(space, 2, block=3)
    actions[0, 0, 0], actions[0, 0, 1] = (1, 2) if space.is_discrete else (torch.tensor([1.0, 2.0]), 3.0)
    code = encoder(actions)
    assert code.shape == (B, 2, 6)
    assert encoder.block == 3
    swapped = actions.clone()
    swapped[:, :, [0, 1]] = actions[:, :, [1, 0]]
    assert not torch.allclose(encoder(swapped)[0, 0], code[0, 0])


@pytest.mark.parametrize("model", ["mlp", "gru"])
def test_tokens_are_refused_by_models_of_one_vector(model: str) -> None:
    with pytest.raises(ValueError, match=f"predictor.model={model}.*model=transformer or state=pooled"):
        make(state="tokens", model=model)


def test_the_mlp_begins_as_the_identity() -> None:
    torch.manual_seed(0)
    fields = {"actions": field(CONTINUOUS)}
    predictor = ActionPredictor(grid=GRID, embed_dim=D, fields=fields, state_dim=5, width=12)
    states = draw_states(predictor, 1)
    torch.testing.assert_close(predictor.step(states, draw_actions(CONTINUOUS, 1)), states[:, 0])

"""The world-model objective: its loss against plain loops, where gradients go, its terms in closed form."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa.encoders.spatial import SpatialEncoder
from jepa.objectives.dynamics import Dynamics
from jepa.predictors.action import ActionPredictor
from jepa.regularizers.pooling import pool_views
from jepa.regularizers.sigreg import SIGReg
from jepa.regularizers.vicreg import VICReg
from jepa.training.gradient_cache import GradCache
from jepa.types import ActionSpace, Batch, Field, Masks

B, T = 5, 5
CONTINUOUS = ActionSpace(low=(-2.0, -2.0), high=(2.0, 2.0))
DISCRETE = ActionSpace(num_actions=3)
NO_MASKS = Masks(torch.zeros(B, 0).long(), torch.zeros(B, 1, 0).long())
PREDICTOR = {"state_dim": 6, "width": 16, "depth": 1, "num_heads": 2}


def make(
    space: ActionSpace = CONTINUOUS, *, predictor: dict[str, Any] | None = None, seed: int = 0, rewards: bool = False,
    **changes: Any,
) -> Dynamics:  # fmt: skip
    """An objective whose predictor depends on all of its inputs."""
    torch.manual_seed(seed)
    encoder = SpatialEncoder(clip_shape=(1, 1, 8, 8), patch_size=4, embed_dim=8, depth=1, num_heads=2)
    fields = {"actions": Field(shape=(T - 1, *space.shape), space=space)}
    fields |= {name: Field(shape=(T - 1,)) for name in ("rewards", "terminated")} if rewards else {}
    built = ActionPredictor(grid=encoder.grid, embed_dim=8, fields=fields, **PREDICTOR | (predictor or {}))
    with torch.no_grad():
        for parameter in built.dynamics.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    options = {"similarity_weight": 0.0, **changes}
    return Dynamics(encoder=encoder, predictor=built, fields=fields, total_steps=10, **options)


def draw(space: ActionSpace = CONTINUOUS, count: int = B, seed: int = 1) -> Batch:
    random = torch.Generator().manual_seed(seed)
    clips = torch.randn(count, 1, T, 8, 8, generator=random)
    shape = (count, T - 1, *space.shape)
    if space.is_discrete:
        actions = torch.randint(space.num_actions, shape, generator=random)
    else:
        actions = 4 * torch.rand(shape, generator=random) - 2
    return Batch(clips, {"labels": torch.zeros(count).long(), "actions": actions})


def errors_by_loops(objective: Dynamics, batch: Batch, starts: str) -> list[list[Tensor]]:
    """By horizon, the squared errors [B] of rollouts that begin at each frame, one step after the other."""
    states, actions = objective.states(batch.clips), batch.fields["actions"]
    targets = objective.targets(states, batch.clips)
    history = objective.predictor.history
    errors: list[list[Tensor]] = [[] for _ in range(T - history)]
    for start in range(T - history if starts == "all" else 1):
        seen = [states[:, start + k] for k in range(history)]
        for horizon in range(T - history - start):
            first = start + horizon
            past = torch.stack(seen[-history:], dim=1)
            seen.append(objective.predictor.step(past, actions[:, first : first + history]))
            errors[horizon].append((seen[-1] - targets[:, first + history]).square().mean(dim=(1, 2)))
    return errors


@pytest.mark.parametrize("history", [1, 2, 4])
@pytest.mark.parametrize("starts", ["all", "first"])
@pytest.mark.parametrize("model", ["mlp", "gru", "transformer"])
def test_the_prediction_error_is_the_mean_over_horizons_and_starts(model: str, starts: str, history: int) -> None:
    objective = make(predictor={"model": model, "history": history}, starts=starts)
    batch = draw()
    errors = errors_by_loops(objective, batch, starts)
    expected = sum(sum(error.mean() for error in row) / len(row) for row in errors) / len(errors)
    torch.testing.assert_close(objective(batch, NO_MASKS).metrics["prediction"], expected.detach())


def test_the_loss_of_tokens_and_discrete_actions_is_that_of_plain_loops() -> None:
    objective = make(DISCRETE, predictor={"model": "transformer", "state": "tokens"})
    batch = draw(DISCRETE)
    errors = errors_by_loops(objective, batch, "all")
    expected = sum(sum(error.mean() for error in row) / len(row) for row in errors) / len(errors)
    torch.testing.assert_close(objective(batch, NO_MASKS).metrics["prediction"], expected.detach())


def test_the_loss_is_the_weighted_sum_of_its_terms() -> None:
    objective = make(inverse_weight=0.5, similarity_weight=3.0, regularizers={"vicreg": VICReg()})
    output = objective(draw(), NO_MASKS)
    terms = output.metrics
    expected = terms["prediction"] + 0.5 * terms["inverse"] + 3 * terms["similarity"] + terms["regularizer"]
    torch.testing.assert_close(output.loss.detach(), expected)


def test_the_similarity_is_the_squared_difference_of_consecutive_states() -> None:
    objective, batch = make(), draw()
    states = objective.states(batch.clips)
    pairs = [(states[b, t + 1] - states[b, t]).square().mean() for b in range(B) for t in range(T - 1)]
    torch.testing.assert_close(objective(batch, NO_MASKS).metrics["similarity"], torch.stack(pairs).mean().detach())


@pytest.mark.parametrize("state", ["pooled", "tokens"])
def test_inverse_dynamics_is_the_squared_error_of_scaled_actions(state: str) -> None:
    objective, batch = make(predictor={"state": state, "model": "transformer"}), draw()
    inverse: Any = objective.inverse
    nn.init.zeros_(inverse.fc2.weight)
    nn.init.constant_(inverse.fc2.bias, 0.25)
    expected = (0.25 - batch.fields["actions"] / 2).square().mean()
    torch.testing.assert_close(objective(batch, NO_MASKS).metrics["inverse"], expected)


@pytest.mark.parametrize("history", [1, 3])
def test_inverse_dynamics_reads_the_history_before_an_action_and_the_state_after_it(history: int) -> None:
    objective, batch = make(predictor={"history": history}), draw()
    inverse: Any = objective.inverse
    states, actions = objective.states(batch.clips)[:, :, 0], batch.fields["actions"]
    errors = [
        inverse(states[:, time + 1 - history : time + 2].flatten(1)) - actions[:, time] / 2
        for time in range(history - 1, T - 1)
    ]
    expected = torch.stack(errors).square().mean().detach()
    torch.testing.assert_close(objective(batch, NO_MASKS).metrics["inverse"], expected)


def test_inverse_dynamics_of_discrete_actions_is_a_cross_entropy() -> None:
    objective, batch = make(DISCRETE), draw(DISCRETE)
    inverse: Any = objective.inverse
    nn.init.zeros_(inverse.fc2.weight)
    with torch.no_grad():
        inverse.fc2.bias.copy_(torch.tensor([0.5, 0.25, 0.25]).log())
    actions = batch.fields["actions"]
    expected = -torch.tensor([0.5, 0.25, 0.25])[actions].log().mean()
    torch.testing.assert_close(objective(batch, NO_MASKS).metrics["inverse"], expected)


class Recorder(nn.Module):
    """Predicts zeros and keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []

    def forward(self, pairs: Tensor) -> Tensor:
        self.inputs.append(pairs)
        return torch.zeros(*pairs.shape[:2], 2)


def test_inverse_dynamics_over_several_steps_predicts_the_sum_of_the_actions_from_the_change() -> None:
    objective, states = make(inverse_steps=3), torch.randn(B, T, 1, 6)
    actions = draw().fields["actions"]
    objective.inverse = recorder = Recorder()
    error = objective.inverse_error(states, actions)
    unit = torch.stack([(states[:, t + 1] - states[:, t]).square().mean() for t in range(T - 1)]).mean().sqrt()
    expected = []
    for steps in (1, 2, 3):
        starts = range(T - steps)
        sums = torch.stack([actions[:, t : t + steps].sum(dim=1) / 2 for t in starts], dim=1)
        expected.append(sums.square().mean())
        pairs = [torch.cat([states[:, t, 0], (states[:, t + steps, 0] - states[:, t, 0]) / unit], 1) for t in starts]
        torch.testing.assert_close(recorder.inputs[steps - 1], torch.stack(pairs, dim=1))
    torch.testing.assert_close(error, torch.stack(expected).mean())


def test_inverse_dynamics_over_several_steps_of_discrete_actions_sums_their_cross_entropies() -> None:
    objective, batch = make(DISCRETE, inverse_steps=2), draw(DISCRETE)
    inverse: Any = objective.inverse
    nn.init.zeros_(inverse.fc2.weight)
    with torch.no_grad():
        inverse.fc2.bias.copy_(torch.tensor([0.5, 0.25, 0.25]).log())
    losses = -torch.tensor([0.5, 0.25, 0.25])[batch.fields["actions"]].log()
    expected = (losses.mean() + (losses[:, 1:] + losses[:, :-1]).mean()) / 2
    torch.testing.assert_close(objective(batch, NO_MASKS).metrics["inverse"], expected)


@pytest.mark.parametrize("history", [1, 2])
def test_a_reward_is_read_from_the_state_to_which_its_action_leads(history: int) -> None:
    objective = make(predictor={"history": history}, rewards=True, reward_weight=2.0)
    plain = make(predictor={"history": history}, rewards=True)
    rewards, ends = torch.rand(B, T - 1), torch.zeros(B, T - 1)
    ends[0, -1] = 1
    batch = draw()
    batch = batch._replace(fields={**batch.fields, "rewards": rewards, "terminated": ends})
    assert objective.outcome is not None
    expected = []
    states = [objective.states(batch.clips)[:, k] for k in range(history)]
    for step in range(history - 1, T - 1):
        past = torch.stack(states[-history:], dim=1)
        states.append(objective.predictor.step(past, batch.fields["actions"][:, step - history + 1 : step + 1]))
        logits = objective.outcome(states[-1].flatten(1))
        expected.append(objective.scalars.loss(logits[:, :-1], rewards[:, step]))
        expected[-1] = expected[-1] + F.binary_cross_entropy_with_logits(logits[:, -1], ends[:, step], reduction="none")
    output = objective(batch, NO_MASKS)
    assert output.metrics["outcome"].item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)
    difference = output.loss - plain(batch, NO_MASKS).loss
    assert difference.item() == pytest.approx(2 * output.metrics["outcome"].item(), rel=1e-4)
    objective.outcome_error(torch.stack(states[history:], dim=1), batch.fields).backward()
    assert all(parameter.grad is not None for parameter in objective.encoder.parameters())


def test_rewards_that_the_data_lack_are_refused() -> None:
    with pytest.raises(ValueError, match=r"objective\.reward_weight: the data set has no rewards"):
        make(reward_weight=1.0)


def test_more_steps_between_two_states_than_a_clip_has_are_refused() -> None:
    with pytest.raises(ValueError, match="inverse_steps=5: needs more frames than num_frames=5"):
        make(inverse_steps=5)


def gradient_of_targets(target: str) -> Tensor:
    """The prediction error's gradient of the encoder when the predicted side is cut off."""
    objective, batch = make(target=target, inverse_weight=0.0), draw()
    states = objective.states(batch.clips)
    errors, _ = objective.rollout_errors(
        states.detach(), objective.targets(states, batch.clips), batch.fields["actions"], "all"
    )
    loss = torch.stack([error.mean() for error in errors]).mean()
    if not loss.requires_grad:
        return torch.zeros(1)
    parameters = list(objective.encoder.parameters())
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


def test_targets_have_a_gradient_only_without_stop() -> None:
    assert gradient_of_targets("none").abs().sum() > 0
    assert gradient_of_targets("stopgrad").abs().sum() == 0
    assert gradient_of_targets("ema").abs().sum() == 0


@pytest.mark.parametrize("target", ["none", "stopgrad", "ema"])
def test_the_encoder_learns_from_the_predictions(target: str) -> None:
    objective = make(target=target, inverse_weight=0.0)
    objective(draw(), NO_MASKS).loss.backward()
    assert sum(p.grad.abs().sum() for p in objective.encoder.parameters() if p.grad is not None) > 0
    assert all(p.grad is not None for p in objective.predictor.projector.parameters())


def test_the_average_follows_encoder_and_projector_and_is_the_target() -> None:
    objective, batch = make(target="ema", momentum=0.9, final_momentum=0.9), draw()
    before = deepcopy(objective.average.state_dict())
    with torch.no_grad():
        for parameter in [*objective.encoder.parameters(), *objective.predictor.projector.parameters()]:
            parameter.add_(1.0)
    assert objective.after_step(3) == {"momentum": 0.9}
    for name, parameter in objective.average.named_parameters():
        torch.testing.assert_close(parameter, before[name] + 0.1)
    tokens = objective.average["encoder"](batch.clips).unflatten(1, (T, -1))
    targets = objective.targets(objective.states(batch.clips), batch.clips)
    torch.testing.assert_close(targets, objective.average["projector"](tokens))


def test_targets_of_an_average_are_normalised_as_states_are() -> None:
    objective, batch = make(target="ema", predictor={"normalize": True}), draw()
    states = objective.states(batch.clips)
    torch.testing.assert_close(objective.targets(states, batch.clips), states.detach())


def train(objective: Dynamics, batches: Any, steps: int, lr: float) -> list[float]:
    parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=lr)
    losses = []
    for step in range(steps):
        output = objective(batches(step), NO_MASKS)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        objective.after_step(step)
        losses.append(output.metrics["prediction"].item())
    return losses


def test_a_frozen_encoder_is_unchanged_by_training_while_the_rest_learns() -> None:
    objective = make(freeze=True, target="stopgrad")
    objective.train()
    assert not objective.encoder.training
    encoder, predictor = (deepcopy(part.state_dict()) for part in (objective.encoder, objective.predictor))
    train(objective, lambda step: draw(seed=step), 3, 1e-2)
    for name, value in objective.encoder.state_dict().items():
        torch.testing.assert_close(value, encoder[name], rtol=0, atol=0)
    changed = [name for name, value in objective.predictor.state_dict().items() if not value.equal(predictor[name])]
    assert any(name.startswith("projector") for name in changed)
    assert any(name.startswith("dynamics") for name in changed)


@pytest.mark.parametrize(("state", "tokens"), [("pooled", 1), ("tokens", 4)])
def test_regularisers_see_every_frame_as_a_sample(state: str, tokens: int) -> None:
    objective, batch = make(predictor={"state": state, "model": "transformer", "history": 2}), draw()
    states = objective.states(batch.clips)
    _, predicted = objective.rollout_errors(states, states, batch.fields["actions"], "all")
    latents = objective.latents(states, predicted)
    assert states.shape[2] == tokens
    torch.testing.assert_close(pool_views(latents, "context"), states.mean(dim=2).flatten(0, 1)[:, None])
    torch.testing.assert_close(pool_views(latents, "predicted"), predicted.mean(dim=2).flatten(0, 1)[:, None])
    assert pool_views(latents, "predicted").shape[0] == B * (T - 2)


def test_vicreg_measures_the_variance_over_all_frames() -> None:
    objective, batch = make(regularizers={"vicreg": VICReg()}), draw()
    states = objective.states(batch.clips).flatten(0, 2)
    std = (states.var(dim=0) + 1e-4).sqrt()
    output = objective(batch, NO_MASKS)
    torch.testing.assert_close(output.metrics["vicreg_variance"], F.relu(1 - std).mean().detach())


@pytest.mark.parametrize("sizes", [(3, 3), (4, 2)])
@pytest.mark.parametrize("kind", [VICReg, SIGReg])
def test_micro_batches_give_the_gradient_of_the_whole_batch(kind: Any, sizes: tuple[int, int]) -> None:
    objective, batch = make(regularizers={"one": kind()}, similarity_weight=2.0), draw(count=6)
    torch.manual_seed(3)
    objective(batch, NO_MASKS).loss.backward()
    expected = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
    objective.zero_grad()
    cache = GradCache(len(sizes))
    parts = [batch.rows(start, size) for start, size in zip((0, sizes[0]), sizes, strict=True)]
    with torch.no_grad():
        for cache.index, part in enumerate(parts):
            objective(part, NO_MASKS, cache)
    torch.manual_seed(3)
    penalty: Any = objective.regularization
    cache.compute(penalty)
    for cache.index, part in enumerate(parts):
        (objective(part, NO_MASKS, cache).loss * len(part.clips) / 6).backward()
    assert expected.keys() == {name for name, p in objective.named_parameters() if p.grad is not None}
    for name, parameter in objective.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_diagnose_compares_with_copying_with_the_mean_and_with_other_actions() -> None:
    objective, batch = make(predictor={"history": 2}), draw()
    found = objective.diagnose(batch, NO_MASKS)
    states, actions = objective.states(batch.clips), batch.fields["actions"]
    predicted = objective.predictor.rollout(states[:, :2], actions)
    future = states[:, 2:]
    others = objective.predictor.rollout(states[:, :2], actions[[B - 1, *range(B - 1)]])
    for step in range(T - 2):
        expected = {
            "error": predicted[:, step] - future[:, step],
            "shuffled_error": others[:, step] - future[:, step],
            "copy_error": states[:, 1] - future[:, step],
            "trivial_error": future.mean(dim=(0, 1)) - future[:, step],
        }
        for name, difference in expected.items():
            torch.testing.assert_close(found[f"{name}_h{step + 1}"], difference.square().mean().detach())
    for name in ("error", "shuffled_error", "copy_error", "trivial_error"):
        rows = torch.stack([found[f"{name}_h{step + 1}"] for step in range(T - 2)])
        torch.testing.assert_close(found[name], rows.mean())


def test_diagnose_leaves_the_mode_as_it_was_and_learns_nothing() -> None:
    objective = make(target="ema").train()
    objective.diagnose(draw(), NO_MASKS)
    assert objective.training
    assert not objective.average.training
    assert all(parameter.grad is None for parameter in objective.parameters())


class Pixels(nn.Module):
    """A frame of 2 x 2 pixels is its own token."""

    embed_dim = 4

    def forward(self, clips: Tensor) -> Tensor:
        return clips.permute(0, 2, 1, 3, 4).flatten(2)


def linear_world(step: int, count: int = 32) -> Batch:
    """Two of the four pixels move by the actions."""
    random = torch.Generator().manual_seed(step)
    actions = 4 * torch.rand(count, T - 1, 2, generator=random) - 2
    moves = torch.cat([torch.randn(count, 1, 2, generator=random), 0.2 * actions], dim=1).cumsum(dim=1)
    frames = torch.cat([moves, torch.ones(count, T, 1), torch.zeros(count, T, 1)], dim=2)
    clips = frames.unflatten(2, (2, 2))[:, None]
    return Batch(clips, {"labels": torch.zeros(count).long(), "actions": actions})


def test_a_linear_world_is_learnt() -> None:
    torch.manual_seed(0)
    fields = {"actions": Field(shape=(T - 1, 2), space=CONTINUOUS)}
    grid: Any = type("Grid", (), {"h": 1, "w": 1, "num_tokens": 1})
    predictor = ActionPredictor(grid=grid, embed_dim=4, fields=fields, state_dim=4, width=32, depth=1)
    states: Any = nn.Identity()
    predictor.projector = states
    objective = Dynamics(
        encoder=Pixels(), predictor=predictor, fields=fields, target="stopgrad", similarity_weight=0.0, total_steps=300
    )
    train(objective, linear_world, 300, 5e-3)
    found = objective.eval().diagnose(linear_world(1000), NO_MASKS)
    assert found["error"] < 0.05 * found["copy_error"]
    assert found["shuffled_error"] > 10 * found["error"]


def test_a_history_that_leaves_nothing_to_predict_is_refused() -> None:
    with pytest.raises(ValueError, match="num_frames=5: a history of 5 frames needs one more"):
        make(predictor={"history": 5})


def test_the_contract_has_settings_block_and_bounds() -> None:
    contract = make(predictor={"history": 2}).contract
    assert contract["low"] == [-2.0, -2.0]
    assert contract["high"] == [2.0, 2.0]
    assert (contract["num_actions"], contract["block"]) == (0, 1)
    assert contract["predictor"]["history"] == 2

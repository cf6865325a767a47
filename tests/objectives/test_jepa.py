"""The JEPA objective: what is compared with what, who learns, who follows, and what is logged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checked import checked
from torch import Tensor, nn

from jepa.encoders.spatial import SpatialEncoder
from jepa.layers.stems import embed_patches
from jepa.masks.none import NoMask
from jepa.objectives.jepa import JEPA
from jepa.predictors.cross_attention import CrossAttentionPredictor
from jepa.predictors.projector import Projector
from jepa.predictors.transformer import TransformerPredictor
from jepa.regularizers.cross_view import CrossView
from jepa.regularizers.vicreg import VICReg
from jepa.types import Batch, Latents, Masks, PatchGrid

B, K, M, J, D = 4, 5, 2, 3, 16
PREDICTORS: dict[str, Callable[..., nn.Module]] = {
    "joint": TransformerPredictor,
    "apart": lambda **sizes: TransformerPredictor(joint=False, **sizes),
    "cross_attention": CrossAttentionPredictor,
}


def make_objective(predictor: str = "joint", drop_path: float = 0.0, depth: int = 2, **changes: Any) -> JEPA:
    torch.manual_seed(0)
    encoder = SpatialEncoder(
        clip_shape=(3, 1, 16, 16), patch_size=4, embed_dim=D, depth=depth, num_heads=2, drop_path=drop_path
    )
    built = PREDICTORS[predictor](grid=encoder.grid, embed_dim=D, num_heads=2, width=16, depth=depth)
    return checked(JEPA, **({"encoder": encoder, "predictor": built, "batch_size": B, "total_steps": 10} | changes))


def sample(seed: int = 1) -> tuple[Batch, Masks]:
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(16, generator=generator) for _ in range(B)])
    targets = order[:, K : K + M * J].unflatten(1, (M, J)).sort(dim=2).values
    clips = torch.randn(B, 3, 1, 16, 16, generator=generator)
    return Batch(clips, {"labels": torch.zeros(B, dtype=torch.long)}), Masks(order[:, :K].sort(dim=1).values, targets)


def move(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def smooth_l1(difference: np.ndarray) -> np.ndarray:
    size = np.abs(difference)
    return np.where(size < 1, size**2 / 2, size - 0.5)


@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize(("loss", "formula"), [("mse", np.square), ("l1", np.abs), ("smooth_l1", smooth_l1)])
def test_loss_compares_predictions_with_normalised_target_tokens(
    predictor: str, loss: str, formula: Callable[[np.ndarray], np.ndarray]
) -> None:
    objective, (batch, masks) = make_objective(predictor, loss=loss), sample()
    move(objective.context_encoder)
    with torch.no_grad():
        tokens = objective.target_encoder(batch.clips).numpy()
        predicted = objective.predictor(objective.context_encoder(batch.clips, keep=masks.context), masks).numpy()
    tokens = (tokens - tokens.mean(-1, keepdims=True)) / np.sqrt(tokens.var(-1, keepdims=True) + 1e-5)
    targets = np.stack([tokens[b][masks.targets[b]] for b in range(B)])
    output = objective(batch, masks)
    assert output.loss.item() == pytest.approx(formula(predicted - targets).mean(), rel=1e-4)
    assert output.metrics["prediction"].equal(output.loss.detach())


@pytest.mark.parametrize(("loss", "formula"), [("mse", np.square), ("smooth_l1", smooth_l1)])
def test_context_weight_adds_the_loss_on_context_tokens(loss: str, formula: Callable[[np.ndarray], np.ndarray]) -> None:
    objective, (batch, masks) = make_objective(loss=loss, context_weight=0.3), sample()
    move(objective.context_encoder)
    with torch.no_grad():
        tokens = objective.target_encoder(batch.clips).numpy()
        context = objective.context_encoder(batch.clips, keep=masks.context)
        predictions = objective.predictor(context, masks, predict_context=True).numpy()
    tokens = (tokens - tokens.mean(-1, keepdims=True)) / np.sqrt(tokens.var(-1, keepdims=True) + 1e-5)
    indices = np.concatenate([masks.context.numpy(), masks.targets.flatten(1).numpy()], axis=1)
    distances = formula(predictions - np.take_along_axis(tokens, indices[..., None], axis=1))
    context_loss, target_loss = distances[:, :K].mean(), distances[:, K:].mean()
    output = objective(batch, masks)
    assert output.loss.item() == pytest.approx(target_loss + 0.3 * context_loss, rel=1e-4)
    assert output.metrics["prediction"].item() == pytest.approx(target_loss, rel=1e-4)
    assert output.metrics["context_prediction"].item() == pytest.approx(context_loss, rel=1e-4)


def normalised(tokens: Tensor) -> Tensor:
    return F.layer_norm(tokens.float(), tokens.shape[-1:])


def test_targets_of_several_layers_are_their_mean_each_normalised() -> None:
    objective, (batch, _) = make_objective(depth=3, target_layers=2), sample()
    encoder = objective.target_encoder
    with torch.no_grad():
        tokens = embed_patches(encoder.stem, batch.clips, encoder.grid, 1)
        tokens = encoder.positions.add(encoder.embed(tokens), encoder.grid)
        outputs = []
        for block in encoder.blocks:
            tokens = block(tokens)
            outputs.append(tokens)
        expected = (normalised(outputs[1]) + normalised(outputs[2])) / 2
    torch.testing.assert_close(objective.encode_targets(batch.clips), expected)
    frames = torch.randn(2, 3, 2, 16, 16)  # of a clip, which the spatial encoder sees apart
    apart = torch.cat([objective.encode_targets(frames[:, :, [t]]) for t in range(2)], dim=1)
    torch.testing.assert_close(objective.encode_targets(frames), apart)


def test_a_crop_predicts_the_hidden_tokens_of_the_next_crop_of_its_sample() -> None:
    objective, (batch, masks) = make_objective(target_view="other"), sample()
    assert B % 2 == 0
    batch = batch._replace(views=2)
    partner = torch.arange(B).unflatten(0, (-1, 2)).flip(1).flatten()
    with torch.no_grad():
        tokens = objective.encode_targets(batch.clips)[partner]
        predicted = objective.predictor(objective.context_encoder(batch.clips, keep=masks.context), masks)
        expected = (predicted - objective.targets(tokens, masks)).square().mean()
    assert objective(batch, masks).loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert objective.diagnose(batch, masks) == {}


@pytest.mark.parametrize("predictor", ["apart", "cross_attention"])
def test_context_weight_needs_the_joint_predictor(predictor: str) -> None:
    with pytest.raises(ValueError, match=r"objective\.context_weight=0\.5 needs predictor=transformer, joint=true"):
        make_objective(predictor, context_weight=0.5)


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_gradients_reach_encoder_and_predictor_but_not_the_target_encoder(predictor: str) -> None:
    objective, (batch, masks) = make_objective(predictor), sample()
    move(objective)
    objective(batch, masks).loss.backward()
    learners = [*objective.context_encoder.parameters(), *objective.predictor.parameters()]
    assert all(p.grad is not None and p.grad.any() for p in learners)
    assert all(p.grad is None and not p.requires_grad for p in objective.target_encoder.parameters())
    assert len(learners) == len([p for p in objective.parameters() if p.requires_grad])


def test_the_target_encoder_starts_as_the_context_encoder_with_weights_of_its_own() -> None:
    objective = make_objective()
    for target, source in zip(
        objective.target_encoder.parameters(), objective.context_encoder.parameters(), strict=True
    ):
        assert target.equal(source)
        assert target.data_ptr() != source.data_ptr()
    assert objective.backbone is objective.target_encoder


def test_targets_are_the_same_in_training_and_evaluation() -> None:
    objective, (batch, masks) = make_objective(drop_path=0.9), sample()
    targets = objective.eval().targets(objective.encode_targets(batch.clips), masks)
    objective.train()
    assert not objective.target_encoder.training
    assert objective.context_encoder.training
    assert objective.targets(objective.encode_targets(batch.clips), masks).equal(targets)


def test_the_context_pass_drops_paths_in_training() -> None:
    objective, (batch, masks) = make_objective(drop_path=0.5), sample()
    losses = {objective(batch, masks).loss.item() for _ in range(4)}
    assert len(losses) > 1


def test_hidden_pixels_do_not_reach_the_prediction() -> None:
    objective, (batch, masks) = make_objective(), sample()
    clips = batch.clips.requires_grad_()
    objective(batch, masks).loss.backward()
    assert clips.grad is not None
    touched = clips.grad.abs().sum(dim=(1, 2)).unflatten(1, (4, 4)).unflatten(3, (4, 4)).sum(dim=(2, 4)).flatten(1) > 0
    assert [row.nonzero().flatten().tolist() for row in touched] == masks.context.tolist()


def test_loss_of_a_batch_is_the_mean_over_its_samples() -> None:
    objective, (batch, masks) = make_objective(), sample()
    alone = [objective(batch.rows(b, 1), masks.map(lambda m, b=b: m[b : b + 1])).loss for b in range(B)]
    torch.testing.assert_close(objective(batch, masks).loss, torch.stack(alone).mean())


def test_regularizers_are_added_on_the_pooled_context() -> None:
    regularizer = VICReg(variance=2.0, covariance=3.0)
    plain, objective = make_objective(), make_objective(regularizers={"one": regularizer, "two": VICReg()})
    batch, masks = sample()
    grid, context = plain.context_encoder.grid, plain.context_encoder(batch.clips, keep=masks.context)
    embedding = context.mean(dim=1)
    latents = Latents(context, plain.predictor(context, masks), masks, grid, 1)
    (penalty, terms), (other, _) = regularizer(latents), VICReg()(latents)
    output = objective(batch, masks)
    torch.testing.assert_close(output.embedding, embedding.detach())
    torch.testing.assert_close(output.loss, plain(batch, masks).loss + penalty + other)
    torch.testing.assert_close(output.metrics["regularizer"], (penalty + other).detach())
    assert set(output.metrics) == {
        "prediction",
        "regularizer",
        *(f"{n}_{term}" for n in ("one", "two") for term in terms),
    }


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_loss_and_metrics_are_float32_under_autocast(predictor: str) -> None:
    objective, (batch, masks) = make_objective(predictor, regularizers={"vicreg": VICReg()}), sample()
    with torch.autocast("cpu", torch.bfloat16):
        output = objective(batch, masks)
    output.loss.backward()
    tensors = [output.loss, output.embedding, *output.metrics.values()]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    assert not any(tensor.requires_grad for tensor in tensors[1:])
    torch.testing.assert_close(output.loss, objective(batch, masks).loss, rtol=0.02, atol=0.02)


def test_the_half_life_in_samples_does_not_depend_on_the_batch_size() -> None:
    def half_life(batch_size: int) -> float:
        objective = make_objective(momentum=0.99, final_momentum=0.99, batch_size=batch_size)
        return batch_size * np.log(0.5) / np.log(objective.momentum_at(0))

    assert half_life(64) == pytest.approx(64 * np.log(0.5) / np.log(0.99))
    assert [half_life(size) for size in (1, 32, 2048)] == pytest.approx([half_life(64)] * 3)


def test_momentum_goes_linearly_to_its_final_value() -> None:
    objective = make_objective(momentum=0.9, final_momentum=1.0, batch_size=64, total_steps=10)
    assert [objective.momentum_at(step) for step in (0, 5, 10, 20)] == pytest.approx([0.9, 0.95, 1.0, 1.0])


@pytest.mark.parametrize("momentum", [0.0, 0.7, 1.0])
def test_the_target_encoder_moves_by_one_minus_the_momentum(momentum: float) -> None:
    objective = make_objective(momentum=momentum, final_momentum=momentum, batch_size=64)
    before = [p.clone() for p in objective.target_encoder.parameters()]
    move(objective.context_encoder)
    assert objective.after_step(3) == {"momentum": momentum}
    after, goal = objective.target_encoder.parameters(), objective.context_encoder.parameters()
    for old, new, source in zip(before, after, goal, strict=True):
        torch.testing.assert_close(new, momentum * old + (1 - momentum) * source)


def test_buffers_of_the_target_encoder_are_copied() -> None:
    objective = make_objective()
    for encoder, value in ((objective.context_encoder, 1.0), (objective.target_encoder, 0.0)):
        encoder.register_buffer("running_mean", torch.tensor(value))
    objective.after_step(0)
    assert objective.target_encoder.get_buffer("running_mean") == 1


class Constant(nn.Module):
    """Returns the constructor argument, expanded to the shape of the targets."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, context: Tensor, masks: Masks, *_: object) -> Tensor:
        return self.answer.expand(*masks.targets.shape, -1)


def test_diagnosis_compares_with_the_mean_target() -> None:
    objective, (batch, masks) = make_objective(), sample()
    targets = objective.targets(objective.encode_targets(batch.clips), masks)
    mean, variance = targets.mean(dim=(0, 1, 2)), targets.flatten(0, 2).var(dim=0, correction=0).mean()
    objective.predictor = Constant(mean)
    diagnosis = objective.diagnose(batch, masks)
    torch.testing.assert_close(diagnosis["error"], diagnosis["trivial_error"])
    torch.testing.assert_close(diagnosis["trivial_error"], variance)
    torch.testing.assert_close(diagnosis["target_std"], targets.flatten(0, 2).std(dim=0).mean())
    objective.predictor = Constant(targets)
    assert objective.diagnose(batch, masks)["error"] == 0


@pytest.mark.parametrize("training", [True, False])
def test_diagnosis_leaves_modes_and_gradients_alone(training: bool) -> None:
    objective, (batch, masks) = make_objective(drop_path=0.9).train(training), sample()
    first, second = objective.diagnose(batch, masks), objective.diagnose(batch, masks)
    assert first == second
    assert objective.training == objective.context_encoder.training == training
    assert not objective.target_encoder.training
    assert not any(value.requires_grad for value in first.values())


@pytest.mark.slow
@pytest.mark.parametrize("predictor", PREDICTORS)
def test_compiles_into_one_graph_that_computes_the_same(predictor: str) -> None:
    objective, (batch, masks) = make_objective(predictor, depth=1, regularizers={"vicreg": VICReg()}), sample()
    torch.compiler.reset()
    compiled = torch.compile(objective, backend="eager", fullgraph=True)
    gradients = []
    for forward in (compiled, objective):
        objective.zero_grad()
        output = forward(batch, masks)
        output.loss.backward()
        gradients.append([output.loss, *(p.grad for p in objective.parameters() if p.requires_grad)])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_learns_to_predict_better_than_the_mean(predictor: str) -> None:
    objective, (batch, masks) = make_objective(predictor, momentum=1.0), sample()
    move(objective.target_encoder)
    learners = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learners, lr=5e-3)
    for _ in range(100):
        objective(batch, masks).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    diagnosis = objective.diagnose(batch, masks)
    assert diagnosis["error"] < 0.5 * diagnosis["trivial_error"]


@pytest.mark.parametrize(("target", "learns_from_targets"), [("stopgrad", False), ("none", True)])
def test_without_a_momentum_encoder_the_context_encoder_gives_the_targets(
    target: str, learns_from_targets: bool
) -> None:
    objective, (batch, masks) = make_objective(target=target), sample()
    encoder = objective.context_encoder
    objective(batch, masks).loss.backward()
    gradients = [p.grad.clone() for p in encoder.parameters() if p.grad is not None]
    objective.zero_grad()
    tokens = encoder(batch.clips)
    tokens = tokens if learns_from_targets else tokens.detach()
    index = masks.targets.flatten(1)[..., None].expand(-1, -1, D)
    targets = F.layer_norm(tokens.gather(1, index), (D,)).unflatten(1, (M, J))
    predicted = objective.predictor(encoder(batch.clips, keep=masks.context), masks)
    (predicted - targets).square().mean().backward()
    expected = [p.grad for p in encoder.parameters() if p.grad is not None]
    torch.testing.assert_close(gradients, expected)


@pytest.mark.parametrize("target", ["stopgrad", "none"])
def test_without_a_momentum_encoder_nothing_follows_and_the_context_encoder_is_probed(target: str) -> None:
    objective = make_objective(target=target)
    assert objective.backbone is objective.context_encoder
    assert not any(name.startswith("target_encoder") for name in objective.state_dict())
    assert objective.after_step(0) == {}


def test_where_nothing_is_hidden_the_regularizers_are_the_loss() -> None:
    encoder = make_objective().context_encoder
    objective = JEPA(
        encoder=encoder,
        predictor=Projector(embed_dim=D, hidden_dim=8, output_dim=4),
        regularizers={"cross_view": CrossView(of="predicted"), "vicreg": VICReg(of="predicted")},
        target="none", batch_size=B, total_steps=10,
    )  # fmt: skip
    batch, _ = sample()
    masks = NoMask(grid=encoder.grid)(B, torch.Generator())
    output = objective(batch._replace(views=2), masks)
    projected = objective.predictor(encoder(batch.clips), masks)
    latents = Latents(encoder(batch.clips), projected, masks, encoder.grid, 2)
    expected = sum(regularizer(latents)[0] for regularizer in objective.regularizers.values())
    torch.testing.assert_close(output.loss, expected)
    assert "prediction" not in output.metrics
    assert objective.diagnose(batch, masks) == {}


def test_a_projector_maps_the_mean_token() -> None:
    torch.manual_seed(0)
    projector, tokens = Projector(embed_dim=D, hidden_dim=8, output_dim=4), torch.randn(B, 6, D)
    masks = NoMask(grid=PatchGrid(1, 2, 3))(B, torch.Generator())
    mean = tokens.mean(dim=1, keepdim=True).expand_as(tokens)
    torch.testing.assert_close(projector(tokens, masks), projector(mean, masks))
    assert projector(tokens, masks).shape == (B, 1, 1, 4)


def test_no_mask_has_every_token_as_context_in_order() -> None:
    masks = NoMask(grid=PatchGrid(2, 2, 3))(B, torch.Generator())
    assert masks.context.tolist() == [list(range(12))] * B
    assert masks.targets.shape == (B, 0, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "teacher"}, "target=teacher: no such target; valid: ema, stopgrad, none"),
        ({"loss": "huber"}, "loss=huber: no such loss; valid: mse, smooth_l1, l1"),
        ({"context_weight": -1.0}, "context_weight=-1.0: must not be negative"),
        ({"target_layers": 3}, "objective.target_layers=3: the encoder has 2 blocks"),
        ({"target_view": "next"}, "target_view=next"),
        ({"momentum": 1.1}, "momentum=1.1"),
        ({"momentum": 0.99, "final_momentum": 0.9}, "final_momentum=0.9"),
        ({"momentum_batch_size": 0}, "momentum_batch_size=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"total_steps": 0}, "total_steps=0: must be at least 1"),
    ],
)
def test_refuses_values_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_objective(**changes)

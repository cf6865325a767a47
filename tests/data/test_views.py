"""Local views (multi-crop): cropping, batches, objectives, and refused configurations."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from jepa.agent import train
from jepa.config import ConfigError, compose
from jepa.data.transforms import Augment
from jepa.encoders.spatial import SpatialEncoder
from jepa.encoders.temporal import TemporalEncoder
from jepa.masks.geometry import local_size
from jepa.masks.none import NoMask
from jepa.objectives.jepa import JEPA
from jepa.predictors.projector import Projector
from jepa.regularizers.cross_view import CrossView
from jepa.regularizers.pooling import pool_views
from jepa.regularizers.sigreg import SIGReg
from jepa.regularizers.vicreg import VICReg
from jepa.runs.metrics import read_rows
from jepa.training.step import train_step
from jepa.types import Batch, Latents, Masks, PatchGrid, RawBatch

LEJEPA = ["mask=none", "predictor=projector", "objective.target=none", "regularizer=[cross_view,sigreg]"]
LEJEPA += ["regularizer.cross_view.of=predicted", "regularizer.sigreg.of=predicted", "augment.views=2"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def raw(rows: int = 4, side: int = 48) -> RawBatch:
    pixels = torch.randint(0, 256, (rows, 3, 1, side, side), generator=seeded(), dtype=torch.uint8)
    labels = torch.arange(rows)
    return RawBatch(
        pixels, torch.full((rows, 2), side), {"labels": labels}, torch.empty(0).long(), torch.zeros_like(labels)
    )


def augment(**changes: Any) -> Augment:
    sizes = {"image_size": (32, 32), "crop_scale": (0.4, 1.0), "crop_aspect": (0.75, 1.3), "flip": True}
    return Augment(**sizes | {"mean": (0.5,) * 3, "std": (0.5,) * 3} | changes)


def local(batch: Batch) -> Tensor:
    assert batch.local is not None
    return batch.local


SMALL = {"views": 2, "local_views": 3, "local_scale": (0.05, 0.2), "local_size": (16, 8)}


def test_local_views_are_side_by_side_and_depend_on_the_generator_alone() -> None:
    batch = augment(**SMALL)(raw(), seeded())
    assert batch.clips.shape == (8, 3, 1, 32, 32)
    assert local(batch).shape == (12, 3, 1, 16, 8)
    assert len({crop.numpy().tobytes() for crop in local(batch)}) == 12
    assert torch.equal(local(augment(**SMALL)(raw(), seeded())), local(batch))
    assert batch.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_sample_and_its_local_views_do_not_depend_on_the_batch_size() -> None:
    batch, transform = raw(), augment(**SMALL, jitter=1.0)
    first_rows = batch.map(lambda tensor: tensor[:2])
    whole, part = transform(batch, seeded()), transform(first_rows, seeded())
    torch.testing.assert_close(part.clips, whole.clips[:4])
    torch.testing.assert_close(local(part), local(whole)[:6])


def test_local_views_have_the_configured_scale() -> None:
    """The value of a ramp is the position, so the range of a crop is its extent."""
    ramp = torch.linspace(0, 255, 256).to(torch.uint8).expand(64, 3, 1, 256, 256)
    labels = torch.zeros(64).long()
    flat = RawBatch(ramp, torch.full((64, 2), 256), {"labels": labels}, torch.empty(0).long(), labels)
    small = augment(local_views=2, local_scale=(0.09, 0.09), local_size=(16, 16), crop_aspect=(1.0, 1.0), flip=False)
    width = (local(small(flat, seeded())) * 0.5 + 0.5).flatten(1)
    extent = width.amax(dim=1) - width.amin(dim=1)  # of 0.3, less half an output pixel at either end
    torch.testing.assert_close(extent, torch.full_like(extent, 0.3 * 15 / 16), atol=0.01, rtol=0)


def test_the_default_size_is_half_of_the_image_in_whole_patches() -> None:
    assert local_size(None, (32, 32), (4, 4)) == (16, 16)
    assert local_size(None, (96, 64), (16, 8)) == (48, 32)
    assert local_size(None, (28, 28), (4, 4)) == (16, 16)
    assert local_size(None, (16, 16), (16, 16)) == (16, 16)
    assert local_size(24, (96, 96), (8, 8)) == (24, 24)
    assert local_size([24, 16], (96, 96), (8, 8)) == (24, 16)


def test_rows_of_a_batch_keep_each_sample_with_its_crops() -> None:
    batch = Batch(
        clips=torch.arange(8.0).view(8, 1, 1, 1, 1),
        fields={"labels": torch.arange(8), "actions": torch.arange(16.0).view(8, 2)},
        views=2,
        local=torch.arange(12.0).view(12, 1, 1, 1, 1),
    )
    part = batch.rows(1, 2)
    assert part.clips.flatten().tolist() == [2, 3, 4, 5]
    assert part.labels.tolist() == [2, 3, 4, 5]
    assert part.fields["actions"][:, 0].tolist() == [4, 6, 8, 10]
    assert local(part).flatten().tolist() == [3, 4, 5, 6, 7, 8]
    assert batch.rows(3, 9).clips.flatten().tolist() == [6, 7]


def latents(global_views: Tensor, local_views: Tensor | None) -> Latents:
    """[b, V, D], [b, L, D] -> Latents with one token of these values for each view"""

    def single_token(views: Tensor, inner: Latents | None = None) -> Latents:
        tokens = views.flatten(0, 1)[:, None]
        masks = Masks(torch.zeros(len(tokens), 1).long(), torch.zeros(len(tokens), 0, 0).long())
        return Latents(tokens, tokens[:, None], masks, PatchGrid(1, 1, 1), views.shape[1], inner)

    return single_token(global_views, None if local_views is None else single_token(local_views))


@pytest.mark.parametrize("of", ["context", "predicted"])
def test_all_views_are_compared_with_the_mean_of_the_global_ones(of: Any) -> None:
    whole, small = (torch.randn(5, views, 4, generator=seeded(views)) for views in (2, 3))
    loss, _ = CrossView(of=of)(latents(whole, small))
    every = torch.cat([whole, small], dim=1)
    expected = sum(((every[b, v] - (whole[b, 0] + whole[b, 1]) / 2) ** 2).mean() for b in range(5) for v in range(5))
    torch.testing.assert_close(loss, torch.as_tensor(expected / 25))


def test_a_single_global_view_may_be_the_centre_of_local_ones() -> None:
    whole, small = torch.randn(3, 1, 4, generator=seeded()), torch.randn(3, 2, 4, generator=seeded(1))
    loss, _ = CrossView()(latents(whole, small))
    torch.testing.assert_close(loss, 2 / 3 * (small - whole).square().mean())


@pytest.mark.parametrize("regularizer", [SIGReg(num_slices=8), VICReg(invariance=1.0)], ids=["sigreg", "vicreg"])
def test_local_views_are_views_like_others_to_other_regularizers(regularizer: Any) -> None:
    whole, small = torch.randn(9, 2, 4, generator=seeded()), torch.randn(9, 3, 4, generator=seeded(1))
    losses = []
    for views in (latents(whole, small), latents(torch.cat([whole, small], dim=1), None)):
        torch.manual_seed(0)
        losses.append(regularizer(views)[0])
    torch.testing.assert_close(*losses)
    assert torch.equal(pool_views(latents(whole, small), "predicted"), torch.cat([whole, small], dim=1))


def objective(**changes: Any) -> JEPA:
    torch.manual_seed(0)
    encoder = SpatialEncoder(clip_shape=(3, 1, 32, 32), patch_size=8, embed_dim=16, depth=1, num_heads=2)
    parts: dict[str, Any] = {
        "predictor": Projector(embed_dim=16, hidden_dim=8, output_dim=4),
        "regularizers": {"cross_view": CrossView(of="predicted")},
        "target": "none",
    }
    return JEPA(encoder=encoder, batch_size=4, total_steps=2, **parts | changes)


def test_the_objective_is_the_formula_of_lejepa_on_the_projected_views() -> None:
    model = objective().eval()
    batch = augment(**SMALL | {"local_size": (16, 16)})(raw(), seeded())
    masks = NoMask(grid=PatchGrid(1, 4, 4))(8, seeded())
    encode = lambda clips: model.predictor(model.context_encoder(clips), masks).flatten(1)  # noqa: E731
    whole, small = encode(batch.clips).unflatten(0, (4, 2)), encode(local(batch)).unflatten(0, (4, 3))
    expected = (torch.cat([whole, small], dim=1) - whole.mean(dim=1, keepdim=True)).square().mean()
    torch.testing.assert_close(model(batch, masks).loss, expected)


def test_local_views_have_gradients_and_follow_their_samples_in_micro_batches() -> None:
    batch = augment(**SMALL | {"local_size": (16, 16)})(raw(), seeded())
    masks = NoMask(grid=PatchGrid(1, 4, 4))(8, seeded())
    losses = []
    for size in (4, 2):
        model = objective().eval()  # batch norm would see other batches
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        options: dict[str, Any] = {"autocast": nullcontext, "clip_grad": None, "guard": None, "seed": 0}
        out = train_step(model, optimizer, batch, masks, micro_batch_size=size, **options)
        losses.append(torch.cat([out.loss[None], model.context_encoder.embed.weight.flatten().detach()]))
    torch.testing.assert_close(*losses)
    assert not torch.equal(losses[0][1:], objective().context_encoder.embed.weight.flatten())


@pytest.mark.parametrize("encoder", [SpatialEncoder, TemporalEncoder])
def test_encoders_encode_local_views_with_positions_counted_from_the_corner(encoder: Any) -> None:
    sizes = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    torch.manual_seed(0)
    large = encoder(clip_shape=(3, 1, 32, 32), **sizes)
    small = encoder(clip_shape=(3, 1, 16, 16), **sizes)
    small.load_state_dict(large.state_dict())
    clips = torch.randn(2, 3, 1, 16, 16, generator=seeded())
    torch.testing.assert_close(large(clips), small(clips))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["augment.local_views=2"],
            "augment.local_views=2 with BlockMasker: smaller crops are compared with whole views",
        ),
        ([*LEJEPA, "augment.local_views=2", "augment.local_size=20"], "20 is not divisible by 16; nearest: 16, 32"),
        ([*LEJEPA, "augment.local_views=2", "augment.local_size=big"], "takes a number of pixels, or [height, width]"),
        ([*LEJEPA, "augment.local_scale=[0.5,0.1]"], "must be two numbers, the smaller first"),
        (["augment.local_views=-1"], "must not be negative"),
        (["augment.jitter=9"], "augment.jitter=9: must be from 0 to 2.5"),
        (["augment.solarize=1.5"], "augment.solarize=1.5: must be from 0 to 1"),
        (["dataset=mnist", "augment.grayscale=0.1"], "augment.grayscale=0.1: the pictures are grey already"),
    ],
)
def test_invalid_configurations_are_refused_with_the_reason(overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose(overrides)
    assert len(error.value.errors) == 1
    assert expected in error.value.errors[0]


def test_the_regularizer_of_lejepa_can_be_replaced() -> None:
    config = compose(["experiment=lejepa_cifar10", "regularizer=vicreg", "augment.local_views=0"])
    assert list(config.regularizer) == ["vicreg"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        [
            "experiment=lejepa_cifar10",
            "augment.local_views=1",
            "predictor.hidden_dim=8",
            "regularizer.sigreg.num_slices=8",
        ],
        ["experiment=cifar10_vit_tiny"],
        ["experiment=cifar10_vit_tiny", "objective.target=none", "regularizer=sigreg"],
        ["experiment=cifar10_vit_tiny", "objective.target=none", "regularizer=vicreg"],
        ["experiment=cifar10_cpu", "mask=random", "predictor=transformer", "objective.target_view=other"],
    ],
    ids=["lejepa", "ema", "sigreg", "vicreg", "masks of other views"],
)
def test_methods_differ_in_overrides_and_train(overrides: list[str], tmp_path: Path, tiny: list[str]) -> None:
    small = [text for text in tiny if not text.startswith(("predictor", "encoder.patch_size"))]
    config = compose([*overrides, *small, "dataset=shapes", "dataset.side=32", "logger=none", "evaluator=diagnostics"])
    assert train(config, tmp_path / "run") == 0
    rows = [row for row in read_rows(tmp_path / "run") if "train/loss" in row]
    assert [row["step"] for row in rows] == [1, 2]
    assert ("train/momentum" in rows[0]) == (overrides[1:] == [])

"""Masks, crops, flips, colours and dropped paths: others in every step, and the same for the same step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from jepa.config import Composer, to_dataclass
from jepa.config.catalogue import conf_folder
from jepa.data.box_transforms import BoxAugment
from jepa.parallel.session import Session
from jepa.training.assemble import assemble, make_dataset, split_phases
from jepa.training.loop import one_step
from jepa.training.run import Run
from jepa.types import Masks, RawBatch

COMPOSER = Composer()
SMALL = [
    *("image_size=16", "encoder.patch_size=4", "encoder.embed_dim=24", "encoder.depth=1", "encoder.num_heads=2"),
    *("predictor.width=24", "predictor.depth=1", "batch_size=4", "steps=100", "num_workers=0", "precision=fp32"),
    *("device=cpu", "dataset.num_samples=16", "dataset.side=24", "evaluator=[]", "logger=none"),
]
CLIPS = ["encoder=temporal", "dataset=moving_digits", "num_frames=8"]
IMAGES = ["encoder=spatial", "dataset=shapes"]
MASKS = sorted(path.stem for path in (conf_folder() / "mask").glob("*.yaml") if path.stem != "none")
STEPS = range(8)
Change = Callable[[Tensor], Tensor]


class Draws(NamedTuple):
    """What one step has drawn."""

    masks: Masks
    clips: Tensor
    from_global_state: Tensor
    """numbers that the objective draws of torch's global state, as its dropped paths are"""
    seeds: dict[str, int]
    """of the generators of the masks and of the crops, and of the global state"""

    def same(self) -> tuple[bytes, ...]:
        """Equal for equal draws."""
        parts = [part for masks in self.masks.sets for part in masks]
        return tuple(part.numpy().tobytes() for part in (*parts, self.clips, self.from_global_state))


class Recorder(nn.Module):
    """Stands in for the objective that a step calls, and notes what it is handed."""

    def __init__(self, objective: nn.Module) -> None:
        super().__init__()
        self.objective = objective
        self.calls: list[tuple[Masks, Tensor, Tensor, int]] = []
        self.keeps_graph: list[bool] = []

    def forward(self, batch: Any, masks: Masks, *grad_cache: Any) -> Any:
        self.calls.append((masks, batch.clips.clone(), torch.rand(8), torch.initial_seed()))
        self.keeps_graph.append(torch.is_grad_enabled())
        return self.objective(batch, masks, *grad_cache)


def small_run(folder: Path, *overrides: str) -> Run:
    checked = COMPOSER.check([*SMALL, *overrides])
    assert checked.errors == []
    config = to_dataclass(checked.config)
    dataset = make_dataset(config)
    session = Session(device=torch.device("cpu"), bf16=False)
    return assemble(split_phases(config, len(dataset))[0], dataset, folder, session)


def draws(run: Run, raw: RawBatch, step: int, *, seed: int | None = None, rank: int = 0, world_size: int = 1) -> Draws:
    """Takes step `step` on `raw` and returns what was drawn for it."""
    components, seeds, recorder = run.components, {}, Recorder(run.components.objective)

    def noted(name: str, draw: Any) -> Any:
        def with_its_seed(*arguments: Any) -> Any:
            seeds[name] = next(one for one in arguments if isinstance(one, torch.Generator)).initial_seed()
            return draw(*arguments)

        return with_its_seed

    augment: Any = noted("crops", components.augment)
    augment.views = components.augment.views
    session = replace(components.session, rank=rank, world_size=world_size)
    watched = replace(
        components, wrapped=recorder, session=session, masker=noted("masks", components.masker), augment=augment
    )
    one_step(replace(run.plan, seed=run.plan.seed if seed is None else seed), watched, raw, step)
    masks, clips, numbers, seeds["paths"] = recorder.calls[0]
    return Draws(masks, clips, numbers, seeds)


def first_batch(run: Run) -> RawBatch:
    stream = run.batches(0)
    raw = next(stream)
    stream.close()
    return raw


def number_of_distinct(tensors: list[Tensor]) -> int:
    return len({tensor.numpy().tobytes() for tensor in tensors})


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, RawBatch]:
    run = small_run(tmp_path_factory.mktemp("images"), *IMAGES, "mask=block")
    return run, first_batch(run)


@pytest.mark.parametrize("mask", MASKS)
def test_every_step_hides_other_tokens_of_the_same_samples(tmp_path: Path, mask: str) -> None:
    run = small_run(tmp_path, *CLIPS, f"mask={mask}", *(["mask.ratio=0.5"] if mask == "temporal" else []))
    raw = first_batch(run)
    masks = [draws(run, raw, step).masks for step in STEPS]
    for mask_sets in zip(*(one.sets for one in masks), strict=True):
        together = [torch.cat([one.context, one.targets.flatten(1)], dim=1) for one in mask_sets]
        assert number_of_distinct(together) == len(STEPS)


@pytest.mark.parametrize(
    "overrides",
    [
        [*IMAGES, "augment.crop_scale=[0.3,1.0]", "augment.flip=false"],
        [*CLIPS, "augment.crop_scale=[0.3,1.0]", "augment.flip=false"],
        [
            *IMAGES,
            "augment.crop_scale=[1.0,1.0]",
            "augment.crop_aspect=[1.0,1.0]",
            "augment.flip=false",
            "augment.jitter=1",
        ],
    ],
    ids=["crops of images", "crops of clips", "colours"],
)
def test_every_step_shows_other_crops_and_colours_of_the_same_samples(tmp_path: Path, overrides: list[str]) -> None:
    run = small_run(tmp_path, *overrides, "mask=random")
    raw = first_batch(run)
    for clips in zip(*(draws(run, raw, step).clips for step in STEPS), strict=True):
        assert number_of_distinct(list(clips)) >= len(STEPS) - 2  # a sample in five keeps its colours


def test_every_sample_is_mirrored_in_some_steps_and_not_in_others(tmp_path: Path) -> None:
    whole = ["augment.crop_scale=[1.0,1.0]", "augment.crop_aspect=[1.0,1.0]", "augment.flip=true"]
    run = small_run(tmp_path, *IMAGES, *whole, "mask=random")
    raw = first_batch(run)
    for clips in zip(*(draws(run, raw, step).clips for step in STEPS), strict=True):
        assert number_of_distinct(list(clips)) == 2


def test_the_crops_of_pictures_with_boxes_are_others_for_every_generator() -> None:
    augment = BoxAugment(
        image_size=(16, 16),
        crop_scale=(0.3, 1.0),
        crop_aspect=(0.75, 4 / 3),
        flip=True,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
    )
    pixels = torch.randint(0, 256, (2, 3, 1, 24, 24), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    fields = {"labels": torch.full((2,), -1), "boxes": torch.tensor([[[2.0, 3.0, 20.0, 21.0, 0.0]]] * 2)}
    none = torch.empty(0, dtype=torch.long)
    raw = RawBatch(pixels, torch.full((2, 2), 24), fields, none, torch.zeros(2, dtype=torch.long))
    batches = [augment(raw, torch.Generator().manual_seed(seed)) for seed in STEPS]
    assert number_of_distinct([batch.clips for batch in batches]) == len(STEPS)
    assert number_of_distinct([batch.fields["boxes"] for batch in batches]) == len(STEPS)


def test_every_step_drops_other_paths(images: tuple[Run, RawBatch]) -> None:
    run, raw = images
    assert number_of_distinct([draws(run, raw, step).from_global_state for step in STEPS]) == len(STEPS)


def test_a_step_that_is_taken_again_draws_the_same(images: tuple[Run, RawBatch]) -> None:
    run, raw = images
    first = [draws(run, raw, step).same() for step in STEPS]
    torch.manual_seed(99)
    assert [draws(run, raw, step).same() for step in reversed(STEPS)] == first[::-1]


def test_another_seed_of_the_run_draws_other_masks_crops_and_paths(images: tuple[Run, RawBatch]) -> None:
    run, raw = images
    for step in STEPS:
        one, other = draws(run, raw, step, seed=0), draws(run, raw, step, seed=1)
        assert not one.masks.context.equal(other.masks.context)
        assert not one.clips.equal(other.clips)
        assert not one.from_global_state.equal(other.from_global_state)


def test_masks_crops_and_paths_never_share_a_seed(images: tuple[Run, RawBatch]) -> None:
    run, raw = images
    seeds = [seed for step in STEPS for seed in draws(run, raw, step).seeds.values()]
    assert len(set(seeds)) == len(seeds) == 3 * len(STEPS)


def test_ranks_share_the_draws_of_a_batch_and_drop_paths_of_their_own(images: tuple[Run, RawBatch]) -> None:
    """Each rank has its rows of the masks and crops that one process would have drawn."""
    run, raw = images
    for step in STEPS:
        whole = draws(run, raw, step)
        ranks = [
            draws(run, raw.map(lambda tensor, rank=rank: tensor[rank::2]), step, rank=rank, world_size=2)
            for rank in range(2)
        ]
        for rank, own in enumerate(ranks):
            assert own.masks.context.equal(whole.masks.context[rank::2])
            assert own.masks.targets.equal(whole.masks.targets[rank::2])
            torch.testing.assert_close(own.clips, whole.clips[rank::2], atol=1e-5, rtol=0)
        assert not ranks[0].from_global_state.equal(ranks[1].from_global_state)


def test_both_passes_over_micro_batches_drop_the_same_paths_and_the_first_keeps_no_graph(tmp_path: Path) -> None:
    """Regularisers see the whole batch, so that each micro-batch is computed twice."""
    run = small_run(tmp_path, *IMAGES, "mask=random", "regularizer=vicreg", "micro_batch_size=2")
    recorder = Recorder(run.components.objective)
    one_step(run.plan, replace(run.components, wrapped=recorder), first_batch(run), step=3)
    numbers = [drawn for _, _, drawn, _ in recorder.calls]
    assert recorder.keeps_graph == [False, False, True, True]
    assert number_of_distinct(numbers[:2]) == 2
    assert all(first.equal(second) for first, second in zip(numbers[:2], numbers[2:], strict=True))

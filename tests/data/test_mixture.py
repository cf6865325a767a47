"""Mixtures: exact shares, an order computed from the position, and batches of one number of frames."""

from collections import Counter
from functools import partial
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa.config import compose, factory
from jepa.data.loader import batches
from jepa.data.mixture import BATCH_BLOCK, BLOCK, Mixture, MixtureCounter, largest_remainder


class Numbers:
    """Sample i of a part has the value i everywhere; the last frame of a drawn clip has the value of the seed."""

    mean = std = (0.5, 0.5, 0.5)

    def __init__(
        self, count: int, channels: int = 3, classes: tuple[str, ...] = (), broken: tuple[int, ...] = ()
    ) -> None:
        self.count, self.channels, self.classes, self.broken = count, channels, classes, broken

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index in self.broken:
            raise OSError("broken")
        return torch.full((self.channels, 1, 4, 4), index % 256, dtype=torch.uint8), index

    def describe(self, index: int) -> str:
        return f"number {index} of {self.count}"

    def validation(self) -> "Numbers":
        return Numbers(7)


class Clips(Numbers):
    def __init__(self, count: int, *, num_frames: int, **arguments) -> None:
        super().__init__(count, **arguments)
        self.num_frames = num_frames

    def draw(self, index: int, seed: int) -> tuple[torch.Tensor, int]:
        clip = self[index][0].repeat(1, self.num_frames, 1, 1)
        clip[:, -1] = seed % 256
        return clip, index


def mixture(weights=(1.0, 1.0), sizes=(30, 50), kinds=(Numbers, Numbers), **arguments) -> Mixture:
    parts = {name: partial(kind, size) for name, kind, size in zip("abc", kinds, sizes, strict=False)}
    return Mixture(**{"num_frames": 2, "parts": parts, "weights": dict(zip("abc", weights, strict=False))} | arguments)


@given(st.lists(st.floats(0.05, 1), min_size=1, max_size=6), st.integers(50, 500))
@settings(max_examples=50, deadline=None)
def test_counts_add_up_and_are_within_one_of_their_shares(weights, total):
    shares = [weight / sum(weights) for weight in weights]
    counts = largest_remainder(shares, total) if min(shares) * total >= 1 else None
    assert counts is None or sum(counts) == total
    assert counts is None or all(abs(n - share * total) < 1 for n, share in zip(counts, shares, strict=True))


def test_shares_are_exact_in_each_block_and_each_part_is_a_permutation_per_epoch():
    mixed = mixture(weights=(1, 2.5, 0.5), sizes=(30, 50, 11), kinds=(Numbers,) * 3)
    at = mixed.index_order(8, seed=3)
    for block in range(2):
        indices = [at(position)[0] for position in range(block * BLOCK, (block + 1) * BLOCK)]
        assert Counter(mixed.part_of(index)[0] for index in indices) == {0: 250, 1: 625, 2: 125}
    first = [index for index in (at(p)[0] for p in range(2 * BLOCK)) if index < 30]
    assert sorted(first[:30]) == sorted(first[30:60]) == list(range(30))


@pytest.mark.parametrize("kinds", [(Numbers, Numbers), (Numbers, Clips)])
def test_any_step_is_computed_without_those_before_it(kinds):
    whole = [b.labels.tolist() + b.parts.tolist() for b in islice(stream(mixture(kinds=kinds)), 260)]
    for step in (0, 1, 101, 255):
        direct = next(stream(mixture(kinds=kinds), first_step=step))
        assert direct.labels.tolist() + direct.parts.tolist() == whole[step]


def stream(mixed: Mixture, **arguments):
    return batches(mixed, **{"batch_size": 8, "seed": 0, "num_workers": 0} | arguments)


def test_the_seed_decides_the_order_and_ranks_divide_it():
    single = [b.pixels[:, 0, 0, 0, 0].tolist() for b in islice(stream(mixture()), 4)]
    other = [b.pixels[:, 0, 0, 0, 0].tolist() for b in islice(stream(mixture(), seed=1), 4)]
    assert single != other
    ranks = [list(islice(stream(mixture(), batch_size=4, rank=r, world_size=2), 4)) for r in range(2)]
    joined = [
        sorted(torch.cat([one.pixels, two.pixels])[:, 0, 0, 0, 0].tolist()) for one, two in zip(*ranks, strict=True)
    ]
    assert joined == [sorted(batch) for batch in single]


def test_parts_of_different_lengths_never_share_a_batch_and_batches_have_the_shares():
    mixed = mixture(weights=(1, 3), kinds=(Numbers, Clips))
    first_batches = list(islice(stream(mixed), BATCH_BLOCK))
    assert all(len(set(batch.parts.tolist())) == 1 for batch in first_batches)
    assert Counter(batch.pixels.shape[2] for batch in first_batches) == {1: 25, 2: 75}
    assert all(batch.pixels.shape[2] == 1 + batch.parts[0] for batch in first_batches)


def test_ranks_have_batches_of_the_same_part():
    ranks = [stream(mixture(kinds=(Numbers, Clips)), batch_size=4, rank=r, world_size=2) for r in range(2)]
    for one, two in islice(zip(*ranks, strict=True), 20):
        assert one.parts.tolist() == two.parts.tolist()


def test_clips_are_drawn_anew_in_each_epoch_of_their_part():
    mixed = mixture(weights=(1, 9), sizes=(30, 8), kinds=(Numbers, Clips))
    clips = [batch.pixels[:, 0, -1, 0, 0].tolist() for batch in islice(stream(mixed), 12) if batch.parts[0] == 1]
    assert len(set(map(tuple, clips))) == len(clips)


def test_a_broken_sample_is_replaced_within_its_part():
    kinds = (partial(Numbers, broken=(29, 0)), partial(Clips, broken=(49,)))
    for batch in islice(stream(mixture(kinds=kinds)), 20):
        values = batch.pixels[:, 0, 0, 0, 0]
        assert len(set(batch.parts.tolist())) == 1
        assert not set(values.tolist()) & ({29, 0} if batch.parts[0] == 0 else {49})


def test_classes_labels_and_held_out_part_are_those_of_the_probed_part():
    mixed = mixture(kinds=(Numbers, partial(Numbers, classes=("x", "y"))), probe="b")
    held_out = mixed.validation()
    assert mixed.classes == ("x", "y")
    assert mixed.probe_dataset is mixed.parts[1]
    assert held_out is not None
    assert len(held_out) == 7
    assert [mixed[index][1] for index in (0, 29, 30, 79)] == [-1, -1, 0, 49]
    assert mixed.describe(30) == "number 0 of 50"
    assert len(mixed) == 80


def test_actual_shares_are_reported_by_name():
    shares = MixtureCounter(mixture())
    shares.add(torch.tensor([0, 0, 0, 1]))
    assert shares.read() == {"data/share_a": 0.75, "data/share_b": 0.25}
    shares.add(torch.tensor([1, 1]))
    assert shares.read() == {"data/share_a": 0.0, "data/share_b": 1.0}
    plain = MixtureCounter(Numbers(3))
    plain.add(torch.tensor([0, 0]))
    assert plain.read() == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": (1,)}, r"weights=.*each of a, b"),
        ({"weights": (1, 0)}, "above 0"),
        ({"probe": "z"}, r"probe=z: expected one of a, b"),
        ({"kinds": (Numbers, partial(Numbers, channels=1))}, r"same channels, got \{'a': 3, 'b': 1\}"),
    ],
)
def test_invalid_mixtures_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        mixture(**arguments)


def test_a_part_smaller_than_its_batches_is_refused():
    with pytest.raises(ValueError, match="batch_size=8: a part of the mixture has only 5"):
        stream(mixture(sizes=(5, 50), kinds=(Numbers, Clips)))


def test_a_share_too_small_for_a_block_is_refused():
    with pytest.raises(ValueError, match="less than one of 1000"):
        next(stream(mixture(weights=(1, 100000))))


def test_the_configured_mixture_builds_its_parts_with_the_frames_of_the_run():
    config = compose(["dataset=mixture", "encoder=temporal", "dataset.weights.images=2"])
    mixed = factory(config.dataset)(num_frames=4)
    assert mixed.part_names == ("images", "clips")
    assert mixed.parts[1].num_frames == 4
    assert mixed.shares == [0.4, 0.6]
    assert mixed.probe_dataset is mixed.parts[1]

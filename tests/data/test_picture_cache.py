"""Decoded pictures that are kept in memory: the same numbers, each picture read once, no more memory than allowed."""

from __future__ import annotations

import logging
import multiprocessing
from itertools import islice
from typing import Any

import pytest
import torch

from jepa.data import picture_cache
from jepa.data.loader import batches
from jepa.data.picture_cache import PictureCache, make_cache
from jepa.types import Sample


class Pictures:
    """Sample i is a picture of its own size; counts how often each is read, over all processes."""

    classes = ()
    channels = 3
    mean = std = (0.5, 0.5, 0.5)
    encoded = staticmethod(lambda index: b"")

    def __init__(self, count: int, broken: tuple[int, ...] = ()) -> None:
        self.count, self.broken = count, broken
        self.reads = multiprocessing.get_context("fork").Array("i", count)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        with self.reads.get_lock():
            self.reads[index] += 1
        if index in self.broken:
            raise OSError("cannot be read")
        generator = torch.Generator().manual_seed(index)
        size = (3, 1, 8 + index % 5, 20 - index % 7)
        return torch.randint(0, 256, size, generator=generator, dtype=torch.uint8), index

    def describe(self, index: int) -> str:
        return f"number {index}"

    def validation(self) -> None:
        return None


def first(dataset: Any, num: int, **arguments: Any) -> list[Any]:
    options: dict[str, Any] = {"batch_size": 4, "seed": 0, "num_workers": 0, "short_side": 6}
    stream = batches(dataset, **options | arguments)
    found = list(islice(stream, num))
    stream.close()
    return found


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_the_same_and_pictures_are_read_once(num_workers: int) -> None:
    dataset = Pictures(16)
    expected = first(Pictures(16), 26)
    found = first(dataset, 26, keep_decoded="auto", num_workers=num_workers)
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one.pixels, other.pixels)
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.sizes, other.sizes)
    assert max(dataset.reads) <= 1 + max(1, num_workers)  # for its size, and by workers that want it at the same time


def test_unreadable_pictures_are_replaced_as_without_it() -> None:
    expected, found = (first(Pictures(16, broken=(3,)), 12, keep_decoded=keep) for keep in (False, True))
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one.pixels, other.pixels)
        assert torch.equal(one.broken, other.broken)
    assert any(len(batch.broken) for batch in found)


def test_auto_takes_a_quarter_of_the_free_memory_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    sample = Sample(torch.zeros(3, 1, 10, 10, dtype=torch.uint8), 0)
    needed = 300 * 100 * picture_cache.MARGIN
    monkeypatch.setattr(picture_cache, "free_memory", lambda: int(4 * needed) + 4)
    assert make_cache("auto", 100, lambda index: sample) is not None
    assert "pictures are decoded once and kept in memory" in caplog.text
    assert make_cache("auto", 100, lambda index: sample, processes=2) is None
    monkeypatch.setattr(picture_cache, "free_memory", lambda: int(4 * needed) - 4)
    assert make_cache("auto", 100, lambda index: sample) is None
    assert make_cache(True, 100, lambda index: sample) is not None
    assert make_cache(False, 100, lambda index: sample) is None
    assert make_cache("auto", 100, lambda index: None) is None


def test_what_does_not_fit_any_more_is_read_again() -> None:
    cache = PictureCache(2, 10)
    clip = torch.arange(9, dtype=torch.uint8).view(1, 1, 3, 3)
    cache.put(0, Sample(clip, 5))
    cache.put(1, Sample(clip, 6))
    kept = cache.get(0)
    assert kept is not None
    assert torch.equal(kept.clip, clip)
    assert kept.label == 5
    assert cache.get(1) is None


def test_data_without_encoded_files_and_clips_are_not_kept() -> None:
    drawn = Pictures(16)
    drawn.encoded = None  # pyright: ignore[reportAttributeAccessIssue]
    first(drawn, 9, keep_decoded=True)
    assert max(drawn.reads) > 2


def test_workers_that_are_not_forked_read_for_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = Sample(torch.zeros(3, 1, 4, 4, dtype=torch.uint8), 0)
    monkeypatch.setattr(picture_cache.multiprocessing, "get_context", lambda: multiprocessing.context.SpawnContext())
    assert make_cache(True, 10, lambda index: sample) is None

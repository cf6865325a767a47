"""Endless batches addressed by position: the batch of step s is a pure function of (seed, s, rank)."""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data import Dataset as TorchDataset

from jepa.errors import RunError
from jepa.parallel.environment import num_cores, process_info
from jepa.seeding import derive_seed, generator
from jepa.types import NO_FIELDS, ClipDataset, Dataset, DatasetTraits, Field, RawBatch, Sample

log = logging.getLogger(__name__)
UNREADABLE = (OSError, RuntimeError)
"""what a data set raises for a sample that can't be read"""
MOST_BROKEN = 0.01
"""the share of a data set that may be broken"""
LONGEST_SIDE = 4
"""of a sample, in canvases: what is longer is cut at both ends, since all samples of a batch share its canvas"""


class DataError(RunError):
    """The data can't be used as they are; the message says what to do."""


def batches(
    dataset: Dataset,
    *,
    batch_size: int,
    seed: int,
    first_step: int = 0,
    num_workers: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
    canvas: int | None = None,
    fields: Mapping[str, Field] = NO_FIELDS,
) -> Generator[RawBatch, None, None]:
    """Batches of `batch_size` samples for this rank, from step `first_step` on, for ever.

    Every epoch is a permutation of its own, and the ranks share out each step's samples: their union is the same for
    any number of ranks. Clips start at another frame of their video in each epoch. Samples whose shorter side is
    above `canvas` are reduced to it. `fields` are those of the data set that are delivered besides the labels.
    `num_workers=None` chooses.
    Closing the iterator ends the workers. Raises ValueError at once, DataError where data or workers fail.
    """
    if min(batch_size, world_size) < 1 or not 0 <= rank < world_size:
        raise ValueError(
            f"batch_size={batch_size}, rank={rank}, world_size={world_size}: expected 0 <= rank < world_size"
        )
    if len(dataset) < batch_size * world_size:
        raise ValueError(
            f"the data set has {len(dataset)} samples, fewer than batch_size={batch_size * world_size}; "
            f"lower batch_size to {len(dataset)} or less, or add data"
        )
    num_workers = choose_num_workers(dataset) if num_workers is None else num_workers
    loader = DataLoader(
        _BatchReader(dataset, canvas, fields),
        sampler=_Sampler(
            dataset, batch_size * world_size, seed, range(rank, batch_size * world_size, world_size), first_step
        ),
        batch_size=None,
        collate_fn=_unchanged,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_ignore_job_signals,
        generator=generator(seed, first_step, rank, "workers"),
    )
    return _iterate(loader)


def read_in_order(reader: TorchDataset, lists: Iterable[list[int]], num_workers: int) -> Generator[Any, None, None]:
    """`reader[some]` of one list after the other, made in workers; a text that it returns becomes a DataError."""
    loader = DataLoader(
        reader,
        sampler=lists,
        batch_size=None,
        collate_fn=_unchanged,
        num_workers=num_workers,
        worker_init_fn=_ignore_job_signals,
        generator=torch.Generator(),  # the global one stays as it is
    )
    return _iterate(loader)


def choose_num_workers(dataset: Dataset) -> int:
    """0 for a data set in memory, else one worker for each core of this rank but one, at most 8."""
    if DatasetTraits.of(dataset).in_memory:
        return 0
    process = process_info(os.environ)
    return max(0, min(8, num_cores() // (process.local_size if process else 1) - 1))


def _iterate(loader: DataLoader) -> Generator[RawBatch, None, None]:
    previous = multiprocessing.active_children()
    iterator: Any = iter(loader)
    workers = [child for child in multiprocessing.active_children() if child not in previous]
    try:
        for batch in iterator:
            if isinstance(batch, str):
                raise DataError(batch)
            yield batch
    except RuntimeError as fault:
        if not str(fault).startswith("DataLoader worker"):
            raise
        raise DataError(
            f"{fault} It was killed from outside, often for want of memory: lower num_workers (num_workers=0 reads "
            "in the main process), or give the container more shared memory (--shm-size)"
        ) from fault
    finally:
        if workers:
            iterator._shutdown_workers()  # otherwise left to the garbage collector, which a traceback holds off
        for worker in workers:
            worker.join(timeout=30)


class InfiniteOrder:
    """A sequence without end: entry p is number p % n of epoch p // n's permutation of n samples."""

    def __init__(self, num_samples: int, seed: int, stream: str = "order") -> None:
        self.num_samples = num_samples
        self.seed = seed
        self.stream = stream
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def take(self, position: int) -> tuple[int, int]:
        """Sample index and epoch at a position of the sequence."""
        epoch, offset = divmod(position, self.num_samples)
        if epoch != self._epoch:
            random = generator(self.seed, epoch, 0, self.stream)
            self._epoch, self._order = epoch, torch.randperm(self.num_samples, generator=random).numpy()
        return int(self._order[offset]), epoch


class _Sampler:
    """Lists of (index, seed), one for each step, in the data set's own order if it has an `index_order`."""

    def __init__(self, dataset: Dataset, batch_size: int, seed: int, share: range, first_step: int) -> None:
        index_order = DatasetTraits.of(dataset).index_order
        self.take = InfiniteOrder(len(dataset), seed).take if index_order is None else index_order(batch_size, seed)
        self.batch_size = batch_size
        self.seed = seed
        self.share = share
        self.first_step = first_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in count(self.first_step):
            samples = (self.take(step * self.batch_size + row) for row in self.share)
            yield [(index, derive_seed(self.seed, epoch, index, "draw")) for index, epoch in samples]


class _BatchReader(TorchDataset[RawBatch | str]):
    """The data set of a worker: a list of (index, seed) -> RawBatch, or the message of a DataError."""

    PATIENCE = 100
    """unreadable samples in a row"""

    def __init__(self, dataset: Dataset, canvas: int | None, fields: Mapping[str, Field] = NO_FIELDS) -> None:
        self.dataset: Any = dataset
        self.draws = isinstance(dataset, ClipDataset)
        self.part_of = DatasetTraits.of(dataset).part_of or self._only_part
        self.canvas = canvas
        self.fields = dict(fields)

    def __getitem__(self, places: list[tuple[int, int]]) -> RawBatch | str:
        broken: list[int] = []
        try:
            samples = [self._read(index, seed, broken) for index, seed in places]
            columns = {name: _column(name, field, samples) for name, field in self.fields.items()}
        except DataError as fault:
            return str(fault)
        labels = torch.tensor([sample.label for sample in samples])
        pixels, sizes = _on_canvas([sample.clip for sample in samples])
        parts = torch.tensor([self.part_of(index)[0] for index, _ in places])
        return RawBatch(pixels, sizes, {"labels": labels, **columns}, torch.tensor(broken, dtype=torch.long), parts)

    def _read(self, index: int, seed: int, broken: list[int]) -> Sample:
        """The sample, or the next readable one of its part; appends unreadable indices to `broken`."""
        reason = ""
        _, part = self.part_of(index)
        for surplus in range(min(self.PATIENCE, len(part))):
            candidate = part[(index - part.start + surplus) % len(part)]
            try:
                sample = Sample(*(self.dataset.draw(candidate, seed) if self.draws else self.dataset[candidate]))
            except UNREADABLE as fault:
                broken.append(candidate)
                reason = f"{self.dataset.describe(candidate)}: {first_line(fault)}"
                continue
            return sample if self.canvas is None else self._reduce(sample, self.canvas)
        raise DataError(f"{min(self.PATIENCE, len(part))} samples in a row can't be read; the last was {reason}")

    def _only_part(self, index: int) -> tuple[int, range]:
        return 0, range(len(self.dataset))

    def _reduce(self, sample: Sample, canvas: int) -> Sample:
        size = sample.clip.shape[-2:]
        moved = {name: MOVED[name](sample.fields[name], size, canvas) for name in MOVED.keys() & sample.fields.keys()}
        return Sample(downscale(sample.clip, canvas), sample.label, {**sample.fields, **moved})


def downscale(clip: Tensor, canvas: int) -> Tensor:
    """[C, T, H, W] -> the same reduced, antialiased, so that the shorter side is at most `canvas`.

    What is longer than `LONGEST_SIDE` canvases loses both ends.
    """
    size, margins = _bounds(clip.shape[-2:], canvas)
    if size != [*clip.shape[-2:]]:
        clip = interpolate(clip.transpose(0, 1), size, mode="bilinear", antialias=True).transpose(0, 1)
    for dim, margin in zip((-2, -1), margins, strict=True):
        clip = clip.narrow(dim, margin, min(clip.shape[dim], LONGEST_SIDE * canvas))
    return clip


def downscale_boxes(boxes: Tensor, size: Sequence[int], canvas: int) -> Tensor:
    """[m, 5], (height, width) of the picture -> the boxes [m, 5] in the picture that `downscale` returns."""
    (height, width), (top, left) = _bounds(size, canvas)
    ratios = torch.tensor([width / size[1], height / size[0]] * 2 + [1.0])
    return boxes * ratios - torch.tensor([left, top, left, top, 0.0])


def _bounds(size: Sequence[int], canvas: int) -> tuple[list[int], list[int]]:
    """The height and width that a picture is reduced to, and how much of them is cut off at the top and left."""
    ratio = canvas / min(size)
    reduced = [max(canvas, round(side * ratio)) for side in size] if ratio < 1 else [*size]
    return reduced, [max(0, side - LONGEST_SIDE * canvas) // 2 for side in reduced]


MOVED: Mapping[str, Callable[[Tensor, Sequence[int], int], Tensor]] = {"boxes": downscale_boxes}
"""Fields that hold positions in the picture: (value, size, canvas) -> the value after `downscale`."""


def _on_canvas(clips: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """[C, T, H, W] each -> `RawBatch.pixels` and `RawBatch.sizes`"""
    sizes = torch.tensor([clip.shape[-2:] for clip in clips])
    channels, frames = clips[0].shape[:2]
    height, width = sizes.amax(dim=0).tolist()
    # channels last, as decoders deliver and as the uint8 resampling kernel reads three times faster
    pixels = _zeros((len(clips), frames, height, width, channels)).permute(0, 4, 1, 2, 3)  # [B, C, T, H, W]
    for canvas, clip in zip(pixels, clips, strict=True):
        canvas[..., : clip.shape[-2], : clip.shape[-1]] = clip
    return pixels, sizes


def _column(name: str, field: Field, samples: Sequence[Sample]) -> Tensor:
    """One field of all samples, stacked; a ragged one padded to the longest."""
    values = [sample.fields.get(name) for sample in samples]
    for value in values:
        if value is None or value.shape[field.ragged :] != field.shape:
            found = "none" if value is None else f"the shape {[*value.shape]}"
            raise DataError(f"the data set declares {name} as {field}, and a sample of it has {found}")
    values = [value.to(getattr(torch, field.dtype)) for value in values if value is not None]
    return pad_sequence(values, batch_first=True, padding_value=field.padding) if field.ragged else torch.stack(values)


def blank_fields(fields: Mapping[str, Field], rows: int) -> dict[str, Tensor]:
    """Placeholder fields of a batch: labels -1, empty ragged fields, zeros elsewhere."""
    shapes = {name: (rows, *([0] if field.ragged else []), *field.shape) for name, field in fields.items()}
    blank = {name: torch.zeros(shape, dtype=getattr(torch, fields[name].dtype)) for name, shape in shapes.items()}
    return {"labels": torch.full((rows,), -1), **blank}


def _zeros(shape: tuple[int, ...]) -> Tensor:
    """uint8; in a worker directly in shared memory, which saves a copy on the way to the main process."""
    if get_worker_info() is None:
        return torch.zeros(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(storage).unflatten(0, shape)


def _unchanged(batch: Any) -> Any:
    return batch


def _ignore_job_signals(worker: int) -> None:
    """Workers ignore signals sent to a whole job (Ctrl-C, a scheduler's warning); the main process handles them."""
    for signum in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_sigterm_of_parent, daemon=True).start()


def _exit_on_sigterm_of_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


class BrokenSamples:
    """Counts the distinct unreadable samples of a data set and warns of each one once."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.indices: set[int] = set()

    @property
    def count(self) -> int:
        return len(self.indices)

    def note(self, broken: Tensor) -> None:
        """long [b] of indices; raises DataError when more than `MOST_BROKEN` of the data set turns out to be broken."""
        new = [index for index in dict.fromkeys(broken.tolist()) if index not in self.indices]
        for index in new:
            self.indices.add(index)
            log.warning("skipped %s: %s", self.dataset.describe(index), self._reason(index))
        if new and self.count > MOST_BROKEN * len(self.dataset):
            raise DataError(
                f"{self.count} of {len(self.dataset)} samples can't be read, more than {MOST_BROKEN:.0%}: the last was "
                f"{self.dataset.describe(new[-1])}. Repair or remove them (the log names each one)"
            )

    def _reason(self, index: int) -> str:
        try:
            self.dataset[index]
        except UNREADABLE as fault:
            return first_line(fault)
        return "could not be read at first"


def first_line(fault: BaseException) -> str:
    """The message of an exception without what some libraries append to it."""
    return (str(fault).splitlines() or [type(fault).__name__])[0]

"""Endless batches addressed by position: the batch of step s is a pure function of (seed, s, rank)."""

from __future__ import annotations

import errno
import logging
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.nn.utils.rnn import pad_sequence
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data import Dataset as TorchDataset

from jepa.data.picture_cache import PictureCache, make_cache
from jepa.errors import RunError, SourceError
from jepa.parallel.environment import num_cores, process_info
from jepa.parallel.signals import no_interrupts
from jepa.seeding import derive_seed, generator
from jepa.types import NO_FIELDS, ClipDataset, Dataset, DatasetTraits, Field, RawBatch, Sample

log = logging.getLogger(__name__)
Order = Callable[[int], tuple[int, int]]
"""Position in the endless sequence of samples -> sample index and epoch."""
UNREADABLE = (OSError, RuntimeError)
"""Exceptions that a data set raises for a sample that cannot be read."""
MAX_BROKEN_RATIO = 0.01
"""Largest share of a data set that may be unreadable; a single sample may always be."""
MAX_ATTEMPTS = 100
"""Number of samples tried in a row before reading gives up."""
MAX_ASPECT = 4
"""Largest side of a sample in multiples of `short_side`; its ends are cut off, since they enlarge the whole batch."""


class DataError(RunError):
    """The data cannot be used as they are; the message says what to do."""


def batches(
    dataset: Dataset, *, batch_size: int, seed: int, first_step: int = 0, num_workers: int | None = None, rank: int = 0,
    world_size: int = 1, pin_memory: bool = False, short_side: int | None = None,
    fields: Mapping[str, Field] = NO_FIELDS, keep_decoded: bool | str = False,
) -> Generator[RawBatch, None, None]:  # fmt: skip
    """Batches of `batch_size` samples for this rank, from step `first_step` on, without end.

    Every epoch is another permutation, and each step's samples are divided among the ranks: together they are the same
    for any number of ranks. Clips start at another frame of their video in each epoch. Samples are downscaled so that
    their shorter side is at most `short_side`. `fields` are the fields delivered besides the labels.
    `keep_decoded` keeps downscaled images of encoded files in memory; "auto" only few. `num_workers=None` chooses the
    number. Closing the iterator ends the workers.
    Raises ValueError at once, DataError if data or workers fail.
    """
    if min(batch_size, world_size) < 1 or not 0 <= rank < world_size:
        raise ValueError(
            f"batch_size={batch_size}, rank={rank}, world_size={world_size}: expected 0 <= rank < world_size"
        )
    total = batch_size * world_size
    if len(dataset) < total:
        raise ValueError(
            f"the data set has {len(dataset)} samples, fewer than batch_size={total}; "
            f"lower batch_size to {len(dataset)} or less, or add data"
        )
    index_order = DatasetTraits.of(dataset).index_order
    at = infinite_order(len(dataset), seed) if index_order is None else index_order(total, seed)
    steps = ([at(step * total + row) for row in range(rank, total, world_size)] for step in count(first_step))
    requests = ([(index, derive_seed(seed, epoch, index, "draw")) for index, epoch in step] for step in steps)
    reader = _BatchReader(dataset, short_side, fields)
    reader.keep(keep_decoded)
    num_workers = choose_num_workers(dataset) if num_workers is None else num_workers
    return _iterate(_loader(reader, requests, num_workers, generator(seed, first_step, rank, "workers"), pin_memory))


def read_in_order(reader: TorchDataset, lists: Iterable[list[int]], num_workers: int) -> Generator[Any, None, None]:
    """`reader[indices]` for each list of indices, computed in workers; a str result is raised as a DataError."""
    return _iterate(_loader(reader, lists, num_workers, torch.Generator()))  # the global generator is not used


def _loader(
    reader: TorchDataset, lists: Iterable[list], num_workers: int, random: torch.Generator, pin_memory: bool = False
) -> DataLoader:
    return DataLoader(
        reader, sampler=lists, batch_size=None, collate_fn=_deliver, num_workers=num_workers, pin_memory=pin_memory,
        worker_init_fn=_ignore_job_signals, generator=random,
    )  # fmt: skip


def choose_num_workers(dataset: Dataset) -> int:
    """0 for a data set in memory, else one worker for each core of this rank but one, at most 8."""
    if DatasetTraits.of(dataset).in_memory:
        return 0
    process = process_info(os.environ)
    return max(0, min(8, num_cores() // (process.local_size if process else 1) - 1))


def _iterate(loader: DataLoader) -> Generator[Any, None, None]:
    previous, workers = multiprocessing.active_children(), []
    iterator: Any = None
    try:
        with no_interrupts():  # until a worker ignores them
            iterator = iter(loader)
        workers = [child for child in multiprocessing.active_children() if child not in previous]
        for batch in iterator:
            if isinstance(batch, str):
                raise DataError(batch)
            yield batch
    except (RuntimeError, OSError, EOFError) as error:
        if killed := killed_worker(error, workers):
            raise killed from error
        raise
    finally:
        if workers:
            iterator._shutdown_workers()  # the garbage collector would do it too late: a traceback keeps the iterator
        for worker in workers:
            worker.join(timeout=30)


def infinite_order(num_samples: int, seed: int, stream: str = "order") -> Order:
    """Position p -> number p % n of the permutation of the n samples in epoch p // n, and that epoch."""

    @lru_cache(maxsize=1)
    def permutation(epoch: int) -> np.ndarray:
        return torch.randperm(num_samples, generator=generator(seed, epoch, 0, stream)).numpy()

    def at(position: int) -> tuple[int, int]:
        epoch, offset = divmod(position, num_samples)
        return int(permutation(epoch)[offset]), epoch

    return at


class _BatchReader(TorchDataset[RawBatch | str]):
    """The data set of a worker: a list of (index, seed) -> RawBatch, or the message of a DataError."""

    def __init__(self, dataset: Dataset, short_side: int | None, fields: Mapping[str, Field] = NO_FIELDS) -> None:
        self.dataset: Any = dataset
        self.has_clips = isinstance(dataset, ClipDataset)
        self.part_of = DatasetTraits.of(dataset).part_of or self._single_part
        self.short_side = short_side
        self.fields = dict(fields)
        self.cache: PictureCache | None = None

    def keep(self, keep_decoded: bool | str) -> None:
        """Keep images from now on, if they come from encoded files and have no fields to deliver."""
        if not keep_decoded or self.has_clips or self.fields or DatasetTraits.of(self.dataset).encoded is None:
            return
        process = process_info(os.environ)
        local_size = process.local_size if process else 1
        self.cache = make_cache(keep_decoded, len(self.dataset), self._probe, processes=local_size)

    def _probe(self, index: int) -> Sample | None:
        try:
            return self._sample(index)
        except UNREADABLE:
            return None

    def __getitem__(self, requests: list[tuple[int, int]]) -> RawBatch | str:
        broken: list[int] = []
        try:
            samples = [self._read(index, seed, broken) for index, seed in requests]
            columns = {name: _column(name, field, samples) for name, field in self.fields.items()}
        except (DataError, SourceError) as error:
            return str(error)
        labels = torch.tensor([sample.label for sample in samples])
        pixels, sizes = _pad([sample.clip for sample in samples])
        parts = torch.tensor([self.part_of(index)[0] for index, _ in requests])
        return RawBatch(pixels, sizes, {"labels": labels, **columns}, torch.tensor(broken, dtype=torch.long), parts)

    def _read(self, index: int, seed: int, broken: list[int]) -> Sample:
        """The sample, or the next readable one of its part; appends unreadable indices to `broken`."""
        reason = ""
        _, part = self.part_of(index)
        for attempt in range(min(MAX_ATTEMPTS, len(part))):
            candidate = part[(index - part.start + attempt) % len(part)]
            try:
                return self._sample(candidate, seed)
            except UNREADABLE as error:
                broken.append(candidate)
                reason = f"{self.dataset.describe(candidate)}: {first_line(error)}"
        raise DataError(f"{min(MAX_ATTEMPTS, len(part))} samples in a row can't be read; the last was {reason}")

    def _sample(self, index: int, seed: int = 0) -> Sample:
        """The downscaled sample; `seed` decides the position of a clip in its video."""
        kept = self.cache.get(index) if self.cache else None
        if kept is not None:
            return kept
        sample = Sample(*(self.dataset.draw(index, seed) if self.has_clips else self.dataset[index]))
        sample = sample if self.short_side is None else _downscale_sample(sample, self.short_side)
        if self.cache:
            self.cache.put(index, sample)
        return sample

    def _single_part(self, index: int) -> tuple[int, range]:
        return 0, range(len(self.dataset))


def _downscale_sample(sample: Sample, short_side: int) -> Sample:
    size = sample.clip.shape[-2:]
    names = FIELD_DOWNSCALERS.keys() & sample.fields.keys()
    scaled = {name: FIELD_DOWNSCALERS[name](sample.fields[name], size, short_side) for name in names}
    return Sample(downscale(sample.clip, short_side), sample.label, {**sample.fields, **scaled})


def downscale(clip: Tensor, short_side: int) -> Tensor:
    """[C, T, H, W] -> [C, T, h, w], antialiased: the shorter side at most `short_side`, never enlarged.

    A side longer than `MAX_ASPECT * short_side` is cut at both ends.
    """
    size, margins = _scaled_size_and_margins(clip.shape[-2:], short_side)
    if size != [*clip.shape[-2:]]:
        clip = interpolate(clip.transpose(0, 1), size, mode="bilinear", antialias=True).transpose(0, 1)
    for dim, margin in zip((-2, -1), margins, strict=True):
        clip = clip.narrow(dim, margin, min(clip.shape[dim], MAX_ASPECT * short_side))
    return clip


def downscale_boxes(boxes: Tensor, size: Sequence[int], short_side: int) -> Tensor:
    """[m, 5], (height, width) of the picture -> the boxes [m, 5] in the picture that `downscale` returns."""
    (height, width), (top, left) = _scaled_size_and_margins(size, short_side)
    ratios = torch.tensor([width / size[1], height / size[0]] * 2 + [1.0])
    return boxes * ratios - torch.tensor([left, top, left, top, 0.0])


def _scaled_size_and_margins(size: Sequence[int], short_side: int) -> tuple[list[int], list[int]]:
    """Height and width after scaling, and the pixels to cut off at the top and at the left."""
    ratio = short_side / min(size)
    scaled = [max(short_side, round(side * ratio)) for side in size] if ratio < 1 else [*size]
    return scaled, [max(0, side - MAX_ASPECT * short_side) // 2 for side in scaled]


FIELD_DOWNSCALERS: Mapping[str, Callable[[Tensor, Sequence[int], int], Tensor]] = {"boxes": downscale_boxes}
"""Fields that hold positions in the picture: (value, size, short_side) -> the value after `downscale`."""


def _pad(clips: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """[C, T, H, W] each -> `RawBatch.pixels` and `RawBatch.sizes`"""
    sizes = torch.tensor([clip.shape[-2:] for clip in clips])
    channels, frames = clips[0].shape[:2]
    height, width = sizes.amax(dim=0).tolist()
    # channels last, as decoders deliver and as the uint8 resampling kernel reads three times faster
    pixels = _zeros((len(clips), frames, height, width, channels)).permute(0, 4, 1, 2, 3)  # [B, C, T, H, W]
    for padded, clip in zip(pixels, clips, strict=True):
        padded[..., : clip.shape[-2], : clip.shape[-1]] = clip
    return pixels, sizes


def _column(name: str, field: Field, samples: Sequence[Sample]) -> Tensor:
    """One field of all samples, stacked; a ragged one padded to the longest."""
    values = [sample.fields.get(name) for sample in samples]
    for value in values:
        if value is None or value.shape[field.ragged :] != field.shape:
            actual = "none" if value is None else f"the shape {[*value.shape]}"
            raise DataError(f"the data set declares {name} as {field}, and a sample of it has {actual}")
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


def killed_worker(error: Exception, workers: Sequence[Any] = ()) -> DataError | None:
    """What to do about a killed worker, which torch reports wherever the main process is; None for other errors.

    Its connection may also break in the middle of a batch.
    """
    is_unnamed = isinstance(error, OSError) and error.errno == errno.ENOSPC and not error.filename
    if is_unnamed or "allocate shared memory" in str(error):
        return DataError(
            "the shared memory (/dev/shm), through which workers deliver batches, is full: num_workers=0 reads in the "
            "main process, a lower batch_size needs less of it, and docker run --shm-size=8g (or --ipc=host) gives more"
        )
    is_reported = str(error).startswith("DataLoader worker")
    if not is_reported and (isinstance(error, RuntimeError) or not any(_has_died(worker) for worker in workers)):
        return None
    report = first_line(error) if is_reported else "A process that reads the data has died."
    return DataError(
        f"{report} It was killed from outside, often for lack of memory: lower num_workers (num_workers=0 reads in the "
        "main process), or give the container more shared memory (--shm-size)"
    )


def _has_died(worker: Any) -> bool:
    try:
        worker.join(timeout=1)
    except RuntimeError:  # torch's handler of SIGCHLD reports the death while this waits for it
        return True
    return bool(worker.exitcode)


def _deliver(batch: Any) -> Any:
    """The batch, in a worker in shared memory; where that is full this raises, while a queue would lose the batch."""
    return batch if get_worker_info() is None else tree_map_only(Tensor, Tensor.share_memory_, batch)


def _ignore_job_signals(worker: int) -> None:
    """Workers ignore signals sent to a whole job (Ctrl-C, a scheduler's warning); the main process handles them."""
    for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """End this worker when its parent asks for it or is gone, also while a server keeps it waiting."""
    parent = multiprocessing.parent_process()
    while parent is not None:
        received = signal.sigtimedwait({signal.SIGTERM}, 1)
        if os.getppid() != parent.pid or (received and received.si_pid == parent.pid):
            os._exit(0)


def name_unreadable(dataset: Dataset, index: int, reason: Callable[[int], str]) -> None:
    """Warn of a sample, unless something else that reads the same data set has: loop, probes, dictionary."""
    name = dataset.describe(index)
    named = vars(dataset).setdefault("named_unreadable", set())
    if name not in named:
        named.add(name)
        log.warning("left out: %s: %s", name, reason(index))


class BrokenSamples:
    """The distinct unreadable samples of a data set; warns of each one once."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.indices: set[int] = set()

    def add(self, broken: Tensor) -> None:
        """long [b] of indices; raises DataError if several are broken, and more than `MAX_BROKEN_RATIO`."""
        new = [index for index in dict.fromkeys(broken.tolist()) if index not in self.indices]
        for index in new:
            self.indices.add(index)
            name_unreadable(self.dataset, index, self._reason)
        if new and len(self.indices) > max(1, MAX_BROKEN_RATIO * len(self.dataset)):
            raise DataError(
                f"{len(self.indices)} of {len(self.dataset)} samples can't be read, more than {MAX_BROKEN_RATIO:.0%}: "
                f"the last was {self.dataset.describe(new[-1])}. Repair or remove them (the log names each one)"
            )

    def _reason(self, index: int) -> str:
        try:
            self.dataset[index]
        except UNREADABLE as error:
            return first_line(error)
        return "could not be read the first time"


def first_line(error: BaseException) -> str:
    """First line of the exception's message, or the name of its class."""
    return (str(error).splitlines() or [type(error).__name__])[0]

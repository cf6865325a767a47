"""Clips of video files, labelled by their folders or by a table."""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from torch import Tensor

from jepa.config.layouts import find_training
from jepa.config.paths import existing
from jepa.data.clips import (
    even_start,
    frame_positions,
    num_start_positions,
    random_start,
    short_videos_warning,
    to_grey,
)
from jepa.data.folders import (
    FileDataset,
    class_names,
    class_numbers,
    read_table,
)
from jepa.data.listing import Files, held_out_listing, list_training
from jepa.data.loader import MAX_BROKEN_RATIO
from jepa.data.video_decode import SUFFIXES, Video, choose_decoders, read_video
from jepa.types import Channels, ClassLevel, Positive, PositiveInt

log = logging.getLogger(__name__)
MAX_CHECKED = 1000
"""Number of videos whose length is checked before the run; short=skip checks all."""
RATE_TOLERANCE = 1.01
"""Largest ratio of `fps` to a file's frame rate, e.g. for 30 and 29.97."""


class VideoFolder(FileDataset):
    """Clips of `num_frames` frames of the videos in `root_path`/`video_folder`: class folders, or all in one folder.

    `video_folder` None takes the training part of `root_path`, or `root_path` itself. Instead of class folders,
    `annotations` may be a CSV or parquet file in `root_path` with the columns path (in `video_folder`) and label.
    Frames are `stride` apart, or sampled at `fps` frames a second. `self[index]` is one of `clips_per_video` clips
    evenly spaced over a video, a single one in its centre; `draw` takes a random start. `short` is the treatment of
    videos shorter than a clip: skip, hold (the last frame) or loop.
    """

    rules = ("jepa.data.rules.folders", "jepa.data.rules.frame_rate")
    requires = ("video", "av|torchcodec")

    def __init__(
        self, *, num_frames: PositiveInt, root_path: str, video_folder: str | None = None,
        val_folder: str | None = None, class_level: ClassLevel | None = None,
        annotations: str | None = None, val_annotations: str | None = None, fps: Positive | None = None,
        stride: PositiveInt = 1, clips_per_video: PositiveInt = 1,
        short: Annotated[str, Literal["skip", "hold", "loop"]] = "hold", channels: Channels = 3,
        decoder: Annotated[str, Literal["auto", "pyav", "torchcodec"]] = "auto",
    ) -> None:  # fmt: skip
        if fps is not None and stride != 1:
            raise ValueError(f"dataset.fps={fps} dataset.stride={stride}: give one of them")
        super().__init__(channels, has_videos=True)
        self.num_frames, self.stride, self.fps = num_frames, stride, fps
        self.clips_per_video, self.short = clips_per_video, short
        self.decoders = choose_decoders(decoder)
        root = Path(root_path).expanduser().absolute()
        held_out = None
        if annotations is None:
            files, self.classes, _ = listing = list_training(
                root, video_folder, SUFFIXES, "dataset.video_folder", class_level
            )
            part = held_out_listing(listing, root, val_folder, SUFFIXES, class_level)
            held_out = None if part is None else part.files
        else:
            if video_folder is None:
                video_folder = find_training(root, SUFFIXES, "dataset.video_folder", has_classes=False)
            folder = existing(root / video_folder, "dataset.video_folder", "folder")
            self.classes, files = _annotated(folder, root / annotations, "dataset.annotations")
            if val_annotations is not None:
                val_path = existing(root / (val_folder or video_folder), "dataset.val_folder", "folder")
                table = root / val_annotations
                _, held_out = _annotated(val_path, table, "dataset.val_annotations", self.classes)
        self._load(files)
        self.held_out = None if held_out is None else self._part(held_out)

    def __len__(self) -> int:
        return len(self.paths) * self.clips_per_video

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """uint8 [C, T, H, W] and its label; raises OSError if it cannot be read."""
        return self._clip(index, even_start(index % self.clips_per_video, self.clips_per_video))

    def draw(self, index: int, seed: int) -> tuple[Tensor, int]:
        """As `self[index]` from a random start."""
        return self._clip(index, random_start(index, seed))

    @property
    def labels(self) -> np.ndarray:
        """long [n], of all clips, -1 where there is none"""
        return np.repeat(self.video_labels, self.clips_per_video)

    def source(self, index: int) -> int:
        """Index of the clip's video."""
        return index // self.clips_per_video

    def describe(self, index: int) -> str:
        video, clip = divmod(index, self.clips_per_video)
        path = self._path(video)
        return path if self.clips_per_video == 1 else f"{path} clip {clip + 1} of {self.clips_per_video}"

    def file(self, index: int) -> str:
        return self._path(self.source(index))

    def _clip(self, index: int, start: float) -> tuple[Tensor, int]:
        number = index // self.clips_per_video
        frames = read_video(self._path(number), self.decoders, partial(self._frames, start=start))
        frames = frames if self.channels == 3 else to_grey(frames)
        return frames.transpose(0, 1), int(self.video_labels[number])

    def _frames(self, video: Video, start: float) -> Tensor:
        rate = _rate(video)
        if self._is_too_slow(rate):
            raise OSError(f"{rate:.4g} frames a second, fewer than dataset.fps={self.fps:g}")
        positions = frame_positions(video.num_frames, self.num_frames, self._step(rate), start, self.short)
        if self.fps is None:
            return video.at([int(position) for position in positions])
        # in the middle of the frame's time, so that rounding does not select a neighbour
        middles = (min(position + 0.5, video.num_frames - 0.5) for position in positions)
        return video.frames_at_seconds([video.begin + middle / rate for middle in middles])

    def _step(self, rate: float) -> float:
        return self.stride if self.fps is None else rate / self.fps

    def _is_too_slow(self, rate: float) -> bool:
        return self.fps is not None and self.fps > rate * RATE_TOLERANCE

    def _path(self, video: int) -> str:
        return os.path.join(self.folder, os.fsdecode(self.paths[video]))

    def _load(self, files: Files) -> None:
        """Store these videos after checking the lengths of all or of some of them."""
        self.folder, self.paths, self.video_labels = files
        total = len(self.paths)
        if self.short == "skip" and total > MAX_CHECKED:
            log.info("short=skip checks the length of all %d videos; short=hold or loop does not", total)
        checked = range(total) if self.short == "skip" else range(0, total, -(-total // MAX_CHECKED))
        starts = {
            index: num_start_positions(frames, self.num_frames, self._step(rate))
            for index, (frames, rate) in self._lengths(checked).items()
        }
        too_short = {index for index, num_starts in starts.items() if num_starts <= 0}
        if not too_short:
            return
        sampling = f"stride {self.stride}" if self.fps is None else f"{self.fps:g} frames a second"
        clip = f"{self.num_frames} frames at {sampling}"
        log.warning("%s: %s", self.folder, short_videos_warning(len(too_short), len(checked), total, clip, self.short))
        if self.short == "skip":
            rows = np.array([index for index in range(total) if index not in too_short], dtype=np.int64)
            self.paths, self.video_labels = self.paths[rows], self.video_labels[rows]
            if not len(rows):
                raise ValueError(f"dataset.short=skip: no video in {self.folder} has {clip}; lower num_frames")

    def _lengths(self, checked: range) -> dict[int, tuple[int, float]]:
        """Number of frames and frame rate of the readable videos; raises ValueError if `fps` is above their rates."""
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            results = dict(zip(checked, pool.map(self._length, checked), strict=True))
        lengths = {index: length for index, length in results.items() if not isinstance(length, str)}
        if not lengths:
            raise ValueError(f"none of {len(results)} videos can be read; the first is {self._path(0)}: {results[0]}")
        slow = {index: rate for index, (_, rate) in lengths.items() if self._is_too_slow(rate)}
        if slow and (next(iter(lengths)) in slow or len(slow) > MAX_BROKEN_RATIO * len(lengths)):
            first, lowest = next(iter(slow)), min(slow.values())
            counts = f"{len(slow)} of {len(lengths)} videos have fewer frames a second, at least {lowest:.4g}"
            raise ValueError(f"dataset.fps={self.fps:g}: {counts}; the first is {self._path(first)}, {slow[first]:.4g}")
        return lengths

    def _length(self, video: int) -> tuple[int, float] | str:
        """Number of frames and frame rate, or the reason why the video cannot be read."""
        try:
            return read_video(self._path(video), self.decoders, lambda v: (v.num_frames, _rate(v)))
        except OSError as error:
            return str(error)


def _rate(video: Video) -> float:
    """Mean number of frames a second."""
    return video.num_frames / (video.end - video.begin)


def _annotated(
    folder: Path, table: Path, key: str, classes: tuple[str, ...] | None = None
) -> tuple[tuple[str, ...], Files]:
    """Classes and files of a table with the columns path (in `folder`) and label."""
    columns = read_table(table, key, ("path", "label"))
    texts = ["" if value is None else str(value) for value in columns["label"]]
    classes = class_names(texts) if classes is None else classes
    labels = class_numbers(texts, classes, key)
    paths = np.array([os.fsencode(path) for path in columns["path"]], dtype=bytes)
    if not any((folder / os.fsdecode(path)).is_file() for path in paths[:MAX_CHECKED]):
        raise ValueError(f"{key}={table}: its files, such as {columns['path'][:1]}, are not in {folder}")
    return classes, Files(folder, paths, labels)

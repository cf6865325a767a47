"""Clips from folders of numbered images, with quantities of each frame from a table."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from jepa.config.layouts import find_training
from jepa.config.paths import content, existing
from jepa.data.clips import num_start_positions, random_start, short_videos_warning
from jepa.data.decode import SUFFIXES
from jepa.data.folders import FileDataset, read_table
from jepa.data.listing import Walk, account, printable
from jepa.types import Bands, Field, NonNegativeInt, Positive, PositiveInt, Sample, ShareBelowOne

log = logging.getLogger(__name__)


class FrameFolders(FileDataset):
    """Clips of `num_frames` frames, `stride` apart, from the folders of numbered images in `root_path`/`image_folder`.

    A clip begins every `hop` frames (None: where the previous one ends); `draw` begins up to `hop` frames later. The
    folders are VIDEO or, with labels, CLASS/VIDEO. The held-out part consists of the folders `val_folders`, by default
    of the last share `val_ratio` of all folders. `annotations` is a table in `root_path` whose column `file_column`
    has the path of each frame in `image_folder`; "steering/angle" in `columns` is its column angle, a quantity of the
    probe steering. The quantities are those of the frame `lag` frames before the middle of the clip, to compensate for
    a delay of the images.
    """

    rules = ("jepa.data.rules.folders",)

    def __init__(
        self, *, num_frames: PositiveInt, root_path: str, image_folder: str | None = None, stride: PositiveInt = 1,
        hop: PositiveInt | None = None, val_folders: Sequence[str] | None = None, val_ratio: ShareBelowOne = 0.2,
        annotations: str | None = None, file_column: str = "file", columns: Sequence[str] = (),
        lag: NonNegativeInt = 0, channels: Bands | None = 3, max_value: Positive | None = None,
    ) -> None:  # fmt: skip
        super().__init__(channels, max_value=max_value)
        self.num_frames, self.stride, self.lag = num_frames, stride, lag
        self.hop = hop or (num_frames - 1) * stride + 1
        root = Path(root_path).expanduser().absolute()
        if image_folder is None:
            image_folder = find_training(root, SUFFIXES, "dataset.image_folder", has_classes=False)
        self.folder = existing(root / image_folder, "dataset.image_folder", "folder")
        frames = _frames_by_folder(self.folder)
        self.class_folders = sorted({os.path.dirname(name) for name in frames} - {""})
        self.classes = tuple(map(printable, self.class_folders))
        held_out = _held_out(list(frames), val_folders, val_ratio)
        self._load({name: names for name, names in frames.items() if name not in held_out})
        self.find_channels()
        quantities = Field(shape=(len(columns),), names=tuple(columns))
        self.fields = {"quantities": quantities} if annotations and columns else {}
        self.table = _read_table(root / annotations, file_column, columns) if annotations else {}
        if self.table and not any(self._name(folder, 0) in self.table for folder in range(len(self.folders))):
            raise ValueError(
                f"dataset.annotations={annotations}: its column {file_column} has paths such as "
                f"{next(iter(self.table))}, none is a folder's first frame, such as {self._name(0, 0)}"
            )
        self.held_out = self._part({name: frames[name] for name in held_out}) if held_out else None
        self.warn_of_dark_images()

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> Sample:
        """A clip [C, T, H, W] with its quantities; raises OSError or RuntimeError if a frame cannot be read."""
        return self._clip(*self.clips[index].tolist())

    def draw(self, index: int, seed: int) -> Sample:
        folder, first = self.clips[index].tolist()
        length = int(self.starts[folder + 1] - self.starts[folder])
        num_starts = num_start_positions(length, self.num_frames, self.stride) - first
        return self._clip(folder, first + int(random_start(index, seed) * min(self.hop, num_starts)))

    def describe(self, index: int) -> str:
        folder, first = self.clips[index].tolist()
        return f"{self.folder / self.folders[folder]} from frame {first} on"

    def file(self, index: int) -> str:
        """Path of the first frame."""
        return str(self.folder / self._name(*self.clips[index].tolist()))

    def outline(self, index: int) -> list[int]:
        """Size of each frame's file."""
        return [size for size, _ in self.modified(index)]

    def modified(self, index: int) -> list[tuple[int, int]]:
        """Size and time of each frame's file."""
        folder, first = self.clips[index].tolist()
        names = (self._name(folder, first + number * self.stride) for number in range(self.num_frames))
        stats = [os.stat(self.folder / name) for name in names]
        return [(stat.st_size, stat.st_mtime_ns) for stat in stats]

    def _quantities(self, folder: int, first: int) -> Tensor:
        """float32 [Q] of the frame `lag` frames before the middle, at least the folder's first; nan without a row."""
        frame = max(0, first + (self.num_frames - 1) * self.stride // 2 - self.lag)
        name = self._name(folder, frame)
        missing = np.full(self.fields["quantities"].shape, np.nan, dtype=np.float32)
        return torch.tensor(self.table.get(name, missing))

    def _clip(self, folder: int, first: int) -> Sample:
        frames = []
        for number in range(self.num_frames):
            path = self.folder / self._name(folder, first + number * self.stride)
            try:
                frames.append(self.decode(path.read_bytes()))
            except (OSError, RuntimeError) as error:
                raise OSError(f"{path.name}: {error}") from error
            if frames[-1].shape != frames[0].shape:
                raise OSError(f"{path} is of another size than the frames before it")
        name = os.path.dirname(self.folders[folder])
        label = self.class_folders.index(name) if name else -1
        return Sample(torch.cat(frames, dim=1), label, {key: self._quantities(folder, first) for key in self.fields})

    def _name(self, folder: int, frame: int) -> str:
        return f"{self.folders[folder]}/{os.fsdecode(bytes(self.names[self.starts[folder] + frame]))}"

    def _load(self, folders: Mapping[str, list[str]]) -> None:
        """Index all clips of these folders; warns of missing numbers and of folders that are too short."""
        names = [_numbered(self.folder / folder, images) for folder, images in folders.items()]
        num_starts = [num_start_positions(len(frames), self.num_frames, self.stride) for frames in names]
        clips = [(number, first) for number, count in enumerate(num_starts) for first in range(0, count, self.hop)]
        clip = f"{self.num_frames} frames at stride {self.stride}"
        if short := sum(count <= 0 for count in num_starts):
            log.warning("%s: %s", self.folder, short_videos_warning(short, len(folders), len(folders), clip, "skip"))
        if not clips:
            raise ValueError(f"no clip of {clip} in {self.folder}; lower num_frames or stride")
        self.folders = tuple(folders)
        self.names = np.array([os.fsencode(name) for frames in names for name in frames], dtype=bytes)
        self.starts = np.cumsum([0, *map(len, names)])  # [folders + 1], offset of each folder's first frame
        self.clips = np.array(clips)  # [n, 2], folder and first frame in it


def _read_table(path: Path, file_column: str, columns: Sequence[str]) -> dict[str, np.ndarray]:
    """Quantities float32 [Q] by path of the frame."""
    names = [column.rpartition("/")[2] for column in columns]
    table = read_table(path, "dataset.annotations", (file_column, *names))
    try:
        values = np.array([table[name] for name in names], dtype=np.float32).T
    except ValueError as error:
        raise ValueError(f"{path}: {', '.join(names)} must be numbers: {error}") from error
    return dict(zip(table[file_column], values, strict=True)) if names else {}


def _frames_by_folder(root: Path) -> dict[str, list[str]]:
    """The images of each folder VIDEO or CLASS/VIDEO; logs what is left out."""
    walk, images = Walk(root, SUFFIXES), {}
    for path in walk.files():
        folder, _, name = path.rpartition("/")
        images.setdefault(folder, []).append(name)
    videos = [folder for folder in images if folder and "/" not in folder]
    labelled = [folder for folder in images if folder.count("/") == 1 and os.path.dirname(folder) not in videos]
    if bool(videos) == bool(labelled):
        layout = "both VIDEO/IMAGE.jpg and CLASS/VIDEO/IMAGE.jpg" if videos else "no folder of images"
        raise ValueError(f"dataset.image_folder: {root} holds {layout}; {content(root)}")
    frames = {folder: images[folder] for folder in sorted(videos or labelled, key=lambda folder: folder.split("/"))}
    num_frames = sum(map(len, frames.values()))
    left_out = walk.left_out()
    left_out["images in no folder of a video"] += sum(map(len, images.values())) - num_frames
    log.info("%s", account(f"{root}: {num_frames:,} frames in {len(frames):,} folders", left_out))
    return frames


def _numbered(folder: Path, names: list[str]) -> list[str]:
    """Names in the order of their last number; warns of gaps and duplicates."""
    if unnumbered := [name for name in names if not re.search(r"\d", name)]:
        raise ValueError(f"dataset.image_folder: {folder} holds {unnumbered[0]}, a frame without a number")
    numbers = {name: int(re.findall(r"\d+", name)[-1]) for name in names}
    names = sorted(names, key=lambda name: (numbers[name], name))
    span = numbers[names[-1]] - numbers[names[0]] + 1
    if span != len(names):
        problem = f"{span - len(names)} numbers are missing" if span > len(names) else "some numbers occur twice"
        log.warning("%s: %d frames from %s to %s, %s", folder, len(names), names[0], names[-1], problem)
    return names


def _held_out(folders: Sequence[str], val_folders: Sequence[str] | None, ratio: float) -> list[str]:
    if val_folders is None:
        count = max(1, round(ratio * len(folders))) if ratio and len(folders) > 1 else 0
        return list(folders[len(folders) - count :])
    if unknown := sorted(set(val_folders) - set(folders)):
        raise ValueError(f"dataset.val_folders: no folders {unknown}; there are {', '.join(folders[:8])}")
    return list(val_folders)

"""All images or videos below a folder, read for an encoder as those of its training were."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jepa.config.paths import existing
from jepa.data import images, video_decode
from jepa.data.folders import FileDataset
from jepa.data.images import ImageFolder
from jepa.data.listing import list_all, printable
from jepa.data.video_decode import choose_decoders
from jepa.data.videos import VideoFolder
from jepa.types import Dataset


class AllImages(ImageFolder):
    """Every image at any depth below a folder, or a single one, without classes, in the order of the paths."""

    def __init__(self, *, path: Path, channels: int, max_value: float | None = None) -> None:
        FileDataset.__init__(self, channels, max_value=max_value)
        self.classes = ()
        self._load(*list_all(path, images.SUFFIXES, "images"))


class AllVideos(VideoFolder):
    """The central clip of every video at any depth below a folder, or of a single one, without classes."""

    def __init__(
        self, *, path: Path, channels: int, num_frames: int, stride: int = 1, fps: float | None = None,
        short: str = "hold",
    ) -> None:  # fmt: skip
        FileDataset.__init__(self, channels, has_videos=True)
        self.classes, self.clips_per_video = (), 1
        self.num_frames, self.stride, self.fps = num_frames, stride, fps
        self.short = "hold" if short == "skip" else short
        self.decoders = choose_decoders("auto")
        self._load(list_all(path, video_decode.SUFFIXES, "videos"))


def all_files(
    given: str, *, is_video: bool, clip_shape: Sequence[int], settings: Mapping[str, Any], num_frames: int | None = None
) -> AllImages | AllVideos:
    """The files for an encoder of clips (C, T, H, W); `settings` are those of `jepa.config.heads.file_settings`."""
    path = existing(Path(given).expanduser().absolute(), given)
    if is_video:
        values = {key: settings[key] for key in ("stride", "fps", "short") if key in settings}
        return AllVideos(path=path, channels=clip_shape[0], num_frames=num_frames or clip_shape[1], **values)
    return AllImages(path=path, channels=clip_shape[0], max_value=settings.get("max_value"))


def is_video_file(path: str) -> bool:
    return path.lower().endswith(video_decode.SUFFIXES)


def names_of(dataset: Dataset) -> tuple[str, list[str]]:
    """The folder of all samples, "" if they are no files, and the name of each, relative to that folder."""
    names = [dataset.describe(index) for index in range(len(dataset))]
    if isinstance(dataset, AllImages | AllVideos):
        folder = str(dataset.folder)
    elif all(map(os.path.isabs, names)):
        folder = os.path.commonpath([os.path.dirname(name) for name in names])
    else:
        return "", [printable(name) for name in names]
    return folder, [printable(os.path.relpath(name, folder)) for name in names]

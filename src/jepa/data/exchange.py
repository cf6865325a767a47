"""Import and export of recorded episodes: LeRobot and Minari datasets, folders of frames with a CSV of actions."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from jepa.config.paths import content
from jepa.data import frame_logs, lerobot, minari
from jepa.data.episode_store import Episode, EpisodeStore, append, writing
from jepa.data.listing import account
from jepa.data.recordings import Recording
from jepa.errors import FileError
from jepa.parallel.bars import bar
from jepa.suggestions import suggestion

log = logging.getLogger(__name__)
READERS: dict[str, Callable[[Path, str], Recording]] = {
    "lerobot": lerobot.read, "minari": minari.read, "frames": frame_logs.read,
}  # fmt: skip
"""Kind -> (path, key of the camera or of the columns) -> recording."""
WRITERS: dict[str, Callable[[EpisodeStore, Path], None]] = {
    "lerobot": lerobot.write, "minari": minari.write, "frames": frame_logs.write,
}  # fmt: skip
GROUP_BYTES = 1 << 28
"""Bytes of frames from which on a group is complete."""


def read_source(source: str, folder: Path) -> None:
    """Store the episodes of `source`, KIND:PATH or KIND:PATH@KEY; the same call again goes on where it was.

    KEY names the camera of a data set with several, or of a CSV the columns of actions, as in angle+throttle. Raises
    FileError for files that cannot be used, RunError if the folder holds something else.
    """
    kind, path, key = parse(source, "source")
    if not path.exists():
        raise FileError(f"source={source}: there is no {path}; {content(path.parent)}")
    recording = READERS[kind](path, key)
    num_episodes, num_frames = len(recording.lengths), sum(recording.lengths) + len(recording.lengths)
    summary = account(f"{path}: {num_frames:,} frames in {num_episodes:,} episodes", recording.left_out)
    if not num_episodes:
        raise FileError(f"{summary}; nothing is there to store")
    log.info("%s", summary)
    with writing(folder, recording.facts):
        done = EpisodeStore(folder).lengths
        if len(done) > num_episodes or list(done) != list(recording.lengths[: len(done)]):
            raise FileError(f"{folder} holds other episodes than {path} has now; give another folder")
        with bar(total=num_episodes, initial=len(done), desc="episodes", unit="episode") as shown:
            for numbers in groups(recording, len(done)):
                append(folder, [checked(recording, number, path) for number in numbers])
                shown.update(len(numbers))


def write_export(export: str, folder: Path) -> None:
    """Write the episodes of a store to `export`, KIND:PATH, where nothing is yet; all of it or nothing.

    Raises FileError.
    """
    kind, path, key = parse(export, "export")
    if key:
        raise FileError(f"export={export}: a path without @ is needed, which separates a camera in a source")
    store = EpisodeStore(folder)
    if not len(store):
        raise FileError(f"{folder} holds no episodes to export")
    if path.exists():
        raise FileError(f"export={export}: {path} exists already; give another path")
    temporary = path.parent / f".export-{os.getpid()}"
    (temporary / path.name).mkdir(parents=True)
    try:
        WRITERS[kind](store, temporary / path.name)
        (temporary / path.name).rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def parse(text: str, name: str) -> tuple[str, Path, str]:
    """Kind, path and the key behind the last @, if no such path exists."""
    kind, colon, path = text.partition(":")
    if kind not in READERS or not colon or not path:
        kinds = ", ".join(f"{kind}:PATH" for kind in READERS)
        raise FileError(f"{name}={text}: unknown kind {kind!r}; expected {kinds}{suggestion(kind, READERS)}")
    key = ""
    if "@" in path and not Path(path).expanduser().exists():
        path, _, key = path.rpartition("@")
    return kind, Path(path).expanduser().absolute(), key


def groups(recording: Recording, first: int) -> Iterator[range]:
    """Numbers of the episodes from `first` on, in groups of bounded size."""
    frame_bytes = int(np.prod(recording.facts.frame_shape))
    size = 0
    for number in range(first, len(recording.lengths)):
        size += (recording.lengths[number] + 1) * frame_bytes
        if size >= GROUP_BYTES or number == len(recording.lengths) - 1:
            yield range(first, number + 1)
            first, size = number + 1, 0


def checked(recording: Recording, number: int, path: Path) -> Episode:
    """Raises FileError if the frames of an episode differ in size from those of the first, or are too few."""
    episode, length = recording.read(number), recording.lengths[number]
    expected = (length + 1, *recording.facts.frame_shape)
    if episode.frames.shape != expected:
        both = f"frames of {episode.frames.shape}, expected {expected}"
        raise FileError(f"{path}: episode {number} has {both} (number, channels, height, width), as the first one")
    return episode

"""Logs of driving and the like: folders or a tar of frames, and a CSV with a row for each frame and its action.

Columns: file (path of the frame beside the CSV, or in the folder frames there), episode and t (number of the frame),
then the actions, by default all columns that are nothing else: timestamp... is not read; reward, terminated and
truncated are the results of the action, state/NAME what is known of the frame. Row k holds frame k and action k, which
leads to frame k + 1, so the action of an episode's last row has no outcome and is left out; it may be empty. A column
with the name action holds whole numbers, discrete actions. The bounds of others are the smallest and largest values.
"""

from __future__ import annotations

import csv
import io
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jepa.data.decode import decode
from jepa.data.episode_store import Episode, EpisodeStore, StoreFacts
from jepa.data.folders import parse_csv
from jepa.data.recordings import ONE_FRAME, Recording, bounded, check_actions_are_finite
from jepa.errors import FileError
from jepa.types import ActionSpace

RESULTS = ("reward", "terminated", "truncated")
STATE = "state/"
GREY = {"1", "L", "I", "I;16", "F"}
"""Modes of Pillow for images of one channel."""


def read(path: Path, key: str) -> Recording:
    """`key` names the columns of actions, as in angle+throttle. Raises FileError."""
    log = Log(path, key)
    source = f"frames:{path}@{'+'.join(log.actions)}"
    facts = StoreFacts(
        frame_shape=log.frame(log.rows[0][0]).shape if log.rows else (3, 1, 1), actions=log.space(),
        state_names=tuple(name.removeprefix(STATE) for name in log.states), source=source,
    )  # fmt: skip
    return Recording(facts, [len(rows) - 1 for rows in log.rows], log.episode, log.left_out)


class Log:
    """The rows of a CSV by episode, and the files beside it."""

    def __init__(self, path: Path, key: str) -> None:
        self.files = TarFiles(path) if path.is_file() else FolderFiles(path)
        tables = [name for name in self.files.names if name.endswith(".csv") and name.count("/") <= 1]
        if len(tables) != 1:
            raise FileError(f"{path} holds {', '.join(tables) or 'no CSV'}; expected one CSV with a row for each frame")
        self.where, self.folder = f"{path}: {tables[0]}", os.path.dirname(tables[0])
        try:
            table = parse_csv(self.files.read(tables[0]), self.where)
        except ValueError as error:
            raise FileError(str(error)) from error
        if "file" not in table:
            raise FileError(f"{self.where} has no column file with the frames; it has {', '.join(table)}")
        self.names, named = table["file"], dict.fromkeys(key.split("+")) if key else {}
        if unknown := [name for name in named if name not in table]:
            raise FileError(f"{self.where} has no column {', '.join(unknown)}; it has {', '.join(table)}")
        known = {"file", "episode", "t", *RESULTS}
        rest = [name for name in table if name not in known and not name.startswith((STATE, "timestamp"))]
        self.actions, self.states = list(named) or rest, [name for name in table if name.startswith(STATE)]
        if not self.actions:
            raise FileError(f"{self.where} has no columns of actions beside {', '.join(table)}")
        numbers = [name for name in (*self.actions, *self.states, *RESULTS, "t") if name in table]
        self.values = {name: self._numbers(name, table[name]) for name in numbers}
        every = list(self._episodes(table.get("episode") or [os.path.dirname(name) for name in self.names]))
        self.rows = [rows for rows in every if len(rows) > 1]
        self.left_out = Counter({ONE_FRAME: len(every) - len(self.rows)})
        for rows in self.rows:
            check_actions_are_finite(
                self._matrix(self.actions, rows[:-1]), f"{self.where}, line {rows[0] + 2} and after"
            )

    def _numbers(self, name: str, texts: Sequence[str]) -> np.ndarray:
        """[n]; nan where there is nothing"""
        values = np.empty(len(texts))
        for row, text in enumerate(texts):
            try:
                values[row] = float(text) if text else np.nan
            except ValueError as error:
                other = "name the columns of actions as in PATH@angle+throttle"
                raise FileError(f"{self.where}, line {row + 2}: {name} is {text!r}, no number; {other}") from error
        return values

    def _episodes(self, labels: Sequence[str]) -> Iterator[np.ndarray]:
        """Row numbers of each episode, in the order of the file; t counts them without a gap."""
        episodes: dict[str, list[int]] = {}
        for row, label in enumerate(labels):
            episodes.setdefault(label, []).append(row)
        for label, rows in episodes.items():
            if "t" in self.values and len(gaps := np.flatnonzero(np.diff(self.values["t"][rows]) != 1)):
                line = rows[int(gaps[0]) + 1] + 2
                raise FileError(
                    f"{self.where}, line {line}: t of episode {label} does not follow; give the rest another number"
                )
            yield np.array(rows)

    def _matrix(self, names: Sequence[str], rows: np.ndarray) -> np.ndarray:
        """[n, columns]"""
        return np.stack([self.values[name][rows] for name in names], axis=1) if names else np.zeros((len(rows), 0))

    def space(self) -> ActionSpace:
        if not self.rows:
            return ActionSpace()
        actions = self._matrix(self.actions, np.concatenate([rows[:-1] for rows in self.rows]))
        if self.actions != ["action"]:
            return bounded(actions.astype(np.float32))
        if (actions < 0).any() or (actions != np.round(actions)).any():
            raise FileError(f"{self.where}: the column action holds {actions.min():g}, no whole number from 0 on")
        return ActionSpace(num_actions=int(actions.max()) + 1)

    def episode(self, number: int) -> Episode:
        rows = self.rows[number]
        frames = [self.frame(row) for row in rows]
        if differing := next((n for n, frame in enumerate(frames) if frame.shape != frames[0].shape), 0):
            name, (_, height, width) = self.names[rows[differing]], frames[differing].shape
            raise FileError(f"{self.where}: {name} is {width} x {height}, another size than {self.names[rows[0]]}")
        taken, states = self._matrix(self.actions, rows[:-1]), self._matrix(self.states, rows)
        actions = taken[:, 0].astype(np.int64) if self.actions == ["action"] else taken.astype(np.float32)
        results = [self.values.get(name, np.zeros(len(self.names)))[rows[:-1]] for name in RESULTS]
        rewards, terminated, truncated = results
        return Episode(
            np.stack(frames), states.astype(np.float32), actions, rewards.astype(np.float32), terminated > 0,
            truncated > 0,
        )  # fmt: skip

    def frame(self, row: int) -> np.ndarray:
        """uint8 [C, H, W]; grey images have one channel"""
        name = self.names[row]
        places = [os.path.normpath(f"{self.folder}/{part}/{name}").strip("/") for part in ("frames", "")]
        if not (present := [place for place in places if place in self.files.names]):
            raise FileError(f"{self.where}, line {row + 2}: there is no {name}, beside it or in frames")
        try:
            data = self.files.read(present[0])
            with Image.open(io.BytesIO(data)) as image:
                channels = 1 if image.mode in GREY else 3
            return decode(data, channels=channels).numpy()[:, 0]
        except (OSError, RuntimeError, ValueError, SyntaxError) as error:
            raise FileError(f"{self.where}: {name} cannot be read ({error})") from error


class FolderFiles:
    """Visible files below a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
        self.names = {str(path) for path in files if not any(part.startswith(".") for part in path.parts)}

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()


class TarFiles:
    """Files in a tar without compression."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with tarfile.open(path, "r:") as tar:
                members = [member for member in tar.getmembers() if member.isreg()]
        except (tarfile.TarError, OSError, ValueError) as error:
            raise FileError(f"{path} is no folder and no uncompressed tar ({error})") from error
        self.names = {member.name.removeprefix("./"): (member.offset_data, member.size) for member in members}

    def read(self, name: str) -> bytes:
        offset, size = self.names[name]
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(min(size, os.fstat(file.fileno()).st_size))


def write(store: EpisodeStore, folder: Path) -> None:
    """Frames as PNG files, which are exact, and steps.csv; the last row of an episode has no action."""
    space = store.facts.actions
    actions = ["action"] if space.is_discrete else [f"action_{number}" for number in range(len(space.low))]
    states = [f"{STATE}{name}" for name in store.facts.state_names]
    with (folder / "steps.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["episode", "t", "file", *actions, *RESULTS, *states])
        for number in range(len(store)):
            name = f"ep{number:03d}"
            (folder / "frames" / name).mkdir(parents=True)
            table.writerows(_rows(store.episode(number), number, name, folder / "frames", len(actions)))


def _rows(episode: Episode, number: int, name: str, folder: Path, num_actions: int) -> Iterator[list[Any]]:
    """Saves the frames and gives the rows of an episode."""
    length = len(episode.actions)
    for t, (frame, state) in enumerate(zip(episode.frames, episode.states, strict=True)):
        file = f"{name}/{t:05d}.png"
        Image.fromarray(frame[0] if len(frame) == 1 else np.ascontiguousarray(frame.transpose(1, 2, 0))).save(
            folder / file
        )
        taken: list[Any] = [""] * (num_actions + len(RESULTS))
        if t < length:
            ends = [int(episode.terminated[t]), int(episode.truncated[t])]
            taken = [*np.atleast_1d(episode.actions[t]).tolist(), float(episode.rewards[t]), *ends]
        yield [number, t, file, *taken, *state.tolist()]

"""Windows of stored episodes: clips with the actions between their frames, rewards, ends and states."""

from __future__ import annotations

import copy
import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from jepa.data.collect import collect
from jepa.data.episode_store import TRANSITIONS, Episode, EpisodeStore
from jepa.data.listing import account
from jepa.types import Field, NonNegativeInt, PositiveInt, Sample, ShareBelowOne

log = logging.getLogger(__name__)
NUM_STATISTICS = 256
"""Number of frames whose pixels give mean and standard deviation."""
GOLDEN = 0.6180339887
"""Its multiples modulo 1 spread evenly, whichever are taken: times within an episode, as a share of it."""
MIN_STD = 0.05
"""Least standard deviation of pixel values in [0, 1]; nearly constant frames are not blown up to noise."""


class Episodes:
    """Windows of `num_frames` frames, `frame_skip` transitions apart, within one episode of the store in `path`.

    A window begins every `hop` frames. The last share `val_ratio` of the episodes is held out. With `env` and `policy`
    the store is first filled up to `episodes` episodes of at most `steps` steps; `episodes` also limits what is read.
    The fields are actions [T - 1, A] (with a frame skip of k [T - 1, k, A]), rewards and ends of the transitions (sums
    and ends of a skip), the states [T, S] and, for regression probes, the state of the last frame as quantities. A
    window of one frame has no transitions, and a store without states has no states and quantities.
    With `pad` windows begin wherever a transition follows and may reach beyond the end of their episode: the last frame
    is repeated, and the field `valid` [T - 1] is 1 for transitions that took place. So the end of an episode is seen at
    every position of a window. A run may go on when the store has grown.
    """

    classes = ()
    fields = {"actions": ..., "rewards": ..., "terminated": ..., "valid": ..., "states": ..., "quantities": ...}
    rules = ("jepa.data.rules.episodes",)
    grows = True

    def __init__(
        self, *, num_frames: PositiveInt, path: str, frame_skip: PositiveInt = 1, hop: PositiveInt = 1,
        val_ratio: ShareBelowOne = 0.1, episodes: PositiveInt | None = None, steps: PositiveInt = 40,
        env: Any = None, policy: Any = None, seed: NonNegativeInt = 0, pad: bool = False,
    ) -> None:  # fmt: skip
        self.num_frames, self.frame_skip, self.hop, self.pad = num_frames, frame_skip, hop, pad
        folder = Path(path).expanduser().absolute()
        if env is not None:
            if policy is None or episodes is None:
                raise ValueError("dataset.env: collecting needs dataset.policy and dataset.episodes, their number")
            collect(folder, env=env, policy=policy, num_episodes=episodes, num_steps=steps, seed=seed)
        self.store = EpisodeStore(folder)
        if not len(self.store):
            raise ValueError(f"dataset.path: {folder} holds no episodes yet")
        count = min(episodes or len(self.store), len(self.store))
        num_held_out = max(1, round(val_ratio * count)) if val_ratio and count > 1 else 0
        held_out = range(count - num_held_out, count)
        self.held_out_numbers = held_out if self._counts(held_out).any() else range(0)
        self._load(range(count - num_held_out))
        self.fields = self._fields()
        self.channels = self.store.facts.frame_shape[0]
        self.mean, self.std = self._statistics()
        facts = self.store.facts
        self.world = {"frame_shape": facts.frame_shape, "frame_skip": facts.frame_skip, "env": dict(facts.env)}
        short = sum(int((self._counts(part) == 0).sum()) for part in (self.numbers, held_out))
        summary = f"{folder}: {len(self):,} windows of {num_frames} frames in {len(self.numbers):,} episodes"
        summary += f"; held out: {len(self.held_out_numbers):,} episodes"
        log.info("%s", account(summary, Counter({"episodes that are too short": short})))

    def _counts(self, numbers: range) -> np.ndarray:
        """Number of windows of each of these episodes."""
        return np.maximum(0, (self.store.lengths[numbers.start : numbers.stop] - self._span()) // self.hop + 1)

    def _span(self) -> int:
        """Transitions that must follow the first frame of a window."""
        return min(1, self.num_frames - 1) * self.frame_skip if self.pad else (self.num_frames - 1) * self.frame_skip

    def _load(self, numbers: range) -> None:
        """Index the windows of these episodes."""
        self.numbers = numbers
        self.windows = np.cumsum([0, *self._counts(numbers)])
        if not self.windows[-1]:
            span = self._span()
            longest = max(self.store.lengths[numbers.start : numbers.stop], default=-1) + 1
            raise ValueError(
                f"dataset.path: no episode of {self.store.folder} has the {span + 1} frames of a window "
                f"({self.num_frames} frames at frame_skip={self.frame_skip}); the longest has {longest}. "
                "Lower num_frames"
            )

    def _fields(self) -> dict[str, Field]:
        facts, steps = self.store.facts, self.num_frames - 1
        block = () if self.frame_skip == 1 else (self.frame_skip,)
        dtype = "int64" if facts.actions.is_discrete else "float32"
        fields = {
            "actions": Field(shape=(steps, *block, *facts.actions.shape), dtype=dtype, space=facts.actions),
            "rewards": Field(shape=(steps,)),
            "terminated": Field(shape=(steps,)),
        }
        fields = fields | ({"valid": Field(shape=(steps,))} if self.pad else {}) if steps else {}
        if names := facts.state_names:
            fields |= {"states": Field(shape=(self.num_frames, len(names)), names=names)}
            fields |= {"quantities": Field(shape=(len(names),), names=names)}
        return fields

    def _statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel, of frames of the training episodes."""
        picks = np.linspace(0, len(self.numbers) - 1, NUM_STATISTICS).astype(int)
        moments = []
        for k, n in enumerate(picks.tolist()):
            number = self.numbers[n]
            frame = int(k * GOLDEN % 1 * (self.store.lengths[number] + 1))
            pixels = self.store.read(number, frame, 1, ("frames",))["frames"][0].reshape(self.channels, -1) / 255.0
            moments.append([pixels.mean(axis=1), np.square(pixels).mean(axis=1)])
        mean, square = np.mean(moments, axis=0)  # [C] each
        std = np.sqrt(np.maximum(square - mean**2, MIN_STD**2))
        return tuple(mean.tolist()), tuple(std.tolist())

    def __len__(self) -> int:
        return int(self.windows[-1])

    def __getitem__(self, index: int) -> Sample:
        episode, first, steps = self._window(index)
        skip, missing = self.frame_skip, self.num_frames - 1 - steps
        arrays = self.store.read(episode, first, steps * skip + 1)
        frames = padded(arrays["frames"][::skip], missing)
        clip = torch.from_numpy(frames.transpose(1, 0, 2, 3).copy())  # [C, T, H, W]
        blocks = {name: arrays[name].reshape(steps, skip, *arrays[name].shape[1:]) for name in TRANSITIONS}
        rewards, ends = blocks["rewards"], blocks["terminated"]
        values = {
            "actions": padded(arrays["actions"] if skip == 1 else blocks["actions"], missing),
            "rewards": np.pad(rewards.sum(axis=1), (0, missing)),
            "terminated": np.pad(ends.any(axis=1).astype(np.float32), (0, missing)),
            "valid": np.pad(np.ones(steps, dtype=np.float32), (0, missing)),
            "states": padded(arrays["states"][::skip], missing),
            "quantities": arrays["states"][-1],
        }
        return Sample(clip, fields={name: torch.from_numpy(np.array(values[name])) for name in self.fields})

    def _window(self, index: int) -> tuple[int, int, int]:
        """Episode and first frame of a window, and the number of its transitions, all but those beyond the end."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} windows")
        position = int(np.searchsorted(self.windows, index, side="right")) - 1
        number, first = self.numbers[position], (index - int(self.windows[position])) * self.hop
        return number, first, min(self.num_frames - 1, (int(self.store.lengths[number]) - first) // self.frame_skip)

    def describe(self, index: int) -> str:
        episode, first, _ = self._window(index)
        return f"episode {episode} of {self.store.folder} from frame {first} on"

    def source(self, index: int) -> int:
        """The number of the episode."""
        return self._window(index)[0]

    def encoded(self, index: int) -> bytes:
        """The frames of the window and all that is known of its transitions."""
        episode, first, steps = self._window(index)
        arrays = self.store.read(episode, first, steps * self.frame_skip + 1)
        return b"".join(arrays[name].tobytes() for name in Episode._fields)

    def modified(self, index: int) -> tuple[int, int]:
        """Size and time of the file of frames."""
        group = self.store.groups[self.store.group_of(self._window(index)[0])]
        stat = os.stat(group.folder / "frames.npy")
        return stat.st_size, stat.st_mtime_ns

    def validation(self) -> Self | None:
        """The windows of the held-out episodes."""
        if not self.held_out_numbers:
            return None
        part = copy.copy(self)
        part._load(self.held_out_numbers)
        part.held_out_numbers = range(0)
        return part


def padded(rows: np.ndarray, missing: int) -> np.ndarray:
    """[n, ...] -> [n + missing, ...]: the last row is repeated"""
    return np.concatenate([rows, np.repeat(rows[-1:], missing, axis=0)]) if missing else rows

"""Windows of stored episodes: clips with the actions between their frames, rewards, ends and states."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from jepa.data.collect import collect
from jepa.data.episode_store import EpisodeStore
from jepa.types import Field, NonNegativeInt, PositiveInt, Sample, ShareBelowOne

log = logging.getLogger(__name__)
NUM_STATISTICS = 256
"""Number of frames whose pixels give mean and standard deviation."""
MIN_STD = 0.05
"""Least standard deviation of pixel values in [0, 1]; nearly constant frames are not blown up to noise."""


class Episodes:
    """Windows of `num_frames` frames, `frame_skip` transitions apart, within one episode of the store in `path`.

    A window begins every `hop` frames. The last share `val_ratio` of the episodes is held out. With `env` and `policy`
    the store is first filled up to `episodes` episodes of at most `steps` steps; else `episodes` limits what is read.
    The fields are actions [T - 1, A] (with a frame skip of k [T - 1, k, A]), rewards and ends of the transitions (sums
    and ends of a skip), the states [T, S] and, for regression probes, the state of the last frame as quantities.
    """

    classes = ()
    fields = {"actions": ..., "rewards": ..., "terminated": ..., "states": ..., "quantities": ...}
    rules = ("jepa.data.rules.episodes",)

    def __init__(
        self, *, num_frames: PositiveInt, path: str, frame_skip: PositiveInt = 1, hop: PositiveInt = 1,
        val_ratio: ShareBelowOne = 0.1, episodes: PositiveInt | None = None, steps: PositiveInt = 40,
        env: Any = None, policy: Any = None, seed: NonNegativeInt = 0,
    ) -> None:  # fmt: skip
        self.num_frames, self.frame_skip, self.hop = num_frames, frame_skip, hop
        folder = Path(path).expanduser().absolute()
        if env is not None:
            collect(folder, env=env, policy=policy, num_episodes=episodes or 1, num_steps=steps, seed=seed)
        self.store = EpisodeStore(folder)
        count = min(episodes or len(self.store), len(self.store))
        num_held_out = max(1, round(val_ratio * count)) if val_ratio and count > 1 else 0
        self.held_out_numbers = range(count - num_held_out, count)
        self._load(range(count - num_held_out))
        self.fields = self._fields()
        self.channels = self.store.facts.frame_shape[0]
        self.mean, self.std = self._statistics()
        facts = self.store.facts
        self.world = {"frame_shape": facts.frame_shape, "frame_skip": facts.frame_skip, "env": dict(facts.env)}

    def _load(self, numbers: range) -> None:
        """Index the windows of these episodes."""
        span = (self.num_frames - 1) * self.frame_skip
        lengths = self.store.lengths[numbers.start : numbers.stop]
        counts = np.maximum(0, (lengths - span) // self.hop + 1)
        self.numbers = numbers
        self.windows = np.cumsum([0, *counts])
        if not self.windows[-1]:
            raise ValueError(
                f"dataset.path: no episode of {self.store.folder} has the {span + 1} frames of a window ({self.num_frames} "
                f"frames at frame_skip={self.frame_skip}); the longest has {max(lengths, default=0) + 1}. Lower num_frames"
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
        if names := facts.state_names:
            fields |= {"states": Field(shape=(self.num_frames, len(names)), names=names)}
            fields |= {"quantities": Field(shape=(len(names),), names=names)}
        return fields

    def _statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel, of frames of the training episodes."""
        picks = np.linspace(0, len(self.numbers) - 1, NUM_STATISTICS).astype(int)
        frames = [
            self.store.read(self.numbers[n], int(k * self.store.lengths[n] / NUM_STATISTICS), 1, ("frames",))["frames"]
            for k, n in enumerate(picks.tolist())
        ]
        values = np.concatenate(frames) / 255.0
        mean, std = values.mean(axis=(0, 2, 3)), values.std(axis=(0, 2, 3))
        return tuple(mean.tolist()), tuple(np.maximum(std, MIN_STD).tolist())

    def __len__(self) -> int:
        return int(self.windows[-1])

    def __getitem__(self, index: int) -> Sample:
        episode, first = self._window(index)
        skip, steps = self.frame_skip, self.num_frames - 1
        arrays = self.store.read(episode, first, steps * skip + 1)
        clip = torch.from_numpy(arrays["frames"][::skip].transpose(1, 0, 2, 3).copy())  # [C, T, H, W]
        rewards, ends = (arrays[name].reshape(steps, skip) for name in ("rewards", "terminated"))
        values = {
            "actions": arrays["actions"].reshape(self.fields["actions"].shape),
            "rewards": rewards.sum(axis=1),
            "terminated": ends.any(axis=1).astype(np.float32),
            "states": arrays["states"][::skip],
            "quantities": arrays["states"][-1],
        }
        return Sample(clip, fields={name: torch.from_numpy(np.array(values[name])) for name in self.fields})

    def _window(self, index: int) -> tuple[int, int]:
        """Episode and first frame of a window."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} windows")
        position = int(np.searchsorted(self.windows, index, side="right")) - 1
        return self.numbers[position], (index - int(self.windows[position])) * self.hop

    def describe(self, index: int) -> str:
        episode, first = self._window(index)
        return f"episode {episode} of {self.store.folder} from frame {first} on"

    def source(self, index: int) -> int:
        """The number of the episode."""
        return self._window(index)[0]

    def validation(self) -> Self | None:
        """The windows of the held-out episodes."""
        if not self.held_out_numbers:
            return None
        part = copy.copy(self)
        part._load(self.held_out_numbers)
        part.held_out_numbers = range(0)
        return part

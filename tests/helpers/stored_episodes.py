"""Small stores of episodes whose every number tells the episode and the time that it belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jepa.data.episode_store import Episode, StoreFacts, append, writing
from jepa.types import ActionSpace

CONTINUOUS = ActionSpace(low=(-300.0, -300.0), high=(300.0, 300.0))
DISCRETE = ActionSpace(num_actions=5)
NAMES = ("position/x", "position/y")


def episode(
    number: int, length: int, actions: ActionSpace = CONTINUOUS, states: int = 2, shape: tuple[int, ...] = (1, 2, 2)
) -> Episode:
    """Frame t is number in its upper half and t in the lower one; action t is (number, t), or (number + t) % 5."""
    times = np.arange(length + 1)
    frames = np.zeros((length + 1, *shape), dtype=np.uint8)
    frames[..., : shape[1] // 2, :] = number
    frames[..., shape[1] // 2 :, :] = times[:, None, None, None]
    numbers = np.stack([np.full(length + 1, number), times], axis=1).astype(np.float32)
    taken = (number + times[:-1]) % 5 if actions.is_discrete else numbers[:-1]
    ends = times[:-1] == length - 1
    is_truncated = np.full(length, number % 2 == 1)
    return Episode(
        frames, numbers[:, :states], taken.astype(np.int64 if actions.is_discrete else np.float32),
        (100 * number + times[:-1]).astype(np.float32), ends & ~is_truncated, ends & is_truncated,
    )  # fmt: skip


def write_store(
    folder: Path, lengths: Sequence[int], *, group: int = 2, actions: ActionSpace = CONTINUOUS, states: int = 2,
    shape: tuple[int, int, int] = (1, 2, 2),
) -> list[Episode]:  # fmt: skip
    """A store in `folder` of episodes with these numbers of transitions, `group` together."""
    episodes = [episode(n, length, actions, states, shape) for n, length in enumerate(lengths)]
    with writing(folder, StoreFacts(frame_shape=shape, actions=actions, state_names=NAMES[:states])):
        for first in range(0, len(episodes), group):
            append(folder, episodes[first : first + group])
    return episodes


def same(one: Episode, other: Episode) -> bool:
    """Equal in types, shapes and values."""
    pairs = list(zip(one, other, strict=True))
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)

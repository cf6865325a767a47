"""Shortest paths of a small disc in a maze of square cells of side 1, by a visibility graph of the walls' corners."""

from __future__ import annotations

import numpy as np

CLEARANCE = 0.08
"""Distance that paths keep from walls."""
CORNER_GAP = 0.12
"""Distance of a waypoint from the two walls of its corner, along each axis."""


class MazePaths:
    """The origin is the middle of the maze, x points right and y up; `walls` [rows, columns] is true for wall cells."""

    def __init__(self, walls: np.ndarray) -> None:
        self.walls = walls
        rows, columns = np.nonzero(walls)
        left, top = columns - walls.shape[1] / 2, walls.shape[0] / 2 - rows
        self.boxes = np.stack([left, left + 1, top - 1, top], axis=1)  # [m, 4]: x from, to; y from, to
        self.corners = _corners(walls)
        self.lengths = self._to_corners(self.corners)  # [k, k]
        for middle in range(len(self.corners)):  # Floyd and Warshall
            self.lengths = np.minimum(self.lengths, self.lengths[:, middle, None] + self.lengths[None, middle])

    def centres(self) -> np.ndarray:
        """[n, 2]: the middles of the free cells"""
        rows, columns = np.nonzero(~self.walls)
        return np.stack([columns + 0.5 - self.walls.shape[1] / 2, self.walls.shape[0] / 2 - rows - 0.5], axis=1)

    def is_blocked(self, points: np.ndarray, clearance: float = CLEARANCE) -> np.ndarray:
        """[n, 2] -> bool [n]: nearer to a wall than `clearance`, or outside of the maze"""
        x, y = points[:, :1], points[:, 1:]
        x_from, x_to, y_from, y_to = self.boxes.T
        across = np.maximum(np.maximum(x_from - x, x - x_to), 0)
        down = np.maximum(np.maximum(y_from - y, y - y_to), 0)
        is_outside = (np.abs(points) > np.array(self.walls.shape[::-1]) / 2).any(axis=1)
        return (np.hypot(across, down) < clearance).any(axis=1) | is_outside

    def sees(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """[n, 2], [n, 2] -> bool [n]: the segment between two points keeps clear of all walls"""
        low = self.boxes[:, [0, 2]] - CLEARANCE  # [m, 2]
        high = self.boxes[:, [1, 3]] + CLEARANCE
        ways = np.where(np.abs(ends - starts) < 1e-9, 1e-9, ends - starts)[:, None]  # [n, 1, 2]
        shares = np.stack([(low - starts[:, None]) / ways, (high - starts[:, None]) / ways])  # [2, n, m, 2]
        enter, leave = shares.min(axis=0).max(axis=-1), shares.max(axis=0).min(axis=-1)  # [n, m]
        return ~((enter < leave) & (enter < 1) & (leave > 0)).any(axis=1)

    def length(self, starts: np.ndarray, goals: np.ndarray) -> np.ndarray:
        """[n, 2], [n, 2] -> [n]: infinite if no path leads there"""
        return self._lengths(starts, goals).min(axis=1)

    def next_point(self, starts: np.ndarray, goals: np.ndarray) -> np.ndarray:
        """[n, 2], [n, 2] -> [n, 2]: the end of the first straight part of the shortest path"""
        first = self._lengths(starts, goals).argmin(axis=1)  # [n]
        corners = np.broadcast_to(self.corners, (len(goals), *self.corners.shape))
        return np.concatenate([corners, goals[:, None]], axis=1)[np.arange(len(goals)), first]

    def _lengths(self, starts: np.ndarray, goals: np.ndarray) -> np.ndarray:
        """[n, k + 1]: lengths of the shortest paths whose first part ends at each corner, and of the straight one"""
        from_start, to_goal = self._to_corners(starts), self._to_corners(goals)  # [n, k]
        from_start[from_start < 1e-6] = np.inf  # a path leads on from where it is
        rest = (self.lengths[None] + to_goal[:, None]).min(axis=2, initial=np.inf)  # [n, k]
        straight = np.where(self.sees(starts, goals), np.linalg.norm(goals - starts, axis=1), np.inf)
        return np.concatenate([from_start + rest, straight[:, None]], axis=1)

    def _to_corners(self, points: np.ndarray) -> np.ndarray:
        """[n, 2] -> [n, k]: straight distances; infinite where a wall is between"""
        starts = np.repeat(points, len(self.corners), axis=0)
        ends = np.tile(self.corners, (len(points), 1))
        lengths = np.where(self.sees(starts, ends), np.linalg.norm(ends - starts, axis=1), np.inf)
        return lengths.reshape(len(points), len(self.corners))


def _corners(walls: np.ndarray) -> np.ndarray:
    """[k, 2]: points beside the corners at which three free cells meet a wall"""
    corners = []
    for row in range(1, walls.shape[0]):
        for column in range(1, walls.shape[1]):
            around = walls[row - 1 : row + 1, column - 1 : column + 1]
            if around.sum() == 1:
                (up,), (left,) = np.nonzero(around)
                gap = CORNER_GAP * np.array([1 - 2 * left, 2 * up - 1])
                corners.append(np.array([column - walls.shape[1] / 2, walls.shape[0] / 2 - row]) + gap)
    return np.array(corners).reshape(-1, 2)

"""Progress of the training: a bar on a terminal, otherwise a line from time to time."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from tqdm.auto import tqdm

from jepa.parallel.bars import can_move
from jepa.reports.text import duration

SMOOTHING = 0.1
"""Weight of the newest measurement in the estimate of the time left."""


class Progress:
    """Shows step, loss, samples/s, fraction of time spent waiting for data, and time left."""

    LINES_IN_A_FILE = 20

    def __init__(self, first_step: int, total_steps: int, batch_size: int, *, is_shown: bool = True) -> None:
        self.total, self.batch_size = total_steps, batch_size
        self.is_shown = is_shown
        self.moving = can_move() and is_shown
        self.bar = tqdm(
            total=total_steps, initial=first_step, disable=not self.moving, unit="step", dynamic_ncols=True,
            bar_format="{desc}{percentage:3.0f}% |{bar}| step {n_fmt}/{total_fmt}{postfix}",
        )  # fmt: skip
        self.next_line = first_step
        self.seconds_per_step: float | None = None
        self.is_warm = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def show(self, done: int, metrics: Mapping[str, float]) -> None:
        left = self._update(self.batch_size / metrics["perf/samples_per_s"]) * (self.total - done)
        text = (
            f"loss {metrics['train/loss']:.4f} | {metrics['perf/samples_per_s']:.1f} samples/s | "
            f"data wait {metrics['perf/data_wait']:.0%} | {duration(left)} left"
        )
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(done - self.bar.n)
        if self.is_shown and not self.moving and (done >= self.next_line or done == self.total):
            print(f"step {done}/{self.total} | {text}", file=sys.stderr, flush=True)
            self.next_line = done + max(1, self.total // self.LINES_IN_A_FILE)

    def _update(self, seconds: float) -> float:
        """Exponential mean of the seconds per step, without the first measurement, which includes the warm-up."""
        old = self.seconds_per_step if self.is_warm else None
        self.is_warm = self.seconds_per_step is not None
        self.seconds_per_step = seconds if old is None else old + SMOOTHING * (seconds - old)
        return self.seconds_per_step

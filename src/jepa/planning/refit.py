"""The dynamics of a world model, fitted when its states are frozen."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from jepa.planning.heads import BATCH_SIZE, Recordings, fit
from jepa.predictors.action import ActionPredictor

NUM_STEPS = 3
"""Imagined steps whose errors are averaged, each from the prediction before it."""


class DynamicsHead(nn.Module):
    """The action encoder and the dynamics of a predictor, shared with it: loaded or fitted, they are the world's."""

    size = 0

    def __init__(self, predictor: ActionPredictor) -> None:
        super().__init__()
        self.actions, self.dynamics = predictor.actions, predictor.dynamics


def fit_dynamics(predictor: ActionPredictor, data: Recordings, num_steps: int, seed: int) -> float:
    """Learn to predict the states of `NUM_STEPS` next frames; they no longer change, unlike in the training before.

    A step costs no encoding and sees as many predicted states as those of other heads. Returns the last loss.
    """
    head = DynamicsHead(predictor).requires_grad_(True)
    count, rows = starts(data)

    def loss(drawn: Tensor) -> Tensor:
        last = drawn[: BATCH_SIZE // count]
        states = data.seen(last).unflatten(1, (predictor.history, predictor.num_state_tokens, -1))
        codes = predictor.actions.mlp(data.actions[last[:, None] + torch.arange(1 - data.history, count)])
        errors = []
        for step in range(count):
            following = predictor.advance(states, codes[:, step : step + predictor.history])
            target = data.states[last + step + 1].unflatten(1, (predictor.num_state_tokens, -1))
            errors.append((following - target).square().mean())
            states = torch.cat([states[:, 1:], following[:, None]], dim=1)
        return torch.stack(errors).mean()

    value = fit(head, loss, rows, num_steps, torch.Generator().manual_seed(seed))
    head.requires_grad_(False)
    return value


def starts(data: Recordings) -> tuple[int, Tensor]:
    """Number of steps that are predicted, at most `NUM_STEPS`, and the frames that have as many after them.

    The frames before them, as many as the history, are of the same episode. No frame has them if no episode does.
    """
    rows = torch.arange(len(data.states))
    first = torch.searchsorted(data.ends, data.ends)
    ahead = torch.where(rows - first >= data.history - 1, data.ends - rows, 0)
    count = max(1, min(NUM_STEPS, int(ahead.max())))
    return count, rows[ahead >= count]

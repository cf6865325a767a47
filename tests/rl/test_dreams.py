"""Dreams of a world whose heads were lost end in one message."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from jepa.errors import RunError
from jepa.rl.dreams import LatentWorld


def test_a_head_that_was_lost_is_named_with_what_to_do() -> None:
    shape = SimpleNamespace(frame_shape=(3, 8, 8))
    states = torch.zeros(2, 1, 1, 4)
    stub: Any = SimpleNamespace(heads={}, contract=shape, history=1, step=lambda states, actions: states[:, -1])
    world = LatentWorld(stub)
    with pytest.raises(RunError, match=r"the world has no head decoder.*run that command again"):
        world.draw(states[:, 0])
    dream = world.dream(states, torch.zeros(2, 0, 1), None)
    with pytest.raises(RunError, match=r"the world has no head reward.*run that command again"):
        dream.step(torch.zeros(2, 1))

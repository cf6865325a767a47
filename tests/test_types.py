"""Optional attributes of a data set, read with their defaults; the scale of actions."""

from typing import get_args

import numpy as np
import pytest
import torch

from jepa.evaluation.readout import READOUTS
from jepa.types import ActionSpace, DatasetTraits, Readout


class Plain:
    """Says nothing of itself."""


class Folder:
    labels = (0, 1, -1)
    in_memory = True

    def source(self, index):
        return index // 2


def test_what_a_data_set_does_not_say_has_its_default():
    found = DatasetTraits.of(Plain())
    assert found == DatasetTraits()
    assert (found.labels, found.in_memory, found.num_frames, found.source(7), found.test()) == (None, False, 1, 7, None)


def test_what_a_data_set_says_holds():
    found = DatasetTraits.of(Folder())
    assert (found.labels, found.in_memory, found.num_frames, found.source(7)) == ((0, 1, -1), True, 1, 3)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, np.float32, np.float64])
def test_actions_from_minus_one_to_one_are_spread_between_the_bounds(kind):
    space = ActionSpace(low=(-3.0, 0.5), high=(5.0, 1.0))
    rows = [[-1, -1], [0, 0], [1, 1], [-7, 7]]
    actions = torch.tensor(rows, dtype=kind) if isinstance(kind, torch.dtype) else np.array(rows, dtype=kind)
    result = space.unscale(actions)
    assert type(result) is type(actions)
    assert result.dtype == kind
    assert result.tolist() == [[-3, 0.5], [1, 0.75], [5, 1], [-3, 1]]


def test_discrete_and_whole_actions_keep_their_meaning():
    discrete = np.array([0, 3])
    assert ActionSpace(num_actions=4).unscale(discrete) is discrete
    assert ActionSpace(low=(0.5,), high=(1.5,)).unscale(np.array([[0]])).tolist() == [[1.0]]


def test_every_readout_of_the_schema_is_explained():
    assert tuple(READOUTS) == get_args(Readout)

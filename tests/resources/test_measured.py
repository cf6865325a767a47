"""Measuring the time of a step leaves the model as it was."""

from __future__ import annotations

import torch

from jepa.layers.quantizers import VectorQuantizer
from jepa.resources.measured import kept_buffers


def test_sums_since_the_last_step_are_those_from_before_the_measurement() -> None:
    torch.manual_seed(0)
    module = torch.nn.ModuleDict({"quantizer": VectorQuantizer(num_codes=4, dim=3), "norm": torch.nn.BatchNorm1d(3)})
    module["quantizer"](torch.randn(5, 3))
    before = {name: value.clone() for name, value in module.named_buffers()}
    with kept_buffers(module):
        for part in module.values():
            part(torch.randn(20, 3))
        assert any(not torch.equal(value, before[name]) for name, value in module.named_buffers())
    after = dict(module.named_buffers())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())

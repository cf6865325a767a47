"""The causal transformer: no position sees a later one, and a cache gives what the whole sequence gives."""

from __future__ import annotations

import pytest
import torch

from jepa.layers.causal import CausalTransformer


def transformer() -> CausalTransformer:
    torch.manual_seed(0)
    return CausalTransformer(width=16, depth=2, num_heads=2)


def sequence(length: int = 9) -> torch.Tensor:
    return torch.randn(3, length, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("changed", [0, 4, 8])
def test_no_position_sees_a_later_one(changed: int) -> None:
    before = sequence()
    after = before.clone()
    after[:, changed, 0] += 1
    outputs = [transformer()(tokens)[0] for tokens in (before, after)]
    differs = (outputs[0] - outputs[1]).abs().amax(dim=(0, 2)) > 1e-6
    assert differs.tolist() == [position >= changed for position in range(9)]


@pytest.mark.parametrize("lengths", [[9], [1] * 9, [4, 5], [3, 1, 1, 4]], ids=str)
def test_a_cache_gives_what_the_whole_sequence_gives(lengths: list[int]) -> None:
    model, tokens, cache, outputs = transformer(), sequence(), None, []
    for part in tokens.split(lengths, dim=1):
        output, cache = model(part, cache)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, dim=1), model(tokens)[0], rtol=0, atol=1e-5)

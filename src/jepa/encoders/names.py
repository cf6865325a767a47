"""How others call the tensors of our encoders: tables that are read in both directions.

Ours have one name for query, key and value together, a linear layer that embeds flattened patches [D, C*t*h*w], and
positions [N, D]; others have a convolution [D, C, (t,) h, w] and positions [1, N, D].
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

Names = Mapping[str, tuple[str, ...]]
"""Our module, or the table of positions, -> theirs; {} is the number of the block, from 0. Three are joined in ours."""
TABLE = "positions.table"
PUBLISHED: Names = {
    "embed": ("patch_embed.proj",),
    TABLE: ("pos_embed",),
    "blocks.{}.norm1": ("blocks.{}.norm1",),
    "blocks.{}.attn.qkv": ("blocks.{}.attn.qkv",),
    "blocks.{}.attn.proj": ("blocks.{}.attn.proj",),
    "blocks.{}.norm2": ("blocks.{}.norm2",),
    "blocks.{}.mlp.fc1": ("blocks.{}.mlp.fc1",),
    "blocks.{}.mlp.fc2": ("blocks.{}.mlp.fc2",),
    "norm": ("norm",),
}
"""The published files of I-JEPA, V-JEPA and V-JEPA 2, and timm's VisionTransformer."""
IJEPA: Names = {
    "embed": ("embeddings.patch_embeddings.projection",),
    TABLE: ("embeddings.position_embeddings",),
    "blocks.{}.norm1": ("encoder.layer.{}.layernorm_before",),
    "blocks.{}.attn.qkv": (
        "encoder.layer.{}.attention.attention.query",
        "encoder.layer.{}.attention.attention.key",
        "encoder.layer.{}.attention.attention.value",
    ),
    "blocks.{}.attn.proj": ("encoder.layer.{}.attention.output.dense",),
    "blocks.{}.norm2": ("encoder.layer.{}.layernorm_after",),
    "blocks.{}.mlp.fc1": ("encoder.layer.{}.intermediate.dense",),
    "blocks.{}.mlp.fc2": ("encoder.layer.{}.output.dense",),
    "norm": ("layernorm",),
}
"""Files of transformers' IJepaModel."""
VJEPA2: Names = {
    "embed": ("encoder.embeddings.patch_embeddings.proj",),
    "blocks.{}.norm1": ("encoder.layer.{}.norm1",),
    "blocks.{}.attn.qkv": (
        "encoder.layer.{}.attention.query",
        "encoder.layer.{}.attention.key",
        "encoder.layer.{}.attention.value",
    ),
    "blocks.{}.attn.proj": ("encoder.layer.{}.attention.proj",),
    "blocks.{}.norm2": ("encoder.layer.{}.norm2",),
    "blocks.{}.mlp.fc1": ("encoder.layer.{}.mlp.fc1",),
    "blocks.{}.mlp.fc2": ("encoder.layer.{}.mlp.fc2",),
    "norm": ("encoder.layernorm",),
}
"""Files of transformers' VJEPA2Model, of which the encoder is a part."""


def to_foreign(tensors: Mapping[str, Tensor], names: Names, patch: Sequence[int]) -> dict[str, Tensor]:
    """Our tensors by their names; `patch` is (C, h, w) or (C, t, h, w). KeyError where one is lacking.

    Positions are among them where `names` has some and `tensors` too, under the name `TABLE`.
    """
    found = {}
    for ours, theirs in name_pairs(names, count_blocks(tensors, "blocks.{}.")):
        if ours == TABLE and ours not in tensors:
            continue
        tensor = tensors[ours]
        if ours == TABLE:
            tensor = tensor[None]
        elif ours == "embed.weight":
            tensor = tensor.unflatten(1, tuple(patch))
        found |= zip(theirs, tensor.chunk(len(theirs)), strict=True)
    return {name: tensor.contiguous() for name, tensor in found.items()}


def from_foreign(tensors: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """Their tensors by our names; what is not in the table is left out. KeyError where one is lacking."""
    found = {}
    for ours, theirs in name_pairs(names, count_blocks(tensors, block_prefix(names))):
        if ours == TABLE and theirs[0] not in tensors:
            continue
        tensor = torch.cat([tensors[name] for name in theirs])
        if ours == TABLE:
            tensor = tensor[0]
        found[ours] = tensor.flatten(1) if ours == "embed.weight" else tensor
    return found


def name_pairs(names: Names, depth: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Our name of every tensor of an encoder of `depth` blocks, and theirs."""
    for ours, theirs in names.items():
        for number in range(depth) if "{}" in ours else (0,):
            for leaf in ("",) if ours == TABLE else (".weight", ".bias"):
                yield ours.format(number) + leaf, tuple(name.format(number) + leaf for name in theirs)


def block_prefix(names: Names) -> str:
    """How their blocks are called, as "encoder.layer.{}."."""
    return names["blocks.{}.norm1"][0].partition("{}")[0] + "{}."


def count_blocks(tensors: Iterable[str], block: str) -> int:
    """How many blocks there are, by the highest number in a name that begins as `block`."""
    before, _, after = block.partition("{}")
    numbers = (re.match(rf"{re.escape(before)}(\d+){re.escape(after)}", name) for name in tensors)
    return max((int(match[1]) + 1 for match in numbers if match), default=0)

"""Names of the encoders' tensors in other code bases, and the translation in both directions.

Our encoders have one projection for query, key and value, a linear layer that embeds flattened patches [D, C*t*h*w],
and positions [N, D]; others have a convolution [D, C, (t,) h, w] and positions [1, N, D].
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

Names = Mapping[str, tuple[str, ...]]
"""Our module, or the table of positions -> foreign modules, of which several are concatenated into ours.

{} is the number of the block, from 0.
"""
TABLE = "positions.table"
_BLOCK = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
PUBLISHED: Names = {
    "embed": ("patch_embed.proj",), TABLE: ("pos_embed",),
    **{f"blocks.{{}}.{module}": (f"blocks.{{}}.{module}",) for module in _BLOCK}, "norm": ("norm",),
}  # fmt: skip
"""The published files of I-JEPA, V-JEPA and V-JEPA 2, and timm's VisionTransformer."""
IJEPA: Names = {
    "embed": ("embeddings.patch_embeddings.projection",), TABLE: ("embeddings.position_embeddings",),
    "blocks.{}.norm1": ("encoder.layer.{}.layernorm_before",),
    "blocks.{}.attn.qkv": tuple(f"encoder.layer.{{}}.attention.attention.{x}" for x in ("query", "key", "value")),
    "blocks.{}.attn.proj": ("encoder.layer.{}.attention.output.dense",),
    "blocks.{}.norm2": ("encoder.layer.{}.layernorm_after",),
    "blocks.{}.mlp.fc1": ("encoder.layer.{}.intermediate.dense",),
    "blocks.{}.mlp.fc2": ("encoder.layer.{}.output.dense",), "norm": ("layernorm",),
}  # fmt: skip
"""Files of transformers' IJepaModel."""
VJEPA2: Names = {
    "embed": ("encoder.embeddings.patch_embeddings.proj",), "blocks.{}.norm1": ("encoder.layer.{}.norm1",),
    "blocks.{}.attn.qkv": tuple(f"encoder.layer.{{}}.attention.{x}" for x in ("query", "key", "value")),
    "blocks.{}.attn.proj": ("encoder.layer.{}.attention.proj",), "blocks.{}.norm2": ("encoder.layer.{}.norm2",),
    "blocks.{}.mlp.fc1": ("encoder.layer.{}.mlp.fc1",), "blocks.{}.mlp.fc2": ("encoder.layer.{}.mlp.fc2",),
    "norm": ("encoder.layernorm",),
}  # fmt: skip
"""Files of transformers' VJEPA2Model, of which the encoder is a part."""


def to_foreign(tensors: Mapping[str, Tensor], names: Names, patch: Sequence[int]) -> dict[str, Tensor]:
    """Our tensors by foreign names; `patch` is (C, h, w) or (C, t, h, w). Raises KeyError if one is missing.

    Positions are included if both `names` and `tensors` have them.
    """
    foreign = {}
    for our_name, foreign_names in name_pairs(names, count_blocks(tensors, PUBLISHED)):  # named as our blocks
        if our_name == TABLE and our_name not in tensors:
            continue
        tensor = tensors[our_name]
        if our_name == TABLE:
            tensor = tensor[None]
        elif our_name == "embed.weight":
            tensor = tensor.unflatten(1, tuple(patch))
        foreign |= zip(foreign_names, tensor.chunk(len(foreign_names)), strict=True)
    return {name: tensor.contiguous() for name, tensor in foreign.items()}


def from_foreign(tensors: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """Foreign tensors by our names, without those that `names` does not list. Raises KeyError if one is missing."""
    ours = {}
    for our_name, foreign_names in name_pairs(names, count_blocks(tensors, names)):
        if our_name == TABLE and foreign_names[0] not in tensors:
            continue
        tensor = torch.cat([tensors[name] for name in foreign_names])
        if our_name == TABLE:
            tensor = tensor[0]
        ours[our_name] = tensor.flatten(1) if our_name == "embed.weight" else tensor
    return ours


def name_pairs(names: Names, depth: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Our name and the foreign names of every tensor of an encoder of `depth` blocks."""
    for our_module, foreign_modules in names.items():
        for number in range(depth) if "{}" in our_module else (0,):
            for leaf in ("",) if our_module == TABLE else (".weight", ".bias"):
                yield our_module.format(number) + leaf, tuple(name.format(number) + leaf for name in foreign_modules)


def count_blocks(tensors: Iterable[str], names: Names) -> int:
    """Number of blocks among tensors with foreign names."""
    prefix = re.escape(names["blocks.{}.norm1"][0].partition("{}")[0])
    matches = (re.match(rf"{prefix}(\d+)\.", name) for name in tensors)
    return max((int(match[1]) + 1 for match in matches if match), default=0)

"""Tokens and attention of a frozen encoder, and the samples that an inspection shows: neighbours and errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from jepa.evaluation.frozen import eval_mode
from jepa.evaluation.pictures import frame_indices
from jepa.evaluation.probe import confusion_counts
from jepa.evaluation.types import Features
from jepa.layers.attention import choose_attention
from jepa.types import PatchGrid

QUERIES_AT_ONCE = 256
"""Number of queries per attention computation, which bounds its memory."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """An encoder with its features on a data set; all tensors are on the CPU."""

    title: str
    data: str
    """what it was evaluated on, in a few words"""
    encoder: nn.Module
    """an implementation of types.Encoder with a `transform`"""
    train: Features
    test: Features
    pictures: Tensor
    """uint8 [P, C, T, H, W]: the first test samples"""
    train_thumbnails: Tensor
    """uint8 [n, C, h, w]: the training samples, middle frames of clips"""
    test_thumbnails: Tensor
    classes: tuple[str, ...]
    """names of all labels"""
    probabilities: Tensor
    """float [n, classes]: predictions of a linear probe for the test samples"""
    protocol: Sequence[str]
    """sentences on how features and probe were computed"""

    @cached_property
    def confusion(self) -> Tensor:
        """long [classes, classes], label by prediction of the probe"""
        return confusion_counts(self.probabilities.argmax(dim=1), self.test.labels, len(self.classes))


class Attention(NamedTuple):
    """Attention of the last block, mean over its heads; sums below one are due to tokens that are no patches."""

    received: Tensor
    """[P, t, h, w]: mean over the patches that attend; each frame sums to one if frames do not attend to each other"""
    attention_of_queries: Tensor
    """[P, Q, t, h, w]: attention of each query patch"""
    class_token: Tensor | None
    """[P, t, h, w]: attention of the class token, if the encoder has one"""


class Observed(NamedTuple):
    tokens: Tensor
    """float32 [P, N, D]"""
    grid: PatchGrid
    queries: tuple[int, ...]
    """indices of the query patches among the tokens"""
    attention: Attention | str
    """attention, or the reason why there is none"""


class AttentionCall(NamedTuple):
    """Arguments of a call of `F.scaled_dot_product_attention`."""

    query: Tensor
    """[b, heads, S, d]"""
    key: Tensor
    """[b, heads, S, d]"""
    mask: Tensor | None
    """bool, or a term of the logits; broadcasts to [b, heads, S, S]"""
    scale: float

    def shares(self, rows: Tensor) -> Tensor:
        """Indices [r] -> float32 [b, r, S]: attention of these tokens, mean over the heads."""
        logits = self.scale * self.query[:, :, rows].float() @ self.key.float().mT
        if self.mask is not None:
            length = self.key.shape[2]
            mask = self.mask.expand(*logits.shape[:2], length, length)[:, :, rows]
            logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
        return logits.softmax(dim=-1).mean(dim=1)


class AttentionRecorder(TorchFunctionMode):
    """Context that records the last self-attention computed by `F.scaled_dot_product_attention`."""

    call: AttentionCall | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._note(*args, **kwargs)
        return func(*args, **kwargs)

    def _note(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> None:  # fmt: skip
        if query.shape == key.shape and not is_causal:
            self.call = AttentionCall(query, key, attn_mask, query.shape[-1] ** -0.5 if scale is None else scale)


@torch.no_grad()
def observe(encoder: Any, pictures: Tensor) -> Observed:
    """uint8 [P, C, T, H, W] -> tokens and attention, one picture at a time, since the attention of clips is large.

    Attention is computed from the arguments of `F.scaled_dot_product_attention`, which makes it independent of the
    encoder's position encoding and normalisation.
    """
    device = next(encoder.parameters(), pictures).device  # an encoder of pixels has no parameters
    grid = encoder.grid_of(encoder.transform(pictures[:1].to(device)))
    tokens, maps = [], []
    with eval_mode(encoder):
        choose_attention(encoder, device, torch.float32)
        for picture in pictures:
            clip = encoder.transform(picture[None].to(device))
            with AttentionRecorder() as recorder:
                tokens.append(encoder(clip).float().cpu())
            maps.append(_maps(recorder.call, grid, encoder))
    if reason := next((values for values in maps if isinstance(values, str)), ""):
        return Observed(torch.cat(tokens), grid, query_patches(grid), reason)
    stacks: list[Any] = [
        None if first is None else torch.stack([first, *rest]) for first, *rest in zip(*maps, strict=True)
    ]
    return Observed(torch.cat(tokens), grid, query_patches(grid), Attention(*stacks))


def _maps(call: AttentionCall | None, grid: PatchGrid, encoder: Any) -> Attention | str:
    """The maps of one clip, without the axis P; the class token is the first of the tokens that are no patches."""
    if call is None:
        return "The encoder does not call torch's fused self-attention, so there is no attention to read."
    prefix = getattr(encoder, "num_prefix_tokens", 0)
    groups, _, length, _ = call.query.shape
    size = length - prefix  # patches that attend to each other: all, or those of one frame
    if groups * size != grid.num_tokens:
        return f"The last block attends to {groups * size} tokens, which are not the {grid.num_tokens} patches."
    shape = (grid.t, grid.h, grid.w)
    device = call.query.device
    rows = torch.arange(prefix, length, device=device).split(QUERIES_AT_ONCE)
    received = sum(call.shares(part)[:, :, prefix:].sum(dim=1) for part in rows) / size  # [groups, size]
    of_queries = torch.zeros(len(query_patches(grid)), groups, size)
    for number, token in enumerate(query_patches(grid)):
        row = torch.tensor([prefix + token % size], device=device)
        of_queries[number, token // size] = call.shares(row)[token // size, 0, prefix:].cpu()
    class_token = None
    if prefix and any(name.endswith("cls_token") for name, _ in encoder.named_parameters()):
        shares = call.shares(torch.tensor([0], device=device))[:, 0, prefix:]  # [groups, size]
        class_token = shares.cpu().reshape(shape)
    return Attention(torch.as_tensor(received).cpu().reshape(shape), of_queries.reshape(-1, *shape), class_token)


def query_patches(grid: PatchGrid) -> tuple[int, ...]:
    """Up to three tokens of a time step in the middle: the centre, and one to the upper left and lower right of it."""
    steps = frame_indices(grid.t)
    start = steps[len(steps) // 2] * grid.h * grid.w
    patches = [(quarter * grid.h // 4) * grid.w + quarter * grid.w // 4 for quarter in (2, 1, 3)]
    return tuple(dict.fromkeys(start + patch for patch in patches))


def hardest(probabilities: Tensor, labels: Tensor, count: int) -> Tensor:
    """[n, classes], [n] -> indices of at most `count` wrong predictions, the most confident first."""
    confidence, predicted = probabilities.max(dim=1)
    wrong = (predicted != labels).nonzero()[:, 0]
    return wrong[confidence[wrong].argsort(descending=True, stable=True)[:count]]


def most_ambiguous(probabilities: Tensor, count: int) -> Tensor:
    """[n, classes] -> indices of the `count` samples whose two highest probabilities are closest."""
    best = probabilities.topk(2, dim=1).values
    return (best[:, 0] - best[:, 1]).argsort(stable=True)[:count]


def one_per_label_in_turn(labels: Tensor, count: int) -> list[int]:
    """Indices of `count` samples that cycle through the labels."""
    members = [(labels == label).nonzero()[:, 0].tolist() for label in labels.unique()]
    return [index for group in zip_longest(*members) for index in group if index is not None][:count]

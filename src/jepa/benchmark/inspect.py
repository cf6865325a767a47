"""What a frozen encoder makes of pictures: their tokens, its attention, nearest neighbours, and where a probe errs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from jepa.evaluation.frozen import evaluating
from jepa.evaluation.pictures import frames_shown
from jepa.evaluation.types import Features
from jepa.layers.attention import choose_attention
from jepa.types import PatchGrid

QUERIES_AT_ONCE = 256
"""queries looked at together, so that memory does not grow with the square of the tokens"""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """An encoder with its features of a data set, all tensors on the CPU."""

    title: str
    encoder: nn.Module
    """satisfies types.Encoder and has a `transform`"""
    train: Features
    test: Features
    pictures: Tensor
    """uint8 [P, C, T, H, W] of the first test samples"""
    train_thumbnails: Tensor
    """uint8 [n, C, h, w] of the training samples, of clips the middle frame"""
    test_thumbnails: Tensor
    classes: tuple[str, ...] = ()
    probabilities: Tensor | None = None
    """float [n, classes] of the test samples, of a linear probe; None where there is none"""
    facts: Mapping[str, str] = field(default_factory=dict)
    """name and value of what else the head of the page is to say"""
    protocol: Sequence[str] = ()
    """sentences: how the features and the probe came about"""

    @property
    def is_labelled(self) -> bool:
        return bool((self.test.labels >= 0).any() and (self.train.labels >= 0).any())

    @property
    def num_classes(self) -> int:
        return max(len(self.classes), int(max(self.train.labels.max(), self.test.labels.max())) + 1)


class Attention(NamedTuple):
    """Of the last block, mean over its heads; tokens that are no patches take what the sums lack to one."""

    received: Tensor
    """[P, t, h, w]: mean over the patches that look; where frames do not see each other each frame sums to one"""
    attention_of_queries: Tensor
    """[P, Q, t, h, w]: what each of the query patches looks at"""
    class_token: Tensor | None
    """[P, t, h, w]: what the class token looks at, where the encoder has one"""


class Observed(NamedTuple):
    tokens: Tensor
    """float32 [P, N, D]"""
    grid: PatchGrid
    queries: tuple[int, ...]
    """the query patches, as tokens of the grid"""
    attention: Attention | str
    """or why there is none"""


class AttentionCall(NamedTuple):
    """What torch's fused attention was called with."""

    query: Tensor
    """[b, heads, S, d]"""
    key: Tensor
    mask: Tensor | None
    """bool, or added to the logits; broadcasts to [b, heads, S, S]"""
    scale: float

    def shares(self, rows: Tensor) -> Tensor:
        """[r] -> float32 [b, r, S]: how these tokens share out their attention, mean over the heads."""
        logits = self.scale * self.query[:, :, rows].float() @ self.key.float().mT
        if self.mask is not None:
            length = self.key.shape[2]
            mask = self.mask.expand(*logits.shape[:2], length, length)[:, :, rows]
            logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
        return logits.softmax(dim=-1).mean(dim=1)


class AttentionRecorder(TorchFunctionMode):
    """Notes the last self-attention that torch's fused kernel is asked for inside, whosever module asks."""

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
    """uint8 [P, C, T, H, W]; one after the other, since the attention of long clips is large.

    Attention is read off the calls of `F.scaled_dot_product_attention`, so that it is the one of any Transformer,
    whatever turns or norms its queries and keys go through.
    """
    device = next(encoder.parameters()).device
    tokens, maps = [], []
    with evaluating(encoder):
        choose_attention(encoder, device, torch.float32)
        for picture in pictures:
            clip = encoder.transform(picture[None].to(device))
            with AttentionRecorder() as watch:
                tokens.append(encoder(clip).float().cpu())
            maps.append(_maps(watch.call, encoder.grid_of(clip), encoder))
    grid = encoder.grid_of(encoder.transform(pictures[:1].to(device)))
    reasons = [found for found in maps if isinstance(found, str)]
    attention = reasons[0] if reasons else Attention(*(_stack(part) for part in zip(*maps, strict=True)))
    return Observed(torch.cat(tokens), grid, query_patches(grid), attention)


def _stack(parts: Sequence[Tensor | None]) -> Any:
    return None if parts[0] is None else torch.stack([part for part in parts if part is not None])


def _maps(call: AttentionCall | None, grid: PatchGrid, encoder: Any) -> Attention | str:
    """Of one clip: each map without the first axis. A class token is the first of the tokens that are no patches."""
    prefix = getattr(encoder, "num_prefix_tokens", 0)
    has_class_token = prefix and any(name.endswith("cls_token") for name, _ in encoder.named_parameters())
    if call is None:
        return "The encoder does not call torch's fused self-attention, so there is no attention to read."
    groups, _, length, _ = call.query.shape
    size = length - prefix  # patches that see each other: all, or those of one frame
    if groups * size != grid.num_tokens:
        return f"The last block attends to {groups * size} places, which are not the {grid.num_tokens} patches."
    shape = (grid.t, grid.h, grid.w)
    rows = torch.arange(prefix, length, device=call.query.device).split(QUERIES_AT_ONCE)
    received = sum(call.shares(some)[:, :, prefix:].sum(dim=1) for some in rows) / size  # [groups, size]
    looks = torch.zeros(len(query_patches(grid)), groups, size)
    for number, token in enumerate(query_patches(grid)):
        row = torch.tensor([prefix + token % size], device=call.query.device)
        looks[number, token // size] = call.shares(row)[token // size, 0, prefix:].cpu()
    first = call.shares(torch.tensor([0], device=call.query.device))[:, 0, prefix:] if has_class_token else None
    return Attention(
        received=torch.as_tensor(received).cpu().reshape(shape),
        attention_of_queries=looks.reshape(-1, *shape),
        class_token=None if first is None else first.cpu().reshape(shape),
    )


def query_patches(grid: PatchGrid) -> tuple[int, ...]:
    """Up to three tokens of a time step in the middle: in the centre, and to the upper left and lower right of it."""
    steps = frames_shown(grid.t)
    start = steps[len(steps) // 2] * grid.h * grid.w
    places = [(quarter * grid.h // 4) * grid.w + quarter * grid.w // 4 for quarter in (2, 1, 3)]
    return tuple(dict.fromkeys(start + place for place in places))


def agreement(found: Tensor, train: Tensor, test: Tensor) -> float:
    """Neighbours [n, k], labels [m], [n] -> share of same classes among samples and neighbours that have a label."""
    labels = train[found]
    known = (labels >= 0) & (test[:, None] >= 0)
    return float((labels == test[:, None])[known].float().mean())


def hardest(probabilities: Tensor, labels: Tensor, count: int) -> Tensor:
    """[n, classes], [n] -> indices of at most `count` samples that are wrong, the most confident first."""
    confidence, predicted = probabilities.max(dim=1)
    wrong = ((predicted != labels) & (labels >= 0)).nonzero()[:, 0]
    return wrong[confidence[wrong].argsort(descending=True, stable=True)[:count]]


def most_ambiguous(probabilities: Tensor, count: int) -> Tensor:
    """[n, classes] -> indices of the `count` samples whose two likeliest classes are nearest to each other."""
    best = probabilities.topk(2, dim=1).values
    return (best[:, 0] - best[:, 1]).argsort(stable=True)[:count]


def one_per_label_in_turn(labels: Tensor, count: int) -> list[int]:
    """Indices of `count` samples, one of each label in turn, so that many are seen."""
    members = [(labels == label).nonzero()[:, 0].tolist() for label in labels.unique()]
    rounds = [group[turn] for turn in range(count) for group in members if turn < len(group)]
    return rounds[:count]

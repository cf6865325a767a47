"""A dictionary of whitened image patches: filters that are learned in seconds, before a network is trained."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Generator, Tensor, nn

SIDE, STRIDE, POOL = 6, 2, 2
"""Height and width of a filter, pixels between filters, and filters averaged on each side of a cell."""
CELL = STRIDE * POOL
THRESHOLD = 0.25
"""Response that a filter must exceed."""
CONTRAST = 2.5e-3
"""Added to the variance of a window, of normalised pixels, so that flat windows stay flat."""
RIDGE = 0.1
"""Added to the eigenvalues that the whitening divides by."""
FLOOR = 1e-3
"""Added to a mean response before its square root, whose slope at 0 would be infinite."""
ROUNDS = 8
NUM_WINDOWS, NUM_CELLS = 60_000, 60_000
"""Windows that the filters are learned from, and cells that the statistics are measured on."""
EXACT_WIDTH = 2048
"""Width of tokens up to which all their principal components are found, instead of a subspace near the first ones."""
OVERSAMPLED, SUBSPACE_ROUNDS = 32, 4
CHUNK = {"cpu": 2**19, "accelerator": 2**26}
"""Responses computed at a time: they fit into a core's cache, or take 256 MB."""


class DictionaryStem(nn.Module):
    """Cells of 4 x 4 pixels, described by `num_filters` whitened patches found by k-means (Coates and Ng 2011, 2012).

    Windows of 6 x 6 pixels, 2 apart, have mean 0 and standard deviation 1, are compared with each filter, and count as
    far as the response exceeds a threshold, for either sign: 2 `num_filters` values, averaged over the windows of a
    cell, square-rooted, and standardised. `fit` learns the filters from pictures without labels. Gradients change them
    after `frozen`, a share of the training run, for which `at` is called before each step.
    """

    def __init__(self, channels: int, patch_size: tuple[int, int], *, num_filters: int, frozen: float = 1.0) -> None:
        super().__init__()
        if any(side % CELL for side in patch_size):
            raise ValueError(f"encoder.patch_size={list(patch_size)}: stem=dictionary needs multiples of {CELL}")
        self.cells = tuple(side // CELL for side in patch_size)
        self.width = 2 * num_filters * math.prod(self.cells)
        filters = torch.randn(num_filters, channels, SIDE, SIDE)
        self.filters = nn.Parameter(filters / math.sqrt(filters[0].numel()), requires_grad=frozen < 1)
        self.frozen = frozen
        self.is_frozen = True
        self.register_buffer("offset", torch.zeros(num_filters))
        self.register_buffer("mean", torch.zeros(2 * num_filters))
        self.register_buffer("scale", torch.ones(2 * num_filters))

    offset: Tensor
    mean: Tensor
    scale: Tensor

    def at(self, progress: float) -> None:
        """The filters learn from now on if this share of the run is done."""
        self.is_frozen = progress < self.frozen or self.frozen == 1

    def forward(self, pictures: Tensor) -> Tensor:
        """[b, C, H, W] -> [b, n, 2K cells]"""
        cells = torch.cat([self.describe(part) for part in chunks(pictures, len(self.filters))])
        cells = (cells - self.mean) * self.scale
        if self.is_frozen and self.filters.requires_grad:
            cells = cells + 0 * self.filters.sum()  # their gradient is 0, not None, which DDP would wait for
        height, width = self.cells
        return rearrange(cells, "b (y h) (x w) k -> b (y x) (h w k)", h=height, w=width)

    def describe(self, pictures: Tensor) -> Tensor:
        """[b, C, H, W] -> float32 [b, H / 4, W / 4, 2K], before they are standardised"""
        with torch.autocast(pictures.device.type, enabled=False):
            before = SIDE // 2
            around = (before, SIDE - 1 - before, before, SIDE - 1 - before)
            padded = F.pad(pictures.float(), around, mode="reflect")
            mean = F.avg_pool2d(padded.mean(1, keepdim=True), SIDE, STRIDE)
            variance = F.avg_pool2d(padded.square().mean(1, keepdim=True), SIDE, STRIDE) - mean.square()
            padded = padded.contiguous(memory_format=torch.channels_last)  # half the time on a CPU
            responses = F.conv2d(padded, self.filters.detach() if self.is_frozen else self.filters, stride=STRIDE)
            responses = responses * (variance.clamp(min=0) + CONTRAST).rsqrt() + self.offset[:, None, None]
            signed = F.softshrink(responses, THRESHOLD)
            difference, total = F.avg_pool2d(signed, POOL), F.avg_pool2d(signed.abs(), POOL)
            halves = torch.cat([total + difference, total - difference], 1)  # of the positive, and of the negative
            return halves.mul(0.5).clamp(min=0).add(FLOOR).sqrt().permute(0, 2, 3, 1)

    @property
    def is_fitted(self) -> bool:
        return bool(self.mean.any())

    @torch.no_grad()
    def fit(
        self, batches: Iterable[Tensor], shape: tuple[int, int, int], num_kept: int, generator: Generator
    ) -> Tensor:
        """Learn the dictionary from normalised pictures in batches [b, C, H, W]; some thousand are enough.

        `shape` is their number, height and width. Returns the first `num_kept` of them in a random order.
        """
        num, height, width = shape
        for_cells = math.ceil(NUM_CELLS / (height * width // CELL**2))
        windows, first = sample(batches, num, max(num_kept, for_cells), generator)
        filters, offset = learn_filters(normalise(windows), len(self.filters), generator)
        self.filters.copy_(rearrange(filters, "k (c p q) -> k c p q", p=SIDE, q=SIDE))
        self.offset.copy_(offset)
        parts = chunks(first[:for_cells], len(self.filters))
        cells = torch.cat([self.describe(part).flatten(0, 2) for part in parts])
        self.mean.copy_(cells.mean(0))
        self.scale.copy_(1 / cells.std(0).clamp(min=1e-3))
        return first[:num_kept]


def principal_embedding(
    tokens: Tensor, num: int, generator: Generator, scale: float = 0.7, ridge: float = 0.1
) -> tuple[Tensor, Tensor]:
    """[n, P] -> weight [num, P] and bias [num] that map tokens to their first principal components, of like size.

    If there are fewer components than `num`, the other rows are 0. The tokens, which may fill the memory, are centred.
    """
    mean = tokens.mean(0)
    tokens -= mean
    width = tokens.shape[1]
    basis = None if width <= EXACT_WIDTH else leading_subspace(tokens, min(width, num + OVERSAMPLED), generator)
    seen = tokens if basis is None else tokens @ basis
    values, vectors = torch.linalg.eigh(seen.T @ seen / len(seen))
    values, vectors = values.flip(0)[:num], vectors.flip(1)[:, :num]
    vectors = vectors if basis is None else basis @ vectors
    weight = tokens.new_zeros(num, width)
    weight[: len(values)] = (scale * vectors / (values + ridge * values.mean()).sqrt()).T
    return weight, -weight @ mean


def leading_subspace(rows: Tensor, num: int, generator: Generator) -> Tensor:
    """Centred [n, P] -> [P, num], orthonormal, near the first principal directions (Halko et al. 2011, section 4)."""
    basis = torch.randn(rows.shape[1], num, generator=generator)
    for _ in range(SUBSPACE_ROUNDS):
        basis = torch.linalg.qr(rows.T @ (rows @ basis)).Q
    return basis


def sample(batches: Iterable[Tensor], num: int, num_kept: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Of `num` pictures in batches [b, C, H, W], of which one is in memory at a time: windows and whole pictures.

    Windows [NUM_WINDOWS, C h w] at random places, and the first `num_kept` pictures in a random order.
    """
    order = torch.randperm(num, generator=generator)
    places, draws = order.argsort(), torch.rand(3, NUM_WINDOWS, generator=generator)
    picks, first = order[(draws[0] * num).long()], 0
    windows, kept = [], []
    for pictures in batches:
        own = ((picks >= first) & (picks < first + len(pictures))).nonzero()[:, 0]
        windows.append((own, windows_at(pictures, picks[own] - first, draws[1:, own])))
        ranks = places[first : first + len(pictures)]
        kept.append((ranks[ranks < num_kept], pictures[ranks < num_kept]))
        first += len(pictures)
    return _in_order(windows), _in_order(kept)


def windows_at(pictures: Tensor, picks: Tensor, draws: Tensor) -> Tensor:
    """Of the pictures [b, C, H, W] number `picks` [n], windows [n, C h w] at the places `draws` [2, n] in [0, 1)."""
    height, width = pictures.shape[-2:]
    rows, columns = (draws * torch.tensor([[height - SIDE + 1], [width - SIDE + 1]])).long()
    offsets = torch.arange(SIDE)
    rows, columns = rows[:, None, None] + offsets[:, None], columns[:, None, None] + offsets
    windows = pictures.movedim(1, -1)[picks[:, None, None], rows, columns]  # [n, h, w, C]
    return windows.movedim(-1, 1).flatten(1)


def _in_order(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The rows of all parts in the order of their numbers; parts are ([n], [n, ..])."""
    numbers, rows = (torch.cat(part) for part in zip(*parts, strict=True))
    return rows[numbers.argsort()]


def normalise(windows: Tensor) -> Tensor:
    """[n, D] -> [n, D], each with mean 0 and standard deviation 1, less for one of low contrast"""
    centred = windows - windows.mean(1, keepdim=True)
    return centred * (centred.square().mean(1, keepdim=True) + CONTRAST).rsqrt()


def learn_filters(windows: Tensor, num: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """[n, D] -> filters [num, D] for unwhitened windows, and the offset [num] of their responses.

    Spherical k-means on whitened windows in which a window belongs to the filter with the largest response of either
    sign (Coates and Ng 2012, section 2).
    """
    mean = windows.mean(0)
    values, vectors = torch.linalg.eigh((windows - mean).T @ (windows - mean) / len(windows))
    whitening = vectors @ ((values + RIDGE).rsqrt()[:, None] * vectors.T)
    white = (windows - mean) @ whitening
    words = F.normalize(white[torch.randperm(len(white), generator=generator)[:num]], dim=1)
    for _ in range(ROUNDS):
        responses = white @ words.T
        nearest = responses.abs().argmax(1)
        weights = responses.gather(1, nearest[:, None])
        words = F.normalize(torch.zeros_like(words).index_add_(0, nearest, white * weights) + 1e-3 * words, dim=1)
    filters = words @ whitening
    return filters - filters.mean(1, keepdim=True), -filters @ mean


def chunks(pictures: Tensor, num_filters: int) -> tuple[Tensor, ...]:
    """Parts of the pictures whose responses fit; all at once where a graph is recorded."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return (pictures,)
    responses = num_filters * math.prod(pictures.shape[-2:]) // STRIDE**2
    return pictures.split(max(1, CHUNK["cpu" if pictures.device.type == "cpu" else "accelerator"] // responses))

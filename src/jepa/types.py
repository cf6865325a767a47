"""The nouns of the project: static geometry, tensors that travel together, and the protocols of the components.

Legend of shape letters: B batch, C channels, T frames, H W pixels, N tokens of the full grid, K context tokens,
M target blocks, J tokens of one target block, D width of the encoder. Nothing here imports torch at run time, so that a
configuration can be checked in a moment.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Protocol, Self, runtime_checkable

if TYPE_CHECKING:
    from torch import Generator, Tensor


@dataclass(frozen=True)
class Traits:
    """Attributes that a component may have, each with what holds where it has none of that name."""

    @classmethod
    def of(cls, component: Any) -> Self:
        names = [trait.name for trait in fields(cls) if hasattr(component, trait.name)]
        return cls(**{name: getattr(component, name) for name in names})


@dataclass(frozen=True)
class Within:
    """Bounds of a number, or of two numbers of which the smaller comes first; stands in an annotation.

    Annotations of a component's constructor are checked before torch is imported, and by `jepa.config.build_with`.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    """whether `low` itself is out of bounds"""
    below: bool = False
    """whether `high` itself is out of bounds"""

    def __contains__(self, value: float | Sequence[float]) -> bool:
        if not isinstance(value, int | float):
            return len(value) == 2 and value[0] <= value[1] and value[0] in self and value[1] in self
        is_above = value > self.low if self.above else value >= self.low
        return is_above and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        if not (self.above or self.below or math.inf in (-self.low, self.high)):
            return f"from {self.low:g} to {self.high:g}"
        low = f"{'above' if self.above else 'at least'} {self.low:g}"
        return low if self.high == math.inf else f"{low} and {'below' if self.below else 'at most'} {self.high:g}"


PositiveInt = Annotated[int, Within(1)]
NonNegativeInt = Annotated[int, Within(0)]
Seed = Annotated[int, Within(0, 4294967295)]
Positive = Annotated[float, Within(0, above=True)]
NonNegative = Annotated[float, Within(0)]
Share = Annotated[float, Within(0, 1)]
PositiveShare = Annotated[float, Within(0, 1, above=True)]
ShareBelowOne = Annotated[float, Within(0, 1, below=True)]
Channels = Annotated[int, Literal[1, 3]]
ScaleRange = Annotated[list[float], Within(0, 1, above=True)]
"""smallest and largest share of an area"""

ClipShape = tuple[int, int, int, int]
"""(C, T, H, W) of what a data set delivers after augmentation; an image has T = 1."""


@dataclass(frozen=True)
class PatchGrid:
    """Patches in time, height and width; token n sits at (n // (h*w), n // w % h, n % w)."""

    t: int
    h: int
    w: int

    def __post_init__(self) -> None:
        if min(self.t, self.h, self.w) < 1:
            raise ValueError(f"a patch grid needs at least one patch on each axis, got {self.t}x{self.h}x{self.w}")

    @property
    def num_tokens(self) -> int:
        return self.t * self.h * self.w

    def num_context(self, ratio: float) -> int:
        """Tokens left to the context encoder when the share `ratio` of the grid is hidden from it."""
        return self.num_tokens - round(self.num_tokens * ratio)


@dataclass(frozen=True)
class Field:
    """What a data set says of each sample besides its pixels and its label, e.g. boxes or actions."""

    shape: tuple[int, ...] = ()
    """of one sample, without the leading dimension of a ragged field"""
    ragged: bool = False
    """whether there is a leading dimension whose length varies between samples; a batch pads it with `padding`"""
    dtype: Literal["float32", "int64"] = "float32"
    padding: float = -1.0
    names: tuple[str, ...] = ()
    """of the last dimension, e.g. "position/x", "position/y": one probe for what shares the part before the slash"""


NO_FIELDS: Mapping[str, Field] = MappingProxyType({})


class Sample(NamedTuple):
    """What a data set delivers: `(clip, label)`, and where it declares `fields`, their values."""

    clip: Tensor
    """uint8 [C, T, H, W] of any H and W"""
    label: int = -1
    """-1 where there is none"""
    fields: Mapping[str, Tensor] = MappingProxyType({})
    """of each declared field the tensor [*shape], or [m, *shape] where it is ragged"""


class RawBatch(NamedTuple):
    """What the loader delivers: whole decoded images, before augmentation."""

    pixels: Tensor
    """uint8 [B, C, T, Hmax, Wmax], each sample in the upper left corner of its canvas"""
    sizes: Tensor
    """long [B, 2]: true height and width of each sample"""
    fields: dict[str, Tensor]
    """labels: long [B], -1 where there is none; and what else was asked for: [B, *shape], ragged [B, M, *shape]"""
    broken: Tensor
    """long [b]: data set indices that could not be read and were replaced by another sample"""
    parts: Tensor
    """long [B]: which part of a mixture each sample is of; zeros without"""

    @property
    def labels(self) -> Tensor:
        return self.fields["labels"]

    def map(self, change: Callable[[Tensor], Tensor]) -> RawBatch:
        """The same batch after `change` of every tensor, e.g. on another device."""
        fields = {name: change(field) for name, field in self.fields.items()}
        return RawBatch(change(self.pixels), change(self.sizes), fields, change(self.broken), change(self.parts))


class Batch(NamedTuple):
    """What an objective sees."""

    clips: Tensor
    """float [B, C, T, H, W], normalised"""
    fields: dict[str, Tensor]
    """labels, and what else the objective needs; as in RawBatch, but of what `clips` show"""
    views: int = 1
    """crops of each sample: rows v, v + 1, ... v + views - 1 show the same one"""
    local: Tensor | None = None
    """float [B / views * local views, C, T, h, w]: smaller crops of each sample, side by side"""

    @property
    def labels(self) -> Tensor:
        """long [B], -1 where there is none; for evaluation, never for the loss of a self-supervised objective"""
        return self.fields["labels"]

    def rows(self, start: int, count: int) -> Batch:
        """The part of so many samples, from sample `start` on."""
        part = slice(start * self.views, (start + count) * self.views)
        local = self.local
        if local is not None:
            num_local = len(local) * self.views // len(self.clips)
            local = local[start * num_local : (start + count) * num_local]
        fields = {name: field[part] for name, field in self.fields.items()}
        return Batch(self.clips[part], fields, self.views, local)


class Masks(NamedTuple):
    """Which tokens are seen and which are predicted: sorted, disjoint, rectangular."""

    context: Tensor
    """long [B, K]"""
    targets: Tensor
    """long [B, M, J]"""

    @property
    def hides_some(self) -> bool:
        """Whether there is anything to predict."""
        return self.targets.numel() > 0

    @property
    def sets(self) -> tuple[Masks, ...]:
        """The mask sets of each sample, each with sizes of its own; most maskers draw one."""
        return (self,)

    def map(self, change: Callable[[Tensor], Tensor]) -> Masks:
        """The same masks after `change` of every tensor, e.g. on another device or of some rows."""
        return Masks(change(self.context), change(self.targets))


class MaskSets(Masks):
    """Several mask sets of the same samples; read as Masks it is the first of them."""

    _sets: tuple[Masks, ...]

    def __new__(cls, sets: Sequence[Masks]) -> MaskSets:
        self = super().__new__(cls, *sets[0])
        self._sets = tuple(sets)
        return self

    @property
    def sets(self) -> tuple[Masks, ...]:
        return self._sets

    def map(self, change: Callable[[Tensor], Tensor]) -> MaskSets:
        return MaskSets([masks.map(change) for masks in self._sets])


class Latents(NamedTuple):
    """What a regulariser sees of one mask set."""

    context: Tensor
    """[B, K, D], of the context encoder"""
    predicted: Tensor
    """[B, M, J, D], of the predictor"""
    masks: Masks
    grid: PatchGrid
    views: int
    """as in Batch"""
    local: Latents | None = None
    """of the smaller crops, with their own number of views"""


class LossOutput(NamedTuple):
    """A NamedTuple, since DDP(static_graph=True) stops averaging gradients when forward returns a dataclass."""

    loss: Tensor
    """float32 scalar"""
    metrics: dict[str, Tensor]
    """detached float32 scalars, on the device"""
    embedding: Tensor
    """[B, D], detached: one vector per sample"""


class Masker(Protocol):
    """Draws masks on the CPU; everything random comes from the generator. `num_sets`, where there, counts its sets.

    One that takes a third argument `rows` returns these rows [b] of the batch alone, the same as among all of them.
    """

    def __call__(self, batch_size: int, generator: Generator) -> Masks: ...


class Encoder(Protocol):
    """A module that maps clips [B, C, T, H, W] to tokens: [B, N, D], or [B, K, D] of the tokens `keep` [B, K]."""

    grid: PatchGrid
    clip_shape: ClipShape
    embed_dim: int
    num_heads: int

    def __call__(self, clips: Tensor, keep: Tensor | None = None) -> Tensor: ...

    def grid_of(self, clips: Tensor) -> PatchGrid:
        """The grid of tokens that such clips give; `grid` is that of `clip_shape`."""
        ...


class Predictor(Protocol):
    """A module that maps context tokens [B, K, D] to predictions [B, M, J, D] on `grid`, with mask token `mask_set`."""

    def __call__(self, context: Tensor, masks: Masks, grid: PatchGrid | None = None, mask_set: int = 0) -> Tensor: ...


class Regularizer(Protocol):
    """A module: float32 scalar that is already weighted, and its terms before weighting, detached, by name."""

    def __call__(self, latents: Latents) -> tuple[Tensor, dict[str, Tensor]]: ...


class Dataset(Protocol):
    """Pure in the index: the same index gives the same clip, in any process."""

    classes: tuple[str, ...]
    """names of the labels; empty when there are none"""
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """of pixel values in [0, 1], one per channel"""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        """(clip, label) or a Sample: readers take Sample(*dataset[index]). OSError or RuntimeError when unreadable."""
        ...

    def describe(self, index: int) -> str:
        """Where the sample comes from, for messages: a path, or a name and a number."""
        ...

    def validation(self) -> Dataset | None:
        """The held-out part that labels are probed on, None when the data set has none."""
        ...


@dataclass(frozen=True)
class DatasetTraits(Traits):
    """Optional attributes of a data set."""

    fields: Mapping[str, Field] = field(default_factory=dict)
    labels: Any = None
    """[n] of all samples, -1 without; None where only reading tells them"""
    in_memory: bool = False
    """whether samples take next to no time to make, so that workers are not worth it"""
    num_frames: int = 1
    source: Callable[[int], int] = lambda index: index
    """number of what a sample is taken from, e.g. of its video: samples of one source are no test of each other"""
    test: Callable[[], Dataset | None] = lambda: None
    """the part that a detector is judged on once, at the end of a run"""
    index_order: Callable[[int, int], Callable[[int], tuple[int, int]]] | None = None
    """(batch_size, seed) -> its own order: position in the endless stream -> index and epoch"""
    part_of: Callable[[int], tuple[int, range]] | None = None
    """number of the part of a mixture that an index belongs to, and that part's indices"""
    parts: Sequence[Dataset] = ()
    part_names: tuple[str, ...] = ()
    probe_dataset: Dataset | None = None
    """the part of a mixture that evaluations see"""


@runtime_checkable
class ClipDataset(Dataset, Protocol):
    """A data set of clips: its constructor takes `num_frames`."""

    num_frames: int

    def draw(self, index: int, seed: int) -> tuple[Any, ...]:
        """As `self[index]`, which is the same for ever, but somewhere in the video: pure in index and seed."""
        ...

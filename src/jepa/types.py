"""Types that all parts share: patch grid, batches, masks, and the protocols of the components. Without torch.

Legend of shape letters: B batch, C channels, T frames, H W pixels, N tokens of the full grid, K context tokens,
M target blocks, J tokens of one target block, D width of the encoder.
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
    """Optional attributes of a component with their defaults."""

    @classmethod
    def of(cls, component: Any) -> Self:
        names = [trait.name for trait in fields(cls) if hasattr(component, trait.name)]
        return cls(**{name: getattr(component, name) for name in names})


@dataclass(frozen=True)
class Within:
    """Bounds of a number, or of two numbers in ascending order, as metadata of an annotation.

    Annotations of constructors are checked before torch is imported, and by `jepa.config.build_with`.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    """True if `low` itself is out of bounds"""
    below: bool = False
    """True if `high` itself is out of bounds"""

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
Bands = Annotated[int, Within(1, 16)]
"""Channels of pictures in files, which need not be colours."""
ClassLevel = Annotated[int, Within(0, 2)]
"""Depth of the folders that are classes; 0 for files without classes."""
ScaleRange = Annotated[list[float], Within(0, 1, above=True)]
"""Smallest and largest share of an area."""

Precision = Annotated[str, Literal["auto", "bf16", "fp32"]]
Readout = Literal["mean", "mean_std", "steps", "grid2", "layers", "tokens", "cls"]
"""What a probe reads of an encoder's tokens, as jepa.evaluation.readout.READOUTS explains."""
StemName = Literal["linear", "conv", "residual", "dictionary"]
"""What a token sees of its patch, before the transformer."""
HeadName = Literal[
    "dynamics", "metric", "probe", "value", "distance", "policy", "clone", "reward", "continuation", "return", "decoder"
]
"""A network on the frozen states of a world model; jepa.planning.heads, .refit and .metric explain each."""

ClipShape = tuple[int, int, int, int]
"""(C, T, H, W) of an augmented clip; an image has T = 1."""


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
        """Number of context tokens if the share `ratio` of the grid is hidden."""
        return self.num_tokens - round(self.num_tokens * ratio)


@dataclass(frozen=True)
class ActionSpace:
    """Continuous actions between bounds, one number for each axis, or one of `num_actions` discrete actions."""

    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    num_actions: int = 0

    @property
    def is_discrete(self) -> bool:
        return self.num_actions > 0

    @property
    def size(self) -> int:
        """Numbers of an action as input of a model: its axes, or a one-hot code."""
        return self.num_actions or len(self.low)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an action as it is stored."""
        return () if self.is_discrete else (len(self.low),)

    def unscale(self, actions: Any) -> Any:
        """An array or tensor [.., A] of actions from -1 to 1 -> between the bounds; discrete ones stay as they are."""
        if self.is_discrete:
            return actions
        share = (actions.clip(-1, 1) + 1) / 2
        make = share.new_tensor if hasattr(share, "new_tensor") else share.dtype.type
        low, high = make(self.low), make(self.high)
        return low + share * (high - low)


@dataclass(frozen=True)
class Field:
    """A quantity that each sample has besides pixels and label, e.g. boxes or actions."""

    shape: tuple[int, ...] = ()
    """shape for one sample, without the leading dimension of a ragged field"""
    ragged: bool = False
    """True if the length of a leading dimension varies between samples; a batch pads it with `padding`"""
    dtype: Literal["float32", "int64"] = "float32"
    padding: float = -1.0
    names: tuple[str, ...] = ()
    """names of the last dimension, e.g. "position/x", "position/y"; one probe for each name before the slash"""
    space: ActionSpace | None = None
    """of a field of actions"""


NO_FIELDS: Mapping[str, Field] = MappingProxyType({})


class Sample(NamedTuple):
    """An item of a data set: `(clip, label)`, and the values of the `fields` that it declares."""

    clip: Tensor
    """uint8 [C, T, H, W] of any H and W"""
    label: int = -1
    """-1 for an unlabelled sample"""
    fields: Mapping[str, Tensor] = MappingProxyType({})
    """name of each declared field -> tensor [*shape], ragged [m, *shape]"""


class RawBatch(NamedTuple):
    """A batch of the loader: whole decoded images, before augmentation."""

    pixels: Tensor
    """uint8 [B, C, T, Hmax, Wmax], each sample in the upper left corner of its canvas"""
    sizes: Tensor
    """long [B, 2]: true height and width of each sample"""
    fields: dict[str, Tensor]
    """labels: long [B], -1 if unlabelled; requested fields: [B, *shape], ragged [B, M, *shape]"""
    broken: Tensor
    """long [b]: data set indices of unreadable samples, which were replaced by others"""
    parts: Tensor
    """long [B]: part of the mixture that each sample is from; zeros without a mixture"""

    @property
    def labels(self) -> Tensor:
        return self.fields["labels"]

    def map(self, change: Callable[[Tensor], Tensor]) -> RawBatch:
        """The batch with `change` applied to every tensor, e.g. a move to another device."""
        fields = {name: change(field) for name, field in self.fields.items()}
        return RawBatch(change(self.pixels), change(self.sizes), fields, change(self.broken), change(self.parts))


class Batch(NamedTuple):
    """The input of an objective."""

    clips: Tensor
    """float [B, C, T, H, W], normalised"""
    fields: dict[str, Tensor]
    """labels and the fields that the objective needs, as in RawBatch, but transformed with the clips"""
    views: int = 1
    """crops of each sample, in consecutive rows"""
    local: Tensor | None = None
    """float [B / views * local views, C, T, h, w]: smaller crops of each sample, in consecutive rows"""

    @property
    def labels(self) -> Tensor:
        """long [B], -1 if unlabelled; for evaluation, never for the loss of a self-supervised objective"""
        return self.fields["labels"]

    def rows(self, start: int, count: int) -> Batch:
        """The part with `count` samples from sample `start` on."""
        part = slice(start * self.views, (start + count) * self.views)
        local = self.local
        if local is not None:
            num_local = len(local) * self.views // len(self.clips)
            local = local[start * num_local : (start + count) * num_local]
        fields = {name: field[part] for name, field in self.fields.items()}
        return Batch(self.clips[part], fields, self.views, local)


class Masks(NamedTuple):
    """Indices of context and target tokens: sorted, disjoint, the same number for every sample."""

    context: Tensor
    """long [B, K]"""
    targets: Tensor
    """long [B, M, J]"""

    @property
    def hides_some(self) -> bool:
        """True if there are tokens to predict."""
        return self.targets.numel() > 0

    @property
    def sets(self) -> tuple[Masks, ...]:
        """The mask sets, each with its own K, M and J; most maskers draw one."""
        return (self,)

    def map(self, change: Callable[[Tensor], Tensor]) -> Masks:
        """The masks with `change` applied to every tensor, e.g. a selection of rows."""
        return Masks(change(self.context), change(self.targets))


class MaskSets(Masks):
    """Several mask sets of the same samples; as Masks it is the first of them."""

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
    """The input of a regulariser, for one mask set."""

    context: Tensor
    """[B, K, D]: output of the context encoder"""
    predicted: Tensor
    """[B, M, J, D]: output of the predictor"""
    masks: Masks
    grid: PatchGrid
    views: int
    """as in Batch"""
    local: Latents | None = None
    """latents of the smaller crops, with their own number of views"""
    frames_apart: bool = False
    """True if each time step, not each clip, is a sample of statistics over the batch"""


class LossOutput(NamedTuple):
    """A NamedTuple, because DDP(static_graph=True) stops averaging gradients if forward returns a dataclass."""

    loss: Tensor
    """float32 scalar"""
    metrics: dict[str, Tensor]
    """detached float32 scalars, on the device"""
    embedding: Tensor
    """[B, D], detached: one vector per sample"""


class Masker(Protocol):
    """Draws masks on the CPU, with all randomness from the generator; optional attribute `num_sets`.

    With an optional third argument `rows` [b], it returns only these rows of the masks of the whole batch.
    """

    def __call__(self, batch_size: int, generator: Generator) -> Masks: ...


class Encoder(Protocol):
    """Module: clips [B, C, T, H, W] -> tokens [B, N, D], or only the tokens `keep` [B, K] -> [B, K, D]."""

    grid: PatchGrid
    clip_shape: ClipShape
    embed_dim: int
    num_heads: int

    def __call__(self, clips: Tensor, keep: Tensor | None = None) -> Tensor: ...

    def grid_of(self, clips: Tensor) -> PatchGrid:
        """The token grid of clips of this size; `grid` is that of `clip_shape`."""
        ...


class Predictor(Protocol):
    """Module: context tokens [B, K, D] -> predictions [B, M, J, D] on `grid`, with mask token `mask_set`."""

    def __call__(self, context: Tensor, masks: Masks, grid: PatchGrid | None = None, mask_set: int = 0) -> Tensor: ...


class Regularizer(Protocol):
    """Module: latents -> weighted float32 scalar, and its detached unweighted terms by name."""

    def __call__(self, latents: Latents) -> tuple[Tensor, dict[str, Tensor]]: ...


class Dataset(Protocol):
    """A map-style data set: the same index gives the same clip in every process."""

    classes: tuple[str, ...]
    """names of the labels; empty if there are none"""
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """of pixel values in [0, 1], one for each channel"""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        """(clip, label) or a Sample; raises OSError or RuntimeError for an unreadable sample."""
        ...

    def describe(self, index: int) -> str:
        """Origin of the sample for messages: a path, or a name and a number."""
        ...

    def validation(self) -> Dataset | None:
        """The held-out part that probes are evaluated on, None if there is none."""
        ...


@dataclass(frozen=True)
class DatasetTraits(Traits):
    """Optional attributes of a data set."""

    fields: Mapping[str, Field] = field(default_factory=dict)
    labels: Any = None
    """labels [n] of all samples, -1 if unlabelled; None if they are known only after reading"""
    in_memory: bool = False
    """True if samples are so fast to make that worker processes are not worth their start"""
    num_frames: int = 1
    source: Callable[[int], int] = lambda index: index
    """index -> number of its source, e.g. its video; samples of one source are not split into training and test"""
    test: Callable[[], Dataset | None] = lambda: None
    """the part that a detector is evaluated on once, at the end of a run"""
    index_order: Callable[[int, int], Callable[[int], tuple[int, int]]] | None = None
    """(batch_size, seed) -> order of the data set: position in the endless stream -> (index, epoch)"""
    part_of: Callable[[int], tuple[int, range]] | None = None
    """index -> number of its part in a mixture, and the indices of that part"""
    parts: Sequence[Dataset] = ()
    part_names: tuple[str, ...] = ()
    encoded: Callable[[int], bytes] | None = None
    """index -> encoded bytes of the sample or their beginning, the same wherever the data lie"""
    prepare: Callable[[Sequence[int]], None] = lambda indices: None
    """called before `encoded` is asked for these samples: data on a server are read many at a time"""
    outline: Callable[[int], Any] | None = None
    """index -> what is known of a sample of a file without its contents, as its size; the same wherever the data lie"""
    modified: Callable[[int], Any] = lambda index: None
    """index -> value that changes whenever the sample is written again, e.g. size and time of its file"""
    world: Mapping[str, Any] = field(default_factory=dict)
    """of recorded episodes: `frame_shape`, `frame_skip` and the node of the environment, `env`"""
    grows: bool = False
    """True if samples may be added while a run is stopped; those that were there keep their numbers"""
    probe_dataset: Dataset | None = None
    """the part of a mixture that evaluations see"""


@runtime_checkable
class ClipDataset(Dataset, Protocol):
    """A data set of clips: its constructor takes `num_frames`."""

    num_frames: int

    def draw(self, index: int, seed: int) -> tuple[Any, ...]:
        """As `self[index]`, but at a position in the video that depends on index and seed only."""
        ...

"""The values that camserve's parts hand to each other. Frozen; no torch, no gRPC, no protobuf."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from camserve.errors import CamserveError, InvalidOption

if TYPE_CHECKING:
    from PIL import Image

    from camserve.methods import MethodSpec

Precision = Literal["exact", "bfloat16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
MapSize = Literal["input", "layer", "original"]
MAP_SIZES: tuple[MapSize, ...] = get_args(MapSize)


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the network's input: resize the shorter side, crop the centre, scale, normalise."""

    resize_px: int
    """Length of the shorter side after resizing."""
    crop_px: tuple[int, int]
    """(height, width) of the centre crop, which is the network's input size."""
    mean: tuple[float, float, float]
    """Subtracted from pixels in [0, 1], by channel (RGB)."""
    std: tuple[float, float, float]
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bicubic"


@dataclass(frozen=True)
class InputView:
    """Which part of the sent image the network saw."""

    original_size: tuple[int, int]
    """(height, width) of the sent image in pixels, after EXIF orientation."""
    crop: tuple[float, float, float, float]
    """(left, top, right, bottom) of the part seen, in pixels of the sent image."""
    size: tuple[int, int]
    """(height, width) of the network's input in pixels."""


@dataclass(frozen=True)
class Target:
    """A class to explain: exactly one of the three."""

    index: int | None = None
    label: str | None = None
    top_k: int | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.index, self.label, self.top_k) if value is not None]
        if len(given) != 1:
            raise InvalidOption(f"a target is an index, a label or top_k: exactly one, got {len(given)}")
        if self.top_k is not None and self.top_k < 1:
            raise InvalidOption(f"top_k must be at least 1, got {self.top_k}")

    @classmethod
    def of(cls, value: TargetLike) -> Target:
        """A class index, a label, or a Target as it is."""
        if isinstance(value, Target):
            return value
        return cls(label=value) if isinstance(value, str) else cls(index=int(value))


TargetLike = Target | int | str
"""What callers may pass as a target: an index, a label, or a Target."""


@dataclass(frozen=True)
class Prediction:
    """A class with its softmax probability for the unmasked image."""

    index: int
    label: str
    probability: float


@dataclass(frozen=True)
class BoxOptions:
    """Boxes around what a map marks (Grad-CAM paper, sec. 4.1: threshold at 15 % of the maximum)."""

    threshold: float = 0.15
    all_components: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise InvalidOption(f"box threshold must be 0..1, got {self.threshold}")


@dataclass(frozen=True)
class Box:
    """Half-open, in pixels of the sent image."""

    left: float
    top: float
    right: float
    bottom: float
    score: float
    """Mean of the map inside the component."""


@dataclass(frozen=True)
class Cost:
    """What an explanation took."""

    queries: int
    """Masked forward passes."""
    stage_seconds: Mapping[str, float]
    """Seconds by stage: queue, decode, forward, queries, merge, render; those that apply."""
    steps: int
    precision: Precision
    worker: str


@dataclass(frozen=True)
class SaliencyMap:
    """The final map of one method and target."""

    method: MethodSpec
    target: Prediction
    layer: str
    array: np.ndarray = field(repr=False)
    """float32 (height, width) in [0, 1]."""
    value_range: tuple[float, float]
    """(minimum, maximum) of the weighted sum before normalisation."""
    degenerate: bool
    """No positive evidence, or constant: all zeros."""
    complete: bool
    """Every query of the method was answered."""
    boxes: tuple[Box, ...] = ()
    image: Image.Image | None = field(default=None, repr=False)
    """What the map lies on: the network's view, or the sent image for a map of its size."""

    def overlay(self, colormap: str = "jet", opacity: float = 0.5) -> Image.Image:
        """The map in colours over the image.

        Raises:
            InvalidOption: unknown colormap, or opacity outside 0..1.
        """
        from camserve.finalise.render import overlay  # Pillow stays out of `import camserve`

        if self.image is None:
            raise InvalidOption("this map has no image to lie on: ask for size INPUT or ORIGINAL")
        return overlay(self.image, self.array, colormap=colormap, opacity=opacity)


@dataclass(frozen=True)
class Explanation:
    """The answer to one request."""

    model: str
    version: str
    predictions: tuple[Prediction, ...]
    """The most probable classes, first the most probable."""
    maps: tuple[SaliencyMap, ...]
    """For each method in the order asked, one for each target."""
    input: InputView
    cost: Cost


@dataclass(frozen=True)
class Layer:
    """A layer that can be explained."""

    name: str
    channels: int
    height: int
    width: int


@dataclass(frozen=True)
class Task:
    """A range of one method's queries, numbered as `MethodSpec.queries` counts them; cut off at their total."""

    position: int
    """Place of the method in the request."""
    method: MethodSpec
    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise InvalidOption(f"a query range must be 0 <= start <= stop, got {self.start}..{self.stop}")


@dataclass(frozen=True)
class Item:
    """The slice of one request inside a step."""

    image: bytes | np.ndarray
    """An encoded file, or pixels: uint8 (H, W, 3), or float32 (H, W, 3) in [0, 1] of the network's input size."""
    targets: tuple[Target, ...]
    tasks: tuple[Task, ...]
    layer: str = ""
    """Empty: the model's default layer."""
    top_predictions: int = 5
    precision: Precision = "exact"

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise InvalidOption(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.top_predictions < 0:
            raise InvalidOption(f"top_predictions must be at least 0, got {self.top_predictions}")


@dataclass(frozen=True)
class Partial:
    """The mergeable result of one task: merging the partials of disjoint query ranges gives that of their union."""

    position: int
    queries: int
    """Masked forward passes made."""
    sums: np.ndarray = field(repr=False)
    """(targets, height, width) at the layer's resolution: queries' masks weighted by their scores."""

    def merge(self, other: Partial) -> Partial:
        """The partial of both ranges; sums are kept in float64, so that the order of merging does not show."""
        sums = self.sums.astype(np.float64) + other.sums
        return Partial(self.position, self.queries + other.queries, sums)


@dataclass(frozen=True)
class ItemResult:
    """What a worker answers for one item."""

    predictions: tuple[Prediction, ...]
    """The most probable classes."""
    targets: tuple[Prediction, ...]
    """The item's targets, resolved to classes."""
    view: InputView
    layer: str
    partials: tuple[Partial, ...]
    """One for each task."""


@dataclass(frozen=True)
class StepResult:
    """What a worker answers for a step."""

    outcomes: tuple[ItemResult | CamserveError, ...]
    """As many as the step's items, in their order; a failing item does not touch the others."""
    stage_seconds: Mapping[str, float]
    """Seconds of the whole step by stage: decode, forward, queries."""
    worker: str
    """Host, process and device."""


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a served model."""

    name: str
    version: str
    labels: tuple[str, ...]
    input_size: tuple[int, int]
    """(height, width) in pixels."""
    layers: tuple[Layer, ...]
    """Every layer that can be explained, in the order of the forward pass."""
    default_layer: str
    source: str = ""
    licence: str = ""

    def layer(self, name: str) -> Layer:
        """The layer of this name; the default layer for "".

        Raises:
            InvalidOption: there is no such layer; the text names the nearest ones.
        """
        name = name or self.default_layer
        for layer in self.layers:
            if layer.name == name:
                return layer
        near = difflib.get_close_matches(name, [layer.name for layer in self.layers], n=5, cutoff=0.4)
        hint = f"; close to it: {', '.join(near)}" if near else ""
        raise InvalidOption(f"unknown layer {name!r}; the default is {self.default_layer!r}{hint}")

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
DEFAULT_CURVE_STEPS = 28
"""RISE's: of 224 x 224 pixels each step changes 1792."""
MAX_CURVE_STEPS = 4096
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
MapSize = Literal["input", "layer", "original"]
MAP_SIZES: tuple[MapSize, ...] = get_args(MapSize)
Priority = Literal["interactive", "normal", "batch"]
PRIORITIES: tuple[Priority, ...] = get_args(Priority)
Fusion = Literal["mean", "max"]
FUSIONS: tuple[Fusion, ...] = get_args(Fusion)


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
class StreamOptions:
    """How often a stream has maps before the final ones."""

    max_maps: int = 8
    """At most so many times; 0: only progress."""
    min_interval_s: float = 0.25
    """Between two of them, at least."""

    def __post_init__(self) -> None:
        if self.max_maps < 0:
            raise InvalidOption(f"max_maps must be at least 0, got {self.max_maps}")
        if not self.min_interval_s >= 0:
            raise InvalidOption(f"min_interval_s must be at least 0, got {self.min_interval_s}")


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
    """Images that went through the network beyond the first forward pass, those of evaluations included."""
    stage_seconds: Mapping[str, float]
    """Seconds by stage: queue, decode, forward, queries, merge, render; those that apply."""
    steps: int
    precision: Precision
    worker: str
    evaluation_queries: int = 0
    """Masked forward passes of deletion and insertion curves."""
    cached: bool = False
    """The answer was made for an earlier request that was the same; the other figures are that one's."""


@dataclass(frozen=True)
class Faithfulness:
    """What the class's probability does while pixels go, or come, in order of their saliency."""

    protocol: str
    deletion: np.ndarray = field(repr=False)
    """(points,), float64: probabilities from the image to zeros, the most salient pixels first."""
    insertion: np.ndarray = field(repr=False)
    """(points,), float64: probabilities from the blurred image to the image, the most salient pixels first."""

    @property
    def deletion_auc(self) -> float:
        """Small is good."""
        return auc(self.deletion)

    @property
    def insertion_auc(self) -> float:
        """Large is good."""
        return auc(self.insertion)

    @property
    def overall(self) -> float:
        """Insertion - deletion."""
        return self.insertion_auc - self.deletion_auc


def auc(scores: np.ndarray) -> float:
    """Area under a curve by the trapezoid rule, its width being 1: RISE, `evaluation.py`.

    Args:
        scores: (points,), at least two.
    """
    return float((scores.sum() - scores[0] / 2 - scores[-1] / 2) / (len(scores) - 1))


@dataclass(frozen=True)
class SaliencyMap:
    """The final map of one method and target."""

    method: MethodSpec
    target: Prediction
    layers: tuple[str, ...]
    """Whose activations it is made of; several are fused."""
    array: np.ndarray = field(repr=False)
    """float32 (height, width) in [0, 1]."""
    value_range: tuple[float, float]
    """(minimum, maximum) of the weighted sum, or of the fusion of several layers' maps, before normalisation."""
    degenerate: bool
    """No positive evidence, or constant: all zeros."""
    complete: bool
    """Every query of the method was answered."""
    fraction: float = 1.0
    """Share of the method's queries that it is made of."""
    choice: str = ""
    """Why a server chose this method, where it did."""
    boxes: tuple[Box, ...] = ()
    image: Image.Image | None = field(default=None, repr=False)
    """What the map lies on: the network's view, or the sent image for a map of its size."""
    faithfulness: Faithfulness | None = None
    """Deletion and insertion of this map, if they were asked for."""

    @property
    def layer(self) -> str:
        """The layer's name; the names of several, joined by " + "."""
        return " + ".join(self.layers)

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
    request_id: str = ""
    """Under which the server's log has the call; "" without a server."""


@dataclass(frozen=True)
class Layer:
    """A layer that can be explained."""

    name: str
    channels: int
    height: int
    width: int


@dataclass(frozen=True, eq=False)
class MapCurves:
    """Deletion and insertion of a finished map by the RISE protocol, as masked queries: first the points of deletion,
    then those of insertion."""

    saliency: np.ndarray = field(repr=False)
    """(H, W) float32, of the network's input size."""
    target: int
    """Index of the class that the map explains."""
    steps: int = DEFAULT_CURVE_STEPS

    @property
    def points(self) -> int:
        """Of each curve; a step changes ceil(H W / steps) pixels, the last one perhaps fewer."""
        pixels = self.saliency.size
        return -(-pixels // -(-pixels // self.steps)) + 1

    def queries(self, channels: int, targets: int) -> int:
        """Both curves' points."""
        return 2 * self.points


@dataclass(frozen=True)
class Task:
    """A range of one method's queries, numbered as `MethodSpec.queries` counts them; cut off at their total."""

    position: int
    """Place among the parts of the request; the answer names it."""
    method: MethodSpec | MapCurves
    start: int
    stop: int
    layer: str = ""
    """Empty: the model's default layer."""
    numbers: tuple[int, ...] = ()
    """The queries asked, where start..stop-1 are places in an order of them; empty: they are the numbers."""
    ordered: bool = False
    """Start..stop-1 are places in the worker's own order, the queries that matter most first; it returns the order."""

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise InvalidOption(f"a query range must be 0 <= start <= stop, got {self.start}..{self.stop}")
        if self.numbers and len(self.numbers) != self.stop - self.start:
            raise InvalidOption(f"{self.stop - self.start} queries, {len(self.numbers)} numbers")


@dataclass(frozen=True)
class Item:
    """The slice of one request inside a step."""

    image: bytes | np.ndarray
    """An encoded file, or pixels: uint8 (H, W, 3), or float32 (H, W, 3) in [0, 1] of the network's input size."""
    targets: tuple[Target, ...]
    tasks: tuple[Task, ...]
    top_predictions: int = 5
    precision: Precision = "exact"
    deadline_unix_s: float = 0.0
    """Unix time after which nobody waits for the answer; 0: never."""

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
    """(targets, height, width) at the layer's resolution: queries' masks weighted by their scores. Of `MapCurves`
    (1, 2, points): the scores asked, zeros elsewhere."""
    order: tuple[int, ...] = ()
    """Every query's number, those that matter most first, where the task asked for it and the method has one."""

    def merge(self, other: Partial) -> Partial:
        """The partial of both ranges; sums are kept in float64, so that the order of merging does not show."""
        sums = self.sums.astype(np.float64) + other.sums
        return Partial(self.position, self.queries + other.queries, sums, self.order or other.order)


@dataclass(frozen=True)
class ItemResult:
    """What a worker answers for one item."""

    predictions: tuple[Prediction, ...]
    """The most probable classes."""
    targets: tuple[Prediction, ...]
    """The item's targets, resolved to classes."""
    view: InputView
    partials: tuple[Partial, ...]
    """One for each task."""


@dataclass(frozen=True)
class DeviceMemory:
    """Memory of the device that a worker computes on."""

    device: str
    """cpu, cuda:0, ..."""
    used_bytes: int
    """By every process of a GPU; on a CPU the worker's resident memory."""
    limit_bytes: int
    """What the device has; on a CPU the machine, or the container if it has less."""


@dataclass(frozen=True)
class StepResult:
    """What a worker answers for a step."""

    outcomes: tuple[ItemResult | CamserveError, ...]
    """As many as the step's items, in their order; a failing item does not touch the others."""
    stage_seconds: Mapping[str, float]
    """Seconds of the whole step by stage: decode, forward, queries."""
    worker: str
    """Host, process and device."""
    memory_hits: int = 0
    """Decoded images and forward passes that the worker still had."""
    memory_misses: int = 0
    device_memory: DeviceMemory | None = None


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
    evaluation: Mapping[str, float] = field(default_factory=dict)
    """Overall score (insertion - deletion) of methods by title, from the model's own evaluation, if there was one."""

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

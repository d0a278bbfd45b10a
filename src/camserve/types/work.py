"""Defines what travels between a gateway and a worker: items of a step, and the partials that come back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from camserve.errors import CamserveError, InvalidOption
from camserve.types.explanation import Prediction
from camserve.types.model import InputView, Layer, ModelInfo
from camserve.types.options import DEFAULT_CURVE_STEPS, PRECISIONS, Precision
from camserve.types.targets import AnyTarget

if TYPE_CHECKING:
    from camserve.images import ImageContent
    from camserve.methods import MethodSpec
    from camserve.methods.work import Kind


def curve_points(pixels: int, steps: int) -> int:
    """Returns how many points a curve has: each step changes ceil(pixels / steps) pixels, the last perhaps fewer."""
    return -(-pixels // -(-pixels // steps)) + 1


@dataclass(frozen=True, eq=False)
class MapCurves:
    """Asks for deletion and insertion of a finished map by the RISE protocol, as masked queries.

    The points of deletion come first, then those of insertion.
    """

    saliency: np.ndarray = field(repr=False)
    """The map: (H, W), float32, of the network's input size."""
    target: AnyTarget
    """Target of the map, as a worker resolved it."""
    steps: int = DEFAULT_CURVE_STEPS

    @property
    def points(self) -> int:
        """Number of points of each curve."""
        return curve_points(self.saliency.size, self.steps)

    def queries(self, layer: Layer | None, targets: int) -> int:
        """Returns the number of points of both curves."""
        return 2 * self.points


@dataclass(frozen=True, eq=False)
class Ranking:
    """Asks for the last stage of a method that ranks its finished map (XRAI).

    A worker does it, because it needs the image and libraries that a gateway has not. It is one query, whatever the
    number of targets.
    """

    attribution: np.ndarray = field(repr=False)
    """Attribution that the finish made of the method's sums: (targets, H, W), of the network's input size."""

    def queries(self, layer: Layer | None, targets: int) -> int:
        """Returns 1: the segmentation is made once for all targets."""
        return 1


@dataclass(frozen=True)
class Task:
    """Asks for a range of one method's queries, numbered as `MethodSpec.queries` counts them, cut off at their total.

    Raises:
        InvalidOption: on construction, when the range is none, or `numbers` has another length than the range.
    """

    position: int
    """Index of the part of the request, or behind the parts that of a follow-up; the answer names it."""
    method: MethodSpec | MapCurves | Ranking
    start: int
    stop: int
    layer: str = ""
    """Name of the layer; empty: the model's default layer."""
    numbers: tuple[int, ...] = ()
    """Numbers of the queries asked, where start..stop-1 are indices into an order; empty: start..stop-1 themselves."""
    ordered: bool = False
    """Whether start..stop-1 are indices into the worker's own order, in which the queries that matter most come first;
    the worker then returns that order."""
    labels: tuple[int, ...] = ()
    """Labels that an earlier task of this part returned; empty: the worker finds them. Clustering anew could give other
    groups, because a last bit decides it, and sums of other groups do not add up."""

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise InvalidOption(f"a query range must be 0 <= start <= stop, got {self.start}..{self.stop}")
        if self.numbers and len(self.numbers) != self.stop - self.start:
            raise InvalidOption(f"{self.stop - self.start} queries, {len(self.numbers)} numbers")


@dataclass(frozen=True)
class Item:
    """Holds the slice of one request inside a step.

    Raises:
        InvalidOption: on construction, when the precision is unknown or `top_predictions` is negative.
    """

    image: ImageContent | None
    """The image; None where the worker should have it already, known by its digest."""
    targets: tuple[AnyTarget, ...]
    tasks: tuple[Task, ...]
    text: str = ""
    """Text beside the image, for a model that takes one; "" where there is none."""
    top_predictions: int = 5
    precision: Precision = "exact"
    digest: bytes = b""
    """Name of the image by its content, see `camserve.images.digest`; empty where the worker is to compute it."""
    reproducible: bool = False
    """Whether its passes are its own, run by PyTorch, and each of its tasks is asked by itself: a task then gives the
    same bits again on a worker of the same kind, whatever it is asked beside it."""
    expires_s: float = math.inf
    """Time of this process's monotonic clock after which nobody waits for the answer. Only the time that remains
    travels between machines, whose clocks may differ."""

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise InvalidOption(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.top_predictions < 0:
            raise InvalidOption(f"top_predictions must be at least 0, got {self.top_predictions}")


@dataclass(frozen=True)
class Partial:
    """Holds the mergeable result of one task: merging the partials of disjoint query ranges gives that of their union.

    `camserve.finalise.finish` makes maps of merged partials.
    """

    position: int
    """Position that the task named."""
    queries: int
    """Number of images that went through the network or its tail."""
    sums: np.ndarray = field(repr=False)
    """Sums over the queries, of the shape that `MethodSpec.sums_shape` says: mostly (targets, height, width), masks
    weighted by their scores. `MapCurves` gives (1, 2, points), the scores asked and zeros elsewhere; `Ranking`
    gives (targets, H, W), the ranked maps."""
    order: tuple[int, ...] = ()
    """Numbers of all blocks of queries (see `MethodSpec.block`), those that matter most first; empty unless the task
    asked for the order and the method has one."""
    energies: tuple[float, ...] = ()
    """Bounds of what each block may add to the map, in that order: at least 0, the largest first."""
    context: np.ndarray | None = field(default=None, repr=False)
    """Values of the image itself that the finish needs, of the shape that `MethodSpec.context_shape` says; sent with
    the range that starts at 0."""
    labels: tuple[int, ...] = ()
    """Labels of the groups that the worker found; empty where the task brought some or the method has none."""

    def merge(self, other: Partial) -> Partial:
        """Returns the partial of both ranges; sums are kept in float64, so that the order of merging does not show."""
        return Partial(
            position=self.position,
            queries=self.queries + other.queries,
            sums=self.sums.astype(np.float64) + other.sums,
            order=self.order or other.order,
            energies=self.energies or other.energies,
            context=other.context if self.context is None else self.context,
            labels=self.labels or other.labels,
        )


@dataclass(frozen=True)
class Explained:
    """Holds a target as a worker resolved it, with what the network says of it for the unmasked image."""

    target: AnyTarget
    """A target of one map: by index, without top_k; a `Finer` is the `Contrast` with the classes that were nearest, and
    the image of a `Vector` its embedding."""
    score: float
    """Score of the unmasked image, on the scale of masked queries: a probability, a difference of some, a number, or
    a cosine."""
    classes: tuple[Prediction, ...]
    """The classes, or number, that the target names, the one explained first; empty for a vector."""


@dataclass(frozen=True)
class ItemResult:
    """Holds what a worker answers for one item."""

    predictions: tuple[Prediction, ...]
    """The most probable classes."""
    targets: tuple[Explained, ...]
    """The item's targets, one for each map of a method."""
    view: InputView
    partials: tuple[Partial, ...]
    """One partial for each task of the item, in their order."""
    precision: Precision = "exact"
    """Precision in which the item's masked queries were asked: "exact" or "bfloat16"."""
    runtime: str = ""
    """Name of what asked them: "eager", "compiled", "onnx" or "cuda_graphs"; "" where a worker does not say."""


@dataclass(frozen=True)
class DeviceMemory:
    """Tells the memory of the device that a worker computes on."""

    device: str
    """Name of the device: cpu, cuda:0, ..."""
    used_bytes: int
    """Memory that all processes of a GPU use together; on a CPU the worker's resident memory."""
    limit_bytes: int
    """Memory of the GPU; on a CPU that of the machine, or of the container if it has less."""


@dataclass(frozen=True)
class StepResult:
    """Holds what a worker answers for a step."""

    outcomes: tuple[ItemResult | CamserveError, ...]
    """One outcome for each item of the step, in their order; a failing item does not touch the others."""
    stage_seconds: Mapping[str, float]
    """Seconds of the whole step by stage: decode, forward, queries."""
    worker: str
    """Host, process and device of the worker."""
    memory_hits: int = 0
    """Number of decoded images and forward passes that the worker still had."""
    memory_misses: int = 0
    """Number of decoded images and forward passes that the worker had to make."""
    device_memory: DeviceMemory | None = None
    made: Mapping[Kind, int] = field(default_factory=dict)
    """Units of work that the whole step really took, by kind: baselines count, what was remembered does not."""
    version: str = ""
    """Version of the model that answered."""
    weights: str = ""
    """Hash of the weights of the model that answered."""
    keeps_images: bool = True
    """Whether the worker remembers images, so that their digest is enough the next time."""
    micro_batch: int = 0
    """Number of queries of a pass."""
    environment: str = ""
    """Environment of the worker, as JSON: see `camserve.worker.environment`."""

    def is_of(self, model: ModelInfo) -> bool:
        """Returns whether this model answered; sums of two models must never be merged."""
        return (self.version, self.weights) == (model.version, model.weights)

    def is_of_same_model(self, other: StepResult) -> bool:
        """Returns whether the same model gave both answers."""
        return (self.version, self.weights) == (other.version, other.weights)

    def with_outcomes(self, at: Sequence[int], later: StepResult) -> StepResult:
        """Returns this result with the outcomes at some indices taken from a later step, and the work of both."""
        outcomes = list(self.outcomes)
        for index, outcome in zip(at, later.outcomes, strict=True):
            outcomes[index] = outcome
        stages, kinds = self.stage_seconds.keys() | later.stage_seconds.keys(), self.made.keys() | later.made.keys()
        return replace(
            later,
            outcomes=tuple(outcomes),
            stage_seconds={
                stage: self.stage_seconds.get(stage, 0.0) + later.stage_seconds.get(stage, 0.0) for stage in stages
            },
            memory_hits=self.memory_hits + later.memory_hits,
            memory_misses=self.memory_misses + later.memory_misses,
            made={kind: self.made.get(kind, 0) + later.made.get(kind, 0) for kind in kinds},
        )

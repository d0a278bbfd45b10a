"""Describes a request, whichever door it came through, and what it becomes once it fits a model.

Every door (typed gRPC, the Open Inference Protocol, TorchServe's plain API, `Engine`, the clients and the command line)
makes an `ExplainRequest`, and `fit` is the only place that holds it against a model. So all doors refuse the same
things with the same words.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np

from camserve import images
from camserve.errors import InvalidImage, InvalidOption, NotFound
from camserve.images import ImageContent, ImageLike, read_image
from camserve.methods import SIGNED, Auto, GradCam, MethodLike, MethodSpec, as_method
from camserve.types import (
    DECIMAL_BYTES,
    DEFAULT_CURVE_STEPS,
    ENCODINGS,
    FUSIONS,
    MAP_SIZES,
    MAX_CURVE_STEPS,
    PRECISIONS,
    PRIORITIES,
    AnyTarget,
    BoxOptions,
    Fusion,
    MapSize,
    ModelInfo,
    Precision,
    Priority,
    StreamOptions,
    TargetLike,
    Vector,
    as_target,
    check_overlay,
    curve_points,
)
from camserve.types.parts import Part, Parts, layer_names, make_parts
from camserve.types.target_forms import check_predicts, default_target, fitted_target
from camserve.types.targets import check_utf8, is_settled, mask_of, may_be_fewer, network_made, words_in
from camserve.wording import shown

DEFAULT_PREDICTIONS = 5

PIECE_QUERIES = 16
"""Number of queries of a piece where its sums are no larger than `PIECE_BYTES`."""

PIECE_BYTES = 2**20
"""Number of bytes of sums for each `PIECE_QUERIES` of a piece."""

STEP_QUERIES = 512
"""Number of queries of a step, at most, unless a gateway is told otherwise."""


@dataclass(frozen=True)
class OutputOptions:
    """Says what the maps of a reply look like.

    Raises:
        InvalidOption: on construction, when an option is unknown or out of range, or an overlay has size "layer".
    """

    size: MapSize = "input"
    encoding: str = "float32"
    colormap: str = "jet"
    opacity: float = 0.5
    boxes: BoxOptions | None = None
    signed: bool = False
    """Whether maps have negative evidence as well, in [-1, 1], scaled by the largest absolute value."""
    stacked: bool = False
    """Whether all maps must have one size, because they travel as one array."""
    decimal: bool = False
    """Whether the pixels of float32 maps travel as decimal numbers, as they do in JSON."""

    def __post_init__(self) -> None:
        _check_choice("size", self.size, MAP_SIZES)
        _check_choice("encoding", self.encoding, tuple(ENCODINGS))
        check_overlay(self.colormap, self.opacity)
        if self.boxes is not None and not isinstance(self.boxes, BoxOptions):
            raise InvalidOption(f"boxes must be True, False or BoxOptions, got {shown(self.boxes)}")
        if self.overlay and self.size == "layer":
            raise InvalidOption("an overlay has size input or original, not layer")

    @property
    def overlay(self) -> bool:
        """Tells whether the map is laid over the image."""
        return self.encoding.startswith("overlay")

    @property
    def pixel_bytes(self) -> int:
        """Number of bytes of one pixel in the reply; 0 for files, which compress."""
        return DECIMAL_BYTES if self.decimal else ENCODINGS[self.encoding]


@dataclass(frozen=True)
class RequestLimits:
    """Says how large a request may be. The default bounds nothing: it is for requests that stay in one process."""

    image_bytes: int = sys.maxsize
    image_pixels: int = sys.maxsize
    methods: int = sys.maxsize
    layers: int = sys.maxsize
    targets: int = sys.maxsize
    map_pixels: int = sys.maxsize
    """Number of pixels of all maps of one reply together."""
    message_bytes: int = sys.maxsize
    """Number of bytes of one reply, and of what a worker answers."""
    name_characters: int = sys.maxsize
    """Number of characters of a name: of a model, a version, a layer, a class, or a method with its parameters."""
    text_characters: int = sys.maxsize
    """Number of characters of a free text."""
    option_bytes: int = sys.maxsize
    """Number of bytes of a message beside its image."""
    auto: bool = False
    """Whether there is a server that chooses a method for `auto`."""

    def check_counts(self, *, methods: int = 0, layers: int = 0, targets: int = 0) -> None:
        """Raises InvalidOption where there are too many; every door asks before it looks at one of them."""
        for what, number, most in (
            ("methods", methods, self.methods),
            ("layers", layers, self.layers),
            ("targets", targets, self.targets),
        ):
            if number > most:
                raise InvalidOption(f"a request has at most {most} {what}, got {number}")

    def check_classes(self, number: int) -> None:
        """Raises InvalidOption where the targets of a request name too many classes, those of contrasts included."""
        if number > self.targets:
            raise InvalidOption(f"the targets of a request name at most {self.targets} classes, got {number}")

    def check_options(self, size: int) -> None:
        """Raises InvalidOption where a message has too many bytes beside its image, before it is parsed."""
        if size > self.option_bytes:
            raise InvalidOption(f"a request has at most {self.option_bytes} bytes beside its image; this one has more")

    def check_image(self, size: int) -> None:
        """Raises InvalidImage where an image has too many bytes; doors that would copy it ask before."""
        if size > self.image_bytes:
            raise InvalidImage(f"an image may have at most {self.image_bytes} bytes, got {size}")

    def check_names(self, names: Iterable[str]) -> None:
        """Raises InvalidOption where a name is too long; every door asks before it looks one up."""
        for name in names:
            if len(name) > self.name_characters:
                raise InvalidOption(
                    f"a name has at most {self.name_characters} characters, got {len(name)}: {shown(name)}"
                )

    def check_texts(self, texts: Iterable[str]) -> None:
        """Raises InvalidOption where a free text is too long; every door asks before it looks at it."""
        for text in texts:
            if len(text) > self.text_characters:
                raise InvalidOption(
                    f"a text has at most {self.text_characters} characters, got {len(text)}: {shown(text)}"
                )


UNBOUNDED = RequestLimits()
"""The limits of requests that stay in one process."""


@dataclass(frozen=True, eq=False)
class ExplainRequest:
    """Holds what a caller asks: an image, methods, targets, and how the answer shall look.

    Raises:
        InvalidOption: on construction, when an option is unknown or out of range, as far as that shows without a model.
    """

    image: ImageContent
    methods: tuple[MethodSpec, ...] = (GradCam(),)
    """Methods that maps are made by; none means predictions alone."""
    targets: tuple[AnyTarget, ...] = ()
    """Targets to explain; none means the most probable class, and without methods that nothing is explained."""
    model: str = ""
    """Name of the model; may be empty where there is only one."""
    version: str = ""
    """Version of the model; empty means the one that is served."""
    layers: tuple[str, ...] = ()
    """Names of the layers; empty means the model's default layer."""
    fusion: Fusion = "mean"
    output: OutputOptions = field(default_factory=OutputOptions)
    top_predictions: int = DEFAULT_PREDICTIONS
    precision: Precision = "auto"
    evaluate: bool = False
    """Whether deletion and insertion of every map are measured."""
    evaluation_steps: int = DEFAULT_CURVE_STEPS
    priority: Priority = "normal"
    allow_partial: bool = False
    stream: StreamOptions = field(default_factory=StreamOptions)
    text: str = ""
    """Text beside the image, for a model that takes one: a question, or the caption so far."""
    evidence: bool = False
    """Whether an evidence record is made of the answer."""

    def __post_init__(self) -> None:
        _check_choice("fusion", self.fusion, FUSIONS)
        _check_choice("precision", self.precision, PRECISIONS)
        _check_choice("priority", self.priority, PRIORITIES)
        _check_types(self)
        check_utf8(self.text)
        if self.top_predictions < 0:
            raise InvalidOption(f"top_predictions must be at least 0, got {shown(self.top_predictions)}")
        if not 1 <= self.evaluation_steps <= MAX_CURVE_STEPS:
            raise InvalidOption(f"evaluation_steps must be 1..{MAX_CURVE_STEPS}, got {shown(self.evaluation_steps)}")
        for method in self.methods if self.output.signed else ():
            if method.unsigned:
                raise InvalidOption(
                    f"{method.name} has no signed maps: {method.unsigned}; these methods have some: {', '.join(SIGNED)}"
                )

    def without_maps(self) -> ExplainRequest:
        """Returns the request for predictions alone, where nobody reads maps."""
        return replace(self, methods=(), layers=(), output=OutputOptions(), evaluate=False)

    def fit(self, model: ModelInfo, limits: RequestLimits = UNBOUNDED, named: bool = True) -> FittedRequest:
        """Returns the request fitted to a model. It reads the image's header: a server calls it in a thread.

        Args:
            model: the model.
            limits: limits of a server.
            named: whether the image is named by its content, as a server needs it that keeps images or replies.

        Raises:
            InvalidImage, InvalidOption: what is wrong, what was allowed and what came.
            NotFound: another version of the model was asked for.
            Unsupported: predictions alone are asked of a model that has none.
        """
        classes = [each for target in self.targets for each in target.classes]
        limits.check_counts(methods=len(self.methods), layers=len(self.layers), targets=len(self.targets))
        limits.check_classes(len(classes))
        limits.check_names((self.model, self.version, *self.layers, *(each.label or "" for each in classes)))
        limits.check_texts((self.text, *(words for target in self.targets for words in words_in(target))))
        model.check_text(self.text)
        if self.version not in ("", model.version):
            raise NotFound(f"model {model.name} is served in version {model.version}, not {shown(self.version)}")
        if not self.methods:
            check_predicts(model)
        parts = make_parts(model, self.methods, self.layers, self.fusion, self.output.size)
        if not limits.auto and any(isinstance(method, Auto) for method in self.methods):
            raise InvalidOption("auto: a server chooses, by its load and the deadline; here name a method")
        most = model.most_predictions
        fitted = FittedRequest(
            request=self if self.top_predictions <= most else replace(self, top_predictions=most),
            model=model,
            parts=parts,
            targets=_resolved_targets(self.targets, model, limits, bool(self.methods)),
            image_size=_checked_image(self.image, model, limits),
            digest=images.digest(self.image) if named else b"",
            limits=limits,
        )
        fitted.check_sizes()
        return fitted


@dataclass(frozen=True, eq=False)
class FittedRequest:
    """Holds a request that fits its model.

    A *position* is the index of a part, or behind the parts that of a follow-up.
    """

    request: ExplainRequest
    model: ModelInfo
    parts: Parts
    targets: tuple[AnyTarget, ...]
    """Targets by class index or top_k, without labels; none comes twice."""
    image_size: tuple[int, int]
    """(height, width) of the sent image, before EXIF orientation."""
    digest: bytes
    """Name of the image by its content; empty where nobody needs it."""
    limits: RequestLimits = field(default_factory=RequestLimits)
    choices: Mapping[int, str] = field(default_factory=dict)
    """Reasons for the methods that the server chose, by index among the methods."""

    def part(self, position: int) -> Part:
        """Returns the part at a position."""
        return self._parts[position]

    @cached_property
    def _parts(self) -> tuple[Part, ...]:
        return tuple(self.parts)

    @property
    def methods(self) -> tuple[MethodSpec, ...]:
        """The methods asked, including those that the server chose."""
        return self.parts.methods

    @property
    def goes_on(self) -> bool:
        """Tells whether one item may not be enough: something is asked only when answers to the first have come in."""
        behind = any(part.stops_early or part.method.ranked for part in self._parts)
        return behind or self.request.evaluate or self.piece > 0

    def with_methods(self, methods: Sequence[MethodSpec], choices: Mapping[int, str]) -> FittedRequest:
        """Returns the request with other methods, one for each that it has.

        Raises:
            InvalidOption: they do not fit the layers, or their maps are too large.
        """
        request, fusion, size = self.request, self.request.fusion, self.request.output.size
        parts = make_parts(self.model, methods, [layer.name for layer in self.parts.layers], fusion, size)
        fitted = replace(self, request=replace(request, methods=tuple(methods)), parts=parts, choices=choices)
        fitted.check_sizes()
        return fitted

    @property
    def max_targets(self) -> int:
        """Number of targets of one map each, if they are all different ones."""
        return max_targets(self.targets)

    @property
    def known_targets(self) -> int | None:
        """Number of targets of one map each; None where that is not known yet."""
        return known_targets(self.targets)

    @cached_property
    def references(self) -> tuple[tuple[int, int], ...]:
        """Size (height, width) of each reference image among the targets."""
        return tuple(
            _checked_image(read_image(target.image), self.model, self.limits)
            for target in self.targets
            if isinstance(target, Vector) and target.image is not None
        )

    @property
    def made_vectors(self) -> int:
        """Number of targets of which the network makes a vector first: reference images, and texts."""
        return sum(network_made(target) is not None for target in self.targets) if self.model.dimension else 0

    @property
    def max_maps(self) -> int:
        """Number of maps of the reply if the targets are all different ones."""
        return len(self.methods) * self.max_targets

    @property
    def curve_queries(self) -> int:
        """Number of masked queries of the deletion and insertion curves of one map; 0 where none are wanted."""
        height, width = self.model.input_size
        return 2 * curve_points(height * width, self.request.evaluation_steps) if self.request.evaluate else 0

    @cached_property
    def piece(self) -> int:
        """Number of queries that are asked and added up together, from multiples of it on, so that maps can be made
        again bit by bit; 0 where queries may be cut anywhere.

        It grows with the sums, so that those of a step's pieces stay within a message. It depends on nothing but the
        request and the model: every server and engine cuts alike.
        """
        if not (self.request.evidence and self.request.precision == "exact"):
            return 0
        return PIECE_QUERIES * max(1, math.ceil(self.sums_bytes / PIECE_BYTES))

    @property
    def sums_bytes(self) -> int:
        """Number of bytes of the float32 sums that a worker returns for all targets."""
        return sum(part.result_bytes(self.model.input_size, self.max_targets) for part in self.parts)

    @property
    def step_bytes(self) -> int:
        """Number of bytes that the request adds to a step and its answer: images, vectors, sums, maps for curves."""
        height, width = self.model.input_size
        maps_bytes = 4 * height * width * self.max_maps if self.request.evaluate else 0
        sent = images.size_bytes(self.request.image) + targets_bytes(self.targets)
        return sent + self.sums_bytes + maps_bytes + self._pieces_bytes

    @property
    def _pieces_bytes(self) -> int:
        """Number of bytes by which the sums of a step's pieces may be more than those of all queries together."""
        if not self.piece:
            return 0
        most = max((part.queries(self.max_targets) for part in self.parts), default=0)
        pieces = min(math.ceil(most / self.piece), math.ceil(STEP_QUERIES / self.piece))
        return max(0, pieces - 1) * self.sums_bytes

    def map_size(self, method: MethodSpec) -> tuple[int, int]:
        """Returns the (height, width) of the map of a method."""
        if self.request.output.size == "original":
            return self.image_size
        if self.request.output.size == "input" or method.resolution == "input":
            return self.model.input_size
        return self.parts.layers[0].height, self.parts.layers[0].width

    @property
    def map_pixels(self) -> int:
        """Number of pixels of all maps together."""
        sizes = [self.map_size(method) for method in self.methods]
        return self.max_targets * sum(height * width for height, width in sizes)

    def check_sizes(self) -> None:
        """Raises InvalidOption where the maps are larger than allowed, or of several sizes where one is wanted."""
        sizes = list(dict.fromkeys(self.map_size(method) for method in self.methods))
        what = f"{self.max_maps} maps of {' and '.join(f'{height} x {width}' for height, width in sizes)}"
        if self.request.output.stacked and len(sizes) > 1:
            raise InvalidOption(
                f"one tensor holds maps of one size, and these have {sorted(sizes)}: ask for size input, "
                "or for one method after the other"
            )
        if self.map_pixels > self.limits.map_pixels:
            raise InvalidOption(
                f"all maps together may have at most {self.limits.map_pixels} pixels; {what} have {self.map_pixels}: "
                "ask for fewer classes, or for size input or layer"
            )
        output = self.request.output
        size = self.map_pixels * output.pixel_bytes
        if size > self.limits.message_bytes:
            how = f"as {'numbers in JSON' if output.decimal else output.encoding}"
            raise InvalidOption(
                f"a reply may have at most {self.limits.message_bytes} bytes; {what} {how} have {size}: "
                f"ask for {'binary data' if output.decimal else 'uint8 or png'}, for fewer classes, "
                "or for size input or layer"
            )
        if self.sums_bytes > self.limits.message_bytes:  # a worker's answer has a bound as well
            layers = ", ".join(f"{layer.name!r} of {layer.height} x {layer.width}" for layer in self.parts.layers)
            raise InvalidOption(
                f"{self.max_maps} maps at {layers} are too large: ask for fewer classes, or for a later layer"
            )


def targets_bytes(targets: Iterable[AnyTarget]) -> int:
    """Returns the number of bytes that the vectors, reference images and masks among targets have."""
    targets = list(targets)
    masks = sum(len(file) for one in targets if (file := mask_of(one)) is not None)
    vectors = [target for target in targets if isinstance(target, Vector)]
    references = [read_image(one.image) for one in vectors if one.image is not None]
    numbers = sum(one.values.nbytes for one in vectors if one.values is not None)
    return masks + sum(map(images.size_bytes, references)) + numbers


def max_targets(targets: Sequence[AnyTarget]) -> int:
    """Returns the number of maps that targets stand for if they are all different ones."""
    return sum(target.maps for target in targets)


def known_targets(targets: Sequence[AnyTarget]) -> int | None:
    """Returns the number of maps that targets stand for; None where two may turn out to be the same, or one is none.

    The largest classes of an image, and its detections, may be fewer than were asked for.
    """
    sure = all(map(is_settled, targets)) or (len(targets) == 1 and not may_be_fewer(targets[0]))
    return max_targets(targets) if sure else None


class Options(TypedDict, total=False):
    """Names the options of a request beside image, methods and targets, as Python callers state them."""

    model: str
    """Name of the model; may be left out where there is only one."""
    version: str
    """Version of the model; may be left out."""
    layer: str | Sequence[str]
    """Name of the layer; empty means the model's default layer. The maps of several are fused."""
    fusion: Fusion
    """Fusion of the maps of several layers: "mean" (default) or "max"."""
    size: MapSize
    """Size of the maps: "input" (default), "layer" or "original"."""
    signed: bool
    """Whether maps are in [-1, 1] with the evidence against the target below 0, for methods whose sum is linear."""
    encoding: str
    """Encoding in which maps travel: "float32" (default, exact), or "float16", "uint8", "png" for smaller replies."""
    boxes: BoxOptions | bool | None
    """Adds bounding boxes to the maps; True means with the default options."""
    top_predictions: int
    """Number of the most probable classes that are listed; default 5."""
    precision: Precision
    """Precision of masked queries: "auto" (default) is the fastest that leaves maps as they are in float32, see
    docs/performance.md; "exact" is float32 throughout."""
    evaluate: bool
    """Adds deletion and insertion (RISE protocol) of every map, at the cost of further masked queries."""
    evaluation_steps: int
    """Number of steps of each curve; default 28."""
    priority: Priority
    """Class that decides who goes first while requests wait: "interactive", "normal" (default) or "batch"."""
    allow_partial: bool
    """Whether maps of what was answered so far, `complete` False, come at the deadline instead of DeadlineExceeded."""
    stream: StreamOptions
    """Says how often a stream has maps before the final ones."""
    text: str
    """Text beside the image, for a model that takes one: a question, or the caption so far."""
    evidence: bool
    """Adds the evidence record to the answer; with precision "exact" its maps can be made again, bit by bit."""


_OUTPUT_OPTIONS = tuple(each.name for each in fields(OutputOptions))


def make_request(
    image: ImageLike,
    methods: Sequence[MethodLike] | MethodLike | None = None,
    targets: Sequence[TargetLike] | TargetLike | None = None,
    **options: Unpack[Options],
) -> ExplainRequest:
    """Returns the request of a Python caller.

    Args:
        image: a path, a file's bytes, a PIL image or an array.
        methods: several, or one: names, (name, parameters) or method specs; None means Grad-CAM.
        targets: several, or one: class indices, text forms or targets; None means the most probable class.
        options: see `Options`.

    Raises:
        InvalidInput: what is wrong, what was allowed and what came, as far as it shows without the model.
    """
    given: dict[str, Any] = dict(options)
    for name in given:
        if name not in Options.__annotations__:
            raise InvalidOption(f"unknown option {shown(name)}; there are {', '.join(Options.__annotations__)}")
    if "boxes" in given:
        given["boxes"] = BoxOptions() if given["boxes"] is True else given["boxes"] or None
    output = OutputOptions(**{name: given.pop(name) for name in _OUTPUT_OPTIONS if name in given})
    return ExplainRequest(
        image=read_image(image),
        methods=tuple(as_method(method) for method in _several(methods, (GradCam(),), _is_method)),
        targets=tuple(_with_image_read(as_target(target)) for target in _several(targets, ())),
        layers=layer_names(given.pop("layer", None) or ()),
        output=output,
        **given,
    )


def _with_image_read(target: AnyTarget) -> AnyTarget:
    """Returns the target; a reference image that is a path is read once, here."""
    if isinstance(target, Vector) and isinstance(target.image, (str, Path)):
        return Vector(image=read_image(target.image))
    return target


def _several(values: Any, default: tuple[Any, ...], is_one: Callable[[Any], bool] = lambda value: False) -> list[Any]:
    """Returns the values in what callers may pass: several, a lone one (a text is one, not its letters), or None."""
    if values is None:
        return list(default)
    try:
        return [values] if isinstance(values, (str, bytes, Mapping)) or is_one(values) else list(values)
    except TypeError:  # it cannot be iterated, so it is one
        return [values]


def _is_method(value: Any) -> bool:
    """Tells a (name, parameters) from a pair of methods."""
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], Mapping)


def _check_types(request: ExplainRequest) -> None:
    """Raises InvalidOption where a Python caller has passed a value of another type than its option has."""
    for name, kind, what in (
        ("model", str, "a text"),
        ("version", str, "a text"),
        ("text", str, "a text"),
        ("top_predictions", int, "a whole number"),
        ("evaluation_steps", int, "a whole number"),
        ("stream", StreamOptions, "StreamOptions"),
        ("evidence", bool, "True or False"),
    ):
        value = getattr(request, name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise InvalidOption(f"{name} must be {what}, got {shown(value)}")
    for layer in request.layers:
        if not isinstance(layer, str):
            raise InvalidOption(f"a layer is named by a text, got {shown(layer)}")


def _check_choice(what: str, value: object, allowed: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise InvalidOption(f"{what} must be one of {', '.join(allowed)}, got {shown(value)}")


def _resolved_targets(
    targets: Sequence[AnyTarget], model: ModelInfo, limits: RequestLimits, has_maps: bool
) -> tuple[AnyTarget, ...]:
    for target in targets:
        _check_reference(target, model, limits)
        _check_mask(target, limits)
    distinct = tuple(dict.fromkeys(fitted_target(target, model) for target in targets))
    if not distinct and has_maps:
        distinct = (default_target(model),)
    number = max_targets(distinct)
    if number > limits.targets:
        raise InvalidOption(f"a request explains at most {limits.targets} classes, got {number}")
    return distinct


def _check_reference(target: AnyTarget, model: ModelInfo, limits: RequestLimits) -> None:
    if isinstance(target, Vector) and target.image is not None:
        try:
            _checked_image(read_image(target.image), model, limits)
        except InvalidImage as error:
            raise InvalidImage(f"reference: {error}") from None


def _check_mask(target: AnyTarget, limits: RequestLimits) -> None:
    """Raises InvalidImage where a mask is none, or larger than an image may be; a worker knows its size."""
    if (file := mask_of(target)) is not None:
        images.mask_size(file, limits.image_bytes, limits.image_pixels)


def _checked_image(image: ImageContent, model: ModelInfo, limits: RequestLimits) -> tuple[int, int]:
    """Returns (height, width) of the image, which is not decoded."""
    if isinstance(image, bytes):
        size = images.probe(image, limits.image_bytes, limits.image_pixels)
    else:
        size = images.checked_size(image, limits.image_bytes, limits.image_pixels)
    if isinstance(image, np.ndarray):
        images.check_array(image, model.input_size, model.channels)
    else:
        images.check_takes_files(model.input_size, model.channels)
    images.check_elongation(size, model.input_size)  # a worker may resize to more, and then refuses itself
    return size

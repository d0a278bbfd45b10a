"""From an ExplainRequest to a request that fits its model.

Whatever can be refused without a worker is refused here, by what the worker said of its model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from camserve import images, wire
from camserve.errors import InvalidImage, InvalidOption, NotFound
from camserve.finalise.render import check_overlay
from camserve.gateway.settings import Settings
from camserve.labels import resolve_target
from camserve.methods import GradCam, MethodSpec
from camserve.parts import Part, Parts, check_curve_steps, make_parts
from camserve.types import (
    DEFAULT_CURVE_STEPS,
    BoxOptions,
    MapSize,
    ModelInfo,
    Precision,
    Priority,
    StreamOptions,
    Target,
)
from camserve.v1 import explain_pb2 as pb

DEFAULT_PREDICTIONS = 5

ENCODINGS: dict[pb.Output.Encoding, str] = {
    pb.Output.ENCODING_UNSPECIFIED: "float32",
    pb.Output.FLOAT32: "float32",
    pb.Output.FLOAT16: "float16",
    pb.Output.UINT8: "uint8",
    pb.Output.PNG: "png",
    pb.Output.OVERLAY_PNG: "overlay_png",
    pb.Output.OVERLAY_JPEG: "overlay_jpeg",
}
ENCODING_NUMBERS = {name: number for number, name in ENCODINGS.items() if number != pb.Output.ENCODING_UNSPECIFIED}
_RAW_BYTES = {"float32": 4, "float16": 2, "uint8": 1}


@dataclass(frozen=True)
class OutputOptions:
    """What a map is delivered as."""

    size: MapSize
    encoding: str
    colormap: str
    opacity: float
    boxes: BoxOptions | None

    @property
    def overlay(self) -> bool:
        """The map is laid over the image."""
        return self.encoding.startswith("overlay")


@dataclass(frozen=True)
class Request:
    """A request that fits its model."""

    model: ModelInfo
    image: bytes | np.ndarray
    image_size: tuple[int, int]
    """(height, width) of the sent image, before EXIF orientation."""
    parts: Parts
    """A position of the request is a place among them, or behind them that of a map whose curves are wanted."""
    targets: tuple[Target, ...]
    """Indices and top_k; no index twice."""
    top_predictions: int
    precision: Precision
    output: OutputOptions
    evaluation_steps: int | None = None
    """Of the curves of every map; None: no curves."""
    priority: Priority = "normal"
    allow_partial: bool = False
    stream: StreamOptions = field(default_factory=StreamOptions)
    choices: Mapping[int, str] = field(default_factory=dict)
    """Why a method was chosen, by its place among the methods, where the server chose it."""

    def part(self, position: int) -> Part:
        """The part at a position."""
        return self._parts[position]

    @cached_property
    def _parts(self) -> tuple[Part, ...]:
        return tuple(self.parts)

    @property
    def max_targets(self) -> int:
        """Number of classes explained, if the targets are all different ones."""
        return sum(target.top_k or 1 for target in self.targets)

    @property
    def max_maps(self) -> int:
        """Number of maps in the reply, if the targets are all different classes."""
        return len(self.parts.methods) * self.max_targets

    @property
    def sums_bytes(self) -> int:
        """Size of the sums that a worker returns: float32."""
        sizes = [part.sums_size(self.model.input_size) for part in self.parts]
        return 4 * self.max_targets * sum(height * width for height, width in sizes)

    @property
    def step_bytes(self) -> int:
        """What the request adds to a step and to its answer."""
        image_bytes = len(self.image) if isinstance(self.image, bytes) else self.image.nbytes
        return image_bytes + self.sums_bytes + self._curves_bytes

    @property
    def _curves_bytes(self) -> int:
        """Maps sent back to a worker: float32 of the input's size."""
        height, width = self.model.input_size
        return 0 if self.evaluation_steps is None else 4 * height * width * self.max_maps

    def totals(self) -> tuple[int | None, ...]:
        """Masked queries of each part; None where they depend on how many classes the targets turn out to be."""
        number = known_targets(self.targets)
        return tuple(_total(part, number) for part in self.parts)

    def final_totals(self, targets: int) -> tuple[int | None, ...]:
        """Masked queries by position, now that the targets are known to be so many classes; None for curves, whose maps
        do not exist yet."""
        curves = 0 if self.evaluation_steps is None else len(self.parts.methods) * targets
        return (*(part.queries(targets) for part in self.parts), *(None for _ in range(curves)))


def known_targets(targets: Sequence[Target]) -> int | None:
    """How many classes the targets are; None when an index may be one of the top k."""
    if all(target.index is not None for target in targets):
        return len(targets)
    return targets[0].top_k if len(targets) == 1 else None


def _total(part: Part, targets: int | None) -> int | None:
    if targets is not None:
        return part.queries(targets)
    one, two = part.queries(1), part.queries(2)
    return one if one == two else None


def request_from_proto(message: pb.ExplainRequest, model: ModelInfo, settings: Settings) -> Request:
    """The request, checked against the model and the limits.

    Raises:
        InvalidImage, InvalidOption: what is wrong, what was allowed and what came.
        NotFound: another version of the model was asked for.
    """
    if message.version not in ("", model.version):
        raise NotFound(f"model {model.name} is served in version {model.version}, not {message.version!r}")
    output = _output(message.output)
    parts = make_parts(
        model,
        _methods(message, settings),
        _layers(message, settings),
        wire.fusion_from_proto(message.fusion),
        output.size,
    )
    image, image_size = _image(message.image, model, settings)
    request = Request(
        model=model,
        image=image,
        image_size=image_size,
        parts=parts,
        targets=_targets(message, model, settings),
        top_predictions=min(message.top_predictions or DEFAULT_PREDICTIONS, len(model.labels)),
        precision=wire.precision_from_proto(message.precision),
        output=output,
        priority=wire.priority_from_proto(message.priority),
        allow_partial=message.allow_partial,
        stream=_stream(message.stream),
        evaluation_steps=check_curve_steps(message.evaluation_steps or DEFAULT_CURVE_STEPS)
        if message.evaluate
        else None,
    )
    _check_reply_size(request, settings)
    return request


def _methods(message: pb.ExplainRequest, settings: Settings) -> tuple[MethodSpec, ...]:
    if len(message.methods) > settings.max_methods:
        raise InvalidOption(f"a request has at most {settings.max_methods} methods, got {len(message.methods)}")
    return tuple(wire.method_from_proto(method) for method in message.methods) or (GradCam(),)


def _evaluation_steps(message: pb.ExplainRequest) -> int | None:
    return check_curve_steps(message.evaluation_steps or DEFAULT_CURVE_STEPS) if message.evaluate else None


def _stream(message: pb.StreamOptions) -> StreamOptions:
    return StreamOptions(**{field.name: value for field, value in message.ListFields()})


def _layers(message: pb.ExplainRequest, settings: Settings) -> tuple[str, ...]:
    if len(message.layers) > settings.max_layers:
        raise InvalidOption(f"a request has at most {settings.max_layers} layers, got {len(message.layers)}")
    return tuple(message.layers)


def _targets(message: pb.ExplainRequest, model: ModelInfo, settings: Settings) -> tuple[Target, ...]:
    targets = [resolve_target(wire.target_from_proto(target), model.labels) for target in message.targets]
    distinct = tuple(dict.fromkeys(targets)) or (Target(top_k=1),)
    number = sum(target.top_k or 1 for target in distinct)
    if number > settings.max_targets:
        raise InvalidOption(f"a request explains at most {settings.max_targets} classes, got {number}")
    return distinct


def _image(message: pb.Image, model: ModelInfo, settings: Settings) -> tuple[bytes | np.ndarray, tuple[int, int]]:
    size = len(message.encoded) + len(message.tensor.data)
    if size > settings.max_image_bytes:
        raise InvalidImage(f"an image may have at most {settings.max_image_bytes} bytes, got {size}")
    image = wire.image_from_proto(message)
    if isinstance(image, bytes):
        return image, images.probe(image, settings.max_image_bytes, settings.max_image_pixels)
    height, width = image.shape[:2]
    if height * width > settings.max_image_pixels:
        raise InvalidImage(f"an image may have at most {settings.max_image_pixels} pixels, got {height * width}")
    if image.dtype == np.float32:
        _check_float(image, model)
    return image, (height, width)


def _check_float(image: np.ndarray, model: ModelInfo) -> None:
    if image.shape[:2] != model.input_size:
        allowed = list(model.input_size)
        raise InvalidImage(
            f"a FLOAT32 tensor must have the network's input size {allowed}, got {list(image.shape[:2])}"
        )
    if not (np.isfinite(image).all() and image.min() >= 0 and image.max() <= 1):
        raise InvalidImage("a FLOAT32 tensor must have pixels in [0, 1]")


def _output(message: pb.Output) -> OutputOptions:
    if message.encoding not in ENCODINGS:
        raise InvalidOption(f"output: unknown encoding {message.encoding}")
    output = OutputOptions(
        size=wire.size_from_proto(message.size),
        encoding=ENCODINGS[message.encoding],
        colormap=message.colormap or "jet",
        opacity=message.opacity if message.HasField("opacity") else 0.5,
        boxes=_boxes(message.boxes) if message.HasField("boxes") else None,
    )
    check_overlay(output.colormap, output.opacity)
    if output.overlay and output.size == "layer":
        raise InvalidOption("an overlay has size INPUT or ORIGINAL, not LAYER")
    return output


def _boxes(message: pb.BoxOptions) -> BoxOptions:
    if message.HasField("threshold"):
        return BoxOptions(message.threshold, message.all_components)
    return BoxOptions(all_components=message.all_components)


def _check_reply_size(request: Request, settings: Settings) -> None:
    sizes = {
        "input": request.model.input_size,
        "layer": (request.parts.layers[0].height, request.parts.layers[0].width),
        "original": request.image_size,
    }
    height, width = sizes[request.output.size]
    maps, pixels = request.max_maps, request.max_maps * height * width
    what = f"{maps} maps of {height} x {width}"
    if pixels > settings.max_map_pixels:
        raise InvalidOption(
            f"all maps together may have at most {settings.max_map_pixels} pixels; {what} have {pixels}: "
            "ask for fewer classes, or for size INPUT or LAYER"
        )
    encoding = request.output.encoding
    size = pixels * _RAW_BYTES.get(encoding, 0)
    if size > settings.max_message_bytes:
        raise InvalidOption(
            f"a reply may have at most {settings.max_message_bytes} bytes; {what} as {encoding} have {size}: "
            "ask for UINT8 or PNG, for fewer classes, or for size INPUT or LAYER"
        )
    if request.sums_bytes > settings.max_message_bytes:  # a worker's answer has a bound as well
        layers = ", ".join(f"{layer.name!r} of {layer.height} x {layer.width}" for layer in request.parts.layers)
        raise InvalidOption(f"{maps} maps at {layers} are too large: ask for fewer classes, or for a later layer")

"""What the clients send and read: requests from what Python callers have, our types from replies. No channel here."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict, TypeVar, Unpack, cast

import numpy as np
from PIL import Image

from camserve import images, wire
from camserve.errors import Internal, InvalidOption
from camserve.finalise.encode import ARRAYS, decode
from camserve.finalise.render import background
from camserve.images import ImageLike, read_image
from camserve.methods import MethodLike, Parameter, as_method
from camserve.types import (
    Box,
    BoxOptions,
    Cost,
    Explanation,
    InputView,
    MapSize,
    ModelInfo,
    Precision,
    Prediction,
    SaliencyMap,
    Target,
    TargetLike,
)
from camserve.v1 import explain_pb2 as pb

SIZES: dict[MapSize, pb.Output.Size] = {
    "input": pb.Output.INPUT,
    "layer": pb.Output.LAYER,
    "original": pb.Output.ORIGINAL,
}
_T = TypeVar("_T")


class Options(TypedDict, total=False):
    """Options of a request beside methods and targets."""

    model: str
    """Name of the model; may be left out when the server has exactly one."""
    layer: str
    """Name of the layer; empty means the model's default layer."""
    size: MapSize
    """Of the maps: "input" (default), "layer" or "original"."""
    encoding: str
    """How maps travel: "float32" (default, exact), or "float16", "uint8", "png" for smaller replies."""
    boxes: BoxOptions | bool | None
    """Adds bounding boxes to the maps; True: with the default options."""
    top_predictions: int
    """How many of the most probable classes to list; default 5."""
    precision: Precision
    """Of the masked queries: "exact" (default) is float32 throughout."""


@dataclass(frozen=True, eq=False)
class Asked:
    """A request, and what its reply is read with."""

    request: pb.ExplainRequest
    image: bytes | np.ndarray
    size: MapSize

    def lies_on(self, view: InputView) -> Image.Image | None:
        """What the maps lie on."""
        return None if self.size == "layer" else background(_picture(self.image, view), view, self.size)


@dataclass(frozen=True)
class Progress:
    """How far a request has come."""

    done: int
    """Masked queries answered."""
    total: int
    predictions: tuple[Prediction, ...]


@dataclass(frozen=True)
class ModelSummary:
    """A model of a server."""

    name: str
    version: str
    ready: bool
    """A worker is ready to answer."""


@dataclass(frozen=True)
class MethodInfo:
    """A method as a server offers it."""

    name: str
    title: str
    paper: str
    parameters: tuple[Parameter, ...]
    queries: int
    """Masked queries at the default layer with default parameters, for one target."""


@dataclass(frozen=True)
class Model(ModelInfo):
    """What is known of a served model, and the methods that it offers."""

    ready: bool = False
    methods: tuple[MethodInfo, ...] = ()


def ask(
    image: ImageLike,
    methods: Sequence[MethodLike] = ("grad_cam",),
    targets: Sequence[TargetLike] = (),
    **options: Unpack[Options],
) -> Asked:
    """The request for what a caller asks.

    Raises:
        InvalidInput: what is wrong, what was allowed and what came, as far as it shows without the model.
    """
    content = read_image(image)
    size = options.get("size", "input")
    try:
        request = pb.ExplainRequest(
            model=options.get("model", ""),
            image=wire.image_to_proto(content),
            methods=[wire.method_to_proto(as_method(method)) for method in _several(methods)],
            targets=[wire.target_to_proto(Target.of(target)) for target in _several(targets)],
            layer=options.get("layer", ""),
            output=_output(size, options.get("encoding", "float32"), options.get("boxes")),
            top_predictions=options.get("top_predictions", 5),
            precision=wire.precision_to_proto(options.get("precision", "exact")),
        )
    except (ValueError, TypeError) as error:  # from protobuf: a negative class index, for instance
        raise InvalidOption(f"an option is out of range: {error}") from None
    return Asked(request, content, size)


def _several(values: Sequence[_T]) -> Sequence[_T]:
    """A lone string means itself, not its letters."""
    return cast("Sequence[_T]", (values,)) if isinstance(values, str) else values


def _output(size: MapSize, encoding: str, boxes: BoxOptions | bool | None) -> pb.Output:
    if size not in SIZES:
        raise InvalidOption(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    if encoding not in ARRAYS:
        raise InvalidOption(f"encoding must be one of {', '.join(ARRAYS)}, got {encoding!r}")
    output = pb.Output(size=SIZES[size], encoding=encoding.upper())
    if boxes:
        wanted = BoxOptions() if boxes is True else boxes
        output.boxes.CopyFrom(pb.BoxOptions(threshold=wanted.threshold, all_components=wanted.all_components))
    return output


def _picture(image: bytes | np.ndarray, view: InputView) -> Image.Image:
    pixels = max(view.original_size[0] * view.original_size[1], 1)  # the server took it: its limit counts, not ours
    return images.picture(image, max_bytes=sys.maxsize, max_pixels=pixels)


def explanation(reply: pb.ExplainReply, asked: Asked) -> Explanation:
    """The answer, its maps lying on the image that was sent.

    Raises:
        Internal: the reply contradicts itself.
    """
    view = wire.view_from_proto(reply.input)
    image = asked.lies_on(view)
    try:
        maps = tuple(_map(message, image) for message in reply.maps)
    except (ValueError, InvalidOption) as error:
        raise Internal(f"the server's reply is malformed: {error}") from None
    return Explanation(
        model=reply.model,
        version=reply.version,
        predictions=_predictions(reply.predictions),
        maps=maps,
        input=view,
        cost=_cost(reply.cost),
    )


def _predictions(messages: Sequence[pb.Prediction]) -> tuple[Prediction, ...]:
    return tuple(wire.prediction_from_proto(message) for message in messages)


def _map(message: pb.SaliencyMap, image: Image.Image | None) -> SaliencyMap:
    height, width = message.shape
    return SaliencyMap(
        method=wire.method_from_proto(message.method),
        target=wire.prediction_from_proto(message.target),
        layer=message.layer,
        array=decode(message.data, pb.Output.Encoding.Name(message.encoding).lower(), (height, width)),
        value_range=(message.minimum, message.maximum),
        degenerate=message.degenerate,
        complete=message.complete,
        boxes=tuple(Box(box.left, box.top, box.right, box.bottom, box.score) for box in message.boxes),
        image=image,
    )


def _cost(message: pb.Cost) -> Cost:
    return Cost(
        queries=message.queries,
        stage_seconds=dict(message.stage_seconds),
        steps=message.steps,
        precision=wire.precision_from_proto(message.precision),
        worker=message.worker,
    )


def update(message: pb.ExplainUpdate, asked: Asked) -> Progress | Explanation:
    """One message of a stream."""
    if message.WhichOneof("update") == "reply":
        return explanation(message.reply, asked)
    progress = message.progress
    return Progress(progress.done, progress.total, _predictions(progress.predictions))


def summaries(reply: pb.ListModelsReply) -> tuple[ModelSummary, ...]:
    """The models of a server."""
    return tuple(ModelSummary(model.name, model.version, model.ready) for model in reply.models)


def unready(models: Sequence[ModelSummary], name: str = "") -> str | None:
    """What is not ready: of this model, or with an empty name of all; None when everything is."""
    wanted = [model for model in models if name in ("", model.name)]
    if not wanted:
        return f"there is no model {name!r}" if name else "no model is served"
    waiting = [model.name for model in wanted if not model.ready]
    return f"no worker is ready for {', '.join(waiting)}" if waiting else None


def model(message: pb.Model) -> Model:
    """A model with its methods."""
    info = wire.model_from_proto(message)
    values = {field.name: getattr(info, field.name) for field in dataclasses.fields(info)}
    return Model(**values, ready=message.ready, methods=tuple(_method(method) for method in message.methods))


def _method(message: pb.Method) -> MethodInfo:
    parameters = tuple(_parameter(parameter) for parameter in message.parameters)
    return MethodInfo(message.name, message.title, message.paper, parameters, message.queries)


def _parameter(message: pb.Parameter) -> Parameter:
    return Parameter(
        name=message.name,
        type=message.type,
        default={"integer": int, "number": float}.get(message.type, str)(message.default),
        minimum=message.minimum if message.HasField("minimum") else None,
        maximum=message.maximum if message.HasField("maximum") else None,
        choices=tuple(message.choices),
        description=message.description,
    )

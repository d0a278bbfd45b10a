"""What the clients send and read: requests from what Python callers have, our types from replies. No channel here."""

from __future__ import annotations

import dataclasses
import re
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
from camserve.parts import check_curve_steps, layer_names
from camserve.types import (
    DEFAULT_CURVE_STEPS,
    Box,
    BoxOptions,
    Cost,
    Explanation,
    Fusion,
    InputView,
    MapSize,
    ModelInfo,
    Precision,
    Prediction,
    Priority,
    SaliencyMap,
    StreamOptions,
    Target,
    TargetLike,
)
from camserve.v1 import explain_pb2 as pb

_T = TypeVar("_T")


class Options(TypedDict, total=False):
    """Options of a request beside methods and targets."""

    model: str
    """Name of the model; may be left out when the server has exactly one."""
    layer: str | Sequence[str]
    """Name of the layer; empty means the model's default layer. The maps of several are fused."""
    fusion: Fusion
    """Of several layers' maps: "mean" (default) or "max"."""
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
    evaluate: bool
    """Adds deletion and insertion (RISE protocol) of every map, at the cost of further masked queries."""
    evaluation_steps: int
    """Of each curve; default 28."""
    priority: Priority
    """Who goes first while requests wait: "interactive", "normal" (default) or "batch"."""
    allow_partial: bool
    """At the deadline, maps of what was answered so far, `complete` False, instead of DeadlineExceeded."""
    stream: StreamOptions
    """How often a stream has maps before the final ones."""
    request_id: str
    """Under which the server logs the call: 1..128 printable ASCII characters without spaces; default: a new one."""


@dataclass(frozen=True, eq=False)
class Asked:
    """A request, and what its reply is read with."""

    request: pb.ExplainRequest
    image: bytes | np.ndarray
    size: MapSize
    request_id: str = ""
    """Sent along if it is not empty."""

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
    maps: tuple[SaliencyMap, ...] = ()
    """As far as they are known; empty when none are due."""


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
    """Passes beyond the first forward, at most: for one target at the default layer with default parameters."""
    needs: str = ""
    """What a network must have for it: "GAP head", "ReLU", "ViT"; empty: any."""


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
            layers=layer_names(options.get("layer", "")),
            fusion=wire.fusion_to_proto(options.get("fusion", "mean")),
            evaluate=options.get("evaluate", False),
            evaluation_steps=check_curve_steps(options.get("evaluation_steps", DEFAULT_CURVE_STEPS)),
            output=_output(size, options.get("encoding", "float32"), options.get("boxes")),
            top_predictions=options.get("top_predictions", 5),
            precision=wire.precision_to_proto(options.get("precision", "exact")),
            priority=wire.priority_to_proto(options.get("priority", "normal")),
            allow_partial=options.get("allow_partial", False),
            stream=_stream(options.get("stream", StreamOptions())),
        )
    except (ValueError, TypeError) as error:  # from protobuf: a negative class index, for instance
        raise InvalidOption(f"an option is out of range: {error}") from None
    return Asked(request, content, size, _checked_id(options.get("request_id", "")))


def _checked_id(request_id: str) -> str:
    if not re.fullmatch(r"[!-~]{0,128}", request_id):
        raise InvalidOption(f"a request id is 1..128 printable ASCII characters without spaces, got {request_id!r}")
    return request_id


def _stream(options: StreamOptions) -> pb.StreamOptions:
    return pb.StreamOptions(max_maps=options.max_maps, min_interval_s=options.min_interval_s)


def _several(values: Sequence[_T]) -> Sequence[_T]:
    """A lone string means itself, not its letters."""
    return cast("Sequence[_T]", (values,)) if isinstance(values, str) else values


def _output(size: MapSize, encoding: str, boxes: BoxOptions | bool | None) -> pb.Output:
    if encoding not in ARRAYS:
        raise InvalidOption(f"encoding must be one of {', '.join(ARRAYS)}, got {encoding!r}")
    output = pb.Output(size=wire.size_to_proto(size), encoding=encoding.upper())
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
    return Explanation(
        model=reply.model,
        version=reply.version,
        predictions=_predictions(reply.predictions),
        maps=_maps(reply.maps, reply.input, asked),
        input=wire.view_from_proto(reply.input),
        cost=_cost(reply.cost),
        request_id=reply.request_id,
    )


def _maps(messages: Sequence[pb.SaliencyMap], view: pb.InputView, asked: Asked) -> tuple[SaliencyMap, ...]:
    image = asked.lies_on(wire.view_from_proto(view))
    try:
        return tuple(_map(message, image) for message in messages)
    except (ValueError, InvalidOption) as error:
        raise Internal(f"the server's reply is malformed: {error}") from None


def _predictions(messages: Sequence[pb.Prediction]) -> tuple[Prediction, ...]:
    return tuple(wire.prediction_from_proto(message) for message in messages)


def _map(message: pb.SaliencyMap, image: Image.Image | None) -> SaliencyMap:
    height, width = message.shape
    return SaliencyMap(
        method=wire.method_from_proto(message.method),
        target=wire.prediction_from_proto(message.target),
        layers=tuple(message.layers),
        array=decode(message.data, pb.Output.Encoding.Name(message.encoding).lower(), (height, width)),
        value_range=(message.minimum, message.maximum),
        degenerate=message.degenerate,
        complete=message.complete,
        fraction=message.fraction,
        choice=message.choice,
        boxes=tuple(Box(box.left, box.top, box.right, box.bottom, box.score) for box in message.boxes),
        image=image,
        faithfulness=wire.faithfulness_from_proto(message.faithfulness) if message.HasField("faithfulness") else None,
    )


def _cost(message: pb.Cost) -> Cost:
    return Cost(
        queries=message.queries,
        stage_seconds=dict(message.stage_seconds),
        steps=message.steps,
        precision=wire.precision_from_proto(message.precision),
        worker=message.worker,
        evaluation_queries=message.evaluation_queries,
        cached=message.cached,
    )


def update(message: pb.ExplainUpdate, asked: Asked) -> Progress | Explanation:
    """One message of a stream."""
    if message.WhichOneof("update") == "reply":
        return explanation(message.reply, asked)
    progress = message.progress
    maps = _maps(progress.maps, progress.input, asked) if progress.maps else ()
    return Progress(progress.done, progress.total, _predictions(progress.predictions), maps)


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
    return MethodInfo(message.name, message.title, message.paper, parameters, message.queries, message.needs)


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

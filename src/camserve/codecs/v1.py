"""Speaks the typed gRPC API, `camserve.v1`: requests, replies, streams and models, in both directions.

Servers and clients use the same functions. Large messages take time: servers call the functions on bytes in a thread.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

import numpy as np
from google.protobuf.descriptor import FieldDescriptor
from PIL import Image

from camserve import images, methods
from camserve.codecs import bulk
from camserve.codecs.fields import from_message, to_message
from camserve.errors import Internal, InvalidImage, InvalidInput, InvalidOption
from camserve.finalise.encode import decode, encode
from camserve.finalise.render import Background, lies_on
from camserve.images import ImageContent
from camserve.types import (
    DEFAULT_CURVE_STEPS,
    Against,
    AnyTarget,
    Box,
    BoxOptions,
    BoxTarget,
    Contrast,
    Cost,
    Detection,
    Edges,
    Explanation,
    Faithfulness,
    Finer,
    InputView,
    Layer,
    MethodInfo,
    Model,
    ModelInfo,
    ModelSummary,
    Precision,
    Prediction,
    Progress,
    Region,
    RuntimeInfo,
    SaliencyMap,
    StreamOptions,
    Target,
    Text,
    TextInput,
    Value,
    Vector,
    Word,
)
from camserve.types.offered import why_not
from camserve.types.request import DEFAULT_PREDICTIONS, UNBOUNDED, ExplainRequest, OutputOptions, RequestLimits
from camserve.types.target_forms import TargetForm, target_forms
from camserve.v1 import explain_pb2 as pb
from camserve.wording import shown

_BULK: bulk.Fields = {3: {1: "encoded", 2: {3: "data"}}, 5: {9: {1: "reference", 2: {3: "reference"}}}}
"""Fields of an ExplainRequest that hold pixels: those of `image` and of each reference, `encoded` or `tensor.data`."""


def request_to_proto(request: ExplainRequest) -> pb.ExplainRequest:
    """Returns the message of a request.

    Raises:
        InvalidOption: a number is too large for its field.
    """
    output = request.output
    try:
        message = to_message(
            pb.ExplainRequest,
            request,
            image=None,  # set below: a message that is given to another one is copied
            methods=[method_to_proto(method) for method in request.methods],
            predictions_only=not request.methods,
            targets=[target_to_proto(target) for target in request.targets],
            fusion=request.fusion.upper(),
            output=to_message(
                pb.Output,
                output,
                size=output.size.upper(),
                encoding=output.encoding.upper(),
                boxes=None if output.boxes is None else to_message(pb.BoxOptions, output.boxes),
            ),
            precision=precision_to_proto(request.precision),
            priority=request.priority.upper(),
            stream=to_message(pb.StreamOptions, request.stream),
        )
    except ValueError as error:  # from protobuf: a number beyond 32 bits, for instance
        raise InvalidOption(f"an option is out of range: {error}") from None
    _set_image(message.image, request.image)
    return message


def request_from_bytes(data: bytes, limits: RequestLimits = UNBOUNDED) -> ExplainRequest:
    """Returns the request of a serialized message; what is not set takes its default.

    Raises:
        InvalidInput: it is no such message, it has more than is allowed, or something in it is unknown or out of range.
    """
    cut = bulk.parse(pb.ExplainRequest, data, _BULK, limits)
    message = cut.message
    limits.check_image(max(len(cut.last("encoded")), len(cut.last("data"))))
    limits.check_counts(methods=len(message.methods), layers=len(message.layers), targets=len(message.targets))
    limits.check_names((message.model, message.version, message.output.colormap, *message.layers))
    limits.check_texts([message.text])
    references = iter(_references(message.targets, cut, limits))
    targets = tuple(_target(target, lambda _: next(references)) for target in message.targets)
    request = from_message(
        ExplainRequest,
        message,
        image=_image(message.image, bytes(cut.last("encoded")), cut.last("data")),
        methods=tuple(method_from_proto(method) for method in message.methods) or (methods.GradCam(),),
        targets=targets,
        fusion=_name("fusion", pb.Fusion, message.fusion, "mean"),
        output=_output_from_proto(message.output),
        top_predictions=message.top_predictions or DEFAULT_PREDICTIONS,
        precision=precision_from_proto(message.precision),
        evaluation_steps=message.evaluation_steps or DEFAULT_CURVE_STEPS,
        priority=_name("priority", pb.Priority, message.priority, "normal"),
        stream=StreamOptions(**_set_fields(message.stream)),
    )
    return request.without_maps() if message.predictions_only else request


def _references(targets: Sequence[pb.Target], cut: bulk.Cut[pb.ExplainRequest], limits: RequestLimits) -> list[Any]:
    """Returns the reference images of a request in the order of its targets; their classes are counted before.

    Raises:
        InvalidInput: too many classes are named, a name or a text is too long, or an image is too large or has no
            contents.
    """
    limits.check_classes(sum(len(_classes_of(target)) for target in targets))
    limits.check_names(one.label for target in targets for one in _classes_of(target))
    limits.check_texts(words for target in targets for words in (target.text, target.word.words))
    messages = [target.reference for target in targets if target.WhichOneof("target") == "reference"]
    contents = cut.bulk.get("reference", [])
    if len(messages) != len(contents):
        raise InvalidImage("no image: set reference.encoded or reference.tensor, once")
    for content in contents:
        limits.check_image(len(content))
    return [_image(message, bytes(content), content) for message, content in zip(messages, contents, strict=True)]


def _classes_of(target: pb.Target) -> Sequence[pb.Target | pb.ClassTarget]:
    kind = target.WhichOneof("target")
    if kind == "contrast":
        return [target.contrast.of, *target.contrast.than]
    if kind == "region":
        what = target.region.WhichOneof("what")
        if what in ("contrast", "finer", "against"):
            return _classes_of(pb.Target(**{what: getattr(target.region, what)}))
        return [target.region.of]
    return [getattr(target, kind).of] if kind in ("finer", "against", "value", "box") else [target]


def model_name(data: bytes, limits: RequestLimits = UNBOUNDED) -> str:
    """Returns the model that a request names, whatever else is wrong with it; "" where none can be read."""
    try:
        return bulk.parse(pb.ExplainRequest, data, _BULK, limits).message.model
    except InvalidInput:
        return ""


def _output_from_proto(message: pb.Output) -> OutputOptions:
    return OutputOptions(
        size=_name("size", pb.Output.Size, message.size, "input"),
        encoding=_name("encoding", pb.Output.Encoding, message.encoding, "float32"),
        colormap=message.colormap or "jet",
        opacity=message.opacity if message.HasField("opacity") else 0.5,
        boxes=BoxOptions(**_set_fields(message.boxes)) if message.HasField("boxes") else None,
        signed=message.signed,
    )


def _set_fields(message: Any) -> dict[str, Any]:
    return {field.name: value for field, value in message.ListFields()}


def reply_to_proto(explanation: Explanation, maps: Iterable[pb.SaliencyMap]) -> pb.ExplainReply:
    """Returns the message of an explanation, with encoded maps instead of its own."""
    return to_message(
        pb.ExplainReply,
        explanation,
        predictions=[prediction_to_proto(prediction) for prediction in explanation.predictions],
        maps=maps,
        input=view_to_proto(explanation.input),
        cost=to_message(pb.Cost, explanation.cost, precision=explanation.cost.precision.upper()),
    )


def canonical_reply(reply: pb.ExplainReply) -> bytes:
    """Returns the bytes that the hash of a reply is taken of: the message without evidence, its maps in order of keys.

    A client gets the same from what it has received, whichever door it came by.
    """
    if reply.evidence:
        bare = pb.ExplainReply()
        bare.CopyFrom(reply)
        bare.ClearField("evidence")
        reply = bare
    return bytes(reply.SerializeToString(deterministic=True))


def maps_to_proto(maps: Iterable[SaliencyMap], output: OutputOptions, max_bytes: int) -> list[pb.SaliencyMap]:
    """Returns the messages of maps, encoded one after the other, so that few maps are in memory at once.

    Raises:
        InvalidOption: the encoded maps have more than `max_bytes` bytes together.
    """
    messages, size = [], 0
    for saliency in maps:
        data = encode(saliency, output.encoding, output.colormap, output.opacity)
        size += len(data)
        if size > max_bytes:
            raise InvalidOption(f"a reply may have at most {max_bytes} bytes: ask for fewer classes")
        messages.append(_map_to_proto(saliency, output.encoding, data))
    return messages


def _map_to_proto(saliency: SaliencyMap, encoding: str, data: bytes) -> pb.SaliencyMap:
    return to_message(
        pb.SaliencyMap,
        saliency,
        method=method_to_proto(saliency.method),
        target=prediction_to_proto(saliency.target),
        shape=saliency.array.shape,
        classes=[prediction_to_proto(prediction) for prediction in saliency.classes],
        encoding=encoding.upper(),
        data=data,
        minimum=saliency.value_range[0],
        maximum=saliency.value_range[1],
        boxes=[to_message(pb.Box, box) for box in saliency.boxes],
        faithfulness=None if saliency.faithfulness is None else to_message(pb.Faithfulness, saliency.faithfulness),
    )


def explanation_from_proto(reply: pb.ExplainReply, request: ExplainRequest) -> Explanation:
    """Returns the answer to a request, its maps lying on the image that was sent.

    Raises:
        Internal: the reply contradicts itself.
    """
    return from_message(
        Explanation,
        reply,
        predictions=predictions_from_proto(reply.predictions),
        maps=_maps_from_proto(reply.maps, reply.input, request),
        input=view_from_proto(reply.input),
        cost=from_message(Cost, reply.cost, precision=precision_from_proto(reply.cost.precision)),
    )


def _maps_from_proto(
    messages: Sequence[pb.SaliencyMap], view: pb.InputView, request: ExplainRequest
) -> tuple[SaliencyMap, ...]:
    if not messages:
        return ()
    beneath = lies_on(request.image, view_from_proto(view), request.output.size)
    try:
        return tuple(_map_from_proto(message, beneath) for message in messages)
    except (ValueError, InvalidOption) as error:
        raise Internal(f"the server's reply is malformed: {error}") from None


def _map_from_proto(message: pb.SaliencyMap, beneath: Background | None) -> SaliencyMap:
    height, width = message.shape
    found = message.faithfulness
    curves = Faithfulness(found.protocol, np.array(found.deletion), np.array(found.insertion))
    return from_message(
        SaliencyMap,
        message,
        method=method_from_proto(message.method),
        target=prediction_from_proto(message.target),
        classes=predictions_from_proto(message.classes),
        array=decode(message.data, pb.Output.Encoding.Name(message.encoding).lower(), (height, width), message.signed),
        value_range=(message.minimum, message.maximum),
        boxes=tuple(from_message(Box, box) for box in message.boxes),
        lies_on=beneath,
        faithfulness=curves if message.HasField("faithfulness") else None,
    )


def predictions_from_proto(messages: Iterable[pb.Prediction]) -> tuple[Prediction, ...]:
    """Returns the predictions of messages."""
    return tuple(prediction_from_proto(message) for message in messages)


def progress_to_proto(progress: Progress, view: InputView, output: OutputOptions, max_bytes: int) -> pb.Progress:
    """Returns the message of how far a request has come; raises as `maps_to_proto`."""
    return to_message(
        pb.Progress,
        progress,
        predictions=[prediction_to_proto(prediction) for prediction in progress.predictions],
        maps=maps_to_proto(progress.maps, output, max_bytes),
        input=view_to_proto(view),
    )


def update_from_proto(message: pb.ExplainUpdate, request: ExplainRequest) -> Progress | Explanation:
    """Returns what one message of a stream says; raises as `explanation_from_proto`."""
    if message.WhichOneof("update") == "reply":
        return explanation_from_proto(message.reply, request)
    progress = message.progress
    maps = _maps_from_proto(progress.maps, progress.input, request)
    return Progress(progress.done, progress.total, predictions_from_proto(progress.predictions), maps)


def summaries_from_proto(reply: pb.ListModelsReply) -> tuple[ModelSummary, ...]:
    """Returns the models of a server."""
    return tuple(from_message(ModelSummary, model) for model in reply.models)


def served_model_to_proto(info: ModelInfo, ready: bool) -> pb.Model:
    """Returns the message of a model with its methods, each with its cost at the default layer."""
    message = model_to_proto(info)
    message.ready = ready
    message.targets.extend(to_message(pb.TargetForm, form) for form in target_forms(info))
    message.methods.extend(_method_to_proto(name, spec, info) for name, spec in methods.METHODS.items())
    return message


def served_model_from_proto(message: pb.Model) -> Model:
    """Returns a model with its methods."""
    info = model_from_proto(message)
    values = {each.name: getattr(info, each.name) for each in dataclasses.fields(info)}
    offered = tuple(_method_info_from_proto(method) for method in message.methods)
    targets = tuple(from_message(TargetForm, form) for form in message.targets)
    return Model(**values, ready=message.ready, methods=offered, targets=targets)


def _method_to_proto(name: str, spec: type[methods.MethodSpec], info: ModelInfo) -> pb.Method:
    parameters = [to_message(pb.Parameter, each, default=str(each.default)) for each in spec.parameters()]
    queries = spec.default_passes(info.layer(""), info.has_zero) or 0
    refused = why_not(spec, info)
    return to_message(pb.Method, spec, name=name, parameters=parameters, queries=queries, refused=refused)


def _method_info_from_proto(message: pb.Method) -> MethodInfo:
    return from_message(MethodInfo, message, parameters=tuple(map(_parameter_from_proto, message.parameters)))


def _parameter_from_proto(message: pb.Parameter) -> methods.Parameter:
    default = {"integer": int, "number": float}.get(message.type, str)(message.default)
    return from_message(methods.Parameter, message, default=default)


def method_to_proto(spec: methods.MethodSpec) -> pb.MethodSpec:
    """Returns the message of a method with every parameter set; raises InvalidOption for a number too large."""
    message = pb.MethodSpec()
    body = getattr(message, spec.name)
    body.SetInParent()
    for parameter in spec.parameters():
        value = getattr(spec, parameter.name)
        descriptor = body.DESCRIPTOR.fields_by_name[parameter.name]
        try:
            setattr(body, parameter.name, _enum(descriptor, value) if parameter.choices else value)
        except ValueError:
            raise InvalidOption(f"{spec.name}: {parameter.name} must be below 2**32, got {value}") from None
    return message


def method_from_proto(message: pb.MethodSpec) -> methods.MethodSpec:
    """Returns the method of a message; fields that are not set take their defaults.

    Raises:
        InvalidOption: no method is set, or a parameter is outside its range.
    """
    name = message.WhichOneof("method")
    if name is None:
        raise InvalidOption(f"a method spec names no method; there are {', '.join(methods.METHODS)}")
    body = getattr(message, name)
    return methods.parse_method(name, {field.name: _value(field, value) for field, value in body.ListFields()})


def _enum(field: FieldDescriptor, choice: str) -> int:
    assert field.enum_type is not None, "a parameter with choices is an enum in the proto"
    return int(field.enum_type.values_by_name[choice.upper()].number)


def _value(field: FieldDescriptor, value: Any) -> Any:
    if field.enum_type is None:
        return value
    known = field.enum_type.values_by_number.get(value)
    if known is None:
        raise InvalidOption(f"{field.name}: unknown enum value {value}")
    return known.name.lower()


def target_to_proto(target: AnyTarget) -> pb.Target:
    """Returns the message of a target; raises InvalidOption for a number too large for its field."""
    match target:
        case Target():
            return _class_to_proto(pb.Target, target)
        case Contrast():
            than = [_class_to_proto(pb.ClassTarget, other) for other in target.than]
            return pb.Target(contrast=pb.Contrast(of=_of(target), than=than, gamma=target.gamma))
        case Finer():
            return pb.Target(finer=pb.Finer(of=_of(target), gamma=target.gamma, nearest=target.nearest))
        case Against():
            return pb.Target(against=pb.Against(of=_of(target)))
        case Value():
            return pb.Target(value=pb.Value(of=_of(target), direction=target.direction.upper()))
        case Text():
            return pb.Target(text=target.words)
        case Region():
            return pb.Target(region=_region_to_proto(target))
        case BoxTarget():
            of = None if target.of is None else _class_to_proto(pb.ClassTarget, target.of)
            edges = _edges_to_proto(target.box)
            return pb.Target(box=pb.BoxTarget(box=edges, of=of, probabilities=target.probabilities))
        case Detection(of=Target() as of):
            return _class_to_proto(pb.Target, of)
        case Detection():
            return pb.Target(detection=target.index)
        case Word():
            return pb.Target(word=pb.Word(at=target.at, words=target.words))
        case Vector() if target.image is None:
            return pb.Target(vector=np.asarray(target.values, "<f4").tobytes())
        case Vector():
            return pb.Target(reference=image_to_proto(images.read_image(target.image)))


def _region_to_proto(target: Region) -> pb.Region:
    inside = target_to_proto(target.of)
    what = inside.WhichOneof("target")
    message = pb.Region()
    if what in ("contrast", "finer", "against"):
        getattr(message, what).CopyFrom(getattr(inside, what))
    elif target.of != Region().of:
        message.of.CopyFrom(_class_to_proto(pb.ClassTarget, cast("Target", target.of)))
    if target.box is not None:
        message.box.CopyFrom(_edges_to_proto(target.box))
    elif target.mask is not None:
        message.mask = target.mask
    elif target.grid is not None:
        message.grid = target.grid
    return message


def _edges_to_proto(box: Edges) -> pb.Edges:
    x0, y0, x1, y1 = box
    return pb.Edges(x0=x0, y0=y0, x1=x1, y1=y1)


def _edges_from_proto(message: pb.Edges) -> Edges:
    return message.x0, message.y0, message.x1, message.y1


def _of(target: Contrast | Finer | Against | Value) -> pb.ClassTarget:
    return _class_to_proto(pb.ClassTarget, target.of)


_ClassMessage = TypeVar("_ClassMessage", pb.Target, pb.ClassTarget)


def _class_to_proto(kind: type[_ClassMessage], target: Target) -> _ClassMessage:
    try:
        return kind(index=target.index, label=target.label, top_k=target.top_k)
    except ValueError:
        raise InvalidOption(
            f"a class index or top_k must be 0..2**32-1, got {shown(target.index or target.top_k)}"
        ) from None


def target_from_proto(message: pb.Target) -> AnyTarget:
    """Returns the target of a message.

    Raises:
        InvalidOption: nothing is set, or not what the target needs.
    """
    return _target(message, lambda reference: image_from_proto(reference))


def _target(message: pb.Target, image: Callable[[pb.Image], ImageContent]) -> AnyTarget:
    """Returns the target of a message; `image` returns the reference image, whose contents may be beside it."""
    match message.WhichOneof("target"):
        case "contrast":
            contrast = message.contrast
            than = tuple(_class_from_proto(other) for other in contrast.than)
            return Contrast(_class_from_proto(contrast.of), than, **_set(contrast, "gamma"))
        case "finer":
            return Finer(_class_from_proto(message.finer.of), **_set(message.finer, "gamma", "nearest"))
        case "against":
            return Against(_class_from_proto(message.against.of))
        case "value":
            direction = _name("direction", pb.Value.Direction, message.value.direction, "up")
            return Value(_class_from_proto(message.value.of), direction)
        case "vector":
            if len(message.vector) % 4:
                raise InvalidOption(f"a vector is float32, 4 bytes for each number; got {len(message.vector)} bytes")
            return Vector(np.frombuffer(message.vector, "<f4"))
        case "reference":
            return Vector(image=image(message.reference))
        case "text":
            return Text(message.text)
        case "region":
            return _region(message.region)
        case "box":
            of = _class_from_proto(message.box.of) if message.box.HasField("of") else None
            return BoxTarget(_edges_from_proto(message.box.box), of, probabilities=tuple(message.box.probabilities))
        case "detection":
            return Detection(message.detection)
        case "word":
            return Word(message.word.at, message.word.words)
        case _:
            return _class_from_proto(message)


def _region(message: pb.Region) -> Region:
    what, where = message.WhichOneof("what"), message.WhichOneof("where")
    values: dict[str, Any] = {}
    if what == "of":
        values["of"] = _class_from_proto(message.of)
    elif what is not None:
        values["of"] = target_from_proto(pb.Target(**{what: getattr(message, what)}))
    if where == "box":
        values["box"] = _edges_from_proto(message.box)
    elif where is not None:
        values[where] = getattr(message, where)
    return Region(**values)


def _class_from_proto(message: pb.Target | pb.ClassTarget) -> Target:
    kind = message.WhichOneof("target")
    return Target() if kind is None else Target(**{kind: getattr(message, kind)})


def _set(message: Any, *names: str) -> dict[str, Any]:
    """Returns the optional fields that are set, by name."""
    return {name: getattr(message, name) for name in names if message.HasField(name)}


def prediction_to_proto(prediction: Prediction) -> pb.Prediction:
    """Returns the message of a prediction."""
    box = None if prediction.box is None else _edges_to_proto(prediction.box)
    return to_message(pb.Prediction, prediction, box=box)


def precision_to_proto(precision: Precision) -> int:
    """Returns the number of a precision; "auto" is left unset, so that servers from before it was there understand."""
    return 0 if precision == "auto" else pb.Precision.Value(precision.upper())


def precision_from_proto(value: int) -> Precision:
    """Returns the precision of a number, 0 being the default; raises InvalidOption for an unknown one."""
    return cast("Precision", _name("precision", pb.Precision, value, "auto"))


def prediction_from_proto(message: pb.Prediction) -> Prediction:
    """Returns the prediction of a message."""
    other = any(message.HasField(name) for name in ("value", "similarity", "share"))
    said = message.probability > 0 or not other  # beside another number, 0 is what was not set
    box = _edges_from_proto(message.box) if message.HasField("box") else None
    return from_message(Prediction, message, probability=message.probability if said else None, box=box)


def view_to_proto(view: InputView) -> pb.InputView:
    """Returns the message of a view."""
    left, top, right, bottom = view.crop
    return pb.InputView(
        original_height=view.original_size[0],
        original_width=view.original_size[1],
        left=left,
        top=top,
        right=right,
        bottom=bottom,
        height=view.size[0],
        width=view.size[1],
    )


def view_from_proto(message: pb.InputView) -> InputView:
    """Returns the view of a message."""
    return InputView(
        original_size=(message.original_height, message.original_width),
        crop=(message.left, message.top, message.right, message.bottom),
        size=(message.height, message.width),
    )


def _name(what: str, names: Any, value: int, default: str) -> Any:
    """Returns the name of a number of a protobuf enum, in lower case; 0 stands for the default."""
    if value == 0:
        return default
    if value not in names.values():
        raise InvalidOption(f"unknown {what} {value}")
    return names.Name(value).lower()


def image_to_proto(image: ImageContent) -> pb.Image:
    """Returns the message of an image; a picture becomes a file.

    Raises:
        InvalidImage: an array is neither uint8 nor float32.
    """
    message = pb.Image()
    _set_image(message, image)
    return message


def image_pieces(image: ImageContent) -> list[bytes]:
    """Returns a serialized `Image` in pieces to be joined; a file is not copied. Raises as `image_to_proto`."""
    if isinstance(image, bytes):
        return bulk.within(pb.Image.ENCODED_FIELD_NUMBER, image)
    return [image_to_proto(image).SerializeToString()]


def _set_image(message: pb.Image, image: ImageContent) -> None:
    """Sets the contents of an empty message; raises as `image_to_proto`."""
    if isinstance(image, Image.Image):
        image = images.as_file(image)
    if isinstance(image, bytes):
        message.encoded = image
        return
    kinds = {"uint8": pb.Tensor.UINT8, "float32": pb.Tensor.FLOAT32}
    if image.dtype.name not in kinds:
        raise InvalidImage(f"an image array must be uint8 or float32, got {image.dtype}")
    image = image if image.ndim == 3 else image[..., None]
    little = image.astype(image.dtype.newbyteorder("<"), copy=False)
    message.tensor.data_type = kinds[image.dtype.name]
    message.tensor.shape[:] = image.shape
    message.tensor.data = little.tobytes()


def image_from_proto(message: pb.Image) -> bytes | np.ndarray:
    """Returns the image of a message; raises InvalidImage when none is set, or type, shape and data do not fit."""
    return _image(message, message.encoded, message.tensor.data)


def _image(message: pb.Image, encoded: bytes, data: bytes | memoryview) -> bytes | np.ndarray:
    """Returns the image of a message whose contents are beside it."""
    content = message.WhichOneof("content")
    if content is None:
        raise InvalidImage("no image: set image.encoded or image.tensor")
    if content == "encoded":
        return encoded
    tensor = message.tensor
    dtypes = {pb.Tensor.UINT8: "u1", pb.Tensor.FLOAT32: "<f4"}
    if tensor.data_type not in dtypes:
        raise InvalidImage("an image tensor's data_type must be UINT8 or FLOAT32")
    dtype, shape = np.dtype(dtypes[tensor.data_type]), tuple(tensor.shape)
    if len(shape) not in (2, 3) or 0 in shape or (dtype == np.uint8 and shape[2:] not in ((), (1,), (3,))):
        raise InvalidImage(
            "an image tensor's shape must be [height, width, channels], 1 or 3 of them for UINT8, "
            f"of an RGB image [height, width, 3], of a grey one also [height, width], got {shown(list(shape))}"
        )
    expected = dtype.itemsize * math.prod(shape)
    if len(data) != expected:
        raise InvalidImage(f"an image tensor of shape {list(shape)} has {expected} bytes, got {len(data)}")
    return np.frombuffer(data, dtype).reshape(shape)


def model_to_proto(info: ModelInfo) -> pb.Model:
    """Returns the message of a model without `ready` and `methods`."""
    height, width = info.input_size
    layers = [to_message(pb.Layer, layer) for layer in info.layers]
    runtime = to_message(pb.Runtime, info.runtime, precision=info.runtime.precision.upper())
    text = None if info.text is None else to_message(pb.TextInput, info.text)
    return to_message(pb.Model, info, input_height=height, input_width=width, layers=layers, runtime=runtime, text=text)


def model_from_proto(message: pb.Model) -> ModelInfo:
    """Returns the model of a message without `ready` and `methods`."""
    layers = tuple(from_message(Layer, layer) for layer in message.layers)
    size = (message.input_height, message.input_width)
    channels, precision = message.channels or 3, precision_from_proto(message.runtime.precision)
    runtime = from_message(RuntimeInfo, message.runtime, precision="exact" if precision == "auto" else precision)
    text = from_message(TextInput, message.text) if message.HasField("text") else None
    return from_message(
        ModelInfo, message, input_size=size, layers=layers, channels=channels, runtime=runtime, text=text
    )

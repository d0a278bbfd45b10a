"""Protobuf messages from our types and back, for both ends of both contracts. No torch, no gRPC channel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from google.protobuf.descriptor import FieldDescriptor

from camserve import methods
from camserve.errors import KINDS, CamserveError, Internal, InvalidImage, InvalidOption
from camserve.types import (
    DeviceMemory,
    Faithfulness,
    Fusion,
    InputView,
    Item,
    ItemResult,
    Layer,
    MapCurves,
    MapSize,
    ModelInfo,
    Partial,
    Precision,
    Prediction,
    Priority,
    StepResult,
    Target,
    Task,
)
from camserve.v1 import explain_pb2 as pb
from camserve.worker.v1 import step_pb2

_Name = TypeVar("_Name", bound=str)
_Number = TypeVar("_Number", bound=int)


def method_to_proto(spec: methods.MethodSpec) -> pb.MethodSpec:
    """Every parameter is set, defaults included. Raises InvalidOption for a number that no field holds."""
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
    """Fields that are not set take their defaults.

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


def target_to_proto(target: Target) -> pb.Target:
    """As it is."""
    """Raises InvalidOption for a number that no field holds."""
    try:
        return pb.Target(index=target.index, label=target.label, top_k=target.top_k)
    except ValueError:
        raise InvalidOption(f"a class index or top_k must be 0..2**32-1, got {target.index or target.top_k}") from None


def target_from_proto(message: pb.Target) -> Target:
    """Raises InvalidOption when nothing is set."""
    kind = message.WhichOneof("target")
    return Target() if kind is None else Target(**{kind: getattr(message, kind)})


def prediction_to_proto(prediction: Prediction) -> pb.Prediction:
    """As it is."""
    return pb.Prediction(index=prediction.index, label=prediction.label, probability=prediction.probability)


def prediction_from_proto(message: pb.Prediction) -> Prediction:
    """As it is."""
    return Prediction(index=message.index, label=message.label, probability=message.probability)


def view_to_proto(view: InputView) -> pb.InputView:
    """As it is."""
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
    """As it is."""
    return InputView(
        original_size=(message.original_height, message.original_width),
        crop=(message.left, message.top, message.right, message.bottom),
        size=(message.height, message.width),
    )


_PRECISIONS: dict[Precision, pb.Precision] = {"exact": pb.EXACT, "bfloat16": pb.BFLOAT16}
_PRIORITIES: dict[Priority, pb.Priority] = {"normal": pb.NORMAL, "interactive": pb.INTERACTIVE, "batch": pb.BATCH}
_FUSIONS: dict[Fusion, pb.Fusion] = {"mean": pb.MEAN, "max": pb.MAX}
_SIZES: dict[MapSize, pb.Output.Size] = {
    "input": pb.Output.INPUT,
    "layer": pb.Output.LAYER,
    "original": pb.Output.ORIGINAL,
}


def precision_to_proto(precision: Precision) -> pb.Precision:
    """Raises InvalidOption for an unknown name."""
    return _number("precision", _PRECISIONS, precision)


def precision_from_proto(value: pb.Precision) -> Precision:
    """Unspecified means exact. Raises InvalidOption for a number that is not in the enum."""
    return _name("precision", _PRECISIONS, value)


def priority_to_proto(priority: Priority) -> pb.Priority:
    """Raises InvalidOption for an unknown name."""
    return _number("priority", _PRIORITIES, priority)


def priority_from_proto(value: pb.Priority) -> Priority:
    """Unspecified means normal. Raises InvalidOption for a number that is not in the enum."""
    return _name("priority", _PRIORITIES, value)


def fusion_to_proto(fusion: Fusion) -> pb.Fusion:
    """Raises InvalidOption for an unknown name."""
    return _number("fusion", _FUSIONS, fusion)


def fusion_from_proto(value: pb.Fusion) -> Fusion:
    """Unspecified means mean. Raises InvalidOption for a number that is not in the enum."""
    return _name("fusion", _FUSIONS, value)


def size_to_proto(size: MapSize) -> pb.Output.Size:
    """Raises InvalidOption for an unknown name."""
    return _number("size", _SIZES, size)


def size_from_proto(value: pb.Output.Size) -> MapSize:
    """Unspecified means input. Raises InvalidOption for a number that is not in the enum."""
    return _name("size", _SIZES, value)


def _number(what: str, numbers: Mapping[_Name, _Number], name: _Name) -> _Number:
    try:
        return numbers[name]
    except KeyError:
        raise InvalidOption(f"{what} must be one of {', '.join(numbers)}, got {name!r}") from None


def _name(what: str, numbers: Mapping[_Name, _Number], value: _Number) -> _Name:
    """The first name is the default, which 0 stands for."""
    if value == 0:
        return next(iter(numbers))
    for name, number in numbers.items():
        if number == value:
            return name
    raise InvalidOption(f"unknown {what} {value}")


def faithfulness_to_proto(found: Faithfulness) -> pb.Faithfulness:
    """The curves with their areas."""
    return pb.Faithfulness(
        protocol=found.protocol,
        deletion_auc=found.deletion_auc,
        insertion_auc=found.insertion_auc,
        overall=found.overall,
        deletion=found.deletion.tolist(),
        insertion=found.insertion.tolist(),
    )


def faithfulness_from_proto(message: pb.Faithfulness) -> Faithfulness:
    """The curves; the areas follow from them."""
    return Faithfulness(message.protocol, np.array(message.deletion), np.array(message.insertion))


def error_to_proto(error: CamserveError) -> step_pb2.Error:
    """The class by its name, and the message."""
    return step_pb2.Error(kind=type(error).__name__, message=str(error))


def error_from_proto(message: step_pb2.Error) -> CamserveError:
    """A class that this side does not know becomes Internal."""
    return KINDS.get(message.kind, Internal)(message.message)


def image_to_proto(image: bytes | np.ndarray) -> pb.Image:
    """Raises InvalidImage for an array that is neither uint8 nor float32."""
    if isinstance(image, bytes):
        return pb.Image(encoded=image)
    kinds = {"uint8": pb.Tensor.UINT8, "float32": pb.Tensor.FLOAT32}
    if image.dtype.name not in kinds:
        raise InvalidImage(f"an image array must be uint8 or float32, got {image.dtype}")
    little = image.astype(image.dtype.newbyteorder("<"), copy=False)
    return pb.Image(tensor=pb.Tensor(data_type=kinds[image.dtype.name], shape=image.shape, data=little.tobytes()))


def image_from_proto(message: pb.Image) -> bytes | np.ndarray:
    """Raises InvalidImage when nothing is set, or when type, shape and data do not fit each other."""
    content = message.WhichOneof("content")
    if content is None:
        raise InvalidImage("no image: set image.encoded or image.tensor")
    if content == "encoded":
        return message.encoded
    tensor = message.tensor
    dtypes = {pb.Tensor.UINT8: "u1", pb.Tensor.FLOAT32: "<f4"}
    if tensor.data_type not in dtypes:
        raise InvalidImage("an image tensor's data_type must be UINT8 or FLOAT32")
    dtype, shape = np.dtype(dtypes[tensor.data_type]), tuple(tensor.shape)
    if len(shape) != 3 or shape[2] != 3 or 0 in shape:
        raise InvalidImage(f"an image tensor's shape must be [height, width, 3], got {list(shape)}")
    expected = dtype.itemsize * shape[0] * shape[1] * 3
    if len(tensor.data) != expected:
        raise InvalidImage(f"an image tensor of shape {list(shape)} has {expected} bytes, got {len(tensor.data)}")
    return np.frombuffer(tensor.data, dtype).reshape(shape)


def step_to_proto(items: Sequence[Item]) -> step_pb2.Step:
    """A step for a worker."""
    return step_pb2.Step(items=[_item_to_proto(item) for item in items])


def _item_to_proto(item: Item) -> step_pb2.Item:
    return step_pb2.Item(
        image=image_to_proto(item.image),
        targets=[target_to_proto(target) for target in item.targets],
        tasks=[_task_to_proto(task) for task in item.tasks],
        top_predictions=item.top_predictions,
        precision=precision_to_proto(item.precision),
        deadline_unix_s=item.deadline_unix_s,
    )


def item_from_proto(message: step_pb2.Item) -> Item:
    """Raises InvalidInput when something in it is out of range."""
    return Item(
        image=image_from_proto(message.image),
        targets=tuple(target_from_proto(target) for target in message.targets),
        tasks=tuple(_task(task) for task in message.tasks),
        top_predictions=message.top_predictions,
        precision=precision_from_proto(message.precision),
        deadline_unix_s=message.deadline_unix_s,
    )


def _task_to_proto(task: Task) -> step_pb2.Task:
    message = step_pb2.Task(
        position=task.position,
        start=task.start,
        stop=task.stop,
        layer=task.layer,
        numbers=task.numbers,
        ordered=task.ordered,
    )
    if isinstance(task.method, MapCurves):
        message.curves.CopyFrom(_curves_to_proto(task.method))
    else:
        message.method.CopyFrom(method_to_proto(task.method))
    return message


def _task(message: step_pb2.Task) -> Task:
    curves = message.WhichOneof("work") == "curves"
    method = _curves(message.curves) if curves else method_from_proto(message.method)
    numbers = tuple(message.numbers)
    return Task(message.position, method, message.start, message.stop, message.layer, numbers, message.ordered)


def _curves_to_proto(curves: MapCurves) -> step_pb2.MapCurves:
    height, width = curves.saliency.shape
    return step_pb2.MapCurves(
        saliency=curves.saliency.astype("<f4").tobytes(),
        height=height,
        width=width,
        target=curves.target,
        steps=curves.steps,
    )


def _curves(message: step_pb2.MapCurves) -> MapCurves:
    shape = (message.height, message.width)
    if len(message.saliency) != 4 * message.height * message.width:
        raise InvalidOption(f"a map of {list(shape)} has another number of bytes than {len(message.saliency)}")
    return MapCurves(np.frombuffer(message.saliency, "<f4").reshape(shape), message.target, message.steps)


def step_result_to_proto(result: StepResult) -> step_pb2.StepReply:
    """A worker's reply."""
    reply = step_pb2.StepReply(
        stage_seconds=result.stage_seconds,
        worker=result.worker,
        memory_hits=result.memory_hits,
        memory_misses=result.memory_misses,
    )
    if (memory := result.device_memory) is not None:
        reply.device_memory.device = memory.device
        reply.device_memory.used_bytes = memory.used_bytes
        reply.device_memory.limit_bytes = memory.limit_bytes
    for outcome in result.outcomes:
        if isinstance(outcome, CamserveError):
            reply.items.add(error=error_to_proto(outcome))
        else:
            reply.items.add(result=_item_result_to_proto(outcome))
    return reply


def step_result_from_proto(message: step_pb2.StepReply) -> StepResult:
    """Raises ValueError when the reply contradicts itself."""
    return StepResult(
        outcomes=tuple(
            error_from_proto(item.error) if item.WhichOneof("outcome") == "error" else _item_result(item.result)
            for item in message.items
        ),
        stage_seconds=dict(message.stage_seconds),
        worker=message.worker,
        memory_hits=message.memory_hits,
        memory_misses=message.memory_misses,
        device_memory=_device_memory(message.device_memory) if message.HasField("device_memory") else None,
    )


def _device_memory(message: step_pb2.DeviceMemory) -> DeviceMemory:
    return DeviceMemory(message.device, message.used_bytes, message.limit_bytes)


def _item_result_to_proto(result: ItemResult) -> step_pb2.ItemResult:
    return step_pb2.ItemResult(
        predictions=[prediction_to_proto(prediction) for prediction in result.predictions],
        targets=[prediction_to_proto(target) for target in result.targets],
        input=view_to_proto(result.view),
        partials=[_partial_to_proto(partial) for partial in result.partials],
    )


def _item_result(message: step_pb2.ItemResult) -> ItemResult:
    return ItemResult(
        predictions=tuple(prediction_from_proto(prediction) for prediction in message.predictions),
        targets=tuple(prediction_from_proto(target) for target in message.targets),
        view=view_from_proto(message.input),
        partials=tuple(_partial_from_proto(partial) for partial in message.partials),
    )


def _partial_to_proto(partial: Partial) -> step_pb2.Partial:
    targets, height, width = partial.sums.shape
    return step_pb2.Partial(
        position=partial.position,
        queries=partial.queries,
        targets=targets,
        height=height,
        width=width,
        sums=partial.sums.astype("<f4").tobytes(),
        order=partial.order,
    )


def _partial_from_proto(message: step_pb2.Partial) -> Partial:
    shape = (message.targets, message.height, message.width)
    sums = np.frombuffer(message.sums, "<f4").reshape(shape)
    return Partial(message.position, message.queries, sums, tuple(message.order))


def model_to_proto(info: ModelInfo) -> pb.Model:
    """Without `ready` and `methods`."""
    return pb.Model(
        name=info.name,
        version=info.version,
        labels=info.labels,
        input_height=info.input_size[0],
        input_width=info.input_size[1],
        layers=[
            pb.Layer(name=layer.name, channels=layer.channels, height=layer.height, width=layer.width)
            for layer in info.layers
        ],
        default_layer=info.default_layer,
        source=info.source,
        licence=info.licence,
        evaluation=info.evaluation,
    )


def model_from_proto(message: pb.Model) -> ModelInfo:
    """Without `ready` and `methods`."""
    return ModelInfo(
        name=message.name,
        version=message.version,
        labels=tuple(message.labels),
        input_size=(message.input_height, message.input_width),
        layers=tuple(Layer(layer.name, layer.channels, layer.height, layer.width) for layer in message.layers),
        default_layer=message.default_layer,
        source=message.source,
        licence=message.licence,
        evaluation=dict(message.evaluation),
    )

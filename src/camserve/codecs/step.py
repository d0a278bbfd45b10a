"""Reads and writes what travels between the gateway and a worker: steps, results, descriptions. Internal."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np
from google.protobuf.message import DecodeError

from camserve.codecs import bulk, v1
from camserve.codecs.fields import from_message, to_message
from camserve.errors import KINDS, CamserveError, Internal, InvalidInput
from camserve.methods import MethodSpec
from camserve.methods.work import KINDS as WORK_KINDS
from camserve.types import (
    DeviceMemory,
    Explained,
    Item,
    ItemResult,
    MapCurves,
    ModelInfo,
    Partial,
    Ranking,
    StepResult,
    Task,
)
from camserve.v1 import explain_pb2
from camserve.worker.v1 import step_pb2

DESCRIBE: bytes = step_pb2.WorkerRequest(describe=step_pb2.DescribeRequest()).SerializeToString()
"""The request for a worker's description of its model."""


def request_to_bytes(items: Sequence[Item]) -> bytes:
    """Returns the request that asks a worker for a step."""
    return b"".join(request_pieces(items))


def request_pieces(items: Sequence[Item]) -> list[bytes]:
    """Returns the request that asks a worker for a step, in pieces to be joined; images are not copied."""
    in_step = [piece for item in items for piece in bulk.within(step_pb2.Step.ITEMS_FIELD_NUMBER, *_item_pieces(item))]
    return bulk.within(step_pb2.WorkerRequest.STEP_FIELD_NUMBER, *in_step)


def request_from_bytes(data: bytes) -> tuple[Item | CamserveError, ...] | None:
    """Returns the items of a step, or None where a description is asked; an item that cannot be read is its own error.

    Raises:
        InvalidInput: it is no such request.
    """
    try:
        request = step_pb2.WorkerRequest.FromString(data)
    except DecodeError:
        raise InvalidInput("not a camserve.worker.v1.WorkerRequest") from None
    if request.WhichOneof("request") == "describe":
        return None
    return tuple(_item_or_error(item) for item in request.step.items)


def result_to_bytes(result: StepResult) -> bytes:
    """Returns a worker's answer to a step."""
    return step_pb2.WorkerReply(step=_result_to_proto(result)).SerializeToString()


def result_from_bytes(data: bytes) -> StepResult:
    """Returns what a worker has answered to a step.

    Raises:
        ValueError: the answer cannot be read, or contradicts itself.
        CamserveError: the answer is an error.
    """
    return _result_from_proto(_reply(data, "step").step)


def description_to_bytes(info: ModelInfo, worker: str) -> bytes:
    """Returns a worker's description of its model."""
    described = step_pb2.ModelDescription(model=v1.model_to_proto(info), worker=worker)
    return step_pb2.WorkerReply(describe=described).SerializeToString()


def description_from_bytes(data: bytes) -> ModelInfo:
    """Returns how a worker describes its model; raises as `result_from_bytes`."""
    return v1.model_from_proto(_reply(data, "describe").describe.model)


def error_to_bytes(error: CamserveError) -> bytes:
    """Returns the answer to a request that failed as a whole."""
    return step_pb2.WorkerReply(error=_error_to_proto(error)).SerializeToString()


def _reply(data: bytes, expected: str) -> step_pb2.WorkerReply:
    try:
        reply = step_pb2.WorkerReply.FromString(data)
    except DecodeError as error:
        raise ValueError(f"no WorkerReply: {error}") from None
    kind = reply.WhichOneof("reply")
    if kind == "error":
        raise _error_from_proto(reply.error)
    if kind != expected:
        raise ValueError(f"expected {expected}, got {kind}")
    return reply


def _error_to_proto(error: CamserveError) -> step_pb2.Error:
    return step_pb2.Error(kind=type(error).__name__, message=str(error))


def _error_from_proto(message: step_pb2.Error) -> CamserveError:
    """Returns the error; a class that this side does not know becomes Internal."""
    return KINDS.get(message.kind, Internal)(message.message)


def _item_pieces(item: Item) -> list[bytes]:
    """Returns a serialized `Item` in pieces."""
    pieces = [_item_to_proto(item).SerializeToString()]
    if item.image is not None:
        pieces += bulk.within(step_pb2.Item.IMAGE_FIELD_NUMBER, *v1.image_pieces(item.image))
    return pieces


def _item_to_proto(item: Item) -> step_pb2.Item:
    """Returns the message of an item, without its image."""
    # 0 means no deadline, so an item that has just expired keeps the least positive rest.
    remaining_s = 0.0 if math.isinf(item.expires_s) else max(item.expires_s - time.monotonic(), 1e-9)
    return to_message(
        step_pb2.Item,
        item,
        image=None,
        targets=[v1.target_to_proto(target) for target in item.targets],
        tasks=[_task_to_proto(task) for task in item.tasks],
        precision=v1.precision_to_proto(item.precision),
        remaining_s=remaining_s,
    )


def _item_or_error(message: step_pb2.Item) -> Item | CamserveError:
    try:
        return from_message(
            Item,
            message,
            image=v1.image_from_proto(message.image) if message.HasField("image") else None,
            targets=tuple(v1.target_from_proto(target) for target in message.targets),
            tasks=tuple(from_message(Task, task, method=_method_from_proto(task)) for task in message.tasks),
            precision=v1.precision_from_proto(message.precision),
            expires_s=time.monotonic() + message.remaining_s if message.remaining_s else math.inf,
        )
    except CamserveError as error:
        return error


def _task_to_proto(task: Task) -> step_pb2.Task:
    method = task.method
    message = to_message(step_pb2.Task, task, method=None)
    if isinstance(method, MapCurves):
        saliency = _array_to_proto(method.saliency)
        message.curves.CopyFrom(
            step_pb2.MapCurves(saliency=saliency, target=v1.target_to_proto(method.target), steps=method.steps)
        )
    elif isinstance(method, Ranking):
        message.ranking.attribution.CopyFrom(_array_to_proto(method.attribution))
    else:
        message.method.CopyFrom(v1.method_to_proto(method))
    return message


def _method_from_proto(message: step_pb2.Task) -> MethodSpec | MapCurves | Ranking:
    try:
        if (work := message.WhichOneof("work")) == "curves":
            curves = message.curves
            return MapCurves(_array_from_proto(curves.saliency), v1.target_from_proto(curves.target), curves.steps)
        if work == "ranking":
            return Ranking(_array_from_proto(message.ranking.attribution))
    except ValueError as error:
        raise InvalidInput(str(error)) from None
    return v1.method_from_proto(message.method)


def _result_to_proto(result: StepResult) -> step_pb2.StepReply:
    memory = result.device_memory
    reply = to_message(
        step_pb2.StepReply,
        result,
        device_memory=None if memory is None else to_message(step_pb2.DeviceMemory, memory),
        made={str(kind): units for kind, units in result.made.items()},
    )
    for outcome in result.outcomes:
        if isinstance(outcome, CamserveError):
            reply.items.add(error=_error_to_proto(outcome))
        else:
            reply.items.add(result=_item_result_to_proto(outcome))
    return reply


def _result_from_proto(message: step_pb2.StepReply) -> StepResult:
    memory = message.device_memory
    return from_message(
        StepResult,
        message,
        outcomes=tuple(
            _error_from_proto(item.error)
            if item.WhichOneof("outcome") == "error"
            else _item_result_from_proto(item.result)
            for item in message.items
        ),
        device_memory=from_message(DeviceMemory, memory) if message.HasField("device_memory") else None,
        made={kind: message.made[kind] for kind in WORK_KINDS if kind in message.made},
    )


def _item_result_to_proto(result: ItemResult) -> step_pb2.ItemResult:
    return step_pb2.ItemResult(
        predictions=[v1.prediction_to_proto(prediction) for prediction in result.predictions],
        targets=[_explained_to_proto(explained) for explained in result.targets],
        input=v1.view_to_proto(result.view),
        partials=[_partial_to_proto(partial) for partial in result.partials],
        precision=result.precision.upper(),
        runtime=result.runtime,
    )


def _item_result_from_proto(message: step_pb2.ItemResult) -> ItemResult:
    return ItemResult(
        predictions=v1.predictions_from_proto(message.predictions),
        targets=tuple(_explained_from_proto(explained) for explained in message.targets),
        view=v1.view_from_proto(message.input),
        partials=tuple(_partial_from_proto(partial) for partial in message.partials),
        precision="bfloat16" if message.precision == explain_pb2.BFLOAT16 else "exact",
        runtime=message.runtime,
    )


def _explained_to_proto(explained: Explained) -> step_pb2.Explained:
    return step_pb2.Explained(
        target=v1.target_to_proto(explained.target),
        score=explained.score,
        classes=[v1.prediction_to_proto(prediction) for prediction in explained.classes],
    )


def _explained_from_proto(message: step_pb2.Explained) -> Explained:
    try:
        target = v1.target_from_proto(message.target)
    except InvalidInput as error:
        raise ValueError(f"a worker explains no target: {error}") from None
    return Explained(target, message.score, v1.predictions_from_proto(message.classes))


def _partial_to_proto(partial: Partial) -> step_pb2.Partial:
    context = None if partial.context is None else _array_to_proto(partial.context)
    return to_message(step_pb2.Partial, partial, sums=_array_to_proto(partial.sums), context=context)


def _partial_from_proto(message: step_pb2.Partial) -> Partial:
    context = _array_from_proto(message.context) if message.HasField("context") else None
    # A worker from before energies were sent gives an order alone: then each block may add as much as any other.
    energies = tuple(message.energies) or (1.0,) * len(message.order)
    return from_message(Partial, message, sums=_array_from_proto(message.sums), context=context, energies=energies)


def _array_to_proto(array: np.ndarray) -> step_pb2.Array:
    return step_pb2.Array(shape=array.shape, data=array.astype("<f4", copy=False).tobytes())


def _array_from_proto(message: step_pb2.Array) -> np.ndarray:
    """Returns the array; raises ValueError where shape and data do not fit each other."""
    return np.frombuffer(message.data, "<f4").reshape(tuple(message.shape))

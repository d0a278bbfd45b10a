from camserve.v1 import explain_pb2 as _explain_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WorkerRequest(_message.Message):
    __slots__ = ("step", "describe")
    STEP_FIELD_NUMBER: _ClassVar[int]
    DESCRIBE_FIELD_NUMBER: _ClassVar[int]
    step: Step
    describe: DescribeRequest
    def __init__(self, step: _Optional[_Union[Step, _Mapping]] = ..., describe: _Optional[_Union[DescribeRequest, _Mapping]] = ...) -> None: ...

class WorkerReply(_message.Message):
    __slots__ = ("step", "describe", "error")
    STEP_FIELD_NUMBER: _ClassVar[int]
    DESCRIBE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    step: StepReply
    describe: ModelDescription
    error: Error
    def __init__(self, step: _Optional[_Union[StepReply, _Mapping]] = ..., describe: _Optional[_Union[ModelDescription, _Mapping]] = ..., error: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("items",)
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[Item]
    def __init__(self, items: _Optional[_Iterable[_Union[Item, _Mapping]]] = ...) -> None: ...

class Item(_message.Message):
    __slots__ = ("image", "targets", "layer", "tasks", "top_predictions", "precision")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    TOP_PREDICTIONS_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    image: _explain_pb2.Image
    targets: _containers.RepeatedCompositeFieldContainer[_explain_pb2.Target]
    layer: str
    tasks: _containers.RepeatedCompositeFieldContainer[Task]
    top_predictions: int
    precision: _explain_pb2.Precision
    def __init__(self, image: _Optional[_Union[_explain_pb2.Image, _Mapping]] = ..., targets: _Optional[_Iterable[_Union[_explain_pb2.Target, _Mapping]]] = ..., layer: _Optional[str] = ..., tasks: _Optional[_Iterable[_Union[Task, _Mapping]]] = ..., top_predictions: _Optional[int] = ..., precision: _Optional[_Union[_explain_pb2.Precision, str]] = ...) -> None: ...

class Task(_message.Message):
    __slots__ = ("position", "method", "start", "stop")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    position: int
    method: _explain_pb2.MethodSpec
    start: int
    stop: int
    def __init__(self, position: _Optional[int] = ..., method: _Optional[_Union[_explain_pb2.MethodSpec, _Mapping]] = ..., start: _Optional[int] = ..., stop: _Optional[int] = ...) -> None: ...

class StepReply(_message.Message):
    __slots__ = ("items", "stage_seconds", "worker")
    class StageSecondsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    STAGE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[ItemReply]
    stage_seconds: _containers.ScalarMap[str, float]
    worker: str
    def __init__(self, items: _Optional[_Iterable[_Union[ItemReply, _Mapping]]] = ..., stage_seconds: _Optional[_Mapping[str, float]] = ..., worker: _Optional[str] = ...) -> None: ...

class ItemReply(_message.Message):
    __slots__ = ("result", "error")
    RESULT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    result: ItemResult
    error: Error
    def __init__(self, result: _Optional[_Union[ItemResult, _Mapping]] = ..., error: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...

class ItemResult(_message.Message):
    __slots__ = ("predictions", "targets", "input", "layer", "partials")
    PREDICTIONS_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    INPUT_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    PARTIALS_FIELD_NUMBER: _ClassVar[int]
    predictions: _containers.RepeatedCompositeFieldContainer[_explain_pb2.Prediction]
    targets: _containers.RepeatedCompositeFieldContainer[_explain_pb2.Prediction]
    input: _explain_pb2.InputView
    layer: str
    partials: _containers.RepeatedCompositeFieldContainer[Partial]
    def __init__(self, predictions: _Optional[_Iterable[_Union[_explain_pb2.Prediction, _Mapping]]] = ..., targets: _Optional[_Iterable[_Union[_explain_pb2.Prediction, _Mapping]]] = ..., input: _Optional[_Union[_explain_pb2.InputView, _Mapping]] = ..., layer: _Optional[str] = ..., partials: _Optional[_Iterable[_Union[Partial, _Mapping]]] = ...) -> None: ...

class Partial(_message.Message):
    __slots__ = ("position", "queries", "targets", "height", "width", "sums")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    QUERIES_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    SUMS_FIELD_NUMBER: _ClassVar[int]
    position: int
    queries: int
    targets: int
    height: int
    width: int
    sums: bytes
    def __init__(self, position: _Optional[int] = ..., queries: _Optional[int] = ..., targets: _Optional[int] = ..., height: _Optional[int] = ..., width: _Optional[int] = ..., sums: _Optional[bytes] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("kind", "message")
    KIND_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    kind: str
    message: str
    def __init__(self, kind: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ModelDescription(_message.Message):
    __slots__ = ("model", "worker")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    model: _explain_pb2.Model
    worker: str
    def __init__(self, model: _Optional[_Union[_explain_pb2.Model, _Mapping]] = ..., worker: _Optional[str] = ...) -> None: ...

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
    __slots__ = ("image", "targets", "tasks", "top_predictions", "precision", "deadline_unix_s")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    TOP_PREDICTIONS_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    image: _explain_pb2.Image
    targets: _containers.RepeatedCompositeFieldContainer[_explain_pb2.Target]
    tasks: _containers.RepeatedCompositeFieldContainer[Task]
    top_predictions: int
    precision: _explain_pb2.Precision
    deadline_unix_s: float
    def __init__(self, image: _Optional[_Union[_explain_pb2.Image, _Mapping]] = ..., targets: _Optional[_Iterable[_Union[_explain_pb2.Target, _Mapping]]] = ..., tasks: _Optional[_Iterable[_Union[Task, _Mapping]]] = ..., top_predictions: _Optional[int] = ..., precision: _Optional[_Union[_explain_pb2.Precision, str]] = ..., deadline_unix_s: _Optional[float] = ...) -> None: ...

class Task(_message.Message):
    __slots__ = ("position", "method", "curves", "start", "stop", "layer", "numbers", "ordered")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    CURVES_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    ORDERED_FIELD_NUMBER: _ClassVar[int]
    position: int
    method: _explain_pb2.MethodSpec
    curves: MapCurves
    start: int
    stop: int
    layer: str
    numbers: _containers.RepeatedScalarFieldContainer[int]
    ordered: bool
    def __init__(self, position: _Optional[int] = ..., method: _Optional[_Union[_explain_pb2.MethodSpec, _Mapping]] = ..., curves: _Optional[_Union[MapCurves, _Mapping]] = ..., start: _Optional[int] = ..., stop: _Optional[int] = ..., layer: _Optional[str] = ..., numbers: _Optional[_Iterable[int]] = ..., ordered: bool = ...) -> None: ...

class MapCurves(_message.Message):
    __slots__ = ("saliency", "height", "width", "target", "steps")
    SALIENCY_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    saliency: bytes
    height: int
    width: int
    target: int
    steps: int
    def __init__(self, saliency: _Optional[bytes] = ..., height: _Optional[int] = ..., width: _Optional[int] = ..., target: _Optional[int] = ..., steps: _Optional[int] = ...) -> None: ...

class StepReply(_message.Message):
    __slots__ = ("items", "stage_seconds", "worker", "memory_hits", "memory_misses", "device_memory")
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
    MEMORY_HITS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_MISSES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_MEMORY_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[ItemReply]
    stage_seconds: _containers.ScalarMap[str, float]
    worker: str
    memory_hits: int
    memory_misses: int
    device_memory: DeviceMemory
    def __init__(self, items: _Optional[_Iterable[_Union[ItemReply, _Mapping]]] = ..., stage_seconds: _Optional[_Mapping[str, float]] = ..., worker: _Optional[str] = ..., memory_hits: _Optional[int] = ..., memory_misses: _Optional[int] = ..., device_memory: _Optional[_Union[DeviceMemory, _Mapping]] = ...) -> None: ...

class DeviceMemory(_message.Message):
    __slots__ = ("device", "used_bytes", "limit_bytes")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    device: str
    used_bytes: int
    limit_bytes: int
    def __init__(self, device: _Optional[str] = ..., used_bytes: _Optional[int] = ..., limit_bytes: _Optional[int] = ...) -> None: ...

class ItemReply(_message.Message):
    __slots__ = ("result", "error")
    RESULT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    result: ItemResult
    error: Error
    def __init__(self, result: _Optional[_Union[ItemResult, _Mapping]] = ..., error: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...

class ItemResult(_message.Message):
    __slots__ = ("predictions", "targets", "input", "partials")
    PREDICTIONS_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    INPUT_FIELD_NUMBER: _ClassVar[int]
    PARTIALS_FIELD_NUMBER: _ClassVar[int]
    predictions: _containers.RepeatedCompositeFieldContainer[_explain_pb2.Prediction]
    targets: _containers.RepeatedCompositeFieldContainer[_explain_pb2.Prediction]
    input: _explain_pb2.InputView
    partials: _containers.RepeatedCompositeFieldContainer[Partial]
    def __init__(self, predictions: _Optional[_Iterable[_Union[_explain_pb2.Prediction, _Mapping]]] = ..., targets: _Optional[_Iterable[_Union[_explain_pb2.Prediction, _Mapping]]] = ..., input: _Optional[_Union[_explain_pb2.InputView, _Mapping]] = ..., partials: _Optional[_Iterable[_Union[Partial, _Mapping]]] = ...) -> None: ...

class Partial(_message.Message):
    __slots__ = ("position", "queries", "targets", "height", "width", "sums", "order")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    QUERIES_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    SUMS_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    position: int
    queries: int
    targets: int
    height: int
    width: int
    sums: bytes
    order: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, position: _Optional[int] = ..., queries: _Optional[int] = ..., targets: _Optional[int] = ..., height: _Optional[int] = ..., width: _Optional[int] = ..., sums: _Optional[bytes] = ..., order: _Optional[_Iterable[int]] = ...) -> None: ...

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

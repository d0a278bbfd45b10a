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
    __slots__ = ("image", "targets", "tasks", "top_predictions", "precision", "remaining_s", "digest", "text", "reproducible")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    TOP_PREDICTIONS_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    REMAINING_S_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    REPRODUCIBLE_FIELD_NUMBER: _ClassVar[int]
    image: _explain_pb2.Image
    targets: _containers.RepeatedCompositeFieldContainer[_explain_pb2.Target]
    tasks: _containers.RepeatedCompositeFieldContainer[Task]
    top_predictions: int
    precision: _explain_pb2.Precision
    remaining_s: float
    digest: bytes
    text: str
    reproducible: bool
    def __init__(self, image: _Optional[_Union[_explain_pb2.Image, _Mapping]] = ..., targets: _Optional[_Iterable[_Union[_explain_pb2.Target, _Mapping]]] = ..., tasks: _Optional[_Iterable[_Union[Task, _Mapping]]] = ..., top_predictions: _Optional[int] = ..., precision: _Optional[_Union[_explain_pb2.Precision, str]] = ..., remaining_s: _Optional[float] = ..., digest: _Optional[bytes] = ..., text: _Optional[str] = ..., reproducible: bool = ...) -> None: ...

class Task(_message.Message):
    __slots__ = ("position", "method", "curves", "ranking", "start", "stop", "layer", "numbers", "ordered", "labels")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    CURVES_FIELD_NUMBER: _ClassVar[int]
    RANKING_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    ORDERED_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    position: int
    method: _explain_pb2.MethodSpec
    curves: MapCurves
    ranking: Ranking
    start: int
    stop: int
    layer: str
    numbers: _containers.RepeatedScalarFieldContainer[int]
    ordered: bool
    labels: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, position: _Optional[int] = ..., method: _Optional[_Union[_explain_pb2.MethodSpec, _Mapping]] = ..., curves: _Optional[_Union[MapCurves, _Mapping]] = ..., ranking: _Optional[_Union[Ranking, _Mapping]] = ..., start: _Optional[int] = ..., stop: _Optional[int] = ..., layer: _Optional[str] = ..., numbers: _Optional[_Iterable[int]] = ..., ordered: bool = ..., labels: _Optional[_Iterable[int]] = ...) -> None: ...

class MapCurves(_message.Message):
    __slots__ = ("saliency", "target", "steps")
    SALIENCY_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    saliency: Array
    target: _explain_pb2.Target
    steps: int
    def __init__(self, saliency: _Optional[_Union[Array, _Mapping]] = ..., target: _Optional[_Union[_explain_pb2.Target, _Mapping]] = ..., steps: _Optional[int] = ...) -> None: ...

class Ranking(_message.Message):
    __slots__ = ("attribution",)
    ATTRIBUTION_FIELD_NUMBER: _ClassVar[int]
    attribution: Array
    def __init__(self, attribution: _Optional[_Union[Array, _Mapping]] = ...) -> None: ...

class Array(_message.Message):
    __slots__ = ("shape", "data")
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    shape: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    def __init__(self, shape: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ...) -> None: ...

class StepReply(_message.Message):
    __slots__ = ("items", "stage_seconds", "worker", "memory_hits", "memory_misses", "device_memory", "made", "version", "weights", "keeps_images", "micro_batch", "environment")
    class StageSecondsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class MadeEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    STAGE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    MEMORY_HITS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_MISSES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_MEMORY_FIELD_NUMBER: _ClassVar[int]
    MADE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    KEEPS_IMAGES_FIELD_NUMBER: _ClassVar[int]
    MICRO_BATCH_FIELD_NUMBER: _ClassVar[int]
    ENVIRONMENT_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[ItemReply]
    stage_seconds: _containers.ScalarMap[str, float]
    worker: str
    memory_hits: int
    memory_misses: int
    device_memory: DeviceMemory
    made: _containers.ScalarMap[str, int]
    version: str
    weights: str
    keeps_images: bool
    micro_batch: int
    environment: str
    def __init__(self, items: _Optional[_Iterable[_Union[ItemReply, _Mapping]]] = ..., stage_seconds: _Optional[_Mapping[str, float]] = ..., worker: _Optional[str] = ..., memory_hits: _Optional[int] = ..., memory_misses: _Optional[int] = ..., device_memory: _Optional[_Union[DeviceMemory, _Mapping]] = ..., made: _Optional[_Mapping[str, int]] = ..., version: _Optional[str] = ..., weights: _Optional[str] = ..., keeps_images: bool = ..., micro_batch: _Optional[int] = ..., environment: _Optional[str] = ...) -> None: ...

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

class Explained(_message.Message):
    __slots__ = ("target", "score", "classes")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    target: _explain_pb2.Target
    score: float
    classes: _containers.RepeatedCompositeFieldContainer[_explain_pb2.Prediction]
    def __init__(self, target: _Optional[_Union[_explain_pb2.Target, _Mapping]] = ..., score: _Optional[float] = ..., classes: _Optional[_Iterable[_Union[_explain_pb2.Prediction, _Mapping]]] = ...) -> None: ...

class ItemResult(_message.Message):
    __slots__ = ("predictions", "targets", "input", "partials", "precision", "runtime")
    PREDICTIONS_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    INPUT_FIELD_NUMBER: _ClassVar[int]
    PARTIALS_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    RUNTIME_FIELD_NUMBER: _ClassVar[int]
    predictions: _containers.RepeatedCompositeFieldContainer[_explain_pb2.Prediction]
    targets: _containers.RepeatedCompositeFieldContainer[Explained]
    input: _explain_pb2.InputView
    partials: _containers.RepeatedCompositeFieldContainer[Partial]
    precision: _explain_pb2.Precision
    runtime: str
    def __init__(self, predictions: _Optional[_Iterable[_Union[_explain_pb2.Prediction, _Mapping]]] = ..., targets: _Optional[_Iterable[_Union[Explained, _Mapping]]] = ..., input: _Optional[_Union[_explain_pb2.InputView, _Mapping]] = ..., partials: _Optional[_Iterable[_Union[Partial, _Mapping]]] = ..., precision: _Optional[_Union[_explain_pb2.Precision, str]] = ..., runtime: _Optional[str] = ...) -> None: ...

class Partial(_message.Message):
    __slots__ = ("position", "queries", "sums", "order", "context", "labels", "energies")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    QUERIES_FIELD_NUMBER: _ClassVar[int]
    SUMS_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    ENERGIES_FIELD_NUMBER: _ClassVar[int]
    position: int
    queries: int
    sums: Array
    order: _containers.RepeatedScalarFieldContainer[int]
    context: Array
    labels: _containers.RepeatedScalarFieldContainer[int]
    energies: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, position: _Optional[int] = ..., queries: _Optional[int] = ..., sums: _Optional[_Union[Array, _Mapping]] = ..., order: _Optional[_Iterable[int]] = ..., context: _Optional[_Union[Array, _Mapping]] = ..., labels: _Optional[_Iterable[int]] = ..., energies: _Optional[_Iterable[float]] = ...) -> None: ...

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

"""Our errors as gRPC statuses, in one table, and a model as its public message."""

from __future__ import annotations

import grpc
from google.protobuf import duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

from camserve import errors, wire
from camserve.errors import INTERNAL_MESSAGE, CamserveError, Internal, Overloaded
from camserve.methods import METHODS, MethodSpec, Parameter
from camserve.types import ModelInfo
from camserve.v1 import explain_pb2 as pb

ERROR_KEY = "camserve-error"
"""Trailing metadata: the name of the class in `camserve.errors`, so that a client can raise the same one."""

RETRY_KEY = "grpc-retry-pushback-ms"
"""Trailing metadata of gRPC's own retry policy (gRFC A6): when to try again."""

DETAILS_KEY = "grpc-status-details-bin"
"""Trailing metadata: a google.rpc.Status, gRPC's rich error model."""

RETRY_S = 1.0
"""Where nobody can say when there will be room."""

STATUS: dict[type[CamserveError], grpc.StatusCode] = {
    errors.InvalidInput: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.Unsupported: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.Cancelled: grpc.StatusCode.CANCELLED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.Internal: grpc.StatusCode.INTERNAL,
}


def status(error: CamserveError) -> grpc.StatusCode:
    """The status of the error's class, or of its nearest ancestor in the table."""
    for kind in type(error).__mro__:
        if kind in STATUS:
            return STATUS[kind]
    return grpc.StatusCode.INTERNAL


def trailing_metadata(error: CamserveError) -> tuple[tuple[str, str | bytes], ...]:
    """The error's class, and for overload when to try again: as gRPC's own retries read it, and as RetryInfo."""
    kind = ((ERROR_KEY, type(error).__name__),)
    if not isinstance(error, Overloaded):
        return kind
    retry_s = RETRY_S if error.retry_after_s is None else max(error.retry_after_s, 0.001)
    return *kind, (RETRY_KEY, str(round(1000 * retry_s))), (DETAILS_KEY, _details(error, retry_s))


def _details(error: Overloaded, retry_s: float) -> bytes:
    """A google.rpc.Status with RetryInfo."""
    found = status_pb2.Status(code=code_pb2.RESOURCE_EXHAUSTED, message=str(error))
    delay = duration_pb2.Duration()
    delay.FromNanoseconds(round(1e9 * retry_s))
    found.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return bytes(found.SerializeToString())


def public(error: BaseException) -> CamserveError:
    """What a client may see: a typed error as it is, anything else as the fixed sentence."""
    typed = isinstance(error, CamserveError) and not isinstance(error, Internal)
    return error if typed else Internal(INTERNAL_MESSAGE)  # type: ignore[return-value]  # mypy loses the isinstance


def model_to_proto(info: ModelInfo, ready: bool) -> pb.Model:
    """The model with its methods, each with its cost at the default layer."""
    message = wire.model_to_proto(info)
    message.ready = ready
    channels = info.layer("").channels
    message.methods.extend(_method(name, spec, channels) for name, spec in METHODS.items())
    return message


def _method(name: str, spec: type[MethodSpec], channels: int) -> pb.Method:
    return pb.Method(
        name=name,
        title=spec.title,
        paper=spec.paper,
        parameters=[_parameter(parameter) for parameter in spec.parameters()],
        queries=spec.default_passes(channels) or 0,
        needs=spec.needs,
    )


def _parameter(parameter: Parameter) -> pb.Parameter:
    return pb.Parameter(
        name=parameter.name,
        type=parameter.type,
        default=str(parameter.default),
        minimum=parameter.minimum,
        maximum=parameter.maximum,
        choices=parameter.choices,
        description=parameter.description,
    )

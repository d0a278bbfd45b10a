"""Registers a servicer whose explain calls read and write bytes by themselves: in turn, and made in threads."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass


def handlers(service: ServiceDescriptor, servicer: object, raw: Collection[str]) -> grpc.GenericRpcHandler:  # type: ignore[type-arg]  # its stubs have parameters, it has none
    """Returns the handlers of every method of a service.

    Args:
        service: the description of the service; a method that streams is one of `raw`.
        servicer: object with a method of the same name for each method of the service.
        raw: names of the methods that read and write serialized messages by themselves, through their context. To gRPC
            they are streams both ways: so it reads no message before the method asks for it.
    """
    made = {
        method.name: _handler(method, getattr(servicer, method.name), method.name in raw) for method in service.methods
    }
    return grpc.method_handlers_generic_handler(service.full_name, made)


def _handler(method: MethodDescriptor, behaviour: Callable[..., Any], raw: bool) -> grpc.RpcMethodHandler[Any, Any]:
    if raw:
        return grpc.stream_stream_rpc_method_handler(behaviour)
    request, reply = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
    return grpc.unary_unary_rpc_method_handler(behaviour, request.FromString, reply.SerializeToString)

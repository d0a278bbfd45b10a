"""Turns errors into HTTP statuses and problem documents (RFC 9457), by one table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import grpc

from camserve.errors import InvalidInput

PROBLEM_TYPE = "application/problem+json"

HTTP_STATUS: Mapping[grpc.StatusCode, int] = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.FAILED_PRECONDITION: 422,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.INTERNAL: 500,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}
"""The HTTP status of each gRPC status that `camserve.gateway.api.status` knows. 499 is seen by nobody but the log."""


class HttpError(InvalidInput):
    """A request is wrong in a way for which HTTP has a status of its own.

    Attributes:
        status: the HTTP status.
    """

    status = 400


class ContentTooLarge(HttpError):
    """A body is larger than the server takes."""

    status = 413


class UnsupportedMediaType(HttpError):
    """A body is of a type that this path does not take."""

    status = 415


class MethodNotAllowed(HttpError):
    """A path is asked by another method than it has."""

    status = 405


class UnknownPath(HttpError):
    """There is no such path."""

    status = 404


STATUS_OF_KIND: Mapping[str, int] = {kind.__name__: kind.status for kind in HttpError.__subclasses__()}
"""The HTTP status of each error that has one of its own, by the name of its class."""


def problem(status: int, detail: str, kind: str, request_id: str, detail_also: str = "") -> bytes:
    """Returns a problem document.

    Args:
        status: the HTTP status.
        detail: what is wrong, for people.
        kind: name of the class in `camserve.errors`, for programs.
        request_id: id under which the server's log has the call.
        detail_also: name of a further member with the detail, for clients of another API; "": there is none.
    """
    document: dict[str, Any] = {"title": title(status), "status": status, "detail": detail, "kind": kind}
    document |= {detail_also: detail} if detail_also else {}
    return json.dumps(document | ({"request_id": request_id} if request_id else {})).encode()


def title(status: int) -> str:
    """Returns the phrase of a status."""
    return "Client Closed Request" if status == 499 else HTTPStatus(status).phrase  # nginx's, not registered


def headers_of(status: int, retry_ms: str | None) -> list[tuple[str, str]]:
    """Returns the headers that a status asks for: when to try again, how to say who one is, what a body may be."""
    if status == 401:
        return [("www-authenticate", 'Bearer realm="camserve"')]
    if status == 415:
        return [("accept-encoding", "identity")]  # RFC 9110, 15.5.16: so a client knows whether it was the compression
    return [("retry-after", str(math.ceil(int(retry_ms) / 1000)))] if retry_ms else []

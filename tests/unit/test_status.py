"""Our errors as gRPC statuses: the table, what travels beside the status, and what a client may see."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from camserve import errors
from camserve.errors import INTERNAL_MESSAGE, KINDS, CamserveError
from camserve.gateway.api.calls import cancellation
from camserve.gateway.api.status import public, status, trailing_metadata
from camserve.gateway.ops.metrics import method_label

CODES = {
    "InvalidInput": "INVALID_ARGUMENT",
    "InvalidImage": "INVALID_ARGUMENT",
    "InvalidOption": "INVALID_ARGUMENT",
    "NotFound": "NOT_FOUND",
    "Unsupported": "FAILED_PRECONDITION",
    "Unauthenticated": "UNAUTHENTICATED",
    "Overloaded": "RESOURCE_EXHAUSTED",
    "DeadlineExceeded": "DEADLINE_EXCEEDED",
    "Cancelled": "CANCELLED",
    "Unavailable": "UNAVAILABLE",
    "ModelChanged": "UNAVAILABLE",
    "WorkerLost": "UNAVAILABLE",
    "ImageMissing": "UNAVAILABLE",
    "Internal": "INTERNAL",
    "CamserveError": "INTERNAL",
}


def test_every_error_has_its_status():
    assert {name: status(kind("")).name for name, kind in KINDS.items()} == CODES


@pytest.mark.parametrize("kind", KINDS.values())
def test_the_class_travels_along(kind: type[CamserveError]):
    assert ("camserve-error", kind.__name__) in trailing_metadata(kind(""))


def test_only_overload_has_a_hint_when_to_come_back():
    assert ("grpc-retry-pushback-ms", "1000") in trailing_metadata(errors.Overloaded(""))
    assert len(trailing_metadata(errors.Unavailable(""))) == 1


def test_overload_has_googles_retry_info():
    metadata = dict(trailing_metadata(errors.Overloaded("full", retry_after_s=2.5)))
    assert metadata["grpc-retry-pushback-ms"] == "2500"
    found = status_pb2.Status.FromString(metadata["grpc-status-details-bin"])
    assert (found.code, found.message) == (grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], "full")
    info = error_details_pb2.RetryInfo()
    assert found.details[0].Unpack(info)
    assert info.retry_delay.ToTimedelta().total_seconds() == 2.5


def test_a_hint_is_never_to_come_back_at_once():
    metadata = dict(trailing_metadata(errors.Overloaded("full", retry_after_s=0.0)))
    assert metadata["grpc-retry-pushback-ms"] == "1"
    info = error_details_pb2.RetryInfo()
    assert status_pb2.Status.FromString(metadata["grpc-status-details-bin"]).details[0].Unpack(info)
    assert info.retry_delay.ToTimedelta().total_seconds() == 0.001


@pytest.mark.parametrize("error", [ValueError("/etc/secret"), errors.Internal("/etc/secret"), KeyError("x")])
def test_what_has_no_type_is_not_shown(error: Exception):
    shown = public(error)
    assert (type(shown), str(shown)) == (errors.Internal, INTERNAL_MESSAGE)
    assert status(shown) is grpc.StatusCode.INTERNAL


def test_typed_errors_are_shown_as_they_are():
    error = errors.InvalidOption("groups must be 1..96, got 97")
    assert public(error) is error


@pytest.mark.parametrize(
    ("remaining_s", "code"), [(None, "CANCELLED"), (3.0, "CANCELLED"), (0.01, "DEADLINE_EXCEEDED")]
)
def test_a_call_that_grpc_ends_counts_as_what_ended_it(remaining_s: float | None, code: str):
    class Context:
        def time_remaining(self) -> float | None:
            return remaining_s

    assert cancellation(Context()).name == code


def test_the_method_label_stays_one_of_few():
    assert method_label(["grad_cam"]) == "grad_cam"
    assert method_label(["grad_cam", "score_cam"]) == "several"
    assert method_label([]) == "none"

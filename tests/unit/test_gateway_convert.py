from __future__ import annotations

import grpc
import pytest

from camserve import errors
from camserve.errors import INTERNAL_MESSAGE, KINDS, CamserveError
from camserve.gateway.convert import public, status, trailing_metadata
from camserve.gateway.metrics import method_label
from camserve.gateway.service import cancellation

CODES = {
    "InvalidInput": "INVALID_ARGUMENT",
    "InvalidImage": "INVALID_ARGUMENT",
    "InvalidOption": "INVALID_ARGUMENT",
    "NotFound": "NOT_FOUND",
    "Unsupported": "FAILED_PRECONDITION",
    "Overloaded": "RESOURCE_EXHAUSTED",
    "DeadlineExceeded": "DEADLINE_EXCEEDED",
    "Cancelled": "CANCELLED",
    "Unavailable": "UNAVAILABLE",
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

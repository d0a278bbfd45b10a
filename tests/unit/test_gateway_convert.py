from __future__ import annotations

from dataclasses import replace

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from camserve import errors
from camserve.errors import INTERNAL_MESSAGE, KINDS, CamserveError
from camserve.gateway.calls import cancellation
from camserve.gateway.convert import model_to_proto, public, status, trailing_metadata
from camserve.gateway.fake import MODEL
from camserve.gateway.metrics import method_label
from camserve.methods import METHODS
from camserve.types import Layer

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


def test_a_model_lists_every_method_with_what_it_costs_and_needs():
    message = model_to_proto(MODEL, ready=True)
    listed = {method.name: method for method in message.methods}
    assert list(listed) == list(METHODS)
    channels = MODEL.layer("").channels
    for name, spec in METHODS.items():
        assert (listed[name].queries, listed[name].needs) == (spec().passes(channels, 1), spec.needs)
        assert [parameter.name for parameter in listed[name].parameters] == [p.name for p in spec.parameters()]
    assert {name: listed[name].queries for name in ("grad_cam", "score_cam", "group_cam", "smooth_grad", "xrai")} == {
        "grad_cam": 0,
        "score_cam": 96,
        "group_cam": 33,
        "smooth_grad": 25,
        "xrai": 200,
    }


def test_a_method_whose_defaults_do_not_fit_the_layer_has_no_cost():
    narrow = replace(MODEL, layers=(Layer("narrow", 31, 4, 6),), default_layer="narrow")
    costs = {method.name: method.queries for method in model_to_proto(narrow, ready=True).methods}
    assert (costs["group_cam"], costs["score_cam"]) == (0, 31)

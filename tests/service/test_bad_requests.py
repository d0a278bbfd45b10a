"""The table of bad requests: each is refused with its sentence, and the codecs that need no server say the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from bad_requests import (
    BAD_REQUESTS,
    LIMITS,
    PHOTO,
    SERVERS,
    SETTINGS,
    BadRequest,
    Door,
    to_cli_arguments,
    to_engine_kwargs,
    to_oip,
    to_plain_fields,
    to_request,
    to_v1,
)

from camserve import Engine
from camserve.cli import commands
from camserve.codecs import oip, plain
from camserve.errors import CamserveError
from camserve.gateway.ops.settings import Settings
from camserve.types import ModelInfo, Preprocessing
from camserve.types.request import ExplainRequest, RequestLimits

BY_REQUEST = [bad for bad in BAD_REQUESTS if bad.noticed_by == "request"]
BY_WORKER = [bad for bad in BAD_REQUESTS if bad.noticed_by == "worker"]


@pytest.fixture(scope="module")
def engine() -> Engine:
    preprocessing = Preprocessing(resize_px=64, crop_px=tiny.TINY_SIZE, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    return Engine(tiny.tiny_module(), preprocessing=preprocessing, labels=tiny.TINY_LABELS)


@pytest.fixture(scope="module")
def info() -> ModelInfo:
    return tiny.tiny_network().info


def fit(bad: BadRequest, request: ExplainRequest, info: ModelInfo) -> None:
    """Holds a request against the limits of the doors in which it can be said."""
    request.fit(info, LIMITS if bad.doors & SERVERS else RequestLimits())


def of(table: list[BadRequest], door: Door | None = None):
    chosen = [bad for bad in table if door is None or door in bad.doors]
    return pytest.mark.parametrize("bad", chosen, ids=lambda bad: bad.name)


def expect(bad: BadRequest, caught: pytest.ExceptionInfo[CamserveError]) -> None:
    assert type(caught.value) is bad.kind
    assert bad.sentence in str(caught.value)


def test_the_table_is_long_and_every_door_has_its_part():
    assert len({bad.name for bad in BAD_REQUESTS}) == len(BAD_REQUESTS) >= 45
    for door in Door:
        assert sum(door in bad.doors for bad in BAD_REQUESTS) >= 30, door
    assert sum(len(bad.doors) == len(Door) for bad in BAD_REQUESTS) >= 25


@of(BY_REQUEST)
def test_each_is_refused_with_its_sentence(bad: BadRequest, info: ModelInfo):
    with pytest.raises(CamserveError) as caught:
        fit(bad, to_request(bad), info)
    expect(bad, caught)


def said(bad: BadRequest, info: ModelInfo) -> str:
    """What is said of a request that no door has touched."""
    with pytest.raises(CamserveError) as caught:
        fit(bad, to_request(bad), info)
    return str(caught.value)


@of(BY_REQUEST, Door.OIP)
def test_the_open_inference_protocol_says_the_same(bad: BadRequest, info: ModelInfo):
    with pytest.raises(CamserveError) as caught:
        fit(bad, oip.decode(to_oip(bad).SerializeToString()).request, info)
    assert (type(caught.value), str(caught.value)) == (bad.kind, said(bad, info))


@of(BY_REQUEST, Door.PLAIN)
def test_the_plain_api_says_the_same(bad: BadRequest, info: ModelInfo):
    with pytest.raises(CamserveError) as caught:
        fit(bad, plain.decode(to_plain_fields(bad)).request, info)
    assert (type(caught.value), str(caught.value)) == (bad.kind, said(bad, info))


@of(BY_WORKER)
def test_what_only_a_worker_notices_fits_the_model_and_is_refused_by_the_engine(bad: BadRequest, engine: Engine):
    assert engine.info.layers == tiny.tiny_network().info.layers
    with pytest.raises(CamserveError) as caught:
        engine.explain(**to_engine_kwargs(bad))
    expect(bad, caught)


@of(BY_WORKER, Door.OIP)
def test_what_only_a_worker_notices_is_read_at_every_door_as_it_is(bad: BadRequest):
    wanted = to_request(bad)
    for request in (oip.decode(to_oip(bad).SerializeToString()).request, plain.decode(to_plain_fields(bad)).request):
        assert (request.image, request.methods) == (wanted.image, wanted.methods)


@of(list(BAD_REQUESTS), Door.V1)
def test_typed_grpc_can_say_it(bad: BadRequest):
    """The message holds what the request is about; a default that stands for something else would hide it."""
    message = to_v1(bad)
    assert message != to_v1(BadRequest("good", {}, ""))
    methods = bad.changes.get("method", ())
    assert len(message.methods) == (len(methods) if isinstance(methods, tuple) else 1)


@pytest.mark.parametrize("door", [Door.LOCAL, Door.REMOTE])
def test_the_command_line_can_say_it(door: Door, tmp_path: Path):
    """No option is refused by the command itself: what is refused is refused by what it calls, or by our own types."""
    for bad in BAD_REQUESTS:
        if door in bad.doors:
            context = commands.explain.make_context("explain", to_cli_arguments(bad, tmp_path)[1:])
            assert context.params["image"].read_bytes() == bad.changes.get("image", PHOTO)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_settings_are_the_limits(name: str):
    assert Settings(**SETTINGS).model_dump()[name] == getattr(LIMITS, name.removeprefix("max_"))

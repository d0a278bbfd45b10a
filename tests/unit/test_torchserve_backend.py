"""The TorchServe backend against a server that speaks its two protocols, with its texts."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
import numpy as np
import pytest

from camserve.codecs import step as codec
from camserve.errors import CamserveError, Internal, InvalidInput, InvalidOption, NotFound, Unavailable, WorkerLost
from camserve.gateway.pool.check_answer import check_answer
from camserve.gateway.pool.fake import MODEL, FakeBackend
from camserve.gateway.pool.readiness import device_of
from camserve.gateway.pool.torchserve import KEY, TorchServeBackend, Workers
from camserve.methods import GradCam, GroupCam, ScoreCam, SsCam
from camserve.torchserve import inference_pb2, inference_pb2_grpc
from camserve.types import Item, ItemResult, MapCurves, Partial, Ranking, StepResult, Target, Task
from camserve.worker.v1 import step_pb2

ITEM = Item(
    image=np.zeros((32, 48, 3), np.uint8) + np.arange(3, dtype=np.uint8),
    digest=b"name of the image",
    targets=(Target(index=1), Target(index=2)),
    tasks=(Task(0, GradCam(), 0, 0), Task(1, ScoreCam(), 4, 9)),
)
NOWHERE = "http://127.0.0.1:9"


class Inference(inference_pb2_grpc.InferenceAPIsServiceServicer):
    """Answers with what it was given: bytes, or (status, text)."""

    def __init__(self, answer: bytes | tuple[grpc.StatusCode, str]) -> None:
        self.answer = answer
        self.requests: list[inference_pb2.PredictionsRequest] = []

    async def Predictions(self, request, context):  # noqa: N802  # gRPC's name
        self.requests.append(request)
        if isinstance(self.answer, tuple):
            await context.abort(*self.answer)
        return inference_pb2.PredictionResponse(prediction=self.answer)


@asynccontextmanager
async def torchserve(
    answer: bytes | tuple[grpc.StatusCode, str], management_url: str = NOWHERE
) -> AsyncIterator[tuple[TorchServeBackend, Inference]]:
    server, inference = grpc.aio.server(), Inference(answer)
    inference_pb2_grpc.add_InferenceAPIsServiceServicer_to_server(inference, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    backend = TorchServeBackend(f"127.0.0.1:{port}", management_url)
    try:
        yield backend, inference
    finally:
        await backend.close()
        await server.stop(None)


@contextmanager
def management(pages: dict[str, object]) -> Iterator[str]:
    """Answers GET with these JSON documents, anything else with 404; yields its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # the base class's name
            body = json.dumps(pages.get(self.path, {"code": 404})).encode()
            self.send_response(200 if self.path in pages else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


async def expected() -> StepResult:
    return await FakeBackend().step("fake", [ITEM], 1.0)


async def test_a_step_goes_out_as_bytes_and_its_answer_comes_back():
    result = await expected()
    async with torchserve(codec.result_to_bytes(result)) as (backend, inference):
        answer = await backend.step("fake", [ITEM], 5.0)
    (request,) = inference.requests
    assert request.model_name == "fake"
    (item,) = codec.request_from_bytes(request.input[KEY])
    assert item.digest == ITEM.digest
    assert (item.targets, item.tasks) == (ITEM.targets, ITEM.tasks)
    np.testing.assert_array_equal(item.image, ITEM.image)
    (got,), (want,) = answer.outcomes, result.outcomes
    assert isinstance(got, ItemResult)
    assert isinstance(want, ItemResult)
    assert [prediction.index for prediction in got.predictions] == [prediction.index for prediction in want.predictions]
    for left, right in zip(got.partials, want.partials, strict=True):
        np.testing.assert_array_equal(left.sums, right.sums)


async def test_a_model_is_described():
    async with torchserve(codec.description_to_bytes(MODEL, "worker")) as (backend, inference):
        assert await backend.describe("fake", 5.0) == MODEL
    assert [request.input[KEY] for request in inference.requests] == [codec.DESCRIBE]


TEXTS = [
    ("Worker died.", WorkerLost, "the worker of fake died while it answered"),
    ("Model not found: fake", NotFound, "TorchServe has no model fake"),
    ('Model "fake" has no worker to serve inference request.', Unavailable, "no worker of fake is free"),
    ("Out of resources", Unavailable, "the worker of fake is out of memory"),
    ("Prediction failed", Unavailable, "the worker of fake failed"),
    ("Received message larger than max (7000000 vs. 6553500)", Internal, "internal error"),
    ("Sent message larger than max (7000000 vs. 6553500)", Internal, "internal error"),
    ("gRPC message exceeds maximum size 6553500: 7000000", Internal, "internal error"),
]
CODES = [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK]


async def test_torchserves_texts_are_read_before_their_codes():
    """Each text under each code: TorchServe has changed them, and has others after a SIGKILL."""
    for text, kind, sentence in TEXTS:
        async with torchserve((grpc.StatusCode.UNKNOWN, text)) as (backend, inference):
            for code in CODES:
                inference.answer = (code, text)
                with pytest.raises(CamserveError, match=sentence) as caught:
                    await backend.step("fake", [ITEM], 30.0)
                assert type(caught.value) is kind, (code, text)


async def test_a_status_without_a_known_text_may_be_asked_again():
    others = {"UNAVAILABLE": "TorchServe does not answer at", "DEADLINE_EXCEEDED": "took longer than 30 s for a step"}
    async with torchserve(b"") as (backend, inference):
        for code in CODES:
            for text in ("", "something new", "quota exceeded"):
                inference.answer = (code, text)
                with pytest.raises(Unavailable, match=others.get(code.name, f"TorchServe answered {code.name}")):
                    await backend.step("fake", [ITEM], 30.0)


@pytest.mark.parametrize(("code", "kind"), [("CANCELLED", Internal), ("INTERNAL", Unavailable)])
async def test_a_stream_that_is_reset_is_too_large_a_message_where_it_is_cancelled(code: str, kind: type):
    async with torchserve((grpc.StatusCode[code], "Received RST_STREAM with error code 8")) as (backend, _):
        with pytest.raises(CamserveError) as caught:
            await backend.step("fake", [ITEM], 30.0)
    assert type(caught.value) is kind


async def test_a_worker_that_takes_too_long_is_unavailable():
    class Slow(Inference):
        async def Predictions(self, request, context):  # noqa: N802  # gRPC's name
            await grpc.aio.insecure_channel("127.0.0.1:9").channel_ready()  # never

    server = grpc.aio.server()
    inference_pb2_grpc.add_InferenceAPIsServiceServicer_to_server(Slow(b""), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    backend = TorchServeBackend(f"127.0.0.1:{port}", NOWHERE)
    with pytest.raises(WorkerLost, match=r"a worker of fake took longer than 0.05 s for a step"):
        await backend.step("fake", [ITEM], 0.05)
    await backend.close()
    await server.stop(None)


async def test_nobody_there_is_unavailable():
    backend = TorchServeBackend("127.0.0.1:9", NOWHERE)
    with pytest.raises(Unavailable, match=r"TorchServe does not answer at 127.0.0.1:9"):
        await backend.step("fake", [ITEM], 5.0)
    with pytest.raises(Unavailable, match="TorchServe does not answer at http://127"):
        await backend.models()
    await backend.close()


@pytest.mark.parametrize(
    "answer",
    [
        b"\xff\xff not a message",
        b"",
        step_pb2.WorkerReply(describe=step_pb2.ModelDescription()).SerializeToString(),
        step_pb2.WorkerReply(
            step={"items": [{"result": {"partials": [{"sums": {"shape": [1, 2, 2], "data": b"123"}}]}}]}
        ).SerializeToString(),
    ],
)
async def test_a_malformed_reply_may_be_asked_for_again(answer: bytes):
    async with torchserve(answer) as (backend, _):
        with pytest.raises(Unavailable, match="could not be read"):
            await backend.step("fake", [ITEM], 5.0)


async def test_a_refusal_of_the_whole_step_keeps_its_class():
    async with torchserve(codec.error_to_bytes(InvalidInput("not a step"))) as (backend, _):
        with pytest.raises(InvalidInput, match="not a step"):
            await backend.step("fake", [ITEM], 5.0)


async def test_items_keep_their_errors():
    result = StepResult((InvalidOption("theta"),), {}, "w")
    async with torchserve(codec.result_to_bytes(result)) as (backend, _):
        (outcome,) = (await backend.step("fake", [ITEM], 5.0)).outcomes
    assert isinstance(outcome, InvalidOption)


async def test_only_workers_that_are_ready_count():
    states = {11: "READY", 12: "UNLOADING", 13: "READY"}
    workers = [{"pid": pid, "startTime": "noon", "status": status} for pid, status in states.items()]
    with management({"/models/a": [{"modelName": "a", "minWorkers": 3, "workers": workers}]}) as url:
        async with torchserve(b"", url) as (backend, _):
            assert await backend.look("a") == Workers(frozenset({"11 since noon", "13 since noon"}), 3)
            assert await backend.look("unknown") == Workers(frozenset(), 0)


async def test_every_page_of_models_is_read():
    pages = {
        "/models?limit=100&next_page_token=0": {"models": [{"modelName": "a"}], "nextPageToken": "100"},
        "/models?limit=100&next_page_token=100": {"models": [{"modelName": "b"}]},
    }
    with management(pages) as url:
        async with torchserve(b"", url) as (backend, _):
            assert await backend.models() == ["a", "b"]


SAMPLED = Item(
    image=ITEM.image,
    digest=b"name",
    targets=(Target(index=1),),
    tasks=(
        Task(0, SsCam(samples=2), 0, 5),
        Task(1, GroupCam(groups=4, grouping="kmeans"), 0, 4, ordered=True),
        Task(2, MapCurves(np.zeros(MODEL.input_size, np.float32), Target(index=1), 9), 0, 20),
        Task(3, Ranking(np.zeros((1, *MODEL.input_size), np.float32)), 0, 1),
    ),
)
"""A context, labels, an order, curves and a ranking: everything that a partial can have."""


def _changed(result: StepResult, **changes: object) -> StepResult:
    (outcome,) = result.outcomes
    return StepResult((ItemResult(**(vars(outcome) | changes)),), {}, "")


def _with(result: StepResult, position: int, **changes: object) -> StepResult:
    """The result with one of its partials changed."""
    (outcome,) = result.outcomes
    partials = list(outcome.partials)
    partials[position] = replace(partials[position], **changes)
    return _changed(result, partials=tuple(partials))


async def test_an_answer_that_does_not_fit_is_refused():
    result = await expected()
    check_answer(MODEL, [ITEM], result)
    (outcome,) = result.outcomes
    assert isinstance(outcome, ItemResult)
    small = tuple(Partial(partial.position, 0, partial.sums[:, :1]) for partial in outcome.partials)
    fewer = tuple(Partial(partial.position, 0, partial.sums[:1]) for partial in outcome.partials)
    unknown = replace(outcome.predictions[0], index=len(MODEL.labels))
    open_ended = replace(outcome.targets[0], target=Target(top_k=1))
    for wrong in (
        StepResult((), {}, ""),
        _changed(result, predictions=(unknown,)),
        _changed(result, targets=(replace(outcome.targets[0], classes=(unknown,)), outcome.targets[1])),
        _changed(result, targets=(open_ended, outcome.targets[1])),
        _changed(result, targets=outcome.targets[:1]),
        _changed(result, targets=()),
        _changed(result, targets=outcome.targets[:1], partials=fewer),
        _changed(result, partials=outcome.partials[:1]),
        _changed(result, partials=outcome.partials[::-1]),
        _changed(result, partials=small),
        _with(result, 1, order=(0, 1)),
        _with(result, 1, energies=(2.0, 1.0)),
        _with(result, 0, context=np.zeros((96, 4, 6), np.float32)),
        _with(result, 1, labels=(1,)),
    ):
        with pytest.raises(Unavailable, match="could not be read"):
            check_answer(MODEL, [ITEM], wrong)


async def test_what_belongs_to_the_sums_is_checked_as_well():
    result = await FakeBackend().step("fake", [SAMPLED], 1.0)
    check_answer(MODEL, [SAMPLED], result)
    (outcome,) = result.outcomes
    assert isinstance(outcome, ItemResult)
    assert outcome.partials[0].context is not None
    assert len(outcome.partials[1].labels) == 96
    order = outcome.partials[1].order
    assert sorted(order) == list(range(4))
    for wrong in (
        _with(result, 0, context=None),
        _with(result, 0, context=outcome.partials[0].context[:-1]),
        _with(result, 1, labels=()),
        _with(result, 1, labels=outcome.partials[1].labels[1:]),
        _with(result, 1, order=order[1:]),
        _with(result, 1, order=(order[0], *order[:-1])),
        _with(result, 1, order=()),
        _with(result, 1, energies=()),
        _with(result, 1, energies=outcome.partials[1].energies[1:]),
        _with(result, 1, energies=(math.nan, *outcome.partials[1].energies[1:])),
        _with(result, 1, energies=(-1.0, *outcome.partials[1].energies[1:])),
        _with(result, 2, sums=np.zeros((1, 2, 9), np.float32)),
        _with(result, 3, sums=np.zeros((2, *MODEL.input_size), np.float32)),
    ):
        with pytest.raises(Unavailable, match="could not be read"):
            check_answer(MODEL, [SAMPLED], wrong)


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -1.0])
async def test_a_time_that_is_none_is_refused(seconds: float):
    """The planner would learn it, and every prediction after it would be wrong."""
    result = await expected()
    with pytest.raises(Unavailable, match="could not be read"):
        check_answer(MODEL, [ITEM], replace(result, stage_seconds={"forward": 0.1, "queries": seconds}))


@pytest.mark.parametrize(("classes", "fits"), [(1, True), (4, True), (5, False), (9, False)])
async def test_there_are_at_most_as_many_classes_as_were_asked(classes: int, fits: bool):
    """An index may be one of the top 3: there are three classes then or four, and the work of four was admitted."""
    item = replace(ITEM, targets=(Target(index=7), Target(top_k=3)))
    more = replace(ITEM, targets=tuple(Target(index=index) for index in range(classes)))
    result = await FakeBackend().step("fake", [more], 1.0)
    if fits:
        check_answer(MODEL, [item], result)
    else:
        with pytest.raises(Unavailable, match="could not be read"):
            check_answer(MODEL, [item], result)


async def test_where_nothing_is_explained_no_target_fits():
    item = replace(ITEM, targets=(), tasks=())
    check_answer(MODEL, [item], await FakeBackend().step("fake", [item], 1.0))
    explained = await FakeBackend().step("fake", [replace(item, targets=(Target(index=7),))], 1.0)
    with pytest.raises(Unavailable, match="could not be read"):
        check_answer(MODEL, [item], explained)


def test_an_error_is_an_outcome_that_fits_any_item():
    check_answer(MODEL, [ITEM], StepResult((InvalidOption("theta"),), {}, "w"))


@pytest.mark.parametrize(
    ("worker", "device"), [("host/17/cpu", "cpu"), ("host/17/cuda:0", "cuda"), ("some-name", "cpu"), ("", "cpu")]
)
def test_a_worker_says_its_device(worker: str, device: str):
    assert device_of(worker) == device

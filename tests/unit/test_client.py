"""Both clients against a server that answers with prepared messages, over real gRPC on loopback."""

import asyncio
import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from PIL import Image

from camserve import errors
from camserve.client import ERROR_KEY, AsyncClient, Client, ModelSummary, Progress, unready
from camserve.codecs import v1
from camserve.images import decode
from camserve.methods import GradCam, GroupCam
from camserve.types import Explanation, StreamOptions, Target
from camserve.types.request import make_request
from camserve.v1 import explain_pb2 as pb
from camserve.v1.explain_pb2_grpc import ExplanationServiceServicer, add_ExplanationServiceServicer_to_server

BY_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidInput,
    grpc.StatusCode.NOT_FOUND: errors.NotFound,
    grpc.StatusCode.FAILED_PRECONDITION: errors.Unsupported,
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.Overloaded,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    grpc.StatusCode.CANCELLED: errors.Cancelled,
    grpc.StatusCode.UNAVAILABLE: errors.Unavailable,
}
"""What a status means where the server does not name a class; any other is a fault."""

IMAGE = np.zeros((4, 4, 3), np.uint8)
VIEW = pb.InputView(original_height=4, original_width=4, right=4, bottom=4, height=4, width=4)


def reply(side: int = 4) -> pb.ExplainReply:
    message = pb.SaliencyMap(
        method=pb.MethodSpec(grad_cam=pb.GradCam()),
        shape=[side, side],
        encoding=pb.Output.FLOAT32,
        data=np.full((side, side), 0.5, "<f4").tobytes(),
    )
    return pb.ExplainReply(model="lite0", maps=[message], input=VIEW)


class Prepared(ExplanationServiceServicer):
    """Answers with what it was given, and remembers what it was asked."""

    def __init__(self) -> None:
        self.request: pb.ExplainRequest | None = None
        self.metadata: dict[str, str] = {}
        self.time_left_s: float | None = None
        self.failure: tuple[grpc.StatusCode, str, tuple[tuple[str, str], ...]] | None = None
        self.answer = reply()
        self.updates = [pb.ExplainUpdate(progress=pb.Progress(done=done, total=8)) for done in (0, 4, 8)]
        self.ends_with_reply = True
        self.models: list[list[pb.ModelSummary]] = [[pb.ModelSummary(name="lite0", version="1.0", ready=True)]]
        self.stalled: threading.Event | None = None
        self.ended = threading.Event()

    def _look(self, request, context) -> None:
        self.request = request
        self.metadata = dict(context.invocation_metadata())
        self.time_left_s = context.time_remaining()
        context.add_callback(self.ended.set)
        if self.failure is not None:
            code, text, metadata = self.failure
            context.set_trailing_metadata(metadata)
            context.abort(code, text)

    def Explain(self, request, context):  # noqa: N802  # gRPC's name
        self._look(request, context)
        if self.stalled is not None:
            self.stalled.wait(30)
        return self.answer

    def StreamExplain(self, request, context):  # noqa: N802  # gRPC's name
        self._look(request, context)
        yield from self.updates
        if self.stalled is not None:
            self.stalled.wait(30)
        if self.ends_with_reply:
            yield pb.ExplainUpdate(reply=self.answer)

    def ListModels(self, request, context):  # noqa: N802  # gRPC's name
        self._look(request, context)
        if self.stalled is not None and len(self.models) == 1:
            self.stalled.wait(30)
        return pb.ListModelsReply(models=self.models.pop(0) if len(self.models) > 1 else self.models[0])

    def GetModel(self, request, context):  # noqa: N802  # gRPC's name
        self._look(request, context)
        return pb.Model(name=request.name or "lite0", ready=True)


@pytest.fixture
def server():
    prepared = Prepared()
    running = grpc.server(ThreadPoolExecutor(4), options=[("grpc.max_receive_message_length", -1)])
    add_ExplanationServiceServicer_to_server(prepared, running)
    prepared.address = f"127.0.0.1:{running.add_insecure_port('127.0.0.1:0')}"
    running.start()
    yield prepared
    if prepared.stalled is not None:
        prepared.stalled.set()
    running.stop(0).wait()


@pytest.fixture
def unused_address():
    """A port that is bound, so that nobody else takes it, but where nothing listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


class Blocking:
    """The asynchronous client, called like the other one: the same tests hold both."""

    def __init__(self, address: str, **options) -> None:
        self.address, self.options = address, options

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        pass

    def __getattr__(self, name: str):
        async def call(*args, **options):
            async with AsyncClient(self.address, **self.options) as client:
                result = getattr(client, name)(*args, **options)
                return await result if asyncio.iscoroutine(result) else [update async for update in result]

        return lambda *args, **options: asyncio.run(call(*args, **options))


@pytest.fixture(params=[Client, Blocking], ids=["sync", "async"])
def connect(request):
    return request.param


def test_explain(server, connect):
    with connect(server.address) as client:
        answer = client.explain(IMAGE, ["grad_cam"], [1], layer="features")
    assert isinstance(answer, Explanation)
    assert answer.maps[0].method == GradCam()
    np.testing.assert_array_equal(answer.maps[0].array, np.full((4, 4), 0.5, np.float32))
    assert (server.request.layers, server.request.targets[0].index) == (["features"], 1)


def test_what_is_sent_is_what_was_asked(server, connect):
    asked = {"model": "lite0", "size": "original", "encoding": "uint8", "boxes": True, "priority": "batch"}
    with connect(server.address) as client:
        client.explain(IMAGE, ["grad_cam", ("group_cam", {"groups": 8})], ["tabby", Target(top_k=3)], **asked)
    request = make_request(
        IMAGE,
        [GradCam(), GroupCam(groups=8)],
        [Target(label="tabby"), Target(top_k=3)],
        **asked,
        stream=StreamOptions(max_maps=0),  # maps on the way would be made for nobody
    )
    assert server.request == v1.request_to_proto(request)


def test_a_stream_asks_for_maps_on_the_way(server, connect):
    with connect(server.address) as client:
        list(client.stream(IMAGE))
        assert server.request.stream.max_maps == 8
        list(client.stream(IMAGE, stream=StreamOptions(max_maps=2)))
        assert server.request.stream.max_maps == 2


def test_a_picture_is_sent_as_a_file_and_its_maps_lie_on_it(server, connect):
    server.answer.input.original_width = server.answer.input.original_height = 8
    server.answer.input.right = server.answer.input.bottom = 8
    with connect(server.address) as client:
        answer = client.explain(Image.new("RGB", (8, 8), "red"))
    assert decode(server.request.image.encoded).size == (8, 8)
    assert answer.maps[0].image.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("request_id", ["a", "x" * 128, "~!#[]"])
def test_a_request_id_is_sent(server, connect, request_id):
    with connect(server.address) as client:
        client.explain(IMAGE, request_id=request_id)
        assert server.metadata["x-request-id"] == request_id
        list(client.stream(IMAGE, request_id="another"))
        assert server.metadata["x-request-id"] == "another"


def test_without_a_request_id_the_server_makes_one(server, connect):
    with connect(server.address) as client:
        client.explain(IMAGE)
    assert "x-request-id" not in server.metadata


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"methods": ["deep_dream"]}, errors.InvalidOption, "unknown method 'deep_dream'; there are cam, grad_cam"),
        ({"methods": [("group_cam", {"groups": 2**32})]}, errors.InvalidOption, r"groups must be below 2\*\*32, got"),
        ({"targets": [-1]}, errors.InvalidOption, r"0\.\.2\*\*32-1, got -1"),
        ({"targets": [2**32]}, errors.InvalidOption, r"0\.\.2\*\*32-1, got 4294967296"),
        ({"top_predictions": -1}, errors.InvalidOption, "at least 0, got -1"),
        ({"top_predictions": 2**32}, errors.InvalidOption, "out of range"),
        ({"size": "huge"}, errors.InvalidOption, "size must be one of input, layer, original, got 'huge'"),
        (
            {"encoding": "overlay_png"},
            errors.InvalidOption,
            "encoding must be one of float32, float16, uint8, png, got 'overlay_png'",
        ),
        ({"precision": "int8"}, errors.InvalidOption, "precision must be one of auto, exact, bfloat16, got 'int8'"),
        ({"image": "/nowhere.png"}, errors.InvalidImage, r"cannot read /nowhere\.png: No such file"),
        ({"image": IMAGE.astype(np.int64)}, errors.InvalidImage, "uint8 or float32, got int64"),
        ({"request_id": "two words"}, errors.InvalidOption, r"1\.\.128 printable ASCII .* got 'two words'"),
        ({"request_id": "x" * 129}, errors.InvalidOption, "request id"),
        ({"request_id": "grüße"}, errors.InvalidOption, "request id"),
        ({"request_id": "line\n"}, errors.InvalidOption, "request id"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_bad_argument_fails_before_anything_is_sent(server, connect, options, kind, text, streaming):
    with connect(server.address) as client:
        ask = (lambda **asked: list(client.stream(**asked))) if streaming else client.explain
        with pytest.raises(errors.CamserveError, match=text) as refused:
            ask(**{"image": IMAGE} | options)
    assert type(refused.value) is kind
    assert server.request is None


def test_progress_is_reported(server, connect):
    seen = []
    with connect(server.address) as client:
        answer = client.explain(IMAGE, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 8), (4, 8), (8, 8)]
    assert isinstance(answer, Explanation)


def test_stream(server, connect):
    with connect(server.address) as client:
        updates = list(client.stream(IMAGE))
    assert updates[:-1] == [Progress(done, 8, ()) for done in (0, 4, 8)]
    assert isinstance(updates[-1], Explanation)


def test_stream_without_reply_is_a_fault(server, connect):
    server.ends_with_reply = False
    with connect(server.address) as client, pytest.raises(errors.Internal, match="ended without a reply"):
        client.explain(IMAGE, on_progress=lambda done, total: None)


def test_models(server, connect):
    with connect(server.address) as client:
        (model,) = client.models()
        assert (model.name, model.version, model.ready) == ("lite0", "1.0", True)
        assert client.model().name == "lite0"
        assert client.model("other").name == "other"


def test_large_messages(server, connect):
    server.answer = reply(1500)  # 9 MB; gRPC's own limit is 4 MiB
    large = np.zeros((1500, 1500, 3), np.uint8)
    with connect(server.address) as client:
        assert client.explain(large, size="layer").maps[0].array.shape == (1500, 1500)
    assert len(server.request.image.tensor.data) == large.nbytes


@pytest.mark.parametrize(
    ("own", "call", "at_most"), [(None, None, None), (50.0, None, 50), (None, 20.0, 20), (50.0, 20.0, 20)]
)
def test_deadline_is_sent(server, connect, own, call, at_most):
    with connect(server.address, timeout_s=own) as client:
        client.explain(IMAGE, timeout_s=call)
    if at_most is None:
        assert server.time_left_s is None or server.time_left_s > 1e6
    else:
        assert at_most / 2 < server.time_left_s <= at_most + 1  # the clocks of both ends are rounded


@pytest.mark.parametrize("kind", errors.KINDS.values(), ids=lambda kind: kind.__name__)
def test_error_is_of_the_class_that_the_server_names(server, connect, kind):
    server.failure = (grpc.StatusCode.UNKNOWN, "what was wrong", ((ERROR_KEY, kind.__name__),))
    with connect(server.address) as client, pytest.raises(errors.CamserveError, match=r"^what was wrong$") as caught:
        client.explain(IMAGE)
    assert type(caught.value) is kind


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_error_without_a_class_goes_by_status(server, connect, code):
    server.failure = (code, "some text", ())
    with connect(server.address) as client, pytest.raises(errors.CamserveError) as caught:
        client.explain(IMAGE)
    assert type(caught.value) is BY_STATUS.get(code, errors.Internal)


def test_class_that_this_client_does_not_know_goes_by_status(server, connect):
    server.failure = (grpc.StatusCode.NOT_FOUND, "some text", ((ERROR_KEY, "Newfangled"),))
    with connect(server.address) as client, pytest.raises(errors.NotFound, match="some text"):
        client.explain(IMAGE)


def test_errors_of_a_stream_are_typed(server, connect):
    server.failure = (grpc.StatusCode.INVALID_ARGUMENT, "bad", ((ERROR_KEY, "InvalidImage"),))
    with connect(server.address) as client, pytest.raises(errors.InvalidImage, match="bad"):
        client.explain(IMAGE, on_progress=lambda done, total: None)


def test_nothing_listens(unused_address, connect):
    text = f"no answer from {unused_address}; is a camserve server running there"
    with connect(unused_address) as client, pytest.raises(errors.Unavailable, match=text):
        client.explain(IMAGE)


def test_another_service_listens(connect):
    other = grpc.server(ThreadPoolExecutor(1))
    port = other.add_insecure_port("127.0.0.1:0")
    other.start()
    with connect(f"127.0.0.1:{port}") as client, pytest.raises(errors.Internal, match="is not a camserve server"):
        client.explain(IMAGE)
    other.stop(0).wait()


def test_deadline_passes(server, connect):
    server.stalled = threading.Event()
    with connect(server.address) as client, pytest.raises(errors.DeadlineExceeded, match="within the deadline"):
        client.explain(IMAGE, timeout_s=0.2)


def test_closing_a_stream_cancels_the_call(server):
    server.stalled = threading.Event()
    with Client(server.address) as client:
        stream = client.stream(IMAGE)
        next(stream)
        stream.close()
        assert server.ended.wait(30)


async def test_cancelling_a_task_cancels_the_call(server):
    server.stalled = threading.Event()
    reached = asyncio.Event()
    async with AsyncClient(server.address) as client:
        task = asyncio.create_task(client.explain(IMAGE, on_progress=lambda done, total: reached.set()))
        await reached.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(server.ended.wait, 30)


async def test_many_calls_share_a_client(server):
    async with AsyncClient(server.address) as client:
        answers = await asyncio.gather(*(client.explain(IMAGE) for _ in range(20)))
    assert {answer.model for answer in answers} == {"lite0"}


def test_wait_ready_waits_for_the_worker(server, connect):
    ready = pb.ModelSummary(name="lite0", ready=True)
    server.models = [[], [pb.ModelSummary(name="lite0")], [ready]]
    with connect(server.address) as client:
        client.wait_ready(30)
    assert server.models == [[ready]]


def test_wait_ready_waits_for_the_server(unused_address, connect):
    with (
        connect(unused_address) as client,
        pytest.raises(errors.Unavailable, match=r"not ready after 0.3 s: no answer"),
    ):
        client.wait_ready(0.3)


def test_wait_ready_says_what_is_missing(server, connect):
    server.models = [[pb.ModelSummary(name="lite0")]]
    text = "not ready after 1 s: no worker is ready for lite0"
    with connect(server.address) as client, pytest.raises(errors.Unavailable, match=text):
        client.wait_ready(1)


def test_wait_ready_says_what_it_saw_before_the_server_fell_silent(server, connect):
    server.models, server.stalled = [[pb.ModelSummary(name="lite0")], []], threading.Event()
    with connect(server.address) as client, pytest.raises(errors.Unavailable, match="no worker is ready for lite0"):
        client.wait_ready(1)


def test_wait_ready_of_one_model(server, connect):
    server.models = [[pb.ModelSummary(name="a", ready=True), pb.ModelSummary(name="b")]]
    with connect(server.address) as client:
        client.wait_ready(30, model="a")


def test_loopback_calls_do_not_go_through_a_proxy(server, connect, monkeypatch, unused_address):
    for name in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("grpc_proxy", "https_proxy", "http_proxy"):
        monkeypatch.setenv(name, f"http://{unused_address}")
    with connect(server.address) as client:
        assert client.models()


def test_client_and_gateway_agree_on_the_name_of_the_class():
    convert = pytest.importorskip("camserve.gateway.api.status")
    assert convert.ERROR_KEY == ERROR_KEY
    assert {code: kind for kind, code in convert.STATUS.items() if kind is not errors.Internal} == BY_STATUS


READY, WAITING = ModelSummary("a", "1", True), ModelSummary("b", "1", False)
FAILED = ModelSummary("d", "1", False, "its weights are nonsense")


@pytest.mark.parametrize(
    ("models", "name", "text"),
    [
        ([READY], "", None),
        ([READY], "a", None),
        ([READY, WAITING], "a", None),
        ([READY, WAITING], "", "no worker is ready for b"),
        ([READY], "c", "there is no model 'c'"),
        ([], "", "no model is served"),
        ([READY, FAILED], "", None),
        ([WAITING, FAILED], "", "no worker is ready for b"),
        ([READY, FAILED], "d", "model d failed: its weights are nonsense"),
        ([FAILED], "", "model d failed: its weights are nonsense"),
    ],
)
def test_what_is_not_ready(models, name, text):
    assert unready(models, name) == text


FORKING = """
import os, sys
from camserve.client import Client
from camserve.errors import CamserveError

def tried(what):
    try:
        return f"{len(what())} models"
    except CamserveError as error:
        return f"{type(error).__name__}: {error}"

client = Client(sys.argv[1], timeout_s=60)
print("before:", tried(client.models), flush=True)
if child := os.fork():
    os.waitpid(child, 0)
    print("after:", tried(client.models), flush=True)
else:
    print("the old one:", tried(client.models))
    print("a new one:", tried(lambda: Client(sys.argv[1], timeout_s=60).models()), flush=True)
    os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
@pytest.mark.parametrize("supported", ["1", "0"])
def test_a_fork_is_told_what_to_do(server, supported):
    """By gRPC itself a call would never end, or would say that nothing listens."""
    environment = {**os.environ, "GRPC_ENABLE_FORK_SUPPORT": supported}
    command = [sys.executable, "-c", FORKING, server.address]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120).stdout
    lines = dict(line.split(": ", 1) for line in said.splitlines())
    assert lines["before"] == lines["after"] == "1 models"
    assert "InvalidOption: this client was made before a fork" in lines["the old one"]
    if supported == "1":
        assert lines["a new one"] == "1 models"
    else:
        assert "InvalidOption: this process was forked from one that had made a client" in lines["a new one"]
        assert "GRPC_ENABLE_FORK_SUPPORT=1" in lines["a new one"]

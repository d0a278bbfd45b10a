"""How a gateway ends: what is running may finish, or is told why it does not, and a second signal cuts that short."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc
import pytest
from gateway_harness import PATIENT, QUICK, SCORE, SCRAPED, Harness, ask, failure, photo, serving
from grpc_health.v1 import health_pb2, health_pb2_grpc

from camserve.errors import InvalidOption, Unavailable
from camserve.gateway.api.status import abort
from camserve.gateway.ops.settings import Settings
from camserve.gateway.ops.shutdown import caught_signals, run_until_stopped, stopped
from camserve.gateway.pool.discovery import fixed
from camserve.gateway.pool.fake import FakeBackend
from camserve.gateway.server import SERVICE, Gateway
from camserve.oip import inference_pb2 as oip
from camserve.oip import inference_pb2_grpc
from camserve.v1 import explain_pb2_grpc

WORDS = ("UNAVAILABLE", "the server is shutting down", "Unavailable")


@asynccontextmanager
async def busy(**settings: float) -> AsyncIterator[tuple[Harness, grpc.aio.UnaryUnaryCall]]:
    """A gateway with a Score-CAM whose first step is held, with more time to drain than any test has."""
    async with serving(step_queries=8, drain_s=3600.0, **(PATIENT | settings)) as server:
        server.upstream.hold()
        running = server.stub.Explain(ask(SCORE))
        await server.upstream.received(1)
        yield server, running


async def refused(server: Harness) -> None:
    """Returns once new calls are refused."""
    watching = health_pb2_grpc.HealthStub(server.channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
    with suppress(grpc.aio.AioRpcError):  # it came too late itself
        async for update in watching:
            if update.status == health_pb2.HealthCheckResponse.NOT_SERVING:
                return


async def test_a_stop_without_grace_tells_every_running_call_why():
    async with busy() as (server, running):
        stream = server.stub.StreamExplain(ask(SCORE))
        request = oip.ModelInferRequest()
        request.inputs.add(name="image", datatype="BYTES", shape=[1]).contents.bytes_contents.append(photo())
        inference = inference_pb2_grpc.GRPCInferenceServiceStub(server.channel).ModelInfer(request)
        while server.gateway.calls.active < 3:
            await asyncio.sleep(0.001)
        await server.gateway.stop(0)
        assert await failure(running) == WORDS
        assert await failure(anext(aiter(stream))) == WORDS
        assert await failure(inference) == WORDS
        assert server.upstream.closed


async def test_a_stop_waits_until_the_status_of_an_answered_call_was_sent(monkeypatch: pytest.MonkeyPatch):
    answered, go_on = asyncio.Event(), asyncio.Event()

    async def late(*arguments: Any) -> None:
        answered.set()
        await go_on.wait()
        await abort(*arguments)

    monkeypatch.setattr("camserve.gateway.api.calls.abort", late)
    monkeypatch.setattr("camserve.gateway.server.LAST_WORDS_S", 20.0)  # however busy the machine is
    async with serving() as server:
        call = asyncio.ensure_future(failure(server.stub.Explain(ask(image=b"no image"))))
        await answered.wait()
        assert server.gateway.calls.active == 0
        assert 'code="INVALID_ARGUMENT"' in await server.metrics(), "it is counted before its client hears of it"
        stopping = asyncio.create_task(server.gateway.stop())
        await refused(server)
        await asyncio.sleep(0.05)
        go_on.set()
        assert (await call)[0] == "INVALID_ARGUMENT"
        await stopping


async def test_a_second_stop_with_less_grace_cuts_the_first_one_short():
    async with busy() as (server, running):
        first = asyncio.create_task(server.gateway.stop())
        await refused(server)
        assert not first.done()
        await server.gateway.stop(0)
        assert await failure(running) == WORDS
        await first


async def test_a_stop_that_nobody_waits_for_any_more_goes_on():
    async with busy() as (server, running):
        first = asyncio.create_task(server.gateway.stop())
        await refused(server)
        first.cancel()
        server.upstream.release()
        assert (await running).cost.queries == 96
        await server.gateway.stop()
        assert server.upstream.closed


async def test_a_second_stop_with_more_grace_changes_nothing():
    async with busy() as (server, running):
        first = asyncio.create_task(server.gateway.stop(0))
        await server.gateway.stop(3600.0)
        await first
        assert await failure(running) == WORDS


async def serve_until_signals(backend: FakeBackend, told: asyncio.Future[Gateway], drain_s: float = 3600.0) -> None:
    """Serves as `camserve gateway` does, but over a fake backend; tells the gateway that has started."""
    gateway = Gateway(Settings(**(QUICK | PATIENT | {"drain_s": drain_s, "step_queries": 8})), fixed({"fake": backend}))

    async def work() -> None:
        await gateway.wait_ready(30)
        told.set_result(gateway)
        await asyncio.Event().wait()

    with caught_signals() as signals:
        await run_until_stopped(gateway, signals, work())


@pytest.fixture(autouse=True)
def as_in_a_terminal() -> Iterator[None]:
    """Under nohup a hangup is ignored, by whatever is started, and a test that waits for one would wait for ever."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@asynccontextmanager
async def busy_until_signals(
    backend: FakeBackend,
) -> AsyncIterator[tuple[Harness, grpc.aio.UnaryUnaryCall, asyncio.Task[None]]]:
    """A gateway that real signals stop, with a Score-CAM whose first step is held, and the task that serves."""
    backend.hold()
    told = asyncio.get_running_loop().create_future()
    serving_on = asyncio.create_task(serve_until_signals(backend, told))
    gateway = await told
    async with grpc.aio.insecure_channel(gateway.address) as channel:
        stub = explain_pb2_grpc.ExplanationServiceStub(channel)
        running = stub.Explain(ask(SCORE))
        await backend.received(1)
        yield Harness(gateway, backend, channel, stub), running, serving_on


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
async def test_a_second_signal_ends_running_calls_in_the_servers_words(second: signal.Signals):
    backend = FakeBackend()
    async with busy_until_signals(backend) as (server, running, serving_on):
        os.kill(os.getpid(), signal.SIGTERM)
        await refused(server)
        assert not serving_on.done()
        os.kill(os.getpid(), second)
        assert await failure(running) == WORDS
        with pytest.raises(Unavailable, match="a second signal"):
            await serving_on
    assert backend.closed


async def test_a_hangup_begins_a_stop_and_never_cuts_one_short():
    """A terminal that closes sends it more than once: from the kernel, and from the shell."""
    backend = FakeBackend()
    async with busy_until_signals(backend) as (server, running, serving_on):
        os.kill(os.getpid(), signal.SIGHUP)
        await refused(server)
        os.kill(os.getpid(), signal.SIGHUP)
        await asyncio.sleep(0)
        backend.release()
        assert (await running).cost.queries == 96
        await serving_on


async def test_a_hangup_that_is_ignored_stays_ignored():
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with caught_signals() as signals:
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGHUP)
            assert not signals.stop.is_set()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


async def test_a_second_signal_while_something_else_stops_has_it_stopped_at_once():
    class Slow:
        """Takes as long as it may."""

        def __init__(self) -> None:
            self.graces: list[float | None] = []

        async def stop(self, grace_s: float | None = None) -> None:
            self.graces.append(grace_s)
            if grace_s is None:
                os.kill(os.getpid(), signal.SIGINT)
                await asyncio.Event().wait()

    async def stop_it() -> None:
        with caught_signals() as signals:
            os.kill(os.getpid(), signal.SIGTERM)
            await signals.stop.wait()
            await stopped(slow, signals)

    slow = Slow()
    with pytest.raises(Unavailable, match="a second signal"):
        await stop_it()
    assert slow.graces == [None, 0]


async def test_a_gateway_that_does_not_start_leaves_nothing_that_was_never_awaited(recwarn: pytest.WarningsRecorder):
    async def work() -> None:
        raise AssertionError("the gateway has not started")

    async with serving(**SCRAPED) as server:
        taken = Settings(listen="127.0.0.1:0", metrics_listen=server.gateway.metrics_address)
        with pytest.raises(InvalidOption, match="Address already in use"), caught_signals() as signals:
            await run_until_stopped(Gateway(taken, fixed({"fake": FakeBackend()})), signals, work())
    assert [str(one.message) for one in recwarn if "never awaited" in str(one.message)] == []

"""A reply belongs to its call until the client has read it: it counts as in flight, and ends at the deadline."""

from __future__ import annotations

import asyncio
import logging
import re
from typing import Any

import grpc
import pytest
from gateway_harness import PATIENT, SCORE, Harness, ask, jump, photo, serving, until

from camserve.gateway.requests.memory import REPLY_COPIES
from camserve.gateway.server import KEEPALIVE
from camserve.v1 import explain_pb2 as pb

REPLY = {"output": pb.Output(size=pb.Output.ORIGINAL), "stream": pb.StreamOptions(max_maps=0)}
"""A map of the photo's size: 8 MB, more than what is on its way to a client that does not read."""


async def unread(server: Harness) -> Any:
    """A stream whose first news were read, and whose final reply waits for its client."""
    server.upstream.hold()
    call = server.stub.StreamExplain(ask(SCORE, image=photo(size=(1000, 2000), kind="JPEG"), **REPLY))
    await server.upstream.received(1)
    server.upstream.release(1)
    assert (await call.read()).HasField("progress")
    server.upstream.release()
    while 'stage="render"' not in await server.metrics():  # what is written before that are small news
        await asyncio.sleep(0.001)
    await until(lambda: server.gateway.calls.undelivered == 1)
    return call


async def final(call: Any) -> pb.ExplainReply:
    """The reply at the end of a stream."""
    while not (update := await call.read()).HasField("reply"):
        pass
    return update.reply


async def test_a_reply_that_is_not_read_is_in_flight_until_the_client_reads_it():
    async with serving(**PATIENT) as server:
        call = await unread(server)
        text = await server.metrics()
        assert 'camserve_requests_in_flight{class="normal"} 1.0' in text
        (held,) = re.findall(r"^camserve_bytes_in_flight (.+)$", text, re.MULTILINE)
        assert 'code="OK"' not in text
        reply = pb.ExplainUpdate(reply=await final(call))
        assert float(held) == REPLY_COPIES * reply.ByteSize(), "the estimate has made way for the reply's real size"
        await until(lambda: server.gateway.calls.active == 0)
        text = await server.metrics()
        assert 'camserve_requests_in_flight{class="normal"} 0.0' in text
        assert "camserve_bytes_in_flight 0.0" in text
        assert 'code="OK",method="score_cam",model="fake"} 1.0' in text


async def test_a_reply_that_is_never_read_ends_at_the_deadline_and_its_memory_is_free(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        async with serving(**PATIENT) as server:
            call = await unread(server)
            jump(601)
            await until(lambda: server.gateway.calls.active == 0)
            text = await server.metrics()
            assert 'code="DEADLINE_EXCEEDED",method="score_cam",model="fake"} 1.0' in text
            assert 'camserve_requests_in_flight{class="normal"} 0.0' in text
            assert "camserve_bytes_in_flight 0.0" in text
            assert (await server.stub.Explain(ask())).maps  # grpc.aio forgets a call when the next one comes
            with pytest.raises(grpc.aio.AioRpcError) as caught:  # had gRPC kept the reply, the client would get it now
                await final(call)
            assert caught.value.code() is grpc.StatusCode.CANCELLED
    assert not [record for record in caplog.records if record.name != "camserve.access"]


async def test_news_that_are_not_read_end_with_their_call():
    """News wait for the client as well: the second one with maps of 8 MB is not read."""
    output = pb.Output(size=pb.Output.ORIGINAL)
    request = ask(
        SCORE,
        image=photo(size=(1000, 2000), kind="JPEG"),
        output=output,
        stream=pb.StreamOptions(min_interval_s=0),
    )
    async with serving(step_queries=8, **PATIENT) as server:
        call = server.stub.StreamExplain(request)
        await until(lambda: server.gateway.calls.undelivered == 1)
        jump(601)
        await until(lambda: server.gateway.calls.active == 0)
        assert 'code="DEADLINE_EXCEEDED",method="score_cam",model="fake"} 1.0' in await server.metrics()
        call.cancel()


async def test_a_client_that_goes_away_while_its_reply_waits_is_cancelled(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        async with serving(**PATIENT) as server:
            call = await unread(server)
            call.cancel()
            await until(lambda: server.gateway.calls.active == 0)
            text = await server.metrics()
            assert 'code="CANCELLED",method="score_cam",model="fake"} 1.0' in text, [
                line for line in text.splitlines() if "request_seconds_count" in line
            ]
            assert "camserve_bytes_in_flight 0.0" in text
            await asyncio.sleep(0)
    assert not [record for record in caplog.records if record.name != "camserve.access"]


async def test_a_stop_ends_calls_whose_replies_are_not_read():
    async with serving(drain_s=0.1, **PATIENT) as server:
        call = await unread(server)
        await server.gateway.stop()
        assert server.gateway.calls.active == 0
        call.cancel()


def test_clients_may_ask_every_five_seconds_whether_the_server_lives():
    """Both with and without a call; C-core takes pings that come sooner than this for an attack."""
    options = dict(KEEPALIVE)
    assert options["grpc.http2.min_recv_ping_interval_without_data_ms"] <= 5000
    assert options["grpc.keepalive_permit_without_calls"] == 1


def test_the_server_finds_peers_that_have_vanished():
    options = dict(KEEPALIVE)
    assert options["grpc.keepalive_time_ms"] + options["grpc.keepalive_timeout_ms"] <= 120_000

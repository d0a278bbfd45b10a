"""Health, start, stop and metrics of the gateway, with the fake upstream."""

from __future__ import annotations

import asyncio
import gc
import warnings

import grpc
import pytest
from gateway_harness import GRAD, GROUP, SCORE, Harness, ask, failure, photo, serving, until
from grpc_health.v1 import health_pb2, health_pb2_grpc

from camserve.errors import Unavailable
from camserve.gateway.pool.fake import FakeBackend, Faults
from camserve.gateway.server import SERVICE
from camserve.v1 import explain_pb2 as pb

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def health(server: Harness, service: str = SERVICE) -> int:
    stub = health_pb2_grpc.HealthStub(server.channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status


async def becomes(server: Harness, status: int) -> None:
    """Waits on the health service's own stream, as a load balancer does."""
    stub = health_pb2_grpc.HealthStub(server.channel)
    call = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
    async for update in call:
        if update.status == status:
            break
    call.cancel()


async def test_without_torchserve_health_says_so_and_calls_are_unavailable_until_it_comes():
    upstream = FakeBackend()
    upstream.up = False
    async with serving(upstream, ready=False) as server:
        assert await health(server) == NOT_SERVING
        assert await health(server, "") == SERVING
        code, text, kind = await failure(server.stub.Explain(ask()))
        assert (code, kind) == ("UNAVAILABLE", "Unavailable")
        assert "TorchServe does not answer yet" in text
        assert (await failure(server.stub.GetModel(pb.GetModelRequest())))[0] == "UNAVAILABLE"
        assert not (await server.stub.ListModels(pb.ListModelsRequest())).models
        with pytest.raises(Unavailable, match="no model became ready within 0 s"):
            await server.gateway.wait_ready(0)
        upstream.up = True
        await becomes(server, SERVING)
        assert upstream.canaries == 1
        assert len((await server.stub.Explain(ask())).maps) == 1


async def test_a_model_without_a_ready_worker_is_unavailable():
    upstream = FakeBackend()
    upstream.workers = 0
    async with serving(upstream, ready=False) as server:
        await until(lambda: len(server.gateway.registry.models) == 1)
        code, text, _ = await failure(server.stub.Explain(ask()))
        assert (code, text) == ("UNAVAILABLE", "model fake is starting; try again in some seconds")


async def test_health_follows_the_workers_and_each_return_is_greeted_by_a_canary():
    async with serving() as server:
        assert await health(server) == SERVING
        for canaries in (2, 3):
            server.upstream.workers = 0
            await becomes(server, NOT_SERVING)
            with pytest.raises(Unavailable):
                await server.gateway.wait_ready(0)
            code, text, _ = await failure(server.stub.Explain(ask()))
            assert (code, text) == ("UNAVAILABLE", "no worker of model fake is ready; try again in some seconds")
            assert 'camserve_workers_ready{model="fake"} 0.0' in await server.metrics()
            server.upstream.workers = 2
            await becomes(server, SERVING)
            assert server.upstream.canaries == canaries
        assert 'camserve_workers_ready{model="fake"} 2.0' in await server.metrics()


async def test_a_worker_that_does_not_answer_the_canary_is_not_ready():
    upstream = FakeBackend(faults=Faults(canary_fails=True))
    async with serving(upstream, ready=False) as server:
        await until(lambda: upstream.canaries >= 2)
        assert await health(server) == NOT_SERVING
        upstream.faults = Faults()
        await becomes(server, SERVING)


async def test_running_requests_outlive_a_restart_of_the_worker():
    async with serving(FakeBackend(faults=Faults(lost_steps=frozenset({1}))), step_queries=8) as server:
        server.upstream.hold()
        call = server.stub.Explain(ask(SCORE))
        await server.upstream.received(1)
        server.upstream.workers = 0
        await becomes(server, NOT_SERVING)
        server.upstream.release()
        await until(lambda: server.gateway.registry.get("fake").dispatcher.planner.counts().in_flight == 0)
        server.upstream.workers = 1
        assert (await call).cost.queries == 96


async def test_a_step_that_a_dead_worker_swallowed_is_sent_again_when_a_worker_is_back():
    """Long before the step's timeout, which the upstream keeps silent until."""
    hanging = FakeBackend(faults=Faults(hanging_steps=frozenset({1})))
    async with serving(hanging, step_queries=8, step_timeout_s=600) as server:
        call = server.stub.Explain(ask(SCORE))
        await server.upstream.received(2)
        server.upstream.workers = 0
        await becomes(server, NOT_SERVING)
        server.upstream.workers = 1
        assert (await call).cost.queries == 96


async def test_after_a_loss_nothing_is_sent_before_somebody_has_looked_at_the_workers():
    async with serving(FakeBackend(faults=Faults(lost_steps=frozenset({0}))), poll_s=600) as server:
        server.upstream.hold()
        call = server.stub.Explain(ask(SCORE))
        await server.upstream.received(1)
        server.upstream.workers = 0
        server.upstream.release()
        await becomes(server, NOT_SERVING)
        assert len(server.upstream.steps) == 1
        call.cancel()


async def test_running_requests_are_given_up_when_no_worker_comes_back():
    async with serving(step_queries=8, worker_wait_s=0.05) as server:
        server.upstream.hold()
        call = server.stub.Explain(ask(SCORE))
        await server.upstream.received(1)
        server.upstream.workers = 0
        code, text, _ = await failure(call)
        assert code == "UNAVAILABLE"
        assert "no worker of model fake came back within" in text
        server.upstream.release()


async def test_a_stop_lets_running_requests_finish_and_refuses_new_ones():
    async with serving(step_queries=8) as server:
        server.upstream.hold()
        running = server.stub.Explain(ask(SCORE))
        await server.upstream.received(1)
        watch = health_pb2_grpc.HealthStub(server.channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        updates = aiter(watch)
        assert (await anext(updates)).status == SERVING
        stopping = asyncio.create_task(server.gateway.stop())
        assert (await anext(updates)).status == NOT_SERVING
        server.upstream.release()
        assert (await running).cost.queries == 96
        await stopping
        assert server.upstream.closed
        assert (await failure(server.stub.Explain(ask())))[0] == "UNAVAILABLE"


async def test_a_stop_leaves_no_task_and_no_warning_behind():
    before = asyncio.all_tasks()
    asyncio.get_running_loop().set_debug(True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        async with serving(FakeBackend(faults=Faults(lost_steps=frozenset({1}))), step_queries=8) as server:
            await server.stub.Explain(ask(SCORE, GROUP, GRAD))
            server.upstream.hold()
            left = server.stub.StreamExplain(ask(SCORE))
            await server.upstream.received(len(server.upstream.steps) + 1)
            await server.gateway.stop(0.0)
            left.cancel()
        gc.collect()
        await until(lambda: not [task for task in asyncio.all_tasks() - before if "camserve" in task.get_name()])
    names = [task.get_name() for task in asyncio.all_tasks() - before if _ours(task)]
    assert names == []
    assert [str(warning.message) for warning in caught if "never awaited" in str(warning.message)] == []


def _ours(task: asyncio.Task[object]) -> bool:
    return "camserve/gateway" in str(task.get_coro())


async def test_metrics_have_their_names_and_few_labels():
    async with serving() as server:
        await server.stub.Explain(ask(GRAD))
        await server.stub.Explain(ask(GRAD, SCORE))
        await failure(server.stub.Explain(ask(model="made up")))
        await failure(server.stub.Explain(ask(pb.MethodSpec(), image=photo())))
        text = await server.metrics()
    lines, steps = text.splitlines(), f"{len(server.upstream.steps)}.0"
    for line in (
        'camserve_request_seconds_count{class="normal",code="OK",method="grad_cam",model="fake"} 1.0',
        'camserve_request_seconds_count{class="normal",code="OK",method="several",model="fake"} 1.0',
        'camserve_request_seconds_count{class="normal",code="NOT_FOUND",method="grad_cam",model="unknown"} 1.0',
        'camserve_request_seconds_count{class="unknown",code="INVALID_ARGUMENT",method="unknown",model="fake"} 1.0',
        'camserve_masked_queries_total{method="score_cam",model="fake"} 96.0',
        'camserve_step_queries_sum{model="fake"} 96.0',
        f'camserve_step_items_count{{model="fake"}} {steps}',
        f'camserve_step_seconds_count{{model="fake"}} {steps}',
        'camserve_requests_in_flight{class="normal"} 0.0',
        'camserve_waiting_queries{model="fake"} 0.0',
        'camserve_workers_ready{model="fake"} 1.0',
        'camserve_build_info{version="0.1.0"} 1.0',
        *(
            f'camserve_stage_seconds_count{{method="grad_cam",model="fake",stage="{stage}"}} 1.0'
            for stage in ("queue", "decode", "forward", "queries", "merge", "render")
        ),
    ):
        assert line in lines
    buckets = [line for line in lines if line.startswith("camserve_request_seconds_bucket") and "several" in line]
    assert 'le="0.005"' in buckets[0]
    assert 'le="180.0"' in buckets[-2]
    assert "made up" not in text


async def test_two_gateways_in_one_process_count_apart():
    async with serving() as one, serving() as two:
        await one.stub.Explain(ask())
        assert "camserve_request_seconds_count" in await one.metrics()
        assert "camserve_request_seconds_count" not in await two.metrics()


async def test_health_of_an_unknown_service_is_not_found():
    async with serving() as server:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health(server, "no.such.Service")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND

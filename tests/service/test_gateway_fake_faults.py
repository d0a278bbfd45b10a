"""What the gateway does when a worker, a client or a neighbour fails, and how requests share the workers."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import grpc
import numpy as np
import pytest
from gateway_harness import (
    GRAD,
    GROUP,
    PATIENT,
    SCORE,
    TO_THE_MARGIN,
    Harness,
    arrays,
    ask,
    failure,
    jump,
    photo,
    same,
    serving,
    until,
)

from camserve.codecs import v1
from camserve.errors import INTERNAL_MESSAGE, DeadlineExceeded, Internal, InvalidImage
from camserve.gateway.api.access import ANYONE
from camserve.gateway.pool.fake import MODEL, FakeBackend, Faults
from camserve.gateway.requests.explainer import Call
from camserve.images import digest
from camserve.methods import ScoreCam
from camserve.planning import Load, Planner
from camserve.v1 import explain_pb2 as pb

LONG = {"step_queries": 8}
"""A Score-CAM of 96 queries takes 12 steps."""


def planner(server: Harness) -> Planner:
    return server.gateway.registry.get("fake").dispatcher.planner


def call(timeout_s: float) -> Call:
    return Call(lambda maps, finish: b"", ANYONE, timeout_s)


def begin(server: Harness, request: pb.ExplainRequest, **options: float) -> grpc.aio.UnaryUnaryCall:
    return server.stub.Explain(request, **options)


async def test_a_grad_cam_enters_the_next_step_of_a_running_score_cam():
    long, quick = photo(1), photo(2)
    async with serving(**LONG, steps_per_worker=1) as server:
        server.upstream.hold()
        slow = begin(server, ask(SCORE, image=long))
        await server.upstream.received(1)
        fast = begin(server, ask(GRAD, image=quick))
        await until(lambda: len(planner(server)) == 2)
        server.upstream.release()
        assert len((await fast).maps) == 1
        assert len((await slow).maps) == 1
        second = server.upstream.steps[1]
    assert [item.digest for item in second] == [digest(long), digest(quick)]


async def test_requests_share_a_step_and_do_not_change_each_other():
    requests = [ask(SCORE, GROUP, GRAD, image=photo(seed), targets=[pb.Target(top_k=2)]) for seed in range(3)]
    async with serving() as server:
        alone = [await server.stub.Explain(request) for request in requests]
    async with serving(step_queries=10, step_items=4, steps_per_worker=1) as server:
        server.upstream.hold()
        first = begin(server, ask())
        await server.upstream.received(1)
        together = [begin(server, request) for request in requests]
        await until(lambda: len(planner(server)) == 4)
        server.upstream.release()
        await first
        replies = [await call for call in together]
        assert max(len(step) for step in server.upstream.steps) == 3
    assert all(same(reply, lone) for reply, lone in zip(replies, alone, strict=True))


@pytest.mark.parametrize("kind", ["lost_steps", "malformed_steps", "hanging_steps"])
async def test_a_step_without_an_answer_is_sent_again_and_the_map_is_the_same(kind: str):
    request, silent = ask(SCORE, GROUP, GRAD, targets=[pb.Target(top_k=2)]), (0, 3, 5, 9)
    settings = {**LONG, "steps_per_worker": 1, "step_timeout_s": 100, "default_deadline_s": 10_000}
    async with serving(**settings) as server:
        whole = await server.stub.Explain(request)
        steps = len(server.upstream.steps)
    async with serving(FakeBackend(faults=Faults(**{kind: frozenset(silent)})), **settings) as server:
        call = begin(server, request)
        for number in silent if kind == "hanging_steps" else ():
            await server.upstream.received(number + 1)
            jump(100)
        reply = await call
        assert len(server.upstream.steps) == steps + 4
        assert 'camserve_step_retries_total{model="fake"} 4.0' in await server.metrics()
    assert same(reply, whole)
    assert reply.cost.queries == 2 * 32 + 96


async def test_a_step_that_is_answered_with_nonsense_three_times_is_unavailable_and_the_next_request_works():
    async with serving(FakeBackend(faults=Faults(malformed_steps=frozenset({0, 1, 2})))) as server:
        code, text, kind = await failure(server.stub.Explain(ask()))
        assert (code, kind) == ("UNAVAILABLE", "Unavailable")
        assert text == "a worker's reply could not be read; given up after several attempts"
        assert len(server.upstream.steps) == 3
        assert len((await server.stub.Explain(ask())).maps) == 1
        assert planner(server).idle


async def test_one_bad_item_of_eight_harms_nobody_else():
    images = [photo(seed, kind="JPEG") for seed in range(8)]
    images[3] = images[3][: len(images[3]) // 2]
    async with serving(steps_per_worker=1) as server:
        server.upstream.hold()
        first = begin(server, ask())
        await server.upstream.received(1)
        calls = [begin(server, ask(GRAD, image=image)) for image in images]
        await until(lambda: len(planner(server)) == 9)
        server.upstream.release()
        await first
        code, text, kind = await failure(calls.pop(3))
        assert (code, kind) == ("INVALID_ARGUMENT", InvalidImage.__name__)
        assert "truncated" in text
        assert all([len((await call).maps) == 1 for call in calls])
        assert [len(step) for step in server.upstream.steps] == [1, 8]


@pytest.mark.parametrize("error", [Internal("a secret path"), "crash"])
async def test_an_unknown_fault_is_a_fixed_sentence_and_the_log_has_the_rest(
    error: Internal | str, caplog: pytest.LogCaptureFixture
):
    image = photo(5)
    faults = Faults(crash=True) if error == "crash" else Faults(item_errors={image: error})
    async with serving(FakeBackend(faults=faults)) as server:
        assert await failure(server.stub.Explain(ask(image=image))) == ("INTERNAL", INTERNAL_MESSAGE, "Internal")
        server.upstream.faults = Faults()
        if error == "crash":  # it has lost three steps in a row, and controls beside
            await until(lambda: not server.gateway.registry.get("fake").ready)
            jump(10)
            await server.gateway.wait_ready(30)
        assert len((await server.stub.Explain(ask(image=image))).maps) == 1
    if error == "crash":
        assert any("a secret of the fake" in (record.exc_text or "") for record in caplog.records)


async def test_a_client_that_goes_away_stops_its_steps_and_nobody_elses():
    gone, stays = photo(1), photo(2)
    async with serving(**LONG, steps_per_worker=2) as server:
        server.upstream.hold()
        leaving, staying = begin(server, ask(SCORE, image=gone)), begin(server, ask(SCORE, image=stays))
        await server.upstream.received(2)
        leaving.cancel()
        await until(lambda: len(planner(server)) == 1)
        server.upstream.release()
        reply = await staying
        sent = [item.image for step in server.upstream.steps for item in step]
        await until(lambda: planner(server).idle)
        await server.gateway.calls.idle()
        assert 'method="score_cam",model="fake"' in await server.metrics()
        assert 'code="CANCELLED",method="score_cam",model="fake"} 1.0' in await server.metrics()
    assert sent.count(gone) == 1
    assert reply.cost.queries == 96
    expected = FakeBackend.whole(stays, ScoreCam(), MODEL, "", [reply.maps[0].target.index])
    assert reply.maps[0].maximum <= expected.max()


async def test_at_the_deadline_the_call_ends_and_no_further_step_is_sent():
    async with serving(**LONG, default_deadline_s=600) as server:
        server.upstream.hold()
        call = begin(server, ask(SCORE))
        await server.upstream.received(1)
        jump(600)
        assert (await failure(call))[0] == "DEADLINE_EXCEEDED"
        await until(lambda: len(planner(server)) == 0)
        server.upstream.release()
        await until(lambda: planner(server).idle)
        await server.gateway.calls.idle()
        assert len(server.upstream.steps) == 1
        assert 'code="DEADLINE_EXCEEDED",method="score_cam",model="fake"} 1.0' in await server.metrics()


async def test_a_request_without_a_deadline_has_the_default_one():
    async with serving(default_deadline_s=0.05) as server:
        server.upstream.hold()
        code, text, kind = await failure(server.stub.Explain(ask()))
        assert (code, kind) == ("DEADLINE_EXCEEDED", "DeadlineExceeded")
        assert text == "the deadline of 0.05 s passed before the answer was complete"


@pytest.mark.parametrize("timeout_s", [0.0, -1.0])
async def test_a_deadline_that_has_passed_sends_no_step(timeout_s: float):
    async with serving() as server:
        with pytest.raises(DeadlineExceeded):
            await server.gateway.explainer.explain(
                v1.request_from_bytes(ask(SCORE).SerializeToString()), call(timeout_s)
            )
        assert server.upstream.steps == []
        assert planner(server).idle


async def test_overload_is_told_with_a_hint_when_to_come_back():
    async with serving(max_requests=1) as server:
        server.upstream.hold()
        first = begin(server, ask())
        await server.upstream.received(1)
        with pytest.raises(grpc.aio.AioRpcError, match="at most 1 requests") as caught:
            await server.stub.Explain(ask())
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert caught.value.trailing_metadata().get("grpc-retry-pushback-ms") == "1000"
        server.upstream.release()
        await first


async def test_progress_is_streamed_with_the_predictions_from_the_first_update_on():
    async with serving(**LONG, steps_per_worker=1) as server:
        server.upstream.hold()
        call = server.stub.StreamExplain(ask(SCORE, GRAD))
        updates = []
        server.upstream.release(1)
        async for update in call:
            updates.append(update)
            server.upstream.release(1)
        server.upstream.release()
        whole = await server.stub.Explain(ask(SCORE, GRAD))
    *progress, last = updates
    assert last.WhichOneof("update") == "reply"
    assert same(last.reply, whole)
    done = [update.progress.done for update in progress]
    assert done == list(range(8, 96, 8)), "one update after each step but the last"
    assert all(update.progress.total == 96 and len(update.progress.predictions) == 5 for update in progress)
    assert progress[0].progress.predictions[0] == whole.predictions[0]


async def test_a_stream_ends_with_the_same_errors():
    async with serving() as server:
        assert (await failure(anext(aiter(server.stub.StreamExplain(ask(model="no"))))))[0] == "NOT_FOUND"


async def test_leaving_a_stream_stops_its_steps():
    async with serving(**LONG, steps_per_worker=1) as server:
        server.upstream.hold()
        call = server.stub.StreamExplain(ask(SCORE))
        await server.upstream.received(1)
        server.upstream.release(1)
        async for update in call:
            assert update.progress.done == 8
            break
        call.cancel()
        await until(lambda: len(planner(server)) == 0)
        server.upstream.release()
        await until(lambda: planner(server).idle)
        assert len(server.upstream.steps) == 2


async def test_a_mixed_crowd_is_answered_and_leaves_nothing_behind():
    """Faults, cancellations and deadlines at once; afterwards every count is back at rest."""
    faults = Faults(lost_steps=frozenset(range(5, 200, 17)), malformed_steps=frozenset(range(11, 200, 23)))
    requests = [
        ask(*methods, image=photo(seed)) for seed, methods in enumerate([(GRAD,), (SCORE,), (GROUP, SCORE)] * 6)
    ]
    async with serving() as server:
        expected = [await server.stub.Explain(request) for request in requests]
    async with serving(FakeBackend(faults=faults), step_queries=16, step_items=4) as server:
        calls = [begin(server, request) for request in requests]
        await server.upstream.received(3)
        cancelled = calls[4::5]
        for call in cancelled:
            call.cancel()
        answers = await asyncio.gather(*calls, return_exceptions=True)
        await until(lambda: planner(server).idle)
        counts = planner(server).counts()
        text = await server.metrics()
    right = [same(got, want) for got, want in zip(answers, expected, strict=True) if isinstance(got, pb.ExplainReply)]
    assert all(right)
    assert len(right) >= len(requests) - len(cancelled)
    assert counts.asked == counts.done + counts.cancelled
    assert 'camserve_requests_in_flight{class="normal"} 0.0' in text
    assert 'camserve_waiting_queries{model="fake"} 0.0' in text


async def test_merging_does_not_depend_on_the_order_of_steps():
    request = ask(SCORE, targets=[pb.Target(index=2)])
    upstream = FakeBackend()
    upstream.workers = 4
    async with serving() as server:
        whole = arrays(await server.stub.Explain(request))
    async with serving(upstream, step_queries=3) as server:
        parts = arrays(await server.stub.Explain(request))
    np.testing.assert_array_equal(parts[0], whole[0])


@pytest.fixture(autouse=True)
def _logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="camserve")


async def test_a_step_that_is_lost_before_it_was_sent_is_sent_again():
    async with serving() as server:
        model = server.gateway.registry.get("")
        fitted = v1.request_from_bytes(ask(SCORE).SerializeToString()).fit(model.required())
        async with asyncio.timeout(10), model.dispatcher.running(fitted, math.inf) as run:
            model.dispatcher.abandon("fake")  # in the same turn of the event loop: nothing has been sent
            *_, known = [known async for known in run]
    assert known.fraction([0]) == 1
    assert run.results.queries() == {"score_cam": 96}


# The order of the queries


async def test_every_query_is_asked_once_in_the_order_that_the_opening_said():
    async with serving(step_queries=7) as server:
        await server.stub.Explain(ask(SCORE, targets=[pb.Target(top_k=2)]))
        (opening,), *rest = server.upstream.steps
    assert opening.tasks[0].ordered
    later = [number for (item,) in rest for task in item.tasks for number in task.numbers]
    assert len(later) == len(set(later)) == 96 - opening.tasks[0].stop
    assert later != sorted(later)
    assert not any(task.ordered for (item,) in rest for task in item.tasks)


async def test_an_opening_that_was_lost_leaves_no_order_behind():
    image = photo(5)
    async with serving() as server:
        expected = await server.stub.Explain(ask(SCORE, image=image))
    upstream = FakeBackend(faults=Faults(lost_steps=frozenset({0, 2}), malformed_steps=frozenset({4})))
    async with serving(upstream, step_queries=7) as server:
        assert same(await server.stub.Explain(ask(SCORE, image=image)), expected)


# Deadlines that cannot be kept, and what is chosen for those that can


async def taught(server: Harness, seconds: float) -> None:
    """Teaches the planner how long a masked query takes: minutes, beside which the test's own time is nothing."""
    for queries in [1, 2, 3, 0] * 25:
        load = Load({"masked_forward": queries, "opening": 1, "layer_gradient": 1}, 1)
        now_s = asyncio.get_running_loop().time()
        planner(server).observe("fake", "worker", load, queries * seconds, now_s)


@asynccontextmanager
async def busy(server: Harness) -> AsyncIterator[None]:
    """Inside, a Score-CAM of somebody else is in flight: an idle server would take any request."""
    server.upstream.hold()
    other = begin(server, ask(SCORE, image=photo(99)))
    await server.upstream.received(1)
    yield
    other.cancel()
    server.upstream.release()


async def test_what_cannot_be_in_time_is_refused_at_once():
    async with serving() as server:
        await taught(server, 5)
        async with busy(server):
            with pytest.raises(grpc.aio.AioRpcError, match="the deadline is in") as caught:
                await server.stub.Explain(ask(SCORE), timeout=200)
            assert len(server.upstream.steps) == 1
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert 400_000 < int(caught.value.trailing_metadata().get("grpc-retry-pushback-ms")) < 1_200_000
        assert (await server.stub.Explain(ask(GRAD), timeout=200)).maps[0].complete
        partial = await server.stub.Explain(ask(SCORE, allow_partial=True), timeout=200)
        assert partial.maps[0].fraction > 0


async def test_for_the_servers_own_deadline_nobody_is_refused():
    async with serving(default_deadline_s=500) as server:
        await taught(server, 100)
        assert (await server.stub.Explain(ask(SCORE))).maps[0].complete  # the fake is much faster than it was taught


AUTO = pb.MethodSpec(auto={})


@pytest.mark.parametrize(
    ("timeout_s", "method", "groups"),
    [
        (150, "grad_cam", 0),
        (420, "group_cam", 8),
        (1560, "group_cam", 32),
        (30_000, "score_cam", 0),
        (None, "group_cam", 8),
    ],
)
async def test_auto_is_the_most_faithful_method_that_will_be_in_time(timeout_s, method, groups):
    async with serving(auto_budget_s=600) as server:
        await taught(server, 36)
        reply = await server.stub.Explain(ask(AUTO, GRAD), timeout=timeout_s)
    chosen, plain = reply.maps
    assert chosen.method.WhichOneof("method") == method
    assert chosen.method.group_cam.groups == groups
    assert " takes " in chosen.choice
    assert (plain.method.WhichOneof("method"), plain.choice) == ("grad_cam", "")


async def test_auto_is_cheap_while_nothing_is_known():
    async with serving() as server:
        first = (await server.stub.Explain(ask(AUTO, layers=["stem"]))).maps[0]
    assert first.method.WhichOneof("method") == "grad_cam"
    assert first.choice == "no step was measured yet; Grad-CAM is the cheapest"


async def test_auto_goes_by_the_models_own_evaluation():
    groups = {"Group-CAM (groups=8)": 0.1, "Group-CAM (groups=16)": 0.6, "Group-CAM": 0.2, "Group-CAM (groups=64)": 0.3}
    scores = {"Grad-CAM": 0.5, "Score-CAM": 0.4, **groups}
    found = []
    for timeout_s in (30_000, 450):
        async with serving(FakeBackend([replace(MODEL, evaluation=scores)])) as server:
            await taught(server, 36)
            found.append((await server.stub.Explain(ask(AUTO), timeout=timeout_s)).maps[0].method)
            assert dict((await server.stub.GetModel(pb.GetModelRequest())).evaluation) == scores
    assert [method.WhichOneof("method") for method in found] == ["group_cam", "grad_cam"]
    assert found[0].group_cam.groups == 16


async def test_an_evaluation_that_lacks_a_method_of_the_ladder_changes_nothing():
    async with serving(FakeBackend([replace(MODEL, evaluation={"Grad-CAM": 1.0})])) as server:
        await taught(server, 0.12)
        reply = await server.stub.Explain(ask(AUTO), timeout=100)
    assert reply.maps[0].method.WhichOneof("method") == "score_cam"


async def test_auto_leaves_out_what_does_not_fit_the_layer():
    async with serving(auto_ladder="group_cam:groups=64 group_cam:groups=97") as server:
        reply = await server.stub.Explain(ask(AUTO))
        code, text, _ = await failure(server.stub.Explain(ask(AUTO, layers=["stem"])))
    assert reply.maps[0].method.group_cam.groups == 64
    assert code == "INVALID_ARGUMENT"
    assert text.startswith(
        "auto: no method of the server's ladder fits the model and its layers; name one of cam, grad"
    )


async def test_the_most_urgent_class_goes_first():
    async with serving(step_queries=8, steps_per_worker=1) as server:
        server.upstream.hold()
        first = begin(server, ask(SCORE, image=photo(0)))
        await server.upstream.received(1)
        images = {"BATCH": photo(1), "NORMAL": photo(2), "INTERACTIVE": photo(3)}
        calls = [begin(server, ask(SCORE, image=image, priority=name)) for name, image in images.items()]
        await until(lambda: len(planner(server)) == 4)
        server.upstream.release()
        await asyncio.gather(first, *calls)
        last = {
            name: max(
                number
                for number, step in enumerate(server.upstream.steps)
                for item in step
                if item.digest == digest(image)
            )
            for name, image in images.items()
        }
    assert last["INTERACTIVE"] < last["NORMAL"] < last["BATCH"]


# Replies that are kept


CACHED = {"result_cache_bytes": 10 * 2**20}


async def test_the_same_question_is_answered_from_the_cache():
    async with serving(**CACHED) as server:
        first, again = [await server.stub.Explain(ask(GROUP)) for _ in range(2)]
        asked = server.asked()
        others = ask(SCORE), ask(GROUP, image=photo(9)), ask(GRAD, layers=["stem"]), ask(GROUP, top_predictions=2)
        cached = [(await server.stub.Explain(other)).cost.cached for other in others]
        metrics = await server.metrics()
    assert same(first, again)
    assert (first.cost.cached, again.cost.cached) == (False, True)
    assert asked == 32
    assert not any(cached)
    assert 'camserve_result_cache_total{model="fake",outcome="hit"} 1.0' in metrics


async def test_what_is_partial_or_failed_is_not_kept():
    upstream = FakeBackend(faults=Faults(hanging_steps=frozenset({2, 3})))
    async with serving(upstream, step_queries=16, steps_per_worker=1, **PATIENT, **CACHED) as server:
        call = begin(server, ask(SCORE, allow_partial=True))
        await upstream.received(3)
        jump(TO_THE_MARGIN)
        partial = await call
        upstream.faults = Faults()
        jump(10_000)  # the step that hangs is given up
        whole = await server.stub.Explain(ask(SCORE, allow_partial=True))
    assert not partial.maps[0].complete
    assert whole.maps[0].complete
    assert not whole.cost.cached


async def test_the_cache_is_bounded():
    async with serving(result_cache_bytes=20_000) as server:  # for two: a map has 32 x 48 x 4 bytes, and twice 1024
        for seed in (0, 1, 2, 0):
            reply = await server.stub.Explain(ask(GRAD, image=photo(seed)))
        assert not reply.cost.cached
        assert (await server.stub.Explain(ask(GRAD, image=photo(2)))).cost.cached

"""What a running gateway tells of itself: every metric moves, every call has an id and a line in the log."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import time
import urllib.request

import grpc
import pytest
from gateway_harness import (
    GRAD,
    PATIENT,
    SCORE,
    SCRAPED,
    TO_THE_MARGIN,
    Harness,
    ask,
    failure,
    jump,
    photo,
    serving,
    until,
)

from camserve import logs
from camserve.cli.scrape import Scrape, Window, parse
from camserve.client import AsyncClient, Client
from camserve.errors import InvalidImage, InvalidOption, NotFound
from camserve.gateway.api.request_ids import KEY
from camserve.gateway.pool.fake import FakeBackend, Faults
from camserve.gateway.pool.fake_answers import DEVICE_MEMORY
from camserve.v1 import explain_pb2 as pb

AUTO = pb.MethodSpec(auto={})


async def look(server: Harness) -> Window:
    return Window(await scraped(server))


async def scraped(server: Harness) -> Scrape:
    return parse(await server.metrics(), time.time())


async def test_an_answered_request_is_counted_wherever_it_was():
    async with serving() as server:
        await server.stub.Explain(ask(SCORE, priority=pb.INTERACTIVE))
        window = await look(server)
    labels = {"model": "fake", "method": "score_cam"}
    assert window.value("camserve_request_seconds_count", **labels, **{"class": "interactive", "code": "OK"}) == 1
    assert window.value("camserve_queue_seconds_count", model="fake", **{"class": "interactive"}) == 1
    assert window.value("camserve_stage_seconds_count", **labels, stage="render") == 1
    assert window.value("camserve_masked_queries_total", **labels) == 96
    steps = len(server.upstream.steps)
    for name in ("queries", "items", "seconds"):
        assert window.value(f"camserve_step_{name}_count", model="fake") == steps
    assert window.value("camserve_step_queries_sum", model="fake") == 96
    assert window.value("camserve_step_fill_ratio_count", model="fake") == steps
    assert 0 < window.value("camserve_step_fill_ratio_sum", model="fake") <= steps
    assert window.value("camserve_planning_seconds_total", model="fake") > 0
    assert window.value("camserve_workers_ready", model="fake") == window.value("camserve_workers", model="fake") == 1
    assert window.value("camserve_build_info") == 1
    assert window.value("process_resident_memory_bytes") > 0


async def test_a_running_request_is_seen_with_its_age_and_what_waits():
    async with serving(step_queries=8) as server:
        assert (await look(server)).value("camserve_oldest_request_seconds", model="fake") == 0
        server.upstream.hold()
        call = server.stub.Explain(ask(SCORE, priority=pb.BATCH))
        await server.upstream.received(1)
        first = await look(server)
        second = await look(server)
        server.upstream.release()
        await call
        last = await look(server)
    batch = {"class": "batch"}
    assert first.value("camserve_requests_in_flight", **batch) == 1
    assert first.value("camserve_requests_in_flight", **{"class": "normal"}) == 0
    assert first.value("camserve_waiting_queries", model="fake") == 96 - 8
    assert first.value("camserve_steps_in_flight", model="fake") == 1
    ages = [window.value("camserve_oldest_request_seconds", model="fake") for window in (first, second)]
    assert 0 < ages[0] < ages[1]
    for name in ("oldest_request_seconds", "waiting_queries", "steps_in_flight"):
        assert last.value(f"camserve_{name}", model="fake") == 0
    assert last.value("camserve_requests_in_flight") == 0


@pytest.mark.parametrize("known", [False, True], ids=["at the start", "after a step of each kind"])
@pytest.mark.parametrize("method", [{"grad_cam": {}}, {"smooth_grad": {}}, {"layer_cam": {}}, {"score_cam": {}}])
async def test_work_of_every_kind_that_waits_is_seen_by_autoscalers(method: dict, known: bool):
    """Sixty clients wait for one worker: openings, gradients and masked queries alike; afterwards nothing waits."""
    async with serving(max_requests=200) as server:
        if known:
            await server.stub.Explain(ask(pb.MethodSpec(**method)))
        server.upstream.hold()
        sent = len(server.upstream.steps)
        calls = [server.stub.Explain(ask(pb.MethodSpec(**method), image=photo(seed))) for seed in range(60)]
        planner = server.gateway.registry.get("fake").dispatcher.planner
        await until(lambda: len(planner) == 60)
        held = await look(server)
        in_flight = sum(len(step) for step in server.upstream.steps[sent:])
        assert in_flight <= 8  # what the worker has been given is not waiting
        least_s = planner.seconds_of({"opening": 60 - in_flight})
        assert held.value("camserve_waiting_work_seconds", model="fake") >= least_s > 0
        server.upstream.release()
        await asyncio.gather(*calls)
        assert (await look(server)).value("camserve_waiting_work_seconds", model="fake") == 0


async def test_labels_that_a_client_made_up_are_unknown():
    async with serving() as server:
        await failure(server.stub.Explain(ask(pb.MethodSpec(), model="evil", priority=77)))
        text = await server.metrics()
    labels = 'class="unknown",code="INVALID_ARGUMENT",method="unknown",model="unknown"'
    assert f"camserve_request_seconds_count{{{labels}}} 1.0" in text
    assert "evil" not in text


async def test_queries_of_a_cancelled_request_are_wasted():
    """Those that were answered before it went, and those of the step that was on its way."""
    async with serving(step_queries=8) as server:
        server.upstream.hold()
        call = server.stub.Explain(ask(SCORE))
        await server.upstream.received(1)
        server.upstream.release(1)
        await server.upstream.received(2)
        call.cancel()
        await server.gateway.calls.idle()
        half = (await look(server)).value("camserve_masked_queries_wasted_total", model="fake")
        server.upstream.release()
        await until(lambda: server.gateway.registry.get("fake").dispatcher.planner.idle)
        window = await look(server)
    assert half == 8
    assert window.value("camserve_masked_queries_wasted_total", model="fake") == 16 == server.asked()
    assert window.increase("camserve_masked_queries_total") == 0


async def test_a_cached_reply_counts_the_queries_that_it_saved():
    async with serving(result_cache_bytes=2**20) as server:
        for _ in range(3):
            await server.stub.Explain(ask(SCORE))
        window = await look(server)
    assert window.value("camserve_masked_queries_cached_total", model="fake") == 2 * 96
    assert window.value("camserve_masked_queries_total", model="fake") == 96
    assert window.value("camserve_result_cache_total", model="fake", outcome="hit") == 2
    assert window.value("camserve_result_cache_total", model="fake", outcome="miss") == 1


async def test_refusals_are_counted_by_their_reason():
    async with serving(step_queries=8, max_requests=1) as server:
        server.upstream.hold()
        call = server.stub.Explain(ask(SCORE))
        await server.upstream.received(1)
        assert (await failure(server.stub.Explain(ask(GRAD))))[0] == "RESOURCE_EXHAUSTED"
        server.upstream.release()
        await call
        window = await look(server)
    assert window.value("camserve_refusals_total", model="fake", reason="requests") == 1
    assert window.value("camserve_refusals_total", model="fake", reason="deadline") == 0
    assert window.value("camserve_request_seconds_count", code="RESOURCE_EXHAUSTED") == 1


async def test_what_auto_chose_is_counted_by_its_name_in_the_ladder():
    async with serving(auto_ladder="group_cam:groups=8") as server:
        await server.stub.Explain(ask(AUTO))
        await server.stub.Explain(ask(GRAD))
        window = await look(server)
    assert window.value("camserve_auto_choices_total", model="fake", choice="group_cam:groups=8") == 1
    assert window.increase("camserve_auto_choices_total") == 1


async def test_a_missed_deadline_and_a_partial_answer_are_told_apart():
    async with serving(step_queries=8, steps_per_worker=1, **PATIENT) as server:
        server.upstream.hold()
        late = server.stub.Explain(ask(SCORE))
        await server.upstream.received(1)
        jump(600)
        assert (await failure(late))[0] == "DEADLINE_EXCEEDED"
        early = server.stub.Explain(ask(SCORE, allow_partial=True))
        server.upstream.release(2)  # the late one's step, and the first of this one
        await server.upstream.received(3)
        jump(TO_THE_MARGIN)
        partial = await early
        server.upstream.release()
        window = await look(server)
    assert not partial.maps[0].complete
    assert window.value("camserve_request_seconds_count", code="DEADLINE_EXCEEDED") == 1
    assert window.value("camserve_partial_answers_total", model="fake") == 1


async def test_a_worker_that_was_replaced_counts_as_restarted():
    async with serving() as server:
        assert (await look(server)).value("camserve_worker_restarts_total", model="fake") == 0
        server.upstream.workers = 0
        await until(lambda: not server.gateway.registry.get("fake").ready)
        away = await look(server)
        server.upstream.workers = 1
        await until(lambda: server.gateway.registry.get("fake").ready)
        back = await look(server)
    assert (away.value("camserve_workers_ready"), away.value("camserve_workers")) == (0, 1)
    assert away.value("camserve_worker_restarts_total", model="fake") == 0
    assert back.value("camserve_worker_restarts_total", model="fake") == 1


async def test_a_torchserve_that_was_started_again_counts_too():
    async with serving() as server:
        server.upstream.up = False
        await until(lambda: not server.gateway.registry.get("fake").ready)
        server.upstream.workers = 0
        server.upstream.workers = 1
        server.upstream.up = True
        await until(lambda: server.gateway.registry.get("fake").ready)
        assert (await look(server)).value("camserve_worker_restarts_total", model="fake") == 1


async def test_lost_steps_are_counted_as_sent_again():
    async with serving(FakeBackend(faults=Faults(lost_steps=frozenset({0})))) as server:
        await server.stub.Explain(ask(SCORE))
        assert (await look(server)).value("camserve_step_retries_total", model="fake") == 1


async def test_what_a_worker_says_of_itself_is_passed_on():
    async with serving() as server:
        await server.stub.Explain(ask(SCORE))
        window = await look(server)
    where = {"model": "fake", "device": DEVICE_MEMORY.device}
    assert window.value("camserve_device_memory_used_bytes", **where) == DEVICE_MEMORY.used_bytes
    assert window.value("camserve_device_memory_limit_bytes", **where) == DEVICE_MEMORY.limit_bytes
    steps = len(server.upstream.steps)
    assert window.value("camserve_worker_cache_total", model="fake", outcome="miss") == steps
    assert window.value("camserve_worker_cache_total", model="fake", outcome="hit") == steps


async def test_with_openmetrics_a_bucket_leads_to_a_request():
    async with serving(**SCRAPED) as server:
        await server.stub.Explain(ask(GRAD), metadata=((KEY, "find-me"),))
        request = urllib.request.Request(
            f"http://{server.gateway.metrics_address}/metrics",
            headers={"Accept": "application/openmetrics-text; version=1.0.0"},
        )
        text = await asyncio.to_thread(_read, request)
    (line,) = [line for line in text.splitlines() if "find-me" in line]
    assert line.startswith("camserve_request_seconds_bucket")
    assert '# {request_id="find-me"}' in line


def _read(request: urllib.request.Request) -> str:
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10) as reply:
        return str(reply.read(), "utf-8")


@pytest.mark.parametrize(
    ("sent", "kept"), [("a-1", True), ("x" * 128, True), ("x" * 129, False), ("two words", False), (None, False)]
)
async def test_a_call_gets_its_id_back_or_a_new_one(sent, kept):
    async with serving() as server:
        call = server.stub.Explain(ask(GRAD), metadata=() if sent is None else ((KEY, sent),))
        got = str((await call.initial_metadata())[KEY])
        await call
        stream = server.stub.StreamExplain(ask(GRAD), metadata=() if sent is None else ((KEY, sent),))
        streamed = str((await stream.initial_metadata())[KEY])
        stream.cancel()
    assert ([got, streamed] == [sent, sent]) == kept
    assert kept or (len(got) == 32 and got != streamed)


async def test_clients_may_choose_the_id_of_a_call_and_get_it_with_the_answer():
    async with serving() as server:
        async with AsyncClient(server.gateway.address) as client:
            named = await client.explain(photo(), request_id="mine-1")
            streamed = [update async for update in client.stream(photo(), request_id="mine-2")][-1]
            unnamed = await client.explain(photo())
        with Client(server.gateway.address) as client:
            blocking = await asyncio.to_thread(client.explain, photo(), request_id="mine-3")
            with pytest.raises(InvalidOption, match="printable ASCII characters without spaces, got 'my id'"):
                client.explain(photo(), request_id="my id")
    assert [named.request_id, streamed.request_id, blocking.request_id] == ["mine-1", "mine-2", "mine-3"]
    assert len(unnamed.request_id) == 32


async def test_a_kept_reply_has_the_id_of_the_call_that_gets_it():
    async with serving(result_cache_bytes=2**24) as server, AsyncClient(server.gateway.address) as client:
        answers = [await client.explain(photo(), request_id=name) for name in ("first", "second")]
    assert [(answer.request_id, answer.cost.cached) for answer in answers] == [("first", False), ("second", True)]


async def test_a_failed_call_has_its_id_for_both_clients():
    async with serving() as server:
        async with AsyncClient(server.gateway.address) as client:
            with pytest.raises(NotFound) as caught:
                await client.explain(photo(), model="none")
            with pytest.raises(InvalidImage) as streamed:
                await client.explain(b"no image", on_progress=lambda *_: None)
        with Client(server.gateway.address) as client, pytest.raises(NotFound) as blocking:
            await asyncio.to_thread(client.model, "none")
    ids = {found.value.request_id for found in (caught, streamed, blocking)}
    assert len(ids) == 3
    assert all(len(one) == 32 for one in ids)


@pytest.fixture
def access_log():
    """The lines of explain calls, as JSON has them."""
    stream = io.StringIO()
    handler, logger = logging.StreamHandler(stream), logging.getLogger("camserve.access")
    handler.setFormatter(logs.formatter("json", terminal=False))
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    logger.removeHandler(handler)
    logger.setLevel(before)


async def test_each_call_has_one_line_in_the_log(access_log):
    async with serving() as server:
        await server.stub.Explain(ask(SCORE, GRAD, priority=pb.BATCH), metadata=((KEY, "good"),))
        await failure(server.stub.Explain(ask(GRAD, image=b"SECRET no image"), metadata=((KEY, "bad"),)))
        server.upstream.hold()
        call = server.stub.Explain(ask(SCORE), metadata=((KEY, "gone"),))
        await server.upstream.received(len(server.upstream.steps) + 1)
        call.cancel()
        await until(lambda: not server.gateway.calls.active)
        server.upstream.release()
    good, bad, gone = lines = access_log()
    assert [line["request_id"] for line in lines] == ["good", "bad", "gone"]
    for line in lines:
        assert (line["level"], line["event"], line["model"]) == ("info", "explain", "fake")
        assert line["seconds"] >= 0
        assert "caller" not in line
        assert "SECRET" not in str(line)
    assert (good["methods"], good["class"], good["code"]) == (["score_cam", "grad_cam"], "batch", "OK")
    assert (good["queries"], good["complete"], good["cached"]) == (96, True, False)
    assert (bad["code"], bad["methods"]) == ("INVALID_ARGUMENT", ["grad_cam"])
    assert "image" in bad["error"]
    assert gone["code"] == "CANCELLED"


async def test_a_step_is_logged_for_all_whose_work_is_in_it(caplog):
    """And not as part of the call that happened to send it."""
    from structlog.contextvars import get_contextvars

    seen = []
    caplog.set_level(logging.ERROR, "camserve.gateway.pool.dispatcher")
    caplog.handler.addFilter(lambda record: seen.append((record.name, get_contextvars())) or True)
    settings = {"steps_per_worker": 1, "quarantine_s": 0.01, "worker_wait_s": 1.0}
    async with serving(FakeBackend(faults=Faults(crash=True)), **settings) as server:
        server.upstream.hold()
        calls = [server.stub.Explain(ask(SCORE, image=photo(i)), metadata=((KEY, f"call-{i}"),)) for i in range(3)]
        await server.upstream.received(1)
        await until(lambda: len(server.gateway.registry.get("fake").dispatcher.planner) == 3)
        server.upstream.release()
        await asyncio.gather(*calls, return_exceptions=True)
    steps = [found for name, found in seen if name == "camserve.gateway.pool.dispatcher"]
    assert [sorted(found) for found in steps] == [["request_ids"]] * len(steps)
    named = [sorted(found["request_ids"]) for found in steps]
    assert max(map(len, named)) == 2, "two of them in one step, and after its loss alone"
    assert {name for names in named for name in names} == {"call-0", "call-1", "call-2"}


async def test_who_is_refused_at_the_door_has_an_id_as_well():
    async with serving() as server:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await server.stub.GetModel(pb.GetModelRequest(name="none"), metadata=((KEY, "door-1"),))
    assert caught.value.trailing_metadata()[KEY] == "door-1"

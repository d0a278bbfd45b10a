"""The reply cache, and requests that follow a run that another has begun."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest
from gateway_harness import GRAD, GROUP, PATIENT, SCORE, Harness, ask, failure, jump, photo, same, serving, until

from camserve.errors import Unavailable
from camserve.gateway.api.access import new_token
from camserve.planning import Planner
from camserve.v1 import explain_pb2 as pb

CACHED = {"result_cache_bytes": 10 * 2**20}
AUTO = pb.MethodSpec(auto={})


def planner(server: Harness) -> Planner:
    return server.gateway.registry.get("fake").dispatcher.planner


async def outcome(server: Harness, name: str) -> float:
    line = f'camserve_result_cache_total{{model="fake",outcome="{name}"}} '
    return next(float(text.removeprefix(line)) for text in (await server.metrics()).splitlines() if line in text)


async def test_who_asks_the_same_at_the_same_time_follows_the_first():
    async with serving(**CACHED, step_queries=16) as server:
        server.upstream.hold()
        calls = [server.stub.Explain(ask(SCORE)) for _ in range(3)]
        await until(lambda: planner(server).followers == 2)
        assert len(planner(server)) == 1
        server.upstream.release()
        replies = await asyncio.gather(*calls)
        assert server.asked() == 96
        assert (await outcome(server, "miss"), await outcome(server, "shared")) == (1, 2)
    assert sorted(reply.cost.cached for reply in replies) == [False, True, True]
    assert all(same(reply, replies[0]) for reply in replies)


async def test_a_run_goes_on_for_those_who_follow_when_the_first_goes_away():
    async with serving(**CACHED, step_queries=16) as server:
        server.upstream.hold()
        first = server.stub.Explain(ask(SCORE))
        await server.upstream.received(1)
        second = server.stub.Explain(ask(SCORE))
        await until(lambda: planner(server).followers == 1)
        first.cancel()
        await until(lambda: server.gateway.calls.active == 1)
        server.upstream.release()
        assert (await second).maps[0].complete
        assert server.asked() == 96
        wasted = "camserve_masked_queries_wasted_total"
        assert f'{wasted}{{model="fake"}} 0.0' in await server.metrics()
    assert planner(server).idle


async def test_each_keeps_a_deadline_of_its_own():
    async with serving(**CACHED) as server:
        server.upstream.hold()
        first = server.stub.Explain(ask(SCORE), timeout=100)
        await server.upstream.received(1)
        code, _, _ = await failure(server.stub.Explain(ask(SCORE), timeout=0.3))
        assert code == "DEADLINE_EXCEEDED"
        server.upstream.release()
        assert (await first).maps[0].complete


async def test_a_run_is_worked_on_until_the_latest_deadline_of_those_who_follow():
    async with serving(**PATIENT, **CACHED, step_queries=8, steps_per_worker=1) as server:
        server.upstream.hold()
        first = server.stub.Explain(ask(SCORE), timeout=600)
        await server.upstream.received(1)
        second = server.stub.Explain(ask(SCORE), timeout=6000)
        await until(lambda: planner(server).followers == 1)
        jump(700)
        assert (await failure(first))[0] == "DEADLINE_EXCEEDED"
        server.upstream.release()
        assert (await second).maps[0].complete
        assert server.asked() == 96


async def test_a_more_urgent_request_does_not_wait_in_the_class_of_another():
    async with serving(**CACHED, step_queries=8) as server:
        server.upstream.hold()
        batch = server.stub.Explain(ask(SCORE, priority="BATCH"))
        await server.upstream.received(1)
        urgent = server.stub.Explain(ask(SCORE, priority="INTERACTIVE"))
        await until(lambda: len(planner(server)) == 2)
        later = server.stub.Explain(ask(SCORE, priority="BATCH"))
        await until(lambda: planner(server).followers == 1)
        assert len(planner(server)) == 2
        server.upstream.release()
        for call in (batch, urgent, later):
            assert (await call).maps[0].complete


async def test_a_stream_that_follows_has_news_of_its_own():
    async with serving(**CACHED, step_queries=8, steps_per_worker=1) as server:
        server.upstream.hold()
        first = server.stub.Explain(ask(SCORE))
        await server.upstream.received(1)
        stream = server.stub.StreamExplain(ask(SCORE, stream={"max_maps": 100, "min_interval_s": 0}))
        await until(lambda: planner(server).followers == 1)

        updates: list[pb.ExplainUpdate] = []

        async def read() -> None:
            async for update in stream:
                updates.append(update)  # noqa: PERF401 - they are looked at while they come

        reading = asyncio.create_task(read())
        for known in range(4):
            server.upstream.release(1)
            await until(lambda known=known: len(updates) > known)
        server.upstream.release()
        await reading
        *news, last = updates
        assert same(last.reply, await first)
    done = [update.progress.done for update in news]
    assert len(done) > 2
    assert done == sorted(done)
    assert any(update.progress.maps for update in news)


async def test_who_follows_is_one_of_the_requests_taken_on_at_once():
    async with serving(**CACHED, max_requests=2) as server:
        server.upstream.hold()
        calls = [server.stub.Explain(ask(SCORE)) for _ in range(2)]
        await until(lambda: planner(server).followers == 1)
        await server.upstream.received(1)
        for request in (ask(SCORE), ask(GRAD)):
            code, text, _ = await failure(server.stub.Explain(request))
            assert (code, "at most 2 requests" in text) == ("RESOURCE_EXHAUSTED", True)
        server.upstream.release()
        await asyncio.gather(*calls)
        assert (await server.stub.Explain(ask(GRAD))).maps[0].complete


async def test_an_explicit_method_does_not_get_the_reason_of_an_automatic_one():
    async with serving(**CACHED, auto_ladder="grad_cam") as server:
        chosen = await server.stub.Explain(ask(AUTO))
        named = await server.stub.Explain(ask(GRAD))
    assert chosen.maps[0].choice
    assert (named.maps[0].choice, named.cost.cached) == ("", False)


@pytest.mark.parametrize(("shared", "cached"), [(False, False), (True, True)])
async def test_replies_are_kept_apart_by_token_unless_they_are_shared(tmp_path: Path, shared: bool, cached: bool):
    secrets, entries = zip(*(new_token(name) for name in ("ann", "bob")), strict=True)
    (tmp_path / "tokens.toml").write_text("\n".join(entries))
    ann, bob = ([("authorization", f"Bearer {secret}")] for secret in secrets)
    async with serving(tokens=tmp_path / "tokens.toml", result_cache_shared=shared, **CACHED) as server:
        await server.stub.Explain(ask(GROUP), metadata=ann)
        assert (await server.stub.Explain(ask(GROUP), metadata=ann)).cost.cached
        assert (await server.stub.Explain(ask(GROUP), metadata=bob)).cost.cached is cached


async def test_the_encoding_is_not_part_of_what_is_kept():
    async with serving(**CACHED) as server:
        await server.stub.Explain(ask(GROUP))
        pictures = [
            await server.stub.Explain(ask(GROUP, output={"encoding": encoding, "opacity": opacity}))
            for encoding, opacity in (("PNG", 0.5), ("OVERLAY_PNG", 0.5), ("OVERLAY_PNG", 1.0))
        ]
        fresh = await server.stub.Explain(ask(GROUP, output={"encoding": "OVERLAY_PNG"}, top_predictions=4))
    assert all(reply.cost.cached for reply in pictures)
    assert pictures[1].maps[0].data == fresh.maps[0].data != pictures[2].maps[0].data


async def test_a_follower_of_a_failing_run_gets_its_error():
    async with serving(**CACHED) as server:
        server.upstream.hold()
        calls = [server.stub.Explain(ask(SCORE, image=photo(1))) for _ in range(2)]
        await until(lambda: planner(server).followers == 1)
        await server.upstream.received(1)
        server.gateway.registry.get("fake").dispatcher.fail_all(Unavailable("all workers are gone"))
        for call in calls:
            with pytest.raises(grpc.aio.AioRpcError, match="gone"):
                await call

"""Methods that stop asking once their map is within a tolerance, through a real gateway over the shipped fake.

The fake's sums grow by a bump for each query; with a tolerance of 1 the first look that may count is enough.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from gateway_harness import PATIENT, Harness, arrays, ask, photo, serving, until

from camserve.finalise.convergence import LEAST_BLOCKS
from camserve.finalise.maps import normalise, upsample
from camserve.gateway.pool.fake import MODEL, FakeBackend, Faults
from camserve.gateway.pool.fake_answers import sums_of
from camserve.methods import ScoreCam
from camserve.planning import Planner
from camserve.types import Item, ItemResult, StepResult, Task
from camserve.types.parts import Part
from camserve.v1 import explain_pb2 as pb

WITHIN = pb.MethodSpec(score_cam={"tolerance": 1.0})
QUERIES = 96
SMALL = {"step_queries": 8, "steps_per_worker": 1}


def planner(server: Harness) -> Planner:
    return server.gateway.registry.get("fake").dispatcher.planner


class Recording(FakeBackend):
    """Keeps its answers: only that to the opening tells the order of the queries."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.answers: list[tuple[Sequence[Item], StepResult]] = []

    async def step(self, model: str, items: Sequence[Item], timeout_s: float) -> StepResult:
        result = await super().step(model, items, timeout_s)
        if items[0].tasks and items[0].tasks[0].stop:
            self.answers.append((items, result))
        return result

    def numbers(self) -> list[int]:
        """The queries that were answered, in the order in which they were."""
        found: list[int] = []
        for items, result in self.answers:
            (item,), (outcome,) = items, result.outcomes
            assert isinstance(outcome, ItemResult)
            for task, partial in zip(item.tasks, outcome.partials, strict=True):
                found += task.numbers or partial.order[task.start : task.stop]
        return found


async def test_a_map_is_that_of_the_queries_that_were_asked():
    """Each once, added up one by one."""
    upstream = Recording()
    async with serving(upstream, **SMALL) as server:
        reply = await server.stub.Explain(ask(WITHIN, image=photo(3)))
        assert planner(server).idle
        counts = planner(server).counts()
    (saliency,) = reply.maps
    assert saliency.complete
    assert 0 < saliency.estimated_difference <= 1
    assert saliency.fraction == pytest.approx(counts.done / QUERIES)
    assert LEAST_BLOCKS <= counts.done == reply.cost.queries == server.asked() < QUERIES
    assert counts.done + counts.cancelled == QUERIES
    numbers = upstream.numbers()
    assert len(set(numbers)) == len(numbers) == counts.done
    sums = np.zeros((1, 4, 6))
    for number in numbers:
        task = Task(0, ScoreCam(tolerance=1.0), 0, 1, "features", numbers=(number,))
        sums = sums + sums_of(photo(3), task, MODEL, [saliency.target.index])
    np.testing.assert_allclose(arrays(reply)[0], normalise(upsample(sums[0], MODEL.input_size))[0], atol=1e-6)


async def test_without_a_tolerance_all_is_asked_and_nothing_is_estimated():
    async with serving(**SMALL) as server:
        (saliency,) = (await server.stub.Explain(ask(pb.MethodSpec(score_cam={})))).maps
        assert server.asked() == QUERIES
    assert (saliency.fraction, saliency.complete) == (1, True)
    assert not saliency.HasField("estimated_difference")


async def test_a_map_that_is_not_within_its_tolerance_is_that_of_all_queries():
    exact = pb.MethodSpec(score_cam={"tolerance": 1e-9})
    async with serving(**SMALL) as server:
        reply = await server.stub.Explain(ask(exact, image=photo(3)))
        assert server.asked() == QUERIES
    (saliency,) = reply.maps
    assert (saliency.fraction, saliency.complete, saliency.estimated_difference) == (1, True, 0)
    whole = FakeBackend.whole(photo(3), ScoreCam(tolerance=1e-9), MODEL, "features", [saliency.target.index])
    np.testing.assert_allclose(arrays(reply)[0], normalise(upsample(whole[0], MODEL.input_size))[0], atol=1e-6)


async def test_a_stream_tells_how_far_it_is_up_to_the_end():
    async with serving(**SMALL) as server:
        news, replies = [], []
        async for update in server.stub.StreamExplain(
            ask(WITHIN, stream=pb.StreamOptions(max_maps=100, min_interval_s=0))
        ):
            (replies if update.HasField("reply") else news).append(update)
    assert len(replies) == 1
    progress = [(update.progress.done, update.progress.total) for update in news]
    assert progress == sorted(progress, key=lambda pair: pair[0])
    assert all(done <= total <= QUERIES for done, total in progress)
    maps = [one for update in news for one in update.progress.maps]
    assert not any(one.complete for one in maps if one.fraction < LEAST_BLOCKS / QUERIES)


async def test_curves_are_those_of_the_map_that_was_within_its_tolerance():
    async with serving(**SMALL) as server:
        request = ask(WITHIN, evaluate=True, evaluation_steps=4)
        reply = await server.stub.Explain(request)
        assert planner(server).idle
    (saliency,) = reply.maps
    assert saliency.complete
    assert saliency.fraction < 1
    assert saliency.HasField("faithfulness")
    assert reply.cost.evaluation_queries == 10


async def test_a_step_that_is_lost_when_the_map_is_good_enough_is_not_sent_again():
    """Four workers: with the opening and three steps the map is good enough; the others die over what is in flight."""
    upstream = FakeBackend(faults=Faults(lost_steps=frozenset(range(4, 12))))
    upstream.workers = 4
    async with serving(upstream, **PATIENT, **SMALL) as server:
        upstream.hold()
        call = asyncio.ensure_future(server.stub.Explain(ask(WITHIN)))
        await upstream.received(1)
        upstream.release(1)
        await upstream.received(5)
        upstream.release(3)
        await until(lambda: planner(server).counts().cancelled > 0)
        in_flight, sent = planner(server).counts().in_flight, len(upstream.steps)
        assert in_flight > 0
        upstream.release()
        reply = await call
        await until(lambda: planner(server).idle)
        counts = planner(server).counts()
        assert len(upstream.steps) == sent, "nothing was sent again"
    assert (counts.done, counts.cancelled) == (LEAST_BLOCKS, QUERIES - LEAST_BLOCKS)
    assert reply.maps[0].complete
    assert reply.maps[0].fraction == pytest.approx(LEAST_BLOCKS / QUERIES)
    assert reply.cost.queries == LEAST_BLOCKS


async def test_what_is_in_flight_when_the_map_is_good_enough_comes_in_and_counts_once():
    upstream = Recording()
    upstream.workers = 4
    async with serving(upstream, **PATIENT, **SMALL) as server:
        upstream.hold()
        call = asyncio.ensure_future(server.stub.Explain(ask(WITHIN)))
        await upstream.received(1)
        upstream.release(1)
        await upstream.received(5)
        upstream.release(3)
        await until(lambda: planner(server).counts().cancelled > 0)
        in_flight = planner(server).counts().in_flight
        upstream.release()
        reply = await call
        counts = planner(server).counts()
    assert counts.done == LEAST_BLOCKS + in_flight == reply.cost.queries
    assert len(set(upstream.numbers())) == len(upstream.numbers()) == counts.done
    assert reply.maps[0].fraction == pytest.approx(counts.done / QUERIES)


async def test_a_request_that_stops_early_makes_room_for_the_next():
    async with serving(**SMALL, max_requests=1) as server:
        for _ in range(3):
            assert (await server.stub.Explain(ask(WITHIN))).maps[0].fraction < 1
        replies = await asyncio.gather(server.stub.Explain(ask(WITHIN, image=photo(1))))
        assert replies[0].maps[0].complete
        assert planner(server).idle


async def test_who_asks_with_another_tolerance_gets_another_answer_from_the_cache():
    async with serving(result_cache_bytes=10 * 2**20, **SMALL) as server:
        first = await server.stub.Explain(ask(WITHIN))
        again = await server.stub.Explain(ask(WITHIN))
        exact = await server.stub.Explain(ask(pb.MethodSpec(score_cam={})))
    assert (first.cost.cached, again.cost.cached, exact.cost.cached) == (False, True, False)
    assert again.maps[0].fraction == first.maps[0].fraction < exact.maps[0].fraction
    assert again.maps[0].estimated_difference == first.maps[0].estimated_difference


async def test_what_such_requests_ask_is_learnt():
    part = Part(ScoreCam(tolerance=1.0), MODEL.layer(""))
    async with serving(**SMALL) as server:
        dispatcher = server.gateway.registry.get("fake").dispatcher
        before = dispatcher.usual_share(part)
        fractions = [(await server.stub.Explain(ask(WITHIN, image=photo(at)))).maps[0].fraction for at in range(4)]
        assert before == 0.5
        assert dispatcher.usual_share(part) == pytest.approx(max(fractions))
        other = Part(ScoreCam(tolerance=0.01), MODEL.layer(""))
        assert dispatcher.usual_share(other) == 0.5

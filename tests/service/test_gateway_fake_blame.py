"""Backends that are READY and lose their steps, images that break workers, and looks that nobody answers."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
from gateway_harness import GRAD, SCORE, Harness, ask, failure, jump, photo, same, until
from gateway_harness import serving as serving_one
from test_gateway_fake_backends import World, everywhere, serving

from camserve.errors import CamserveError, Internal, NotFound, Unavailable, WorkerLost
from camserve.gateway.pool.fake import MODEL, FakeBackend, Faults
from camserve.gateway.pool.registry import ServedModel
from camserve.images import digest
from camserve.types import Item, ModelInfo
from camserve.v1 import explain_pb2 as pb

DEAD = WorkerLost("the worker died while it answered")
FAST = [DEAD, Unavailable("the worker of fake failed"), NotFound("TorchServe has no model fake"), Internal("too large")]


LATE = {"step_timeout_s": 100, "default_deadline_s": 100_000, "worker_wait_s": 100_000}
"""Nothing ends before a `jump` but what hangs."""


def model(server: Harness) -> ServedModel:
    return server.gateway.registry.get("fake")


def sent(backend: FakeBackend, image: bytes) -> int:
    """Number of steps with an image that a backend was sent."""
    return sum(item.digest == digest(image) for step in backend.steps for item in step)


def slow(faults: Faults | None = None) -> FakeBackend:
    """A backend that takes a while for each step; one with faults is faster."""
    return FakeBackend(faults=faults or Faults(latency_s=0.005))


def queries(step: Sequence[Item]) -> int:
    return sum(task.stop - task.start for item in step for task in item.tasks)


# Backends that fail fast while READY


@pytest.mark.parametrize("error", FAST, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("bad", [1, 2])
async def test_backends_that_fail_fast_while_ready_cost_nobody_an_answer(error: CamserveError, bad: int):
    """Of three; as many Score-CAMs as in the report, at once and one after the other."""
    world = World({f"bad {number}": slow(Faults(failing=error)) for number in range(bad)})
    world |= {f"good {number}": slow() for number in range(3 - bad)}
    images = [photo(seed) for seed in range(24)]
    async with serving_one() as server:
        expected = [await server.stub.Explain(ask(SCORE, image=image)) for image in images]
    async with serving(world, step_queries=32) as server:
        await everywhere(server, world)
        replies = await asyncio.gather(*(server.stub.Explain(ask(SCORE, image=image)) for image in images[:16]))
        replies += [await server.stub.Explain(ask(SCORE, image=image)) for image in images[16:]]
    assert all(same(reply, right) for reply, right in zip(replies, expected, strict=True))


async def test_a_backend_that_loses_its_steps_is_quarantined_for_longer_each_time():
    """It answers each canary. The pauses grow until it answers steps as large as the lost ones, whatever small ones."""
    world = World(bad=FakeBackend(faults=Faults(failing_above=0)), good=FakeBackend())
    async with serving(world, step_queries=8, poll_s=0.002) as server:
        blame = model(server).dispatcher.planner.blame
        await everywhere(server, world)
        pauses_s = []

        async def quarantined() -> tuple[float, float]:
            """Asks until the backend is in quarantine; returns for how many seconds, at least and at most."""
            time = asyncio.get_running_loop().time
            before_s = time()
            for seed in range(100):
                await server.stub.Explain(ask(SCORE, image=photo(seed)))
                assert (await server.stub.Explain(ask(GRAD, image=photo(seed)))).maps[0].complete
                now_s = time()
                if (until_s := blame.pause_until_s("bad")) is not None:
                    return until_s - now_s, until_s - before_s
                before_s = now_s
            raise AssertionError("the backend was never quarantined")

        for _ in range(9):
            pauses_s.append(await quarantined())
            assert 'camserve_backends_quarantined{model="fake"} 1.0' in await server.metrics()
            before, looks = len(world["bad"].steps), Looks(world["bad"])
            await server.stub.Explain(ask(SCORE))
            await until(lambda looks=looks: looks.number >= 2)  # a canary may have been on its way
            canaries, seen = world["bad"].canaries, looks.number
            await until(lambda looks=looks, seen=seen: looks.number >= seen + 4)
            assert len(world["bad"].steps) == before, "it gets no work"
            assert world["bad"].canaries == canaries, "and is left in peace"
            jump(100)
            await until(lambda: blame.pause_until_s("bad") is None)
        for pause_s, (least_s, most_s) in zip((1, 2, 4, 8, 16, 32, 60, 60, 60), pauses_s, strict=True):
            assert least_s <= pause_s <= most_s + 1e-6
        world["bad"].faults, before = Faults(), len(world["bad"].steps)
        while not any(queries(step) >= 8 for step in world["bad"].steps[before:]):
            await server.stub.Explain(ask(SCORE, image=photo(1)))
        assert 'camserve_backends_quarantined{model="fake"} 0.0' in await server.metrics()
        world["bad"].faults = Faults(failing_above=0)
        assert (await quarantined())[0] <= 1, "after a large step that was answered, the pauses begin anew"


async def test_a_sole_backend_that_loses_every_step_is_not_ready_though_it_answers_canaries():
    async with serving_one(FakeBackend(faults=Faults(failing=DEAD)), **LATE) as server:
        code, text, _ = await failure(server.stub.Explain(ask()))
        assert (code, text) == ("UNAVAILABLE", "the worker died while it answered; given up after several attempts")
        await until(lambda: not model(server).ready)
        assert server.upstream.canaries == 3
        code, text, _ = await failure(server.stub.Explain(ask(image=photo(9))))
        assert (code, text) == ("UNAVAILABLE", "model fake failed: it has lost its last steps")
        server.upstream.faults = Faults()
        jump(100)
        await until(lambda: model(server).ready)
        assert (await server.stub.Explain(ask())).maps[0].complete


async def test_even_where_each_image_seems_to_be_to_blame_a_backend_that_answers_none_is_not_ready():
    """Its controls are answered, and no image is."""
    async with serving_one(FakeBackend(faults=Faults(lost_steps=frozenset(range(1000)))), **LATE) as server:
        codes = [(await failure(server.stub.Explain(ask(image=photo(seed)))))[0] for seed in range(10)]
        assert codes == ["INVALID_ARGUMENT"] * 10
        call = server.stub.Explain(ask(image=photo(99)))
        await until(lambda: not model(server).ready)
        call.cancel()


async def test_a_step_that_was_lost_goes_to_a_backend_that_has_not_lost_it():
    world = World(a=FakeBackend(faults=Faults(lost_steps=frozenset({0}))), b=FakeBackend(), c=FakeBackend())
    async with serving(world) as server:
        await everywhere(server, world)
        assert (await server.stub.Explain(ask())).maps[0].complete
    assert Counter(map(len, (backend.steps for backend in world.values()))) == {1: 2, 0: 1}


async def test_losses_are_not_counted_while_another_backend_could_have_answered():
    world = World({f"bad {number}": FakeBackend(faults=Faults(failing=DEAD)) for number in range(6)})
    world["good"] = FakeBackend()
    async with serving(world) as server:
        await everywhere(server, world)
        assert (await server.stub.Explain(ask(GRAD))).maps[0].complete
    assert [len(backend.steps) for backend in world.values()][:6] == [1] * 6, "each backend is tried once"


# Images that break workers


@pytest.mark.parametrize("backends", [1, 2, 3])
async def test_an_image_that_breaks_two_workers_is_refused_and_nobody_else_notices(backends: int):
    killer = photo(1)
    world = World({f"{number}": FakeBackend(faults=Faults(killers=frozenset({killer}))) for number in range(backends)})
    async with serving(world, steps_per_worker=1) as server:
        await everywhere(server, world)
        for _ in range(4):
            for backend in world.values():
                backend.hold()
            before = sum(len(backend.steps) for backend in world.values())
            calls = [server.stub.Explain(ask(SCORE, image=photo(seed))) for seed in (2, 1, 3, 4)]
            await until(lambda before=before: sum(len(each.steps) for each in world.values()) > before)
            await until(lambda: len(model(server).dispatcher.planner) == 4)
            for backend in world.values():
                backend.release()
            code, text, kind = await failure(calls.pop(1))
            assert (code, kind) == ("INVALID_ARGUMENT", "InvalidImage")
            assert "do not outlive this image: the worker died while it answered; it is not sent again" in text
            assert all([(await call).maps[0].complete for call in calls])
            assert model(server).ready
            assert model(server).dispatcher.planner.blame.quarantined == 0
        # On a slow machine a step is overdue, and sent to two backends at once.
        assert 4 * 2 <= sum(sent(backend, killer) for backend in world.values()) <= 4 * 3


@pytest.mark.parametrize("backends", [1, 3])
async def test_many_images_that_break_workers_at_once_do_not_quarantine_the_pool(backends: int):
    killers, others = [photo(seed) for seed in range(8)], [photo(seed) for seed in range(8, 20)]
    faults = Faults(killers=frozenset(killers))
    world = World({f"{number}": FakeBackend(faults=faults) for number in range(backends)})
    async with serving(world) as server:
        await everywhere(server, world)
        for backend in world.values():
            backend.hold()
        first = []
        for backend in world.values():  # each answers something before it is asked of the killers
            first.append(server.stub.Explain(ask(GRAD, image=photo(99))))
            await backend.received(1)
        for backend in world.values():
            backend.release()
        await asyncio.gather(*first)
        bad = [server.stub.Explain(ask(SCORE, image=image)) for image in killers]
        good = [server.stub.Explain(ask(SCORE, image=image)) for image in others]
        codes = [(await failure(call))[0] for call in bad]
        assert all([(await call).maps[0].complete for call in good])
        assert model(server).ready
        assert model(server).dispatcher.planner.blame.quarantined == 0
    assert codes == ["INVALID_ARGUMENT"] * 8
    times = [sum(sent(backend, image) for backend in world.values()) for image in killers]
    assert 2 <= min(times) <= max(times) <= 3  # on a slow machine a step is overdue, and sent to two backends at once


async def test_backends_without_memory_cost_nobody_an_answer():
    """Their workers answer that nothing fits, item by item."""
    images = [photo(seed) for seed in range(8)]
    full = Faults(item_errors=dict.fromkeys(images, Unavailable("a worker has too little memory for this request")))
    world = World(a=FakeBackend(faults=full), b=FakeBackend(faults=full), c=slow())
    async with serving(world, step_queries=32) as server:
        await everywhere(server, world)
        replies = await asyncio.gather(*(server.stub.Explain(ask(SCORE, image=image)) for image in images))
    assert all(reply.maps[0].complete for reply in replies)


async def test_an_image_that_hangs_two_workers_is_refused_and_a_fresh_backend_stays():
    async with serving_one(FakeBackend(faults=Faults(hanging_steps=frozenset({0, 1}))), **LATE) as server:
        call = server.stub.Explain(ask())
        for steps in (1, 2):
            await server.upstream.received(steps)
            jump(100)
        assert (await failure(call))[0] == "INVALID_ARGUMENT"
        assert server.upstream.controls >= 1
        assert (await server.stub.Explain(ask())).maps[0].complete
        assert model(server).ready


async def test_neighbours_of_an_image_that_breaks_workers_are_answered():
    killer = photo(1)
    async with serving_one(FakeBackend(faults=Faults(killers=frozenset({killer}))), steps_per_worker=1) as server:
        server.upstream.hold()
        first = server.stub.Explain(ask())
        await server.upstream.received(1)
        calls = {seed: server.stub.Explain(ask(GRAD, image=photo(seed))) for seed in (1, 2, 3, 4, 5)}
        await until(lambda: len(model(server).dispatcher.planner) == 6)
        server.upstream.release()
        await first
        assert (await failure(calls.pop(1)))[0] == "INVALID_ARGUMENT"
        assert all([(await call).maps[0].complete for call in calls.values()])
        assert len(server.upstream.steps[1]) == 5, "all in one step, and then alone"
        assert {len(step) for step in server.upstream.steps[2:]} == {1}
        assert sent(server.upstream, killer) == 2


# Looks that nobody answers


async def test_looks_that_nobody_answers_are_no_verdict_while_steps_are_answered():
    async with serving_one(FakeBackend(faults=Faults()), poll_s=600) as server:
        server.upstream.faults = Faults(deaf=True)
        for seed in range(10):
            looks = Looks(server.upstream)
            await server.stub.Explain(ask(image=photo(seed)))
            jump(601)
            await until(lambda looks=looks: looks.unanswered == 1)
            for _ in range(5):
                await asyncio.sleep(0)
            assert model(server).ready


async def test_a_few_unanswered_looks_in_a_row_are_a_verdict_and_one_is_none():
    async with serving_one(FakeBackend(), poll_s=600) as server:
        look = model(server)
        server.upstream.up = False
        for unanswered in (1, 2, 3):
            looks = Looks(server.upstream)
            jump(601)
            await until(lambda looks=looks: looks.unanswered == 1)
            for _ in range(5):
                await asyncio.sleep(0)
            assert look.ready == (unanswered < 3)
        server.upstream.up = True
        jump(601)
        await until(lambda: look.ready)


class Looks:
    """Counts the looks at a backend, and those that nobody answered."""

    def __init__(self, backend: FakeBackend) -> None:
        self.number = self.unanswered = 0
        self._look = type(backend).look
        self._backend = backend
        backend.look = self.look  # type: ignore[method-assign]

    async def look(self, name: str) -> object:
        self.number += 1
        try:
            return await self._look(self._backend, name)
        except Unavailable:
            self.unanswered += 1
            raise


# Models that do not answer their canary


class Broken(FakeBackend):
    """Serves two models, of which one fails."""

    async def describe(self, model: str, timeout_s: float) -> ModelInfo:
        if model == "broken":
            raise Unavailable("its weights are nonsense")
        return await super().describe(model, timeout_s)


async def test_a_model_that_fails_says_why_and_holds_up_no_other(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.WARNING, logger="camserve")
    broken = replace(MODEL, name="broken")
    async with serving_one(Broken([MODEL, broken])) as server:
        await until(lambda: len(server.gateway.registry.models) == 2)
        await until(lambda: server.gateway.registry.get("broken").failure != "")
        assert (await server.stub.Explain(ask(model="fake"))).maps[0].complete
        for call in (server.stub.Explain(ask(model="broken")), server.stub.GetModel(pb.GetModelRequest(name="broken"))):
            code, text, _ = await failure(call)
            assert (code, text) == ("UNAVAILABLE", "model broken failed: its weights are nonsense")
        listed = {each.name: each for each in (await server.stub.ListModels(pb.ListModelsRequest())).models}
        assert (listed["broken"].ready, listed["broken"].failure) == (False, "its weights are nonsense")
        assert (listed["fake"].ready, listed["fake"].failure) == (True, "")
        looks = Looks(server.upstream)
        server.upstream.up = False
        await until(lambda: looks.unanswered > 6)
        server.upstream.up = True
        await until(lambda: server.gateway.registry.get("fake").ready)
    assert sum("its weights are nonsense" in record.getMessage() for record in caplog.records) == 1

"""What is accounted for stays accounted for, whatever fails in between."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from gateway_harness import (
    GRAD,
    PATIENT,
    SCORE,
    TO_THE_MARGIN,
    Harness,
    ask,
    failure,
    jump,
    merged,
    photo,
    same,
    serving,
    until,
)
from test_gateway_fake_backends import World, everywhere
from test_gateway_fake_backends import serving as serving_world

from camserve.errors import Unavailable
from camserve.finalise.results import Results
from camserve.gateway.pool.fake import MODEL, FakeBackend, Faults
from camserve.gateway.requests.rendering import Renderer
from camserve.gateway.requests.turns import Threads
from camserve.planning import Fate, Planner
from camserve.types import Cost, Target
from camserve.types.request import ExplainRequest, FittedRequest, OutputOptions


def planner(server: Harness) -> Planner:
    return server.gateway.registry.get("fake").dispatcher.planner


async def test_a_step_that_cannot_be_made_ends_its_request_and_no_other(monkeypatch: pytest.MonkeyPatch):
    """Otherwise the step would be in flight for ever, and its room at the worker gone."""
    item, bad = Results.item, photo(13)

    def broken(self: Results, *arguments: Any, **options: Any) -> Any:
        if self.fitted.request.image == bad:
            raise RuntimeError("a secret")
        return item(self, *arguments, **options)

    monkeypatch.setattr(Results, "item", broken)
    async with serving(steps_per_worker=1) as server:
        assert (await failure(server.stub.Explain(ask(SCORE, image=bad))))[:2] == (
            "INTERNAL",
            "internal error; the server's log has the details",
        )
        assert planner(server).idle
        assert (await server.stub.Explain(ask(SCORE))).maps[0].complete


async def test_a_backend_that_was_removed_stays_removed_when_its_last_step_is_lost(monkeypatch: pytest.MonkeyPatch):
    world = World(a=FakeBackend(), b=FakeBackend())
    told: list[str] = []
    set_workers, remove = Planner.set_workers, Planner.remove_backend

    def noting(self: Planner, backend: str, *rest: Any) -> None:
        told.append(backend)
        set_workers(self, backend, *rest)

    def removing(self: Planner, backend: str) -> None:
        told.append(f"no {backend}")
        remove(self, backend)

    async with serving_world(world, step_queries=8, steps_per_worker=1) as server:
        await everywhere(server, world)
        for backend in world.values():
            backend.hold()
        call = server.stub.Explain(ask(SCORE))
        await until(lambda: any(backend.steps for backend in world.values()))
        gone = next(name for name, backend in world.items() if backend.steps)
        monkeypatch.setattr(Planner, "set_workers", noting)
        monkeypatch.setattr(Planner, "remove_backend", removing)
        left = world.pop(gone)
        await until(lambda: left.closed)
        for backend in world.values():
            backend.release()
        assert (await call).maps[0].complete
    assert gone not in told[told.index(f"no {gone}") :]


async def test_a_copy_that_is_lost_is_no_retry(monkeypatch: pytest.MonkeyPatch):
    """A step is overdue and copied; it is lost while the copy is in flight, and nothing waits again."""
    world = World(a=FakeBackend(), b=FakeBackend())
    lost: list[Fate] = []
    real = Planner.lost

    def noting(self: Planner, step: int, request: int, by_worker: bool) -> Fate:
        lost.append(real(self, step, request, by_worker))
        return lost[-1]

    settings = {"step_queries": 8, "steps_per_worker": 1, "step_timeout_s": 100, "default_deadline_s": 10_000}
    async with serving_world(world, **settings) as server:
        await everywhere(server, world)
        expected = await server.stub.Explain(ask(SCORE))
        monkeypatch.setattr(Planner, "lost", noting)
        world["a"].faults = Faults(hanging_steps=frozenset(range(10_000)))
        held = world["b"]
        before, hanging = len(held.steps), len(world["a"].steps)
        held.hold()
        call = server.stub.Explain(ask(SCORE))
        await until(lambda: bool(world["a"].steps[hanging:]))
        jump(60)

        def copied() -> bool:
            tasks = {task for item in world["a"].steps[hanging] for task in item.tasks}
            return any(task in tasks for item in held.steps[-1] for task in item.tasks)

        received = before + 1
        await held.received(received)
        while not copied():
            held.release(1)
            received += 1
            await held.received(received)
        jump(60)  # the step has hung for more than 100 s, its copy for 60 s
        await until(lambda: bool(lost))
        assert lost == [Fate.GOES_ON]
        held.release()
        assert same(await call, expected)
        assert 'camserve_step_retries_total{model="fake"} 0.0' in await server.metrics()


async def test_a_loss_that_cannot_be_accounted_for_ends_its_request_alone(monkeypatch: pytest.MonkeyPatch):
    real, faults = Planner.lost, iter([ZeroDivisionError("a bug")])

    def failing(self: Planner, step: int, request: int, by_worker: bool = False) -> Fate:
        for fault in faults:
            raise fault
        return real(self, step, request, by_worker)

    async with serving(FakeBackend(faults=Faults(lost_steps=frozenset({0})))) as server:
        monkeypatch.setattr(Planner, "lost", failing)
        assert (await failure(server.stub.Explain(ask())))[0] == "INTERNAL"
        assert (await server.stub.Explain(ask())).maps[0].complete
        assert server.gateway.registry.get("fake").dispatcher.planner.idle


async def test_requests_that_end_while_their_follow_ups_are_made_end_with_the_reason(monkeypatch: pytest.MonkeyPatch):
    started, go_on = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def slow(known: Any) -> dict[int, Any]:
        loop.call_soon_threadsafe(started.set)
        asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(30)
        return {}

    monkeypatch.setattr("camserve.gateway.pool.dispatcher.follow_ups", slow)
    async with serving() as server:
        call = server.stub.Explain(ask(GRAD, evaluate=True))
        await started.wait()
        server.gateway.registry.get("fake").dispatcher.fail_all(Unavailable("all workers are gone"))
        assert (await failure(call))[:2] == ("UNAVAILABLE", "all workers are gone")
        go_on.set()
        await until(lambda: planner(server).idle)


def fitted(**output: Any) -> FittedRequest:
    request = ExplainRequest(photo(size=(600, 800)), output=OutputOptions(**output), targets=(Target(index=0),))
    return request.fit(MODEL)


async def test_what_rendering_takes_is_expected_by_the_size_of_the_maps():
    """A mean over all sizes would begin small partial answers too early and large ones too late."""
    threads = Threads("test", 2, 2**30)
    renderer = Renderer(threads)
    small, large = fitted(), fitted(size="original")

    class Known:
        fitted = small

    def encode(maps: Any, finish: Any) -> bytes:
        return b""

    def cost(seconds: float) -> Cost:
        return Cost(0, {"render": 0.8}, 1, "exact", "worker")

    assert renderer.expected_s(large) == 0
    await renderer.reply(Known(), "", encode, cost, None)  # type: ignore[arg-type]  # all of it that is looked at
    threads.close()
    ratio = (600 * 800) / (32 * 48)
    assert renderer.expected_s(small) == pytest.approx(0.1)
    assert renderer.expected_s(large) == pytest.approx(0.1 * ratio)


async def test_a_kept_reply_is_whole_where_a_partial_one_would_do(monkeypatch: pytest.MonkeyPatch):
    merges = merged(monkeypatch)
    faults = Faults(hanging_steps=frozenset({2, 3}))
    settings = {**PATIENT, "step_queries": 16, "steps_per_worker": 1, "result_cache_bytes": 10**7}
    async with serving(FakeBackend(faults=faults), **settings) as server:
        call = server.stub.Explain(ask(SCORE, allow_partial=True))
        await until(lambda: len(merges) == 2)
        jump(TO_THE_MARGIN)
        partial = await call
        assert 0 < partial.maps[0].fraction < 1
        server.upstream.faults = Faults()
        jump(10_000)  # the step that hangs is given up
        await until(lambda: len(planner(server)) == 0)
        whole = await server.stub.Explain(ask(SCORE))
        again = await server.stub.Explain(ask(SCORE, allow_partial=True))
    assert (whole.cost.cached, whole.maps[0].complete) == (False, True)
    assert (again.cost.cached, again.maps[0].complete) == (True, True)


async def test_sums_that_cannot_be_merged_end_their_request(monkeypatch: pytest.MonkeyPatch):
    """The planner has counted them as answered, so that nobody would ask them again."""

    def broken(self: Results, *arguments: Any) -> None:
        raise MemoryError("a secret")

    monkeypatch.setattr(Results, "merge", broken)
    async with serving() as server:
        assert (await failure(server.stub.Explain(ask(SCORE))))[:2] == (
            "INTERNAL",
            "internal error; the server's log has the details",
        )
        assert planner(server).idle


@pytest.mark.parametrize("when", ["before", "after"])
async def test_an_answer_that_cannot_be_accounted_for_ends_its_request_alone(
    monkeypatch: pytest.MonkeyPatch, when: str
):
    """Whether the planner refuses it or has counted it already: nothing stays in flight; the neighbour has its map."""
    bad, real_admit, real_done, real_take = photo(13), Planner.admit, Planner.done, Results.take
    admitted: list[int] = []
    broken: set[int] = set()

    def admit(self: Planner, *arguments: Any, **options: Any) -> int:
        admitted.append(real_admit(self, *arguments, **options))
        return admitted[-1]

    def done(self: Planner, step: int, request: int, *rest: Any) -> bool:
        if request in broken and when == "before":
            raise ValueError("a secret")
        return real_done(self, step, request, *rest)

    def take(self: Results, *arguments: Any) -> None:
        if self.fitted.request.image == bad and when == "after":
            raise ValueError("a secret")
        real_take(self, *arguments)

    monkeypatch.setattr(Planner, "admit", admit)
    monkeypatch.setattr(Planner, "done", done)
    monkeypatch.setattr(Results, "take", take)
    async with serving(steps_per_worker=1) as server:
        server.upstream.hold()
        first = asyncio.ensure_future(server.stub.Explain(ask(SCORE)))
        await server.upstream.received(1)
        calls = []
        for image in (bad, photo(14)):
            calls.append(asyncio.ensure_future(server.stub.Explain(ask(GRAD, image=image))))
            await until(lambda: len(planner(server)) == 1 + len(calls))
        broken.add(admitted[1])
        server.upstream.release()
        assert (await failure(calls[0]))[:2] == ("INTERNAL", "internal error; the server's log has the details")
        assert (await calls[1]).maps[0].complete
        assert (await first).maps[0].complete
        await until(lambda: planner(server).idle)


async def test_two_models_never_answer_one_step():
    """The first worker lacks the image; the one that gets it serves another version."""
    async with serving(step_queries=7, steps_per_worker=1) as server:
        server.upstream.hold()
        call = server.stub.Explain(ask(SCORE))
        await server.upstream.received(1)
        server.upstream.release(1)
        await server.upstream.received(2)
        server.upstream.forget_images()
        server.upstream.release(1)
        await server.upstream.received(3)  # the image again
        server.upstream.serve(replace(MODEL, version="2.0"))
        server.upstream.release()
        code, _, kind = await failure(call)
    assert (code, kind) == ("UNAVAILABLE", "ModelChanged")

"""Several TorchServes behind one gateway, as fakes: work is spread, places come and go."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import grpc
from gateway_harness import GRAD, QUICK, SCORE, Harness, ask, photo, same, until

from camserve.gateway.ops.settings import Settings
from camserve.gateway.pool.discovery import Pool, torchserves
from camserve.gateway.pool.fake import MODEL, FakeBackend, Faults
from camserve.gateway.server import Gateway
from camserve.v1 import explain_pb2_grpc


class World(dict[str, FakeBackend]):
    """The TorchServes that there are, by place."""

    error: OSError | None = None
    failures = 0
    """How often nobody could tell."""

    async def find(self) -> list[str]:
        if self.error:
            self.failures += 1
            raise self.error
        return list(self)

    def places(self) -> Pool:
        return Pool(self.find, self.__getitem__)


@asynccontextmanager
async def serving(world: World, **settings: object) -> AsyncIterator[Harness]:
    async with Gateway(Settings(**(QUICK | settings)), world.places()) as gateway:
        await gateway.wait_ready(30)
        async with grpc.aio.insecure_channel(gateway.address) as channel:
            yield Harness(
                gateway, next(iter(world.values())), channel, explain_pb2_grpc.ExplanationServiceStub(channel)
            )


async def everywhere(server: Harness, world: World) -> None:
    """Returns once every place has answered its canary."""
    await until(lambda: all(upstream.canaries for upstream in world.values()))
    await until(lambda: f'workers{{model="fake"}} {len(world)}.0' in text(server))


def text(server: Harness) -> str:
    samples = server.gateway.metrics.workers_ready.collect()[0].samples
    return "".join(f'workers{{model="{sample.labels["model"]}"}} {sample.value}' for sample in samples)


def slow() -> FakeBackend:
    return FakeBackend(faults=Faults(latency_s=0.02))


async def test_one_request_is_spread_over_all_places():
    world = World(a=slow(), b=slow(), c=slow())
    async with serving(World(one=FakeBackend())) as server:
        expected = await server.stub.Explain(ask(SCORE))
    async with serving(world, step_queries=4) as server:
        await everywhere(server, world)
        assert same(await server.stub.Explain(ask(SCORE)), expected)
    asked = [sum(task.stop - task.start for (item,) in one.steps for task in item.tasks) for one in world.values()]
    assert sum(asked) == 96
    assert min(asked) >= 16


async def test_a_place_that_dies_costs_nothing_but_time():
    world = World(a=slow(), b=slow())
    async with serving(world, step_queries=4) as server:
        await everywhere(server, world)
        expected = await server.stub.Explain(ask(SCORE))
        call = server.stub.Explain(ask(SCORE))
        await world["a"].received(len(world["a"].steps) + 1)
        world["a"].up = False
        assert same(await call, expected)
        call = server.stub.Explain(ask(GRAD))
        assert (await call).maps[0].complete


async def test_a_new_place_is_used_and_one_that_is_gone_is_left():
    world = World(a=slow())
    async with serving(world, step_queries=4) as server:
        call = server.stub.Explain(ask(SCORE, image=photo(1)))
        await world["a"].received(1)
        world["b"] = slow()
        await world["b"].received(1)
        gone = world.pop("a")
        assert (await call).maps[0].complete
        await until(lambda: gone.closed)
        before = len(gone.steps)
        assert (await server.stub.Explain(ask(SCORE))).maps[0].complete
    assert len(gone.steps) == before
    assert world["b"].closed


async def test_while_nobody_can_tell_the_places_the_known_ones_stay():
    world = World(a=slow())
    async with serving(world) as server:
        world.error = OSError("no name server")
        await until(lambda: world.failures > 2)
        assert (await server.stub.Explain(ask(GRAD))).maps[0].complete


async def test_a_place_with_another_version_is_not_used():
    world = World(a=slow(), b=FakeBackend([replace(MODEL, version="2.0")]))
    async with serving(world, step_queries=4) as server:
        await until(lambda: all(upstream.canaries for upstream in world.values()))
        version = (await server.stub.Explain(ask(SCORE))).version
        steps = {"1.0": world["b"].steps, "2.0": world["a"].steps}
    assert not steps[version]


async def test_a_step_that_is_overdue_is_sent_to_another_place():
    world = World(a=FakeBackend(), b=FakeBackend())
    async with serving(world, step_queries=8, step_timeout_s=600) as server:
        await everywhere(server, world)
        expected = await server.stub.Explain(ask(SCORE))
        world["a"].faults = Faults(hanging_steps=frozenset(range(10_000)))
        assert same(await server.stub.Explain(ask(SCORE)), expected)  # long before the step's timeout, and the test's


async def test_a_host_stands_for_all_its_addresses():
    places = torchserves(["127.0.0.1:7070:8081", "localhost:7070:8081", "[::1]:7071:8082"])
    await places.look()
    assert {"127.0.0.1:7070:8081", "[::1]:7071:8082"} <= set(places)
    assert len([place for place in places if place.startswith("127.0.0.1")]) == 1
    await places.close()

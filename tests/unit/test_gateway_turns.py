"""Who gets a thread: parties in turn, none of them all, and a thread is taken for as long as its work lasts."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from camserve.gateway.requests.turns import Threads


class Works:
    """Work in threads that ends when the test says so."""

    def __init__(self, size: int = 3, needs: int = 640) -> None:
        self.threads = Threads("test", size, needs)
        self.running: list[str] = []
        self._ends: dict[str, threading.Event] = {}
        self._tasks: dict[str, asyncio.Task[str]] = {}

    def begin(self, name: str, needs: int = 0) -> asyncio.Task[str]:
        """The party is the first letter of the name."""
        self._ends[name] = threading.Event()

        def work() -> str:
            self.running.append(name)
            assert self._ends[name].wait(60)
            self.running.remove(name)
            return name

        self._tasks[name] = asyncio.create_task(self.threads.run(name[0], work, needs))
        return self._tasks[name]

    def end(self, name: str) -> None:
        self._ends[name].set()

    def end_all(self) -> None:
        for name in self._ends:
            self.end(name)


@pytest.fixture
async def works():
    works = Works()
    yield works
    works.end_all()
    works.threads.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0.001)


async def test_one_thread_is_left_to_others(works):
    for number in range(5):
        works.begin(f"a{number}")
    await until(lambda: len(works.running) == 2)
    await settle()
    assert sorted(works.running) == ["a0", "a1"]
    other = works.begin("b0")
    await until(lambda: "b0" in works.running)
    works.end("b0")
    assert await other == "b0"


async def test_parties_that_wait_take_turns(works):
    for name in ("a0", "a1", "b0"):
        works.begin(name)
    await until(lambda: len(works.running) == 3)
    for name in ("a2", "a3", "a4", "b1", "c0"):
        works.begin(name)
        await settle()
    works.end("a0")
    await until(lambda: "a2" in works.running)
    works.end("a1")
    await until(lambda: "b1" in works.running)
    works.end("b0")
    await until(lambda: "c0" in works.running)


async def test_a_thread_whose_caller_has_gone_is_taken_until_its_work_ends(works):
    """Otherwise the work of others would wait behind it, in the order of the threads and of nobody's turn."""
    first, _ = works.begin("a0"), works.begin("a1")
    await until(lambda: len(works.running) == 2)
    first.cancel()
    works.begin("a2")
    await settle()
    assert sorted(works.running) == ["a0", "a1"]
    works.end("a0")
    await until(lambda: "a2" in works.running)


async def test_work_that_waits_for_memory_leaves_nothing_behind_when_it_is_cancelled(works):
    works.begin("a0", needs=600)
    await until(lambda: works.running == ["a0"])
    waiting = works.begin("b0", needs=600)
    await settle()
    assert works.running == ["a0"]
    works.begin("b1", needs=10)
    await until(lambda: "b1" in works.running)
    waiting.cancel()
    works.end("a0")
    works.begin("b2", needs=640)
    await until(lambda: "b2" in works.running)


async def test_an_error_is_the_callers_and_frees_the_thread(works):
    def fails() -> None:
        raise ValueError("wrong")

    for _ in range(5):
        with pytest.raises(ValueError, match="wrong"):
            await works.threads.run("a", fails)
    works.begin("a0")
    works.begin("a1")
    await until(lambda: len(works.running) == 2)

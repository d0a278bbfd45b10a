"""In which order messages are read: owners in turn, none with more than half of the places, nobody for ever."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from camserve.errors import Overloaded
from camserve.gateway.api.reading import PATIENCE_S, Reader


class Sender:
    """A client whose message comes when the test says so."""

    def __init__(self, name: str, reading: list[str]) -> None:
        self.name, self.reading = name, reading
        self.came = asyncio.Event()

    def peer(self) -> str:
        return self.name[0]  # the connection

    async def read(self) -> bytes:
        self.reading.append(self.name)
        await self.came.wait()
        return self.name.encode()


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_owners_are_served_in_turn_and_have_half_of_the_places():
    reader, reading = Reader(4, 600), []
    senders = [Sender(name, reading) for name in ("a1", "a2", "a3", "a4", "b1", "c1", "c2", "b2")]
    calls = {}
    for sender in senders:
        calls[sender.name] = asyncio.create_task(reader.read(sender))
        await settle()
    assert reading == ["a1", "a2", "b1", "c1"], "of a half, and the others in order"
    senders[0].came.set()
    await settle()
    assert reading[4:] == ["a3"], "a has waited for longest"
    senders[4].came.set()
    await settle()
    assert reading[5:] == ["c2"]
    calls["a4"].cancel()
    for sender in senders:
        sender.came.set()
    await settle()
    assert reading[6:] == ["b2"]
    assert await calls["b2"] == b"b2"
    assert all(call.done() for call in calls.values())
    free = [asyncio.create_task(reader.read(Sender(f"{name}9", reading))) for name in "vwxy"]
    await settle()
    assert reading[7:] == ["v9", "w9", "x9", "y9"], "every place is free again"
    for call in free:
        call.cancel()


async def test_one_who_is_cancelled_while_waiting_or_just_let_in_gives_the_place_on():
    reader, reading = Reader(2, 600), []
    first, second, third = (Sender(name, reading) for name in ("a1", "a2", "a3"))
    one = asyncio.create_task(reader.read(first))
    await settle()
    two, three = (asyncio.create_task(reader.read(sender)) for sender in (second, third))
    await settle()
    first.came.set()
    await asyncio.wait([one])
    two.cancel()  # its turn has just come
    await settle()
    assert reading[-1] == "a3"
    third.came.set()
    assert await three == b"a3"


async def test_no_message_is_none():
    class Silent(Sender):
        async def read(self) -> Any:
            return grpc.aio.EOF

    assert await Reader(1, 600).read(Silent("a", [])) is None


async def test_a_slow_sender_is_left_alone_as_long_as_nobody_waits_for_its_place(monkeypatch: pytest.MonkeyPatch):
    loop = asyncio.get_running_loop()
    reader, reading = Reader(2, 600), []
    slow, other, late = (Sender(name, reading) for name in ("a1", "b1", "c1"))
    running = asyncio.create_task(reader.read(slow))
    await settle()
    time = loop.time
    monkeypatch.setattr(loop, "time", lambda: time() + 2 * PATIENCE_S)
    fresh = asyncio.create_task(reader.read(other))
    await asyncio.sleep(0.01)
    assert not running.done()
    waiting = asyncio.create_task(reader.read(late))
    with pytest.raises(Overloaded, match="did not come within 5 s while others waited"):
        await running
    await settle()
    assert reading == ["a1", "b1", "c1"]
    other.came.set()
    late.came.set()
    assert (await fresh, await waiting) == (b"b1", b"c1")

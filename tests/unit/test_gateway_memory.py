"""What counts bytes before they are taken: requests in flight, and pictures that wait for each other."""

from __future__ import annotations

import asyncio
import io
from dataclasses import replace

import pytest
from PIL import Image

from camserve.errors import Overloaded
from camserve.gateway.requests.memory import PICTURE_BYTES, Gate, Memory, answer_bytes, picture_bytes
from camserve.types import Layer, ModelInfo, StreamOptions, Target
from camserve.types.request import ExplainRequest, OutputOptions, RequestLimits


def _photo() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (60, 40)).save(file, "PNG")
    return file.getvalue()


PHOTO = _photo()
MODEL = ModelInfo("m", "1", ("cat", "dog"), (32, 48), (Layer("stem", 4, 8, 12),), "stem")


def test_a_call_takes_half_of_what_is_left():
    memory = Memory(1000)
    with memory.hold(500) as held:
        with pytest.raises(Overloaded, match="take 251 bytes") as caught:
            held.add(251)
        assert caught.value.reason == "memory"
        held.add(250)
        assert memory.held == 750
        with memory.hold(125):
            assert memory.held == 875
        with pytest.raises(Overloaded):
            memory.hold(126)
        assert memory.held == 750
        held.count(2000)
        assert memory.held == 2000, "what is there counts, and is not refused"
    assert memory.held == 0
    assert not memory.room_for(501)


def fitted(image: bytes = PHOTO, targets: int = 2, **output):
    request = ExplainRequest(image, targets=(Target(top_k=targets),), output=OutputOptions(**output))
    return request.fit(MODEL, RequestLimits(message_bytes=10**6))


def test_an_answer_is_measured_by_its_sums_and_its_encoded_maps():
    sums = 2 * 8 * 12 * 4
    assert answer_bytes(fitted()) == sums + 3 * 2 * 32 * 48 * 4
    assert answer_bytes(fitted(encoding="uint8", size="original")) == sums + 3 * 2 * 40 * 60
    assert answer_bytes(fitted(encoding="overlay_png", size="original")) == sums + 3 * 2 * 40 * 60 * 2


def test_maps_of_news_are_counted_as_they_are_made_all_at_once():
    asked = fitted(encoding="uint8")
    assert answer_bytes(asked, news=True) == answer_bytes(asked) + 4 * 2 * 32 * 48
    quiet = replace(asked, request=replace(asked.request, stream=StreamOptions(max_maps=0)))
    assert answer_bytes(quiet, news=True) == answer_bytes(asked)


def test_a_picture_is_measured_by_its_largest_map_and_the_photo_beneath():
    assert picture_bytes(fitted()) == PICTURE_BYTES * 32 * 48
    assert picture_bytes(fitted(encoding="overlay_jpeg")) == PICTURE_BYTES * 40 * 60


async def test_a_gate_lets_through_what_fits_in_order():
    gate, inside, most = Gate(10), [], 0
    go_on = [asyncio.Event() for _ in range(5)]

    async def work(number: int, size: int) -> None:
        nonlocal most
        await gate.enter(size)
        inside.append(number)
        most = max(most, sum(sizes[each] for each in inside))
        await go_on[number].wait()
        inside.remove(number)
        gate.leave(size)

    sizes = [6, 5, 4, 25, 1]
    tasks = [asyncio.create_task(work(number, size)) for number, size in enumerate(sizes)]
    await asyncio.sleep(0)
    assert inside == [0], "the second does not fit, and nobody overtakes it"
    tasks[1].cancel()
    await asyncio.gather(tasks[1], return_exceptions=True)
    await asyncio.sleep(0)
    assert inside == [0, 2]
    go_on[0].set()
    await tasks[0]
    assert inside == [2]
    go_on[2].set()
    await tasks[2]
    await asyncio.sleep(0)
    assert inside == [3], "what is too large goes through alone"
    go_on[3].set()
    go_on[4].set()
    await asyncio.gather(*tasks[3:])
    async with asyncio.timeout(30):
        await gate.enter(10)


async def test_a_gate_lets_through_at_once_what_needs_hardly_anything():
    gate = Gate(640)
    await gate.enter(640)
    waiting = asyncio.create_task(gate.enter(11))
    async with asyncio.timeout(30):
        for _ in range(100):
            await gate.enter(10)
    assert not waiting.done()
    for _ in range(100):
        gate.leave(10)
    await asyncio.sleep(0)
    assert not waiting.done(), "and it is not counted"
    gate.leave(640)
    await waiting

"""Many images: so many at once, answers as they come, failures apart, patience with a server that has no room."""

from __future__ import annotations

import asyncio
import threading

import pytest

from camserve import many
from camserve.errors import InvalidImage, InvalidOption, Overloaded, Unavailable
from camserve.many import answers, answers_async, pause_s


@pytest.fixture(params=["threads", "asyncio"])
def collect(request):
    """A function that returns all answers to images, asked by a function, either way."""

    def in_threads(images, ask, at_once=3):
        return list(answers(images, ask, at_once))

    def with_asyncio(images, ask, at_once=3):
        async def asked(image):
            return await asyncio.to_thread(ask, image)

        async def all_of_them():
            return [answer async for answer in answers_async(images, asked, at_once)]

        return asyncio.run(all_of_them())

    return in_threads if request.param == "threads" else with_asyncio


def test_each_image_is_answered_once_and_knows_its_number(collect):
    found = collect("abcdefg", str.upper)
    assert sorted((each.index, each.image, each.explanation) for each in found) == [
        (index, image, image.upper()) for index, image in enumerate("abcdefg")
    ]
    assert collect([], str.upper) == []


def test_so_many_are_asked_at_once_and_images_are_taken_when_there_is_a_place(collect):
    lock, asked, most, taken = threading.Lock(), [0], [0], [0]
    full = threading.Barrier(3, timeout=60)

    def images():
        for number in range(9):
            taken[0] += 1
            yield number

    def ask(image):
        with lock:
            asked[0] += 1
            most[0] = max(most[0], asked[0])
            assert taken[0] <= image + 3, "an image is read long before its turn"
        full.wait()  # three are under way, or nobody goes on
        with lock:
            asked[0] -= 1
        return image

    assert len(collect(images(), ask)) == 9
    assert most == [3]


def test_an_image_that_is_done_first_comes_first(collect):
    last = threading.Event()

    def ask(image):
        if image == "slow":
            assert last.wait(60)
        return image

    def images():
        yield "slow"
        yield "quick"

    seen = []
    for answer in answers(images(), ask, 2):
        seen.append(answer.image)
        last.set()
    assert seen == ["quick", "slow"]
    assert [each.index for each in collect(["a"], str)] == [0]


def test_a_failure_is_an_answer_and_the_others_go_on(collect):
    def ask(image):
        if image == "b":
            raise InvalidImage("broken")
        return image

    found = {each.image: each for each in collect("abc", ask)}
    assert str(found["b"].error) == "broken"
    assert found["b"].explanation is None
    assert (found["a"].explanation, found["c"].explanation) == ("a", "c")
    assert found["a"].error is None


def test_a_fault_of_the_program_is_no_answer(collect):
    with pytest.raises(ZeroDivisionError):
        collect([0], lambda image: 1 / image)


def test_an_image_without_room_is_asked_again_as_often_as_is_said(collect, monkeypatch):
    monkeypatch.setattr(many, "pause_s", lambda error, attempt: 0.0)
    tried = []

    def ask(image):
        tried.append(image)
        if image == "full" or tried.count(image) < 3:
            raise Overloaded("no room") if image == "full" else Unavailable("no worker")
        return image

    found = {each.image: each for each in collect(["full", "soon"], ask)}
    assert found["soon"].explanation == "soon"
    assert isinstance(found["full"].error, Overloaded)
    assert (tried.count("soon"), tried.count("full")) == (3, many.TRIES)


def test_a_pause_is_at_least_what_the_server_names_and_grows_up_to_a_bound():
    assert pause_s(Overloaded("", 7.0), 0) >= 7.25
    for attempt, longest in enumerate((0.5, 1, 2, 4, 8, 16, 30, 30)):
        drawn = [pause_s(Unavailable(), attempt) for _ in range(50)]
        assert longest / 2 <= min(drawn) <= max(drawn) <= longest
        assert len(set(drawn)) > 1, "those who were refused together come back together"


def test_closing_ends_the_calls_under_way_and_reads_no_more():
    began, over, withdrawn = threading.Event(), threading.Event(), []

    def ask(image):
        if image == 0:
            assert began.wait(60), "the first answer comes while others are under way"
            return image
        began.set()
        assert over.wait(60)
        raise Unavailable("withdrawn")

    def withdraw():
        withdrawn.append(True)
        over.set()

    taken = []
    images = (taken.append(number) or number for number in range(100))
    found = answers(images, ask, 2, withdraw)
    assert next(found).image == 0
    found.close()
    assert withdrawn == [True]
    assert len(taken) <= 3


async def test_closing_cancels_with_asyncio():
    cancelled = []

    async def ask(image):
        if image == 0:
            return image
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.append(image)
            raise

    found = answers_async(iter(range(100)), ask, 3)
    assert (await anext(found)).image == 0
    await found.aclose()
    assert cancelled == [1, 2]


def test_at_once_is_at_least_one(collect):
    with pytest.raises(InvalidOption, match="at_once must be at least 1, got 0"):
        collect("a", str, at_once=0)

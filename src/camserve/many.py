"""Asks for explanations of many images: a bounded number at once, answers in order of completion, failures kept apart.

Who asks is a parameter: a client's call, or an engine's.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Generic, TypeVar

from camserve.errors import CamserveError, InvalidOption, Overloaded, Unavailable
from camserve.types import Explanation

AT_ONCE = 8
"""Number of images asked at once: a server shares its steps among as many items."""

TRIES = 8
"""Number of times that an image is asked while the server has no room, or no worker, for it."""

FIRST_PAUSE_S = 0.5
"""Longest pause before the second try, where the server names none; each later one may be twice as long."""

LONGEST_PAUSE_S = 30.0

_Image = TypeVar("_Image")


@dataclass(frozen=True)
class Answered(Generic[_Image]):
    """Holds what came of one of many images: an explanation, or the error that it failed with."""

    index: int
    """Number of the image in the order in which images were given, from 0."""
    image: _Image
    """The image as it was given."""
    explanation: Explanation | None
    error: CamserveError | None


def answers(
    images: Iterable[_Image],
    ask: Callable[[_Image], Explanation],
    at_once: int = AT_ONCE,
    withdraw: Callable[[], None] = lambda: None,
) -> Iterator[Answered[_Image]]:
    """Yields an answer for each image as it comes; an image is taken from `images` once there is a place for it.

    Args:
        images: any number of images, which may be made while others are asked.
        ask: returns the explanation of one; called in threads.
        at_once: number of images asked at once.
        withdraw: ends the calls under way; called when the iterator is closed before its end.

    Raises:
        InvalidOption: `at_once` is below 1.
    """
    _check(at_once)
    stop, waiting = threading.Event(), dict[Future[Explanation], tuple[int, _Image]]()
    pool = ThreadPoolExecutor(at_once, "camserve many")
    try:
        for numbered in enumerate(images):
            waiting[pool.submit(_patiently, ask, numbered[1], stop)] = numbered
            if len(waiting) == at_once:
                yield from _done(waiting)
        while waiting:
            yield from _done(waiting)
    finally:
        stop.set()
        if waiting:
            withdraw()
        pool.shutdown(wait=False, cancel_futures=True)


async def answers_async(
    images: Iterable[_Image], ask: Callable[[_Image], Awaitable[Explanation]], at_once: int = AT_ONCE
) -> AsyncIterator[Answered[_Image]]:
    """Yields what `answers` yields; calls under way are cancelled when the iterator is closed before its end."""
    _check(at_once)
    waiting = dict[asyncio.Future[Explanation], tuple[int, _Image]]()
    try:
        for numbered in enumerate(images):
            waiting[asyncio.ensure_future(_patiently_async(ask, numbered[1]))] = numbered
            while len(waiting) == at_once:
                for answer in await _done_async(waiting):
                    yield answer
        while waiting:
            for answer in await _done_async(waiting):
                yield answer
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


def _check(at_once: int) -> None:
    if at_once < 1:
        raise InvalidOption(f"at_once must be at least 1, got {at_once}")


def _done(waiting: dict[Future[Explanation], tuple[int, _Image]]) -> Iterator[Answered[_Image]]:
    """Yields the answers of those that are done, at least one; they wait no longer."""
    done, _ = wait(waiting, return_when=FIRST_COMPLETED)
    for future in done:
        numbered = waiting.pop(future)
        yield _answered(numbered, future.exception(), future)


async def _done_async(
    waiting: dict[asyncio.Future[Explanation], tuple[int, _Image]],
) -> list[Answered[_Image]]:
    done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    return [_answered(waiting.pop(task), task.exception(), task) for task in done]


def _answered(
    numbered: tuple[int, _Image], error: BaseException | None, done: Future[Explanation] | asyncio.Future[Explanation]
) -> Answered[_Image]:
    """Returns an answer; raises what is no error of camserve's, for it is a fault of the program."""
    if error is None:
        return Answered(*numbered, done.result(), None)
    if not isinstance(error, CamserveError):
        raise error
    return Answered(*numbered, None, error)


def _patiently(ask: Callable[[_Image], Explanation], image: _Image, stop: threading.Event) -> Explanation:
    """Returns what `ask` returns; asks again, after a pause, while the server has no room or no worker."""
    for attempt in range(TRIES - 1):
        try:
            return ask(image)
        except (Overloaded, Unavailable) as error:
            if stop.wait(pause_s(error, attempt)):
                raise
    return ask(image)


async def _patiently_async(ask: Callable[[_Image], Awaitable[Explanation]], image: _Image) -> Explanation:
    for attempt in range(TRIES - 1):
        try:
            return await ask(image)
        except (Overloaded, Unavailable) as error:
            refusal = error
        await asyncio.sleep(pause_s(refusal, attempt))
    return await ask(image)


def pause_s(error: Overloaded | Unavailable, attempt: int) -> float:
    """Returns how many seconds to wait before the next try: at least what the server named.

    The rest is drawn, between half and all of a time that doubles with each attempt, so that callers who were refused
    together do not come back together.
    """
    named = (error.retry_after_s or 0.0) if isinstance(error, Overloaded) else 0.0
    longest = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**attempt)
    return named + random.uniform(longest / 2, longest)

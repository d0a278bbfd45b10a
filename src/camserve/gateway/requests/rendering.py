"""Makes and encodes the maps of replies, in threads: both take longer the larger the maps are."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any, TypeVar

from camserve.errors import Cancelled
from camserve.finalise.render import Background, lies_on
from camserve.finalise.results import Snapshot, maps_of
from camserve.gateway.requests.memory import picture_bytes
from camserve.gateway.requests.turns import Threads
from camserve.types import Cost, Explanation, InputView, Prediction, SaliencyMap
from camserve.types.request import FittedRequest

_T = TypeVar("_T")
Encode = Callable[[Iterable[SaliencyMap], Callable[[], Explanation]], Any]
"""Makes the reply of a door, its bytes or what they are made of, in a thread: first of the maps, which are made one by
one so that few are in memory at once, and then of the explanation without them, whose cost includes the time of the
maps."""
CostOf = Callable[[float], Cost]
"""Returns the cost of a request, given the seconds that rendering took."""


class Renderer:
    """Renders the replies of one gateway.

    Args:
        threads: threads that do the work.
    """

    def __init__(self, threads: Threads) -> None:
        self._threads = threads
        self._pixel_s = 0.0
        """Running mean of the time that making and encoding one pixel of a map takes."""

    def expected_s(self, fitted: FittedRequest) -> float:
        """Returns how many seconds the maps of a request will take."""
        return self._pixel_s * fitted.map_pixels

    async def _in_thread(self, fitted: FittedRequest, party: str, work: Callable[[], _T]) -> _T:
        """Returns what `work` returns, called in a thread once there is memory for the request's pictures."""
        return await self._threads.run(party, work, picture_bytes(fitted))

    async def maps(self, known: Snapshot, party: str) -> tuple[SaliencyMap, ...]:
        """Returns the maps of what is known so far."""
        with _abandoned_at_end() as abandoned:
            return await self._in_thread(known.fitted, party, lambda: tuple(_drawn(known, abandoned)))

    async def reply(
        self,
        known: Snapshot,
        party: str,
        encode: Encode,
        cost_of: CostOf,
        keep: Callable[[Explanation], None] | None,
    ) -> tuple[Any, Cost]:
        """Returns the encoded reply and its cost; hands the whole explanation to `keep`, where there is one."""
        with _abandoned_at_end() as abandoned:
            work = partial(_encoded, known, encode, cost_of, keep, abandoned)
            data, cost = await self._in_thread(known.fitted, party, work)
        # `expected_s` follows a running mean over about the last eight replies.
        pixel_s = cost.stage_seconds["render"] / max(1, known.fitted.map_pixels)
        self._pixel_s += (pixel_s - self._pixel_s) / 8
        return data, cost

    async def again(self, explanation: Explanation, fitted: FittedRequest, party: str, encode: Encode) -> Any:
        """Returns the encoded reply of an explanation that was kept."""

        def encoded() -> Any:
            beneath = _beneath(fitted, explanation.input)
            maps = (replace(saliency, lies_on=beneath) for saliency in explanation.maps)
            return encode(maps, lambda: replace(explanation, maps=()))

        return await self._in_thread(fitted, party, encoded)


def predictions(known: Snapshot) -> tuple[Prediction, ...]:
    """Returns the most probable classes with their labels."""
    return tuple(prediction.named(known.fitted.model) for prediction in known.opening.predictions)


def _encoded(
    known: Snapshot,
    encode: Encode,
    cost_of: CostOf,
    keep: Callable[[Explanation], None] | None,
    abandoned: threading.Event,
) -> tuple[Any, Cost]:
    """Returns the encoded reply and its cost; runs in a thread."""
    began_s, kept = perf_counter(), list[SaliencyMap]()

    def maps() -> Iterator[SaliencyMap]:
        for saliency in _drawn(known, abandoned):
            if keep is not None:
                kept.append(replace(saliency, lies_on=None))
            yield saliency

    def finish() -> Explanation:  # called after the maps were made, so that the cost includes them
        model, cost = known.fitted.model, cost_of(perf_counter() - began_s)
        view, environments = known.opening.view, known.environments
        return Explanation(model.name, model.version, predictions(known), (), view, cost, environments=environments)

    data = encode(maps(), finish)
    if keep is not None:
        keep(replace(finish(), maps=tuple(kept)))
    return data, cost_of(perf_counter() - began_s)


def _drawn(known: Snapshot, abandoned: threading.Event) -> Iterator[SaliencyMap]:
    """Yields the maps as the request wants them, with what an overlay is laid on.

    Raises:
        Cancelled: nobody waits for the maps any more.
    """
    beneath = _beneath(known.fitted, known.opening.view)
    for saliency in maps_of(known):
        if abandoned.is_set():
            raise Cancelled("nobody waits for this reply")
        yield replace(saliency, lies_on=beneath)


def _beneath(fitted: FittedRequest, view: InputView) -> Background | None:
    """Returns what an overlay is laid on; the other encodings do not need the image."""
    output = fitted.request.output
    return lies_on(fitted.request.image, view, output.size) if output.overlay else None


@contextmanager
def _abandoned_at_end() -> Iterator[threading.Event]:
    """Gives the block an event that is set at its end: what still runs in a thread then runs for nobody."""
    abandoned = threading.Event()
    try:
        yield abandoned
    finally:
        abandoned.set()

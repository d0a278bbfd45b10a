"""Has the parties of a gateway take turns: at reading messages, and at the threads in which long work is done.

A *party* is who takes turns: a token, or a connection where nobody needs a token.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from camserve.gateway.requests.memory import Gate

_T = TypeVar("_T")


class Turns:
    """Hands out a number of places; parties that wait get them in turn, and none has more than its share.

    Args:
        places: number of places.
        share: number of places that one party has at most.
        on_wait: called when somebody begins to wait.
    """

    def __init__(self, places: int, share: int, on_wait: Callable[[], None] = lambda: None) -> None:
        self._places = places
        self._share = share
        self._on_wait = on_wait
        self._taken: Counter[str] = Counter()
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    @property
    def crowded(self) -> bool:
        """Tells whether somebody waits and no place is free."""
        return bool(self._waiting) and self._taken.total() >= self._places

    async def take(self, party: str) -> None:
        """Returns once a place is the party's."""
        if party not in self._waiting and self._free(party):
            self._taken[party] += 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(party, deque()).append(turn)
        self._on_wait()
        self._let_in()
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # its turn had come just before
                self._taken -= Counter((party,))
            self._let_in()
            raise

    def give_back(self, party: str) -> None:
        """Gives back a place of a party."""
        self._taken -= Counter((party,))
        self._let_in()

    def _free(self, party: str) -> bool:
        return self._taken.total() < self._places and self._taken[party] < self._share

    def _let_in(self) -> None:
        """Gives free places to those who wait, one to each party in turn."""
        for party in list(self._waiting):
            if self._taken.total() >= self._places:
                return
            turns = self._waiting[party]
            while turns and turns[0].cancelled():
                turns.popleft()
            if turns and self._free(party):
                self._taken[party] += 1
                self._waiting.move_to_end(party)
                turns.popleft().set_result(None)
            if not turns:
                del self._waiting[party]


class Threads:
    """Does the long work of requests in a few threads; one is always left to others than the party that has most.

    Args:
        name: what the threads are called.
        size: number of threads, at least 2.
        needs: bound of the bytes in use by all work at once.
    """

    def __init__(self, name: str, size: int, needs: int) -> None:
        self._turns = Turns(size, size - 1)
        self._gate = Gate(needs)
        self._pool = ThreadPoolExecutor(size, thread_name_prefix=name)

    def close(self) -> None:
        """Ends the threads; work that they have not begun is dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def run(self, party: str, work: Callable[[], _T], needs: int = 0) -> _T:
        """Returns what `work` returns, called in a thread with the present context once it is the party's turn.

        A caller who is cancelled no longer waits, but what the work takes is taken until its thread is free.

        Args:
            party: who takes turns.
            work: function without arguments.
            needs: number of bytes that the work uses at once.
        """
        await self._turns.take(party)
        try:
            await self._gate.enter(needs)
        except BaseException:
            self._turns.give_back(party)
            raise
        loop = asyncio.get_running_loop()

        def leave() -> None:
            self._gate.leave(needs)
            self._turns.give_back(party)

        try:
            doing = self._pool.submit(contextvars.copy_context().run, work)
        except BaseException:  # the threads have ended
            leave()
            raise
        doing.add_done_callback(lambda _: _soon(loop, leave))
        return await asyncio.wrap_future(doing)


def _soon(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    with suppress(RuntimeError):  # the loop has ended
        loop.call_soon_threadsafe(call)

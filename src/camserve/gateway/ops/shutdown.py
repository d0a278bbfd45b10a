"""Runs a gateway until it is stopped: the first signal lets running requests finish, the second does not."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from camserve.gateway.ops.settings import Settings
from camserve.gateway.pool.discovery import torchserves
from camserve.gateway.server import Gateway

_log = logging.getLogger(__name__)


class Signals:
    """Keeps the signals, SIGTERM and SIGINT, that have come."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        """Set by the first signal: running requests may finish."""
        self.hurry = asyncio.Event()
        """Set by the second signal: nothing is waited for."""

    def take(self) -> None:
        """Notes that a signal has come."""
        (self.hurry if self.stop.is_set() else self.stop).set()


async def serve_alone(settings: Settings) -> None:
    """Runs a gateway in front of `settings.upstreams` until SIGTERM or SIGINT. Must be called in the main thread.

    Raises:
        InvalidOption: a port is taken.
    """
    with caught_signals() as signals:
        await run_until_stopped(Gateway(settings, torchserves(settings.upstreams)), signals, signals.stop.wait())


async def run_until_stopped(gateway: Gateway, signals: Signals, work: Coroutine[Any, Any, object]) -> None:
    """Starts the gateway, does the work until it ends or the first signal comes, then stops the gateway in peace."""
    await gateway.start()
    try:
        await before(signals.stop, work)
        _log.info("stopping: running requests have %g s to finish", gateway.drain_s)
        await before(signals.hurry, gateway.stop())
    finally:
        await gateway.stop(0)


async def before(event: asyncio.Event, work: Coroutine[Any, Any, object]) -> bool:
    """Does the work, or cancels it when the event comes first; returns whether it was done."""
    working, waiting = asyncio.create_task(work), asyncio.create_task(event.wait())
    try:
        await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
        done = working.done()
    finally:
        waiting.cancel()
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
    if done:
        working.result()  # raises what the work raised
    return done


@contextmanager
def caught_signals() -> Iterator[Signals]:
    """Has SIGTERM and SIGINT noted, instead of ending the process, as long as the block runs in the main thread."""
    loop, signals = asyncio.get_running_loop(), Signals()
    watched = (signal.SIGTERM, signal.SIGINT)
    for number in watched:
        loop.add_signal_handler(number, signals.take)
    try:
        yield signals
    finally:
        for number in watched:
            loop.remove_signal_handler(number)

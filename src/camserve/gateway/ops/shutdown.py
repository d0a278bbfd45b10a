"""Runs a gateway until it is stopped: the first signal lets running requests finish, the second does not.

SIGTERM and Ctrl-C (SIGINT) are the same. SIGHUP, which a terminal that closes sends, often more than once, begins a
stop and never cuts one short; it stays ignored where it was, as under `nohup`.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from camserve.errors import Unavailable
from camserve.gateway.ops.settings import Settings
from camserve.gateway.pool.discovery import torchserves
from camserve.gateway.server import Gateway

_log = logging.getLogger(__name__)


class Stoppable(Protocol):
    """A server that is stopped in peace, or at once; a second stop with a shorter grace cuts the first one short."""

    async def stop(self, grace_s: float | None = None) -> None:
        """Ends the server within `grace_s` seconds; None: as long as its settings allow."""


class Signals:
    """Keeps the signals that have come."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        """Set by the first signal: running requests may finish."""
        self.hurry = asyncio.Event()
        """Set by the second signal: nothing is waited for."""

    def take(self) -> None:
        """Notes a SIGTERM or SIGINT."""
        (self.hurry if self.stop.is_set() else self.stop).set()


async def serve_alone(settings: Settings) -> None:
    """Runs a gateway in front of `settings.upstreams` until a signal comes. Must be called in the main thread.

    Raises:
        InvalidOption: a port is taken.
        Unavailable: a second signal came, so that running requests were ended.
    """
    with caught_signals() as signals:
        await run_until_stopped(Gateway(settings, torchserves(settings.upstreams)), signals, signals.stop.wait())


async def run_until_stopped(gateway: Gateway, signals: Signals, work: Coroutine[Any, Any, object]) -> None:
    """Starts the gateway, does the work until it ends or the first signal comes, then stops the gateway in peace."""
    try:
        await gateway.start()
    except BaseException:
        work.close()  # or Python warns that it was never awaited
        raise
    try:
        await before(signals.stop, work)
        _log.info("stopping: running requests have %g s to finish", gateway.drain_s)
        await stopped(gateway, signals)
    finally:
        await gateway.stop(0)


async def stopped(server: Stoppable, signals: Signals) -> None:
    """Stops a server in peace; at once when the second signal has come, or comes meanwhile."""
    if not await before(signals.hurry, server.stop()):
        await server.stop(0)


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
    """Has signals noted, instead of ending the process, as long as the block runs in the main thread.

    Raises:
        Unavailable: at the end of a block that a second signal has cut short.
    """
    loop, signals = asyncio.get_running_loop(), Signals()
    actions = {signal.SIGTERM: signals.take, signal.SIGINT: signals.take}
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        actions[signal.SIGHUP] = signals.stop.set
    for number, action in actions.items():
        loop.add_signal_handler(number, action)
    try:
        yield signals
    finally:
        for number in actions:
            loop.remove_signal_handler(number)
    if signals.hurry.is_set():
        raise Unavailable("stopped at once by a second signal: running requests were ended")

"""TorchServe and the gateway as one service: started together, stopped together."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from camserve.errors import Unavailable
from camserve.gateway.server import Gateway
from camserve.gateway.settings import Settings
from camserve.gateway.upstream import TorchServeUpstream
from camserve.supervisor.config import ServeOptions
from camserve.supervisor.process import TorchServe, check_free

_log = logging.getLogger(__name__)


class _Signals:
    """SIGTERM and SIGINT as they come in."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        """The first: stop in peace."""
        self.hurry = asyncio.Event()
        """The second: stop now."""

    def take(self) -> None:
        (self.hurry if self.stop.is_set() else self.stop).set()


async def serve(settings: Settings, options: ServeOptions, *, ready: asyncio.Event | None = None) -> None:
    """Run TorchServe with the gateway in front of it until SIGTERM or SIGINT; to be called in the main thread.

    On a signal the gateway says NOT_SERVING and lets running requests finish, as long as `settings.drain_s` says; then
    TorchServe is stopped. A second signal cuts that short.

    Args:
        settings: of the gateway; the addresses of TorchServe in it are not used.
        options: of TorchServe.
        ready: set once a model has answered through the gateway.

    Raises:
        InvalidOption: a port is taken.
        NotFound: no Java, no TorchServe, or no such model.
        Unavailable: a model does not load or answer, or TorchServe died; the text has the last lines of its log.
    """
    for address in (settings.listen, settings.metrics_listen):
        check_free(address)  # before the seconds that TorchServe takes to start
    with _signals() as signals:
        torchserve = TorchServe(options)
        try:
            if await _before(signals.stop, torchserve.start()):
                await _serve(settings, torchserve, options, signals, ready)
        finally:
            await torchserve.stop()


async def _serve(
    settings: Settings, torchserve: TorchServe, options: ServeOptions, signals: _Signals, ready: asyncio.Event | None
) -> None:
    gateway = Gateway(settings, TorchServeUpstream(torchserve.grpc_address, torchserve.management_url))
    await gateway.start()
    try:
        await _before(signals.stop, _until_dead(gateway, torchserve, options, ready))
        _log.info("stopping: running requests have %g s to finish", settings.drain_s)
        await _before(signals.hurry, gateway.stop())
    finally:
        await gateway.stop(0)


async def _until_dead(
    gateway: Gateway, torchserve: TorchServe, options: ServeOptions, ready: asyncio.Event | None
) -> None:
    announcing = asyncio.create_task(_announce(gateway, torchserve, options, ready))
    dying = asyncio.create_task(torchserve.wait())
    try:
        await asyncio.wait({announcing, dying}, return_when=asyncio.FIRST_COMPLETED)
        if announcing.done():
            announcing.result()
        code = await dying
    finally:
        announcing.cancel()
        dying.cancel()
    raise Unavailable(f"TorchServe died (exit code {code}); the last lines of its log:\n{torchserve.log_tail}")


async def _announce(
    gateway: Gateway, torchserve: TorchServe, options: ServeOptions, ready: asyncio.Event | None
) -> None:
    await gateway.wait_ready(options.start_timeout_s)
    models = ", ".join(options.models)
    _log.info("ready: %s on %s; TorchServe's REST on %s", models, gateway.address, torchserve.inference_url)
    if ready is not None:
        ready.set()


async def _before(event: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Do the work, or cancel it at the event; whether it was done."""
    working, waiting = asyncio.create_task(work), asyncio.create_task(event.wait())
    try:
        await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
        done = working.done()
    finally:
        waiting.cancel()
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
    if done:
        working.result()
    return done


@contextmanager
def _signals() -> Iterator[_Signals]:
    loop, signals = asyncio.get_running_loop(), _Signals()
    watched = (signal.SIGTERM, signal.SIGINT)
    for number in watched:
        loop.add_signal_handler(number, signals.take)
    try:
        yield signals
    finally:
        for number in watched:
            loop.remove_signal_handler(number)

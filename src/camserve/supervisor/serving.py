"""Runs TorchServe and the gateway as one service, started and stopped together; or TorchServe alone."""

from __future__ import annotations

import asyncio
import logging
from typing import NoReturn

from camserve.errors import Unavailable
from camserve.gateway.ops.settings import Settings
from camserve.gateway.ops.shutdown import Signals, before, caught_signals, run_until_stopped, stopped
from camserve.gateway.pool.discovery import torchserves
from camserve.gateway.server import Gateway
from camserve.supervisor.process import TorchServe, check_free
from camserve.supervisor.settings import WorkerSettings

_log = logging.getLogger(__name__)


async def serve(settings: Settings, options: WorkerSettings, *, ready: asyncio.Event | None = None) -> None:
    """Runs TorchServe with the gateway in front of it until SIGTERM or SIGINT; must be called in the main thread.

    On a signal the gateway says NOT_SERVING and lets running requests finish for at most `settings.drain_s` seconds;
    then TorchServe is stopped. A second signal cuts that short: calls end with UNAVAILABLE, TorchServe is killed.

    Args:
        settings: settings of the gateway; the addresses of TorchServe in them are not used.
        options: settings of TorchServe; ports that were not set are chosen by the OS.
        ready: event that is set once a model has answered through the gateway.

    Raises:
        InvalidOption: a port is taken.
        NotFound: no Java, no TorchServe, or no such model.
        Unavailable: a model does not load or answer, or TorchServe died (the text has the last lines of its log); or a
            second signal came.
    """
    for address in (settings.listen, settings.metrics_listen):
        if address != "off":
            check_free(address)  # before the seconds that TorchServe takes to start
    with caught_signals() as signals:
        torchserve = TorchServe(options.on_free_ports())
        try:
            if await before(signals.stop, torchserve.start()):
                await _serve(settings, torchserve, options, signals, ready)
        finally:
            await stopped(torchserve, signals)


async def _serve(
    settings: Settings, torchserve: TorchServe, options: WorkerSettings, signals: Signals, ready: asyncio.Event | None
) -> None:
    gateway = Gateway(settings, torchserves([torchserve.backend]))
    await run_until_stopped(gateway, signals, _until_dead(gateway, torchserve, options, ready))


async def _until_dead(
    gateway: Gateway, torchserve: TorchServe, options: WorkerSettings, ready: asyncio.Event | None
) -> None:
    announcing = asyncio.create_task(_announce(gateway, torchserve, options, ready))
    dying = asyncio.create_task(_death(torchserve))
    try:
        await asyncio.wait({announcing, dying}, return_when=asyncio.FIRST_COMPLETED)
        if announcing.done():
            announcing.result()
        await dying
    finally:
        announcing.cancel()
        dying.cancel()


async def _announce(
    gateway: Gateway, torchserve: TorchServe, options: WorkerSettings, ready: asyncio.Event | None
) -> None:
    await gateway.wait_ready(options.start_timeout_s)
    models = ", ".join(options.models)
    _log.info("ready: %s on %s; TorchServe's REST on %s", models, gateway.address, torchserve.inference_url)
    if ready is not None:
        ready.set()


async def serve_worker(options: WorkerSettings, *, ready: asyncio.Event | None = None) -> None:
    """Runs TorchServe alone, for gateways elsewhere, until SIGTERM or SIGINT; must be called in the main thread.

    Args:
        options: settings of TorchServe.
        ready: event that is set once every worker is ready.

    Raises:
        InvalidOption: a port is taken.
        NotFound: no Java, no TorchServe, or no such model.
        Unavailable: a model does not load, or TorchServe died (the text has the last lines of its log); or a second
            signal came.
    """
    with caught_signals() as signals:
        torchserve = TorchServe(options)
        try:
            if not await before(signals.stop, torchserve.start()):
                return
            _log.info("ready: %s on %s", ", ".join(options.models), torchserve.backend)
            if ready is not None:
                ready.set()
            await before(signals.stop, _death(torchserve))
            _log.info("stopping: TorchServe has %g s", options.stop_timeout_s)
        finally:
            await stopped(torchserve, signals)


async def _death(torchserve: TorchServe) -> NoReturn:
    """Waits until TorchServe has died, or has lost its workers for good, and raises Unavailable."""
    dying, bereft = asyncio.create_task(torchserve.wait()), asyncio.create_task(torchserve.until_bereft())
    try:
        await asyncio.wait({dying, bereft}, return_when=asyncio.FIRST_COMPLETED)
        if bereft.done():
            raise bereft.result()
        code = dying.result()
        raise Unavailable(f"TorchServe died (exit code {code}); the last lines of its log:\n{torchserve.log_tail}")
    finally:
        dying.cancel()
        bereft.cancel()

"""Runs the HTTP door: uvicorn in the gateway's own event loop."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import uvicorn

from camserve.addresses import bound_socket
from camserve.gateway.web.app import Web
from camserve.gateway.web.connections import Connection, Room, most_connections

IDLE_S = 60.0
"""Seconds that a connection is kept between two requests."""

_HEAD_BYTES = 16 * 2**10


class WebServer:
    """Serves one application on a port.

    Args:
        app: the application.
        address: "host:port" to listen on; port 0: chosen by the OS.
        tls: files of the certificate chain, its key, and of the authorities whose clients are let in; None: plain text.

    Attributes:
        address: "host:port" on which it listens.

    Raises:
        InvalidOption: the port is taken, or the address is not of this machine.
    """

    def __init__(self, app: Web, address: str, tls: tuple[Path, Path, Path | None] | None) -> None:
        self._app = app
        self._socket = bound_socket(address)
        self.address = f"{address.rpartition(':')[0]}:{self._socket.getsockname()[1]}"
        most = most_connections()
        self._room = Room(most)
        self._backlog = max(1, most // 2)  # so many are accepted before one of them can be refused
        self._server = _Server(
            uvicorn.Config(
                app,
                http=partial(Connection, room=self._room, tls=_tls(tls)),  # type: ignore[arg-type]  # called as a class
                backlog=self._backlog,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,  # explain calls are logged as those of every door
                server_header=False,
                timeout_keep_alive=round(IDLE_S),
                h11_max_incomplete_event_size=_HEAD_BYTES,
                proxy_headers=False,
            )
        )
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to answer."""
        self._socket.listen(self._backlog)
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]), name="camserve web")

    def drain(self) -> None:
        """Has new requests refused from here on, while running ones finish."""
        self._app.draining = True

    async def stop(self) -> None:
        """Ends what is still open, and the port."""
        self._server.should_exit = self._server.force_exit = True
        self._room.end()
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)
        self._socket.close()


class _Server(uvicorn.Server):
    """Leaves signals to the gateway."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield


def _tls(files: tuple[Path, Path, Path | None] | None) -> ssl.SSLContext | None:
    if files is None:
        return None
    chain, key, authorities = files
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=authorities)
    context.load_cert_chain(chain, key)
    if authorities is not None:
        context.verify_mode = ssl.CERT_REQUIRED
    return context

"""Runs the HTTP door: uvicorn in the gateway's own event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from camserve.addresses import bound_socket
from camserve.gateway.web.app import Web

HEAD_S = 10.0
"""Seconds in which the head of a connection's first request has to come."""

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
        self._server = _Server(
            uvicorn.Config(
                app,
                http=_Protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,  # explain calls are logged as those of every door
                server_header=False,
                timeout_keep_alive=round(IDLE_S),
                h11_max_incomplete_event_size=_HEAD_BYTES,
                proxy_headers=False,
                **_tls(tls),
            )
        )
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to answer."""
        self._socket.listen(1024)
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]), name="camserve web")

    def drain(self) -> None:
        """Has new requests refused from here on, while running ones finish."""
        self._app.draining = True

    async def stop(self) -> None:
        """Ends what is still open, and the port."""
        self._server.should_exit = self._server.force_exit = True
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)
        self._socket.close()


class _Server(uvicorn.Server):
    """Leaves signals to the gateway."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield


class _Protocol(H11Protocol):
    """Closes a connection whose first request does not come: uvicorn waits for it without end."""

    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Sets the time in which the head of the first request has to come."""
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(HEAD_S, transport.close)

    def data_received(self, data: bytes) -> None:
        """Takes the time back once a head has come."""
        super().data_received(data)
        if self.cycle is not None and self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        """Takes the time back."""
        if self._head_timer is not None:
            self._head_timer.cancel()
        super().connection_lost(exc)


def _tls(files: tuple[Path, Path, Path | None] | None) -> dict[str, Any]:
    if files is None:
        return {}
    import ssl

    chain, key, authorities = files
    mutual = {"ssl_ca_certs": str(authorities), "ssl_cert_reqs": ssl.CERT_REQUIRED} if authorities else {}
    return {"ssl_certfile": str(chain), "ssl_keyfile": str(key), **mutual}

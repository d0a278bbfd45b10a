"""Bounds what a connection to the HTTP door may hold without asking, or taking, anything: time, and a place.

Uvicorn waits without end for the head of a request and for a client that does not read, keeps every connection, and
answers what is no HTTP in plain text.
"""

from __future__ import annotations

import asyncio
import resource
import ssl
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from camserve.gateway.web.exchange import SECURITY
from camserve.gateway.web.problems import PROBLEM_TYPE, problem, title

HEAD_S = 10.0
"""Seconds in which the head of a request has to come, from the connection on, or from its own first byte."""

SEND_S = 60.0
"""Seconds in which a client has to take some of what is sent to it."""

MOST = 1000
"""Largest number of connections."""


def most_connections() -> int:
    """Returns how many connections are kept at once: `MOST`, or half of the files that the process may have open."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST if files == resource.RLIM_INFINITY else max(1, min(MOST, files // 2))


class Room:
    """Holds the connections of a door to a bound: for one more, that which has asked nothing for longest has to go.

    Args:
        most: number of connections.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._open: set[Connection] = set()
        self._idle: dict[Connection, None] = {}

    def enter(self, connection: Connection) -> None:
        """Takes in a connection, which has asked nothing yet; it is refused where all others are being answered."""
        self._open.add(connection)
        self.wait(connection)
        if len(self._open) <= self._most:
            return
        longest = next(iter(self._idle))
        self.leave(longest)  # now: what takes its place is not to wait until it is closed
        if longest is connection:
            connection.refuse(503, "Overloaded", f"all {self._most} connections are being answered; try again later")
        else:
            longest.close()

    def wait(self, connection: Connection) -> None:
        """Notes that a connection asks nothing from now on."""
        self._idle.setdefault(connection)

    def ask(self, connection: Connection) -> None:
        """Notes that a connection has asked something."""
        self._idle.pop(connection, None)

    def leave(self, connection: Connection) -> None:
        """Forgets a connection."""
        self._open.discard(connection)
        self._idle.pop(connection, None)

    def end(self) -> None:
        """Closes the connections that ask nothing."""
        for connection in tuple(self._idle):
            connection.close()


class Connection(H11Protocol):
    """Speaks HTTP/1.1 on one connection, in a room with others; closes it when its client stalls.

    TLS is spoken here, and not before: a handshake that does not come takes a place as a head does.

    Args:
        room: the connections of the door.
        tls: certificates; None: plain text.
    """

    def __init__(self, *args: Any, room: Room, tls: ssl.SSLContext | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self._room, self._tls = room, tls
        self._handshake: asyncio.Task[None] | None = None
        self._early = b""
        """Data that came with the end of the handshake."""
        self._timer: asyncio.TimerHandle | None = None
        self._sending: asyncio.TimerHandle | None = None
        self._heard = False
        """Whether a part of a head has come."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Takes a place, and sets the time in which the head of the first request has to come."""
        self._timer = self.loop.call_later(HEAD_S, self._late)
        if self._tls is None:
            self._begin(transport)
        else:
            self.transport = transport
            transport.pause_reading()  # until the handshake reads
            self._handshake = self.loop.create_task(self._secure(transport, self._tls))
        self._room.enter(self)

    async def _secure(self, transport: asyncio.Transport, tls: ssl.SSLContext) -> None:
        try:
            secured = await self.loop.start_tls(transport, self, tls, server_side=True)
        except (OSError, asyncio.CancelledError):  # no TLS, a certificate that is not let in, or nothing in time
            transport.abort()
            self.connection_lost(None)
        else:
            assert secured is not None, "there is one for a server"
            self._begin(secured)
            if self._early:
                self.data_received(self._early)

    def _begin(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        # Whatever is not taken at once is seen to wait. Not 0: TLS takes an empty buffer for one that waits then.
        transport.set_write_buffer_limits(high=1)

    def data_received(self, data: bytes) -> None:
        """Sets the time in which a head that has begun has to be there, and takes it back once it is."""
        if self.flow is None:
            self._early += data
            return
        super().data_received(data)
        self._heard = self.cycle is None or self.cycle.response_complete
        if not self._heard:
            self._room.ask(self)
            self._forget_time()
        elif self._timer is None and not self.transport.is_closing():
            self._timer = self.loop.call_later(HEAD_S, self._late)

    def on_response_complete(self) -> None:
        """Has the connection wait for a next request, which may have come already."""
        super().on_response_complete()
        if self.cycle.response_complete and not self.transport.is_closing():
            self._room.wait(self)

    def pause_writing(self) -> None:
        """Looks again and again whether the client takes what waits for it."""
        super().pause_writing()
        self._look_later()

    def resume_writing(self) -> None:
        """Forgets what waited: it has been taken."""
        super().resume_writing()
        self._forget_sending()

    def connection_lost(self, exc: Exception | None) -> None:
        """Gives the place back."""
        self._forget_time()
        self._forget_sending()
        self._room.leave(self)
        if self.flow is not None:  # else TLS was never spoken
            super().connection_lost(exc)

    def close(self) -> None:
        """Closes the connection without a word."""
        if self._handshake is not None:
            self._handshake.cancel()
        self.transport.close()

    def refuse(self, status: int, kind: str, detail: str) -> None:
        """Closes the connection with a problem document, where no response has begun."""
        if self.flow is not None and self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            document = problem(status, detail, kind, "")
            told = [("content-type", PROBLEM_TYPE), ("content-length", str(len(document))), ("connection", "close")]
            told += [*SECURITY, *([("retry-after", "1")] if status == 503 else [])]
            for part in (
                h11.Response(status_code=status, headers=told, reason=title(status).encode()),
                h11.Data(data=document),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(part) or b"")
        self.close()

    def send_400_response(self, msg: str) -> None:
        """Answers what is no HTTP/1.1, under the name that uvicorn has for it."""
        self.refuse(400, "InvalidInput", "this is no request of HTTP/1.1, or its head is too large")

    def _late(self) -> None:
        self._timer = None
        if self._heard:
            self.refuse(408, "DeadlineExceeded", f"the head of the request did not come within {HEAD_S:g} s")
        else:
            self.close()

    def _forget_time(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look_later(self) -> None:
        left = self.transport.get_write_buffer_size()
        self._sending = self.loop.call_later(SEND_S, self._look, left)

    def _look(self, before: int) -> None:
        if self.transport.get_write_buffer_size() < before:
            self._look_later()
        else:
            self.transport.abort()

    def _forget_sending(self) -> None:
        if self._sending is not None:
            self._sending.cancel()
            self._sending = None

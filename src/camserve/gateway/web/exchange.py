"""Shows an HTTP exchange to the explain calls as they know calls: as gRPC's context, as far as they use it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from contextlib import suppress
from typing import Any, NoReturn

import grpc

from camserve.gateway.api import request_ids
from camserve.gateway.api.status import ERROR_KEY, RETRY_KEY
from camserve.gateway.web.problems import (
    HTTP_STATUS,
    PROBLEM_TYPE,
    STATUS_OF_KIND,
    ContentTooLarge,
    headers_of,
    problem,
)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


SECURITY = (
    ("cache-control", "no-store"),
    ("x-content-type-options", "nosniff"),
    ("referrer-policy", "no-referrer"),
    (
        "content-security-policy",
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
)
"""Headers of every answer: nothing is kept, nothing is loaded from elsewhere, and no other page frames this one."""

LINGER_S = 2.0
"""Seconds that the rest of a body is taken in, and forgotten, after its request was refused."""

LINGER_BYTES = 64 * 2**20


class Ended(Exception):  # it is no error: the client has its answer
    """Ends the handling of an exchange whose answer is complete."""


class Exchange:
    """Reads the body of one HTTP request, and writes its response.

    Args:
        scope: ASGI's description of the request.
        receive: ASGI's function that awaits parts of the body.
        send: ASGI's function that sends parts of the response.
        content_type: type of a response that is no problem.
        most_bytes: bound of the body.
        detail_also: further name of the detail in a problem document; "": none.

    Attributes:
        allows: the methods that the path takes, for a request by another one.
    """

    def __init__(
        self,
        scope: Message,
        receive: Receive,
        send: Send,
        *,
        content_type: str,
        most_bytes: int,
        detail_also: str = "",
    ) -> None:
        self.headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        self._scope, self._receive, self._send = scope, receive, send
        self._content_type, self._most_bytes, self._detail_also = content_type, most_bytes, detail_also
        self._headers: tuple[tuple[str, str], ...] = ()
        self.allows = ""
        self._until_s: float | None = None
        self._began = self._over = False
        self._read = asyncio.Event()

    async def read(self) -> bytes | None:
        """Returns the body.

        Raises:
            ContentTooLarge: it has more bytes than allowed; where the request says so, not one of them is read.
            CancelledError: the client has gone.
        """
        declared = self.headers.get("content-length", "")
        if declared.isdigit() and int(declared) > self._most_bytes:
            raise self._too_large()
        parts, size, more = list[bytes](), 0, True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise asyncio.CancelledError
            size += len(message.get("body", b""))
            if size > self._most_bytes:
                raise self._too_large()
            parts.append(message.get("body", b""))
            more = message.get("more_body", False)
        self._read.set()
        return b"".join(parts)

    def _too_large(self) -> ContentTooLarge:
        return ContentTooLarge(f"a body has at most {self._most_bytes} bytes here; this one has more")

    def allow(self, seconds: float | None) -> None:
        """Sets the seconds from now in which the client wants an answer; None: it does not say."""
        self._until_s = None if seconds is None else time.monotonic() + seconds

    def given(self, name: str) -> list[str]:
        """Returns all values of a header, which may be there several times."""
        return [value.decode("latin-1") for key, value in self._scope["headers"] if key == name.encode()]

    async def gone(self) -> None:
        """Returns when the client has gone, which can be seen once the body was read."""
        await self._read.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass

    def head(self, content_type: str, *headers: tuple[str, str]) -> None:
        """Sets the type of a response of status 200, and further headers of it, before its first part is sent."""
        self._content_type, self._headers = content_type, headers

    async def write(self, data: bytes) -> None:
        """Sends a part of a response of status 200."""
        await self._begin(200, self._content_type, self._headers)
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def finish(self) -> None:
        """Ends the response."""
        if self._began and not self._over:
            self._over = True
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def refuse(self, status: int, detail: str, kind: str, headers: Sequence[tuple[str, str]] = ()) -> None:
        """Answers with a problem document; as an event of a stream that has begun."""
        document = problem(status, detail, kind, request_ids.request_id(), self._detail_also)
        if self._began:
            await self._send({"type": "http.response.body", "body": event("problem", document), "more_body": True})
            await self.finish()
            return
        # What is left of the body is not read, so that no further request can come by this connection.
        closing = [] if self._read.is_set() else [("connection", "close")]
        told = [*headers, *closing, ("allow", self.allows), ("content-length", str(len(document)))]
        await self._begin(status, PROBLEM_TYPE, told)
        await self._send({"type": "http.response.body", "body": document, "more_body": True})
        await self._linger()
        await self.finish()

    async def _linger(self) -> None:
        """Takes in what is left of a body for a while: a client that still sends would see a reset, and no answer."""
        left = LINGER_BYTES
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while left > 0 and not self._read.is_set():
                    message = await self._receive()
                    left -= len(message.get("body", b""))
                    if not message.get("more_body", False):  # also at the end of the connection
                        break

    async def _begin(self, status: int, content_type: str, headers: Sequence[tuple[str, str]]) -> None:
        if self._began:
            return
        self._began = True
        told = [("content-type", content_type), (request_ids.KEY, request_ids.request_id()), *headers]
        told += SECURITY
        encoded = [(key.encode("latin-1"), value.encode("latin-1")) for key, value in told if value]
        await self._send({"type": "http.response.start", "status": status, "headers": encoded})

    # What follows are functions of gRPC's context, under its names.

    async def send_initial_metadata(self, metadata: Any) -> None:
        """Does nothing: the id goes out with the response's head."""

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> NoReturn:
        """Answers with the problem that a gRPC status stands for.

        Raises:
            Ended: always, once the answer has been sent.
        """
        told = dict(trailing_metadata)
        kind = str(told.get(ERROR_KEY, ""))
        status = STATUS_OF_KIND.get(kind, HTTP_STATUS.get(code, 500))
        await self.refuse(status, details, kind, headers_of(status, told.get(RETRY_KEY)))
        raise Ended

    def time_remaining(self) -> float | None:
        """Returns the seconds until the client's deadline; None where it has none."""
        return None if self._until_s is None else max(0.0, self._until_s - time.monotonic())

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        """Returns the headers of the request."""
        return tuple(self.headers.items())

    def peer(self) -> str:
        """Returns the connection by which the request came."""
        host, port = self._scope.get("client") or ("", 0)
        return f"http:{host}:{port}"


def event(name: str, data: bytes) -> bytes:
    """Returns a server-sent event; its data are JSON in one line."""
    return b"event: " + name.encode() + b"\ndata: " + data + b"\n\n"

"""Counts the bytes that requests take in the gateway, before they are taken.

What a request needs is known in two steps: its message once it is read, and its sums, maps and reply once it fits a
model. Each is held in a `Memory` as long as it lives; what does not fit is refused. Pictures are large for a moment
only: `Gate` has them wait for each other.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque

from camserve.errors import Overloaded
from camserve.types.request import FittedRequest

MESSAGE_COPIES = 2
"""Number of times that a message's bytes are in memory: as it came, and its image, which steps take to workers."""

REPLY_COPIES = 3
"""Number of times that a reply's bytes are in memory: its maps, its message, and the copy that gRPC sends."""

_FILE_BYTES = {"png": 0.5, "overlay_png": 2, "overlay_jpeg": 0.5}
"""Bytes of a pixel in a file, of a photo or of a map; what a reply really has is counted once it is made."""

_MAP_BYTES = 4
"""Bytes of a pixel of a map before it is encoded: a float32."""

PICTURE_BYTES = 12
"""Bytes of a pixel while a map is made and encoded: of the photo twice, and of the map; measured for every encoding."""


_LITTLE = 64
"""Part of a gate's bytes that is hardly anything."""


def answer_bytes(fitted: FittedRequest, news: bool = False) -> int:
    """Returns how many bytes the answer to a request takes: merged sums, maps, and the reply in all its forms.

    Args:
        fitted: the request.
        news: whether its caller gets news, whose maps are made all at once.
    """
    encoding = fitted.request.output.encoding
    pixel = fitted.request.output.pixel_bytes or _FILE_BYTES[encoding]
    reply = min(fitted.map_pixels * pixel, fitted.limits.message_bytes)
    maps = _MAP_BYTES * fitted.map_pixels if news and fitted.request.stream.max_maps else 0
    return fitted.sums_bytes + maps + REPLY_COPIES * math.ceil(reply)


def picture_bytes(fitted: FittedRequest) -> int:
    """Returns how many bytes are in use at once while the maps of a request are made, one after the other."""
    sizes = [fitted.map_size(method) for method in fitted.methods]
    if fitted.request.output.overlay:
        sizes.append(fitted.image_size)
    return PICTURE_BYTES * max((height * width for height, width in sizes), default=0)


class Memory:
    """Bounds the bytes of everything that is in flight.

    One request may take half of what is left, so that large ones leave room for small ones, whoever sends them.

    Args:
        size: the bound in bytes.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self.held = 0
        """Number of bytes that are held."""

    def hold(self, size: int) -> Held:
        """Returns bytes that count until they are let go; `with` lets them go at the end of its block.

        Raises:
            Overloaded: they are more than half of what is left.
        """
        held = Held(self)
        held.add(size)
        return held

    def room_for(self, size: int) -> bool:
        """Returns whether a request may take `size` bytes more."""
        return size <= (self._size - self.held) / 2


class Held:
    """Bytes of one request; they are let go at the end of a `with` block."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._size = 0

    def add(self, size: int) -> None:
        """Holds more bytes.

        Raises:
            Overloaded: they are more than half of what is left.
        """
        if not self._memory.room_for(size):
            raise Overloaded(
                f"the request and its answer take {size} bytes, and too many requests are in flight; try again later",
                reason="memory",
            )
        self._size += size
        self._memory.held += size

    def count(self, size: int) -> None:
        """Counts bytes that are there already, in place of all that were held before; they are never refused."""
        self._memory.held += size - self._size
        self._size = size

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *raised: object) -> None:
        self.count(0)


class Gate:
    """Lets work through, in order, as long as its bytes fit beside each other.

    Work that needs hardly anything waits for nobody, and is not counted.

    Args:
        size: bound of the bytes at once; what needs more than that by itself goes through alone.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._used = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def enter(self, size: int) -> None:
        """Returns once there is room for bytes; they are taken until `leave`."""
        if _LITTLE * size <= self._size:
            return
        if not self._waiting and self._fits(size):
            self._used += size
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # its turn had come just before
                self._used -= size
            self._let_in()
            raise

    def leave(self, size: int) -> None:
        """Gives back the bytes that were taken by `enter`."""
        if _LITTLE * size > self._size:
            self._used -= size
            self._let_in()

    def _let_in(self) -> None:
        while self._waiting and (self._waiting[0][1].cancelled() or self._fits(self._waiting[0][0])):
            size, turn = self._waiting.popleft()
            if not turn.cancelled():
                self._used += size
                turn.set_result(None)

    def _fits(self, size: int) -> bool:
        return not self._used or self._used + size <= self._size

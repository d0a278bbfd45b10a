"""Cuts the bytes of images out of a serialized message before protobuf parses the rest, and puts them into one.

Protobuf parses a message in one go, and nothing else runs in the process meanwhile: a minute's work for a message of
64 MiB that consists of a million small fields. So a message is walked over once, field by field, without being parsed.
The contents of its *bulk* fields, which hold the pixels, are stepped over and handed out as views, uncopied; what
remains is bounded in bytes, is small, and is parsed. In it each bulk field is there, but empty.

The other way, protobuf would copy an image into each of the messages around it. `within` writes a field of given bytes
around it instead, and all pieces are joined at once: a photo of 5 MB is copied once instead of seven times.

The format: https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from google.protobuf.message import DecodeError, Message

from camserve.errors import InvalidInput
from camserve.types.request import RequestLimits

_Message = TypeVar("_Message", bound=Message)

_VARINT, _FIXED64, _LENGTH, _GROUP, _GROUP_END, _FIXED32 = range(6)
_WIDTHS = {_FIXED64: 8, _FIXED32: 4, _GROUP: 0, _GROUP_END: 0}
_MAX_LENGTH = 2**31 - 1  # protobuf's own bound of everything that has a length
_CUT_BYTES = 256
"""Bytes of the bound that each cut uses up as well, since it takes longer than a step over a field; images have one."""

Fields = Mapping[int, "Fields | str"]
"""Bulk fields of a message by number: the name of a field that is bulk, or the bulk fields of a message inside."""


@dataclass(frozen=True)
class Cut(Generic[_Message]):
    """Holds a parsed message without its bulk, and the bulk."""

    message: _Message
    bulk: Mapping[str, list[memoryview]] = field(default_factory=dict)
    """Contents of each bulk field by its name, in the order of the message."""

    def last(self, name: str) -> memoryview:
        """Returns the last contents of a field, which count where a field comes once; none are empty."""
        return (self.bulk.get(name) or [memoryview(b"")])[-1]


def parse(kind: type[_Message], data: bytes, fields: Fields, limits: RequestLimits) -> Cut[_Message]:
    """Returns a message and its bulk.

    Args:
        kind: the message's class.
        data: the serialized message.
        fields: the bulk fields.
        limits: bounds the message without its bulk.

    Raises:
        InvalidInput: it is no such message, or has more bytes than that.
    """
    bulk: dict[str, list[memoryview]] = {}
    try:
        rest = _cut(memoryview(data), fields, limits.option_bytes, bulk)
        if rest is None:  # the walk ended where it was too much
            limits.check_options(limits.option_bytes + 1)
        return Cut(kind.FromString(rest or b""), bulk)
    except (DecodeError, IndexError):  # an IndexError: the message ends inside of a number
        raise InvalidInput(f"the message is no {kind.DESCRIPTOR.full_name}") from None


def _cut(view: memoryview, fields: Fields, room: int, bulk: dict[str, list[memoryview]]) -> bytes | None:
    """Returns the message in a view with all bulk fields empty, None if it has more than `room` bytes."""
    rest = bytearray()
    kept = place = 0  # what lies before `kept` is in `rest` already
    end = len(view)
    while place < end:
        if len(rest) + place - kept > room:
            return None
        tag, after = number(view, place)
        wire = tag & 7
        if wire == _LENGTH:
            length, start = number(view, after)
            stop = start + length
            if length > _MAX_LENGTH or stop > end:
                raise DecodeError("a field ends behind its message")
            known = fields.get(tag >> 3)
            if known is not None:
                room -= _CUT_BYTES
                rest += view[kept:after]
                if isinstance(known, str):
                    bulk.setdefault(known, []).append(view[start:stop])
                    rest += b"\0"
                elif (inner := _cut(view[start:stop], known, room - len(rest), bulk)) is not None:
                    rest += _varint(len(inner)) + inner
                else:
                    return None
                kept = stop
            place = stop
        elif wire == _VARINT:
            place = number(view, after)[1]
        elif wire in _WIDTHS:
            place = after + _WIDTHS[wire]
        else:
            raise DecodeError("no such wire type")
    rest += view[kept:]
    return bytes(rest) if len(rest) <= room else None


def number(view: memoryview, place: int) -> tuple[int, int]:
    """Returns the number that is written at a place in groups of seven bits, and the place behind it.

    Raises:
        DecodeError, IndexError: the number has no end.
    """
    byte = view[place]
    if byte < 128:
        return byte, place + 1
    value, shift = byte & 127, 7
    while byte >= 128:
        place += 1
        byte = view[place]
        value |= (byte & 127) << shift
        shift += 7
        if shift > 70:
            raise DecodeError("a number has more than ten bytes")
    return value, place + 1


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes((*out, value))


def within(number: int, *pieces: bytes) -> list[bytes]:
    """Returns the pieces of a serialized field that holds a message or bytes, given in pieces; nothing is copied."""
    return [_varint(number << 3 | _LENGTH) + _varint(sum(map(len, pieces))), *pieces]

"""Copies fields between our frozen values and protobuf messages where both have the same names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from google.protobuf.message import Message

_Made = TypeVar("_Made", bound=Message)
_Value = TypeVar("_Value")


def to_message(kind: type[_Made], value: Any, **special: Any) -> _Made:
    """Returns a message of a value: fields of the same name are copied, those that need a conversion are given."""
    same = [name for name in kind.DESCRIPTOR.fields_by_name if name not in special and hasattr(value, name)]
    return kind(**{name: getattr(value, name) for name in same}, **special)


def from_message(kind: type[_Value], message: Message, **special: Any) -> _Value:
    """Returns a value of a message: fields of the same name are copied, those that need a conversion are given.

    Repeated fields become tuples and maps dicts; an optional field that is absent becomes None.
    """
    known = message.DESCRIPTOR.fields_by_name
    names = [each.name for each in dataclasses.fields(kind) if each.name in known]  # type: ignore[arg-type]  # a dataclass
    return kind(**{name: _read(message, name) for name in names if name not in special}, **special)


def _read(message: Message, name: str) -> Any:
    field = message.DESCRIPTOR.fields_by_name[name]
    value = getattr(message, name)
    if field.has_presence:
        return value if message.HasField(name) else None
    if isinstance(value, Mapping):
        return dict(value)
    return tuple(value) if field.is_repeated else value

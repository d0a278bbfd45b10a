"""Reads JSON of strangers: one object, strictly, and of a bounded number of values."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, NoReturn

from camserve.errors import InvalidInput
from camserve.wording import shown

MOST_VALUES = 2**20
"""Most values in a text. Parsing takes about 0.1 s for each million of them, in which nothing else runs; an image in
base64, or in binary beside the text, is none of them."""

_URL_SAFE = str.maketrans("-_", "+/")


def read_object(text: bytes) -> dict[str, Any]:
    """Returns the members of a JSON object; a number may be infinite where it has too large an exponent.

    Raises:
        InvalidInput: it is none; the text says where. Names that come twice, NaN and Infinity are refused.
    """
    if sum(map(text.count, (b",", b"[", b"{"))) > MOST_VALUES:  # each value has one of them before it, or is alone
        raise InvalidInput(f"a JSON text has at most {MOST_VALUES} values; this one has more: send pixels in binary")
    try:
        values = json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        raise InvalidInput(f"the body is no JSON: {error.msg}, line {error.lineno}, column {error.colno}") from None
    except UnicodeDecodeError as error:
        raise InvalidInput(f"the body is no JSON: byte {error.start} is no UTF-8") from None
    except (RecursionError, ValueError) as error:  # brackets in brackets; a number of 5000 digits
        raise InvalidInput(f"the body is no JSON that is taken: {shown(str(error))}") from None
    if not isinstance(values, dict):
        raise InvalidInput(f"the body is a JSON object, got {shown(values)}")
    return values


def url_safe(text: str) -> str:
    """Returns base64 of either alphabet, with or without padding, as the standard one with padding."""
    standard = text.translate(_URL_SAFE)
    return standard + "=" * (-len(standard) % 4)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise InvalidInput(f"{shown(twice)} is there twice")
    return found


def _no_number(text: str) -> NoReturn:
    raise InvalidInput(f"{text} is no number of JSON")

"""Writes JSON in the one form that its hash is taken of: RFC 8785, the JSON Canonicalization Scheme.

Keys are sorted by their UTF-16 code units, nothing is between tokens, texts have no escapes but those that JSON needs,
and numbers are written as ECMAScript writes them: the shortest digits that give the same float64.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any


def canonical(value: Any) -> str:
    """Returns the canonical JSON of a value of texts, numbers, booleans, None, sequences and mappings.

    Raises:
        ValueError: a number is not finite.
        TypeError: a value is none of these, or a key is no text.
    """
    if value is None or isinstance(value, bool | str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, int | float):
        return _number(float(value))
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_key(key)}:{canonical(value[key])}" for key in sorted(value, key=_units)) + "}"
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return "[" + ",".join(map(canonical, value)) + "]"
    raise TypeError(f"{type(value).__name__} is nothing of JSON")


def sha256(content: bytes | memoryview) -> str:
    """Returns the SHA-256 of bytes, hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def _key(key: Any) -> str:
    return json.dumps(key, ensure_ascii=False)


def _units(key: Any) -> bytes:
    if not isinstance(key, str):
        raise TypeError(f"a key is a text, got {key!r}")
    return key.encode("utf-16-be")


def _number(value: float) -> str:
    """Returns a number as ECMA-262 writes it, section 6.1.6.1.20, Number::toString."""
    if not math.isfinite(value):
        raise ValueError(f"{value} is no number of JSON")
    if value == 0:
        return "0"  # of -0 as well
    sign = "-" if value < 0 else ""
    mantissa, _, power = f"{abs(value)!r}".partition("e")
    whole, _, fraction = mantissa.partition(".")
    fraction = "" if fraction == "0" else fraction
    digits = (whole + fraction).lstrip("0")
    point = len(whole) + int(power or 0) - (len(whole + fraction) - len(digits))  # places before the point
    digits = digits.rstrip("0")
    if len(digits) <= point <= 21:
        return sign + digits + "0" * (point - len(digits))
    if 0 < point <= 21:
        return f"{sign}{digits[:point]}.{digits[point:]}"
    if -6 < point <= 0:
        return f"{sign}0.{'0' * -point}{digits}"
    exponent = f"e{point - 1:+d}"
    return sign + digits[0] + (f".{digits[1:]}" if len(digits) > 1 else "") + exponent

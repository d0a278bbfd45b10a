"""Canonical JSON against RFC 8785's own tables, and against the JSON that it is read back as."""

from __future__ import annotations

import json
import math
import struct

import hypothesis.strategies as st
import pytest
from hypothesis import given

from camserve.evidence.canonical import canonical

NUMBERS = {
    "0000000000000000": "0",
    "8000000000000000": "0",
    "0000000000000001": "5e-324",
    "8000000000000001": "-5e-324",
    "7fefffffffffffff": "1.7976931348623157e+308",
    "ffefffffffffffff": "-1.7976931348623157e+308",
    "4340000000000000": "9007199254740992",
    "c340000000000000": "-9007199254740992",
    "4430000000000000": "295147905179352830000",
    "44b52d02c7e14af5": "9.999999999999997e+22",
    "44b52d02c7e14af6": "1e+23",
    "44b52d02c7e14af7": "1.0000000000000001e+23",
    "444b1ae4d6e2ef4e": "999999999999999700000",
    "444b1ae4d6e2ef4f": "999999999999999900000",
    "444b1ae4d6e2ef50": "1e+21",
    "3eb0c6f7a0b5ed8c": "9.999999999999997e-7",
    "3eb0c6f7a0b5ed8d": "0.000001",
    "41b3de4355555553": "333333333.3333332",
    "41b3de4355555554": "333333333.33333325",
    "41b3de4355555555": "333333333.3333333",
    "41b3de4355555556": "333333333.3333334",
    "41b3de4355555557": "333333333.33333343",
    "becbf647612f3696": "-0.0000033333333333333333",
    "43143ff3c1cb0959": "1424953923781206.2",
}
"""RFC 8785, appendix B: the bits of a float64, and how it is written."""


@pytest.mark.parametrize("bits", NUMBERS)
def test_numbers_are_written_as_the_rfc_writes_them(bits: str):
    (number,) = struct.unpack(">d", bytes.fromhex(bits))
    assert canonical(number) == NUMBERS[bits]


def test_keys_and_texts_are_those_of_the_rfc():
    """Its sections 3.2.2 and 3.2.3: sorted by UTF-16 code units, where an emoji comes before a Hebrew letter."""
    names = ["\u20ac", "\r", "\ufb33", "1", "\U0001f600", "\u0080", "\u00f6"]
    assert canonical(dict.fromkeys(names, 1)) == (
        '{"\\r":1,"1":1,"\u0080":1,"\u00f6":1,"\u20ac":1,"\U0001f600":1,"\ufb33":1}'
    )
    assert canonical({"string": '\u20ac$\u000f\nA\'B"\\\\"/'}) == '{"string":"\u20ac$\\u000f\\nA\'B\\"\\\\\\\\\\"/"}'
    assert canonical({"literals": [None, True, False], "n": [333333333.33333329, 1e30, 4.5, 2e-3, 1e-27]}) == (
        '{"literals":[null,true,false],"n":[333333333.3333333,1e+30,4.5,0.002,1e-27]}'
    )


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inside: (
        st.lists(inside, max_size=4)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inside, max_size=4)
    ),
    max_leaves=12,
)


@given(VALUES)
def test_what_is_written_is_read_as_the_same_and_written_again_alike(value):
    text = canonical(value)
    assert json.loads(text, parse_int=float) == value  # as the RFC reads numbers: all of them are float64
    assert canonical(json.loads(text)) == text


@pytest.mark.parametrize("value", [math.nan, math.inf, {1: 2}, b"bytes", {"a": object()}])
def test_what_json_has_not_is_refused(value):
    with pytest.raises((ValueError, TypeError)):
        canonical(value)

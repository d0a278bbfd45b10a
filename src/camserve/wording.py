"""Words what errors and log lines say of texts that strangers made up: quoted, bounded, and what was perhaps meant."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable
from itertools import islice

SHOWN_CHARACTERS = 100
"""Number of characters of a client's text that an error or a log line shows at most."""

_SHORT_CHARACTERS = 64
"""Length up to which a text is compared with known names; the time that takes grows with the square of it."""

_MOST_NAMES = 5000
"""Number of known names that a text is compared with at most."""

_repr = reprlib.Repr()
_repr.maxstring = SHOWN_CHARACTERS
_repr.maxother = _repr.maxlong = SHOWN_CHARACTERS


def shown(value: object) -> str:
    """Returns what is shown of a client's value: as Python writes it, with at most `SHOWN_CHARACTERS` characters.

    The middle of what is longer is left out. Control characters are escaped.
    """
    text = _repr.repr(value)
    return text if len(text) <= SHOWN_CHARACTERS + 2 else f"{text[:SHOWN_CHARACTERS]}..."


def close_to(text: str, known: Iterable[str], most: int = 5, cutoff: float = 0.6) -> list[str]:
    """Returns the known names that look like a text, the closest first; none for a long text.

    Args:
        text: what somebody wrote.
        known: names; the first `_MOST_NAMES` are looked at.
        most: number of names that are returned at most.
        cutoff: least likeness in 0..1, as `difflib.SequenceMatcher.ratio` has it.
    """
    if len(text) > _SHORT_CHARACTERS:
        return []
    return difflib.get_close_matches(text, list(islice(known, _MOST_NAMES)), most, cutoff)

"""Turns class names into class indices."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from camserve.errors import InvalidOption
from camserve.wording import close_to, shown


def resolve_label(label: str, labels: Sequence[str]) -> int:
    """Returns the index of a label; case, and '_' and '-' against ' ', do not matter.

    Raises:
        InvalidOption: no such label (the text names close ones), or several classes share it (it names their indices).
    """
    folded = _folded(tuple(labels))
    found = folded.get(_fold(label), ())
    if len(found) == 1:
        return found[0]
    if found:
        raise InvalidOption(f"label {shown(label)} names classes {', '.join(map(str, found))}: use the index")
    near = close_to(_fold(label), folded)
    hint = f"; close to it: {', '.join(repr(labels[folded[name][0]]) for name in near)}" if near else ""
    raise InvalidOption(f"unknown label {shown(label)}{hint}")


def _fold(label: str) -> str:
    return " ".join(label.casefold().replace("_", " ").replace("-", " ").split())


@lru_cache(maxsize=64)
def _folded(labels: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    folded: dict[str, tuple[int, ...]] = {}
    for index, label in enumerate(labels):
        folded[_fold(label)] = (*folded.get(_fold(label), ()), index)
    return folded

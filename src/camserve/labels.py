"""Turns class names into class indices."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from camserve.errors import InvalidOption
from camserve.types import Prediction, Target
from camserve.wording import close_to, shown


def parse_target_text(text: str) -> Target:
    """Returns the target of a text: `281` a class index, `top3` the three most probable classes, all else a label."""
    if re.fullmatch(r"\d{1,18}", text, re.ASCII):
        return Target(index=int(text))
    top = re.fullmatch(r"top(\d{1,18})", text, re.ASCII)
    return Target(top_k=int(top[1])) if top else Target(label=text)


def resolve_target(target: Target, labels: Sequence[str]) -> Target:
    """Returns the target with its label, if it has one, replaced by the index; an index is checked against the range.

    Raises:
        InvalidOption: unknown or ambiguous label, or index out of range.
    """
    if target.label is not None:
        return Target(index=resolve_label(target.label, labels))
    number, what = (target.index, "class index") if target.index is not None else (target.top_k, "top_k")
    low, high = (0, len(labels) - 1) if target.index is not None else (1, len(labels))
    if number is None or not low <= number <= high:
        raise InvalidOption(f"{what} must be {low}..{high}, got {shown(number)}")
    return target


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


def with_label(prediction: Prediction, labels: Sequence[str]) -> Prediction:
    """Returns the prediction with its class name filled in."""
    return replace(prediction, label=labels[prediction.index])


def _fold(label: str) -> str:
    return " ".join(label.casefold().replace("_", " ").replace("-", " ").split())


@lru_cache(maxsize=64)
def _folded(labels: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    folded: dict[str, tuple[int, ...]] = {}
    for index, label in enumerate(labels):
        folded[_fold(label)] = (*folded.get(_fold(label), ()), index)
    return folded

"""Chooses the method of a request that leaves the choice to the server: the most faithful one that fits its time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from camserve.errors import InvalidOption
from camserve.planning.cost import in_words

SAFETY = 1.25
"""What is predicted to take 1 s must fit into so many seconds: others come, and steps vary."""

Spec = TypeVar("Spec")


@dataclass(frozen=True)
class Rung(Generic[Spec]):
    """A method that may be chosen."""

    name: str
    """In words: "group_cam with 32 groups"."""
    spec: Spec
    queries: int


@dataclass(frozen=True)
class Choice(Generic[Spec]):
    """What was chosen, and why."""

    rung: Rung[Spec]
    reason: str
    """A sentence for the reply."""


def choose(ladder: Sequence[Rung[Spec]], predicted_s: Callable[[int], float | None], budget_s: float) -> Choice[Spec]:
    """The most faithful rung that is predicted to fit; the first one fits always.

    Args:
        ladder: from the cheapest to the most faithful; a rung may well be cheaper than one before it.
        predicted_s: seconds that a request of so many queries would take; None as long as nothing is known.
        budget_s: time that there is.

    Raises:
        InvalidOption: the ladder is empty.
    """
    if not ladder:
        raise InvalidOption("the ladder of automatic methods is empty; it needs at least one")
    above: tuple[Rung[Spec], float] | None = None
    for rung in reversed(ladder):
        seconds = predicted_s(rung.queries)
        if seconds is None:
            return Choice(ladder[0], f"no step was measured yet; {ladder[0].name} is the cheapest")
        if rung is ladder[0] or seconds * SAFETY <= budget_s:
            return Choice(rung, _reason(rung, seconds, above, budget_s))
        above = rung, seconds
    raise AssertionError("the first rung fits always")


def _reason(rung: Rung[Spec], seconds: float, above: tuple[Rung[Spec], float] | None, budget_s: float) -> str:
    takes, budget = in_words(seconds), in_words(budget_s)
    if above is None:
        return f"{rung.name}, the most faithful, takes {takes} of {budget}"
    better, better_s = above
    return f"{better.name} would take {in_words(better_s)} of {budget}; {rung.name} takes {takes}"

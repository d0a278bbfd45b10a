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
    """The most faithful rung that is predicted to fit; the cheapest one fits always.

    Args:
        ladder: from the least to the most faithful.
        predicted_s: seconds that a request of so many queries would take; None as long as nothing is known.
        budget_s: time that there is.

    Raises:
        InvalidOption: the ladder is empty.
    """
    if not ladder:
        raise InvalidOption("the ladder of automatic methods is empty; it needs at least one")
    cheapest = min(ladder, key=lambda rung: rung.queries)
    above: tuple[Rung[Spec], float] | None = None
    for rung in reversed(ladder):
        seconds = predicted_s(rung.queries)
        if seconds is None:
            return Choice(cheapest, f"no step was measured yet; {cheapest.name} is the cheapest")
        if seconds * SAFETY <= budget_s:
            return Choice(rung, _reason(rung, seconds, above, budget_s))
        if rung is not cheapest:
            above = rung, seconds
    return Choice(cheapest, _reason(cheapest, predicted_s(cheapest.queries) or 0.0, above, budget_s))


def _reason(rung: Rung[Spec], seconds: float, above: tuple[Rung[Spec], float] | None, budget_s: float) -> str:
    takes, budget = in_words(seconds), in_words(budget_s)
    if above is None:
        return f"{rung.name}, the most faithful, takes {takes} of {budget}"
    better, better_s = above
    return f"{better.name} would take {in_words(better_s)} of {budget}; {rung.name} takes {takes}"

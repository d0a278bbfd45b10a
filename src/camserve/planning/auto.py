"""Chooses the method of a request that leaves the choice to the server: the most faithful one that fits its time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from camserve.errors import InvalidOption
from camserve.planning.cost import in_words

SAFETY = 1.25
"""Seconds into which what is predicted to take 1 s must fit: other requests come, and steps vary."""

Spec = TypeVar("Spec")


@dataclass(frozen=True)
class Candidate(Generic[Spec]):
    """A method that may be chosen."""

    name: str
    """Name of the method in the reason: "group_cam with 32 groups"."""
    spec: Spec
    """The request as it would be with the candidate."""
    work_s: float
    """Seconds of one worker's work, as far as can be said; they tell the cheapest while nothing was measured."""


@dataclass(frozen=True)
class Choice(Generic[Spec]):
    """The candidate that was chosen, and the reason."""

    candidate: Candidate[Spec]
    reason: str
    """Reason of the choice, for the reply."""


def choose(
    ladder: Sequence[Candidate[Spec]], predicted_s: Callable[[Candidate[Spec]], float | None], budget_s: float
) -> Choice[Spec]:
    """Returns the most faithful candidate that is predicted to fit, or the cheapest one where none does.

    Args:
        ladder: the candidates, from the least to the most faithful.
        predicted_s: says how many seconds a request for a candidate would take; None as long as nothing is known. The
            cheapest candidate is the one with the smallest prediction.
        budget_s: how many seconds the request may take.

    Raises:
        InvalidOption: the ladder is empty.
    """
    if not ladder:
        raise InvalidOption("the ladder of automatic methods is empty; it needs at least one")
    known = [(candidate, seconds) for candidate in ladder if (seconds := predicted_s(candidate)) is not None]
    if len(known) < len(ladder):
        least = min(ladder, key=lambda candidate: candidate.work_s)
        return Choice(least, f"no step was measured yet; {least.name} is the cheapest")
    cheapest, least_s = min(known, key=lambda pair: pair[1])
    above: tuple[Candidate[Spec], float] | None = None
    for candidate, seconds in reversed(known):
        if seconds * SAFETY <= budget_s:
            return Choice(candidate, _reason(candidate, seconds, above, budget_s))
        if candidate is not cheapest:
            above = candidate, seconds
    return Choice(cheapest, _reason(cheapest, least_s, above, budget_s))


def _reason(
    candidate: Candidate[Spec], seconds: float, above: tuple[Candidate[Spec], float] | None, budget_s: float
) -> str:
    """Returns why a candidate was chosen; `above` is the next more faithful one, which would take too long."""
    takes, budget = in_words(seconds), in_words(budget_s)
    if above is None:
        return f"{candidate.name}, the most faithful, takes {takes} of {budget}"
    better, better_s = above
    return f"{better.name} would take {in_words(better_s)} of {budget}; {candidate.name} takes {takes}"

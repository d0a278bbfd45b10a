"""Steps on their way, among them those that take suspiciously long."""

from __future__ import annotations

import math
from dataclasses import dataclass

from camserve.planning.heap import Heap
from camserve.planning.places import Place
from camserve.planning.step import Slice, Step
from camserve.planning.work import Request


@dataclass(eq=False)
class Piece:
    """A slice on its way; a step and its copy carry the same one."""

    request: Request
    part: Slice
    carriers: int = 1
    """Steps from which it has not come back."""
    settled: bool = False
    """It is accounted for; a later answer is ignored."""


@dataclass(frozen=True, eq=False)
class Flight:
    """A step on its way."""

    step: Step
    place: Place
    predicted_s: float
    due_s: float
    """After this time it is overdue."""
    pieces: dict[int, Piece]
    """By request; those that have not come back."""


class Flights:
    """All steps on their way."""

    def __init__(self) -> None:
        self._flying: dict[int, Flight] = {}
        self._due: Heap[int] = Heap()  # steps that may become overdue; a copy is not copied again
        self._overdue: dict[int, Flight] = {}

    def __len__(self) -> int:
        return len(self._flying)

    def add(self, flight: Flight) -> None:
        """A step has been sent."""
        self._flying[flight.step.number] = flight
        original = flight.step.copy_of
        if original is not None:
            del self._overdue[original]
        elif flight.due_s < math.inf:
            self._due.put(flight.step.number, (flight.due_s,))

    def land(self, step: int, request: int) -> Piece:
        """One slice has come back, or is lost."""
        piece = self._flying[step].pieces.pop(request)
        piece.carriers -= 1
        return piece

    def over(self, step: int) -> Flight | None:
        """The flight, if all its slices have landed; it is then forgotten."""
        flight = self._flying[step]
        if flight.pieces:
            return None
        self._due.drop(step)
        self._overdue.pop(step, None)
        return self._flying.pop(step)

    def overdue(self, now_s: float) -> list[Flight]:
        """Steps that should have come back and have not been copied, the first due first."""
        while (step := self._due.first()) is not None and self._flying[step].due_s <= now_s:
            self._due.drop(step)
            self._overdue[step] = self._flying[step]
        return list(self._overdue.values())

    def next_due_s(self, now_s: float) -> float | None:
        """When the next step becomes overdue."""
        step = self._due.first()
        return None if step is None or self._flying[step].due_s <= now_s else self._flying[step].due_s

"""Keeps the steps in flight, and knows which of them are overdue."""

from __future__ import annotations

import math
from dataclasses import dataclass

from camserve.planning.backends import BackendState
from camserve.planning.heap import Heap
from camserve.planning.live import LiveRequest
from camserve.planning.step import Attempt, Slice, Step


@dataclass(eq=False)
class SentSlice:
    """A slice in flight; a step and its copy carry the same object, so that it is accounted for once."""

    request: LiveRequest
    slice_: Slice
    carriers: int = 1
    """Number of steps that carry the slice and have not come back."""
    settled: bool = False
    """Whether the slice is accounted for; a later answer is then ignored."""
    lost: tuple[Attempt, ...] = ()
    """The attempts at which it was lost, of those that count: a step and its copy are one, unless it was alone."""

    def loses(self, attempt: Attempt) -> None:
        """Notes that a step that carried the slice is lost."""
        if attempt.alone or not self.carriers:
            self.lost = (*self.lost, attempt)


@dataclass(frozen=True, eq=False)
class SentStep:
    """A step in flight, with what has not come back of it."""

    step: Step
    backend: BackendState
    due_s: float
    """Time from which on the step is overdue."""
    slices: dict[int, SentSlice]
    """Slices that have not come back, by the number of their request."""


class StepsInFlight:
    """Holds all steps in flight."""

    def __init__(self) -> None:
        self._sent: dict[int, SentStep] = {}
        # Each original is in `_due` until its time has come, then in `_overdue` until it is copied or has come back.
        # Copies are in neither: they are not copied again.
        self._due: Heap[int] = Heap()
        self._overdue: dict[int, SentStep] = {}

    def __len__(self) -> int:
        return len(self._sent)

    def add(self, sent: SentStep) -> None:
        """Notes that a step was sent. A step that has been copied is never overdue again, and its copy never at all."""
        self._sent[sent.step.number] = sent
        original = sent.step.copy_of
        if original is not None:
            del self._overdue[original]
        elif sent.due_s < math.inf:
            self._due.put(sent.step.number, (sent.due_s,))

    def carries(self, step: int, request: int) -> bool:
        """Tells whether the slice of a request in a step has not come back."""
        return step in self._sent and request in self._sent[step].slices

    def sent(self, step: int) -> SentStep:
        """Returns a step in flight; raises KeyError where it has come back or was never sent."""
        return self._sent[step]

    def find(self, step: int, request: int) -> SentSlice:
        """Returns the slice of a request in a step; raises KeyError where it has come back or was never sent."""
        return self._sent[step].slices[request]

    def land(self, step: int, request: int) -> SentSlice:
        """Notes that the slice of a request in a step has come back, or is lost; returns it."""
        found = self._sent[step].slices.pop(request)
        found.carriers -= 1
        return found

    def over(self, step: int) -> SentStep | None:
        """Returns the step and forgets it if all its slices have landed, else None."""
        sent = self._sent[step]
        if sent.slices:
            return None
        self._due.drop(step)
        self._overdue.pop(step, None)
        return self._sent.pop(step)

    def overdue(self, now_s: float) -> list[SentStep]:
        """Returns the steps that are overdue and have not been copied, the first due first."""
        while (step := self._due.first()) is not None and self._sent[step].due_s <= now_s:
            self._due.drop(step)
            self._overdue[step] = self._sent[step]
        return list(self._overdue.values())

    def next_due_s(self, now_s: float) -> float | None:
        """Returns the time at which the next step becomes overdue; None where none will."""
        self.overdue(now_s)  # what is overdue by now leaves the heap
        step = self._due.first()
        return None if step is None else self._sent[step].due_s

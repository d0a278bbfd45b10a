"""Predicts when a worker of a backend will be free: TorchServe begins steps in the order in which they come."""

from __future__ import annotations

from bisect import bisect_left, insort


class Schedule:
    """Keeps the steps in flight of one backend: those that run, by their predicted end, and those at hand."""

    def __init__(self) -> None:
        self._end_s: dict[int, float] = {}  # predicted ends of the steps that run
        self._ends: list[float] = []  # the same, in their order
        self._at_hand: dict[int, float] = {}  # seconds of the steps that wait for a worker, first come first

    def __len__(self) -> int:
        return len(self._end_s) + len(self._at_hand)

    def sends(self, step: int, expected_s: float, workers: int, now_s: float) -> None:
        """Notes that a step is sent."""
        self._at_hand[step] = expected_s
        self.begin(workers, now_s)

    def gets_back(self, step: int, workers: int, now_s: float) -> None:
        """Notes that a step has come back or is lost; the next one at hand begins."""
        if (end_s := self._end_s.pop(step, None)) is not None:
            del self._ends[bisect_left(self._ends, end_s)]
        else:
            del self._at_hand[step]
        self.begin(workers, now_s)

    def begin(self, workers: int, now_s: float) -> None:
        """Has steps at hand begin now, as long as a worker is free."""
        while self._at_hand and len(self._end_s) < workers:
            step = next(iter(self._at_hand))
            self._end_s[step] = now_s + self._at_hand.pop(step)
            insort(self._ends, self._end_s[step])

    def free_s(self, workers: int) -> float:
        """Returns when a worker is predicted to be free for one more step. All workers are busy.

        Each step at hand takes the worker that is free before. Where there are more of them than workers, the last end
        that is known counts, which is early.
        """
        before = len(self) - workers
        return self._ends[min(before, len(self._ends) - 1)]

    def left_s(self, now_s: float) -> float:
        """Returns the seconds that the steps in flight still take, added up; steps that are late take none."""
        return sum(max(0.0, end_s - now_s) for end_s in self._ends) + sum(self._at_hand.values())

"""Defines the bounds of steps, of the queue, and of those who ask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from camserve.errors import InvalidOption

if TYPE_CHECKING:
    from camserve.types import Priority  # numpy comes with it

CLASSES: tuple[Priority, ...] = ("interactive", "normal", "batch")
"""The classes of requests, the most urgent first."""


@dataclass(frozen=True)
class Owner:
    """Someone who asks, with bounds of its own."""

    name: str = ""
    """Name of the owner; empty for nobody, for whom no bounds hold."""
    requests: int | None = None
    """Number of requests of the owner that are taken on at once; None: as many as the limits allow."""
    waiting_s: float | None = None
    """Seconds of one worker's work that all requests of the owner may have waiting or reserved, by prediction."""
    part: float = 1.0
    """Part of the number of requests, and of the work that may wait, that the owner has at most."""
    connection: str = ""
    """Whose turns the requests of nobody take, where connections take turns."""

    @property
    def party(self) -> str:
        """Whose turns the requests take: those of the owner, or of the connection."""
        return self.name or self.connection


NOBODY = Owner()
"""The owner of requests that count against no bounds but those of the server."""


@dataclass(frozen=True)
class Limits:
    """Bounds the steps of one model, and its queue."""

    target_s: float = 0.3
    """Time that a step shall take. The learnt cost turns it into queries."""
    queries: int = 512
    """The most queries in a step, whatever the learnt cost says."""
    items: int = 8
    """The most requests in a step, each with an image of its own."""
    size_bytes: int = 40 * 2**20
    """Bytes that the requests of a step may add to its messages; a request alone is always let in."""
    share: float = 0.5
    """Share of a step's time for queries, and of its queries, that one request takes at most while others wait."""
    steps_per_worker: int = 2
    """Number of steps that a backend has at once for each of its workers: one runs, the next is at hand."""
    age_s: float = 10.0
    """Time after which a request counts as one class better; see `camserve.planning.queue`."""

    requests: int = 128
    """Number of requests that are taken on at once."""
    waiting_s: float = 1200.0
    """Seconds of work that may wait or be reserved for each worker that is there, by prediction."""

    straggler_factor: float = 3.0
    """A step is overdue when it takes this many times as long as predicted, but never before `straggler_s`."""
    straggler_s: float = 1.0
    """A step is never overdue before this time."""
    forget_s: float = 300.0
    """A worker that has not answered for this time no longer counts."""
    lead_s: float = 0.01
    """A step for a worker that is busy is sent this long before the worker is predicted to be free, or half of the
    target time before, if that is less. It covers the way there and back, planning, and what a prediction is off."""

    losses: int = 3
    """Steps lost in a row that quarantine a backend; see `camserve.planning.blame`."""
    pause_s: float = 1.0
    """Time for which a backend is in quarantine at first; twice as long each time that it loses steps again."""
    most_pause_s: float = 60.0
    """The longest such time."""

    def __post_init__(self) -> None:
        if self.items < 2 or self.queries < 2:
            raise InvalidOption(f"a step has at least 2 queries and 2 items, got {self.queries} and {self.items}")
        if not 0 < self.share <= 1:
            raise InvalidOption(f"a request's share of a step must be above 0 and at most 1, got {self.share}")
        if self.losses < 1 or not 0 < self.pause_s <= self.most_pause_s:
            raise InvalidOption(
                "losses must be at least 1 and pause_s above 0 and at most most_pause_s, "
                f"got {self.losses}, {self.pause_s} and {self.most_pause_s}"
            )
        if self.lead_s < 0:
            raise InvalidOption(f"lead_s must not be negative, got {self.lead_s}")
        if min(self.target_s, self.age_s, self.forget_s) <= 0 or self.steps_per_worker < 1:
            raise InvalidOption(
                "target_s, age_s and forget_s must be above 0 and steps_per_worker at least 1, "
                f"got {self.target_s}, {self.age_s}, {self.forget_s} and {self.steps_per_worker}"
            )

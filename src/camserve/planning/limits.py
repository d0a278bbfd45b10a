"""The bounds of steps and of the queue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from camserve.errors import InvalidOption

if TYPE_CHECKING:
    from camserve.types import Priority  # numpy comes with it

CLASSES: tuple[Priority, ...] = ("interactive", "normal", "batch")
"""The most urgent first."""


@dataclass(frozen=True)
class Owner:
    """Who asks, with bounds of its own."""

    name: str = ""
    """Empty: nobody, for whom no bounds hold."""
    requests: int | None = None
    """Taken on at once; None: as many as the limits allow."""
    waiting_queries: int | None = None


NOBODY = Owner()


@dataclass(frozen=True)
class Limits:
    """Bounds of the steps of one model, and of its queue."""

    target_s: float = 0.3
    """How long a step shall take: 0.3 s on a CPU, 0.03 s on a GPU. The fitted cost turns it into queries."""
    queries: int = 512
    """Masked queries in a step, whatever the fitted cost says."""
    items: int = 8
    """Requests in a step, each with an image of its own."""
    size_bytes: int = 40 * 2**20
    """What the requests of a step add to its messages; a request alone is always let in."""
    share: float = 0.5
    """Part of a step's queries that one request takes at most while others wait."""
    steps_per_worker: int = 2
    """Steps at a place for each of its workers: one runs, the next is at hand."""
    age_s: float = 10.0
    """After this time a request counts as one class better; see `camserve.planning.queue`."""

    requests: int = 128
    """Requests taken on at once."""
    waiting_queries: int = 100_000

    straggler_factor: float = 3.0
    """A step that takes so many times as long as predicted is overdue, ..."""
    straggler_s: float = 1.0
    """... but never before this time."""
    forget_s: float = 300.0
    """A worker that was not heard of for so long no longer counts."""

    def __post_init__(self) -> None:
        if self.items < 2 or self.queries < 2:
            raise InvalidOption(f"a step has at least 2 queries and 2 items, got {self.queries} and {self.items}")
        if not 0 < self.share <= 1:
            raise InvalidOption(f"a request's share of a step must be above 0 and at most 1, got {self.share}")
        if min(self.target_s, self.age_s, self.forget_s) <= 0 or self.steps_per_worker < 1:
            raise InvalidOption(
                "target_s, age_s and forget_s must be above 0 and steps_per_worker at least 1, "
                f"got {self.target_s}, {self.age_s}, {self.forget_s} and {self.steps_per_worker}"
            )

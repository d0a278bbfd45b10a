"""Who calls, and what it may ask for. Knows neither gRPC nor files.

Whoever handles a call asks `caller()`; `camserve.gateway.guard` has set it by the call's token.
"""

from __future__ import annotations

import math
from contextvars import ContextVar
from dataclasses import dataclass

from camserve.errors import Overloaded
from camserve.planning import CLASSES, Owner
from camserve.types import Priority


@dataclass(frozen=True)
class Caller:
    """One who calls; the bounds hold for all calls with its token together. None: no bound of its own."""

    name: str = ""
    """Empty for everybody where nobody needs a token."""
    priority: Priority = "interactive"
    """The best class that it may ask for."""
    requests_per_s: float | None = None
    """Explain calls in a second, in the long run."""
    burst: int = 1
    """Calls that may come at once after a pause."""
    max_requests: int | None = None
    """Taken on at once, for each model."""
    max_waiting_queries: int | None = None
    """Masked queries that wait, for each model."""

    @property
    def owner(self) -> Owner:
        """Whose the requests are, for the planner."""
        return Owner(self.name, self.max_requests, self.max_waiting_queries)

    def capped(self, asked: Priority) -> Priority:
        """The class that is asked for, or the best that is allowed."""
        return max(asked, self.priority, key=CLASSES.index)


ANYONE = Caller()

_caller: ContextVar[Caller] = ContextVar("camserve_caller", default=ANYONE)


def caller() -> Caller:
    """Who made the call that is being answered; `ANYONE` where tokens are off."""
    return _caller.get()


def set_caller(found: Caller) -> None:
    """To be called once in the task that answers a call."""
    _caller.set(found)


class Rates:
    """How fast each caller calls: a token bucket by name, with the bounds that it has at the moment of a call."""

    def __init__(self) -> None:
        self._buckets: dict[str, tuple[float, float]] = {}  # (calls left, when that was)

    def check(self, who: Caller, now_s: float) -> None:
        """Counts a call.

        Raises:
            Overloaded: it is one too many; the hint says when there is room for one.
        """
        if who.requests_per_s is None:
            return
        left, then_s = self._buckets.get(who.name, (math.inf, now_s))
        left = min(left + (now_s - then_s) * who.requests_per_s, float(who.burst))
        self._buckets[who.name] = (left, now_s) if left < 1 else (left - 1, now_s)
        if left < 1:
            raise Overloaded(
                f"at most {who.requests_per_s:g} requests per second of {who.name}, {who.burst} at once; "
                "try again later",
                (1 - left) / who.requests_per_s,
                "token_rate",
            )

"""What a request asks of the planner, position by position."""

from __future__ import annotations

from dataclasses import dataclass

from camserve.methods.work import Kind


@dataclass(frozen=True)
class Demand:
    """The numbered queries of one position of a request: of a method at a layer, or of a map's curves."""

    kind: Kind
    """What each of them costs: `weight` units of this kind."""
    queries: int | None
    """How many there are; None where that is not known yet."""
    most: int
    """Upper bound of `queries`, which is what a request is admitted by; equal to `queries` where that is known."""
    weight: int = 1
    """Units of each query; an upper bound as long as `queries` is None."""

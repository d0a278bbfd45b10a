"""Defines what a request asks of the planner, position by position."""

from __future__ import annotations

from dataclasses import dataclass

from camserve.methods.work import Kind


@dataclass(frozen=True)
class Demand:
    """The numbered queries of one position of a request: a part, a ranking, or the curves of a map."""

    kind: Kind
    """Kind of work that a query is; each costs `weight` units of it."""
    queries: int | None
    """Number of queries; None where it is not known yet."""
    most: int
    """Upper bound of `queries`, by which the request is admitted; equal to `queries` where that is known."""
    weight: int = 1
    """Number of units that each query costs; an upper bound as long as `queries` is None."""
    usual: int | None = None
    """Number of queries that are enough for most requests of its kind, by which the time that it takes is predicted;
    None: all are asked."""
    piece: int = 1
    """Number of queries that are asked together, from multiples of it on; the last ones may be fewer."""

"""Translates a request into the currency of the planner: units of work by kind, bounded before they are known."""

from __future__ import annotations

import math
from collections.abc import Callable

from camserve.finalise.results import rankings
from camserve.methods.work import Work, decoded_units
from camserve.planning import Demand
from camserve.types.parts import Part
from camserve.types.request import FittedRequest


def opening_of(fitted: FittedRequest) -> tuple[Work, ...]:
    """Returns the work that cannot be divided and is done with the opening.

    That is decoding, forward passes, and methods that are made in one go.
    """
    layers = {part.layer.name for part in fitted.parts}
    whole = [part.work(fitted.max_targets) for part in fitted.parts if not part.queries(1)]
    references = fitted.references
    pixels = sum(decoded_units(size) for size in (fitted.image_size, *references))
    decoding = [Work("decode", pixels)] if pixels else []
    return (*decoding, Work("opening", max(1, len(layers)) + fitted.made_vectors), *whole)


UsualShare = Callable[[Part], float]
"""Function that returns the share of its queries that is usually enough for a part that may stop early."""


def all_queries(part: Part) -> float:
    """Returns 1: the most that a part may ask."""
    return 1.0


def demands_of(
    fitted: FittedRequest, targets: int | None = None, usual: UsualShare = all_queries
) -> tuple[Demand, ...]:
    """Returns the demand of every position: of the parts, of the rankings, of the curves.

    Args:
        fitted: the request.
        targets: number of classes that are explained; None as long as the opening has not told. Until then the curves,
            whose maps are not known, have one position together.
        usual: says how much of a part is usually enough.
    """
    most = fitted.max_targets if targets is None else targets
    known = fitted.known_targets if targets is None else targets
    piece = fitted.piece or 1
    parts = [_demand(part, known, most, usual, piece) for part in fitted.parts]
    ranked = [Demand("ranking", None, 1, most)] * rankings(fitted)
    maps, each = len(fitted.methods) * most, fitted.curve_queries
    if not each:
        return (*parts, *ranked)
    curves = [Demand("masked_forward", None, maps * each, piece=piece)]
    if targets is not None:
        curves = [Demand("masked_forward", None, each, piece=piece)] * maps
    return (*parts, *ranked, *curves)


def _demand(part: Part, known: int | None, most: int, usual: UsualShare, piece: int) -> Demand:
    """Returns the demand of a part; its number of queries is known where that does not depend on the targets."""
    upper = part.queries(most)
    depends = part.queries(1) != part.queries(2)
    queries = None if known is None and depends else upper
    enough = math.ceil(usual(part) * upper) if part.stops_early else None
    return Demand(part.work(most).kind, queries, upper, part.method.weight(most), enough, piece)

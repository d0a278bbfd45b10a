"""Estimates how far a map is from that of all queries, from how it has changed while queries were answered.

The largest difference between the map of n blocks of queries and that of all of them is estimated as

    FACTOR (1 + FEW / n) d x^POWER,    x = (1 - e(n)) / (1 - e(m) / e(n)),

where d is the largest change of the map since m blocks, at most half as many; e(n) is the share of the energy (see
`camserve.types.Partial`) that the first n blocks have. x is how much is missing for each part of what has come since
m. Where queries come in no order (RISE) the map is a running mean, and all blocks have the same energy. Between the
mean of n and that of n / 2 of them lies a standard error of the mean of n, and between it and that of all N that times
sqrt(1 - n / N): there the power is 1/2.

The numbers are fitted by benchmarks/tolerance.py, so that the true difference is below the estimate in 95 % of the maps
that are not complete, on networks and images of which it has seen one half only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from camserve.finalise.finish import finished
from camserve.finalise.maps import normalise, normalise_signed
from camserve.methods import MethodSpec
from camserve.types import Partial

FACTOR, FEW, POWER, POWER_OF_MEANS = 2.0, 32, 0.75, 0.5
LEAST_BLOCKS, LEAST_SHARE, MOST_SHARE = 32, 0.05, 0.9
"""No map is taken to be within a tolerance before this many blocks, and the first share of them, have been answered.
Nor is one beyond the second share: little would be saved, and one that is missing may be what cancels all others."""
GROWTH = 1.25
"""Blocks of queries that are asked until the next look for each that has been answered, where a worker asks alone."""

_SEEN = 64
"""Places of a map in each direction at which it is looked at: the maps of masks of few cells are smooth."""
_APART = 1.1
"""Blocks that have been answered at one look that is kept for each that had been at the one before."""


@dataclass(frozen=True)
class _Look:
    """Holds the maps after some blocks of queries."""

    blocks: int
    maps: np.ndarray
    """Scaled as final maps are, (targets, h, w), float32."""
    degenerate: np.ndarray
    """Whether a map is constant, (targets,)."""


class Convergence:
    """Follows the maps of one part of a request, one for each target, while its queries are answered.

    Args:
        method: the method of the part, with the largest difference that is accepted.
        queries: number of all its queries.
        energies: energies of the blocks in the order in which they are asked; empty where all are the same.
        signed: whether the maps have negative evidence as well.
    """

    def __init__(self, method: MethodSpec, queries: int, energies: Sequence[float], signed: bool) -> None:
        self._method, self._queries, self._signed = method, queries, signed
        blocks = queries // method.block
        known = np.asarray(energies if any(energies) else np.ones(blocks), np.float64)
        self._power = POWER if energies else POWER_OF_MEANS
        self._share = np.concatenate([[0.0], np.cumsum(known / known.sum())])
        self._looks: list[_Look] = []
        self.estimates: tuple[float, ...] | None = None
        """Estimated largest difference of each target's map to that of all queries; None as long as there is none."""
        self.may_be_enough = False
        """Whether the estimates count: not at the beginning, nor just before the end."""
        self.enough = False
        """Whether the maps are within the tolerance of the method, so that no further query need be asked."""

    def note(self, partial: Partial, answered: int) -> None:
        """Looks at the maps after a number of answered queries. Once they are enough, no estimate grows any more."""
        now = self._look(partial, answered)
        found = self._estimated(now, answered)
        if self.enough and self.estimates is not None and found is not None:
            found = tuple(map(min, self.estimates, found))
        self.estimates = found or self.estimates
        if not self._looks or now.blocks >= _APART * self._looks[-1].blocks:
            self._looks.append(now)
        blocks = len(self._share) - 1
        self.may_be_enough = max(LEAST_BLOCKS, LEAST_SHARE * blocks) <= now.blocks <= MOST_SHARE * blocks
        within = found is not None and max(found) <= self._method.accepted_difference
        self.enough |= within and self.may_be_enough

    def _look(self, partial: Partial, answered: int) -> _Look:
        sums = finished(self._method, partial, self._signed)
        steps = [-(-side // _SEEN) for side in sums.shape[1:]]
        scale = normalise_signed if self._signed else normalise
        scaled = [scale(one[:: steps[0], :: steps[1]]) for one in sums]
        maps, degenerate = zip(*scaled, strict=True)
        return _Look(answered // self._method.block, np.stack(maps), np.array(degenerate))

    def _estimated(self, now: _Look, answered: int) -> tuple[float, ...] | None:
        if answered >= self._queries:
            return (0.0,) * len(now.maps)
        while len(self._looks) > 1 and self._looks[1].blocks <= now.blocks / 2:
            del self._looks[0]  # nobody looks back that far any more
        if not self._looks or not 0 < self._looks[0].blocks <= now.blocks / 2:
            return None
        before, share = self._looks[0], self._share
        change = np.max([np.abs(now.maps - look.maps).max(axis=(1, 2)) for look in self._looks], axis=0)
        since = 1 - share[before.blocks] / share[now.blocks]
        missing = max(0.0, 1 - share[now.blocks]) / max(since, np.finfo(np.float64).tiny)
        estimates = FACTOR * (1 + FEW / now.blocks) * change * missing**self._power
        most = 2.0 if self._signed else 1.0  # of such maps no two differ by more
        unknown = now.degenerate | before.degenerate  # nothing has come yet that could have changed
        return tuple(np.where(unknown, most, np.minimum(estimates, most)).tolist())


def looks(blocks: int) -> list[int]:
    """Returns after how many of a part's blocks a worker that asks alone looks at the map, all of them included."""
    found, done = [], max(LEAST_BLOCKS, int(LEAST_SHARE * blocks)) // 2
    while done < blocks:
        found.append(done)
        done = math.ceil(done * GROWTH)
    return [*found, blocks]

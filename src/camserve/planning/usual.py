"""Learns which share of its queries a method needs that may stop early, so that its time can be predicted.

How much that is depends on the network: a Score-CAM within 0.05 asked a quarter of 1280 channels of EfficientNet-Lite0,
and all 64 of a small vision transformer (benchmarks/tolerance.py). So what was seen last counts, and only until
anything was seen a number for all.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Hashable

UNSEEN = 0.5
"""Share that is taken to be usual of what was not seen yet."""
_LAST = 16
"""Number of maps of a kind that are remembered. The largest share of them is the usual one: a request that is taken on
for less than it needs may be late."""


class UsualShares:
    """Remembers which share of their queries was asked of the last maps, by whatever tells their kinds apart."""

    def __init__(self) -> None:
        self._seen: dict[Hashable, deque[float]] = defaultdict(lambda: deque(maxlen=_LAST))

    def note(self, kind: Hashable, share: float, enough: bool = True) -> None:
        """Notes that a map has asked a share, in 0..1; one that was not enough counts if it is more than is usual."""
        if enough or share > self.of(kind):
            self._seen[kind].append(share)

    def of(self, kind: Hashable) -> float:
        """Returns the share that is usually enough."""
        return max(self._seen.get(kind, ()), default=UNSEEN)

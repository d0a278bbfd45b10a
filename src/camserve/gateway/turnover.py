"""Tells a worker that was replaced from one that is merely new. Knows neither TorchServe nor the clock."""

from __future__ import annotations


class Turnover:
    """The READY workers of one model at one place, from look to look.

    A worker that was never seen before counts as a replacement if another one has gone; while the first ones come up,
    none has.
    """

    def __init__(self) -> None:
        self._ready: frozenset[str] = frozenset()
        self._seen: set[str] = set()
        self._vacant = 0
        """Workers that have gone and were not replaced yet."""

    def replaced(self, ready: frozenset[str]) -> int:
        """How many of those that are READY now have come in the place of others since the last look."""
        came = ready - self._ready
        self._vacant += len(self._ready - ready)
        back = came & self._seen
        self._vacant -= min(len(back), self._vacant)
        replaced = min(len(came - back), self._vacant)
        self._vacant -= replaced
        self._ready = ready
        self._seen |= ready
        return replaced

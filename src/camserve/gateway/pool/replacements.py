"""Tells a worker that replaces another from one that is merely new. Knows neither TorchServe nor the clock."""

from __future__ import annotations


class Replacements:
    """Counts the replaced workers of one model at one backend, from look to look.

    A worker that was never seen before replaces another if one has gone and was not replaced yet. While the first
    workers come up, none has gone.
    """

    def __init__(self) -> None:
        self._ready: frozenset[str] = frozenset()
        self._seen: set[str] = set()
        self._vacant = 0
        """Number of workers that have gone and were not replaced yet."""

    def found(self, ready: frozenset[str]) -> int:
        """Returns how many of the workers that are READY now have replaced others since the last look."""
        came = ready - self._ready
        self._vacant += len(self._ready - ready)
        # A worker that was seen before has come back, and fills its own gap instead of replacing another.
        back = came & self._seen
        self._vacant -= min(len(back), self._vacant)
        replaced = min(len(came - back), self._vacant)
        self._vacant -= replaced
        self._ready = ready
        self._seen |= ready
        return replaced

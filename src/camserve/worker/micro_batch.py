"""Keeps how many images one pass of a network takes: less for a while after memory has run out."""

from __future__ import annotations

CALM_STEPS = 100
"""Number of steps without a want of memory after which twice as many images are tried again."""


class MicroBatch:
    """Holds the number of images of a pass, which changes no result.

    Args:
        whole: number of images while there is memory enough.
    """

    def __init__(self, whole: int) -> None:
        self.size = whole
        """Number of images that a pass takes at most."""
        self._whole = whole
        self._calm = 0

    def halve(self, tried: int | None = None) -> bool:
        """Takes half as many images as were tried, or as are taken now; returns whether that is less than before."""
        self._calm = 0
        before, self.size = self.size, max(1, min(self.size, tried or self.size) // 2)
        return self.size < before

    def answered(self) -> None:
        """Counts a step; after many since the last want of memory, twice as many images are taken."""
        self._calm += 1
        if self._calm >= CALM_STEPS:
            self._calm, self.size = 0, min(self._whole, 2 * self.size)

"""Finds how many images a pass should have, from passes that are made anyway."""

from __future__ import annotations

from collections import defaultdict

MOST = 64
"""Images of a pass at most."""
PAYS = 0.9
"""Share of the time of an image that a pass of twice as many may take, to be made."""
TRIES = 2
"""Passes of a size that are looked at: the first one may have something to set up."""


class PassSize:
    """Finds the number of images of a pass at which an image takes the least time; may be used from several threads.

    The number is doubled as long as that pays. Large linear layers read their weights once for a pass, and small
    operations take as long for many images as for one: there it does. With convolutions of many places it does not.
    """

    def __init__(self) -> None:
        self._took: dict[int, list[float]] = defaultdict(list)

    def size(self, least: int) -> int:
        """Returns how many images the next pass should have, `least` or twice, four times, ... as many."""
        size = least
        while self._is_known(size) and 2 * size <= MOST:
            if self._is_known(2 * size) and min(self._took[2 * size]) > PAYS * min(self._took[size]):
                break
            size *= 2
        return size

    def add(self, images: int, seconds: float) -> None:
        """Learns from the number of images of a pass, and the seconds that it took."""
        if not self._is_known(images):
            self._took[images].append(seconds / images)

    def _is_known(self, images: int) -> bool:
        return len(self._took[images]) >= TRIES

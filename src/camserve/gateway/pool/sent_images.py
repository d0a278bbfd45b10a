"""Remembers which images a backend has got, so that their bytes do not travel with every step."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterable
from dataclasses import replace

from camserve.types import Item

MANY = 4096
"""Number of images remembered for each backend. A worker that has forgotten one says so, and gets it again."""


class SentImages:
    """Keeps the digests of the images that were sent, by backend."""

    def __init__(self) -> None:
        self._digests: dict[str, OrderedDict[bytes, None]] = defaultdict(OrderedDict)

    def lightened(self, backend: str, item: Item) -> Item:
        """Returns the item, without its image where the backend has got that."""
        return replace(item, image=None) if item.digest in self._digests[backend] else item

    def note(self, backend: str, digests: Iterable[bytes]) -> None:
        """Notes that a backend has got images."""
        known = self._digests[backend]
        for digest in digests:
            known[digest] = None
            known.move_to_end(digest)
        while len(known) > MANY:
            known.popitem(last=False)

    def forget(self, backend: str) -> None:
        """Forgets a backend, whose workers may be others when it comes back."""
        self._digests.pop(backend, None)

"""Implements a priority queue whose entries can be changed and dropped."""

from __future__ import annotations

import heapq
from typing import Generic, TypeVar

Key = tuple[float, ...]
Name = TypeVar("Name", int, str)


class Heap(Generic[Name]):
    """Holds names by key, the smallest first, each name at most once.

    An entry that is changed or dropped stays behind in the heap and is skipped when it comes up. The heap is rebuilt
    when most of it is such leftovers, so that every call costs O(log n) on average.
    """

    def __init__(self) -> None:
        self._keys: dict[Name, Key] = {}
        self._heap: list[tuple[Key, Name]] = []

    def __len__(self) -> int:
        return len(self._keys)

    def put(self, name: Name, key: Key) -> None:
        """Adds a name, or changes its key."""
        if self._keys.get(name) == key:
            return
        self._keys[name] = key
        if len(self._heap) < 2 * len(self._keys) + 16:
            heapq.heappush(self._heap, (key, name))
        else:
            self._heap = [(each_key, each) for each, each_key in self._keys.items()]
            heapq.heapify(self._heap)

    def drop(self, name: Name) -> None:
        """Removes a name, if it is there."""
        self._keys.pop(name, None)

    def first(self) -> Name | None:
        """Returns the name with the smallest key; None when the heap is empty."""
        while self._heap:
            key, name = self._heap[0]
            if self._keys.get(name) == key:
                return name
            heapq.heappop(self._heap)
        return None

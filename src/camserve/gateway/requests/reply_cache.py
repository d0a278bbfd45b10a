"""Keeps explanations that were given before, for those who ask the same again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import replace

from camserve.types import Explanation, SaliencyMap
from camserve.types.request import FittedRequest

_OVERHEAD_BYTES = 1024
"""Bytes that an explanation, and each of its maps, is taken to need beside its arrays."""


class ReplyCache:
    """Keeps the most recently used complete explanations, bounded in bytes. Any thread may use it.

    A caller who asks for an explanation that is still being made follows its run, with a deadline, news and admission
    of its own: see `Dispatcher.running`.

    Args:
        size_bytes: bound of all explanations together; 0 keeps nothing.
        shared: whether callers with different tokens share explanations; else none learns what another has asked.
    """

    def __init__(self, size_bytes: int, shared: bool) -> None:
        self._bound = size_bytes
        self._shared = shared
        self._total = 0
        self._kept: OrderedDict[Hashable, Explanation] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def keeps(self) -> bool:
        """Tells whether explanations are kept at all."""
        return self._bound > 0

    def key_of(self, fitted: FittedRequest, caller: str) -> Hashable:
        """Returns a key that is the same for requests whose explanations are the same.

        It holds everything that shapes an explanation. The encoding of the maps is not in it: arrays are kept.
        """
        request, model = fitted.request, fitted.model
        return (
            "" if self._shared else caller,
            (model.name, model.version, model.weights, model.labels, model.outputs, model.units),
            fitted.digest,
            request.text,
            fitted.parts,
            fitted.targets,
            tuple(sorted(fitted.choices.items())),
            (request.top_predictions, request.precision, fitted.piece),
            (request.output.size, request.output.boxes, request.output.signed),
            request.evaluation_steps if request.evaluate else None,
        )

    def get(self, key: Hashable) -> Explanation | None:
        """Returns the explanation of a key; None where it is not kept."""
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            found = self._kept[key]
        return replace(found, cost=replace(found.cost, cached=True))

    def keep(self, key: Hashable, explanation: Explanation) -> None:
        """Keeps an explanation, unless it is larger than the cache."""
        size = _size_bytes(explanation)
        if size > self._bound:
            return
        with self._lock:
            if (before := self._kept.pop(key, None)) is not None:
                self._total -= _size_bytes(before)
            self._kept[key] = explanation
            self._total += size
            while self._total > self._bound:
                self._total -= _size_bytes(self._kept.popitem(last=False)[1])


def _size_bytes(explanation: Explanation) -> int:
    """Returns the bytes that an explanation is taken to need."""
    return _OVERHEAD_BYTES + sum(_OVERHEAD_BYTES + _array_bytes(saliency) for saliency in explanation.maps)


def _array_bytes(saliency: SaliencyMap) -> int:
    """Returns the bytes of a map and of its curves, which may be larger than a map of a layer's size."""
    curves = saliency.faithfulness
    return saliency.array.nbytes + (0 if curves is None else curves.deletion.nbytes + curves.insertion.nbytes)

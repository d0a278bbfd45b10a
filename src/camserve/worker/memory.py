"""Keeps what a worker made of recent images, so that the many steps of one request decode and forward it once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from camserve.types import AnyTarget, InputView, Prediction


@dataclass(frozen=True)
class Seen:
    """Holds a decoded image."""

    pixels: Tensor
    """(H, W, C) pixels as the network sees them, uint8, or float32 in [0, 1]."""
    view: InputView

    @property
    def size_bytes(self) -> int:
        """Number of bytes of the pixels."""
        return self.pixels.nbytes


@dataclass(frozen=True)
class Passed:
    """Holds an image's pass at one layer."""

    input: Tensor
    """(C, H, W) normalised input."""
    activations: Tensor
    """(C, u, v) activations of the layer."""
    logits: Tensor
    """(classes,) logits."""
    gradients: dict[AnyTarget, Tensor] = field(default_factory=dict)
    """(C, u, v) gradients by resolved target, for the targets for which they were made."""

    @property
    def size_bytes(self) -> int:
        """Number of bytes of all tensors; an expanded tensor counts with its storage."""
        tensors = (self.input, self.activations, self.logits, *self.gradients.values())
        return sum(min(tensor.nbytes, tensor.untyped_storage().nbytes()) for tensor in tensors)

    def alone(self) -> Passed:
        """Returns a copy that holds no memory of other images that shared the pass."""
        gradients = {target: gradient.clone() for target, gradient in self.gradients.items()}
        return Passed(self.input.clone(), self.activations.clone(), self.logits.clone(), gradients)


@dataclass(frozen=True)
class Known:
    """Holds a target with what a network made of it: the vector of a reference image, or of a text."""

    target: AnyTarget

    @property
    def size_bytes(self) -> int:
        """Number of bytes of the vector and of the text."""
        values = getattr(self.target, "values", None)
        return (0 if values is None else values.nbytes) + len(self.target.text())


@dataclass(frozen=True)
class Written:
    """Holds what a network that writes has written of an image."""

    words: tuple[Prediction, ...]
    """The tokens in their order, each with its probability given those before it."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens."""
        return tuple(word.index for word in self.words)

    @property
    def size_bytes(self) -> int:
        """Number of bytes that the words are taken to need."""
        return 64 * (1 + len(self.words))


@dataclass(frozen=True)
class Made:
    """Holds what a method makes of an image for each of its steps."""

    values: tuple[Tensor, ...]

    @property
    def size_bytes(self) -> int:
        """Number of bytes of the tensors."""
        return sum(value.nbytes for value in self.values)


class Memory:
    """Keeps the most recently used values, bounded in bytes; may be used from several threads.

    Args:
        size_bytes: largest number of bytes kept; 0 keeps nothing.
    """

    def __init__(self, size_bytes: int) -> None:
        self.hits = self.misses = 0
        self._bound = size_bytes
        self._values: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._total = 0
        self._lock = threading.Lock()

    @property
    def keeps(self) -> bool:
        """Tells whether anything is kept at all."""
        return self._bound > 0

    def get(self, key: Hashable, counted: bool = True) -> Any:
        """Returns the value of a key, or None where it is not kept; it counts as a hit or a miss unless told not to."""
        with self._lock:
            if key not in self._values:
                self.misses += counted
                return None
            self.hits += counted
            self._values.move_to_end(key)
            return self._values[key][0]

    def clear(self) -> None:
        """Forgets everything; whoever asks for an image that was known is told that it is missing."""
        with self._lock:
            self._values.clear()
            self._total = 0

    def put(self, key: Hashable, value: Seen | Passed | Known | Written | Made) -> None:
        """Keeps a value, and forgets the least recently used ones as far as it needs their room."""
        if not self.keeps:
            return
        with self._lock:
            self._total += value.size_bytes - self._values.pop(key, (None, 0))[1]
            self._values[key] = value, value.size_bytes
            while self._total > self._bound:
                _, (_, size) = self._values.popitem(last=False)
                self._total -= size

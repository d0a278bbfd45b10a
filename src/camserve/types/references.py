"""Describes references: named vectors that the vectors of a network are compared to."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from camserve.errors import InvalidOption
from camserve.types.model import OF_VECTORS, Outputs
from camserve.wording import shown

MAX_REFERENCES = 10_000
"""Number of references of a model: a client gets all their names, and every prediction compares all their vectors."""

MAX_REFERENCE_NUMBERS = 2**24
"""Numbers of all vectors together, 64 MiB: 8192 of each where there are 2048 references."""


def check_takes_references(outputs: Outputs) -> None:
    """Raises InvalidOption where outputs are no vectors, so that nothing can be compared to them."""
    if outputs not in OF_VECTORS:
        raise InvalidOption(f"references are for outputs {' and '.join(OF_VECTORS)}, and these are {outputs}")


@dataclass(frozen=True, eq=False)
class References:
    """Holds R references.

    Args:
        names: name of each.
        vectors: (R, D) float32, of any lengths but 0.

    Raises:
        InvalidOption: on construction, when there are none or too many; a name is empty, cannot be printed or comes
            twice; there are not as many vectors as names; a vector has a number that is not finite, or only zeros.
    """

    names: tuple[str, ...]
    vectors: np.ndarray

    def __post_init__(self) -> None:
        number, shape = len(self.names), self.vectors.shape
        if not 1 <= number <= MAX_REFERENCES:
            raise InvalidOption(f"a model has 1..{MAX_REFERENCES} references, got {number}")
        if self.vectors.dtype != np.float32 or len(shape) != 2 or shape[0] != number:
            raise InvalidOption(
                f"{number} references have float32 vectors of the shape [{number}, dimension], "
                f"got {self.vectors.dtype} {list(shape)}"
            )
        if self.vectors.size > MAX_REFERENCE_NUMBERS:
            raise InvalidOption(
                f"all references together may have at most {MAX_REFERENCE_NUMBERS} numbers, got {self.vectors.size}"
            )
        self._check_names()
        for row, name in enumerate(self.names):
            if not np.isfinite(self.vectors[row]).all():
                raise InvalidOption(f"the vector of reference {shown(name)} has numbers that are not finite")
            if not self.vectors[row].any():
                raise InvalidOption(f"the vector of reference {shown(name)} is all zeros: nothing is similar to it")

    def _check_names(self) -> None:
        for name in self.names:
            if not (isinstance(name, str) and name.strip() and name.isprintable()):
                raise InvalidOption(f"the name of a reference is a text that can be printed, got {shown(name)}")
        name, times = Counter(self.names).most_common(1)[0]
        if times > 1:
            raise InvalidOption(f"each reference has a name of its own, and {shown(name)} comes {times} times")

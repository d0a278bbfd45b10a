"""Scores of networks that give numbers: an age, a price, a size in pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from camserve.errors import Unsupported
from camserve.scores.score import Predictions, Score
from camserve.scores.targets import Combination
from camserve.types import AnyTarget, Contrast, Target, Value


class Values(Score):
    """Describes numbers (n, K) with names and units. A target is a number going up, or down: +v or -v for both scores.

    A number named without direction goes up. A contrast holds numbers of one unit against each other.
    """

    kind = "value"
    has_zero = False

    def check(self, outputs: Tensor) -> None:
        """Takes any numbers."""

    def classes(self, numbers: int) -> int:
        """Returns the number of numbers."""
        return numbers

    def names(self, numbers: int) -> tuple[str, ...]:
        """Returns "value", or "value 0", "value 1" and so on."""
        return ("value",) if numbers == 1 else tuple(f"value {index}" for index in range(numbers))

    def predictions(self, outputs: Tensor) -> Predictions:
        """Returns the numbers in their own order: they may have different units."""
        return Predictions(-torch.arange(len(outputs)), {"value": outputs})  # the first one ranks highest

    def value(self, outputs: Tensor, asked: Combination) -> Tensor:
        """Returns the numbers (n, K), negative for those that are to go down."""
        return asked.sums(outputs)

    def query_value(self, outputs: Tensor, asked: Combination) -> Tensor:
        """Returns the same."""
        return asked.sums(outputs)

    def size(self, outputs: Tensor, asked: Combination) -> Tensor:
        """Returns the sums of absolute values (n, K) where numbers are held against each other."""
        return asked.sizes(outputs)

    def query_size(self, asked: Combination) -> Tensor:
        """Returns 0: nobody knows how large the numbers are."""
        return torch.zeros(asked.classes.shape[:2], device=asked.classes.device)

    def is_class(self, asked: Combination) -> Tensor:
        """Returns that none is."""
        return torch.zeros_like(asked.classes[..., 0], dtype=torch.bool)

    def through(self, weight: Tensor, asked: Combination) -> Tensor:
        """Returns the rows of the weight, negative for numbers that are to go down."""
        return asked.rows(weight)

    def ask(self, targets: Sequence[AnyTarget], device: torch.device) -> Combination:
        """Returns which numbers are asked, with 1 or -1 as weight."""
        for target in targets:
            if not isinstance(target, Value | Contrast):
                raise Unsupported(f"outputs value are numbers that go up or down, and have no {_name(target)}")
        return Combination.of(targets, device)

    def resolved(self, target: AnyTarget, outputs: Tensor) -> tuple[AnyTarget, ...]:
        """Returns the target; for numbers that are named without direction, that each goes up."""
        found = target.each(range(len(outputs)))
        return tuple(Value(one) if isinstance(one, Target) else one for one in found)


def _name(target: AnyTarget) -> str:
    return type(target).__name__.lower()

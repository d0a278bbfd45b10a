"""Scores of networks that tell classes: one of many, several of many, yes or no; logits or probabilities.

`value` is the logit z_c, or the logarithm of the probability where the network gives probabilities. `query_value` is
the probability p_c. A target weighs those of several classes. The opposite of a class has the value -z_c, and the
probability 1 - p_c.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from camserve.errors import InvalidOption, Unsupported
from camserve.scores.score import QUERY_SIZE, Predictions, Score, largest
from camserve.scores.targets import Combination
from camserve.types import Against, AnyTarget, Contrast, Finer, Outputs, Target

SUM_TOLERANCE = 1e-3
"""Difference from 1 at which the sum of probabilities still counts as 1: a softmax in bfloat16 over 1000 classes."""


class OfClasses(Score):
    """Describes outputs that tell how probable classes are."""

    @abstractmethod
    def values(self, outputs: Tensor) -> Tensor:
        """Returns the differentiable score of every class: (..., numbers) to (..., C)."""

    @abstractmethod
    def probabilities(self, outputs: Tensor) -> Tensor:
        """Returns the probability of every class: (..., numbers) to (..., C)."""

    def classes(self, numbers: int) -> int:
        """Returns the number of classes: one for each number."""
        return numbers

    def predictions(self, outputs: Tensor) -> Predictions:
        """Returns the probabilities of one image, the most probable class first; of equal ones that of lower index."""
        # Probabilities below the smallest number are all equal; the values are not.
        return Predictions(self.values(outputs), {"probability": self.probabilities(outputs)})

    def value(self, outputs: Tensor, asked: Combination) -> Tensor:
        """Returns the weighted sums of the classes' values, (n, K)."""
        return asked.sums(self.values(outputs))

    def query_value(self, outputs: Tensor, asked: Combination) -> Tensor:
        """Returns the weighted sums of the classes' probabilities, (n, K); 1 - p for the opposite of a class."""
        found = asked.sums(self.probabilities(outputs))
        return found if asked.weights is None else found + asked.opposite.to(found)

    def size(self, outputs: Tensor, asked: Combination) -> Tensor:
        """Returns the sums of the classes' absolute values, (n, K), where a target weighs several."""
        return asked.sizes(self.values(outputs))

    def query_size(self, asked: Combination) -> Tensor:
        """Returns `QUERY_SIZE` for targets other than a class alone: contrasts, and the opposite 1 - p."""
        return torch.where(asked.alone, 0.0, QUERY_SIZE)

    def is_class(self, asked: Combination) -> Tensor:
        """Tells which targets are a class alone, (1, K)."""
        return asked.alone

    def through(self, weight: Tensor, asked: Combination) -> Tensor:
        """Returns the weighted sums of the weight's rows, (B or 1, K, n); raises Unsupported as `Score.through`."""
        return asked.rows(self.values(weight.T).T) if self.linear else super().through(weight, asked)

    def ask(self, targets: Sequence[AnyTarget], device: torch.device) -> Combination:
        """Returns the combination of classes that targets stand for."""
        for target in targets:
            if not isinstance(target, Target | Contrast | Against):
                raise Unsupported(f"outputs {self.kind} tell classes, and have no {type(target).__name__.lower()}")
        return Combination.of(targets, device)

    def resolved(self, target: AnyTarget, outputs: Tensor) -> tuple[AnyTarget, ...]:
        """Returns a target for each of the most probable classes that are meant, with the nearest classes named."""
        values, most = self.values(outputs), max((each.top_k or 0 for each in target.classes), default=0)
        found = target.each(largest(values, most) if most else ())
        return tuple(one.contrast(values.double().cpu().numpy()) if isinstance(one, Finer) else one for one in found)


class Softmax(OfClasses):
    """Describes logits (n, K) of classes of which one is true."""

    kind: ClassVar[Outputs] = "softmax"

    def check(self, outputs: Tensor) -> None:
        """Raises InvalidOption where there is one output: its softmax is 1 whatever the network sees."""
        if outputs.shape[1] < 2:
            raise InvalidOption(f"the network has one output, and a softmax of one is always 1: {ONE_OUTPUT}")

    def values(self, outputs: Tensor) -> Tensor:
        """Returns the logits."""
        return outputs

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Returns the softmax."""
        return outputs.softmax(dim=-1)

    def measured_by(self, outputs: Tensor, asked: Combination) -> Tensor:
        """Returns the signs of the logits of classes alone, and 1 for other targets."""
        return torch.where(asked.alone, self.value(outputs, asked).sign(), 1)


class Sigmoid(OfClasses):
    """Describes logits (n, K) of classes each of which is true or not, whatever the others are."""

    kind = "sigmoid"

    def check(self, outputs: Tensor) -> None:
        """Takes any number of outputs."""

    def values(self, outputs: Tensor) -> Tensor:
        """Returns the logits."""
        return outputs

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Returns the sigmoid of each."""
        return outputs.sigmoid()


class Binary(OfClasses):
    """Describes one logit z (n, 1) of yes or no: class 1 is yes, class 0 is no and has the logit -z."""

    kind = "binary"

    def check(self, outputs: Tensor) -> None:
        """Raises InvalidOption where there are several outputs."""
        if outputs.shape[1] != 1:
            raise InvalidOption(
                f"outputs binary are one logit, and this network has {outputs.shape[1]} outputs: outputs softmax are "
                "logits of classes of which one is true, outputs sigmoid of classes of which several may be true"
            )

    def classes(self, numbers: int) -> int:
        """Returns 2."""
        return 2

    def names(self, numbers: int) -> tuple[str, ...]:
        """Returns "no" and "yes"."""
        return "no", "yes"

    def values(self, outputs: Tensor) -> Tensor:
        """Returns -z and z."""
        return torch.cat([-outputs, outputs], dim=-1)

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Returns sigmoid(-z) and sigmoid(z); 1 - sigmoid(z) would be 0 where z is large."""
        return self.values(outputs).sigmoid()


class Probabilities(OfClasses):
    """Describes probabilities (n, K): of a network that ends in a softmax, or in sigmoids.

    A single one, (n, 1), is that of yes: class 1 is yes, class 0 is no.
    """

    kind = "probabilities"
    linear = False

    def check(self, outputs: Tensor) -> None:
        """Raises InvalidOption where a number is none of 0..1."""
        if not are_probabilities(outputs):
            low, high = (f"{bound:.3g}" for bound in (outputs.min().item(), outputs.max().item()))
            raise InvalidOption(
                f"outputs probabilities are numbers in 0..1, and this network gives {low}..{high}: outputs softmax or "
                "sigmoid are logits, outputs value any numbers"
            )

    def classes(self, numbers: int) -> int:
        """Returns the number of classes: one for each number, and 2 for a single one."""
        return max(2, numbers)

    def names(self, numbers: int) -> tuple[str, ...]:
        """Returns "no" and "yes" for a single probability."""
        return ("no", "yes") if numbers == 1 else super().names(numbers)

    def values(self, outputs: Tensor) -> Tensor:
        """Returns the logarithms; that of a probability below the smallest normal number is taken at that number."""
        probabilities = self.probabilities(outputs)
        return probabilities.clamp(min=torch.finfo(outputs.dtype).tiny).log()

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Returns the numbers as they are; 1 - p and p for a single one."""
        return torch.cat([1 - outputs, outputs], dim=-1) if outputs.shape[-1] == 1 else outputs


ONE_OUTPUT = (
    "say whether it is the logit of yes or no (binary), a number (value) or a probability (probabilities), with "
    "--outputs binary|value|probabilities, or outputs= in Python"
)
"""Tells people what to do with a network of one output."""


def are_probabilities(outputs: Tensor) -> bool:
    """Tells whether all numbers (n, K) are probabilities."""
    return bool(((outputs >= -SUM_TOLERANCE) & (outputs <= 1 + SUM_TOLERANCE)).all())


def sum_to_one(outputs: Tensor) -> bool:
    """Tells whether the numbers (n, K) of each image are probabilities that sum to 1: a softmax has been taken."""
    sums = outputs.double().sum(dim=1)
    return outputs.shape[1] > 1 and are_probabilities(outputs) and bool(((sums - 1).abs() <= SUM_TOLERANCE).all())

"""Binds targets to a score, as tensors: which numbers of the outputs are asked, and what they are weighted with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

import torch
from torch import Tensor

from camserve.errors import InvalidOption, Unsupported
from camserve.types import Against, AnyTarget, Contrast, Target, Value

if TYPE_CHECKING:
    from camserve.scores.score import Score


class Asked(Protocol):
    """Describes what K targets ask of outputs; each kind of outputs has its own, or shares one."""

    def column(self, number: int) -> Self:
        """Returns what the target of one number asks."""

    @classmethod
    def stacked(cls, asked: Sequence[Self]) -> Self:
        """Returns what B images ask, each for itself; those with fewer targets get some that nobody looks at."""


@dataclass(frozen=True)
class Combination:
    """Asks for sums of the classes' scores, each times a weight: of one class alone, or of a class and others."""

    classes: Tensor
    """Class indices (B or 1, K, M), M for each target; those of 1 are asked of every image."""
    weights: Tensor | None = None
    """Weights (B or 1, K, M), float64; None: each target is a class alone."""

    @classmethod
    def of(cls, targets: Sequence[AnyTarget], device: torch.device) -> Combination:
        """Returns the combination that targets of one map each stand for.

        Raises:
            Unsupported: a target that is no combination of classes.
        """
        return cls.of_terms([terms_of(target) for target in targets], device)

    @classmethod
    def of_terms(cls, terms: Sequence[Sequence[tuple[int, float]]], device: torch.device) -> Combination:
        """Returns the combination of some classes for each target, each class with its weight."""
        most = max(map(len, terms), default=1)
        padded = [[*some, *[(0, 0.0)] * (most - len(some))] for some in terms]
        shape = (1, len(terms), most)  # an empty tensor has no shape of its own
        classes = torch.tensor([[index for index, _ in some] for some in padded], dtype=torch.long, device=device)
        if all(len(some) == 1 and some[0][1] == 1 for some in padded):
            return cls(classes.view(shape))
        weights = torch.tensor([[weight for _, weight in some] for some in padded], dtype=torch.float64, device=device)
        return cls(classes.view(shape), weights.view(shape))

    def sums(self, scores: Tensor) -> Tensor:
        """Returns the weighted sums (n, K) of scores of all classes, (n, C)."""
        _, targets, terms = self.classes.shape
        found = scores.gather(1, self.classes.flatten(1).expand(len(scores), -1))
        if self.weights is None:
            return found
        return (found.view(-1, targets, terms) * self.weights.to(found)).sum(dim=2)

    def sizes(self, scores: Tensor) -> Tensor:
        """Returns the sums (n, K) of absolute values where a target weighs several classes, 0 elsewhere."""
        if self.weights is None:
            return torch.zeros_like(self.sums(scores))
        several = (self.weights != 0).sum(dim=2) > 1
        return Combination(self.classes, self.weights.abs()).sums(scores.abs()) * several

    def rows(self, matrix: Tensor) -> Tensor:
        """Returns the weighted sums of rows: (C, channels) to (B or 1, K, channels)."""
        found = matrix[self.classes]
        return found[:, :, 0] if self.weights is None else (found * self.weights.to(found)[..., None]).sum(dim=2)

    @property
    def opposite(self) -> Tensor:
        """Tells which targets are the opposite of a class, (B or 1, K)."""
        if self.weights is None:
            return torch.zeros_like(self.classes[..., 0], dtype=torch.bool)
        return self.weights[..., 0] < 0

    @property
    def alone(self) -> Tensor:
        """Tells which targets are a class alone, (B or 1, K)."""
        if self.weights is None:
            return torch.ones_like(self.classes[..., 0], dtype=torch.bool)
        return (self.weights[..., 0] > 0) & (self.weights[..., 1:] == 0).all(dim=2)

    def column(self, number: int) -> Combination:
        """Returns the combination of one target."""
        one = slice(number, number + 1)
        return Combination(self.classes[:, one], None if self.weights is None else self.weights[:, one])

    @classmethod
    def stacked(cls, asked: Sequence[Combination]) -> Combination:
        """Returns the combinations of B images, filled up with class 0."""
        classes = _filled([one.classes for one in asked], 0)
        if all(one.weights is None for one in asked):
            return cls(classes)
        ones = [torch.ones(one.classes.shape, dtype=torch.float64, device=one.classes.device) for one in asked]
        weights = [one.weights if one.weights is not None else fill for one, fill in zip(asked, ones, strict=True)]
        return cls(classes, _filled(weights, 0))


def _filled(tensors: Sequence[Tensor], value: float) -> Tensor:
    """Returns tensors (1, K_b, M_b) as one, (B, K, M)."""
    if len(tensors) == 1:
        return tensors[0]
    targets, terms = (max(tensor.shape[axis] for tensor in tensors) for axis in (1, 2))
    filled = tensors[0].new_full((len(tensors), targets, terms), value)
    for row, tensor in zip(filled, tensors, strict=True):
        row[: tensor.shape[1], : tensor.shape[2]] = tensor[0]
    return filled


def terms_of(target: AnyTarget) -> list[tuple[int, float]]:
    """Returns the classes of a target of one map, by index, each with its weight.

    Raises:
        Unsupported: the target is no combination of classes.
    """
    match target:
        case Target(index=int(index)):
            return [(index, 1.0)]
        case Contrast(of=Target(index=int(index)), than=others, gamma=gamma):
            share = -gamma / len(others)
            return [(index, 1.0), *((other.index, share) for other in others if other.index is not None)]
        case Against(of=Target(index=int(index))):
            return [(index, -1.0)]
        case Value(of=Target(index=int(index)), direction=direction):
            return [(index, 1.0 if direction == "up" else -1.0)]
        case _:
            raise Unsupported(f"a network whose outputs are classes or numbers has no {type(target).__name__}")


@dataclass(frozen=True)
class Targets:
    """Holds K targets of one map each, bound to the score that answers them."""

    score: Score
    each: tuple[AnyTarget, ...]
    """The targets, as a worker resolved them."""
    asked: Asked

    def __len__(self) -> int:
        return len(self.each)

    def value(self, outputs: Tensor) -> Tensor:
        """Returns the scores (n, K) that are differentiated, of outputs (n, numbers)."""
        return self.score.value(outputs, self.asked)

    def query_value(self, outputs: Tensor) -> Tensor:
        """Returns the scores (n, K) of masked images' outputs (n, numbers)."""
        return self.score.query_value(outputs, self.asked)

    def through(self, weight: Tensor) -> Tensor:
        """Returns the derivative (B or 1, K, n) of `value` by x where outputs are weight (numbers, n) times x + b.

        Raises:
            Unsupported: the scores are no linear function of the outputs.
        """
        return self.score.through(weight, self.asked)

    def measured_by(self, outputs: Tensor) -> Tensor:
        """Returns the sign (n, K) of what Ablation-CAM's loss is a share of: see `Score.measured_by`."""
        return self.score.measured_by(outputs, self.asked)

    def size(self, outputs: Tensor) -> Tensor:
        """Returns the sizes (n, K) of the numbers whose sum `value` is; 0 for those of a single one."""
        return self.score.size(outputs, self.asked)

    @property
    def query_size(self) -> Tensor:
        """The least sizes (1, K) at which `query_value` is compared; 0 for those of a single number."""
        return self.score.query_size(self.asked)

    def level(self, outputs: Tensor) -> Tensor:
        """Returns what the scores (n, K) of masked images are measured from where they are added up.

        That is 0 for the probability of a class. Other scores have no zero of their own: there it is the score of the
        outputs (n, numbers), those of the unmasked image.
        """
        return self.query_value(outputs).masked_fill(self.score.is_class(self.asked), 0)

    def other(self, target: AnyTarget, outputs: Tensor) -> Targets:
        """Returns another target of one map, bound to the same score.

        Raises:
            InvalidOption: outputs (numbers,) have no such class, or the target is of several maps.
        """
        for number, known in enumerate(self.each):
            if known == target:  # with what the network has made of it
                return Targets(self.score, (known,), self.asked.column(number))
        classes = self.score.classes(len(outputs))
        indices = [each.index for each in target.classes]
        if any(index is None or not 0 <= index < (index + 1 if classes is None else classes) for index in indices):
            raise InvalidOption(f"{target.text()} is no target of one map of {classes} classes")
        return self.score.targets(self.score.resolved(target, outputs), outputs.device)

    def columns(self) -> Iterator[Targets]:
        """Yields each target alone."""
        for number, target in enumerate(self.each):
            yield Targets(self.score, (target,), self.asked.column(number))

    @classmethod
    def stacked(cls, targets: Sequence[Targets]) -> Targets:
        """Returns the targets of B images, each asked of its own image; those with fewer have some that mean nothing.

        Args:
            targets: of one score, at least one.
        """
        most = max(targets, key=len)
        return cls(most.score, most.each, type(most.asked).stacked([one.asked for one in targets]))

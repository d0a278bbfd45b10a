"""The scores once more: plain sums of numbers, written from the table in docs/targets.md alone.

Each gives the number that is differentiated, of a list of outputs (scalars with graph), and the number that is asked of
masked images, of a list of floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from reference import twins, twins_perturbation
from torch import Tensor, nn

Numbers = Sequence[float]


def softmax(z: Numbers, c: int) -> float:
    return 1 / sum(math.exp(other - z[c]) for other in z)


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def cosine(a: Numbers, b: Numbers) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


@dataclass(frozen=True)
class TwinScore:
    """A score by its two formulas."""

    value: Callable[[Sequence[Tensor]], Tensor]
    query: Callable[[Numbers], float]


class Alone(nn.Module):
    """Returns the value of a score as its only output, so that twins of softmax networks can differentiate output 0."""

    def __init__(self, net: nn.Module, score: TwinScore) -> None:
        super().__init__()
        self.net, self.score = net, score

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.score.value(outputs.unbind())[None] for outputs in self.net(x).flatten(1)])


@contextmanager
def asked_of_masked_images(score: TwinScore):
    """Lets the twins of masked queries ask this score where they ask for a probability."""

    def query(module: Alone, image: Tensor, target: int) -> float:
        with torch.no_grad():
            return score.query(module.net(image[None]).flatten().tolist())

    with pytest.MonkeyPatch.context() as patch:
        for module in (twins, twins_perturbation):
            patch.setattr(module, "probability", query)
        yield query

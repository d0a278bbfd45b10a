"""Scores of networks that give a vector: for retrieval, for faces, for whatever is compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from camserve.errors import InvalidOption, Unsupported
from camserve.scores.score import QUERY_SIZE, Predictions, Score
from camserve.types import AnyTarget, Target, Vector


@dataclass(frozen=True)
class Directions:
    """Asks how near outputs are to vectors."""

    unit: Tensor
    """Vectors of length 1, (B or 1, K, D); those of 1 are asked of every image."""

    def cosines(self, outputs: Tensor) -> Tensor:
        """Returns the cosines (n, K) between outputs (n, D) and the vectors; 0 where an output is all zeros."""
        return (F.normalize(outputs, dim=1)[:, None] * self.unit.to(outputs)).sum(dim=2)

    def column(self, number: int) -> Directions:
        """Returns the vector of one target."""
        return Directions(self.unit[:, number : number + 1])

    @classmethod
    def stacked(cls, asked: Sequence[Directions]) -> Directions:
        """Returns the vectors of B images, filled up with zeros."""
        rows = [one.unit[0] for one in asked]
        return cls(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True))


class Embedding(Score):
    """Describes vectors (n, D), of which only the direction counts: a score is the cosine to a target's vector.

    Args:
        references: (R, D), vectors that are packed with the network; a class target names one of them.
        shape: shape of the outputs for one image.
    """

    kind = "embedding"
    linear = False
    has_zero = False

    def __init__(self, references: np.ndarray | None = None, shape: Sequence[int] = ()) -> None:
        super().__init__(shape)
        self._references = references
        self._unit = None if references is None else _unit(references)

    def check(self, outputs: Tensor) -> None:
        """Raises InvalidOption where there is one output, or the references have another length."""
        if outputs.shape[1] < 2:
            raise InvalidOption("outputs embedding are vectors, and this network has one output: its direction is none")
        if self._references is not None and self._references.shape[1] != outputs.shape[1]:
            raise InvalidOption(
                f"the network's vectors have {outputs.shape[1]} numbers, its references {self._references.shape[1]}"
            )

    def classes(self, numbers: int) -> int:
        """Returns the number of references."""
        return 0 if self._references is None else len(self._references)

    def names(self, numbers: int) -> tuple[str, ...]:
        """Returns "reference 0", "reference 1" and so on."""
        return tuple(f"reference {index}" for index in range(self.classes(numbers)))

    def predictions(self, outputs: Tensor) -> Predictions:
        """Returns the similarity to each reference, the most similar one first; nothing where there are none."""
        if self._references is None:
            return Predictions(torch.zeros(0, dtype=torch.long), outputs.new_zeros(0), "similarity")
        assert self._unit is not None, "it is made of the references"
        if self._unit.device != outputs.device:  # they may be large: not for every image
            self._unit = self._unit.to(outputs.device)
        similarity = Directions(self._unit[None]).cosines(outputs[None])[0]
        return Predictions(similarity.argsort(descending=True, stable=True), similarity, "similarity")

    def value(self, outputs: Tensor, asked: Directions) -> Tensor:
        """Returns the cosines (n, K)."""
        return asked.cosines(outputs)

    def query_value(self, outputs: Tensor, asked: Directions) -> Tensor:
        """Returns the cosines (n, K)."""
        return asked.cosines(outputs)

    def size(self, outputs: Tensor, asked: Directions) -> Tensor:
        """Returns 1: the products that are added up to a cosine are parts of vectors of length 1."""
        return outputs.new_ones(len(outputs), asked.unit.shape[1])

    def query_size(self, asked: Directions) -> Tensor:
        """Returns `QUERY_SIZE`."""
        return torch.full(asked.unit.shape[:2], QUERY_SIZE, device=asked.unit.device)

    def is_class(self, asked: Directions) -> Tensor:
        """Returns that none is: a reference is a vector as any other."""
        return torch.zeros(asked.unit.shape[:2], dtype=torch.bool, device=asked.unit.device)

    def ask(self, targets: Sequence[AnyTarget], device: torch.device) -> Directions:
        """Returns the targets' vectors."""
        if not targets:  # predictions alone are wanted
            return Directions(torch.zeros(1, 0, 1, dtype=torch.float64, device=device))
        return Directions(_unit(np.array([self._vector(target) for target in targets])).to(device)[None])

    def resolved(self, target: AnyTarget, outputs: Tensor) -> tuple[AnyTarget, ...]:
        """Returns the target; a vector must be as long as the outputs are.

        Raises:
            InvalidOption: it is not.
            Unsupported: the target is no vector, and no reference.
        """
        if isinstance(target, Vector):
            if target.values is None or target.values.shape != outputs.shape:
                came = None if target.values is None else len(target.values)
                raise InvalidOption(f"the network's vectors have {len(outputs)} numbers, the target's {came}")
            return (target,)
        if isinstance(target, Target) and self._references is not None:
            return target.each(self.predictions(outputs).order.tolist())
        raise Unsupported(
            "outputs embedding are explained for a vector, or another image, that they are to be similar to: name one"
        )

    def _vector(self, target: AnyTarget) -> np.ndarray:
        match target:
            case Vector(values=np.ndarray() as values):
                return values
            case Target(index=int(index)) if self._references is not None:
                return np.asarray(self._references[index])
            case _:
                raise Unsupported(f"outputs embedding are compared to vectors, and have no {type(target).__name__}")


def _unit(vectors: np.ndarray) -> Tensor:
    return F.normalize(torch.from_numpy(vectors.astype(np.float64)), dim=1)

"""Scores of networks that give a vector: for retrieval, for faces, for texts, for whatever is compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from camserve.errors import InvalidOption, Unsupported
from camserve.scores.score import QUERY_SIZE, Predictions, Score
from camserve.scores.targets import terms_of
from camserve.types import Against, AnyTarget, Contrast, Finer, Outputs, Target, Text, Vector

if TYPE_CHECKING:
    from camserve.images import ImageContent


@dataclass(frozen=True)
class Directions:
    """Asks how far outputs, brought to length 1, reach along vectors: the cosine where a vector has length 1."""

    vectors: Tensor
    """Vectors (B or 1, K, D), those of contrasts of any length; those of 1 are asked of every image."""

    def reach(self, outputs: Tensor) -> Tensor:
        """Returns how far outputs (n, D) reach along each vector, (n, K); 0 where an output is all zeros."""
        return (F.normalize(outputs, dim=1)[:, None] * self.vectors.to(outputs)).sum(dim=2)

    def column(self, number: int) -> Directions:
        """Returns the vector of one target."""
        return Directions(self.vectors[:, number : number + 1])

    @classmethod
    def stacked(cls, asked: Sequence[Directions]) -> Directions:
        """Returns the vectors of B images, filled up with zeros."""
        rows = [one.vectors[0] for one in asked]
        return cls(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True))


class Embedding(Score):
    """Describes vectors (n, D), of which only the direction counts: a score is the cosine to a target's vector.

    A contrast of references is the difference of their cosines, and against one is its cosine times -1. Both are linear
    in the references' vectors r of length 1: f r_a - gamma * mean(f r_b) = f (r_a - gamma * mean(r_b)).

    Args:
        references: (R, D), vectors that are packed with the network; a class target names one of them.
        shape: shape of the outputs for one image.
    """

    kind: ClassVar[Outputs] = "embedding"
    linear = False
    has_zero = False

    def __init__(self, references: np.ndarray | None = None, shape: Sequence[int] = ()) -> None:
        super().__init__(shape)
        self._references = references
        self._unit = None if references is None else _unit(references)

    def check(self, outputs: Tensor) -> None:
        """Raises InvalidOption where there is one output, or the references have another length."""
        if outputs.shape[1] < 2:
            raise InvalidOption(
                f"outputs {self.kind} are vectors, and this network has one output: its direction is none"
            )
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
        similarity = self.similarity(outputs)
        return Predictions(similarity, {"similarity": similarity})

    def similarity(self, outputs: Tensor) -> Tensor:
        """Returns the cosine (R,) of the outputs (D,) of one image to each reference."""
        if self._unit is None:
            return outputs.new_zeros(0)
        if self._unit.device != outputs.device:  # they may be large: not for every image
            self._unit = self._unit.to(outputs.device)
        return Directions(self._unit[None]).reach(outputs[None])[0]

    def value(self, outputs: Tensor, asked: Directions) -> Tensor:
        """Returns the cosines (n, K), or differences of some."""
        return asked.reach(outputs)

    def query_value(self, outputs: Tensor, asked: Directions) -> Tensor:
        """Returns the same."""
        return asked.reach(outputs)

    def size(self, outputs: Tensor, asked: Directions) -> Tensor:
        """Returns the lengths (1, K) of the vectors: what is added up are products of one with a vector of length 1."""
        lengths: Tensor = asked.vectors.norm(dim=2)
        return lengths.to(outputs).expand(len(outputs), -1)

    def query_size(self, asked: Directions) -> Tensor:
        """Returns `QUERY_SIZE`."""
        return torch.full(asked.vectors.shape[:2], QUERY_SIZE, device=asked.vectors.device)

    def is_class(self, asked: Directions) -> Tensor:
        """Returns that none is: a reference is a vector as any other."""
        return torch.zeros(asked.vectors.shape[:2], dtype=torch.bool, device=asked.vectors.device)

    def ask(self, targets: Sequence[AnyTarget], device: torch.device) -> Directions:
        """Returns the targets' vectors."""
        if not targets:  # predictions alone are wanted
            return Directions(torch.zeros(1, 0, 1, dtype=torch.float64, device=device))
        return Directions(torch.stack([self._towards(target) for target in targets])[None].to(device))

    def known(self, target: AnyTarget, outputs_of: Callable[[ImageContent], Tensor]) -> AnyTarget:
        """Returns the vector that the network makes of a reference image.

        Raises:
            Unsupported: it is not finite.
            InvalidOption: it is all zeros.
        """
        if not isinstance(target, Vector) or target.image is None:
            return target
        from camserve.images import read_image  # Pillow stays out of `import camserve`

        outputs = outputs_of(read_image(target.image))
        if not outputs.isfinite().all():
            raise Unsupported("the network's outputs for the reference image are not finite")
        return Vector(outputs.detach().cpu().numpy())

    def resolved(self, target: AnyTarget, outputs: Tensor) -> tuple[AnyTarget, ...]:
        """Returns the targets of one map each; a vector must be as long as the outputs are.

        Raises:
            InvalidOption: it is not.
            Unsupported: the target is no vector, and no reference.
        """
        if isinstance(target, (Vector, Text)):
            if target.values is None or target.values.shape != outputs.shape:
                came = None if target.values is None else len(target.values)
                raise InvalidOption(f"the network's vectors have {len(outputs)} numbers, the target's {came}")
            return (target,)
        if self._references is None or not isinstance(target, Target | Contrast | Finer | Against):
            raise Unsupported(
                f"outputs {self.kind} are explained for a vector, or another image, that they are to be similar to: "
                "name one"
            )
        similarity = self.similarity(outputs)
        ranked, scores = similarity.argsort(descending=True, stable=True).tolist(), similarity.double().cpu().numpy()
        found = target.each(ranked)
        return tuple(one.contrast(scores) if isinstance(one, Finer) else one for one in found)

    def _towards(self, target: AnyTarget) -> Tensor:
        """Returns the vector (D,) along which a resolved target asks, on the CPU."""
        if isinstance(target, (Vector, Text)) and target.values is not None:
            return _unit(target.values[None])[0]
        if self._references is None or not isinstance(target, Target | Contrast | Against):
            raise Unsupported(f"outputs {self.kind} are compared to vectors, and have no {type(target).__name__}")
        terms = terms_of(target)
        weights = torch.tensor([weight for _, weight in terms], dtype=torch.float64)
        return weights @ _unit(self._references[[index for index, _ in terms]])


def _unit(vectors: np.ndarray) -> Tensor:
    return F.normalize(torch.from_numpy(vectors.astype(np.float64)), dim=1)

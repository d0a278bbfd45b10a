"""Defines what a score is: it turns a network's outputs and a target into the number that a map is a map of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from camserve.errors import InvalidOption, Unsupported
from camserve.methods.spec import Asset
from camserve.scores.returned import Found, select
from camserve.scores.targets import Targets
from camserve.types import AnyTarget, InputView, Outputs, Prediction
from camserve.types.tokenisers import Tokeniser

if TYPE_CHECKING:
    from camserve.images import ImageContent


@dataclass(frozen=True)
class Predictions:
    """Holds what a network says of every class, number or reference for one image."""

    ranking: Tensor
    """Numbers (C,) that order them: the largest is of the one that is explained where nobody names any."""
    numbers: Mapping[Literal["probability", "value", "similarity", "share"], Tensor]
    """Numbers (C,) that it says, by index, each under its name."""

    def of(self, indices: Sequence[int]) -> tuple[Prediction, ...]:
        """Returns the predictions of these indices, without labels."""
        at = list(indices)
        chosen = zip(*(numbers.cpu().numpy()[at].tolist() for numbers in self.numbers.values()), strict=True)
        pairs = zip(at, chosen, strict=True)
        return tuple(Prediction(index, "", **dict(zip(self.numbers, said, strict=True))) for index, said in pairs)

    def top(self, most: int) -> tuple[Prediction, ...]:
        """Returns the first predictions in order; `most` is their largest number."""
        return self.of(largest(self.ranking, most))

    def about(self, target: AnyTarget, score: float) -> tuple[Prediction, ...]:
        """Returns what is said of the classes that a target of one map names, that explained first, without labels.

        Args:
            target: the target, resolved.
            score: its score.
        """
        return self.of([each.index for each in target.classes if each.index is not None])

    def through(self, view: InputView) -> Predictions:
        """Returns the predictions with what they say in pixels brought to those of the sent image."""
        return self


def largest(values: Tensor, most: int) -> list[int]:
    """Returns the indices of the largest `most` of (C,) values, or of all; of equal ones that of lower index first.

    `Tensor.topk` leaves open which of equal values comes first, and a sort of a thousand takes five times as long.
    """
    negative = -values.detach().cpu().numpy()
    at = np.arange(len(negative))
    if 0 < most < len(negative):
        last = np.partition(negative, most - 1)[most - 1]
        (at,) = np.nonzero(~(negative > last))  # NaN is among them, so that there are `most`
    found: list[int] = at[negative[at].argsort(kind="stable")][:most].tolist()
    return found


QUERY_SIZE = 1 / 16
"""Least size at which differences of probabilities, and cosines, are compared: 4 ulp of 1 then count as the same."""


@dataclass(frozen=True)
class Reading:
    """Says what a network of an image and a text is asked about an image, for one item."""

    asked: tuple[tuple[int, ...], ...]
    """Tokens of each pass, one pass after the other; what they return lies side by side."""
    targets: tuple[AnyTarget, ...]
    """The item's targets; what they say of the network's own caption is filled in."""
    score: Score
    """Score of what these passes return."""


class Score(ABC):
    """Describes one kind of outputs (n, numbers). A number may be infinite nowhere: callers check that before.

    A network may return several numbers for each class, such as a map: they come laid out in one row for each image,
    and the score is told their shape.

    `value` is differentiated, and is what the variants of masked queries that ask logits ask. `query_value` is what all
    other masked queries and curves ask.
    """

    kind: ClassVar[Outputs]
    linear: ClassVar[bool] = True
    """Whether `value` is a linear function of the outputs, so that a linear head has a closed form."""

    lacks: ClassVar[Mapping[Asset, str]] = {}
    """Why networks of these outputs do not offer what methods may need, by name: see `camserve.types.offered`."""

    has_zero: ClassVar[bool] = True
    """Whether 0 means that nothing speaks for the target, as with probabilities and their differences."""

    takes_text: ClassVar[str] = ""
    """Name of the text that the network takes beside the image, such as "question"; "" where it takes none."""

    needs_text: ClassVar[bool] = True
    """Whether a network that takes a text cannot do without."""

    writes: ClassVar[bool] = False
    """Whether the network writes a text, token by token, and its predictions are that text."""

    axes: ClassVar[int] = 1
    """Number of axes of what the network returns for one image: 1 for numbers (C,), 3 for maps (C, h, w)."""

    def __init__(self, shape: Sequence[int] = ()) -> None:
        """Takes the shape of what the network returns for one image, of as many axes as the kind has."""
        self.shape = tuple(shape)

    @classmethod
    def select(
        cls,
        network: nn.Module,
        images: Tensor,
        output: str | None,
        wanted: int | None,
        tokens: Tensor | None = None,
    ) -> Found:
        """Returns the network as one that returns rows of numbers: see `camserve.scores.returned.select`."""
        return select(network, images, output, wanted, cls.axes, tokens)

    @abstractmethod
    def check(self, outputs: Tensor) -> None:
        """Raises InvalidOption where outputs (n, numbers) are not of this kind."""

    @abstractmethod
    def classes(self, numbers: int) -> int | None:
        """Returns how many classes, numbers or references there are to be named, for outputs (n, numbers).

        None: the outputs do not tell, and as many as there are labels.
        """

    def names(self, numbers: int) -> tuple[str, ...]:
        """Returns the names of those where nobody gives any; raises InvalidOption where their number is not known."""
        classes = self.classes(numbers)
        if classes is None:
            raise InvalidOption(f"outputs {self.kind} do not tell how many classes there are: give the names of all")
        return tuple(f"class {index}" for index in range(classes))

    @abstractmethod
    def predictions(self, outputs: Tensor) -> Predictions:
        """Returns what the outputs (numbers,) of one image say."""

    def read(self, tokeniser: Tokeniser, text: str, targets: Sequence[AnyTarget], caption: Sequence[int]) -> Reading:
        """Returns what a network that takes a text is asked for one item.

        Args:
            tokeniser: the network's tokeniser.
            text: the text beside the image.
            targets: the item's targets.
            caption: tokens that the network itself writes behind the text, as far as the targets ask for them.

        Raises:
            InvalidOption: a text has words that the tokeniser does not know, or more than the network takes.
            Unsupported: the network takes no text.
        """
        raise Unsupported(f"outputs {self.kind} are of an image alone")

    @abstractmethod
    def value(self, outputs: Tensor, asked: Any) -> Tensor:
        """Returns the scores (n, K) that are differentiated, of outputs (n, numbers)."""

    @abstractmethod
    def query_value(self, outputs: Tensor, asked: Any) -> Tensor:
        """Returns the scores (n, K) of masked images' outputs (n, numbers)."""

    def through(self, weight: Tensor, asked: Any) -> Tensor:
        """Returns the derivative of the scores by x, (B or 1, K, n), where outputs are weight (numbers, n) times x + b.

        Raises:
            Unsupported: the scores are no linear function of the outputs.
        """
        raise Unsupported(f"outputs {self.kind} have a score that is not linear in them")

    def measured_by(self, outputs: Tensor, asked: Any) -> Tensor:
        """Returns the sign (n, K) of what Ablation-CAM's loss is a share of; 1 where the loss is taken as it is.

        A share of the score itself has lost the sign of a target that is against a class, or of a number going down.
        """
        return torch.ones_like(self.value(outputs, asked))

    @abstractmethod
    def is_class(self, asked: Any) -> Tensor:
        """Tells which targets (1, K) are a class alone: their `query_value` is a probability, which starts at 0."""

    @abstractmethod
    def size(self, outputs: Tensor, asked: Any) -> Tensor:
        """Returns the sizes (n, K) of the numbers whose sum `value` is; 0 for a single one.

        Numbers that cancel leave a small score with the rounding of large ones.
        """

    @abstractmethod
    def query_size(self, asked: Any) -> Tensor:
        """Returns the least sizes (1, K) at which `query_value` is compared; 0 for a single number."""

    @abstractmethod
    def ask(self, targets: Sequence[AnyTarget], device: torch.device) -> Any:
        """Returns what resolved targets ask of outputs on a device: an `Asked`.

        Raises:
            Unsupported: a target that the kind does not know.
        """

    def targets(self, targets: Sequence[AnyTarget], device: torch.device | str = "cpu") -> Targets:
        """Returns resolved targets bound to this score."""
        return Targets(self, tuple(targets), self.ask(targets, torch.device(device)))

    def placed(self, target: AnyTarget, view: InputView) -> AnyTarget:
        """Returns a target with what it says in pixels of the sent image brought to the outputs of that image.

        Args:
            target: the target; most say nothing in pixels.
            view: which part of the sent image the network sees.

        Raises:
            InvalidOption: what it says lies outside of the image, or of the part that the network sees.
        """
        return target

    def known(self, target: AnyTarget, outputs_of: Callable[[ImageContent], Tensor]) -> AnyTarget:
        """Returns a target that `network_made` names, with what the network makes of it: a vector of a text, say.

        Args:
            target: the target, whatever image it is asked of.
            outputs_of: function from an image to the network's outputs (numbers,) for it.

        Raises:
            CamserveError: nothing can be made of it; the text says why.
        """
        return target

    @abstractmethod
    def resolved(self, target: AnyTarget, outputs: Tensor) -> tuple[AnyTarget, ...]:
        """Returns the targets of one map each that a target stands for, given the outputs (numbers,) of its image."""

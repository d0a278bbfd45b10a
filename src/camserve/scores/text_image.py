"""Scores of networks that give a vector beside which a text has one as well: CLIP and its like."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from camserve.errors import InvalidOption, Unsupported
from camserve.scores.embedding import Embedding
from camserve.scores.score import Predictions
from camserve.types import AnyTarget, Outputs, Text
from camserve.wording import shown

if TYPE_CHECKING:
    from camserve.images import ImageContent


class TextEncoder(Protocol):
    """Describes what a network of outputs "text-image" has under the name `text_encoder`, beside its own forward.

    Where it is an `nn.Module`, its weights are packed with the network's, and it is moved to the same device. It may
    have a number `bias` as well: then each text may be true by itself, else one of all texts is.
    """

    max_length: int
    """Largest number of tokens of a text, those that mark its ends included."""

    @property
    def scale(self) -> float:
        """Factor of the cosines before a softmax over texts, the inverse of the temperature; CLIP's is 100."""

    def tokens(self, text: str) -> Sequence[int]:
        """Returns all tokens of a text, however many there are.

        Raises:
            InvalidOption: the text has something that no token stands for.
        """

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Returns the vectors (n, D) of texts that have at most `max_length` tokens each, of any length."""


def text_vectors(encoder: TextEncoder, texts: Sequence[str]) -> np.ndarray:
    """Returns the vectors of texts, (n, D), float64.

    Raises:
        InvalidOption: a text is empty, has more tokens than the encoder takes, or something it has no token for.
        Unsupported: the encoder gives no vectors, or one that is not finite or all zeros.
    """
    for text in texts:
        if not text.strip():
            raise InvalidOption("a text has at least one word, got an empty one")
        if (number := len(encoder.tokens(text))) > encoder.max_length:
            raise InvalidOption(f"a text has at most {encoder.max_length} tokens here, got {number}: {shown(text)}")
    with torch.no_grad():
        found = encoder.encode(list(texts))
    if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(texts) or not found.is_floating_point():
        came = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise Unsupported(f"the text encoder gives vectors of the shape [{len(texts)}, dimension], got {came}")
    vectors = found.detach().double().cpu().numpy()
    for text, vector in zip(texts, vectors, strict=True):
        if not np.isfinite(vector).all():
            raise Unsupported(f"the vector of the text {shown(text)} has numbers that are not finite")
        if not vector.any():
            raise Unsupported(f"the vector of the text {shown(text)} is all zeros: nothing is similar to it")
    return vectors


class TextImage(Embedding):
    """Describes vectors (n, D) as `Embedding` does, with a text encoder beside: a text is the vector it makes of it.

    The packed prompts are the references. Their probabilities are softmax(scale * cosine) over all of them, as in CLIP
    (Radford et al. 2021, section 3.1.2 and figure 3); with a bias sigmoid(scale * cosine + bias) of each, as in SigLIP
    (https://arxiv.org/abs/2303.15343, eq. 1).

    Args:
        encoder: the text encoder.
        references: (R, D), vectors of the packed prompts.
    """

    kind: ClassVar[Outputs] = "text-image"

    def __init__(self, encoder: TextEncoder, references: np.ndarray | None = None, shape: Sequence[int] = ()) -> None:
        super().__init__(references, shape)
        self._encoder = encoder

    def predictions(self, outputs: Tensor) -> Predictions:
        """Returns similarity and probability of each prompt, the most similar one first; nothing without prompts."""
        found = super().predictions(outputs)
        logits, bias = self._encoder.scale * found.numbers["similarity"], getattr(self._encoder, "bias", None)
        probability = logits.softmax(dim=0) if bias is None else (logits + bias).sigmoid()
        probability = probability.clamp(min=torch.finfo(torch.float32).tiny)  # 0 stands for none in a message
        return Predictions(found.ranking, {"probability": probability, **found.numbers})

    def known(self, target: AnyTarget, outputs_of: Callable[[ImageContent], Tensor]) -> AnyTarget:
        """Returns a text with its vector; another target as `Embedding.known` does, raises as `text_vectors`."""
        if not isinstance(target, Text):
            return super().known(target, outputs_of)
        return Text(target.words, text_vectors(self._encoder, [target.words])[0])

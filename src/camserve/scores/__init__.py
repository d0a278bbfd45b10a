"""Turns outputs and a target into the number that is explained: one small class for each kind of outputs.

Methods, curves and metrics ask a score through `Targets`, and none of them knows a softmax.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from camserve.errors import InvalidOption
from camserve.scores.boxes import Detections
from camserve.scores.classes import ONE_OUTPUT, Binary, Probabilities, Sigmoid, Softmax, sum_to_one
from camserve.scores.embedding import Embedding
from camserve.scores.score import Predictions, Score
from camserve.scores.segmentation import Segmentation
from camserve.scores.targets import Targets
from camserve.scores.text_image import TextEncoder, TextImage, text_vectors
from camserve.scores.tokens import Answers, Tokens
from camserve.scores.value import Values
from camserve.types import OUTPUTS, Outputs
from camserve.wording import shown

__all__ = [
    "SCORES",
    "Predictions",
    "Score",
    "Targets",
    "TextEncoder",
    "find_outputs",
    "kind_of",
    "make_score",
    "text_vectors",
]

SCORES: Mapping[Outputs, type[Score]] = {
    kind.kind: kind
    for kind in (
        Softmax,
        Sigmoid,
        Binary,
        Probabilities,
        Values,
        Embedding,
        TextImage,
        Segmentation,
        Detections,
        Answers,
        Tokens,
    )
}
"""Every kind of outputs with its class."""


def kind_of(outputs: Outputs) -> type[Score]:
    """Returns the class of a kind of outputs; raises InvalidOption where there is no such kind."""
    if outputs not in SCORES:
        raise InvalidOption(f"outputs must be one of {', '.join(OUTPUTS)}, got {shown(outputs)}")
    return SCORES[outputs]


def make_score(
    outputs: Outputs,
    references: np.ndarray | None = None,
    shape: Sequence[int] = (),
    text_encoder: TextEncoder | None = None,
) -> Score:
    """Returns the score of a kind of outputs.

    Args:
        outputs: the kind.
        references: (R, D), for outputs that are vectors alone.
        shape: shape of what the network returns for one image; needed by kinds of more than one axis alone.
        text_encoder: what makes vectors of texts, for "text-image" alone.

    Raises:
        InvalidOption: there is no such kind, or no text encoder where the kind needs one.
    """
    kind = kind_of(outputs)
    if kind is TextImage:
        return TextImage(_checked(text_encoder), references, shape)
    return Embedding(references, shape) if kind is Embedding else kind(shape)


def _checked(encoder: TextEncoder | None) -> TextEncoder:
    missing = [name for name in ("max_length", "scale", "tokens", "encode") if not hasattr(encoder, name)]
    if encoder is None or missing:
        came = "the network has no attribute of this name" if encoder is None else f"it has no {', '.join(missing)}"
        raise InvalidOption(
            "outputs text-image need a text_encoder beside the network, with max_length, scale, tokens and encode "
            f"(see docs/models.md): {came}"
        )
    return encoder


def find_outputs(outputs: Tensor) -> Outputs:
    """Returns the kind of outputs that a network has as far as numbers tell: "softmax", or "probabilities".

    Args:
        outputs: (n, numbers) of images that differ.

    Raises:
        InvalidOption: there is one output, which may be a logit as well as a number.
    """
    if outputs.shape[1] == 1:
        raise InvalidOption(f"the network has one output: {ONE_OUTPUT}")
    return "probabilities" if sum_to_one(outputs) else "softmax"

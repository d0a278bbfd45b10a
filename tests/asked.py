"""Targets of a network with a softmax, from class indices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from camserve.runtimes.precision import why_no_bfloat16
from camserve.scores import Targets, make_score
from camserve.types import Target


def asked(classes: Iterable[int], device: str | torch.device = "cpu") -> Targets:
    """Returns targets of these classes, for every image the same."""
    return make_score("softmax").targets([Target(index=int(index)) for index in classes], device)


def asked_each(rows: Sequence[Iterable[int]] | torch.Tensor) -> Targets:
    """Returns targets of one row of classes for each image."""
    return Targets.stacked([asked(row) for row in rows])


BFLOAT16 = "exact" if why_no_bfloat16(torch.device("cpu")) else "bfloat16"
"""A precision other than float32, where this processor has one; elsewhere bfloat16 is refused."""

"""What several tests ask of slow twins in the same way, computed once in a test process."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import pytest
from reference import twins, twins_backprop, twins_gradient
from saliency.core import xrai as library
from torch import Tensor

from camserve.saliency import xrai


def remembering(function: Callable[..., Sequence[Any]]) -> Callable[..., list[Any]]:
    """Returns a function that computes its arrays once for the same arguments, and returns copies of them."""
    found: dict[tuple[Hashable, ...], Sequence[Any]] = {}

    @functools.wraps(function)
    def remembered(*given: Any) -> list[Any]:
        key = tuple(_value(one) for one in given)
        if key not in found:
            found[key] = function(*given)
        return [one.clone() if isinstance(one, Tensor) else one.copy() for one in found[key]]

    return remembered


def _value(one: Any) -> Hashable:
    """Returns what tells arrays of other values apart; a network is itself alone."""
    array = one.numpy() if isinstance(one, Tensor) else one
    return (array.shape, array.dtype.str, array.tobytes()) if isinstance(array, np.ndarray) else one


ours = remembering(xrai.find_masks)
twins_masks = remembering(twins_backprop.xrai_masks)
librarys_masks = remembering(library._get_segments_felzenszwalb)
activations_and_gradients = remembering(twins.activations_and_gradients)


@pytest.fixture
def segmented_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """XRAI's six segmentations, which take longer than all the rest of a test, are made once of an image."""
    monkeypatch.setattr(xrai, "find_masks", ours)
    monkeypatch.setattr(twins_backprop, "xrai_masks", twins_masks)


@pytest.fixture
def passed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twins of the gradient family have one pass for an image, and no test changes a network."""
    monkeypatch.setattr(twins_gradient, "activations_and_gradients", activations_and_gradients)

"""Defines the currency of planning, which is what a slice of a method costs a worker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal[
    "decode", "opening", "masked_forward", "layer_gradient", "pixel_gradient", "tail", "closed_form", "ranking"
]
"""Units of one kind cost about the same on one worker; those of two kinds may differ by a factor of 100.

decode: a megapixel of a photo is decoded and resized.
opening: an image goes through the network once, for its predictions and activations.
masked_forward: a masked image goes through the network.
layer_gradient: a gradient of one target's score with respect to the layer.
pixel_gradient: a gradient of one target's score with respect to the pixels, its forward pass included.
tail: altered activations go through the network behind the layer.
closed_form: a formula on what is there already; no pass at all.
ranking: XRAI's segmentation of an image and the ranking of one target's segments, on the worker's CPU.
"""
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Work:
    """Holds a number of units of one kind."""

    kind: Kind
    units: int


def decoded_units(size: tuple[int, int]) -> int:
    """Returns the units of `decode` that an image of (height, width) takes: its whole megapixels, of 2**20 pixels.

    A smaller image takes none: its decoding is part of what any image takes.
    """
    return size[0] * size[1] >> 20

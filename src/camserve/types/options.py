"""Defines what callers may say of a request beside its image: targets, boxes, sizes, precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from camserve.errors import InvalidOption
from camserve.wording import shown

Precision = Literal["auto", "exact", "bfloat16"]
"""Precision of masked queries. "exact" is float32 throughout; "bfloat16" rounds what matrix products and convolutions
take; "auto" is whichever a worker has seen to be fast and to change no ranking of places."""
DEFAULT_CURVE_STEPS = 28
"""Number of steps of a curve as in RISE, where each step changes 1792 of 224 x 224 pixels."""
MAX_CURVE_STEPS = 4096
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
MapSize = Literal["input", "layer", "original"]
MAP_SIZES: tuple[MapSize, ...] = get_args(MapSize)
Priority = Literal["interactive", "normal", "batch"]
PRIORITIES: tuple[Priority, ...] = get_args(Priority)
Fusion = Literal["mean", "max"]
FUSIONS: tuple[Fusion, ...] = get_args(Fusion)


@dataclass(frozen=True)
class BoxOptions:
    """Says where boxes go around what a map marks (Grad-CAM paper, sec. 4.1: threshold at 15 % of the maximum)."""

    threshold: float = 0.15
    all_components: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise InvalidOption(f"box threshold must be 0..1, got {self.threshold}")


@dataclass(frozen=True)
class StreamOptions:
    """Says how often a stream has maps before the final ones."""

    max_maps: int = 8
    """Largest number of updates that have maps; 0: only progress is told."""
    min_interval_s: float = 0.25
    """Least number of seconds between two updates that have maps."""

    def __post_init__(self) -> None:
        if self.max_maps < 0:
            raise InvalidOption(f"max_maps must be at least 0, got {shown(self.max_maps)}")
        if not self.min_interval_s >= 0:
            raise InvalidOption(f"min_interval_s must be at least 0, got {self.min_interval_s}")


ENCODINGS: Mapping[str, int] = {"float32": 4, "float16": 2, "uint8": 1, "png": 0, "overlay_png": 0, "overlay_jpeg": 0}
"""Number of bytes of one pixel by encoding of a map; 0 for files, which compress."""

DECIMAL_BYTES = 16
"""Number of bytes of a float32 as a decimal number at most: nine digits, sign, point, exponent and comma."""

COLORMAPS = ("jet", "turbo", "viridis", "inferno", "magma")
"""The colours that an overlay can have."""


def check_overlay(colormap: str, opacity: float) -> None:
    """Raises InvalidOption where the colormap is unknown, or the opacity is outside of 0..1."""
    if colormap not in COLORMAPS:
        raise InvalidOption(f"colormap must be one of {', '.join(COLORMAPS)}, got {shown(colormap)}")
    if not 0 <= opacity <= 1:
        raise InvalidOption(f"opacity must be 0..1, got {opacity}")

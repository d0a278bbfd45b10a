"""What a request asks, part by part: a part is one method at one layer, and its place is its position.

The gateway and the engine share this, so that both number, ask and fuse alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from camserve.errors import InvalidOption
from camserve.methods import MethodSpec
from camserve.types import MAX_CURVE_STEPS, Fusion, Layer, MapSize, ModelInfo


@dataclass(frozen=True)
class Part:
    """One method at one layer."""

    method: MethodSpec
    layer: Layer

    def queries(self, targets: int) -> int:
        """Masked queries for so many classes. Raises InvalidOption when the parameters do not fit the layer."""
        return self.method.queries(self.layer.channels, targets)

    def sums_size(self, input_size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of the sums that a worker returns."""
        return input_size if self.method.resolution == "input" else (self.layer.height, self.layer.width)


@dataclass(frozen=True)
class Parts:
    """Every part of a request: for each method one for each layer, or a single one where no layer matters."""

    methods: tuple[MethodSpec, ...]
    layers: tuple[Layer, ...]
    fusion: Fusion = "mean"

    def __iter__(self) -> Iterator[Part]:
        for method in self.methods:
            for layer in self.layers_of(method):
                yield Part(method, layer)

    def __len__(self) -> int:
        return sum(len(self.layers_of(method)) for method in self.methods)

    def layers_of(self, method: MethodSpec) -> tuple[Layer, ...]:
        """The layers whose maps are fused for a method."""
        return self.layers if method.uses_layer else self.layers[:1]

    def positions(self) -> Iterator[tuple[MethodSpec, range]]:
        """Each method with the positions of its parts."""
        start = 0
        for method in self.methods:
            stop = start + len(self.layers_of(method))
            yield method, range(start, stop)
            start = stop


def make_parts(
    info: ModelInfo, methods: Sequence[MethodSpec], layers: Sequence[str], fusion: Fusion, size: MapSize
) -> Parts:
    """The parts of a request, checked against the model.

    Args:
        info: the model.
        methods: at least one, or none.
        layers: names; none means the default layer.
        fusion: of several layers' maps.
        size: of the maps.

    Raises:
        InvalidOption: an unknown layer, one that comes twice, parameters that do not fit it, or size "layer" for maps
            of several layers.
    """
    found = tuple(info.layer(name) for name in layers or ("",))
    if len(set(found)) < len(found):
        raise InvalidOption(f"layers: each may come once, got {', '.join(layer.name for layer in found)}")
    if len(found) > 1 and size == "layer":
        raise InvalidOption("the map of several layers has size INPUT or ORIGINAL, not LAYER")
    parts = Parts(tuple(methods), found, fusion)
    for part in parts:
        part.queries(1)
    return parts


def check_curve_steps(steps: int) -> int:
    """Raises InvalidOption when a curve may not have so many."""
    if not 1 <= steps <= MAX_CURVE_STEPS:
        raise InvalidOption(f"evaluation_steps must be 1..{MAX_CURVE_STEPS}, got {steps}")
    return steps


def layer_names(layer: str | Sequence[str]) -> tuple[str, ...]:
    """What callers may pass as a layer: a name, several, or "" for the default layer."""
    names = (layer,) if isinstance(layer, str) else tuple(layer)
    return () if names == ("",) else names

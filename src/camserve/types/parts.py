"""Says what a request asks, part by part: a part is one method at one layer, and its index is its position.

The gateway and the engine share this, so that both number, ask and fuse alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from camserve.errors import InvalidOption
from camserve.methods import MethodSpec
from camserve.methods.work import Work
from camserve.types import Fusion, Layer, MapSize, ModelInfo
from camserve.types.offered import check_offered
from camserve.wording import shown


@dataclass(frozen=True)
class Part:
    """Asks one method at one layer."""

    method: MethodSpec
    layer: Layer

    def queries(self, targets: int) -> int:
        """Returns the number of masked queries for a number of classes.

        Raises:
            InvalidOption: the parameters do not fit the layer.
        """
        return self.method.queries(self.layer, targets)

    def work(self, targets: int) -> Work:
        """Returns what a worker does for all queries, or in the opening for a method that has none."""
        return self.method.work(self.layer, targets)

    @property
    def stops_early(self) -> bool:
        """Tells whether queries are left out once the maps are within the method's tolerance.

        All queries of a formula are asked at once: they take less time than one look at the maps.
        """
        return self.method.accepted_difference > 0 and self.work(1).kind != "closed_form"

    def sums_size(self, input_size: tuple[int, int]) -> tuple[int, int]:
        """Returns (height, width) of a map before it is upsampled."""
        return self.method.map_size(self.layer, input_size)

    def sums_shape(self, input_size: tuple[int, int], targets: int) -> tuple[int, ...]:
        """Returns the shape of the sums that a worker returns."""
        return self.method.sums_shape(self.layer, input_size, targets)

    def context_shape(self) -> tuple[int, ...] | None:
        """Returns the shape of what comes beside the sums for the finish; None where nothing does."""
        return self.method.context_shape(self.layer)

    def result_bytes(self, input_size: tuple[int, int], targets: int) -> int:
        """Returns the size of a worker's answer to a task: sums and context as float32."""
        return 4 * (math.prod(self.sums_shape(input_size, targets)) + math.prod(self.context_shape() or (0,)))


@dataclass(frozen=True)
class Parts:
    """Holds every part of a request: for each method one for each layer, or a single one where no layer matters."""

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
        """Returns the layers whose maps are fused for a method."""
        return self.layers if method.uses_layer else self.layers[:1]

    def positions(self) -> Iterator[tuple[MethodSpec, range]]:
        """Yields each method with the positions of its parts."""
        start = 0
        for method in self.methods:
            stop = start + len(self.layers_of(method))
            yield method, range(start, stop)
            start = stop


def make_parts(
    info: ModelInfo, methods: Sequence[MethodSpec], layers: Sequence[str], fusion: Fusion, size: MapSize
) -> Parts:
    """Returns the parts of a request, checked against the model.

    Args:
        info: the model.
        methods: at least one, or none.
        layers: names; none means the default layer.
        fusion: how the maps of several layers become one.
        size: what size the maps have.

    Raises:
        InvalidOption: an unknown layer, one that comes twice, parameters that do not fit it, or size "layer" for maps
            of several layers.
        Unsupported: the network does not offer what a method needs.
    """
    for method in methods:
        check_offered(method, info)
    found = tuple(info.layer(name) for name in layers or ("",))
    if len(set(found)) < len(found):
        raise InvalidOption(f"layers: each may come once, got {', '.join(layer.name for layer in found)}")
    if len(found) > 1 and size == "layer":
        raise InvalidOption("the map of several layers has size input or original, not layer")
    parts = Parts(tuple(methods), found, fusion)
    for part in parts:
        part.queries(1)
    return parts


def layer_names(layer: str | Sequence[str]) -> tuple[str, ...]:
    """Returns the names in what callers may pass as a layer: a name, several, or "" for the default layer."""
    try:
        names = (layer,) if isinstance(layer, str) else tuple(layer)
    except TypeError:
        raise InvalidOption(f"a layer is named by a text, got {shown(layer)}") from None
    return () if names == ("",) else names

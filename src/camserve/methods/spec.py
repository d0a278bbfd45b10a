"""Defines the method spec, a frozen dataclass whose field metadata carries range and help."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from camserve.errors import InvalidOption
from camserve.methods.work import Kind, Work
from camserve.wording import shown

if TYPE_CHECKING:
    from camserve.types import Layer

GRADIENTS: tuple[Kind, ...] = ("layer_gradient", "pixel_gradient")
"""Kinds whose unit is a gradient of one target: one query is a unit for each target."""

Asset = Literal["layer", "gradients", "tail", "modules"]
ASSETS: Mapping[Asset, str] = {
    "layer": "a layer with maps",
    "gradients": "gradients of the scores",
    "tail": "the network behind the layer by itself",
    "modules": "the modules that the network is made of",
}
"""Everything that a network may offer beside its scores of masked images, each with words for it."""


@dataclass(frozen=True)
class Parameter:
    """Describes one parameter of a method, as clients see it."""

    name: str
    type: str
    """Type of the value: integer, number or choice."""
    default: int | float | str
    minimum: float | None
    maximum: float | None
    choices: tuple[str, ...]
    description: str


def number(default: int | float, minimum: float, maximum: float | None, description: str) -> Any:
    """Makes a field with a range; the default's type, int or float, is the parameter's."""
    return dataclasses.field(
        default=default, metadata={"minimum": minimum, "maximum": maximum, "description": description}
    )


def tolerance() -> Any:
    """Makes the field of a method that may stop asking before all of its queries have been answered."""
    text = "Largest difference of the normalised map to that of all queries that is accepted; 0: all are asked."
    return number(0.0, 0, 1, text)


def choice(*choices: str, description: str) -> Any:
    """Makes a field with choices, the first of which is the default."""
    return dataclasses.field(default=choices[0], metadata={"choices": choices, "description": description})


@dataclass(frozen=True)
class MethodSpec:
    """Holds the parameters of a method; subclasses are the methods.

    Raises:
        InvalidOption: on construction, when a parameter is outside its range; the text names range and value.
    """

    title: ClassVar[str]
    paper: ClassVar[str]
    resolution: ClassVar[Literal["layer", "input"]] = "layer"
    """Size of the method's maps: that of the layer, or that of the network's input."""
    kind: ClassVar[Kind] = "masked_forward"
    """Kind of work that a worker does for the method."""
    ranked: ClassVar[bool] = False
    """Whether a worker ranks the map that the sums make: see `camserve.types.Ranking`."""
    uses_layer: ClassVar[bool] = True
    """Whether the map depends on the layer that is asked for."""
    requires: ClassVar[frozenset[Asset]] = frozenset({"layer"})
    """Assets that a network must offer for the method: see `camserve.types.offered`."""
    needs: ClassVar[str] = ""
    """Requirement that a network must meet for the method: "GAP head", "ReLU", "ViT"; empty: any will do."""

    positive: ClassVar[str] = "it shows positive evidence alone"
    """Reason for which the method has no negative evidence; empty for one that adds up evidence of both signs."""

    def __post_init__(self) -> None:
        for parameter in self.parameters():
            object.__setattr__(self, parameter.name, _checked(self.name, parameter, getattr(self, parameter.name)))

    @property
    def name(self) -> str:
        """Returns the name in snake case: `group_cam`."""
        return method_name(type(self))

    @classmethod
    def parameters(cls) -> tuple[Parameter, ...]:
        """Returns the parameters in order of declaration."""
        return tuple(_parameter(field) for field in dataclasses.fields(cls))

    def queries(self, layer: Layer, targets: int) -> int:
        """Returns how many masked queries the method asks at a layer for `targets` classes.

        Queries are numbered 0..queries-1; a step asks ranges of these numbers. What is done for them is `passes`. A
        method without queries is made in one go with a request's opening.

        Raises:
            InvalidOption: the parameters do not fit the layer.
        """
        return 0

    @property
    def unsigned(self) -> str:
        """Returns the reason for which the method has no negative evidence to show; "" for one that has."""
        return self.positive

    @property
    def accepted_difference(self) -> float:
        """Returns the parameter `tolerance` of a method that may stop asking early; 0 for one that asks all queries."""
        return float(getattr(self, "tolerance", 0.0))

    @property
    def asking_all(self) -> MethodSpec:
        """Returns the same method without a tolerance."""
        changes: dict[str, Any] = {"tolerance": 0.0} if self.accepted_difference else {}
        return dataclasses.replace(self, **changes)

    @property
    def block(self) -> int:
        """Returns how many queries, numbered one after the other, are one entry of a worker's order."""
        return 1

    def numbers(self, order: Sequence[int], start: int, stop: int) -> tuple[int, ...]:
        """Returns the numbers of the queries at the indices start..stop-1 of an order of blocks.

        Index i is query order[i // block] * block + i % block.
        """
        block = self.block
        return tuple(order[index // block] * block + index % block for index in range(start, stop))

    def weight(self, targets: int) -> int:
        """Returns how many units of `kind` one query is: a gradient for each target, or one masked image for all."""
        return targets if self.kind in GRADIENTS else 1

    def work(self, layer: Layer, targets: int) -> Work:
        """Returns what a worker does for all queries; for a method made in one go, what it does in the opening.

        The forward pass that every method starts from is not in it, nor are the gradients that an opening needs for
        Group-CAM's groups.

        Raises:
            InvalidOption: the parameters do not fit the layer.
        """
        return Work(self.kind, max(1, self.queries(layer, targets)) * self.weight(targets))

    def sums_shape(self, layer: Layer, input_size: tuple[int, int], targets: int) -> tuple[int, ...]:
        """Returns the shape of a partial's sums: (targets, height, width), unless a finish makes maps of other sums."""
        return targets, *self.map_size(layer, input_size)

    def context_shape(self, layer: Layer) -> tuple[int, ...] | None:
        """Returns the shape of what a finish needs to know of the image itself; None where it needs nothing."""
        return None

    def labels(self, layer: Layer, targets: int) -> int:
        """Returns how many labels an opening finds, which every later task brings along: see `camserve.types.Task`."""
        return 0

    @property
    def label_values(self) -> int:
        """Returns the number that every label is below."""
        return 0

    def map_size(self, layer: Layer, input_size: tuple[int, int]) -> tuple[int, int]:
        """Returns (height, width) of a map before it is upsampled."""
        return input_size if self.resolution == "input" else (layer.height, layer.width)

    def passes(self, layer: Layer, targets: int, has_zero: bool = True) -> int:
        """Returns how many images go through the network, or its tail, beyond the forward pass that all methods share.

        This is what a reply's cost counts, at most: constant masks are not asked, and a head with a closed form needs
        no pass. A baseline is counted once, though each further step asks it again; Ablation-CAM on a sequence of
        tokens takes one pass more.

        Args:
            layer: the layer.
            targets: number of targets of one map each.
            has_zero: `ModelInfo.has_zero` of the model.

        Raises:
            InvalidOption: the parameters do not fit the layer.
        """
        return self.queries(layer, targets)

    @classmethod
    def default_passes(cls, layer: Layer, has_zero: bool = True) -> int | None:
        """Returns `passes` with default parameters, for one target; None where they do not fit the layer."""
        try:
            return cls().passes(layer, 1, has_zero)
        except InvalidOption:  # a layer with fewer channels than the default of 32 groups
            return None


def _parameter(field: dataclasses.Field[Any]) -> Parameter:
    default: Any = field.default
    return Parameter(
        name=field.name,
        type="choice" if "choices" in field.metadata else {int: "integer", float: "number"}[type(default)],
        default=default,
        minimum=field.metadata.get("minimum"),
        maximum=field.metadata.get("maximum"),
        choices=field.metadata.get("choices", ()),
        description=field.metadata["description"],
    )


def _checked(method: str, parameter: Parameter, value: Any) -> Any:
    where = f"{method}: {parameter.name}"
    if parameter.type == "choice":
        if value not in parameter.choices:
            raise InvalidOption(f"{where} must be one of {', '.join(parameter.choices)}, got {shown(value)}")
        return value
    kind = int if parameter.type == "integer" else float
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not _is(kind, value):
        raise InvalidOption(f"{where} must be {'an' if kind is int else 'a'} {parameter.type}, got {shown(value)}")
    low, high = parameter.minimum, parameter.maximum
    if (low is not None and value < low) or (high is not None and value > high):
        allowed = f"{low:g}..{high:g}" if high is not None else f"at least {low:g}"
        raise InvalidOption(f"{where} must be {allowed}, got {shown(value)}")
    return kind(value)


def _is(kind: type[int] | type[float], value: int | float) -> bool:
    try:
        return kind(value) == value
    except (OverflowError, ValueError):  # infinite or NaN as an integer, or an integer beyond every float
        return False


def method_name(spec: type[MethodSpec]) -> str:
    """Returns the class name in snake case: GroupCam -> group_cam."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", spec.__name__).lower()

"""What a method spec is: a frozen dataclass whose field metadata carries range and help."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from camserve.errors import InvalidOption


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method, as clients see it."""

    name: str
    type: str
    """integer, number or choice."""
    default: int | float | str
    minimum: float | None
    maximum: float | None
    choices: tuple[str, ...]
    description: str


def number(default: int | float, minimum: float, maximum: float | None, description: str) -> Any:
    """A field with a range; the default's type, int or float, is the parameter's."""
    return dataclasses.field(
        default=default, metadata={"minimum": minimum, "maximum": maximum, "description": description}
    )


def choice(*choices: str, description: str) -> Any:
    """The first choice is the default."""
    return dataclasses.field(default=choices[0], metadata={"choices": choices, "description": description})


@dataclass(frozen=True)
class MethodSpec:
    """A method and its parameters; subclasses are the methods.

    Raises:
        InvalidOption: on construction, when a parameter is outside its range; the text names range and value.
    """

    title: ClassVar[str]
    paper: ClassVar[str]
    resolution: ClassVar[Literal["layer", "input"]] = "layer"
    """What its sums are as large as: the layer, or the network's input."""
    uses_layer: ClassVar[bool] = True
    """Whether the map depends on the layer that is asked for."""
    needs: ClassVar[str] = ""
    """What a network must have for it: "GAP head", "ReLU", "ViT"; empty: any."""

    def __post_init__(self) -> None:
        for parameter in self.parameters():
            object.__setattr__(self, parameter.name, _checked(self.name, parameter, getattr(self, parameter.name)))

    @property
    def name(self) -> str:
        """The name in snake case: `group_cam`."""
        return method_name(type(self))

    @classmethod
    def parameters(cls) -> tuple[Parameter, ...]:
        """The parameters in order of declaration."""
        return tuple(_parameter(field) for field in dataclasses.fields(cls))

    def queries(self, channels: int, targets: int) -> int:
        """How many masked queries this asks at a layer of `channels` channels for `targets` classes.

        Queries are numbered 0..queries-1; a step asks ranges of these numbers. What is done for them is `passes`.

        Raises:
            InvalidOption: the parameters do not fit the layer.
        """
        return 0

    def passes(self, channels: int, targets: int) -> int:
        """Images that go through the network, or through its tail, beyond the forward pass that all methods share.

        This is what a reply's cost counts, at most: constant masks are not asked, and a head with a closed form needs
        no pass. A baseline is counted once, though each further step asks it again; Ablation-CAM on a sequence of
        tokens takes one pass more.

        Raises:
            InvalidOption: the parameters do not fit the layer.
        """
        return self.queries(channels, targets)

    @classmethod
    def default_passes(cls, channels: int) -> int | None:
        """`passes` with default parameters, for one target; None where they do not fit the layer."""
        try:
            return cls().passes(channels, 1)
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
            raise InvalidOption(f"{where} must be one of {', '.join(parameter.choices)}, got {value!r}")
        return value
    kind = int if parameter.type == "integer" else float
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not _is(kind, value):
        raise InvalidOption(f"{where} must be {'an' if kind is int else 'a'} {parameter.type}, got {value!r}")
    low, high = parameter.minimum, parameter.maximum
    if (low is not None and value < low) or (high is not None and value > high):
        allowed = f"{low:g}..{high:g}" if high is not None else f"at least {low:g}"
        raise InvalidOption(f"{where} must be {allowed}, got {value}")
    return kind(value)


def _is(kind: type[int] | type[float], value: int | float) -> bool:
    try:
        return kind(value) == value
    except (OverflowError, ValueError):  # infinite or NaN as an integer, or an integer beyond every float
        return False


def method_name(spec: type[MethodSpec]) -> str:
    """Snake case of the class name: GroupCam -> group_cam."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", spec.__name__).lower()

"""Parameters of an inference request: the ways in which an OIP client says what shall be explained, and how."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from camserve import wire
from camserve.errors import InvalidOption
from camserve.labels import parse_target_text
from camserve.methods import parse_method_text
from camserve.oip import inference_pb2 as oip
from camserve.types import MAP_SIZES
from camserve.v1 import explain_pb2 as pb

_LARGEST = 2**32 - 1  # of a field of our own request
_PRIORITIES = {0: pb.PRIORITY_UNSPECIFIED, 1: pb.INTERACTIVE, 2: pb.NORMAL, 3: pb.BATCH}


def set_options(request: pb.ExplainRequest, parameters: Mapping[str, oip.InferParameter]) -> float | None:
    """Writes the parameters into a request.

    Returns:
        The bound on the call's time in seconds that the client stated; None: none.

    Raises:
        InvalidOption: a parameter is unknown, or not of the expected form; the text says what is allowed.
    """
    for name, parameter in parameters.items():
        if name in _SETTERS:
            _SETTERS[name](request, name, parameter)
        elif name != "timeout":
            raise InvalidOption(f"unknown parameter {name!r}; there are {', '.join([*_SETTERS, 'timeout'])}")
    timeout_us = _whole("timeout", parameters["timeout"]) if "timeout" in parameters else 0
    return timeout_us / 1e6 or None


def _methods(request: pb.ExplainRequest, name: str, parameter: oip.InferParameter) -> None:
    texts = filter(None, re.split(r"[;\s]+", _text(name, parameter)))
    request.methods.extend(wire.method_to_proto(parse_method_text(text)) for text in texts)


def _targets(request: pb.ExplainRequest, name: str, parameter: oip.InferParameter) -> None:
    texts = filter(None, map(str.strip, _text(name, parameter).split(",")))
    request.targets.extend(wire.target_to_proto(parse_target_text(text)) for text in texts)


def _layers(request: pb.ExplainRequest, name: str, parameter: oip.InferParameter) -> None:
    request.layers.extend(filter(None, map(str.strip, _text(name, parameter).split(","))))


def _size(request: pb.ExplainRequest, name: str, parameter: oip.InferParameter) -> None:
    text = _text(name, parameter)
    if text not in MAP_SIZES:
        raise InvalidOption(f"{name} must be one of {', '.join(MAP_SIZES)}, got {text!r}")
    request.output.size = wire.size_to_proto(text)


def _fusion(request: pb.ExplainRequest, name: str, parameter: oip.InferParameter) -> None:
    request.fusion = wire.fusion_to_proto(_text(name, parameter))  # type: ignore[arg-type]  # it checks the name


def _precision(request: pb.ExplainRequest, name: str, parameter: oip.InferParameter) -> None:
    request.precision = wire.precision_to_proto(_text(name, parameter))  # type: ignore[arg-type]  # it checks the name


def _priority(request: pb.ExplainRequest, name: str, parameter: oip.InferParameter) -> None:
    """A name, or Triton's number: 1 is the most urgent, 0 the default."""
    if parameter.WhichOneof("parameter_choice") == "string_param" and not parameter.string_param.isdecimal():
        request.priority = wire.priority_to_proto(parameter.string_param)  # type: ignore[arg-type]  # it checks the name
        return
    number = _whole(name, parameter)
    if number not in _PRIORITIES:
        raise InvalidOption(
            f"{name} must be 0 (default), 1 (interactive), 2 (normal), 3 (batch) or such a name, got {number}"
        )
    request.priority = _PRIORITIES[number]


def _number(field: str) -> Callable[[pb.ExplainRequest, str, oip.InferParameter], None]:
    def set_number(request: pb.ExplainRequest, name: str, parameter: oip.InferParameter) -> None:
        number = _whole(name, parameter)
        if number > _LARGEST:
            raise InvalidOption(f"{name} must be 0..{_LARGEST}, got {number}")
        setattr(request, field, number)

    return set_number


def _switch(field: str) -> Callable[[pb.ExplainRequest, str, oip.InferParameter], None]:
    return lambda request, name, parameter: setattr(request, field, _flag(name, parameter))


_SETTERS: dict[str, Callable[[pb.ExplainRequest, str, oip.InferParameter], None]] = {
    "explain_method": _methods,
    "explain_targets": _targets,
    "explain_layers": _layers,
    "explain_fusion": _fusion,
    "explain_size": _size,
    "explain_precision": _precision,
    "explain_top_predictions": _number("top_predictions"),
    "explain_evaluate": _switch("evaluate"),
    "explain_evaluation_steps": _number("evaluation_steps"),
    "explain_allow_partial": _switch("allow_partial"),
    "priority": _priority,
}


def _text(name: str, parameter: oip.InferParameter) -> str:
    if parameter.WhichOneof("parameter_choice") == "string_param":
        return parameter.string_param
    raise InvalidOption(f"{name} must be a text, got {_shown(parameter)}")


def _whole(name: str, parameter: oip.InferParameter) -> int:
    """A number of at least 0; as a text too, which is all that some clients send."""
    value = _value(parameter)
    if isinstance(value, str) and re.fullmatch(r"\d{1,18}", value, re.ASCII):
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise InvalidOption(f"{name} must be a whole number of at least 0, got {_shown(parameter)}")


def _flag(name: str, parameter: oip.InferParameter) -> bool:
    value = {"true": True, "false": False}.get(str(_value(parameter)).lower())
    if value is None:
        raise InvalidOption(f"{name} must be true or false, got {_shown(parameter)}")
    return value


def _value(parameter: oip.InferParameter) -> bool | int | float | str | None:
    kind = parameter.WhichOneof("parameter_choice")
    return None if kind is None else getattr(parameter, kind)


def _shown(parameter: oip.InferParameter) -> str:
    value = _value(parameter)
    return "nothing" if value is None else repr(value)

"""Holds the catalogue of methods: names, parameters, ranges, variants, papers and cost. No torch, no gRPC.

From a spec follow validation, the protobuf conversion (`camserve.codecs.v1`), `camserve methods --json` and GetModel.
What a method computes is in `camserve.saliency`, in one file for each family, as here.

To add a method: a dataclass in the file of its family, its line in `METHODS`, a message of the same name and fields in
`explain.proto`, and its functions with one line in `camserve.saliency.registry`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from camserve.errors import InvalidOption
from camserve.methods.attention import AttentionRollout, GradientWeightedAttention, LeGrad
from camserve.methods.auto import Auto
from camserve.methods.backprop import (
    Deconvolution,
    GuidedBackprop,
    GuidedGradCam,
    IntegratedGradients,
    SmoothGrad,
    Xrai,
)
from camserve.methods.gradient import (
    Cam,
    EigenCam,
    GradCam,
    GradCamPlusPlus,
    HiresCam,
    IntegratedGradCam,
    LayerCam,
    SmoothGradCamPlusPlus,
    XgradCam,
)
from camserve.methods.perturbation import (
    AblationCam,
    DRise,
    GroupCam,
    IsCam,
    Occlusion,
    ReciproCam,
    Rise,
    ScoreCam,
    SsCam,
)
from camserve.methods.spec import MethodSpec, Parameter, method_name
from camserve.wording import shown

__all__ = [
    "AUTO",
    "METHODS",
    "SIGNED",
    "AblationCam",
    "AttentionRollout",
    "Auto",
    "Cam",
    "DRise",
    "Deconvolution",
    "EigenCam",
    "GradCam",
    "GradCamPlusPlus",
    "GradientWeightedAttention",
    "GroupCam",
    "GuidedBackprop",
    "GuidedGradCam",
    "HiresCam",
    "IntegratedGradCam",
    "IntegratedGradients",
    "IsCam",
    "LayerCam",
    "LeGrad",
    "MethodLike",
    "MethodSpec",
    "Occlusion",
    "Parameter",
    "ReciproCam",
    "Rise",
    "ScoreCam",
    "SmoothGrad",
    "SmoothGradCamPlusPlus",
    "SsCam",
    "XgradCam",
    "Xrai",
    "as_method",
    "method_name",
    "method_text",
    "number_or_text",
    "parse_method",
    "parse_method_text",
]

METHODS: Mapping[str, type[MethodSpec]] = {
    method_name(spec): spec
    for spec in (
        Cam,
        GradCam,
        HiresCam,
        GradCamPlusPlus,
        SmoothGradCamPlusPlus,
        XgradCam,
        LayerCam,
        IntegratedGradCam,
        EigenCam,
        GuidedBackprop,
        Deconvolution,
        GuidedGradCam,
        IntegratedGradients,
        SmoothGrad,
        Xrai,
        GroupCam,
        ScoreCam,
        SsCam,
        IsCam,
        Rise,
        DRise,
        AblationCam,
        ReciproCam,
        Occlusion,
        AttentionRollout,
        GradientWeightedAttention,
        LeGrad,
    )
}
"""Every method of the catalogue by its name."""

SIGNED = tuple(name for name, method in METHODS.items() if not method().unsigned)
"""Names of the methods that, with default parameters, have negative evidence to show as well."""

AUTO = method_name(Auto)
"""Name that stands for a method of the server's choice."""


def parse_method(name: str, parameters: Mapping[str, Any] | None = None) -> MethodSpec:
    """Returns a spec from its name and parameters: `parse_method("group_cam", {"groups": 16})`.

    Raises:
        InvalidOption: unknown method or parameter, or a value outside its range.
    """
    spec = METHODS.get(name) or (Auto if name == AUTO else None)
    if spec is None:
        raise InvalidOption(f"unknown method {shown(name)}; there are {', '.join(METHODS)}")
    known = [parameter.name for parameter in spec.parameters()]
    for key in parameters or {}:
        if key not in known:
            allowed = f"has {', '.join(known)}" if known else "has no parameters"
            raise InvalidOption(f"{name}: unknown parameter {shown(key)}; it {allowed}")
    return spec(**(parameters or {}))


MethodLike = MethodSpec | str | tuple[str, Mapping[str, Any]]
"""Method as callers may pass it: a spec, a name, or (name, parameters)."""


def as_method(value: MethodLike) -> MethodSpec:
    """Returns the spec of a method, checked."""
    match value:
        case MethodSpec():
            return value
        case str():
            return parse_method(value)
        case (str(), Mapping()):
            return parse_method(*value)
    raise InvalidOption(f"a method is a name, (name, parameters) or a method of camserve.methods; got {shown(value)}")


def parse_method_text(text: str) -> MethodSpec:
    """Returns a spec from `group_cam` or `group_cam:groups=16,variant=paper`; '-' and '_' are the same in the name.

    Raises:
        InvalidOption: not of that form; unknown method or parameter; a value out of range.
    """
    name, _, rest = text.partition(":")
    parameters = {}
    for pair in filter(None, rest.split(",")):
        key, equals, value = pair.partition("=")
        if not equals:
            raise InvalidOption(f"a method must be NAME[:KEY=VALUE,...], got {shown(text)}")
        parameters[key.strip()] = number_or_text(value.strip())
    return parse_method(name.strip().replace("-", "_"), parameters)


def number_or_text(text: str) -> int | float | str:
    """Returns the number that a text spells, or else the text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def method_text(spec: MethodSpec) -> str:
    """Returns the title and, in brackets, the parameters that differ from their defaults."""
    changed = [
        f"{parameter.name}={getattr(spec, parameter.name)}"
        for parameter in spec.parameters()
        if getattr(spec, parameter.name) != parameter.default
    ]
    return f"{spec.title} ({', '.join(changed)})" if changed else spec.title

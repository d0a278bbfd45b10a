"""Keeps with an archive what was found out about its network, so that loading it need not find it out again.

It holds for the weights, the way that images become input, and the versions of the packages that make up the network.
Where one of them is another, it is found out anew.
"""

from __future__ import annotations

import dataclasses
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camserve.archive.card import as_json
from camserve.archive.untrusted import ARCHIVE, parse_json, read_member, reading
from camserve.errors import InvalidInput
from camserve.methods.spec import ASSETS
from camserve.types import Layer

if TYPE_CHECKING:
    from camserve.saliency.layers import FoundLayer, Survey

SURVEY = "survey.json"
PACKAGES = ("torch", "torchvision", "timm", "efficientnet-lite-pytorch", "transformers")


def survey_members(found: Survey, weights: str) -> dict[str, bytes]:
    """Returns the file that `read_survey` reads, by name.

    Args:
        found: what was found out.
        weights: hash of the weights and of the preprocessing that it holds for.
    """
    return {SURVEY: as_json({"weights": weights, "versions": _versions(), "found": dataclasses.asdict(found)})}


def read_survey(path: Path, weights: str) -> Survey | None:
    """Returns what was found out about the network of a `.mar` file or of an unpacked archive directory.

    Args:
        path: the archive.
        weights: hash of its weights and preprocessing.

    Returns:
        None where the archive has nothing that holds for these weights and the packages installed here.

    Raises:
        InvalidInput: what the archive says of it cannot be read.
    """
    try:
        data = read_member(path, SURVEY)
    except InvalidInput:  # an archive of an earlier version
        return None
    content = parse_json(path, data, ARCHIVE)
    with reading(path, ARCHIVE):
        if (content["weights"], content["versions"]) != (weights, _versions()):
            return None
        return _survey(content["found"])


def _survey(content: dict[str, Any]) -> Survey:
    """Returns what a JSON text says; anything may be raised where it says something else."""
    from camserve.saliency.layers import Survey

    layers = tuple(map(_layer, content["layers"]))
    refused = {str(name): str(reason) for name, reason in content["refused"].items()}
    lacks = {asset: str(content["lacks"][asset]) for asset in ASSETS if asset in content["lacks"]}
    if ("layer" in lacks) == bool(layers):
        raise ValueError(f"{len(layers)} layers, and {lacks} is lacking")
    if content["default"] not in ({each.layer.name for each in layers} if layers else {""}):
        raise ValueError(f"the default layer {content['default']!r} is none of the layers")
    return Survey(
        layers=layers,
        default=content["default"],
        refused=refused,
        classifier=str(content["classifier"]),
        scores=_count(content["scores"]),
        keeps=bool(content["keeps"]),
        alone=bool(content["alone"]),
        lacks=lacks,
    )


def _layer(content: dict[str, Any]) -> FoundLayer:
    from camserve.saliency.arrangement import Arrangement
    from camserve.saliency.layers import FoundLayer

    layer, held = content["layer"], content["arrangement"]
    sizes = {name: _count(layer[name]) for name in ("channels", "height", "width")}
    grid = None
    if held["grid"] is not None:
        height, width = map(_count, held["grid"])
        grid = (height, width)
    return FoundLayer(
        Layer(str(layer["name"]), **sizes, pooled_head=bool(layer["pooled_head"])),
        tuple(map(_count, content["calls"])),
        Arrangement(bool(held["channels_last"]), grid, tuple(int(position) for position in held["own"])),
        cut=bool(content["cut"]),
    )


def _count(value: Any) -> int:
    if type(value) is not int or not 0 < value < 2**31:
        raise ValueError(f"{value!r} is no count")
    return value


def _versions() -> dict[str, str]:
    return {name: found for name in PACKAGES if (found := _version(name))}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""

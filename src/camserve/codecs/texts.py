"""Serves the doors that have no typed messages: options by name, and JSON of what an answer says.

The value of an option is a text, a number, true or false, or, where JSON is spoken, a list or an object. `FIELDS` says
how the value of each becomes a field of the request.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from camserve.codecs.target_json import check_targets, read_target
from camserve.errors import InvalidOption
from camserve.images import ImageContent
from camserve.methods import GradCam, MethodSpec, number_or_text, parse_method, parse_method_text
from camserve.types import BoxOptions, Cost, Prediction, SaliencyMap
from camserve.types.request import ExplainRequest, OutputOptions, RequestLimits
from camserve.types.targets import split_targets
from camserve.wording import shown

_OF_OUTPUT = ("size", "boxes", "signed")


def request(
    image: ImageContent, names: Mapping[str, str], values: Mapping[str, Any], limits: RequestLimits, **output: Any
) -> ExplainRequest:
    """Returns the request that options by name make.

    Args:
        image: the image to explain.
        names: field of the request by option name.
        values: values of the options that came, by name; each has a field.
        limits: bounds how many methods, targets and layers there are, and how long their names.
        output: output options that the door itself decides.

    Raises:
        InvalidOption: a value does not have the form of its option, or is not allowed.
    """
    fields = {names[name]: _field(names[name], name, value, limits) for name, value in values.items()}
    output |= {field: fields.pop(field) for field in _OF_OUTPUT if field in fields}
    return ExplainRequest(image, output=OutputOptions(**output), **fields)


def _field(field: str, name: str, value: Any, limits: RequestLimits) -> Any:
    """Returns the value of a field; the entries of a list are counted and measured before one of them is read."""
    if field == "text" and isinstance(value, str):
        limits.check_texts([value])
    if field not in LISTS:
        return FIELDS[field](name, value)
    split, read = LISTS[field]
    entries = split(name, value)
    limits.check_counts(**{field: len(entries)})
    if field == "targets":  # some are texts of several names
        check_targets(entries, limits)
    else:
        limits.check_names(entry for entry in entries if isinstance(entry, str))
    return tuple(read(name, entry) for entry in entries) or _DEFAULTS.get(field, ())


def _methods(name: str, value: Any) -> list[Any]:
    """Returns the entries of `grad_cam group_cam:groups=16`, or of a list of such texts and of objects with a name."""
    return value if isinstance(value, list) else list(filter(None, re.split(r"[;\s]+", text(name, value))))


def _method(name: str, value: Any) -> MethodSpec:
    if isinstance(value, str):
        return parse_method_text(value)
    if not (isinstance(value, dict) and isinstance(value.get("name"), str)):
        raise InvalidOption(
            f"{name}: a method is a text, or an object with its name and parameters, got {_shown(value)}"
        )
    parameters = {
        key: number_or_text(item) if isinstance(item, str) else item for key, item in value.items() if key != "name"
    }
    return parse_method(value["name"].strip().replace("-", "_"), parameters)


def _targets(name: str, value: Any) -> list[Any]:
    """Returns the entries of `281,tabby;contrast:tabby>lynx`, or of a list of those, of indices and of objects.

    A text that begins like JSON is read as JSON: some clients can only send texts.
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        value = _json(name, value)
    values = split_targets(value) if isinstance(value, str) else value if isinstance(value, list) else [value]
    return [each for each in values if not (isinstance(each, str) and not each.strip())]


def _json(name: str, value: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise InvalidOption(f"{name}: a text that begins with {value.lstrip()[0]} must be JSON: {error}") from None


def _layers(name: str, value: Any) -> list[Any]:
    """Returns the entries of `stem,features`, or of a list of names."""
    values = value if isinstance(value, list) else text(name, value).split(",")
    return [each for each in values if not (isinstance(each, str) and not each.strip())]


def _layer(name: str, value: Any) -> str:
    return text(name, value).strip()


LISTS: Mapping[str, tuple[Callable[[str, Any], list[Any]], Callable[[str, Any], Any]]] = {
    "methods": (_methods, _method),
    "targets": (_targets, read_target),
    "layers": (_layers, _layer),
}
"""Functions by field that split the value of an option into entries, and that read one entry."""

_DEFAULTS: Mapping[str, Any] = {"methods": (GradCam(),)}


def boxes(name: str, value: Any) -> BoxOptions | None:
    """Returns the options of `true`, of a threshold, or of either followed by `all`: a box around each component."""
    words = str(value).lower().split()
    everything = words[-1:] == ["all"]
    if words == ["false"]:
        return None
    if words in (["true"], ["true", "all"], ["all"]):
        return BoxOptions(all_components=everything)
    try:
        (threshold,) = map(float, words[: len(words) - everything])
    except ValueError:  # no number, or another number of words
        raise InvalidOption(
            f"{name} must be true, false or a threshold, perhaps followed by all, got {_shown(value)}"
        ) from None
    return BoxOptions(threshold, everything)


def text(name: str, value: Any) -> str:
    """Returns the value of an option that is a text."""
    if isinstance(value, str):
        return value
    raise InvalidOption(f"{name} must be a text, got {_shown(value)}")


def whole(name: str, value: Any) -> int:
    """Returns a whole number; some clients can only send it as a text."""
    if isinstance(value, str) and re.fullmatch(r"-?\d{1,18}", value.strip(), re.ASCII):
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise InvalidOption(f"{name} must be a whole number, got {_shown(value)}")


def switch(name: str, value: Any) -> bool:
    """Returns true or false, which may be a text as well."""
    found = {"true": True, "false": False}.get(str(value).strip().lower())
    if found is None:
        raise InvalidOption(f"{name} must be true or false, got {_shown(value)}")
    return found


def _unread(name: str, value: Any) -> Any:
    """Returns the value unchanged, because the request checks it itself."""
    return value


FIELDS: Mapping[str, Callable[[str, Any], Any]] = {
    "fusion": _unread,
    "size": _unread,
    "boxes": boxes,
    "signed": switch,
    "precision": _unread,
    "top_predictions": whole,
    "evaluate": switch,
    "evaluation_steps": whole,
    "allow_partial": switch,
    "priority": _unread,
    "version": text,
    "text": text,
}
"""Functions by field that make its value from an option's name and value; a wrong form raises InvalidOption."""


def _shown(value: Any) -> str:
    return "nothing" if value is None else shown(value)


def prediction_json(prediction: Prediction) -> dict[str, Any]:
    """Returns what is said of a class, a number or a packed reference; what its kind does not have is left out."""
    return {
        key: value for key, value in asdict(prediction).items() if value is not None and (key, value) != ("unit", "")
    }


def map_json(saliency: SaliencyMap) -> dict[str, Any]:
    """Returns the description of a map, without its pixels."""
    described: dict[str, Any] = {
        "method": saliency.method.name,
        "parameters": asdict(saliency.method),
        "target": prediction_json(saliency.target),
        "target_text": saliency.target_text,
        "classes": [prediction_json(prediction) for prediction in saliency.classes],
        "score": saliency.score,
        "signed": saliency.signed,
        "layers": list(saliency.layers),
        "complete": saliency.complete,
        "fraction": saliency.fraction,
        "degenerate": saliency.degenerate,
        "boxes": [asdict(box) for box in saliency.boxes],
    }
    if saliency.choice:
        described["choice"] = saliency.choice
    if saliency.estimated_difference is not None:
        described["estimated_difference"] = saliency.estimated_difference
    if (found := saliency.faithfulness) is not None:
        described |= {"insertion_auc": found.insertion_auc, "deletion_auc": found.deletion_auc}
    return described


def cost_json(cost: Cost) -> dict[str, Any]:
    """Returns what an explanation took."""
    return vars(cost) | {"stage_seconds": dict(cost.stage_seconds)}

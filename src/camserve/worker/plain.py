"""What plain TorchServe clients send and get: an image with options, answered by JSON.

    curl -T cat.jpg localhost:8080/predictions/lite0
    curl -F data=@cat.jpg -F method=group_cam -F groups=16 -F target=tabby localhost:8080/predictions/lite0

Options come as form fields (TorchServe 0.12 drops the query string of /predictions), over gRPC as further entries of
`input`, or as a JSON object under `options`:

    method      name of a method; its parameters stand beside it
    methods     a list of {"name": ..., parameter: ...} instead, in `options` only
    target      class index, label, or "top3"; comma-separated for several
    targets     a list of those instead, in `options` only
    layer       name, comma-separated for several, whose maps are fused by `fusion` (mean or max)
    size, precision, top_predictions     as in the gRPC API, lower case
    format      png (default): base64 of a grey PNG; overlay: base64 of an overlay PNG; float: nested lists;
                none: no maps
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from camserve.errors import CamserveError, InvalidImage, InvalidInput, InvalidOption
from camserve.finalise.encode import encode
from camserve.methods import METHODS, MethodSpec, parse_method
from camserve.types import FUSIONS, MAP_SIZES, PRECISIONS, Explanation, ModelInfo, SaliencyMap, Target
from camserve.worker.answers import Whole, whole_request

FORMATS = ("png", "overlay", "float", "none")
IMAGE_KEYS = ("data", "body")
_OPTIONS = (
    "method",
    "methods",
    "target",
    "targets",
    "layer",
    "fusion",
    "size",
    "precision",
    "top_predictions",
    "format",
)


@dataclass(frozen=True)
class PlainRequest:
    """One plain client's request."""

    whole: Whole
    format: str


def parse(entry: Mapping[str, Any], info: ModelInfo) -> PlainRequest:
    """A request from what TorchServe hands to a handler for one client.

    Raises:
        InvalidInput: no image, or a bad option.
    """
    image = next((entry[key] for key in IMAGE_KEYS if key in entry), None)
    if not isinstance(image, (bytes, bytearray)):
        raise InvalidImage("send an image file as the request's body, or under the key 'data'")
    options = _options(entry)
    whole = whole_request(
        info,
        bytes(image),
        _methods(options),
        _targets(options),
        layer=str(options.get("layer", "")).split(","),
        fusion=_choice(options, "fusion", FUSIONS),
        precision=_choice(options, "precision", PRECISIONS),
        top_predictions=_integer(options, "top_predictions", 5),
        size=_choice(options, "size", MAP_SIZES),
    )
    return PlainRequest(whole, _choice(options, "format", FORMATS))


def render(request: PlainRequest, answer: Explanation) -> bytes:
    """The JSON reply."""
    maps = [] if request.format == "none" else [_map(saliency, request.format) for saliency in answer.maps]
    reply = {
        "model": answer.model,
        "version": answer.version,
        "predictions": [asdict(prediction) for prediction in answer.predictions],
        "maps": maps,
        "cost": asdict(answer.cost),
    }
    return json.dumps(reply).encode()


def render_error(error: CamserveError) -> bytes:
    """The JSON reply to a request that failed."""
    return json.dumps({"error": {"kind": type(error).__name__, "message": str(error)}}).encode()


def _options(entry: Mapping[str, Any]) -> dict[str, Any]:
    options = {key: _text(value) for key, value in entry.items() if key not in (*IMAGE_KEYS, "options")}
    if "options" in entry:
        given = entry["options"]
        try:
            given = given if isinstance(given, dict) else json.loads(_text(given))
        except ValueError as error:
            raise InvalidOption(f"options must be a JSON object: {error}") from None
        if not isinstance(given, dict):
            raise InvalidOption(f"options must be a JSON object, got {given!r}")
        options |= given
    return options


def _text(value: Any) -> str:
    try:
        return bytes(value).decode() if isinstance(value, (bytes, bytearray)) else str(value)
    except UnicodeDecodeError:
        raise InvalidInput("options must be UTF-8 text") from None


def _methods(options: Mapping[str, Any]) -> list[MethodSpec]:
    if "methods" in options:
        return [_method(value) for value in _list(options, "methods")]
    name = str(options.get("method", "grad_cam"))
    parameters = {key: _value(value) for key, value in options.items() if key not in _OPTIONS}
    return [parse_method(name, parameters)]


def _method(value: Any) -> MethodSpec:
    if isinstance(value, str):
        return parse_method(value)
    if isinstance(value, dict) and value.get("name") in METHODS:
        return parse_method(value["name"], {key: item for key, item in value.items() if key != "name"})
    raise InvalidOption(f"a method is a name or an object with one of the names {', '.join(METHODS)}, got {value!r}")


def _targets(options: Mapping[str, Any]) -> list[Target]:
    values = _list(options, "targets") if "targets" in options else str(options.get("target", "")).split(",")
    return [_target(value) for value in values if value != ""]


def _target(value: Any) -> Target:
    text = str(value).strip()
    if text.isdigit():
        return Target(index=int(text))
    top = re.fullmatch(r"top(\d+)", text)
    return Target(top_k=int(top[1])) if top else Target(label=text)


def _value(value: Any) -> Any:
    """A number where a form field looks like one."""
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            pass
    return value


def _list(options: Mapping[str, Any], key: str) -> list[Any]:
    if not isinstance(options[key], list):
        raise InvalidOption(f"{key} must be a list, got {options[key]!r}")
    return list(options[key])


def _integer(options: Mapping[str, Any], key: str, default: int) -> int:
    value = str(options.get(key, default))
    if not value.isdigit():
        raise InvalidOption(f"{key} must be an integer of at least 0, got {value!r}")
    return int(value)


def _choice(options: Mapping[str, Any], key: str, allowed: tuple[Any, ...]) -> Any:
    """The first choice is the default."""
    value = options.get(key, allowed[0])
    if value not in allowed:
        raise InvalidOption(f"{key} must be one of {', '.join(allowed)}, got {value!r}")
    return value


def _map(saliency: SaliencyMap, form: str) -> dict[str, Any]:
    described = {
        "method": saliency.method.name,
        "parameters": asdict(saliency.method),
        "target": asdict(saliency.target),
        "layers": list(saliency.layers),
        "shape": list(saliency.array.shape),
        "degenerate": saliency.degenerate,
    }
    if form == "float":
        return described | {"values": saliency.array.tolist()}
    encoding = "png" if form == "png" else "overlay_png"
    data = encode(saliency, encoding, saliency.image, colormap="jet", opacity=0.5)
    return described | {"png": base64.b64encode(data).decode()}

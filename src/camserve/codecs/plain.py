"""Reads what plain TorchServe clients send, an image with options, and writes the JSON that they get.

    curl -T cat.jpg localhost:8080/predictions/lite0
    curl -F data=@cat.jpg -F method=group_cam -F groups=16 -F target=tabby localhost:8080/predictions/lite0

Options come as form fields (TorchServe 0.12 drops the query string of /predictions), over gRPC as further entries of
`input`, or as a JSON object under `options`:

    method, methods     NAME[:KEY=VALUE,...], several by spaces or `;`, or a list of those and of
                        {"name": ..., parameter: ...}; the parameters of a single method may stand beside it
    target, targets     class index, label, "top3" or another text form (see camserve.types.targets); several by commas
                        or `;`, or a list of those and of objects (see camserve.codecs.target_json)
    text                what the model takes beside the image: the question of outputs answers, the caption so far of
                        outputs tokens
    layer, layers       name, several by commas or a list, whose maps are fused by `fusion` (mean or max)
    size                size of the maps: input, layer or original
    signed              true: maps in [-1, 1], with the evidence against the target below 0
    boxes               true, or a threshold in 0..1: adds bounding boxes; `all` behind it: a box around each component
    precision           auto, exact or bfloat16
    top_predictions     how many of the most probable classes are listed
    evaluate            true: adds insertion and deletion of each map
    evaluation_steps    number of steps of each of their curves
    version             version of the model: another one than that which is served is refused
    format              png (default): base64 of a grey PNG; overlay: base64 of an overlay PNG; float: nested lists;
                        none: no maps are made

Clients of this door are others', so only the server's direction is here. TorchServe has a queue of its own and knows no
deadline: `priority` and `allow_partial` do not exist here.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from camserve.codecs import texts
from camserve.errors import CamserveError, InvalidImage, InvalidOption
from camserve.finalise import encode as encodings
from camserve.methods import METHODS
from camserve.types import Explanation, SaliencyMap
from camserve.types.request import UNBOUNDED, ExplainRequest, RequestLimits
from camserve.wording import shown

FORMATS: Mapping[str, str] = {"png": "png", "overlay": "overlay_png", "float": "float32", "none": "float32"}
"""Encoding of the maps by format; the first format is the default."""

OPTIONS: Mapping[str, str] = {
    "method": "methods",
    "methods": "methods",
    "target": "targets",
    "targets": "targets",
    "text": "text",
    "layer": "layers",
    "layers": "layers",
    "fusion": "fusion",
    "size": "size",
    "signed": "signed",
    "boxes": "boxes",
    "precision": "precision",
    "top_predictions": "top_predictions",
    "evaluate": "evaluate",
    "evaluation_steps": "evaluation_steps",
    "version": "version",
}
"""Field of a request by the option that sets it; `format` is beside them."""

_IMAGE_KEYS = ("data", "body")
_PARAMETERS = frozenset(parameter.name for spec in METHODS.values() for parameter in spec.parameters())


@dataclass(frozen=True, eq=False)
class Plain:
    """Holds one plain client's request, and what its maps shall look like."""

    request: ExplainRequest
    format: str


def decode(entry: Mapping[str, Any], limits: RequestLimits = UNBOUNDED) -> Plain:
    """Returns the request in what TorchServe hands to a handler for one client.

    Raises:
        InvalidInput: no image, or a bad option, as far as that shows without the model.
    """
    image = next((entry[key] for key in _IMAGE_KEYS if key in entry), None)
    if not isinstance(image, (bytes, bytearray)):
        raise InvalidImage("send an image file as the request's body, or under the key 'data'")
    limits.check_options(
        sum(len(value) for value in entry.values() if isinstance(value, (bytes, bytearray, str))) - len(image)
    )
    options = _options(entry)
    form = options.pop("format", "png")
    if form not in tuple(FORMATS):  # what JSON brings may not be hashable
        raise InvalidOption(f"format must be one of {', '.join(FORMATS)}, got {shown(form)}")
    request = texts.request(bytes(image), OPTIONS, _by_field(options), limits, encoding=FORMATS[form])
    return Plain(request.without_maps() if form == "none" else request, form)


def encode(explanation: Explanation, format: str) -> bytes:  # noqa: A002  # the option's name
    """Returns the JSON reply with the maps in one of `FORMATS`."""
    maps = () if format == "none" else explanation.maps
    reply = {
        "model": explanation.model,
        "version": explanation.version,
        "predictions": [texts.prediction_json(prediction) for prediction in explanation.predictions],
        "maps": [_map(saliency, format) for saliency in maps],
        "cost": texts.cost_json(explanation.cost),
    }
    return json.dumps(reply).encode()


def encode_error(error: CamserveError) -> bytes:
    """Returns the JSON reply to a request that failed."""
    return json.dumps({"error": {"kind": type(error).__name__, "message": str(error)}}).encode()


def _options(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options by name; those of the JSON object win over form fields."""
    options = {key: _text(value) for key, value in entry.items() if key not in _IMAGE_KEYS}
    given = options.pop("options", {})
    try:
        given = json.loads(given) if isinstance(given, str) else given
    except (ValueError, RecursionError) as error:
        raise InvalidOption(f"options must be a JSON object: {error}") from None
    if not isinstance(given, dict):
        raise InvalidOption(f"options must be a JSON object, got {shown(given)}")
    return options | given


def _text(value: Any) -> Any:
    """Returns a form field as a text; a value that is not bytes is returned unchanged."""
    try:
        return bytes(value).decode() if isinstance(value, (bytes, bytearray)) else value
    except UnicodeDecodeError:
        raise InvalidOption("options must be UTF-8 text") from None


def _by_field(options: dict[str, Any]) -> dict[str, Any]:
    """Returns the options without parameters, which go to their method; each field comes once."""
    parameters = {name: options.pop(name) for name in list(options) if name not in OPTIONS}
    for name in parameters:
        if name not in _PARAMETERS:
            there_are = ", ".join([*OPTIONS, "format"])
            raise InvalidOption(
                f"unknown option {shown(name)}; there are {there_are}, and the parameters of the method"
            )
    fields = [OPTIONS[name] for name in options]
    for name, other in (("method", "methods"), ("target", "targets"), ("layer", "layers")):
        if fields.count(other) > 1:
            raise InvalidOption(f"say {name} or {other}, not both")
    return options | {"method": [_single(options, parameters)]} if parameters else options


def _single(options: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the method with the parameters that stand beside it."""
    name = texts.text("method", options.get("method", "grad_cam"))
    if "methods" in options or len(name.replace(";", " ").split()) != 1 or ":" in name:
        raise InvalidOption(f"{next(iter(parameters))} stands beside a single method; here write NAME:KEY=VALUE")
    return {"name": name, **parameters}


def _map(saliency: SaliencyMap, form: str) -> dict[str, Any]:
    described = texts.map_json(saliency) | {"shape": list(saliency.array.shape)}
    if form == "float":
        return described | {"values": saliency.array.tolist()}
    data = encodings.encode(saliency, FORMATS[form])
    return described | {"png": base64.b64encode(data).decode()}

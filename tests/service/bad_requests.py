"""Requests that must be refused, as data, and how each is said at every door.

A request is said in public names: the texts of methods and targets as on the command line, names of layers, an image as
the bytes of a file or as an array. All are held against the model of `tiny.tiny_network()`. The conversions are a part
of their doors: they may raise, as `BoxOptions(1.5)` does before the engine sees it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

import numpy as np
from google.protobuf.message import Message
from PIL import Image

from camserve.codecs import v1
from camserve.errors import CamserveError, InvalidImage, InvalidOption, NotFound, Unsupported
from camserve.methods import number_or_text, parse_method_text
from camserve.oip import inference_pb2 as oip
from camserve.types import AnyTarget, BoxOptions, Target
from camserve.types.request import ExplainRequest, OutputOptions, RequestLimits
from camserve.types.targets import parse_target
from camserve.v1 import explain_pb2 as pb

LIMITS = RequestLimits(
    image_bytes=50_000, image_pixels=40_000, methods=3, layers=2, targets=8, map_pixels=16_000, auto=True
)
"""Of the servers."""

SETTINGS = {
    "max_image_bytes": LIMITS.image_bytes,
    "max_image_pixels": LIMITS.image_pixels,
    "max_methods": LIMITS.methods,
    "max_layers": LIMITS.layers,
    "max_targets": LIMITS.targets,
    "max_map_pixels": LIMITS.map_pixels,
}
"""The gateway's settings for these limits."""


class Door(StrEnum):
    """Where requests come in."""

    V1 = "typed gRPC"
    OIP = "Open Inference Protocol"
    PLAIN = "TorchServe's plain API"
    ENGINE = "Engine"
    LOCAL = "camserve explain --local"
    REMOTE = "camserve explain"


EVERY = frozenset(Door)
CLI = frozenset({Door.LOCAL, Door.REMOTE})
SERVERS = frozenset({Door.V1, Door.OIP, Door.REMOTE})
"""Where limits hold."""
NO_SERVER = EVERY - SERVERS
TEXTS = EVERY - {Door.V1}
"""Where names are texts, and not fields or enums."""
FREE = frozenset({Door.OIP, Door.PLAIN, Door.ENGINE})
"""Where any value can be said: the command line has choices, and typed gRPC has enums and unsigned numbers."""


@dataclass(frozen=True, eq=False)
class BadRequest:
    """A request that every door in which it can be said refuses with the same sentence."""

    name: str
    changes: Mapping[str, Any]
    """What differs from Grad-CAM of a good photo, by public names; see `to_request`."""
    sentence: str
    """A part of what is said."""
    doors: frozenset[Door] = EVERY
    kind: type[CamserveError] = InvalidOption
    noticed_by: Literal["request", "server", "worker"] = "request"
    """request: while it is read or held against the model. server: where the model is looked up. worker: only there."""


def picture(size: tuple[int, int] = (48, 64), kind: str = "PNG", **options: Any) -> bytes:
    """Returns an image file of noise; `size` is (height, width)."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


PHOTO = picture()


def _scans(number: int) -> bytes:
    """Returns a progressive JPEG with a number of scans."""
    file = io.BytesIO()
    Image.new("L", (80, 60), 77).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * (number - data.count(b"\xff\xda")) + data[-2:]


def _gif(frames: int) -> bytes:
    images = [Image.new("L", (8, 8), 80 * place) for place in range(frames)]
    file = io.BytesIO()
    images[0].save(file, "GIF", save_all=True, append_images=images[1:])
    return file.getvalue()


def _flat(height: int, width: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (width, height)).save(file, "PNG")
    return file.getvalue()


def _floats(value: float, size: tuple[int, int] = (48, 64)) -> np.ndarray:
    return np.full((*size, 3), value, np.float32)


_ARRAYS = frozenset({Door.V1, Door.OIP, Door.ENGINE})
_MANY_BYTES = SERVERS | {Door.PLAIN}

IMAGES = (
    BadRequest("empty image", {"image": b""}, "the image has zero bytes", kind=InvalidImage),
    BadRequest("text for an image", {"image": b"a cat"}, "not a JPEG, PNG, WEBP image (5 bytes)", kind=InvalidImage),
    BadRequest("SVG", {"image": b"<svg xmlns='x'/>"}, "not a JPEG, PNG, WEBP image (16 bytes)", kind=InvalidImage),
    BadRequest("GIF", {"image": _gif(1)}, "not a JPEG, PNG, WEBP image", kind=InvalidImage),
    BadRequest("animated GIF", {"image": _gif(3)}, "not a JPEG, PNG, WEBP image", kind=InvalidImage),
    BadRequest(
        "image cut in its header", {"image": PHOTO[:20]}, "the image file is broken or truncated: ", kind=InvalidImage
    ),
    BadRequest(
        "PNG cut in its pixels",
        {"image": PHOTO[:200]},
        "the PNG file is broken or truncated: ",
        kind=InvalidImage,
        noticed_by="worker",
    ),
    BadRequest(
        "JPEG cut in its pixels",
        {"image": picture(kind="JPEG")[:900]},
        "the JPEG file is broken or truncated: ",
        kind=InvalidImage,
        noticed_by="worker",
    ),
    BadRequest(
        "too many bytes",
        {"image": picture((150, 200))},
        "an image may have at most 50000 bytes, got ",
        _MANY_BYTES,
        InvalidImage,
    ),
    BadRequest(
        "too many pixels",
        {"image": _flat(201, 200)},
        "an image may have at most 40000 pixels, got 200 x 201 = 40200",
        _MANY_BYTES,
        InvalidImage,
    ),
    BadRequest(
        "many scans",
        {"image": _scans(65)},
        "a JPEG file may have at most 64 scans, got more",
        kind=InvalidImage,
    ),
    BadRequest(
        "elongated image",
        {"image": _flat(1, 40_000)},
        "an image of 40000 x 1 is too elongated to be resized",
        kind=InvalidImage,
    ),
    BadRequest(
        "floats of another size",
        {"image": _floats(0.5, (20, 30))},
        "a float32 image must have the network's input size [48, 64], got [20, 30]",
        _ARRAYS,
        InvalidImage,
    ),
    BadRequest(
        "floats above one",
        {"image": _floats(1.5)},
        "a float32 image must have finite pixels in [0, 1]",
        _ARRAYS,
        InvalidImage,
    ),
    BadRequest(
        "floats that are no numbers",
        {"image": _floats(np.nan)},
        "a float32 image must have finite pixels in [0, 1]",
        _ARRAYS,
        InvalidImage,
    ),
    BadRequest(
        "doubles",
        {"image": np.zeros((48, 64, 3))},
        "an image array must be uint8 or float32 (height, width, 3) or, grey, (height, width), got float64 [48, 64, 3]",
        frozenset({Door.ENGINE}),
        InvalidImage,
    ),
    BadRequest(
        "four channels",
        {"image": np.zeros((48, 64, 4), np.uint8)},
        "an image array must be uint8 or float32 (height, width, 3) or, grey, (height, width), got uint8 [48, 64, 4]",
        frozenset({Door.ENGINE}),
        InvalidImage,
    ),
)

TARGETS = (
    BadRequest("unknown label", {"target": "zeppelin"}, "unknown label 'zeppelin'"),
    BadRequest("misspelt label", {"target": "tabi cat"}, "unknown label 'tabi cat'; close to it: 'tabby cat'"),
    BadRequest("ambiguous label", {"target": "crane"}, "label 'crane' names classes 3, 4: use the index"),
    BadRequest("a sign before an index", {"target": "-1"}, "unknown label '-1'"),
    BadRequest("a digit that is no number", {"target": "²"}, "unknown label '²'"),
    BadRequest("top of nothing known", {"target": "top²"}, "unknown label 'top²'"),
    BadRequest("one bad target among good ones", {"target": ("1", "6", "0")}, "class index must be 0..5, got 6"),
    BadRequest("index out of range", {"target": "6"}, "class index must be 0..5, got 6"),
    BadRequest(
        "index that no field holds",
        {"target": "99999999999"},
        "class index must be 0..5, got 99999999999",
        EVERY - {Door.V1, Door.REMOTE},
    ),
    BadRequest("negative index", {"target": -1}, "class index must be 0..5, got -1", FREE),
    BadRequest("top 0", {"target": "top0"}, "top_k must be at least 1, got 0"),
    BadRequest("more than all classes", {"target": "top7"}, "top_k must be 1..6, got 7"),
    BadRequest("unknown label in a contrast", {"target": "contrast:1>zeppelin"}, "unknown label 'zeppelin'"),
    BadRequest("misspelt label to be finer", {"target": "finer:tabi cat"}, "close to it: 'tabby cat'"),
    BadRequest("index out of range, against", {"target": "against:6"}, "class index must be 0..5, got 6"),
    BadRequest("more than all classes, finer", {"target": "finer:top7"}, "top_k must be 1..6, got 7"),
    BadRequest(
        "a class against itself", {"target": "contrast:1>0,1"}, "contrast names each class once, got tiger cat twice"
    ),
    BadRequest(
        "a good target and a class against itself",
        {"target": ("1", "contrast:tiger cat>2,1")},
        "contrast names each class once, got tiger cat twice",
    ),
    BadRequest(
        "a number of a model of classes",
        {"target": "up:1"},
        "gives classes, and its targets are class ('tabby cat'), contrast ('contrast:tabby cat>tiger cat'), finer "
        "('finer:tabby cat'), against ('against:tabby cat'); got 'up:1'",
        kind=Unsupported,
    ),
    BadRequest(
        "a detection of a model of classes",
        {"target": "detection:0"},
        "('against:tabby cat'); got 'detection:0'",
        kind=Unsupported,
    ),
    BadRequest(
        "a form that is none",
        {"target": "txet:a cat"},
        "the targets of this model are class ('tabby cat'), contrast (",
    ),
    BadRequest("a contrast with nothing", {"target": "contrast:1>"}, "such as 'contrast:tabby>lynx', got", TEXTS),
    BadRequest("a contrast with the top", {"target": "contrast:1>top2"}, "named ones, got top2", TEXTS),
    BadRequest("too much gamma", {"target": "contrast:1>11*2"}, "gamma must be 0..10, got 11.0", TEXTS),
    BadRequest("finer than nothing", {"target": "finer:"}, "finer: what of? For example 'finer:tabby'", TEXTS),
)

LAYERS = (
    BadRequest("unknown layer", {"layer": "nowhere"}, "unknown layer 'nowhere'; the default is '4'"),
    BadRequest("one bad layer", {"layer": ("4", "nowhere")}, "unknown layer 'nowhere'; the default is '4'"),
    BadRequest("layer twice", {"layer": ("4", "4")}, "layers: each may come once, got 4, 4"),
    BadRequest(
        "several layers of layer size",
        {"layer": ("2", "4"), "size": "layer"},
        "the map of several layers has size input or original, not layer",
    ),
)

METHODS = (
    BadRequest("unknown method", {"method": "grad_kam"}, "unknown method 'grad_kam'; there are cam, grad_cam", TEXTS),
    BadRequest(
        "one unknown method", {"method": ("grad_cam", "kam")}, "unknown method 'kam'; there are cam, grad_cam", TEXTS
    ),
    BadRequest(
        "unknown parameter",
        {"method": "group_cam:size=3"},
        "group_cam: unknown parameter 'size'; it has groups, theta, variant, grouping",
        TEXTS,
    ),
    BadRequest(
        "parameter where there is none",
        {"method": "grad_cam:groups=3"},
        "grad_cam: unknown parameter 'groups'; it has no parameters",
        TEXTS,
    ),
    BadRequest("no groups", {"method": "group_cam:groups=0"}, "group_cam: groups must be at least 1, got 0"),
    BadRequest(
        "more groups than channels",
        {"method": "group_cam:groups=13"},
        "group_cam: groups must be 1..12 at this layer, got 13",
    ),
    BadRequest(
        "groups that no field holds",
        {"method": "group_cam:groups=99999999999"},
        "group_cam: groups must be 1..12 at this layer, got 99999999999",
        EVERY - {Door.V1, Door.REMOTE},
    ),
    BadRequest("negative groups", {"method": "group_cam:groups=-4"}, "group_cam: groups must be at least 1", TEXTS),
    BadRequest(
        "half a group", {"method": "group_cam:groups=1.5"}, "group_cam: groups must be an integer, got 1.5", TEXTS
    ),
    BadRequest(
        "a word for a number",
        {"method": "group_cam:groups=many"},
        "group_cam: groups must be an integer, got 'many'",
        TEXTS,
    ),
    BadRequest("theta", {"method": "group_cam:theta=100.5"}, "group_cam: theta must be 0..100, got 100.5"),
    BadRequest(
        "theta that is no number", {"method": "group_cam:theta=nan"}, "group_cam: theta must be a number, got nan"
    ),
    BadRequest(
        "unknown variant",
        {"method": "group_cam:variant=best"},
        "group_cam: variant must be one of paper, reference, got 'best'",
        TEXTS,
    ),
    BadRequest("too many samples", {"method": "ss_cam:samples=1001"}, "ss_cam: samples must be 1..1000, got 1001"),
    BadRequest("no masks", {"method": "rise:masks=0"}, "rise: masks must be 1..100000, got 0"),
    BadRequest(
        "more than everything kept", {"method": "rise:keep_prob=1.5"}, "rise: keep_prob must be 0.001..1, got 1.5"
    ),
    BadRequest("fine grid", {"method": "rise:grid=65"}, "rise: grid must be 1..64, got 65"),
    BadRequest("large seed", {"method": "rise:seed=3000000000"}, "rise: seed must be 0..2.14748e+09, got 3000000000"),
    BadRequest("negative noise", {"method": "smooth_grad:sigma=-0.5"}, "smooth_grad: sigma must be 0..1, got -0.5"),
    BadRequest("many positions", {"method": "occlusion:positions=225"}, "occlusion: positions must be 1..224, got 225"),
    BadRequest(
        "auto without a server",
        {"method": "auto"},
        "auto: a server chooses, by its load and the deadline; here name a method",
        NO_SERVER,
    ),
    BadRequest(
        "CAM behind two layers",
        {"method": "cam"},
        "CAM needs a head of global average pooling and one linear layer; here is another",
        kind=Unsupported,
        noticed_by="worker",
    ),
    BadRequest(
        "attention of a convolution",
        {"method": "attention_rollout"},
        "attention maps need a vision transformer; no attention was seen in this network",
        kind=Unsupported,
        noticed_by="worker",
    ),
)

_STEPS = FREE | {Door.V1}
_OVERLAYS = frozenset({Door.V1, Door.PLAIN})

OPTIONS = (
    BadRequest(
        "a signed map of a method without negative evidence",
        {"method": ("grad_cam", "eigen_cam"), "signed": True},
        "eigen_cam has no signed maps: a principal component speaks neither for nor against anything; these methods",
    ),
    BadRequest("unknown size", {"size": "huge"}, "size must be one of input, layer, original, got 'huge'", FREE),
    BadRequest("size in capitals", {"size": "INPUT"}, "size must be one of input, layer, original, got 'INPUT'", FREE),
    BadRequest(
        "unknown precision", {"precision": "int8"}, "precision must be one of auto, exact, bfloat16, got 'int8'", FREE
    ),
    BadRequest("unknown fusion", {"fusion": "sum"}, "fusion must be one of mean, max, got 'sum'", FREE),
    BadRequest(
        "unknown priority",
        {"priority": "urgent"},
        "priority must be one of interactive, normal, batch, got 'urgent'",
        frozenset({Door.OIP}),
    ),
    BadRequest("negative predictions", {"top_predictions": -1}, "top_predictions must be at least 0, got -1", FREE),
    BadRequest(
        "too many steps",
        {"evaluate": True, "evaluation_steps": 5000},
        "evaluation_steps must be 1..4096, got 5000",
        _STEPS,
    ),
    BadRequest("steps of nothing", {"evaluation_steps": 5000}, "evaluation_steps must be 1..4096, got 5000", _STEPS),
    BadRequest("no steps", {"evaluate": True, "evaluation_steps": 0}, "evaluation_steps must be 1..4096, got 0", FREE),
    BadRequest("negative steps", {"evaluation_steps": -3}, "evaluation_steps must be 1..4096, got -3", FREE),
    BadRequest("high threshold", {"boxes": 1.5}, "box threshold must be 0..1, got 1.5", _STEPS),
    BadRequest("negative threshold", {"boxes": -0.5}, "box threshold must be 0..1, got -0.5", _STEPS),
    BadRequest("threshold that is no number", {"boxes": np.nan}, "box threshold must be 0..1, got nan", _STEPS),
    BadRequest(
        "overlay of layer size",
        {"encoding": "overlay_png", "size": "layer"},
        "an overlay has size input or original, not layer",
        _OVERLAYS,
    ),
    BadRequest(
        "unknown colormap",
        {"encoding": "overlay_png", "colormap": "rainbow"},
        "colormap must be one of jet, turbo, viridis, inferno, magma, got 'rainbow'",
        frozenset({Door.V1}),
    ),
    BadRequest(
        "opacity",
        {"encoding": "overlay_png", "opacity": 1.5},
        "opacity must be 0..1, got 1.5",
        frozenset({Door.V1}),
    ),
    BadRequest(
        "wrong version",
        {"version": "0.9"},
        "model tiny is served in version 1.0, not '0.9'",
        frozenset({Door.V1, Door.OIP, Door.PLAIN}),
        NotFound,
    ),
    BadRequest(
        "unknown model",
        {"model": "huge"},
        "unknown model 'huge'; there are: tiny",
        SERVERS,
        NotFound,
        noticed_by="server",
    ),
)

TOO_MUCH = (
    BadRequest("many methods", {"method": ("grad_cam",) * 4}, "a request has at most 3 methods, got 4", SERVERS),
    BadRequest("many layers", {"layer": ("0", "2", "4")}, "a request has at most 2 layers, got 3", SERVERS),
    BadRequest("many targets", {"target": ("top5", "top4")}, "a request explains at most 8 classes, got 9", SERVERS),
    BadRequest(
        "many classes in a contrast",
        {"target": ("contrast:0>1,2,3,4,5,6", "finer:0", "no label")},
        "the targets of a request name at most 8 classes, got 9",
        SERVERS,
    ),
    BadRequest(
        "many pixels",
        {"target": "top6"},
        "all maps together may have at most 16000 pixels; 6 maps of 48 x 64 have 18432: "
        "ask for fewer classes, or for size input or layer",
        SERVERS,
    ),
    BadRequest(
        "maps of two sizes in one tensor",
        {"method": ("grad_cam", "rise:masks=8"), "size": "layer"},
        "one tensor holds maps of one size, and these have [(6, 8), (48, 64)]: ask for size input, "
        "or for one method after the other",
        frozenset({Door.OIP}),
    ),
)

BAD_REQUESTS = (*IMAGES, *TARGETS, *LAYERS, *METHODS, *OPTIONS, *TOO_MUCH)


def _several(changes: Mapping[str, Any], key: str) -> tuple[Any, ...]:
    value = changes.get(key, ())
    return value if isinstance(value, tuple) else (value,)


def our_target(value: str | int) -> AnyTarget:
    return parse_target(value) if isinstance(value, str) else Target(index=value)


def to_request(bad: BadRequest) -> ExplainRequest:
    """Returns the request as our own type, which no door has touched; it may raise."""
    given = bad.changes
    output = {key: given[key] for key in ("size", "encoding", "colormap", "opacity", "signed") if key in given}
    output |= {"boxes": BoxOptions(given["boxes"])} if "boxes" in given else {}
    output["stacked"] = bad.doors == {Door.OIP}
    names = ("model", "version", "fusion", "precision", "priority", "top_predictions", "evaluate", "evaluation_steps")
    fields = {key: given[key] for key in names if key in given}
    if "method" in given:
        fields["methods"] = tuple(parse_method_text(text) for text in _several(given, "method"))
    return ExplainRequest(
        given.get("image", PHOTO),
        targets=tuple(our_target(value) for value in _several(given, "target")),
        layers=_several(given, "layer"),
        output=OutputOptions(**output),
        **fields,
    )


def to_v1(bad: BadRequest) -> pb.ExplainRequest:
    """Returns the request for `Explain` and `StreamExplain`."""
    given = bad.changes
    names = ("model", "version", "top_predictions", "evaluate", "evaluation_steps")
    request = pb.ExplainRequest(
        image=_v1_image(given.get("image", PHOTO)),
        methods=[_v1_method(text) for text in _several(given, "method")],
        targets=[_v1_target(text) for text in _several(given, "target")],
        layers=_several(given, "layer"),
        **{key: given[key] for key in names if key in given},
    )
    for key in ("size", "encoding"):
        if key in given:
            setattr(request.output, key, getattr(pb.Output, given[key].upper()))
    for key in ("colormap", "opacity", "signed"):
        if key in given:
            setattr(request.output, key, given[key])
    if "boxes" in given:
        request.output.boxes.threshold = given["boxes"]
    return request


def _v1_image(image: bytes | np.ndarray) -> pb.Image:
    if isinstance(image, bytes):
        return pb.Image(encoded=image)
    kind = pb.Tensor.FLOAT32 if image.dtype == np.float32 else pb.Tensor.UINT8
    return pb.Image(tensor=pb.Tensor(data_type=kind, shape=image.shape, data=image.tobytes()))


def _v1_method(text: str) -> pb.MethodSpec:
    """Returns the message without a check of its values."""
    name, parameters = _method(text)
    message = pb.MethodSpec()
    body: Message = getattr(message, name)
    body.SetInParent()
    for key, value in parameters.items():
        setattr(body, key, value)
    return message


def _v1_target(text: str) -> pb.Target:
    if text == "top0":  # our own type does not hold it
        return pb.Target(top_k=0)
    return v1.target_to_proto(parse_target(text))


def _method(text: str) -> tuple[str, dict[str, int | float | str]]:
    name, _, rest = text.partition(":")
    pairs = (pair.partition("=") for pair in rest.split(",") if pair)
    return name, {key: number_or_text(value) for key, _, value in pairs}


def to_oip(bad: BadRequest) -> oip.ModelInferRequest:
    """Returns the request for `ModelInfer`."""
    given = bad.changes
    request = oip.ModelInferRequest(model_name=given.get("model", ""), model_version=given.get("version", ""))
    image = given.get("image", PHOTO)
    if isinstance(image, bytes):
        request.inputs.add(name="image", datatype="BYTES", shape=[1]).contents.bytes_contents.append(image)
    else:
        datatype = "FP32" if image.dtype == np.float32 else "UINT8"
        request.inputs.add(name="image", datatype=datatype, shape=image.shape)
        request.raw_input_contents.append(image.tobytes())
    names = {"method": "explain_method", "target": "explain_targets", "layer": "explain_layers"}
    separators = {"method": " ", "target": ";", "layer": ","}
    for key in given.keys() - {"image", "model", "version"}:
        value = given[key]
        if isinstance(value, tuple):
            value = separators[key].join(value)
        name = key if key == "priority" else names.get(key, f"explain_{key}")
        kind = {str: "string_param", bool: "bool_param", int: "int64_param", float: "double_param"}[type(value)]
        setattr(request.parameters[name], kind, value)
    return request


def to_plain_fields(bad: BadRequest) -> dict[str, bytes]:
    """Returns the fields of a form, or the entries of `input` over gRPC, or what TorchServe hands to a handler."""
    given = bad.changes
    fields = {"data": given.get("image", PHOTO)}
    separators = {"method": " ", "target": ";", "layer": ","}
    for key in given.keys() - {"image", "encoding"}:
        value = given[key]
        if key == "target" and isinstance(value, int):  # a number, and not its text, needs JSON
            fields["options"] = json.dumps({key: value}).encode()
        else:
            fields[key] = (separators[key].join(value) if isinstance(value, tuple) else str(value)).encode()
    if "encoding" in given:
        fields["format"] = {"overlay_png": b"overlay"}[given["encoding"]]
    return fields


def to_engine_kwargs(bad: BadRequest) -> dict[str, Any]:
    """Returns the arguments of `Engine.explain`, and of the clients' `explain`."""
    given = bad.changes
    same = ("model", "size", "signed", "precision", "fusion", "top_predictions", "evaluate", "evaluation_steps")
    arguments = {key: given[key] for key in same if key in given}
    arguments["image"] = given.get("image", PHOTO)
    if "method" in given:
        arguments["methods"] = [_method(text) for text in _several(given, "method")]
    if "target" in given:
        arguments["targets"] = [our_target(value) for value in _several(given, "target")]
    if "layer" in given:
        arguments["layer"] = given["layer"]
    if "boxes" in given:
        arguments["boxes"] = BoxOptions(given["boxes"])
    return arguments


def to_cli_arguments(bad: BadRequest, folder: Path) -> list[str]:
    """Returns `explain` with its arguments, the image written into a folder; `--local` or an address come behind.

    What is refused is on standard error behind `camserve: `, with exit status 2.
    """
    given = bad.changes
    (folder / "image").write_bytes(given.get("image", PHOTO))
    arguments = ["explain", str(folder / "image"), "--out", str(folder)]
    for key in given.keys() - {"image"}:
        arguments += [f"--{key}" if value is True else f"--{key}={value}" for value in _several(given, key)]
    return arguments

"""What a request is, and what holding it against a model allows, refuses and computes."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from camserve import images
from camserve.errors import CamserveError, InvalidImage, InvalidOption, NotFound
from camserve.methods import METHODS, Auto, GradCam, GroupCam, Rise, ScoreCam, SmoothGrad, Xrai
from camserve.types import BoxOptions, Layer, ModelInfo, StreamOptions, Target, TextInput, Vector
from camserve.types.request import (
    ExplainRequest,
    OutputOptions,
    RequestLimits,
    known_targets,
    make_request,
)

MODEL = ModelInfo(
    name="m",
    version="1.0",
    labels=("tabby cat", "tiger cat", "cup", "crane", "crane", "lynx"),
    input_size=(32, 48),
    layers=(Layer("early", 16, 8, 12), Layer("late", 96, 4, 6)),
    default_layer="late",
)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def file(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def header(width: int, height: int) -> bytes:
    """A PNG file that says this size and has no pixels: enough for what only looks at headers."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b""))
    )


PHOTO = file(noise(40, 60))


# What Python callers have


def test_an_image_alone_has_the_defaults():
    request = make_request(b"image")
    assert (request.image, request.methods, request.targets) == (b"image", (GradCam(),), ())
    assert (request.model, request.version, request.layers, request.fusion) == ("", "", (), "mean")
    assert request.output == OutputOptions("input", "float32", "jet", 0.5, None, stacked=False)
    assert (request.top_predictions, request.precision, request.priority) == (5, "auto", "normal")
    assert (request.evaluate, request.evaluation_steps, request.allow_partial) == (False, 28, False)
    assert request.stream == StreamOptions(max_maps=8, min_interval_s=0.25)


def test_everything_set():
    request = make_request(
        b"image",
        ["cam", ("group_cam", {"groups": 8, "variant": "reference"}), ScoreCam()],
        [282, "tabby", Target(top_k=3)],
        model="lite0",
        version="2.0",
        layer="_bn1",
        size="original",
        encoding="uint8",
        boxes=BoxOptions(0.3, all_components=True),
        top_predictions=2,
        precision="bfloat16",
        fusion="max",
        evaluate=True,
        evaluation_steps=7,
        priority="interactive",
        allow_partial=True,
        stream=StreamOptions(max_maps=3, min_interval_s=0.5),
        text="which is left?",
    )
    assert request.methods == (METHODS["cam"](), GroupCam(groups=8, variant="reference"), ScoreCam())
    assert request.targets == (Target(index=282), Target(label="tabby"), Target(top_k=3))
    assert (request.model, request.version, request.layers, request.top_predictions) == ("lite0", "2.0", ("_bn1",), 2)
    assert request.output == OutputOptions("original", "uint8", boxes=BoxOptions(0.3, all_components=True))
    assert (request.precision, request.fusion) == ("bfloat16", "max")
    assert (request.evaluate, request.evaluation_steps) == (True, 7)
    assert (request.priority, request.allow_partial) == ("interactive", True)
    assert request.stream == StreamOptions(max_maps=3, min_interval_s=0.5)
    assert request.text == "which is left?"


def test_lone_strings_are_not_taken_apart():
    request = make_request(b"image", "score_cam", "tabby")
    assert (request.methods, request.targets) == ((ScoreCam(),), (Target(label="tabby"),))


def test_several_layers_are_several():
    assert make_request(b"image", layer=["early", "late"]).layers == ("early", "late")
    assert make_request(b"image", layer="").layers == ()


@pytest.mark.parametrize(
    ("boxes", "expected"), [(None, None), (False, None), (True, BoxOptions()), (BoxOptions(0.4), BoxOptions(0.4))]
)
def test_boxes_are_asked_for_only_if_wanted(boxes, expected):
    assert make_request(b"image", boxes=boxes).output.boxes == expected


def test_an_image_may_be_a_path(tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(PHOTO)
    assert make_request(path).image == make_request(str(path)).image == PHOTO


def test_a_file_that_is_not_there_is_an_invalid_image(tmp_path):
    with pytest.raises(InvalidImage, match=r"cannot read .*none\.png: No such file"):
        make_request(tmp_path / "none.png")


def test_an_array_and_a_picture_stay_as_they_are():
    array, picture = noise(4, 6), Image.new("RGB", (4, 6))
    assert make_request(array).image is array
    assert make_request(picture).image is picture


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"methods": ["deep_dream"]}, "unknown method 'deep_dream'; there are cam, grad_cam"),
        ({"methods": [("group_cam", {"theta": 101})]}, r"theta must be 0\.\.100, got 101"),
        ({"top_predictions": -1}, "top_predictions must be at least 0, got -1"),
        ({"size": "huge"}, "size must be one of input, layer, original, got 'huge'"),
        ({"encoding": "gif"}, "encoding must be one of float32, float16, uint8, png, overlay_png, .* got 'gif'"),
        ({"precision": "int8"}, "precision must be one of auto, exact, bfloat16, got 'int8'"),
        ({"fusion": "median"}, "fusion must be one of mean, max, got 'median'"),
        ({"priority": "urgent"}, "priority must be one of interactive, normal, batch, got 'urgent'"),
        ({"evaluation_steps": 0}, r"evaluation_steps must be 1\.\.4096, got 0"),
        ({"evaluation_steps": -1}, r"evaluation_steps must be 1\.\.4096, got -1"),
        ({"evaluation_steps": 4097}, r"evaluation_steps must be 1\.\.4096, got 4097"),
    ],
)
def test_a_bad_option_fails_without_a_model(options, text):
    with pytest.raises(InvalidOption, match=text):
        make_request(b"image", **options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"encoding": "overlay_png", "size": "layer"}, "an overlay has size input or original, not layer"),
        ({"encoding": "overlay_jpeg", "size": "layer"}, "an overlay has size input or original, not layer"),
        ({"colormap": "grass"}, "colormap must be one of jet, .* got 'grass'"),
        ({"opacity": 1.5}, r"opacity must be 0\.\.1, got 1\.5"),
        ({"opacity": float("nan")}, r"opacity must be 0\.\.1, got nan"),
    ],
)
def test_bad_output_options_are_refused(options, text):
    with pytest.raises(InvalidOption, match=text):
        OutputOptions(**options)


# Held against a model


def fit(image=PHOTO, limits: RequestLimits = RequestLimits(), **fields):  # noqa: B008  # frozen
    return ExplainRequest(image, **fields).fit(MODEL, limits)


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"version": "2.0"}, NotFound, "model m is served in version 1.0, not '2.0'"),
        ({"layers": ("middle",)}, InvalidOption, "unknown layer 'middle'; the default is 'late'"),
        ({"layers": ("late", "late")}, InvalidOption, "layers: each may come once, got late, late"),
        ({"layers": ("", "late")}, InvalidOption, "layers: each may come once, got late, late"),
        (
            {"layers": ("early", "late"), "output": OutputOptions(size="layer")},
            InvalidOption,
            "the map of several layers has size input or original, not layer",
        ),
        ({"methods": (GroupCam(groups=97),)}, InvalidOption, r"1\.\.96 at this layer, got 97"),
        ({"methods": (GroupCam(groups=20),), "layers": ("early",)}, InvalidOption, r"1\.\.16 at this layer, got 20"),
        ({"methods": (GradCam(), Auto())}, InvalidOption, "auto: a server chooses"),
        ({"targets": (Target(index=6),)}, InvalidOption, r"class index must be 0\.\.5, got 6"),
        ({"targets": (Target(index=-1),)}, InvalidOption, r"class index must be 0\.\.5, got -1"),
        ({"targets": (Target(top_k=7),)}, InvalidOption, r"top_k must be 1\.\.6, got 7"),
        ({"targets": (Target(label="tiger cart"),)}, InvalidOption, "unknown label 'tiger cart'; close to it: 'tiger"),
        ({"targets": (Target(label="Crane"),)}, InvalidOption, "label 'Crane' names classes 3, 4: use the index"),
        ({"image": b""}, InvalidImage, "the image has zero bytes"),
        ({"image": b"not an image"}, InvalidImage, r"not a JPEG, PNG, WEBP image \(12 bytes\)"),
        ({"image": PHOTO[:20]}, InvalidImage, "broken or truncated"),
        ({"image": np.zeros(8, np.uint8)}, InvalidImage, r"\(height, width\), got uint8 \[8\]"),
        ({"image": np.zeros((8, 8, 4), np.uint8)}, InvalidImage, r"got uint8 \[8, 8, 4\]"),
        ({"image": np.zeros((0, 8, 3), np.uint8)}, InvalidImage, r"got uint8 \[0, 8, 3\]"),
        ({"image": np.zeros((8, 8, 3), np.int64)}, InvalidImage, r"uint8 or float32 .* got int64 \[8, 8, 3\]"),
        (
            {"image": np.zeros((8, 8, 3), np.float32)},
            InvalidImage,
            r"a float32 image must have the network's input size \[32, 48\], got \[8, 8\]",
        ),
        ({"image": np.full((32, 48, 3), np.nan, np.float32)}, InvalidImage, r"finite pixels in \[0, 1\]"),
        ({"image": np.full((32, 48, 3), 1.01, np.float32)}, InvalidImage, r"finite pixels in \[0, 1\]"),
        ({"image": np.full((32, 48, 3), -0.01, np.float32)}, InvalidImage, r"finite pixels in \[0, 1\]"),
        (
            {"methods": (GradCam(), Rise()), "output": OutputOptions(size="layer", stacked=True)},
            InvalidOption,
            r"one tensor holds maps of one size, and these have \[\(4, 6\), \(32, 48\)\]: ask for size input",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_refused(fields, kind, text):
    with pytest.raises(CamserveError, match=text) as refused:
        fit(**fields)
    assert type(refused.value) is kind


@pytest.mark.parametrize(
    ("bound", "fields", "kind", "text"),
    [
        ({"methods": 1}, {"methods": (GradCam(), GradCam())}, InvalidOption, "at most 1 methods, got 2"),
        ({"layers": 1}, {"layers": ("early", "late")}, InvalidOption, "at most 1 layers, got 2"),
        ({"targets": 2}, {"targets": (Target(top_k=3),)}, InvalidOption, "explains at most 2 classes, got 3"),
        (
            {"targets": 2},
            {"targets": (Target(top_k=2), Target(index=5))},
            InvalidOption,
            "explains at most 2 classes, got 3",
        ),
        ({"image_bytes": 100}, {}, InvalidImage, f"at most 100 bytes, got {len(PHOTO)}"),
        ({"image_bytes": 100}, {"image": noise(8, 8)}, InvalidImage, "at most 100 bytes, got 192"),
        ({"image_pixels": 2399}, {}, InvalidImage, "at most 2399 pixels, got 60 x 40 = 2400"),
        ({"image_pixels": 63}, {"image": noise(8, 8)}, InvalidImage, "at most 63 pixels, got 8 x 8 = 64"),
        (
            {"image_pixels": 63},
            {"image": Image.new("RGB", (8, 8))},
            InvalidImage,
            "at most 63 pixels, got 8 x 8 = 64",
        ),
        (
            {"map_pixels": 32 * 48 * 3 - 1},
            {"targets": (Target(top_k=3),)},
            InvalidOption,
            "at most 4607 pixels; 3 maps of 32 x 48 have 4608: ask for fewer classes",
        ),
        (
            {"map_pixels": 2399},
            {"output": OutputOptions(size="original")},
            InvalidOption,
            "at most 2399 pixels; 1 maps of 40 x 60 have 2400",
        ),
        (
            {"message_bytes": 4 * 32 * 48 - 1},
            {},
            InvalidOption,
            "a reply may have at most 6143 bytes; 1 maps of 32 x 48 as float32 have 6144: ask for uint8 or png",
        ),
        (
            {"message_bytes": 24 * 4},
            {"output": OutputOptions(size="layer", encoding="png"), "methods": (Rise(),)},
            InvalidOption,
            r"1 maps at 'late' of 4 x 6 are too large: ask for fewer classes, or for a later layer",
        ),
    ],
)
def test_what_is_larger_than_allowed_is_refused(bound, fields, kind, text):
    """What was allowed and what came is in the text; without the bound nothing is refused."""
    assert fit(**fields)
    with pytest.raises(CamserveError, match=text) as refused:
        fit(limits=RequestLimits(**bound), **fields)
    assert type(refused.value) is kind


@pytest.mark.parametrize(
    "bound",
    [
        {"methods": 1},
        {"layers": 1},
        {"targets": 1},
        {"image_bytes": len(PHOTO)},
        {"image_pixels": 2400},
        {"map_pixels": 32 * 48},
        {"message_bytes": 4 * 32 * 48},
    ],
    ids=lambda bound: next(iter(bound)),
)
def test_what_is_just_as_large_as_allowed_fits(bound):
    assert fit(limits=RequestLimits(**bound), layers=("late",))


def test_maps_of_two_sizes_that_are_one_tensor_are_refused_before_any_work():
    """A later size is no way around it, nor is a method that the server chooses."""
    stacked = OutputOptions(size="layer", stacked=True)
    assert fit(methods=(GradCam(), Rise()), output=replace(stacked, size="input"))
    assert fit(methods=(GradCam(), Rise()), output=replace(stacked, stacked=False))
    fitted = fit(limits=RequestLimits(auto=True), methods=(GradCam(), Auto()), output=stacked)
    with pytest.raises(InvalidOption, match="one tensor holds maps of one size"):
        fitted.with_methods([GradCam(), Rise()], {1: "in time"})


def test_limits_above_the_defaults_count():
    large = header(9000, 8000)
    assert fit(large).image_size == (8000, 9000), "72 megapixels: more than the default of 64"
    allowed = RequestLimits(image_bytes=images.MAX_BYTES, image_pixels=80 * 10**6)
    assert fit(large, allowed).image_size == (8000, 9000)
    heavy = file(noise(2000, 3000))
    assert len(heavy) > images.MAX_BYTES
    assert fit(heavy, RequestLimits(image_bytes=20 * 2**20)).image_size == (2000, 3000)
    with pytest.raises(InvalidImage, match="at most 16777216 bytes"):
        fit(heavy, RequestLimits(image_bytes=images.MAX_BYTES))


def test_a_file_is_named_by_its_content_and_not_decoded():
    data = header(6000, 5000)
    fitted = fit(data)
    assert (fitted.image_size, fitted.digest) == ((5000, 6000), images.digest(data))
    with pytest.raises(InvalidImage):
        images.decode(data)


def test_no_target_is_the_most_probable_class():
    fitted = fit()
    assert fitted.targets == (Target(top_k=1),)
    assert (fitted.max_targets, fitted.known_targets) == (1, 1)


def test_targets_are_resolved_and_each_class_comes_once():
    asked = (Target(label="LYNX"), Target(index=5), Target(label="tiger_cat"), Target(index=1))
    fitted = fit(targets=asked, limits=RequestLimits(targets=4))
    assert fitted.targets == (Target(index=5), Target(index=1))
    assert (fitted.max_targets, fitted.known_targets) == (2, 2)


def test_the_number_of_classes_is_unknown_where_an_index_may_be_one_of_the_top():
    fitted = fit(targets=(Target(index=5), Target(top_k=3)))
    assert (fitted.max_targets, fitted.known_targets, fitted.max_maps) == (4, None, 4)
    assert known_targets((Target(top_k=3),)) == 3
    assert known_targets((Target(top_k=3), Target(top_k=2))) is None


def test_more_predictions_than_classes_are_all_classes():
    assert fit(top_predictions=1000).request.top_predictions == 6
    assert fit(top_predictions=3).request.top_predictions == 3


def test_a_version_that_is_served_is_found():
    assert fit(version="1.0").request.version == "1.0"


def test_sizes_follow_from_methods_layers_and_targets():
    """Grad-CAM's sums are (targets, 4, 6), RISE's (targets, 32, 48), XRAI's (targets, 3, 32, 48), all float32."""
    methods, targets = (GradCam(), Rise(), Xrai()), (Target(top_k=2),)
    fitted = fit(methods=methods, targets=targets, evaluate=True, evaluation_steps=8)
    assert fitted.max_maps == 6
    assert fitted.curve_queries == 2 * 9
    assert fitted.sums_bytes == 4 * 2 * (4 * 6 + 32 * 48 + 3 * 32 * 48)
    assert fitted.step_bytes == len(PHOTO) + fitted.sums_bytes + 4 * 6 * 32 * 48
    assert fitted.map_pixels == 2 * 3 * 32 * 48
    assert fit(methods=methods, targets=targets).curve_queries == 0
    assert fit(methods=methods, targets=targets).step_bytes == len(PHOTO) + fitted.sums_bytes


@pytest.mark.parametrize(
    ("size", "expected"),
    [("input", [(32, 48), (32, 48)]), ("layer", [(4, 6), (32, 48)]), ("original", [(40, 60), (40, 60)])],
)
def test_a_map_has_the_size_that_is_asked(size, expected):
    fitted = fit(methods=(GradCam(), SmoothGrad()), output=OutputOptions(size=size))
    assert [fitted.map_size(method) for method in fitted.methods] == expected


def test_positions_are_methods_at_layers():
    fitted = fit(methods=(GradCam(), Rise(), ScoreCam()), layers=("early", "late"))
    found = [(fitted.part(position).method.name, fitted.part(position).layer.name) for position in range(5)]
    assert found == [
        ("grad_cam", "early"),
        ("grad_cam", "late"),
        ("rise", "early"),
        ("score_cam", "early"),
        ("score_cam", "late"),
    ]


def test_methods_that_a_server_chose_take_the_place_of_auto():
    fitted = fit(limits=RequestLimits(auto=True), methods=(Auto(), ScoreCam()), layers=("early", "late"))
    chosen = fitted.with_methods([GradCam(), ScoreCam()], {0: "in time"})
    assert chosen.methods == chosen.request.methods == (GradCam(), ScoreCam())
    assert (chosen.choices, chosen.parts.layers) == ({0: "in time"}, MODEL.layers)
    assert (chosen.targets, chosen.digest, chosen.image_size) == (fitted.targets, fitted.digest, fitted.image_size)
    with pytest.raises(InvalidOption, match="at this layer"):
        fitted.with_methods([GroupCam(groups=50), ScoreCam()], {})
    small = fit(limits=RequestLimits(auto=True, map_pixels=24), methods=(Auto(),), output=OutputOptions(size="layer"))
    with pytest.raises(InvalidOption, match="1 maps of 32 x 48 have 1536"):
        small.with_methods([Rise()], {})


# What Python callers pass where several are meant, or nothing


@pytest.mark.parametrize(
    ("methods", "targets", "found"),
    [
        (None, None, ((GradCam(),), ())),
        ("score_cam", 2, ((ScoreCam(),), (Target(index=2),))),
        (("group_cam", {"groups": 8}), "maillot", ((GroupCam(groups=8),), (Target(label="maillot"),))),
        (ScoreCam(), Target(top_k=2), ((ScoreCam(),), (Target(top_k=2),))),
        (("cam", "score_cam"), {3}, ((METHODS["cam"](), ScoreCam()), (Target(index=3),))),
        ([], np.array([1, 2]), ((), (Target(index=1), Target(index=2)))),
        ((m for m in ["cam"]), (t for t in ["top2"]), ((METHODS["cam"](),), (Target(top_k=2),))),
    ],
)
def test_a_lone_value_is_itself_and_none_is_the_default(methods, targets, found):
    request = make_request(b"image", methods, targets)
    assert (request.methods, request.targets) == found


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"targets": 1.5}, "a target is a class index, a text such as"),
        ({"targets": [[1]]}, r"target of camserve\.types; got \[1\]"),
        ({"targets": {"index": 1}}, "a target is a class index"),
        ({"targets": b"tabby"}, "got b'tabby'"),
        ({"methods": 2}, r"a method is a name, \(name, parameters\) or a method of camserve\.methods; got 2"),
        ({"methods": [("cam", 3)]}, r"got \('cam', 3\)"),
        ({"methods": {"groups": 3}}, "a method is a name"),
        ({"target": "tabby"}, "unknown option 'target'; there are model, version, layer, fusion"),
        ({"layer": 3}, "a layer is named by a text, got 3"),
        ({"layer": [3]}, "a layer is named by a text, got 3"),
        ({"size": ["input"]}, r"size must be one of input, layer, original, got \['input'\]"),
        ({"boxes": 0.3}, r"boxes must be True, False or BoxOptions, got 0\.3"),
        ({"top_predictions": "5"}, "top_predictions must be a whole number, got '5'"),
        ({"evaluation_steps": 2.5}, r"evaluation_steps must be a whole number, got 2\.5"),
        ({"model": None}, "model must be a text, got None"),
        ({"version": 2}, "version must be a text, got 2"),
        ({"text": b"which?"}, "text must be a text, got b'which"),
        ({"text": "\ud800"}, "a text is written in UTF-8, which has nothing for"),
        ({"stream": True}, "stream must be StreamOptions, got True"),
        ({"precision": None}, "precision must be one of auto, exact, bfloat16, got None"),
    ],
)
def test_a_value_of_another_type_is_refused_with_what_is_meant(asked, text):
    with pytest.raises(InvalidOption, match=text):
        make_request(b"image", **asked)


def test_a_reference_that_is_a_path_is_read_once(tmp_path):
    path = tmp_path / "face.png"
    path.write_bytes(PHOTO)
    (target,) = make_request(b"image", targets=Vector(image=path)).targets
    path.unlink()
    assert target == Vector(image=PHOTO)
    with pytest.raises(InvalidImage, match=r"cannot read .*face\.png"):
        make_request(b"image", targets=[Vector(image=str(path))])


QUESTION = TextInput("question", "which is left?", required=True, most_tokens=8)
CAPTION = TextInput("caption so far", "seven", required=False, most_tokens=3)


@pytest.mark.parametrize(
    ("takes", "text", "message"),
    [
        (None, "which?", r"text: model m takes an image alone \(outputs softmax\), and no text beside it; got 'which"),
        (QUESTION, "", "text: model m needs a question beside the image, such as 'which is left\\?'; got none"),
        (QUESTION, " \n", r"text: model m needs a question beside the image, such as 'which is left\?'; got ' \\n'"),
    ],
)
def test_a_text_that_a_model_does_not_take_is_refused_and_so_is_one_that_it_lacks(takes, text, message):
    with pytest.raises(InvalidOption, match=message):
        ExplainRequest(PHOTO, text=text).fit(replace(MODEL, text=takes))


@pytest.mark.parametrize(("takes", "text"), [(None, ""), (QUESTION, "which?"), (CAPTION, ""), (CAPTION, "seven")])
def test_a_text_that_a_model_takes_is_the_request_s_own(takes, text):
    assert ExplainRequest(PHOTO, text=text).fit(replace(MODEL, text=takes)).request.text == text


def test_a_text_is_bounded_before_it_is_held_against_the_model():
    limits = RequestLimits(text_characters=5)
    assert ExplainRequest(PHOTO, text="which").fit(replace(MODEL, text=QUESTION), limits)
    with pytest.raises(InvalidOption, match="a text has at most 5 characters, got 6: 'which\\?'"):
        ExplainRequest(PHOTO, text="which?").fit(MODEL, limits)

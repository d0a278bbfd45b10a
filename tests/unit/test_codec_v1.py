"""The typed API's messages from and to our types, in both directions, without a server."""

from __future__ import annotations

import dataclasses
import io
import math
from dataclasses import replace

import numpy as np
import pytest
from codec_values import explanations, images, models, outputs, predictions, requests, same_image, specs, targets, views
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from camserve import methods
from camserve.codecs import v1
from camserve.errors import Internal, InvalidImage, InvalidInput, InvalidOption
from camserve.finalise.encode import ARRAYS
from camserve.gateway.pool.fake import MODEL
from camserve.images import decode
from camserve.methods import METHODS, GroupCam
from camserve.types import (
    Explanation,
    InputView,
    Layer,
    MethodInfo,
    Model,
    ModelInfo,
    ModelSummary,
    Prediction,
    Progress,
    SaliencyMap,
    Target,
    Text,
    Vector,
)
from camserve.types.request import ExplainRequest, OutputOptions, RequestLimits
from camserve.types.target_forms import target_forms
from camserve.v1 import explain_pb2 as pb

ROOM = 2**20


def resent(message):
    """The message after a journey as bytes."""
    return type(message).FromString(message.SerializeToString())


def assert_same(one, other) -> None:
    """Holds two frozen values against each other field by field; arrays by their elements, pictures not at all."""
    assert type(one) is type(other)
    if dataclasses.is_dataclass(one):
        for field in dataclasses.fields(one):
            if field.name != "lies_on":
                assert_same(getattr(one, field.name), getattr(other, field.name))
    elif isinstance(one, tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    elif isinstance(one, np.ndarray):
        np.testing.assert_array_equal(one, other)
    else:
        assert one == other


# Requests


@given(requests)
def test_a_request_arrives_as_it_was_sent(sent):
    received = v1.request_from_bytes(v1.request_to_proto(sent).SerializeToString())
    assert same_image(sent.image, received.image)
    assert_same(sent, received)


def test_a_request_of_an_image_alone_has_the_defaults_of_the_type():
    received = v1.request_from_bytes((pb.ExplainRequest(image=pb.Image(encoded=b"x"))).SerializeToString())
    assert_same(received, ExplainRequest(b"x"))
    assert received.image == b"x"


def test_what_is_sent_says_every_default():
    """So that a server of another release, with other defaults, answers what was asked."""
    assert v1.request_to_proto(ExplainRequest(b"image")) == pb.ExplainRequest(
        image=pb.Image(encoded=b"image"),
        methods=[pb.MethodSpec(grad_cam=pb.GradCam())],
        output=pb.Output(size=pb.Output.INPUT, encoding=pb.Output.FLOAT32, colormap="jet", opacity=0.5),
        top_predictions=5,
        fusion=pb.MEAN,
        evaluation_steps=28,
        priority=pb.NORMAL,
        stream=pb.StreamOptions(max_maps=8, min_interval_s=0.25),
    )


def test_zero_is_not_taken_for_unset():
    message = pb.ExplainRequest(
        image=pb.Image(encoded=b"x"),
        output=pb.Output(opacity=0, boxes=pb.BoxOptions(threshold=0)),
        stream=pb.StreamOptions(max_maps=0, min_interval_s=0),
    )
    received = v1.request_from_bytes((message).SerializeToString())
    assert received.output.opacity == 0
    assert received.output.boxes is not None
    assert received.output.boxes.threshold == 0
    assert (received.stream.max_maps, received.stream.min_interval_s) == (0, 0)


@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"\x0a"])
def test_bytes_that_are_no_request_are_refused(data):
    with pytest.raises(InvalidInput, match=r"no camserve\.v1\.ExplainRequest"):
        v1.request_from_bytes(data)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"output": pb.Output(encoding=99)}, "unknown encoding 99"),
        ({"output": pb.Output(size=99)}, "unknown size 99"),
        ({"output": pb.Output(colormap="grass")}, "grass"),
        ({"output": pb.Output(opacity=1.5)}, r"0\.\.1, got 1\.5"),
        ({"output": pb.Output(boxes=pb.BoxOptions(threshold=2))}, r"0\.\.1, got 2"),
        ({"output": pb.Output(size=pb.Output.LAYER, encoding=pb.Output.OVERLAY_PNG)}, "an overlay has size"),
        ({"fusion": 99}, "unknown fusion 99"),
        ({"precision": 99}, "unknown precision 99"),
        ({"priority": 99}, "unknown priority 99"),
        ({"evaluation_steps": 4097}, r"evaluation_steps must be 1\.\.4096, got 4097"),
        ({"stream": pb.StreamOptions(min_interval_s=-1)}, r"min_interval_s must be at least 0, got -1"),
        ({"stream": pb.StreamOptions(min_interval_s=math.nan)}, "min_interval_s must be at least 0, got nan"),
        ({"methods": [pb.MethodSpec()]}, "names no method"),
        ({"targets": [pb.Target()]}, "exactly one, got 0"),
        ({"targets": [pb.Target(top_k=0)]}, "top_k must be at least 1, got 0"),
    ],
)
def test_a_request_with_a_bad_option_is_refused_with_what_is_allowed(changes, text):
    message = pb.ExplainRequest(image=pb.Image(encoded=b"x"), **changes)
    with pytest.raises(InvalidOption, match=text):
        v1.request_from_bytes((message).SerializeToString())


@pytest.mark.parametrize("number", [2**32, 10**30])
def test_a_number_that_no_field_holds_is_the_callers_fault(number):
    with pytest.raises(InvalidOption, match=str(number)):
        v1.target_to_proto(Target(index=number))
    with pytest.raises(InvalidOption, match=str(number)):
        v1.method_to_proto(GroupCam(groups=number))
    with pytest.raises(InvalidOption, match=r"out of range.*" + str(number)):
        v1.request_to_proto(ExplainRequest(b"x", top_predictions=number))
    with pytest.raises(InvalidOption, match="-1"):
        v1.target_to_proto(Target(index=-1))


# Methods and targets


@given(specs)
def test_method_round_trip(spec):
    assert v1.method_from_proto(resent(v1.method_to_proto(spec))) == spec


@pytest.mark.parametrize("name", METHODS)
def test_a_method_without_parameters_has_its_defaults(name):
    message = pb.MethodSpec()
    getattr(message, name).SetInParent()
    assert v1.method_from_proto(resent(message)) == methods.parse_method(name)


@pytest.mark.parametrize("name", METHODS)
def test_proto_and_catalogue_have_the_same_methods_and_parameters(name):
    fields = pb.MethodSpec.DESCRIPTOR.fields_by_name
    assert sorted(fields) == sorted([*METHODS, methods.AUTO])
    parameters = METHODS[name].parameters()
    body = fields[name].message_type.fields_by_name
    assert list(body) == [parameter.name for parameter in parameters]
    for parameter in parameters:
        if parameter.choices:
            values = [value.name.lower() for value in body[parameter.name].enum_type.values]
            assert values[0].endswith("_unspecified")
            assert values[1:] == list(parameter.choices)


def test_a_parameter_set_to_zero_is_not_taken_for_unset():
    spec = v1.method_from_proto(resent(pb.MethodSpec(group_cam=pb.GroupCam(theta=0))))
    assert spec == GroupCam(theta=0)
    with pytest.raises(InvalidOption, match="groups must be at least 1, got 0"):
        v1.method_from_proto(resent(pb.MethodSpec(group_cam=pb.GroupCam(groups=0))))


def test_no_method_is_refused_with_the_names_that_exist():
    with pytest.raises(InvalidOption, match="there are cam, grad_cam, hires_cam, "):
        v1.method_from_proto(pb.MethodSpec())


def test_an_unknown_enum_value_is_refused():
    with pytest.raises(InvalidOption, match=r"variant.*77"):
        v1.method_from_proto(resent(pb.MethodSpec(group_cam=pb.GroupCam(variant=77))))


@pytest.mark.parametrize("theta", [math.nan, -1.0, 101.0, math.inf])
def test_a_parameter_out_of_range_is_refused(theta):
    with pytest.raises(InvalidOption, match="theta"):
        v1.method_from_proto(resent(pb.MethodSpec(group_cam=pb.GroupCam(theta=theta))))


@given(targets)
def test_target_round_trip(target):
    assert v1.target_from_proto(resent(v1.target_to_proto(target))) == target


@given(predictions)
def test_prediction_round_trip(prediction):
    assert v1.prediction_from_proto(resent(v1.prediction_to_proto(prediction))) == prediction


@given(views)
def test_view_round_trip(view):
    assert v1.view_from_proto(resent(v1.view_to_proto(view))) == view


@pytest.mark.parametrize("precision", ["auto", "exact", "bfloat16"])
def test_precision_round_trip(precision):
    assert v1.precision_from_proto(pb.Precision.Value(precision.upper())) == precision
    assert v1.precision_from_proto(v1.precision_to_proto(precision)) == precision


def test_unspecified_precision_is_auto():
    assert v1.precision_from_proto(pb.PRECISION_UNSPECIFIED) == "auto"


def test_unknown_precision_is_refused():
    with pytest.raises(InvalidOption, match="99"):
        v1.precision_from_proto(99)


# Images


@given(images)
def test_image_round_trip(image):
    assert same_image(v1.image_from_proto(resent(v1.image_to_proto(image))), image)


def test_an_array_of_any_layout_arrives_as_it_looks():
    array = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    for view in (array[:, ::-1], array.transpose(1, 0, 2), np.asfortranarray(array)):
        np.testing.assert_array_equal(v1.image_from_proto(v1.image_to_proto(view)), view)
    big_endian = np.linspace(0, 1, 24, dtype=">f4").reshape(2, 4, 3)
    np.testing.assert_array_equal(v1.image_from_proto(v1.image_to_proto(big_endian)), big_endian)


@pytest.mark.parametrize("dtype", ["float64", "int64", "float16", "bool"])
def test_an_array_of_another_type_is_refused(dtype):
    with pytest.raises(InvalidImage, match=f"uint8 or float32, got {dtype}"):
        v1.image_to_proto(np.zeros((2, 2, 3), dtype=dtype))


def tensor(shape=(2, 2, 3), data=b"\0" * 12, data_type=pb.Tensor.UINT8) -> pb.Image:
    return pb.Image(tensor=pb.Tensor(data_type=data_type, shape=shape, data=data))


@pytest.mark.parametrize(
    ("message", "match"),
    [
        (pb.Image(), "no image"),
        (tensor(data_type=pb.Tensor.DATA_TYPE_UNSPECIFIED), "UINT8 or FLOAT32"),
        (tensor(data_type=9), "UINT8 or FLOAT32"),
        (tensor(shape=(12,)), r"\[height, width, 3\], of a grey one also \[height, width\], got \[12\]"),
        (tensor(shape=(2, 2)), r"shape \[2, 2\] has 4 bytes, got 12"),
        (tensor(shape=(2, 2, 2)), r"got \[2, 2, 2\]"),
        (tensor(shape=(2, 2, 4)), r"got \[2, 2, 4\]"),
        (tensor(shape=(1, 2, 2, 3)), r"got \[1, 2, 2, 3\]"),
        (tensor(shape=(0, 2, 3), data=b""), r"got \[0, 2, 3\]"),
        (tensor(shape=()), r"got \[\]"),
        (tensor(data=b"\0" * 11), "has 12 bytes, got 11"),
        (tensor(data=b"\0" * 13), "has 12 bytes, got 13"),
        (tensor(data_type=pb.Tensor.FLOAT32), "has 48 bytes, got 12"),
        (tensor(shape=(2**32 - 1, 2**32 - 1, 3)), "got 12"),  # nothing of that size is made
    ],
)
def test_an_image_that_contradicts_itself_is_refused(message, match):
    with pytest.raises(InvalidImage, match=match):
        v1.image_from_proto(resent(message))


def photo(height: int = 40, width: int = 60) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_picture_is_sent_as_png():
    np.testing.assert_array_equal(np.asarray(decode(v1.image_to_proto(Image.fromarray(photo())).encoded)), photo())


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV", "I;16", "I;16B", "I", "F"])
def test_a_picture_of_any_mode_can_be_sent(mode):
    image = Image.fromarray(photo()).convert("L" if mode in ("I;16", "I;16B", "LA") else "RGB").convert(mode)
    assert decode(v1.image_to_proto(image).encoded).size == (60, 40)


def test_a_picture_keeps_its_transparency():
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert decode(v1.image_to_proto(image).encoded).getpixel((0, 0)) == (255, 255, 255)


def test_a_picture_is_turned_upright():
    image = Image.fromarray(photo())
    image.getexif()[0x0112] = 6  # a quarter turn clockwise
    sent = decode(v1.image_to_proto(image).encoded)
    np.testing.assert_array_equal(np.asarray(sent), np.rot90(photo(), -1))


# Replies and streams

SEEN = np.zeros((4, 6, 3), np.uint8)
"""An image of the size that the maps of `explanations` have."""


def reply_of(explanation: Explanation, output: OutputOptions) -> pb.ExplainReply:
    encoded = v1.maps_to_proto(explanation.maps, output, ROOM)
    return resent(v1.reply_to_proto(replace(explanation, maps=()), encoded))


@given(explanations, st.sampled_from(["input", "layer", "original"]))
def test_an_explanation_arrives_as_it_was_sent(sent, size):
    request = ExplainRequest(SEEN, output=OutputOptions(size=size))
    received = v1.explanation_from_proto(reply_of(sent, request.output), request)
    assert_same(received, sent)
    assert all((saliency.image is None) == (size == "layer") for saliency in received.maps)


@pytest.mark.parametrize("encoding", ARRAYS)
@given(explanations.filter(lambda explanation: explanation.maps))
def test_maps_are_read_from_every_encoding(encoding, sent):
    request = ExplainRequest(SEEN, output=OutputOptions(encoding=encoding))
    received = v1.explanation_from_proto(reply_of(sent, request.output), request)
    for one, other in zip(received.maps, sent.maps, strict=True):
        np.testing.assert_allclose(one.array, other.array, atol=0.002)  # half a step of uint8


@given(explanations, outputs.filter(lambda output: output.encoding == "float32"))
def test_an_update_arrives_as_it_was_sent(sent, output):
    request = ExplainRequest(SEEN, output=output)
    progress = Progress(3, 7, sent.predictions, sent.maps)
    message = pb.ExplainUpdate(progress=v1.progress_to_proto(progress, sent.input, output, ROOM))
    assert_same(v1.update_from_proto(resent(message), request), progress)
    last = pb.ExplainUpdate(reply=reply_of(sent, output))
    assert_same(v1.update_from_proto(resent(last), request), sent)


VIEW = InputView(original_size=(40, 60), crop=(10.0, 0.0, 50.0, 40.0), size=(20, 20))


def reply(shape=(20, 20)) -> pb.ExplainReply:
    """A reply with one map of any values."""
    data = np.random.default_rng(1).random(shape, np.float32).tobytes()
    saliency = pb.SaliencyMap(
        method=pb.MethodSpec(grad_cam=pb.GradCam()), shape=shape, encoding=pb.Output.FLOAT32, data=data
    )
    return pb.ExplainReply(maps=[saliency], input=v1.view_to_proto(VIEW))


def only_map(message: pb.ExplainReply, image, **output) -> SaliencyMap:
    request = ExplainRequest(image, output=OutputOptions(**output))
    (found,) = v1.explanation_from_proto(message, request).maps
    return found


@pytest.mark.parametrize(
    "image",
    [photo(), png(photo()), Image.fromarray(photo()), photo().astype(np.float32) / 255],
    ids=["u8", "png", "picture", "f4"],
)
def test_maps_of_the_input_lie_on_the_part_that_was_seen(image):
    found = only_map(reply(), image)
    seen = Image.fromarray(photo()).resize((30, 20), Image.Resampling.BICUBIC).crop((5, 0, 25, 20))
    assert found.image is not None
    assert found.image.tobytes() == seen.tobytes()
    assert found.overlay().size == (20, 20)


def test_maps_of_the_original_lie_on_the_sent_image():
    found = only_map(reply(shape=(40, 60)), png(photo()), size="original")
    assert found.overlay(opacity=0).tobytes() == photo().tobytes()


def test_maps_of_a_layer_lie_on_nothing():
    found = only_map(reply(shape=(7, 7)), b"is never decoded", size="layer")
    with pytest.raises(InvalidOption, match="no image to lie on"):
        found.overlay()


def break_data(message: pb.SaliencyMap) -> None:
    message.data = message.data[:-1]


def break_shape(message: pb.SaliencyMap) -> None:
    del message.shape[:]


def break_method(message: pb.SaliencyMap) -> None:
    message.method.Clear()


def break_encoding(message: pb.SaliencyMap) -> None:
    message.encoding = 99


@pytest.mark.parametrize("harm", [break_data, break_shape, break_method, break_encoding])
def test_a_malformed_reply_is_a_fault_of_the_server(harm):
    message = reply()
    harm(message.maps[0])
    with pytest.raises(Internal, match="the server's reply is malformed"):
        only_map(message, photo())


@given(explanations.filter(lambda explanation: len(explanation.maps) > 1))
def test_maps_that_are_too_large_together_are_refused(sent):
    size = sum(saliency.array.nbytes for saliency in sent.maps)
    assert len(v1.maps_to_proto(sent.maps, OutputOptions(), size)) == len(sent.maps)
    made = []
    with pytest.raises(InvalidOption, match=f"at most {size - 1} bytes: ask for fewer classes"):
        v1.maps_to_proto((made.append(one) or one for one in sent.maps), OutputOptions(), size - 1)
    with pytest.raises(InvalidOption, match="at most 1 bytes"):
        v1.maps_to_proto((made.append(one) or one for one in sent.maps), OutputOptions(), 1)
    assert len(made) == len(sent.maps) + 1, "no map is made once it is known that they do not fit"


# Models


@given(models)
def test_model_round_trip(info):
    assert v1.model_from_proto(resent(v1.model_to_proto(info))) == info


@pytest.mark.parametrize("ready", [True, False])
def test_a_served_model_arrives_with_every_method_and_what_it_costs_and_needs(ready):
    received = v1.served_model_from_proto(resent(v1.served_model_to_proto(MODEL, ready)))
    layer = MODEL.layer("")
    offered = tuple(
        MethodInfo(name, spec.title, spec.paper, spec.parameters(), spec().passes(layer, 1), spec.needs)
        for name, spec in METHODS.items()
    )
    values = {field.name: getattr(MODEL, field.name) for field in dataclasses.fields(MODEL)}
    assert received == Model(**values, ready=ready, methods=offered, targets=target_forms(MODEL))
    assert [form.name for form in received.targets] == ["class", "contrast", "finer", "against"]


def test_the_costs_of_methods_are_these():
    numbers = dataclasses.replace(MODEL, outputs="value")
    (score_cam,) = (one for one in v1.served_model_to_proto(numbers, True).methods if one.name == "score_cam")
    assert score_cam.queries == 97, "numbers have no zero: the baseline is asked as well"
    listed = {method.name: method.queries for method in v1.served_model_to_proto(MODEL, ready=True).methods}
    expected = {"grad_cam": 0, "score_cam": 96, "group_cam": 33, "smooth_grad": 25, "xrai": 200}
    assert {name: listed[name] for name in expected} == expected


def test_a_method_whose_defaults_do_not_fit_the_layer_has_no_cost():
    narrow = replace(MODEL, layers=(Layer("narrow", 31, 4, 6),), default_layer="narrow")
    costs = {method.name: method.queries for method in v1.served_model_to_proto(narrow, ready=True).methods}
    assert (costs["group_cam"], costs["score_cam"]) == (0, 31)


def test_summaries_of_models():
    listed = pb.ListModelsReply(models=[pb.ModelSummary(name="a", version="1", ready=True), pb.ModelSummary(name="b")])
    assert v1.summaries_from_proto(resent(listed)) == (ModelSummary("a", "1", True), ModelSummary("b", "", False))


def test_an_unknown_layer_is_refused_with_the_default_and_close_ones():
    info = ModelInfo("m", "1", (), (8, 8), (Layer("layer4.1", 2, 2, 2), Layer("layer3.1", 2, 2, 2)), "layer4.1")
    assert info.layer("") == info.layer("layer4.1") == info.layers[0]
    with pytest.raises(InvalidOption, match=r"unknown layer 'layer4\.2'; the default is 'layer4\.1'.*layer3\.1"):
        info.layer("layer4.2")


# References, whose bytes are cut out before the rest is parsed


def reference(content: bytes) -> pb.Target:
    return pb.Target(reference=pb.Image(encoded=content))


def test_references_arrive_in_the_order_of_their_targets():
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    targets = (Vector(image=b"one"), Target(index=3), Vector(image=pixels), Vector([1.0]), Vector(image=b"two"))
    sent = v1.request_to_proto(ExplainRequest(b"photo", targets=targets)).SerializeToString()
    found = v1.request_from_bytes(sent)
    assert (found.image, found.targets) == (b"photo", targets)


def test_references_do_not_count_as_options_and_each_is_measured():
    large = v1.request_to_proto(ExplainRequest(b"photo", targets=(Vector(image=bytes(5000)),))).SerializeToString()
    assert v1.request_from_bytes(large, RequestLimits(option_bytes=2000)).targets
    with pytest.raises(InvalidImage, match="an image may have at most 4999 bytes, got 5000"):
        v1.request_from_bytes(large, RequestLimits(image_bytes=4999))


@pytest.mark.parametrize(
    ("target", "kind", "text"),
    [
        (pb.Target(reference=pb.Image()), InvalidImage, "no image: set reference.encoded or reference.tensor"),
        (pb.Target(reference=pb.Image(tensor=pb.Tensor(shape=[1, 1, 3]))), InvalidImage, "no image: set reference"),
        (pb.Target(vector=b"12345"), InvalidOption, "a vector is float32, 4 bytes for each number; got 5 bytes"),
        (pb.Target(vector=b""), InvalidOption, "a vector has the shape"),
        (pb.Target(vector=bytes(8)), InvalidOption, "a vector must not be all zeros"),
        (pb.Target(vector=np.array([np.nan], "<f4").tobytes()), InvalidOption, "a vector has finite numbers, got nan"),
        (pb.Target(contrast={}), InvalidOption, "exactly one, got 0"),
        (pb.Target(contrast={"of": {"index": 1}}), InvalidOption, "at least one other, got none"),
        (pb.Target(contrast={"of": {"index": 1}, "than": [{}]}), InvalidOption, "exactly one, got 0"),
        (pb.Target(contrast={"of": {"index": 1}, "than": [{"top_k": 2}]}), InvalidOption, "named ones, got top2"),
        (
            pb.Target(contrast={"of": {"index": 1}, "than": [{"index": 2}], "gamma": float("nan")}),
            InvalidOption,
            r"gamma must be 0\.\.10, got nan",
        ),
        (pb.Target(finer={"of": {"index": 1}, "nearest": 0}), InvalidOption, r"nearest must be 1\.\.100, got 0"),
        (pb.Target(finer={}), InvalidOption, "exactly one, got 0"),
        (pb.Target(against={}), InvalidOption, "exactly one, got 0"),
        (pb.Target(value={"of": {"index": 1}, "direction": 7}), InvalidOption, "unknown direction 7"),
        (pb.Target(value={"of": {"top_k": 1}}), InvalidOption, "by name or index, got top1"),
        (pb.Target(text=""), InvalidOption, "a text target has words, .*; got an empty text"),
    ],
)
def test_a_target_that_is_none_is_refused(target, kind, text):
    message = pb.ExplainRequest(image=pb.Image(encoded=b"x"), targets=[target])
    with pytest.raises(kind, match=text):
        v1.request_from_bytes(message.SerializeToString())


def test_a_reference_that_is_said_twice_is_refused():
    twice = reference(b"one").SerializeToString() + reference(b"two").SerializeToString()
    request = (
        pb.ExplainRequest(image=pb.Image(encoded=b"x")).SerializeToString() + b"\x2a" + bytes([len(twice)]) + twice
    )
    with pytest.raises(InvalidImage, match=r"set reference\.encoded or reference\.tensor, once"):
        v1.request_from_bytes(request)


def test_the_classes_and_names_inside_of_targets_are_bounded_before_one_is_read():
    many = pb.Target(contrast={"of": {"index": 1}, "than": [{}] * 3})
    sent = pb.ExplainRequest(image=pb.Image(encoded=b"x"), targets=[many]).SerializeToString()
    with pytest.raises(InvalidOption, match="name at most 3 classes, got 4"):
        v1.request_from_bytes(sent, RequestLimits(targets=3))
    for kind in ("finer", "against", "value"):
        long = pb.Target(**{kind: {"of": {"label": "x" * 65}}})
        sent = pb.ExplainRequest(image=pb.Image(encoded=b"x"), targets=[long, pb.Target()]).SerializeToString()
        with pytest.raises(InvalidOption, match="a name has at most 64 characters, got 65"):
            v1.request_from_bytes(sent, RequestLimits(name_characters=64))


def test_a_text_is_bounded_before_it_is_read():
    def sent(*texts: str) -> bytes:
        targets = [pb.Target(text=text) for text in texts]
        return pb.ExplainRequest(image=pb.Image(encoded=b"x"), targets=targets).SerializeToString()

    limits = RequestLimits(text_characters=65, name_characters=64)
    assert v1.request_from_bytes(sent("é" * 65), limits).targets == (Text("é" * 65),)
    with pytest.raises(InvalidOption, match="a text has at most 65 characters, got 66"):
        v1.request_from_bytes(sent("", "x" * 66), limits)  # the first one would be refused when it is read


def test_the_text_beside_an_image_is_bounded_before_the_rest_is_read():
    sent = pb.ExplainRequest(image=pb.Image(encoded=b"x"), text="x" * 65, targets=[pb.Target()]).SerializeToString()
    with pytest.raises(InvalidOption, match="a text has at most 64 characters, got 65"):
        v1.request_from_bytes(sent, RequestLimits(text_characters=64))


def test_a_client_of_0_1_sends_no_kind_and_reads_probabilities():
    assert v1.target_from_proto(pb.Target(top_k=2)) == Target(top_k=2)
    assert v1.prediction_from_proto(pb.Prediction(index=1, label="a")) == Prediction(1, "a", 0.0)


def test_signed_maps_are_asked_for_and_come_back_with_their_sign():
    output = OutputOptions(signed=True)
    assert (
        v1.request_from_bytes(v1.request_to_proto(ExplainRequest(b"x", output=output)).SerializeToString()).output
        == output
    )

"""Requests from what Python callers have, and our types from replies: no server needed."""

import io

import numpy as np
import pytest
from PIL import Image

from camserve import messages, wire
from camserve.errors import Internal, InvalidImage, InvalidOption
from camserve.finalise.encode import encode
from camserve.images import decode
from camserve.methods import METHODS, GradCam, GroupCam, ScoreCam
from camserve.types import Box, BoxOptions, Cost, InputView, Prediction, SaliencyMap, StreamOptions, Target
from camserve.v1 import explain_pb2 as pb

VIEW = InputView(original_size=(40, 60), crop=(10.0, 0.0, 50.0, 40.0), size=(20, 20))


def photo(height: int = 40, width: int = 60) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def request(**options) -> pb.ExplainRequest:
    return messages.ask(b"image", **options).request


def test_defaults():
    expected = pb.ExplainRequest(
        image=pb.Image(encoded=b"image"),
        methods=[pb.MethodSpec(grad_cam=pb.GradCam())],
        output=pb.Output(size=pb.Output.INPUT, encoding=pb.Output.FLOAT32),
        top_predictions=5,
        precision=pb.EXACT,
        fusion=pb.MEAN,
        evaluation_steps=28,
        priority=pb.NORMAL,
        stream=pb.StreamOptions(max_maps=8, min_interval_s=0.25),
    )
    assert request() == expected


def test_everything_set():
    message = request(
        methods=["cam", ("group_cam", {"groups": 8, "variant": "reference"}), ScoreCam()],
        targets=[282, "tabby", Target(top_k=3)],
        model="lite0",
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
    )
    assert [wire.method_from_proto(method) for method in message.methods] == [
        METHODS["cam"](),
        GroupCam(groups=8, variant="reference"),
        ScoreCam(),
    ]
    assert [wire.target_from_proto(target) for target in message.targets] == [
        Target(index=282),
        Target(label="tabby"),
        Target(top_k=3),
    ]
    assert (message.model, message.layers, message.top_predictions) == ("lite0", ["_bn1"], 2)
    assert (message.output.size, message.output.encoding) == (pb.Output.ORIGINAL, pb.Output.UINT8)
    assert (message.output.boxes.threshold, message.output.boxes.all_components) == (0.3, True)
    assert message.precision == pb.BFLOAT16
    assert (message.fusion, message.evaluate, message.evaluation_steps) == (pb.MAX, True, 7)
    assert (message.priority, message.allow_partial) == (pb.INTERACTIVE, True)
    assert (message.stream.max_maps, message.stream.min_interval_s) == (3, 0.5)


def test_lone_strings_are_not_taken_apart():
    message = request(methods="score_cam", targets="tabby")
    assert [method.WhichOneof("method") for method in message.methods] == ["score_cam"]
    assert [target.label for target in message.targets] == ["tabby"]


@pytest.mark.parametrize(("boxes", "present"), [(None, False), (False, False), (True, True), (BoxOptions(), True)])
def test_boxes_are_asked_for_only_if_wanted(boxes, present):
    output = request(boxes=boxes).output
    assert output.HasField("boxes") == present
    assert not present or output.boxes.threshold == 0.15


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"methods": ["deep_dream"]}, "unknown method 'deep_dream'; there are cam, grad_cam"),
        ({"methods": [("group_cam", {"theta": 101})]}, r"theta must be 0\.\.100, got 101"),
        ({"targets": [-1]}, r"0\.\.2\*\*32-1, got -1"),
        ({"targets": [2**32]}, r"0\.\.2\*\*32-1, got 4294967296"),
        ({"top_predictions": -1}, "out of range"),
        ({"size": "huge"}, "size must be one of input, layer, original, got 'huge'"),
        ({"encoding": "overlay_png"}, "encoding must be one of float32, float16, uint8, png, got 'overlay_png'"),
        ({"precision": "int8"}, "precision must be one of exact, bfloat16, got 'int8'"),
    ],
)
def test_bad_options_fail_before_anything_is_sent(options, text):
    with pytest.raises(InvalidOption, match=text):
        request(**options)


def test_image_from_a_path(tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(png(photo()))
    assert messages.ask(path).request.image.encoded == path.read_bytes()
    assert messages.ask(str(path)).request.image.encoded == path.read_bytes()


def test_missing_file(tmp_path):
    with pytest.raises(InvalidImage, match=r"cannot read .*none\.png: No such file"):
        messages.ask(tmp_path / "none.png")


def test_array_is_sent_as_it_is():
    tensor = messages.ask(photo()).request.image.tensor
    assert (tensor.data_type, list(tensor.shape), tensor.data) == (pb.Tensor.UINT8, [40, 60, 3], photo().tobytes())


def test_array_of_another_type():
    with pytest.raises(InvalidImage, match="uint8 or float32, got int64"):
        messages.ask(photo().astype(np.int64))


def test_pil_image_is_sent_as_png():
    sent = messages.ask(Image.fromarray(photo())).request.image.encoded
    np.testing.assert_array_equal(np.asarray(decode(sent)), photo())


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV", "I;16", "I;16B", "I", "F"])
def test_pil_image_of_any_mode_can_be_sent(mode):
    image = Image.fromarray(photo()).convert("L" if mode in ("I;16", "I;16B", "LA") else "RGB").convert(mode)
    assert decode(messages.ask(image).request.image.encoded).size == (60, 40)


def test_pil_image_keeps_its_transparency():
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert decode(messages.ask(image).request.image.encoded).getpixel((0, 0)) == (255, 255, 255)


def test_pil_image_is_turned_upright():
    image = Image.fromarray(photo())
    image.getexif()[0x0112] = 6  # a quarter turn clockwise
    sent = decode(messages.ask(image).request.image.encoded)
    np.testing.assert_array_equal(np.asarray(sent), np.rot90(photo(), -1))


def saliency(method=GradCam(), shape=(20, 20)) -> SaliencyMap:  # noqa: B008  # frozen
    return SaliencyMap(
        method=method,
        target=Prediction(282, "tiger cat", 0.5),
        layers=("features",),
        array=np.random.default_rng(1).random(shape, np.float32),
        value_range=(-1.0, 2.0),
        degenerate=False,
        complete=True,
        boxes=(Box(1.0, 2.0, 3.0, 4.5, 0.25),),
    )


def map_message(value: SaliencyMap, encoding: str = "float32") -> pb.SaliencyMap:
    return pb.SaliencyMap(
        method=wire.method_to_proto(value.method),
        target=wire.prediction_to_proto(value.target),
        layers=value.layers,
        shape=value.array.shape,
        encoding=encoding.upper(),
        data=encode(value, encoding, None),
        minimum=value.value_range[0],
        maximum=value.value_range[1],
        boxes=[pb.Box(left=b.left, top=b.top, right=b.right, bottom=b.bottom, score=b.score) for b in value.boxes],
        degenerate=value.degenerate,
        complete=value.complete,
    )


def reply(*maps: pb.SaliencyMap) -> pb.ExplainReply:
    return pb.ExplainReply(
        model="lite0",
        version="1.0",
        predictions=[pb.Prediction(index=282, label="tiger cat", probability=0.5)],
        maps=maps,
        input=wire.view_to_proto(VIEW),
        cost=pb.Cost(queries=32, stage_seconds={"queries": 0.5}, steps=2, precision=pb.BFLOAT16, worker="here"),
    )


def test_reply_becomes_an_explanation():
    sent = saliency(GroupCam(groups=4))
    answer = messages.explanation(reply(map_message(sent)), messages.ask(photo()))
    assert (answer.model, answer.version, answer.input) == ("lite0", "1.0", VIEW)
    assert answer.predictions == (Prediction(282, "tiger cat", 0.5),)
    assert answer.cost == Cost(32, {"queries": 0.5}, 2, "bfloat16", "here")
    (got,) = answer.maps
    np.testing.assert_array_equal(got.array, sent.array)
    fields = ("method", "target", "layer", "value_range", "degenerate", "complete", "boxes")
    assert [getattr(got, field) for field in fields] == [getattr(sent, field) for field in fields]


@pytest.mark.parametrize("encoding", ["float32", "float16", "uint8", "png"])
def test_maps_are_read_from_every_encoding(encoding):
    answer = messages.explanation(reply(map_message(saliency(), encoding)), messages.ask(photo()))
    np.testing.assert_allclose(answer.maps[0].array, saliency().array, atol=0.002)  # half a step of uint8


@pytest.mark.parametrize("image", [photo(), png(photo()), photo().astype(np.float32) / 255], ids=["u8", "png", "f4"])
def test_input_maps_lie_on_the_part_that_was_seen(image):
    answer = messages.explanation(reply(map_message(saliency())), messages.ask(image))
    seen = Image.fromarray(photo()).resize((30, 20), Image.Resampling.BICUBIC).crop((5, 0, 25, 20))
    assert answer.maps[0].image is not None
    assert answer.maps[0].image.tobytes() == seen.tobytes()
    assert answer.maps[0].overlay().size == (20, 20)


def test_original_maps_lie_on_the_sent_image():
    asked = messages.ask(png(photo()), size="original")
    answer = messages.explanation(reply(map_message(saliency(shape=(40, 60)))), asked)
    assert answer.maps[0].overlay(opacity=0).tobytes() == photo().tobytes()


def test_layer_maps_lie_on_nothing():
    asked = messages.ask(b"is never decoded", size="layer")
    answer = messages.explanation(reply(map_message(saliency(shape=(7, 7)))), asked)
    with pytest.raises(InvalidOption, match="no image to lie on"):
        answer.maps[0].overlay()


def break_data(message: pb.SaliencyMap) -> None:
    message.data = message.data[:-1]


def break_shape(message: pb.SaliencyMap) -> None:
    del message.shape[:]


def break_method(message: pb.SaliencyMap) -> None:
    message.method.Clear()


def break_encoding(message: pb.SaliencyMap) -> None:
    message.encoding = 99


@pytest.mark.parametrize("harm", [break_data, break_shape, break_method, break_encoding])
def test_malformed_reply_is_a_fault_of_the_server(harm):
    message = map_message(saliency())
    harm(message)
    with pytest.raises(Internal, match="the server's reply is malformed"):
        messages.explanation(reply(message), messages.ask(photo()))


def test_model_with_its_methods():
    message = pb.Model(
        name="lite0",
        version="1.0",
        ready=True,
        labels=["cat", "dog"],
        input_height=224,
        input_width=192,
        layers=[pb.Layer(name="features", channels=1280, height=7, width=6)],
        default_layer="features",
        methods=[
            pb.Method(
                name=name,
                title=spec.title,
                paper=spec.paper,
                queries=7,
                parameters=[
                    pb.Parameter(
                        name=parameter.name,
                        type=parameter.type,
                        default=str(parameter.default),
                        minimum=parameter.minimum,
                        maximum=parameter.maximum,
                        choices=parameter.choices,
                        description=parameter.description,
                    )
                    for parameter in spec.parameters()
                ],
            )
            for name, spec in METHODS.items()
        ],
    )
    model = messages.model(message)
    assert (model.name, model.ready, model.labels, model.input_size) == ("lite0", True, ("cat", "dog"), (224, 192))
    assert model.layer("").channels == 1280
    assert [method.name for method in model.methods] == list(METHODS)
    for method, spec in zip(model.methods, METHODS.values(), strict=True):
        assert (method.title, method.paper, method.queries) == (spec.title, spec.paper, 7)
        assert method.parameters == spec.parameters()


READY, WAITING = messages.ModelSummary("a", "1", True), messages.ModelSummary("b", "1", False)


@pytest.mark.parametrize(
    ("models", "name", "text"),
    [
        ([READY], "", None),
        ([READY], "a", None),
        ([READY, WAITING], "a", None),
        ([READY, WAITING], "", "no worker is ready for b"),
        ([READY], "c", "there is no model 'c'"),
        ([], "", "no model is served"),
    ],
)
def test_what_is_not_ready(models, name, text):
    assert messages.unready(models, name) == text

"""The Open Inference Protocol's bytes from and to our types, without a server."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from camserve.codecs import texts
from camserve.codecs.oip import PARAMETERS, Inference, decode, encode, fitted, metadata, model_name
from camserve.errors import CamserveError, InvalidInput, InvalidOption
from camserve.methods import METHODS, Auto, GradCam, GroupCam, ScoreCam
from camserve.oip import inference_pb2 as oip
from camserve.types import (
    Box,
    BoxOptions,
    Cost,
    Explanation,
    Faithfulness,
    InputView,
    Layer,
    ModelInfo,
    Prediction,
    SaliencyMap,
    Target,
    Text,
)
from camserve.types.request import ExplainRequest, OutputOptions, RequestLimits

MODEL = ModelInfo("fake", "1.0", ("boat", "cup"), (32, 48), (Layer("features", 96, 4, 6),), "features")

PHOTO = b"\x89PNG and so on"


def raw_bytes(*elements: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


def infer(
    datatype: str = "BYTES",
    shape: tuple[int, ...] = (1,),
    raw: bytes | None = None,
    outputs: tuple[str, ...] = (),
    contents: oip.InferTensorContents | None = None,
    **parameters: oip.InferParameter,
) -> oip.ModelInferRequest:
    tensor = oip.ModelInferRequest.InferInputTensor(name="image", datatype=datatype, shape=shape, contents=contents)
    request = oip.ModelInferRequest(model_name="fake", model_version="1.0", id="42", inputs=[tensor])
    if raw is None and contents is None:
        raw = raw_bytes(PHOTO)
    request.raw_input_contents.extend([] if raw is None else [raw])
    for name in outputs:
        request.outputs.add(name=name)
    for name, parameter in parameters.items():
        request.parameters[name].CopyFrom(parameter)
    return request


def text(value: str) -> oip.InferParameter:
    return oip.InferParameter(string_param=value)


def number(value: int) -> oip.InferParameter:
    return oip.InferParameter(int64_param=value)


def asked(message: oip.ModelInferRequest) -> Inference:
    return decode(message.SerializeToString())


def fields(request: ExplainRequest) -> dict[str, Any]:
    return {name: value for name, value in vars(request).items() if name != "image"}


def test_a_plain_request_is_grad_cam_of_an_encoded_file():
    found = asked(infer())
    output = OutputOptions(encoding="float32", stacked=True)
    assert found.request.image == PHOTO
    assert fields(found.request) == fields(ExplainRequest(PHOTO, model="fake", version="1.0", output=output))
    assert (found.timeout_s, found.outputs, found.id, found.raw) == (None, (), "42", True)


@pytest.mark.parametrize("shape", [(1,), (1, 1)])
def test_an_encoded_file_may_be_alone_in_a_batch(shape: tuple[int, ...]):
    assert asked(infer(shape=shape)).request.image == PHOTO


def test_an_encoded_file_may_come_in_the_contents():
    found = asked(infer(contents=oip.InferTensorContents(bytes_contents=[PHOTO])))
    assert (found.request.image, found.raw) == (PHOTO, False)


@pytest.mark.parametrize("shape", [(2, 3, 3), (1, 2, 3, 3)])
@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("datatype", ["UINT8", "FP32"])
def test_pixels_come_raw_or_as_numbers(datatype: str, shape: tuple[int, ...], raw: bool):
    pixels = np.arange(100, 118).astype({"UINT8": "u1", "FP32": "<f4"}[datatype]).reshape(2, 3, 3)
    contents = oip.InferTensorContents(**{f"{'uint' if datatype == 'UINT8' else 'fp32'}_contents": pixels.ravel()})
    request = infer(datatype, shape, pixels.tobytes()) if raw else infer(datatype, shape, contents=contents)
    image = asked(request).request.image
    assert isinstance(image, np.ndarray)
    assert image.dtype == pixels.dtype
    np.testing.assert_array_equal(image, pixels)


def test_every_parameter_reaches_the_request():
    given = {
        "explain_method": text("group_cam:groups=8,variant=reference; score_cam  auto"),
        "explain_targets": text("281, tiger cat,text:a cat, asleep;top3"),
        "explain_text": text("which is left?"),
        "explain_layers": text("stem, features"),
        "explain_fusion": text("max"),
        "explain_size": text("original"),
        "explain_signed": oip.InferParameter(bool_param=False),
        "explain_boxes": oip.InferParameter(double_param=0.25),
        "explain_precision": text("bfloat16"),
        "explain_top_predictions": number(7),
        "explain_evaluate": oip.InferParameter(bool_param=True),
        "explain_evaluation_steps": text("9"),
        "explain_allow_partial": text("TRUE"),
        "priority": oip.InferParameter(uint64_param=1),
    }
    assert set(given) == set(PARAMETERS)
    found = asked(infer(timeout=number(2_500_000), **given))
    assert fields(found.request) == {
        "model": "fake",
        "version": "1.0",
        "methods": (GroupCam(groups=8, variant="reference"), ScoreCam(), Auto()),
        "targets": (Target(index=281), Target(label="tiger cat"), Text("a cat, asleep"), Target(top_k=3)),
        "text": "which is left?",
        "layers": ("stem", "features"),
        "fusion": "max",
        "output": OutputOptions(size="original", encoding="float32", boxes=BoxOptions(0.25), stacked=True),
        "precision": "bfloat16",
        "top_predictions": 7,
        "evaluate": True,
        "evaluation_steps": 9,
        "allow_partial": True,
        "evidence": False,
        "priority": "interactive",
        "stream": ExplainRequest(b"").stream,
    }
    assert found.timeout_s == 2.5


def test_signed_maps_are_asked_for_by_a_switch_or_its_text():
    for value in (oip.InferParameter(bool_param=True), text("true")):
        assert asked(infer(explain_signed=value)).request.output == OutputOptions(signed=True, stacked=True)


def test_every_option_of_a_request_has_a_parameter():
    """Model, version and image have places of their own; no stream, no record in the reply; maps come as float32."""
    assert set(PARAMETERS.values()) | {"version"} == {*texts.FIELDS, *texts.LISTS}
    assert set(fields(ExplainRequest(b""))) - {"model", "stream", "output", "evidence"} == {
        *texts.FIELDS,
        *texts.LISTS,
    } - {
        "size",
        "boxes",
        "signed",
    }


@pytest.mark.parametrize("name", METHODS)
def test_every_method_can_be_said_with_every_parameter(name: str):
    spec = METHODS[name]()
    said = ",".join(f"{parameter.name}={parameter.default}" for parameter in spec.parameters())
    assert asked(infer(explain_method=text(f"{name}:{said}"))).request.methods == (spec,)


@pytest.mark.parametrize(
    ("given", "boxes"),
    [
        (oip.InferParameter(bool_param=True), BoxOptions()),
        (oip.InferParameter(bool_param=False), None),
        (text("True"), BoxOptions()),
        (text("false"), None),
        (oip.InferParameter(double_param=0.5), BoxOptions(0.5)),
        (number(1), BoxOptions(1.0)),
        (text("0.3"), BoxOptions(0.3)),
        (text("0.3 all"), BoxOptions(0.3, all_components=True)),
        (text("true all"), BoxOptions(all_components=True)),
        (text("all"), BoxOptions(all_components=True)),
    ],
)
def test_boxes_are_a_switch_or_a_threshold(given: oip.InferParameter, boxes: BoxOptions | None):
    assert asked(infer(explain_boxes=given)).request.output.boxes == boxes


@pytest.mark.parametrize(
    ("given", "priority"),
    [
        (oip.InferParameter(uint64_param=0), "normal"),
        (oip.InferParameter(uint64_param=2), "normal"),
        (number(3), "batch"),
        (text("3"), "batch"),
        (text("interactive"), "interactive"),
    ],
)
def test_a_priority_is_tritons_number_or_a_name(given: oip.InferParameter, priority: str):
    assert asked(infer(priority=given)).request.priority == priority


def test_a_timeout_of_zero_is_none():
    assert asked(infer(timeout=number(0))).timeout_s is None


def test_a_class_index_may_be_a_number():
    assert asked(infer(explain_targets=number(281))).request.targets == (Target(index=281),)


def test_what_is_empty_is_the_default():
    request = asked(infer(explain_method=text(" "), explain_targets=text(","), explain_layers=text(""))).request
    assert (request.methods, request.targets, request.layers) == ((GradCam(),), (), ())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "explain_colour",
            text("red"),
            "unknown parameter 'explain_colour'; there are explain_method, explain_targets, explain_text, "
            "explain_layers, explain_fusion, explain_size, explain_signed, explain_boxes, explain_precision, "
            "explain_top_predictions, explain_evaluate, explain_evaluation_steps, explain_allow_partial, priority, "
            "timeout",
        ),
        ("explain_method", number(3), "explain_method must be a text, got 3"),
        (
            "explain_targets",
            oip.InferParameter(bool_param=True),
            "explain_targets: a target is a class index, a text",
        ),
        ("explain_layers", oip.InferParameter(), "explain_layers must be a text, got nothing"),
        ("explain_boxes", text("large"), "explain_boxes must be true, false or a threshold, perhaps followed by all, "),
        ("explain_boxes", text("0.1 0.2"), "explain_boxes must be true, false or a threshold"),
        ("explain_boxes", text("false all"), "explain_boxes must be true, false or a threshold"),
        ("explain_boxes", text(""), "explain_boxes must be true, false or a threshold"),
        ("explain_boxes", oip.InferParameter(), "explain_boxes must be .*, got nothing"),
        ("explain_top_predictions", text("²"), "explain_top_predictions must be a whole number, got '²'"),
        ("explain_top_predictions", text("٣"), "explain_top_predictions must be a whole number, got '٣'"),
        ("explain_top_predictions", oip.InferParameter(bool_param=True), "must be a whole number, got True"),
        ("explain_evaluation_steps", oip.InferParameter(double_param=3), "must be a whole number, got 3.0"),
        ("explain_evaluate", number(1), "explain_evaluate must be true or false, got 1"),
        ("explain_allow_partial", oip.InferParameter(), "explain_allow_partial must be true or false, got nothing"),
        (
            "priority",
            number(4),
            r"priority must be 0 \(default\), 1 \(interactive\), 2 \(normal\), 3 \(batch\).* got 4",
        ),
        ("priority", text("²"), "priority must be one of interactive, normal, batch, got '²'"),
        ("priority", oip.InferParameter(), "priority must be a whole number, got nothing"),
        ("timeout", text("soon"), "timeout must be a whole number, got 'soon'"),
        ("timeout", number(-5), "timeout must be at least 0, got -5"),
    ],
)
def test_a_parameter_of_another_form_is_refused_with_what_is_allowed(
    name: str, value: oip.InferParameter, message: str
):
    with pytest.raises(InvalidOption, match=message):
        asked(infer(**{name: value}))


@pytest.mark.parametrize(
    ("name", "value", "made"),
    [
        ("explain_method", text("grad_kam"), lambda: texts.parse_method("grad_kam")),
        ("explain_method", text("group_cam:groups=0"), lambda: GroupCam(groups=0)),
        ("explain_method", text("group_cam:groups=²"), lambda: GroupCam(groups="²")),
        ("explain_method", text("cam:groups=3"), lambda: texts.parse_method("cam", {"groups": 3})),
        ("explain_targets", text("top0"), lambda: Target(top_k=0)),
        ("explain_fusion", text("sum"), lambda: ExplainRequest(b"", fusion="sum")),
        ("explain_fusion", number(3), lambda: ExplainRequest(b"", fusion=3)),
        ("explain_size", text("huge"), lambda: OutputOptions(size="huge")),
        ("explain_size", oip.InferParameter(), lambda: OutputOptions(size=None)),
        ("explain_boxes", text("1.5"), lambda: BoxOptions(1.5)),
        ("explain_boxes", text("-1 all"), lambda: BoxOptions(-1.0)),
        ("explain_boxes", oip.InferParameter(double_param=float("nan")), lambda: BoxOptions(float("nan"))),
        ("explain_precision", text("int8"), lambda: ExplainRequest(b"", precision="int8")),
        ("explain_top_predictions", number(-1), lambda: ExplainRequest(b"", top_predictions=-1)),
        ("explain_evaluation_steps", number(0), lambda: ExplainRequest(b"", evaluation_steps=0)),
        ("explain_evaluation_steps", text("5000"), lambda: ExplainRequest(b"", evaluation_steps=5000)),
        ("priority", text("urgent"), lambda: ExplainRequest(b"", priority="urgent")),
    ],
)
@pytest.mark.parametrize("outputs", [(), ("labels",)])
def test_a_value_is_refused_in_the_words_of_the_type_that_it_belongs_to(
    name: str, value: oip.InferParameter, made, outputs: tuple[str, ...]
):
    with pytest.raises(InvalidOption) as expected:
        made()
    with pytest.raises(InvalidOption) as found:
        asked(infer(outputs=outputs, **{name: value}))
    assert str(found.value) == str(expected.value)


def _changed(change) -> oip.ModelInferRequest:
    request = infer()
    change(request)
    return request


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (_changed(lambda r: r.ClearField("inputs")), r"there must be one input, 'image', got \[\]"),
        (_changed(lambda r: r.inputs.add(name="mask")), r"got \['image', 'mask'\]"),
        (_changed(lambda r: setattr(r.inputs[0], "name", "data")), r"got \['data'\]"),
        (_changed(lambda r: r.raw_input_contents.append(b"")), "in `contents` or in one entry"),
        (_changed(lambda r: r.inputs[0].contents.bytes_contents.append(b"x")), "in `contents` or in one entry"),
        (_changed(lambda r: r.inputs[0].parameters["shared_memory_region"].SetInParent()), "has no parameters"),
        (infer("BYTES", (2,)), r"must be BYTES \[1\], an encoded file, or UINT8 or FP32 .* got BYTES \[2\]"),
        (infer("FP16", (4, 4, 3), b""), r"must be BYTES .* got FP16 \[4, 4, 3\]"),
        (infer("FP32", (4,), b""), r"must be BYTES .* got FP32 \[4\]"),
        (infer("FP32", (1, 2, 3), bytes(23)), r"shape \[1, 2, 3\] has 24 bytes, got 23"),
        (infer("UINT8", (1, 1, 2, 3), bytes(5)), r"shape \[1, 2, 3\] has 6 bytes, got 5"),
        (infer("UINT8", (0, 2, 3), b""), r"got UINT8 \[0, 2, 3\]"),
        (infer("UINT8", (1, 1, 3), contents=oip.InferTensorContents(uint_contents=[1])), "has 3 bytes, got 1"),
        (infer("FP32", (1, 1, 3), contents=oip.InferTensorContents(uint_contents=[1, 2, 3])), "has 12 bytes, got 0"),
        (infer(raw=b""), "raw BYTES are the image's length in 4 bytes.* got 0 bytes$"),
        (infer(raw=b"abc"), "raw BYTES are the image's length in 4 bytes.* got 3 bytes$"),
        (infer(raw=PHOTO), "got 14 bytes that begin with the length"),
        (infer(raw=raw_bytes(PHOTO, PHOTO)), "raw BYTES are the image's length"),
        (infer(contents=oip.InferTensorContents()), r"has one element, got 0"),
        (infer("UINT8", (6,), bytes(6)), r"or, grey, \[height, width\], got UINT8 \[6\]"),
        (infer("UINT8", (2, 3), bytes(5)), r"shape \[2, 3\] has 6 bytes, got 5"),
        (infer("UINT8", (0, 3), b""), r"got UINT8 \[0, 3\]"),
        (infer("UINT8", (2, 3, 4), bytes(24)), r"got UINT8 \[2, 3, 4\]"),
        (infer("UINT8", (2, 2, 3, 3), bytes(36)), r"got UINT8 \[2, 2, 3, 3\]"),
        (infer("UINT8", (-1, 3, 3), bytes(9)), r"got UINT8 \[-1, 3, 3\]"),
        (infer("UINT8", (2**40, 3, 3), bytes(9)), "bytes, got 9"),
        (infer("UINT8", (1, 1, 3), contents=oip.InferTensorContents(uint_contents=[1, 2, 256])), r"0\.\.255, got 256"),
        (infer(outputs=("logits",)), r"outputs are probabilities, .*, each once; got \['logits'\]"),
        (infer(outputs=("labels", "labels")), "each once"),
        (_changed(lambda r: r.outputs.add(name="labels").parameters["classification"].SetInParent()), "no parameters"),
    ],
)
def test_a_bad_tensor_is_refused_with_what_is_allowed(request_: oip.ModelInferRequest, message: str):
    with pytest.raises(InvalidInput, match=message):
        asked(request_)


def test_bytes_that_are_no_message_are_refused():
    with pytest.raises(InvalidInput, match=r"no inference\.ModelInferRequest"):
        decode(b"\xff\xff\xff")


def test_the_model_of_a_refused_request_is_known():
    refused = infer(explain_colour=text("red")).SerializeToString()
    assert (model_name(refused), model_name(b"\xff\xff\xff")) == ("fake", "")


def test_without_saliency_no_map_is_made():
    parameters = {
        "explain_method": text("score_cam"),
        "explain_layers": text("stem"),
        "explain_size": text("original"),
        "explain_boxes": text("true"),
        "explain_evaluate": text("true"),
        "explain_targets": text("1"),
    }
    request = asked(infer(outputs=("labels",), **parameters)).request
    assert (request.methods, request.layers, request.evaluate) == ((), (), False)
    assert request.output == OutputOptions()
    assert (request.model, request.targets) == ("fake", (Target(index=1),)), "what is asked is checked all the same"


BOAT = Prediction(7, "boat", 0.5)


def saliency(value: float, **changes: Any) -> SaliencyMap:
    found = SaliencyMap(
        method=GroupCam(groups=8),
        target=BOAT,
        layers=("features",),
        array=np.full((2, 3), value, np.float32),
        value_range=(0.0, 1.0),
        degenerate=False,
        complete=True,
    )
    return replace(found, **changes)


CUP = Prediction(2, "cup ☕", 0.0)
CURVES = Faithfulness("rise", deletion=np.array([1.0, 0.0]), insertion=np.array([0.5, 1.0]))
ANSWER = Explanation(
    model="fake",
    version="1.0",
    predictions=(BOAT, CUP),
    maps=(
        saliency(
            0.25,
            target_text="contrast:boat>cup ☕",
            classes=(BOAT, CUP),
            score=0.5,
            boxes=(Box(0.0, 1.0, 2.0, 3.0, 0.5),),
            faithfulness=CURVES,
        ),
        saliency(1.0, complete=False, fraction=0.5, choice="in time", estimated_difference=0.125),
    ),
    input=InputView((2, 3), (0.0, 0.0, 3.0, 2.0), (2, 3)),
    cost=Cost(9, {"queue": 0.5}, 2, "exact", "w", evaluation_queries=4, cached=True, image_bytes=7),
    request_id="abc",
)


def answered(
    inference: Inference, explanation: Explanation = ANSWER, info: ModelInfo = MODEL
) -> oip.ModelInferResponse:
    return oip.ModelInferResponse.FromString(encode(explanation, fitted(inference, info)))


def arrays(message: oip.ModelInferResponse) -> dict[str, list]:
    """As a client reads them: [datatype, shape, elements]."""
    found = {}
    for place, output in enumerate(message.outputs):
        elements: list = []
        if message.raw_output_contents:
            elements = _unpacked(output.datatype, message.raw_output_contents[place])
        else:
            contents = output.contents
            elements = [*contents.fp32_contents, *contents.int64_contents, *contents.bytes_contents]
        found[output.name] = [output.datatype, list(output.shape), elements]
    return found


def _unpacked(datatype: str, raw: bytes) -> list:
    if datatype != "BYTES":
        return np.frombuffer(raw, {"FP32": "<f4", "INT64": "<i8"}[datatype]).tolist()
    elements = []
    while raw:
        (length,) = struct.unpack("<I", raw[:4])
        elements.append(raw[4 : 4 + length])
        raw = raw[4 + length :]
    return elements


@pytest.mark.parametrize("raw", [True, False])
def test_a_response_has_every_output_in_the_form_of_the_request(raw: bool):
    what = asked(infer() if raw else infer(contents=oip.InferTensorContents(bytes_contents=[PHOTO])))
    message = answered(what)
    assert bool(message.raw_output_contents) is raw
    assert arrays(message) == {
        "probabilities": ["FP32", [2], [0.5, 0.0]],
        "class_indices": ["INT64", [2], [7, 2]],
        "labels": ["BYTES", [2], [b"boat", "cup ☕".encode()]],
        "saliency": ["FP32", [2, 2, 3], [0.25] * 6 + [1.0] * 6],
    }
    assert (message.model_name, message.model_version, message.id) == ("fake", "1.0", "42")
    assert message.parameters["request_id"].string_param == "abc"
    assert message.parameters["complete"].bool_param is False
    assert json.loads(message.parameters["cost"].string_param) == {
        "queries": 9,
        "evaluation_queries": 4,
        "steps": 2,
        "precision": "exact",
        "worker": "w",
        "cached": True,
        "image_bytes": 7,
        "runtime": "",
        "micro_batch": 0,
        "stage_seconds": {"queue": 0.5},
    }


def test_maps_that_are_all_complete_are_a_complete_response():
    assert answered(asked(infer()), replace(ANSWER, maps=ANSWER.maps[:1])).parameters["complete"].bool_param is True


def test_a_response_says_of_each_map_what_it_is():
    first, second = json.loads(answered(asked(infer())).parameters["maps"].string_param)
    assert first == {
        "method": "group_cam",
        "parameters": {"groups": 8, "theta": 70.0, "variant": "paper", "grouping": "chunk"},
        "target": {"index": 7, "label": "boat", "probability": 0.5},
        "target_text": "contrast:boat>cup ☕",
        "classes": [
            {"index": 7, "label": "boat", "probability": 0.5},
            {"index": 2, "label": "cup ☕", "probability": 0.0},
        ],
        "score": 0.5,
        "signed": False,
        "layers": ["features"],
        "complete": True,
        "fraction": 1.0,
        "degenerate": False,
        "boxes": [{"left": 0.0, "top": 1.0, "right": 2.0, "bottom": 3.0, "score": 0.5}],
        "insertion_auc": 0.75,
        "deletion_auc": 0.5,
    }
    assert (second["complete"], second["fraction"], second["choice"], second["boxes"]) == (False, 0.5, "in time", [])
    assert second["estimated_difference"] == 0.125
    assert "estimated_difference" not in first
    assert "insertion_auc" not in second


def test_only_the_outputs_that_were_asked_come_in_their_order():
    message = answered(asked(infer(outputs=("labels", "probabilities"))))
    assert [output.name for output in message.outputs] == ["labels", "probabilities"]
    assert len(message.raw_output_contents) == 2
    assert "maps" not in message.parameters


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8"])
def test_maps_go_out_as_little_endian_float32(dtype: str):
    maps = (saliency(0.25, array=np.full((2, 3), 0.25, dtype)),)
    assert arrays(answered(asked(infer()), replace(ANSWER, maps=maps)))["saliency"][2] == [0.25] * 6


def test_a_model_without_predictions_has_empty_outputs():
    message = answered(asked(infer()), replace(ANSWER, predictions=()))
    assert [arrays(message)[name] for name in ("probabilities", "class_indices", "labels")] == [
        ["FP32", [0], []],
        ["INT64", [0], []],
        ["BYTES", [0], []],
    ]


def test_the_metadata_are_those_of_what_is_answered():
    found = metadata(MODEL)
    assert (found.name, list(found.versions)) == ("fake", ["1.0"])
    assert [(tensor.name, tensor.datatype, list(tensor.shape)) for tensor in found.inputs] == [("image", "BYTES", [1])]
    given = arrays(answered(asked(infer())))
    assert [tensor.name for tensor in found.outputs] == ["probabilities", "class_indices", "labels", "saliency"]
    assert list(given) == [tensor.name for tensor in found.outputs]
    for tensor in found.outputs:
        datatype, shape, _ = given[tensor.name]
        assert (tensor.datatype, len(tensor.shape)) == (datatype, len(shape))


@pytest.mark.parametrize("cut", range(60))
def test_a_cut_message_is_typed_or_fine(cut: int):
    whole = infer(explain_method=text("score_cam"), priority=number(2)).SerializeToString()
    with suppress(CamserveError):
        decode(whole[: len(whole) - cut])


def test_the_codecs_need_neither_torch_nor_grpc_nor_the_gateway():
    code = "import sys, camserve.codecs.oip, camserve.codecs.plain; print(*sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert not {"torch", "grpc", "scipy", "camserve.gateway", "camserve.worker"} & set(answer.stdout.split())


AGE = Prediction(0, "age", value=37.5, unit="years")
ANN = Prediction(1, "ann", similarity=0.25)


@pytest.mark.parametrize(
    ("kind", "name", "prediction", "figure"), [("value", "values", AGE, 37.5), ("embedding", "similarities", ANN, 0.25)]
)
def test_a_model_of_another_kind_has_an_output_of_another_name(kind, name, prediction, figure):
    info = replace(MODEL, outputs=kind, dimension=4)
    assert [tensor.name for tensor in metadata(info).outputs] == [name, "class_indices", "labels", "saliency"]
    answer = replace(ANSWER, predictions=(prediction,))
    given = arrays(answered(asked(infer()), answer, info))
    assert list(given) == [name, "class_indices", "labels", "saliency"]
    assert given[name] == ["FP32", [1], [figure]]
    fitted(asked(infer(outputs=("labels", name))), info)
    with pytest.raises(InvalidInput, match=f"the predictions of model fake are {name}, and there are no probabilities"):
        fitted(asked(infer(outputs=("labels", "probabilities"))), info)
    with pytest.raises(InvalidInput, match=f"are probabilities, and there are no {name}"):
        fitted(asked(infer(outputs=(name,))), MODEL)


def test_an_output_has_the_name_of_its_kind_where_no_reference_is_packed():
    (saliency, *_) = ANSWER.maps
    answer = replace(ANSWER, predictions=(), maps=(replace(saliency, target=ANN),))
    info = replace(MODEL, outputs="embedding", labels=(), dimension=4)
    assert "similarities" in arrays(answered(asked(infer()), answer, info))


DETECTED = (
    Prediction(1, "cup", 0.75, box=(1.5, 2, 30, 40)),
    Prediction(0, "boat", 0.5, box=(0, 0, 9, 9)),
)


@pytest.mark.parametrize("found", [DETECTED, DETECTED[:1], ()])
def test_a_detector_has_its_boxes_as_an_output_even_where_nothing_is_detected(found):
    info = replace(MODEL, outputs="boxes")
    outputs = {tensor.name: (tensor.datatype, list(tensor.shape)) for tensor in metadata(info).outputs}
    assert outputs["boxes"] == ("FP32", [-1, 4])
    assert list(outputs) == ["probabilities", "boxes", "class_indices", "labels", "saliency"]
    answer = replace(ANSWER, predictions=found)
    for raw in (None, oip.InferTensorContents(bytes_contents=[PHOTO])):
        given = arrays(answered(asked(infer(contents=raw)), answer, info))
        assert list(given) == list(outputs)
        assert given["boxes"] == ["FP32", [len(found), 4], [edge for one in found for edge in one.box]]
        assert given["labels"][2] == [one.label.encode() for one in found]
    assert list(arrays(answered(asked(infer(outputs=("boxes",))), answer, info))) == ["boxes"]


def test_boxes_of_a_model_that_detects_nothing_are_refused():
    with pytest.raises(InvalidInput, match="the predictions of model fake are probabilities, and there are no boxes"):
        fitted(asked(infer(outputs=("boxes",))), MODEL)
    with pytest.raises(InvalidInput, match="are probabilities and boxes, and there are no values"):
        fitted(asked(infer(outputs=("values",))), replace(MODEL, outputs="boxes"))


def test_a_text_is_bounded_before_it_is_read():
    sent = infer(explain_text=text("x" * 65)).SerializeToString()
    with pytest.raises(InvalidOption, match="a text has at most 64 characters, got 65"):
        decode(sent, RequestLimits(text_characters=64))

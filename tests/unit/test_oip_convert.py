"""The Open Inference Protocol's messages from and to ours, without a server."""

from __future__ import annotations

import json
import struct
from contextlib import suppress

import numpy as np
import pytest

from camserve.errors import CamserveError, InvalidInput, InvalidOption
from camserve.gateway.fake import MODEL
from camserve.gateway.oip_convert import OUTPUTS, Asked, asked, metadata, response
from camserve.oip import inference_pb2 as oip
from camserve.v1 import explain_pb2 as pb

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


def test_a_plain_request_is_grad_cam_of_an_encoded_file():
    found = asked(infer())
    assert found == Asked(
        request=pb.ExplainRequest(
            model="fake",
            version="1.0",
            image=pb.Image(encoded=PHOTO),
            output=pb.Output(encoding=pb.Output.FLOAT32),
        ),
        timeout_s=None,
        outputs=OUTPUTS,
        id="42",
        raw=True,
    )


def test_an_encoded_file_may_come_in_the_contents():
    found = asked(infer(contents=oip.InferTensorContents(bytes_contents=[PHOTO])))
    assert (found.request.image.encoded, found.raw) == (PHOTO, False)


@pytest.mark.parametrize("shape", [(2, 3, 3), (1, 2, 3, 3)])
@pytest.mark.parametrize("raw", [True, False])
def test_pixels_come_raw_or_as_numbers(shape: tuple[int, ...], raw: bool):
    pixels = bytes(range(100, 118))
    request = (
        infer("UINT8", shape, pixels)
        if raw
        else infer("UINT8", shape, contents=oip.InferTensorContents(uint_contents=list(pixels)))
    )
    tensor = asked(request).request.image.tensor
    assert (tensor.data_type, list(tensor.shape), tensor.data) == (pb.Tensor.UINT8, [2, 3, 3], pixels)


def test_every_parameter_reaches_the_request():
    request = infer(
        explain_method=text("group_cam:groups=8,variant=reference; score_cam  auto"),
        explain_targets=text("281, tiger cat,top3"),
        explain_layers=text("stem, features"),
        explain_fusion=text("max"),
        explain_size=text("original"),
        explain_precision=text("bfloat16"),
        explain_top_predictions=number(7),
        explain_evaluate=oip.InferParameter(bool_param=True),
        explain_evaluation_steps=text("9"),
        explain_allow_partial=text("TRUE"),
        priority=oip.InferParameter(uint64_param=1),
        timeout=number(2_500_000),
    )
    found = asked(request)
    sent = found.request
    assert [method.WhichOneof("method") for method in sent.methods] == ["group_cam", "score_cam", "auto"]
    assert (sent.methods[0].group_cam.groups, sent.methods[0].group_cam.variant) == (8, pb.GroupCam.REFERENCE)
    assert list(sent.targets) == [pb.Target(index=281), pb.Target(label="tiger cat"), pb.Target(top_k=3)]
    assert (list(sent.layers), sent.fusion) == (["stem", "features"], pb.MAX)
    assert (sent.output.size, sent.output.encoding) == (pb.Output.ORIGINAL, pb.Output.FLOAT32)
    assert (sent.precision, sent.top_predictions) == (pb.BFLOAT16, 7)
    assert (sent.evaluate, sent.evaluation_steps, sent.allow_partial) == (True, 9, True)
    assert (sent.priority, found.timeout_s) == (pb.INTERACTIVE, 2.5)


@pytest.mark.parametrize(
    ("given", "priority"),
    [
        (oip.InferParameter(uint64_param=0), pb.PRIORITY_UNSPECIFIED),
        (oip.InferParameter(uint64_param=2), pb.NORMAL),
        (number(3), pb.BATCH),
        (text("3"), pb.BATCH),
        (text("interactive"), pb.INTERACTIVE),
    ],
)
def test_a_priority_is_tritons_number_or_a_name(given: oip.InferParameter, priority: int):
    assert asked(infer(priority=given)).request.priority == priority


def test_a_timeout_of_zero_is_none():
    assert asked(infer(timeout=number(0))).timeout_s is None


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "explain_colour",
            text("red"),
            "unknown parameter 'explain_colour'; there are explain_method, explain_targets",
        ),
        ("sequence_id", number(3), "unknown parameter 'sequence_id'"),
        ("explain_method", number(3), "explain_method must be a text, got 3"),
        ("explain_method", text("grad_kam"), "unknown method 'grad_kam'"),
        ("explain_method", text("group_cam:groups=0"), "groups must be"),
        ("explain_targets", text("top0"), "top_k must be at least 1, got 0"),
        ("explain_targets", text("99999999999"), "a class index or top_k must be"),
        ("explain_fusion", text("sum"), "fusion must be one of mean, max, got 'sum'"),
        ("explain_size", text("huge"), "explain_size must be one of input, layer, original, got 'huge'"),
        ("explain_precision", text("int8"), "precision must be one of exact, bfloat16, got 'int8'"),
        ("explain_top_predictions", number(-1), "explain_top_predictions must be a whole number of at least 0, got -1"),
        ("explain_top_predictions", number(2**40), r"explain_top_predictions must be 0\.\.4294967295"),
        ("explain_top_predictions", oip.InferParameter(bool_param=True), "a whole number of at least 0, got True"),
        ("explain_evaluate", number(1), "explain_evaluate must be true or false, got 1"),
        ("explain_allow_partial", oip.InferParameter(), "explain_allow_partial must be true or false, got nothing"),
        (
            "priority",
            number(4),
            r"priority must be 0 \(default\), 1 \(interactive\), 2 \(normal\), 3 \(batch\).* got 4",
        ),
        ("priority", text("urgent"), "priority must be one of"),
        ("timeout", text("soon"), "timeout must be a whole number of at least 0, got 'soon'"),
        ("timeout", number(-5), "timeout must be a whole number of at least 0, got -5"),
    ],
)
def test_a_bad_parameter_is_refused_with_what_is_allowed(name: str, value: oip.InferParameter, message: str):
    with pytest.raises(InvalidOption, match=message):
        asked(infer(**{name: value}))


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
        (infer("BYTES", (2,)), r"must be BYTES \[1\], an encoded file, or UINT8 .* got BYTES \[2\]"),
        (infer("FP32", (4, 4, 3), b""), r"must be BYTES .* got FP32 \[4, 4, 3\]"),
        (infer(raw=b""), "raw BYTES are the image's length in 4 bytes.* got 0 bytes$"),
        (infer(raw=PHOTO), "got 14 bytes that begin with the length"),
        (infer(raw=raw_bytes(PHOTO, PHOTO)), "raw BYTES are the image's length"),
        (infer(contents=oip.InferTensorContents()), r"has one element, got 0"),
        (infer("UINT8", (2, 3), bytes(6)), r"got UINT8 \[2, 3\]"),
        (infer("UINT8", (2, 3, 4), bytes(24)), r"got UINT8 \[2, 3, 4\]"),
        (infer("UINT8", (2, 2, 3, 3), bytes(36)), r"got UINT8 \[2, 2, 3, 3\]"),
        (infer("UINT8", (-1, 3, 3), bytes(9)), r"got UINT8 \[-1, 3, 3\]"),
        (infer("UINT8", (2**40, 3, 3), bytes(9)), "got UINT8"),
        (infer("UINT8", (1, 1, 3), contents=oip.InferTensorContents(uint_contents=[1, 2, 256])), r"0\.\.255, got 256"),
        (infer(outputs=("logits",)), r"outputs are probabilities, .*, each once; got \['logits'\]"),
        (infer(outputs=("labels", "labels")), "each once"),
        (_changed(lambda r: r.outputs.add(name="labels").parameters["classification"].SetInParent()), "no parameters"),
    ],
)
def test_a_bad_tensor_is_refused_with_what_is_allowed(request_: oip.ModelInferRequest, message: str):
    with pytest.raises(InvalidInput, match=message):
        asked(request_)


def test_without_saliency_only_the_cheapest_map_is_made():
    found = asked(infer(outputs=("labels",), explain_method=text("score_cam"), explain_layers=text("stem")))
    assert not found.request.methods
    assert not found.request.layers
    assert found.request.output.size == pb.Output.LAYER


def saliency(value: float, shape: tuple[int, int] = (2, 3), **fields) -> pb.SaliencyMap:
    return pb.SaliencyMap(
        method=pb.MethodSpec(group_cam=pb.GroupCam(groups=8)),
        target=pb.Prediction(index=7, label="boat", probability=0.5),
        layers=["features"],
        shape=shape,
        encoding=pb.Output.FLOAT32,
        data=np.full(shape, value, "<f4").tobytes(),
        **fields,
    )


REPLY = pb.ExplainReply(
    model="fake",
    version="1.0",
    predictions=[pb.Prediction(index=7, label="boat", probability=0.5), pb.Prediction(index=2, label="cup ☕")],
    maps=[saliency(0.25, complete=True, fraction=1), saliency(1.0, fraction=0.5, choice="in time")],
    cost=pb.Cost(queries=9, steps=2, worker="w", stage_seconds={"queue": 0.5}),
)


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
    message = response(REPLY, what, "abc")
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
    cost = json.loads(message.parameters["cost"].string_param)
    assert (cost["queries"], cost["steps"], cost["precision"], cost["stage_seconds"]) == (9, 2, "exact", {"queue": 0.5})


def test_a_response_says_of_each_map_what_it_is():
    first, second = json.loads(response(REPLY, asked(infer()), "").parameters["maps"].string_param)
    assert (first["method"], first["parameters"]["groups"], first["target"]["label"]) == ("group_cam", 8, "boat")
    assert (first["complete"], second["complete"], second["fraction"]) == (True, False, 0.5)
    assert ("choice" in first, second["choice"]) == (False, "in time")


def test_only_the_outputs_that_were_asked_come_in_their_order():
    message = response(REPLY, asked(infer(outputs=("labels", "probabilities"))), "")
    assert [output.name for output in message.outputs] == ["labels", "probabilities"]
    assert len(message.raw_output_contents) == 2
    assert "maps" not in message.parameters


def test_maps_of_several_sizes_do_not_fit_one_tensor():
    reply = pb.ExplainReply(maps=[saliency(0.5), saliency(0.5, (4, 6))])
    with pytest.raises(InvalidOption, match=r"\(2, 3\), \(4, 6\).*explain_size=input"):
        response(reply, asked(infer()), "")


def test_the_metadata_are_those_of_what_is_answered():
    found = metadata(MODEL)
    assert (found.name, list(found.versions)) == ("fake", ["1.0"])
    assert [(tensor.name, tensor.datatype, list(tensor.shape)) for tensor in found.inputs] == [("image", "BYTES", [1])]
    answered = arrays(response(REPLY, asked(infer()), ""))
    for tensor in found.outputs:
        datatype, shape, _ = answered[tensor.name]
        assert (tensor.datatype, len(tensor.shape)) == (datatype, len(shape))


@pytest.mark.parametrize("cut", range(0, 60, 7))
def test_a_cut_message_is_typed_or_fine(cut: int):
    whole = infer(explain_method=text("score_cam"), priority=number(2)).SerializeToString()
    request = oip.ModelInferRequest()
    try:
        request.MergeFromString(whole[: len(whole) - cut])
    except Exception:  # protobuf's own, which the server turns down before us
        return
    with suppress(CamserveError):
        asked(request)

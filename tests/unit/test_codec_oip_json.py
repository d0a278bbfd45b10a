"""The Open Inference Protocol's JSON and binary tensors from and to our types, without a server."""

from __future__ import annotations

import base64
import json
import struct
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from test_codec_oip import ANSWER, MODEL, PHOTO, fields, infer, raw_bytes, text

from camserve.codecs import oip, oip_json
from camserve.codecs.json_text import MOST_VALUES
from camserve.errors import CamserveError, InvalidImage, InvalidInput, InvalidOption
from camserve.types import ModelInfo, Prediction
from camserve.types.request import RequestLimits

BASE64 = base64.b64encode(PHOTO).decode()
FILE = raw_bytes(PHOTO)
FLOATS = np.zeros((*MODEL.input_size, 3), np.float32)
OMITTED = object()


def tensor(**changed: Any) -> dict[str, Any]:
    """An input as the JSON of a request has it; without `data` its elements follow in binary."""
    made = {"name": "image", "datatype": "BYTES", "shape": [1], **changed}
    return {name: value for name, value in made.items() if value is not OMITTED}


def binary(size: int = len(FILE), **changed: Any) -> dict[str, Any]:
    return tensor(parameters={"binary_data_size": size}, **changed)


def asked(
    inputs: Any, following: bytes | None = None, limits: RequestLimits | None = None, **members: Any
) -> oip_json.JsonInference:
    header = json.dumps({"inputs": inputs, **members}).encode()
    length = None if following is None else str(len(header))
    body = header + (following or b"")
    return oip_json.decode(body, length, "fake", "", *([] if limits is None else [limits]))


def test_a_file_in_binary_is_what_grpc_reads():
    found = asked([binary()], FILE, id="42").inference
    by_grpc = oip.decode(infer().SerializeToString())
    assert found.request.image == by_grpc.request.image == PHOTO
    theirs = fields(by_grpc.request) | {"version": "", "output": replace(by_grpc.request.output, decimal=True)}
    assert fields(found.request) == theirs
    assert (found.timeout_s, found.outputs, found.id) == (None, (), "42")


@pytest.mark.parametrize("data", [[BASE64], [[BASE64]], [BASE64.rstrip("=").replace("+", "-").replace("/", "_")]])
def test_a_file_may_be_base64(data: list[Any]):
    shape = [1, 1] if isinstance(data[0], list) else [1]
    assert (
        asked([tensor(shape=shape, data=data, parameters={"content_type": "base64"})]).inference.request.image == PHOTO
    )


PIXELS = np.arange(100, 118, dtype=np.uint8).reshape(2, 3, 3)
UNIT = (PIXELS / np.float32(255)).astype("<f4")


@pytest.mark.parametrize("array", [PIXELS, UNIT, PIXELS[..., 0], PIXELS[None], UNIT[None]])
@pytest.mark.parametrize("form", ["flat", "nested", "binary"])
def test_pixels_come_flat_nested_or_in_binary(array: np.ndarray, form: str):
    described = {"datatype": "UINT8" if array.dtype == np.uint8 else "FP32", "shape": list(array.shape)}
    if form == "binary":
        found = asked([binary(array.nbytes, **described)], array.tobytes())
    else:
        found = asked([tensor(**described, data=(array.ravel() if form == "flat" else array).tolist())])
    image = found.inference.request.image
    assert isinstance(image, np.ndarray)
    assert image.dtype == array.dtype
    np.testing.assert_array_equal(image, array[0] if array.ndim == 4 else array)


def test_parameters_are_those_of_grpc():
    given = {"explain_method": "group_cam:groups=8; auto", "explain_targets": "281,top2", "explain_boxes": 0.25}
    given |= {"explain_evaluate": True, "explain_top_predictions": 3, "priority": 1, "timeout": 2_500_000}
    by_grpc = {name: text(str(value)) for name, value in given.items()}
    found = asked([binary()], FILE, parameters=given | {"binary_data_output": True}).inference
    theirs = oip.decode(infer(**by_grpc).SerializeToString())
    assert fields(found.request) == fields(replace(theirs.request, version=""))
    assert found.timeout_s == theirs.timeout_s == 2.5


def wrong(message: str, inputs: Any = OMITTED, following: bytes | None = FILE, **members: Any) -> Any:
    return pytest.param([binary()] if inputs is OMITTED else inputs, following, members, message, id=message[:60])


NESTED = tensor(datatype="UINT8", shape=[2, 1], data=[[1], [2, 3]])


@pytest.mark.parametrize(
    ("inputs", "following", "members", "message"),
    [
        wrong("a request has id, model_name, .*, got 'input'", input=[]),
        wrong("inputs are a list of objects, got 'image'", "image"),
        wrong("inputs are a list of objects, got ..image", ["image"]),
        wrong(r"there must be one input, 'image', got \[\]", []),
        wrong(r"got \['image', 'mask'\]", [binary(), tensor(name="mask")]),
        wrong("an input has name, datatype, shape, parameters, data, got 'dtype'", [tensor(dtype="BYTES")]),
        wrong("name must be a text, got 3", [tensor(name=3)]),
        wrong("datatype must be a text, got None|must be BYTES", [tensor(datatype=None)]),
        wrong("shape of an input is a list of whole numbers, got 1", [tensor(shape=1)]),
        wrong("shape of an input is a list of whole numbers, got .True", [tensor(shape=[True])]),
        wrong("shape of an input is a list of whole numbers, got None", [tensor(shape=OMITTED)]),
        wrong(r"must be BYTES .* got FP16 \[2, 3, 3\]", [binary(36, datatype="FP16", shape=[2, 3, 3])], bytes(36)),
        wrong(r"must be BYTES .* got FP64 \[2, 3, 3\]", [binary(144, datatype="FP64", shape=[2, 3, 3])], bytes(144)),
        wrong(r"must be BYTES .* got BF16 \[2, 3, 3\]", [binary(36, datatype="BF16", shape=[2, 3, 3])], bytes(36)),
        wrong(r"must be BYTES .* got INT8 \[2, 3, 3\]", [binary(18, datatype="INT8", shape=[2, 3, 3])], bytes(18)),
        wrong(r"got UINT8 \[-1, 3, 3\]", [binary(0, datatype="UINT8", shape=[-1, 3, 3])], b""),
        wrong(r"shape \[2, 3, 3\] has 18 bytes, got 17", [binary(17, datatype="UINT8", shape=[2, 3, 3])], bytes(17)),
        wrong(r"shape \[1000.*00, 1, 3\] has 3000", [binary(3, datatype="UINT8", shape=[10**30, 1, 3])], bytes(3)),
        wrong("binary_data_size is 17, and 18 bytes follow", [binary(len(FILE) - 1)]),
        wrong("binary_data_size is 19, and 18 bytes follow", [binary(len(FILE) + 1)]),
        wrong("binary_data_size must be a number of bytes, got -1", [binary(-1)]),
        wrong("binary_data_size must be a number of bytes, got True", [binary(True)]),
        wrong("binary_data_size must be a number of bytes, got '18'", [binary("18")]),  # type: ignore[arg-type]  # as sent
        wrong("an input has either data or binary_data_size", [binary(data=[BASE64])]),
        wrong("18 bytes follow the JSON, and no input has a binary_data_size", [tensor(data=[BASE64])]),
        wrong("the header inference-header-content-length says", [binary()], None),
        wrong("an input has data, which are a list, or binary_data_size, got None", [tensor()], None),
        wrong("an input has data, which are a list, or binary_data_size, got 'text'", [tensor(data="text")], None),
        wrong("raw BYTES are the image's length in 4 bytes", [binary(3)], b"abc"),
        wrong("got 8 bytes that begin with the length 99", [binary(8)], struct.pack("<I", 99) + b"abcd"),
        wrong("raw BYTES are the image's length", [binary(2 * len(FILE))], FILE * 2),
        wrong("got no such parameter", [tensor(data=["text"])], None),
        wrong("got 'np'", [tensor(data=["text"], parameters={"content_type": "np"})], None),
        wrong("the input is no base64", [tensor(data=["!"], parameters={"content_type": "base64"})], None),
        wrong("has one text, got .'a', 'b'.", [tensor(data=["a", "b"])], None),
        wrong("has one text, got .1.", [tensor(data=[1])], None),
        wrong("has no parameters, got .*content_type", [tensor(datatype="UINT8", parameters={"content_type": "np"})]),
        wrong("has no parameters, got .*shared_memory_region", [tensor(parameters={"shared_memory_region": "a"})]),
        wrong("the parameters of .* are an object, got .1.", [tensor(parameters=[1])]),
        wrong("data are flat, or nested by shape .2, 1., got .2, 3.", [NESTED], None),
        wrong("data are flat, or nested", [NESTED | {"data": [[1], 2]}], None),
        wrong("an image's elements are whole numbers, got .1.", [NESTED | {"data": [[[1]], [[2]]]}], None),
        wrong(r"shape \[2, 1\] has 2 bytes, got 3", [NESTED | {"data": [1, 2, 3]}], None),
        wrong(r"shape \[2, 1\] has 2 bytes, got 0", [NESTED | {"data": []}], None),
        wrong("UINT8 elements must be 0..255, got 256", [NESTED | {"data": [256, 0]}], None),
        wrong("UINT8 elements must be 0..255, got -1", [NESTED | {"data": [-1, 0]}], None),
        wrong("whole numbers, got 0.5", [NESTED | {"data": [0.5, 1]}], None),
        wrong("whole numbers, got True", [NESTED | {"data": [True, 1]}], None),
        wrong("whole numbers, got '1'", [NESTED | {"data": ["1", "2"]}], None),
        wrong("whole numbers, got None", [NESTED | {"data": [None, 1]}], None),
        wrong("one is far larger", [NESTED | {"data": [10**30, 1]}], None),
        wrong("one is far larger", [NESTED | {"datatype": "FP32", "data": [10**400, 1]}], None),
        wrong("NaN is no number of JSON", [NESTED | {"datatype": "FP32", "data": [float("nan"), 1]}], None),
        wrong("Infinity is no number of JSON", [NESTED | {"datatype": "FP32", "data": [float("inf"), 1]}], None),
        wrong("outputs are probabilities, .*; got .'logits'.", outputs=[{"name": "logits"}]),
        wrong("each once; got .'labels', 'labels'.", outputs=[{"name": "labels"}] * 2),
        wrong("outputs are a list of objects, got .'labels'.", outputs=["labels"]),
        wrong("an output has name, parameters, got 'shape'", outputs=[{"name": "labels", "shape": [1]}]),
        wrong(
            "no parameters, got .'classification'.", outputs=[{"name": "labels", "parameters": {"classification": 3}}]
        ),
        wrong("binary_data must be true", outputs=[{"name": "labels", "parameters": {"binary_data": 1}}]),
        wrong("binary_data_output must be true or false, got 'yes'", parameters={"binary_data_output": "yes"}),
        wrong("unknown parameter 'sequence_id'", parameters={"sequence_id": 5}),
        wrong("explain_layers must be a text, got {}", parameters={"explain_layers": {}}),
        wrong("timeout must be at least 0, got -5", parameters={"timeout": -5}),
        wrong("id must be a text, got 7", id=7),
        wrong("model_name is 'fake' by the path, and 'other' in the body", model_name="other"),
        wrong("model_version is '' by the path, and '2' in the body", model_version="2"),
    ],
)
def test_bad_requests_are_refused_in_words(inputs: Any, following: bytes | None, members: Any, message: str):
    with pytest.raises(InvalidInput, match=message):
        asked(inputs, following, **members)


@pytest.mark.parametrize("length", ["-1", "1e3", "", " 5", "٣", "9" * 40, "100000"])
def test_a_length_of_the_json_that_cannot_be_is_refused(length: str):
    body = json.dumps({"inputs": [binary()]}).encode() + FILE
    with pytest.raises(InvalidInput, match=rf"inference-header-content-length is 0..{len(body)}, .* got '"):
        oip_json.decode(body, length, "fake", "")


@pytest.mark.parametrize("off", [-1, 1])
def test_a_length_that_cuts_elsewhere_is_no_json(off: int):
    header = json.dumps({"inputs": [binary()]}).encode()
    with pytest.raises(InvalidInput, match=r"no JSON|no UTF-8"):
        oip_json.decode(header + FILE, str(len(header) + off), "fake", "")


def test_every_prefix_of_a_request_is_refused_in_words():
    header = json.dumps({"inputs": [binary()], "outputs": [{"name": "labels"}]}).encode()
    whole = header + FILE
    for end in range(len(whole)):
        with pytest.raises(CamserveError):
            oip_json.decode(whole[:end], str(len(header)), "fake", "")


def test_nothing_is_read_that_is_larger_than_allowed():
    small = RequestLimits(image_bytes=16, option_bytes=1000, name_characters=20)
    photo = tensor(data=[base64.b64encode(bytes(17)).decode()], parameters={"content_type": "base64"})
    pixels = tensor(datatype="UINT8", shape=[1, 17], data=[0] * 17)
    for inputs, following in (([photo], None), ([pixels], None), ([binary(21)], raw_bytes(bytes(17)))):
        with pytest.raises(InvalidImage, match="an image may have at most 16 bytes, got 17"):
            asked(inputs, following, limits=small)
    with pytest.raises(InvalidOption, match="at most 1000 bytes beside its image"):
        asked([binary(20)], raw_bytes(bytes(16)), limits=small, parameters={"explain_text": "a" * 1000})
    with pytest.raises(InvalidOption, match="a name has at most 20 characters"):
        asked([binary(20)], raw_bytes(bytes(16)), limits=small, id="a" * 21)
    long = tensor(data=["!" * 5000], parameters={"content_type": "base64"})  # no base64, which nobody finds out
    with pytest.raises(InvalidImage, match="at most 16 bytes"):
        asked([long], limits=small)  # an image is no option, however it comes


def test_more_values_than_can_be_parsed_at_once_are_refused_before_they_are():
    many = b'{"inputs": [' + b"{}," * MOST_VALUES + b"!"  # parsed it would be no JSON
    with pytest.raises(InvalidInput, match=f"at most {MOST_VALUES} values"):
        oip_json.decode(many, None, "fake", "")


def read(body: bytes, json_bytes: int | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """A response as a client reads it that knows nothing of camserve: the JSON, and the outputs by name."""
    head, place = json.loads(body[:json_bytes]), json_bytes or 0
    outputs = {}
    for output in head["outputs"]:
        size = output.get("parameters", {}).get("binary_data_size")
        if size is None:
            outputs[output["name"]] = output["data"]
        elif output["datatype"] == "BYTES":
            found, end = [], place + size
            while place < end:
                (length,) = struct.unpack_from("<I", body, place)
                found.append(body[place + 4 : place + 4 + length].decode())
                place += 4 + length
            outputs[output["name"]] = found
        else:
            dtype = {"FP32": "<f4", "INT64": "<i8"}[output["datatype"]]
            outputs[output["name"]] = np.frombuffer(body[place : place + size], dtype).tolist()
            place += size
        assert np.prod(output["shape"]) == len(outputs[output["name"]])
    assert json_bytes is None or place == len(body)
    return head, outputs


def fitted(given: oip_json.JsonInference, model: ModelInfo = MODEL) -> oip_json.JsonInference:
    return replace(given, inference=oip.fitted(given.inference, model))


@pytest.mark.parametrize("boxes", [[(1.5, 2.0, 30.0, 40.0), (0.0, 0.0, 9.0, 9.0)], []])
@pytest.mark.parametrize("binary_output", [True, False])
def test_boxes_of_detections_are_rows_of_four_edges(boxes, binary_output):
    answer = replace(ANSWER, predictions=tuple(Prediction(1, "cup", 0.5, box=box) for box in boxes))
    wanted = asked([binary()], FILE, parameters={"binary_data_output": binary_output})
    head, outputs = read(*oip_json.encode(answer, fitted(wanted, replace(MODEL, outputs="boxes"))))
    (shape,) = (one["shape"] for one in head["outputs"] if one["name"] == "boxes")
    assert shape == [len(boxes), 4]
    assert outputs["boxes"] == [edge for box in boxes for edge in box]


@pytest.mark.parametrize("binary_output", [True, False])
def test_a_response_has_all_outputs_in_the_form_that_was_asked_for(binary_output: bool):
    wanted = asked([binary()], FILE, id="7", parameters={"binary_data_output": binary_output})
    body, json_bytes = oip_json.encode(ANSWER, fitted(wanted))
    assert (json_bytes is None) is not binary_output
    head, outputs = read(body, json_bytes)
    by_grpc = oip.encode(ANSWER, oip.fitted(oip.decode(infer().SerializeToString()), MODEL))
    theirs = oip.pb.ModelInferResponse.FromString(by_grpc)
    assert (head["model_name"], head["model_version"], head["id"]) == (theirs.model_name, theirs.model_version, "7")
    assert [(one["name"], one["datatype"], one["shape"]) for one in head["outputs"]] == [
        (one.name, one.datatype, list(one.shape)) for one in theirs.outputs
    ]
    for output, raw in zip(theirs.outputs, theirs.raw_output_contents, strict=True):
        if output.datatype == "BYTES":
            assert raw_bytes(*(label.encode() for label in outputs[output.name])) == raw
        else:
            dtype = {"FP32": "<f4", "INT64": "<i8"}[output.datatype]
            assert np.array(outputs[output.name], dtype).tobytes() == raw, "nine digits tell every float32 apart"
    assert head["parameters"] == {
        name: getattr(value, value.WhichOneof("parameter_choice")) for name, value in theirs.parameters.items()
    }


def test_each_output_may_be_in_another_form():
    named = [{"name": "labels", "parameters": {"binary_data": True}}, {"name": "saliency"}]
    body, json_bytes = oip_json.encode(ANSWER, fitted(asked([binary()], FILE, outputs=named)))
    head, outputs = read(body, json_bytes)
    assert ["data" in output for output in head["outputs"]] == [False, True]
    assert "id" not in head
    assert len(outputs["saliency"]) == np.prod(head["outputs"][1]["shape"])


def test_numbers_are_written_so_that_each_float32_comes_back():
    values = np.random.default_rng(0).integers(0, 0x7F7FFFFF, 30_000, dtype=np.uint32).view("<f4").reshape(1, 100, 300)
    (saliency, *_) = ANSWER.maps
    large = replace(ANSWER, maps=(replace(saliency, array=values),))
    body, json_bytes = oip_json.encode(large, fitted(asked([binary()], FILE, outputs=[{"name": "saliency"}])))
    assert json_bytes is None
    _, outputs = read(body, None)
    assert np.array(outputs["saliency"], "<f4").tobytes() == values.tobytes()


def test_maps_in_json_count_with_the_bytes_that_they_take_there():
    limits = RequestLimits(message_bytes=10_000)
    request = asked([binary()], FILE).inference.request
    with pytest.raises(InvalidOption, match=r"as numbers in JSON have 24576: ask for binary data"):
        replace(request, image=FLOATS).fit(MODEL, limits)
    in_binary = asked([binary()], FILE, parameters={"binary_data_output": True}).inference.request
    replace(in_binary, image=FLOATS).fit(MODEL, limits)
    without = asked([binary()], FILE, outputs=[{"name": "labels"}]).inference.request
    replace(without, image=FLOATS).fit(MODEL, limits)


def test_the_metadata_are_those_of_grpc():
    found, theirs = oip_json.metadata(MODEL), oip.metadata(MODEL)
    assert found["inputs"] == [{"name": "image", "datatype": "BYTES", "shape": [1]}]
    assert [one["name"] for one in found["outputs"]] == [one.name for one in theirs.outputs]
    assert (found["name"], found["versions"], found["platform"]) == ("fake", ["1.0"], theirs.platform)

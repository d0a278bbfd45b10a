"""Pixels are cut out of a message before protobuf parses it, and what is left is bounded."""

from __future__ import annotations

import numpy as np
import pytest
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from camserve.codecs import oip, plain, v1
from camserve.codecs.bulk import parse, within
from camserve.errors import InvalidImage, InvalidInput, InvalidOption
from camserve.oip import inference_pb2
from camserve.types.request import RequestLimits
from camserve.v1 import explain_pb2 as pb

LIMITS = RequestLimits(methods=16, layers=8, targets=100, name_characters=256, option_bytes=2**18)
FIELDS = {3: {1: "encoded", 2: {3: "data"}}}
MANY = 2**20


def field(number: int, content: bytes) -> bytes:
    """A field with a length, written without protobuf."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def varint(value: int) -> bytes:
    more, last = [], value
    while last > 127:
        more.append(last & 127 | 128)
        last >>= 7
    return bytes((*more, last))


def request(**fields) -> pb.ExplainRequest:
    return pb.ExplainRequest(**fields)


@pytest.mark.parametrize(
    "message",
    [
        request(),
        request(image=pb.Image(encoded=b"")),
        request(model="m" * 300, image=pb.Image(encoded=bytes(1000)), targets=[pb.Target(index=300)], evaluate=True),
        request(image=pb.Image(tensor=pb.Tensor(data_type=1, shape=[1000, 2, 3], data=bytes(6000))), layers=["a"]),
        request(methods=[pb.MethodSpec(rise=pb.Rise(masks=70_000, keep_prob=0.25))], output=pb.Output(opacity=0.5)),
    ],
    ids=lambda message: str(message.ByteSize()),
)
def test_what_is_left_and_what_was_cut_are_the_message(message: pb.ExplainRequest):
    cut = parse(pb.ExplainRequest, message.SerializeToString(), FIELDS, LIMITS)
    assert bytes(cut.last("encoded")) == message.image.encoded
    assert bytes(cut.last("data")) == message.image.tensor.data
    emptied = pb.ExplainRequest()
    emptied.CopyFrom(message)
    if message.image.encoded:
        emptied.image.encoded = b""
    if message.image.tensor.data:
        emptied.image.tensor.data = b""
    assert cut.message.image.WhichOneof("content") == message.image.WhichOneof("content")
    assert (cut.message.image.encoded, cut.message.image.tensor.data) == (b"", b"")
    assert cut.message == emptied


@given(st.binary(max_size=40))
def test_bytes_are_a_message_exactly_where_protobuf_says_so(data: bytes):
    try:
        expected: Message | None = pb.ExplainRequest.FromString(data)
    except Exception:
        expected = None
    try:
        found = parse(pb.ExplainRequest, data, {}, LIMITS).message
    except InvalidInput:
        found = None
    assert (found is None) == (expected is None)
    assert found is None or found == expected


def test_the_rest_may_be_as_large_as_allowed_and_no_larger():
    image = field(3, field(1, bytes(5 * MANY)))
    fits = image + field(1, bytes(2**18 - 600))
    assert parse(pb.ExplainRequest, fits, FIELDS, LIMITS).message.ByteSize() > 2**18 - 600
    with pytest.raises(InvalidOption, match="a request has at most 262144 bytes beside its image; this one has more"):
        parse(pb.ExplainRequest, image + field(1, bytes(2**18)), FIELDS, LIMITS)


HOSTILE = {
    "empty methods": field(4, b"") * MANY,
    "targets": field(5, b"\x08\x01") * MANY,
    "layers": field(6, b"a") * MANY,
    "unknown fields": b"\xa0\x06\x01" * MANY,
    "unknown fields inside": field(3, b"\xa0\x06\x01" * MANY),
    "groups": b"\xa3\x06" * MANY,
    "images": field(3, b"") * MANY,
    "images inside": field(3, field(1, b"") * MANY),
    "a shape": field(3, field(2, field(2, b"\x01" * MANY))),
    "one number again and again": b"\x40\x01" * MANY,
    "a model's name": field(1, b"m" * MANY),
}


def test_nothing_is_looked_at_behind_what_is_too_much():
    """What follows is no message, which the walk would find out if it went on."""
    message = field(6, b"") * 2**18 + b"\xff" * 100
    with pytest.raises(InvalidOption, match="at most 262144 bytes beside its image"):
        parse(pb.ExplainRequest, message, FIELDS, LIMITS)


@pytest.mark.parametrize("name", HOSTILE)
def test_protobuf_never_parses_a_message_of_many_fields(name: str, monkeypatch: pytest.MonkeyPatch):
    parsed: list[int] = []
    kind = type("Spy", (), {"DESCRIPTOR": pb.ExplainRequest.DESCRIPTOR, "FromString": lambda data: parsed.append(0)})
    with pytest.raises(InvalidOption, match="a request has at most 262144 bytes beside its image"):
        parse(kind, HOSTILE[name], FIELDS, LIMITS)
    with pytest.raises(InvalidOption, match="bytes beside its image"):
        v1.request_from_bytes(HOSTILE[name], LIMITS)
    assert not parsed


def no_element_is_read(*arguments: object) -> None:
    raise AssertionError("an element was read")


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"methods": [pb.MethodSpec()] * 17}, "at most 16 methods, got 17"),
        ({"targets": [pb.Target(label="x")] * 101}, "at most 100 targets, got 101"),
        ({"layers": ["x"] * 9}, "at most 8 layers, got 9"),
        ({"layers": ["x" * 257]}, "a name has at most 256 characters, got 257: 'xxx"),
        ({"targets": [pb.Target(label="x" * 10_000)]}, "at most 256 characters, got 10000"),
        ({"model": "x" * 257}, "at most 256 characters, got 257"),
        ({"version": "é" * 257}, "at most 256 characters, got 257"),
        ({"output": pb.Output(colormap="x" * 257)}, "at most 256 characters, got 257"),
    ],
)
def test_typed_messages_are_counted_before_an_element_is_read(fields, text: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(v1, "method_from_proto", no_element_is_read)
    monkeypatch.setattr(v1, "target_from_proto", no_element_is_read)
    with pytest.raises(InvalidOption, match=text) as caught:
        v1.request_from_bytes(request(image=pb.Image(encoded=b"x"), **fields).SerializeToString(), LIMITS)
    assert len(str(caught.value)) < 200


TEXTS = [
    ("methods", "cam " * 17, "at most 16 methods, got 17"),
    ("targets", "1," * 101, "at most 100 targets, got 101"),
    ("targets", "1,2," + "x" * 257, "at most 256 characters, got 257"),
    ("layers", "a," * 9, "at most 8 layers, got 9"),
    ("layers", "a" * 257, "at most 256 characters, got 257"),
    ("methods", "x" * 257, "at most 256 characters, got 257"),
]


@pytest.mark.parametrize(("field_", "value", "text"), TEXTS)
def test_texts_are_counted_before_one_is_read(field_: str, value: str, text: str):
    message = inference_pb2.ModelInferRequest()
    message.inputs.add(name="image", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"x")
    name = {"methods": "explain_method", "targets": "explain_targets", "layers": "explain_layers"}[field_]
    message.parameters[name].string_param = value
    with pytest.raises(InvalidOption, match=text):
        oip.decode(message.SerializeToString(), LIMITS)
    with pytest.raises(InvalidOption, match=text):
        plain.decode({"data": b"x", field_: value.encode()}, LIMITS)


def test_options_of_the_plain_api_are_bounded_in_bytes():
    with pytest.raises(InvalidOption, match="at most 262144 bytes beside its image"):
        plain.decode({"data": bytes(2**19), "options": b"[" * 2**18 + b"x"}, LIMITS)


def infer(datatype: str, shape: tuple[int, ...], **contents) -> bytes:
    message = inference_pb2.ModelInferRequest()
    made = inference_pb2.InferTensorContents(**contents)
    message.inputs.add(name="image", datatype=datatype, shape=shape, contents=made)
    return message.SerializeToString()


@given(st.lists(st.integers(0, 2**32 - 1), min_size=3, max_size=3))
def test_numbers_of_a_tensor_are_read_as_protobuf_writes_them(values: list[int]):
    data = infer("UINT8", (1, 1, 3), uint_contents=values)
    if max(values) > 255:
        with pytest.raises(InvalidImage, match=rf"0\.\.255, got {next(each for each in values if each > 255)}$"):
            oip.decode(data, LIMITS)
    else:
        found = oip.decode(data, LIMITS).request.image
        assert isinstance(found, np.ndarray)
        assert found.ravel().tolist() == values


def test_a_large_tensor_in_the_contents_is_no_option():
    pixels = np.random.default_rng(0).integers(0, 256, (600, 500, 3), dtype=np.uint8)
    found = oip.decode(infer("UINT8", pixels.shape, uint_contents=pixels.ravel().tolist()), LIMITS).request.image
    np.testing.assert_array_equal(found, pixels)
    floats = (pixels / 255).astype(np.float32)
    found = oip.decode(infer("FP32", floats.shape, fp32_contents=floats.ravel().tolist()), LIMITS).request.image
    np.testing.assert_array_equal(found, floats)


def test_numbers_that_are_not_packed_are_read_too():
    """An old encoding that every reader of protobuf has to know; no client of today writes it."""
    contents = b"".join(varint(4 << 3) + varint(value) for value in (1, 200, 3))
    tensor = field(1, b"image") + field(2, b"UINT8") + field(3, b"\x01\x01\x03") + field(5, contents)
    found = oip.decode(field(5, tensor), LIMITS).request.image
    assert isinstance(found, np.ndarray)
    assert found.ravel().tolist() == [1, 200, 3]


@given(st.integers(1, 2**20), st.lists(st.binary(max_size=200), max_size=3))
def test_a_field_in_pieces_is_the_field_of_them_joined(number: int, pieces: list[bytes]):
    assert b"".join(within(number, *pieces)) == field(number, b"".join(pieces))


def test_a_field_of_many_bytes_holds_them_uncopied():
    content = bytes(2**21)
    pieces = within(1, content)
    assert pieces[-1] is content
    assert pb.Image.FromString(b"".join(pieces)).encoded == content

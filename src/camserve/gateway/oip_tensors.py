"""Tensors of the Open Inference Protocol: the image that comes in, and the arrays that go out."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

from camserve.errors import InvalidImage, InvalidInput
from camserve.oip import inference_pb2 as oip
from camserve.v1 import explain_pb2 as pb

IMAGE = "image"
_ALLOWED = "BYTES [1], an encoded file, or UINT8 [height, width, 3]"


def image_of(request: oip.ModelInferRequest) -> pb.Image:
    """The image of a request, from its contents or its raw contents.

    Raises:
        InvalidInput: other inputs than one image, or data in both places.
        InvalidImage: another type or shape, or the data does not fit them.
    """
    names = [tensor.name for tensor in request.inputs]
    if names != [IMAGE]:
        raise InvalidInput(f"there must be one input, {IMAGE!r}, got {names}")
    tensor, raw = request.inputs[0], request.raw_input_contents
    if tensor.parameters:
        raise InvalidInput(f"the input {IMAGE!r} has no parameters, got {sorted(tensor.parameters)}")
    if raw and (len(raw) != 1 or tensor.contents.ByteSize()):
        raise InvalidInput(f"data is in `contents` or in one entry of `raw_input_contents`, got {len(raw)} entries")
    shape = list(tensor.shape)
    if tensor.datatype == "BYTES" and shape in ([1], [1, 1]):
        return pb.Image(encoded=_one_element(raw[0]) if raw else _one_of(tensor.contents.bytes_contents))
    if tensor.datatype == "UINT8":
        return pb.Image(tensor=_pixels(shape, raw[0] if raw else _from_numbers(tensor.contents.uint_contents)))
    raise InvalidImage(f"the input {IMAGE!r} must be {_ALLOWED}, got {tensor.datatype} {shape}")


def add_output(
    response: oip.ModelInferResponse, raw: bool, name: str, shape: Sequence[int], values: np.ndarray | Sequence[bytes]
) -> None:
    """Appends an output of float32, int64 or bytes elements."""
    output = response.outputs.add(name=name, shape=shape)
    if not isinstance(values, np.ndarray):
        output.datatype = "BYTES"
        packed = b"".join(struct.pack("<I", len(value)) + value for value in values) if raw else b""
        contents = oip.InferTensorContents(bytes_contents=values)
    elif values.dtype == np.float32:
        output.datatype, packed = "FP32", values.astype("<f4", copy=False).tobytes()
        contents = oip.InferTensorContents() if raw else oip.InferTensorContents(fp32_contents=values.ravel().tolist())
    else:
        output.datatype, packed = "INT64", values.astype("<i8").tobytes()
        contents = oip.InferTensorContents(int64_contents=values.ravel().tolist())
    if raw:
        response.raw_output_contents.append(packed)
    else:
        output.contents.CopyFrom(contents)


def _one_element(raw: bytes) -> bytes:
    """The only element of a raw BYTES tensor, which has its length before it."""
    length = struct.unpack("<I", raw[:4])[0] if len(raw) >= 4 else -1
    if length != len(raw) - 4:
        raise InvalidImage(
            f"raw BYTES are the image's length in 4 bytes, little-endian, then the image; got {len(raw)} bytes"
            + (f" that begin with the length {length}" if length >= 0 else "")
        )
    return raw[4:]


def _one_of(elements: Sequence[bytes]) -> bytes:
    if len(elements) != 1:
        raise InvalidImage(f"a BYTES tensor of shape [1] has one element, got {len(elements)}")
    return elements[0]


def _from_numbers(numbers: Sequence[int]) -> bytes:
    values = np.fromiter(numbers, np.uint32, len(numbers))
    if values.size and values.max() > 255:
        raise InvalidImage(f"UINT8 elements must be 0..255, got {values.max()}")
    return values.astype(np.uint8).tobytes()


def _pixels(shape: Sequence[int], data: bytes) -> pb.Tensor:
    height, width, channels = shape[-3:] if len(shape) == 3 or (len(shape) == 4 and shape[0] == 1) else (0, 0, 0)
    if channels != 3 or not 0 < min(height, width) <= max(height, width) < 2**31:
        raise InvalidImage(f"the input {IMAGE!r} must be {_ALLOWED}, got UINT8 {list(shape)}")
    return pb.Tensor(data_type=pb.Tensor.UINT8, shape=[height, width, 3], data=data)

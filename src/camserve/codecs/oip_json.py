"""Speaks the Open Inference Protocol over HTTP: JSON, and behind it the binary elements of tensors.

What a request asks, and what a response says, are `oip`'s; only the form differs. The form: KServe's "Open Inference
Protocol (V2)", the inference section of its REST part, and Triton's extension "binary tensor data". An encoded file is
no text, so that JSON alone cannot hold it: as MLServer has it, the parameter `content_type` of "base64" says that a
text of BYTES is base64.
"""

from __future__ import annotations

import base64
import binascii
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from camserve.codecs import oip
from camserve.codecs.json_text import read_object, url_safe
from camserve.errors import InvalidImage, InvalidInput, InvalidOption
from camserve.types import Explanation, ModelInfo
from camserve.types.request import UNBOUNDED, RequestLimits
from camserve.wording import shown

HEADER_LENGTH = "inference-header-content-length"
"""Header with the number of bytes of the JSON, where binary elements follow it."""

BINARY = "binary_tensor_data"
"""Name of the extension by which elements are binary."""

_SIZE, _WANTED, _ALL_WANTED, _CONTENT = "binary_data_size", "binary_data", "binary_data_output", "content_type"
_NUMBERS_AT_ONCE = 4096
"""Numbers that are written in one go, which takes a millisecond, while nothing else runs."""

_REQUEST = ("id", "model_name", "model_version", "parameters", "inputs", "outputs")
_INPUT = ("name", "datatype", "shape", "parameters", "data")
_OUTPUT = ("name", "parameters")


@dataclass(frozen=True, eq=False)
class JsonInference:
    """Holds an inference request as one of ours, and in which form its outputs are wanted."""

    inference: oip.Inference
    all_binary: bool
    """Whether outputs are binary of which the request says nothing."""
    binary: Mapping[str, bool]
    """Whether an output is binary, for those of which the request says so."""

    def is_binary(self, name: str) -> bool:
        """Tells whether an output is wanted in binary."""
        return self.binary.get(name, self.all_binary)


def decode(
    body: bytes, header_length: str | None, model: str, version: str, limits: RequestLimits = UNBOUNDED
) -> JsonInference:
    """Returns what the body of a request asks.

    Args:
        body: JSON, and perhaps binary elements behind it.
        header_length: number of bytes of the JSON, as the header of that name has it; None: all of them.
        model: name of the model in the request's path.
        version: version of the model in the path; "" where it has none.
        limits: the bounds of a request.

    Raises:
        InvalidInput: what is wrong, what was allowed and what came, as far as that shows without the model.
    """
    text, binary = _parts(body, header_length)
    values = read_object(text)
    _known("a request", values, _REQUEST)
    for name, of_path in (("model_name", model), ("model_version", version)):
        if (named := _text(name, values.get(name))) not in ("", of_path):
            raise InvalidInput(f"{name} is {shown(of_path)} by the path, and {shown(named)} in the body")
    inputs, outputs = _objects("inputs", values), _objects("outputs", values)
    beside = values | {"inputs": [{name: each[name] for name in each if name != "data"} for each in inputs]}
    limits.check_options(len(json.dumps(beside)))
    parameters = dict(_parameters("the request", values))
    all_binary = _flag(_ALL_WANTED, parameters.pop(_ALL_WANTED, False))
    wanted = {}
    for tensor in outputs:
        _known("an output", tensor, _OUTPUT)
        of_output = _parameters("an output", tensor)
        if _WANTED in of_output:
            wanted[_name(tensor)] = _flag(_WANTED, of_output[_WANTED])
    asked = oip.Asked(
        model,
        version,
        _text("id", values.get("id")),
        parameters,
        [_tensor(each) for each in inputs],
        [oip.Tensor(_name(each), parameters=_unread(each, (_WANTED,))) for each in outputs],
    )
    read = oip.read(asked, _Body(inputs, binary), False, limits)
    found = JsonInference(read, all_binary, wanted)
    if found.is_binary(oip.SALIENCY) or not read.request.methods:
        return found
    request = replace(read.request, output=replace(read.request.output, decimal=True))
    return replace(found, inference=replace(read, request=request))


def encode(explanation: Explanation, asked: JsonInference) -> tuple[bytes, int | None]:
    """Returns the body of the response to a request, and how many bytes of it are JSON; None where all are."""
    outputs, binary = list[str](), list[bytes]()
    for output in oip.outputs_of(explanation, asked.inference):
        described = {"name": output.name, "datatype": output.datatype, "shape": list(output.shape)}
        if asked.is_binary(output.name):
            binary.append(output.packed())
            outputs.append(json.dumps(described | {"parameters": {_SIZE: len(binary[-1])}}))
        else:
            outputs.append(f'{json.dumps(described)[:-1]}, "data": [{",".join(_written(output.values))}]}}')
    head = {"model_name": explanation.model, "model_version": explanation.version}
    head |= {"id": asked.inference.id} if asked.inference.id else {}
    told = json.dumps(head | {"parameters": oip.described(explanation, asked.inference)})
    text = f'{told[:-1]}, "outputs": [{",".join(outputs)}]}}'.encode()
    return b"".join((text, *binary)), len(text) if binary else None


def metadata(info: ModelInfo) -> dict[str, Any]:
    """Returns the inputs and outputs of a model."""
    described = oip.metadata(info)

    def tensors(messages: Any) -> list[dict[str, Any]]:
        return [{"name": each.name, "datatype": each.datatype, "shape": list(each.shape)} for each in messages]

    return {
        "name": described.name,
        "versions": list(described.versions),
        "platform": described.platform,
        "inputs": tensors(described.inputs),
        "outputs": tensors(described.outputs),
    }


class _Body:
    """Holds the elements of the input: as JSON, or in binary behind it."""

    def __init__(self, inputs: list[dict[str, Any]], binary: memoryview | None) -> None:
        self._inputs, self._binary = inputs, binary

    def element(self, limits: RequestLimits) -> bytes | memoryview:
        raw = self._raw()
        if raw is not None:
            return oip.one_element(raw)
        values = self._elements()
        if len(values) != 1 or not isinstance(values[0], str):
            raise InvalidImage(f"a BYTES tensor of shape [1] has one text, got {shown(values)}")
        kind = _parameters("an input", self._inputs[0]).get(_CONTENT)
        if kind != "base64":
            raise InvalidImage(
                f"a text of JSON holds no file: send it in binary behind the JSON, by {_SIZE}, or in base64 with the "
                f"parameter {_CONTENT} of 'base64', got {shown(kind) if kind is not None else 'no such parameter'}"
            )
        limits.check_image(len(values[0]) * 3 // 4 - 2)
        try:
            return base64.b64decode(url_safe(values[0]), validate=True)
        except (binascii.Error, ValueError):
            raise InvalidImage(f"the input is no base64: {shown(values[0])}") from None

    def numbers(self, dtype: np.dtype[Any], limits: RequestLimits) -> bytes | memoryview:
        raw = self._raw()
        if raw is not None:
            limits.check_image(len(raw))
            return raw
        values = self._elements()
        limits.check_image(len(values) * dtype.itemsize)
        allowed = (int, float) if dtype.kind == "f" else (int,)
        for value in values:
            if type(value) not in allowed:  # true and false are numbers to Python
                what = "numbers" if dtype.kind == "f" else "whole numbers"
                raise InvalidImage(f"an image's elements are {what}, got {shown(value)}")
        try:
            with np.errstate(over="ignore"):  # what is infinite is refused with all that is not in [0, 1]
                return (np.array(values, dtype) if dtype.kind == "f" else oip.small(np.array(values, np.int64))).data
        except OverflowError:
            raise InvalidImage("an image's elements are 0..255, or of FP32 0..1; one is far larger") from None

    def _raw(self) -> memoryview | None:
        """Returns the binary elements; None where the elements are in the JSON."""
        (tensor,) = self._inputs
        size = _parameters("an input", tensor).get(_SIZE)
        if size is None:
            if self._binary:
                raise InvalidInput(f"{len(self._binary)} bytes follow the JSON, and no input has a {_SIZE}")
            return None
        if "data" in tensor:
            raise InvalidInput(f"an input has either data or {_SIZE}, got both")
        if type(size) is not int or size < 0:
            raise InvalidInput(f"{_SIZE} must be a number of bytes, got {shown(size)}")
        if self._binary is None:
            raise InvalidInput(f"with {_SIZE} the header {HEADER_LENGTH} says how many bytes are JSON; it is missing")
        if size != len(self._binary):
            raise InvalidInput(f"{_SIZE} is {size}, and {len(self._binary)} bytes follow the JSON")
        return self._binary

    def _elements(self) -> list[Any]:
        """Returns the elements in the JSON, flat: they may come in lists of lists, by the tensor's shape."""
        (tensor,) = self._inputs
        level = tensor.get("data")
        if not isinstance(level, list):
            raise InvalidInput(f"an input has data, which are a list, or {_SIZE}, got {shown(level)}")
        for size in tensor["shape"][1:] if level and isinstance(level[0], list) else ():
            for each in level:
                if not isinstance(each, list) or len(each) != size:
                    raise InvalidInput(f"data are flat, or nested by shape {shown(tensor['shape'])}, got {shown(each)}")
            level = list(itertools.chain.from_iterable(level))
        return level


def _parts(body: bytes, header_length: str | None) -> tuple[bytes, memoryview | None]:
    """Returns the JSON, and the binary part; None where the request says that there is none."""
    if header_length is None:
        return body, None
    size = int(header_length) if header_length.isascii() and header_length.isdigit() and len(header_length) < 19 else -1
    if not 0 <= size <= len(body):
        raise InvalidInput(f"{HEADER_LENGTH} is 0..{len(body)}, the bytes of the body, got {shown(header_length)}")
    return body[:size], memoryview(body)[size:]


def _known(what: str, values: Mapping[str, Any], names: tuple[str, ...]) -> None:
    for name in values:
        if name not in names:
            raise InvalidInput(f"{what} has {', '.join(names)}, got {shown(name)}")


def _text(name: str, value: Any) -> str:
    """Returns a text, which is empty where there is none."""
    if value is None or isinstance(value, str):
        return value or ""
    raise InvalidInput(f"{name} must be a text, got {shown(value)}")


def _objects(name: str, values: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = values.get(name) or []
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise InvalidInput(f"{name} are a list of objects, got {shown(found)}")
    return found


def _tensor(values: dict[str, Any]) -> oip.Tensor:
    _known("an input", values, _INPUT)
    shape = values.get("shape")
    if not isinstance(shape, list) or not all(type(each) is int for each in shape):
        raise InvalidInput(f"the shape of an input is a list of whole numbers, got {shown(shape)}")
    name, datatype = _name(values), _text("datatype", values.get("datatype"))
    read = (_SIZE, _CONTENT) if datatype == "BYTES" else (_SIZE,)
    return oip.Tensor(name, datatype, shape, _unread(values, read))


def _name(values: Mapping[str, Any]) -> str:
    return _text("name", values.get("name"))


def _parameters(what: str, values: Mapping[str, Any]) -> dict[str, Any]:
    found = values.get("parameters") or {}
    if not isinstance(found, dict):
        raise InvalidInput(f"the parameters of {what} are an object, got {shown(found)}")
    return found


def _unread(values: Mapping[str, Any], read: tuple[str, ...]) -> list[str]:
    """Returns the names of the parameters of a tensor that are not among those that are read here."""
    return [name for name in _parameters("a tensor", values) if name not in read]


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InvalidOption(f"{name} must be true or false, got {shown(value)}")
    return value


def _written(values: np.ndarray | list[bytes]) -> Iterator[str]:
    """Yields elements as JSON, many in one text; a float32 has the nine digits that tell it from its neighbours."""
    if isinstance(values, list):
        yield from (json.dumps(value.decode()) for value in values)
        return
    form = "%.9g" if values.dtype.kind == "f" else "%d"
    for start in range(0, values.size, _NUMBERS_AT_ONCE):
        some = values.ravel()[start : start + _NUMBERS_AT_ONCE].tolist()
        yield ",".join([form] * len(some)) % tuple(some)

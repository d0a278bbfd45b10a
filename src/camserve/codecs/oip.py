"""Speaks the Open Inference Protocol: reads inference requests, and writes explanations as responses.

What a request says is read here for both transports, as is what a response says; the messages of gRPC are here too, and
`oip_json` has those of HTTP. Clients of this protocol are others' (tritonclient, for instance), so only the server's
direction is here.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from camserve.codecs import bulk, texts
from camserve.errors import InvalidImage, InvalidInput, InvalidOption
from camserve.images import ImageContent
from camserve.oip import inference_pb2 as pb
from camserve.types import Explanation, ModelInfo, Prediction
from camserve.types.request import UNBOUNDED, ExplainRequest, RequestLimits
from camserve.wording import shown

PLATFORM = "pytorch_camserve"
SALIENCY = "saliency"
PARAMETERS: Mapping[str, str] = {
    "explain_method": "methods",
    "explain_targets": "targets",
    "explain_text": "text",
    "explain_layers": "layers",
    "explain_fusion": "fusion",
    "explain_size": "size",
    "explain_signed": "signed",
    "explain_boxes": "boxes",
    "explain_precision": "precision",
    "explain_top_predictions": "top_predictions",
    "explain_evaluate": "evaluate",
    "explain_evaluation_steps": "evaluation_steps",
    "explain_allow_partial": "allow_partial",
    "priority": "priority",
}
"""Field of a request by the parameter that sets it; `timeout` is beside them."""

_BULK: bulk.Fields = {5: {5: {4: "uint", 6: "fp32", 8: "bytes"}}, 7: "raw"}
"""Fields of a ModelInferRequest that hold pixels: three of `inputs.contents`, and `raw_input_contents`."""

_IMAGE = "image"
_ALLOWED = "BYTES [1], an encoded file, or UINT8 or FP32 [height, width, channels] or, grey, [height, width]"
_PIXELS: Mapping[str, np.dtype[Any]] = {"UINT8": np.dtype("u1"), "FP32": np.dtype("<f4")}
_PRIORITIES = {0: "normal", 1: "interactive", 2: "normal", 3: "batch"}


@dataclass(frozen=True, eq=False)
class Inference:
    """Holds an inference request as one of ours, and what its response shall look like."""

    request: ExplainRequest
    timeout_s: float | None
    """Seconds that the client allows, beside the deadline of the call; None: it says nothing."""
    outputs: tuple[str, ...]
    """Names of the outputs wanted, in the order of the response; none means all that the model has."""
    id: str
    raw: bool
    """Whether arrays come and go as raw contents."""


@dataclass(frozen=True)
class Tensor:
    """Names a tensor of a request, and says what its elements are."""

    name: str
    datatype: str = ""
    shape: Sequence[int] = ()
    parameters: Collection[str] = ()
    """Names of its parameters that the transport itself does not read."""


class Contents(Protocol):
    """Holds the elements of the input, as one transport brings them."""

    def element(self, limits: RequestLimits) -> bytes | memoryview:
        """Returns the only element of a BYTES tensor; raises InvalidInput where there is another number of them."""

    def numbers(self, dtype: np.dtype[Any], limits: RequestLimits) -> bytes | memoryview:
        """Returns the memory of the numbers, row by row; raises InvalidInput where one does not fit."""


@dataclass(frozen=True)
class Asked:
    """Holds what a request says beside its elements."""

    model: str
    version: str
    id: str
    parameters: Mapping[str, Any]
    """Values by name: texts, numbers, true or false; None where there is none."""
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]


def read(asked: Asked, contents: Contents, raw: bool, limits: RequestLimits = UNBOUNDED) -> Inference:
    """Returns what a request asks, however it came.

    Raises:
        InvalidInput: what is wrong, what was allowed and what came, as far as that shows without the model.
    """
    limits.check_names((asked.model, asked.version, asked.id, *asked.parameters))
    values = dict(asked.parameters)
    timeout_s = _timeout_s(values.pop("timeout", 0))
    request = _request(_image(asked.inputs, contents, limits), values, limits)
    request = replace(request, model=asked.model, version=asked.version)
    outputs = _outputs(asked.outputs)
    if outputs and SALIENCY not in outputs:
        request = request.without_maps()
    return Inference(request, timeout_s, outputs, asked.id, raw)


def decode(data: bytes, limits: RequestLimits = UNBOUNDED) -> Inference:
    """Returns what the bytes of a ModelInferRequest ask.

    Raises:
        InvalidInput: what is wrong, what was allowed and what came, as far as that shows without the model.
    """
    cut = bulk.parse(pb.ModelInferRequest, data, _BULK, limits)
    message = cut.message
    asked = Asked(
        message.model_name,
        message.model_version,
        message.id,
        {name: _value(parameter) for name, parameter in message.parameters.items()},
        [Tensor(each.name, each.datatype, list(each.shape), list(each.parameters)) for each in message.inputs],
        [Tensor(each.name, parameters=list(each.parameters)) for each in message.outputs],
    )
    return read(asked, _Message(cut), bool(message.raw_input_contents), limits)


def model_name(data: bytes, limits: RequestLimits = UNBOUNDED) -> str:
    """Returns the model that a request names, even if `decode` refuses the request; "" where none can be read."""
    try:
        return bulk.parse(pb.ModelInferRequest, data, _BULK, limits).message.model_name
    except InvalidInput:
        return ""


def encode(explanation: Explanation, inference: Inference) -> bytes:
    """Returns the bytes of the ModelInferResponse to a request."""
    message = pb.ModelInferResponse(model_name=explanation.model, model_version=explanation.version, id=inference.id)
    for output in outputs_of(explanation, inference):
        _add_output(message, inference.raw, output)
    for key, value in described(explanation, inference).items():
        if isinstance(value, bool):
            message.parameters[key].bool_param = value
        else:
            message.parameters[key].string_param = value
    return message.SerializeToString()


def described(explanation: Explanation, inference: Inference) -> dict[str, str | bool]:
    """Returns the parameters of a response: what an explanation took, and what its maps are of."""
    found: dict[str, str | bool] = {
        "cost": json.dumps(texts.cost_json(explanation.cost)),
        "request_id": explanation.request_id,
    }
    if SALIENCY in inference.outputs:
        found["maps"] = json.dumps([texts.map_json(saliency) for saliency in explanation.maps])
    return found | {"complete": all(saliency.complete for saliency in explanation.maps)}


@dataclass(frozen=True)
class Output:
    """Holds one tensor of a response."""

    name: str
    datatype: str
    values: np.ndarray | list[bytes]

    @property
    def shape(self) -> tuple[int, ...]:
        """The length of each dimension."""
        return self.values.shape if isinstance(self.values, np.ndarray) else (len(self.values),)

    def packed(self) -> bytes:
        """Returns the elements in binary: row by row, little-endian; each of BYTES behind its length in 4 bytes."""
        if isinstance(self.values, list):
            return b"".join(struct.pack("<I", len(value)) + value for value in self.values)
        return self.values.tobytes()


def outputs_of(explanation: Explanation, inference: Inference) -> Iterator[Output]:
    """Yields the tensors of the response to a request that is `fitted`, in their order."""
    for name in inference.outputs:
        yield Output(name, _OUTPUTS[name].datatype, _OUTPUTS[name].values(explanation))


def fitted(inference: Inference, info: ModelInfo) -> Inference:
    """Returns a request with the outputs that its response has: those wanted, else all that the model has.

    Raises:
        InvalidInput: an output is wanted that the model does not have.
    """
    has = _outputs_of(info)
    for name in inference.outputs:
        if name not in has:
            said = " and ".join(_figures_of(info))
            raise InvalidInput(f"the predictions of model {info.name} are {said}, and there are no {name}")
    return replace(inference, outputs=inference.outputs or has)


def metadata(info: ModelInfo) -> pb.ModelMetadataResponse:
    """Returns the inputs and outputs of a model."""
    tensor = pb.ModelMetadataResponse.TensorMetadata
    return pb.ModelMetadataResponse(
        name=info.name,
        versions=[info.version],
        platform=PLATFORM,
        inputs=[tensor(name=_IMAGE, datatype="BYTES", shape=[1])],
        outputs=[
            tensor(name=name, datatype=_OUTPUTS[name].datatype, shape=_OUTPUTS[name].shape)
            for name in _outputs_of(info)
        ],
    )


def _request(image: ImageContent, values: dict[str, Any], limits: RequestLimits) -> ExplainRequest:
    for name in values:
        if name not in PARAMETERS:
            raise InvalidOption(f"unknown parameter {shown(name)}; there are {', '.join([*PARAMETERS, 'timeout'])}")
    if "priority" in values:
        values["priority"] = _priority(values["priority"])
    return texts.request(image, PARAMETERS, values, limits, encoding="float32", stacked=True)


def _value(parameter: pb.InferParameter) -> bool | int | float | str | None:
    kind = parameter.WhichOneof("parameter_choice")
    return None if kind is None else getattr(parameter, kind)


def _timeout_s(value: object) -> float | None:
    """Returns the bound on the call's time in seconds; it comes in microseconds, and 0 means none."""
    timeout_us = texts.whole("timeout", value)
    if timeout_us < 0:
        raise InvalidOption(f"timeout must be at least 0, got {timeout_us}")
    return timeout_us / 1e6 or None


def _priority(value: object) -> object:
    """Returns the name of Triton's number, of which 1 is the most urgent and 0 the default; a name is left as it is."""
    if isinstance(value, str) and not value.isdecimal():
        return value
    number = texts.whole("priority", value)
    if number not in _PRIORITIES:
        raise InvalidOption(
            f"priority must be 0 (default), 1 (interactive), 2 (normal), 3 (batch) or such a name, got {number}"
        )
    return _PRIORITIES[number]


def _outputs(wanted: Sequence[Tensor]) -> tuple[str, ...]:
    names = [tensor.name for tensor in wanted]
    if not set(names) <= set(OUTPUTS) or len(set(names)) < len(names):
        raise InvalidInput(f"outputs are {', '.join(OUTPUTS)}, each once; got {shown(names)}")
    for tensor in wanted:
        if tensor.parameters:
            raise InvalidInput(f"the output {tensor.name!r} has no parameters, got {shown(sorted(tensor.parameters))}")
    return tuple(names)


def _image(inputs: Sequence[Tensor], contents: Contents, limits: RequestLimits) -> ImageContent:
    """Returns the image, whose elements are in `contents`."""
    names = [tensor.name for tensor in inputs]
    if names != [_IMAGE]:
        raise InvalidInput(f"there must be one input, {_IMAGE!r}, got {shown(names)}")
    (tensor,) = inputs
    if tensor.parameters:
        raise InvalidInput(f"the input {_IMAGE!r} has no parameters, got {shown(sorted(tensor.parameters))}")
    shape = list(tensor.shape)
    if tensor.datatype == "BYTES" and shape in ([1], [1, 1]):
        element = contents.element(limits)
        limits.check_image(len(element))
        return bytes(element)
    size = shape[1:] if len(shape) == 4 and shape[0] == 1 else shape
    if tensor.datatype not in _PIXELS or not _is_image(tensor.datatype, size):
        raise InvalidImage(
            f"the input {_IMAGE!r} must be {_ALLOWED}, got {shown(tensor.datatype)[1:-1]} {shown(shape)}"
        )
    dtype = _PIXELS[tensor.datatype]
    data = contents.numbers(dtype, limits)
    expected, came = dtype.itemsize * math.prod(size), memoryview(data).nbytes
    if came != expected:
        raise InvalidImage(f"an image tensor of shape {shown(size)} has {expected} bytes, got {came}")
    return np.frombuffer(data, dtype).reshape(size)


def _is_image(datatype: str, size: Sequence[int]) -> bool:
    return len(size) in (2, 3) and min(size) > 0 and (datatype == "FP32" or size[2:] in ([], [1], [3]))


class _Message:
    """Holds the elements of a message of gRPC: in the contents of its input, or raw."""

    def __init__(self, cut: bulk.Cut[pb.ModelInferRequest]) -> None:
        self._bulk, self._request = cut.bulk, cut.message

    def element(self, limits: RequestLimits) -> bytes | memoryview:
        raw = self._raw()
        return one_element(raw) if raw is not None else _one_of(self._bulk.get("bytes", []))

    def numbers(self, dtype: np.dtype[Any], limits: RequestLimits) -> bytes | memoryview:
        raw = self._raw()
        limits.check_image(_bytes(self._bulk.get("fp32", [])) if raw is None else len(raw))
        limits.check_image(_bytes(self._bulk.get("uint", [])) // 2)  # an element takes up to two bytes
        return self._from_contents(dtype) if raw is None else raw

    def _raw(self) -> memoryview | None:
        """Returns the raw contents; None where the elements are in the contents of the input."""
        raw = self._bulk.get("raw", [])
        if raw and (len(raw) != 1 or self._request.inputs[0].contents.ByteSize()):
            raise InvalidInput(f"data is in `contents` or in one entry of `raw_input_contents`, got {len(raw)} entries")
        return raw[0] if raw else None

    def _from_contents(self, dtype: np.dtype[Any]) -> bytes | memoryview:
        """Returns the elements of a tensor, flat; packed ones are read by numpy, single ones were parsed."""
        contents = self._request.inputs[0].contents
        if dtype.kind == "f":
            return b"".join(self._bulk.get("fp32", ())) or np.array(contents.fp32_contents, dtype).data
        if "uint" in self._bulk:
            return _small_numbers(b"".join(self._bulk["uint"])).data
        return small(np.array(contents.uint_contents, np.uint32)).data


def _bytes(contents: Sequence[memoryview]) -> int:
    return sum(len(each) for each in contents)


def one_element(raw: memoryview) -> memoryview:
    """Returns the only element of a BYTES tensor in binary, which has its length before it."""
    length = struct.unpack("<I", raw[:4])[0] if len(raw) >= 4 else None
    if length is None or length != len(raw) - 4:
        raise InvalidImage(
            f"raw BYTES are the image's length in 4 bytes, little-endian, then the image; got {len(raw)} bytes"
            + ("" if length is None else f" that begin with the length {length}")
        )
    return raw[4:]


def _one_of(elements: Sequence[memoryview]) -> memoryview:
    if len(elements) != 1:
        raise InvalidImage(f"a BYTES tensor of shape [1] has one element, got {len(elements)}")
    return elements[0]


def small(values: np.ndarray) -> np.ndarray:
    """Returns whole numbers as uint8; raises InvalidImage where one is not 0..255."""
    for extreme in (values.max(), values.min()) if values.size else ():
        if not 0 <= extreme <= 255:
            raise _not_uint8(int(extreme))
    return values.astype(np.uint8)


def _small_numbers(packed: bytes) -> np.ndarray:
    """Returns the numbers 0..255 of a packed field as uint8; raises InvalidImage where one is larger.

    A number below 128 is one byte, the number itself. One of 128..255 is two: the number itself, whose highest bit says
    that more follows, and 1.
    """
    groups = np.frombuffer(packed, np.uint8)
    first = np.ones(len(groups), bool)
    np.less(groups[:-1], 128, out=first[1:])
    bad = np.flatnonzero(~first & (groups != 1))
    if len(bad):
        start = int(bad[0])
        while not first[start]:
            start -= 1
        raise _not_uint8(bulk.number(memoryview(packed), start)[0])
    return groups[first]


def _not_uint8(value: int) -> InvalidImage:
    return InvalidImage(f"UINT8 elements must be 0..255, got {value}")


@dataclass(frozen=True)
class _Output:
    datatype: str
    shape: tuple[int, ...]
    """Length of each dimension; -1: any."""
    values: Callable[[Explanation], np.ndarray | list[bytes]]


_FIGURES: Mapping[str, Callable[[Prediction], float | None]] = {
    "probabilities": lambda prediction: prediction.probability,
    "values": lambda prediction: prediction.value,
    "similarities": lambda prediction: prediction.similarity,
    "shares": lambda prediction: prediction.share,
}
"""Functions by name of the output that return what is said of a class, a number, a reference or a prompt."""


def _figures_of(info: ModelInfo) -> tuple[str, ...]:
    """Returns the names of the outputs that say something of predictions: of detections their boxes as well."""
    names = {"probability": "probabilities", "value": "values", "similarity": "similarities", "share": "shares"}
    boxes = (_BOXES,) if info.outputs == "boxes" else ()
    return (*(names[said] for said in info.says), *boxes)


def _outputs_of(info: ModelInfo) -> tuple[str, ...]:
    """Returns the names of all outputs that a model has."""
    figures = _figures_of(info)
    return tuple(name for name in OUTPUTS if name in figures or name in _OF_ALL)


def _figures(name: str) -> _Output:
    return _Output("FP32", (-1,), lambda found: np.array([_FIGURES[name](each) for each in found.predictions], "<f4"))


def _boxes(found: Explanation) -> np.ndarray:
    return np.array([prediction.box for prediction in found.predictions], "<f4").reshape(-1, 4)


_OF_ALL = {
    "class_indices": _Output("INT64", (-1,), lambda found: np.array([p.index for p in found.predictions], "<i8")),
    "labels": _Output("BYTES", (-1,), lambda found: [prediction.label.encode() for prediction in found.predictions]),
    SALIENCY: _Output(
        "FP32", (-1, -1, -1), lambda found: np.stack([saliency.array.astype("<f4") for saliency in found.maps])
    ),
}
"""Outputs of every model."""

_BOXES = "boxes"
_OUTPUTS = {**{name: _figures(name) for name in _FIGURES}, _BOXES: _Output("FP32", (-1, 4), _boxes), **_OF_ALL}
OUTPUTS = tuple(_OUTPUTS)


def _add_output(message: pb.ModelInferResponse, raw: bool, output: Output) -> None:
    """Appends an output to a response, its elements raw or in the contents."""
    added = message.outputs.add(name=output.name, datatype=output.datatype, shape=output.shape)
    if raw:
        message.raw_output_contents.append(output.packed())
    elif isinstance(output.values, list):
        added.contents.bytes_contents.extend(output.values)
    else:
        getattr(added.contents, f"{output.datatype.lower()}_contents").extend(output.values.ravel().tolist())

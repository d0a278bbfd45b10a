"""From a request of the Open Inference Protocol to ours, and from our reply to its response. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from camserve import wire
from camserve.errors import InvalidInput, InvalidOption
from camserve.gateway.oip_parameters import set_options
from camserve.gateway.oip_tensors import IMAGE, add_output, image_of
from camserve.oip import inference_pb2 as oip
from camserve.types import ModelInfo
from camserve.v1 import explain_pb2 as pb

PLATFORM = "pytorch_camserve"
SALIENCY = "saliency"


@dataclass(frozen=True)
class Asked:
    """An inference request as one of ours, and what its response shall look like."""

    request: pb.ExplainRequest
    timeout_s: float | None
    """The client's bound beside the deadline of the call."""
    outputs: tuple[str, ...]
    """In their order."""
    id: str
    raw: bool
    """Arrays come and go as raw contents."""


def asked(message: oip.ModelInferRequest) -> Asked:
    """What an inference request asks.

    Raises:
        InvalidInput: what is wrong, what was allowed and what came, as far as it shows without the model.
    """
    request = pb.ExplainRequest(
        model=message.model_name, version=message.model_version, image=image_of(message)
    )  # fmt: skip
    request.output.encoding = pb.Output.FLOAT32
    timeout_s = set_options(request, message.parameters)
    outputs = _outputs(message.outputs)
    if SALIENCY not in outputs:  # then no map is made but the cheapest
        request.output.size = pb.Output.LAYER
        del request.methods[:], request.layers[:]
    return Asked(request, timeout_s, outputs, message.id, bool(message.raw_input_contents))


def response(reply: pb.ExplainReply, what: Asked, request_id: str) -> oip.ModelInferResponse:
    """The response to a request.

    Raises:
        InvalidOption: the maps have different sizes, so that one tensor does not hold them.
    """
    message = oip.ModelInferResponse(model_name=reply.model, model_version=reply.version, id=what.id)
    for name in what.outputs:
        shape, values = _OUTPUTS[name].values(reply)
        add_output(message, what.raw, name, shape, values)
    texts = {"cost": json.dumps(_cost(reply.cost)), "request_id": request_id}
    if SALIENCY in what.outputs:
        texts["maps"] = json.dumps([_described(saliency) for saliency in reply.maps])
    for key, text in texts.items():
        message.parameters[key].string_param = text
    message.parameters["complete"].bool_param = all(saliency.complete for saliency in reply.maps)
    return message


def metadata(info: ModelInfo) -> oip.ModelMetadataResponse:
    """Inputs and outputs of a model."""
    tensor = oip.ModelMetadataResponse.TensorMetadata
    return oip.ModelMetadataResponse(
        name=info.name,
        versions=[info.version],
        platform=PLATFORM,
        inputs=[tensor(name=IMAGE, datatype="BYTES", shape=[1])],
        outputs=[
            tensor(name=name, datatype=output.datatype, shape=[-1] * output.dimensions)
            for name, output in _OUTPUTS.items()
        ],
    )


@dataclass(frozen=True)
class _Output:
    datatype: str
    dimensions: int
    values: Callable[[pb.ExplainReply], tuple[Sequence[int], np.ndarray | Sequence[bytes]]]
    """Shape and elements."""


def _probabilities(reply: pb.ExplainReply) -> tuple[Sequence[int], np.ndarray]:
    return [len(reply.predictions)], np.array([each.probability for each in reply.predictions], np.float32)


def _indices(reply: pb.ExplainReply) -> tuple[Sequence[int], np.ndarray]:
    return [len(reply.predictions)], np.array([each.index for each in reply.predictions], np.int64)


def _labels(reply: pb.ExplainReply) -> tuple[Sequence[int], Sequence[bytes]]:
    return [len(reply.predictions)], [each.label.encode() for each in reply.predictions]


def _saliency(reply: pb.ExplainReply) -> tuple[Sequence[int], np.ndarray]:
    shapes = {tuple(saliency.shape) for saliency in reply.maps}
    if len(shapes) != 1:
        raise InvalidOption(
            f"one tensor holds maps of one size, and these have {sorted(shapes)}: ask for explain_size=input, "
            "or for one method after the other"
        )
    data = b"".join(saliency.data for saliency in reply.maps)
    return [len(reply.maps), *shapes.pop()], np.frombuffer(data, "<f4")


_OUTPUTS = {
    "probabilities": _Output("FP32", 1, _probabilities),
    "class_indices": _Output("INT64", 1, _indices),
    "labels": _Output("BYTES", 1, _labels),
    SALIENCY: _Output("FP32", 3, _saliency),
}
OUTPUTS = tuple(_OUTPUTS)


def _outputs(wanted: Sequence[oip.ModelInferRequest.InferRequestedOutputTensor]) -> tuple[str, ...]:
    names = [tensor.name for tensor in wanted]
    if not set(names) <= set(OUTPUTS) or len(set(names)) < len(names):
        raise InvalidInput(f"outputs are {', '.join(OUTPUTS)}, each once; got {names}")
    for tensor in wanted:
        if tensor.parameters:
            raise InvalidInput(f"the output {tensor.name!r} has no parameters, got {sorted(tensor.parameters)}")
    return tuple(names) or OUTPUTS


def _cost(cost: pb.Cost) -> dict[str, Any]:
    return {
        "queries": cost.queries,
        "evaluation_queries": cost.evaluation_queries,
        "steps": cost.steps,
        "precision": wire.precision_from_proto(cost.precision),
        "worker": cost.worker,
        "cached": cost.cached,
        "stage_seconds": dict(cost.stage_seconds),
    }


def _described(saliency: pb.SaliencyMap) -> dict[str, Any]:
    """Of what a map is, as JSON."""
    method, target, found = wire.method_from_proto(saliency.method), saliency.target, saliency.faithfulness
    described: dict[str, Any] = {
        "method": method.name,
        "parameters": {parameter.name: getattr(method, parameter.name) for parameter in method.parameters()},
        "target": {"index": target.index, "label": target.label, "probability": target.probability},
        "layers": list(saliency.layers),
        "complete": saliency.complete,
        "fraction": saliency.fraction,
        "degenerate": saliency.degenerate,
    }
    if saliency.choice:
        described["choice"] = saliency.choice
    if saliency.HasField("faithfulness"):
        described |= {"insertion_auc": found.insertion_auc, "deletion_auc": found.deletion_auc}
    return described

"""What a user of NVIDIA's client writes: the unmodified `tritonclient.grpc`, and nothing of camserve.

A program of its own, since its generated code has the same names as ours, and one process holds them once. Called with
a JSON object of `address`, `model`, `image` (path) and `out` (path of an .npz), and perhaps `calls`, `ca` and `token`.
Each of `calls` has the arguments of `infer` beside the image, which is sent as BYTES, or with `pixels` as UINT8. Arrays
go to `out`, named "<place of the call> <output>"; everything else is printed as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio
from tritonclient.utils import InferenceServerException


def image_input(path: str, pixels: bool) -> triton.InferInput:
    if pixels:
        from PIL import Image

        array = np.asarray(Image.open(path).convert("RGB"))
        tensor = triton.InferInput("image", array.shape, "UINT8")
    else:
        with open(path, "rb") as file:
            array = np.array([file.read()], dtype=object)
        tensor = triton.InferInput("image", [1], "BYTES")
    tensor.set_data_from_numpy(array)
    return tensor


def arguments(asked: dict[str, Any], call: dict[str, Any]) -> dict[str, Any]:
    call = dict(call)
    tensor = image_input(asked["image"], call.pop("pixels", False))
    outputs = call.pop("outputs", None)
    wanted = outputs and [triton.InferRequestedOutput(name) for name in outputs]
    headers = {"authorization": f"Bearer {asked['token']}"} if "token" in asked else None
    return {"model_name": asked["model"], "inputs": [tensor], "outputs": wanted, "headers": headers, **call}


def told(number: int, result: triton.InferResult, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    answer = result.get_response()
    for output in answer.outputs:
        array = result.as_numpy(output.name)
        texts = output.datatype == "BYTES"
        arrays[f"{number} {output.name}"] = np.array([each.decode() for each in array]) if texts else array
    parameters = {
        name: getattr(parameter, parameter.WhichOneof("parameter_choice"))
        for name, parameter in answer.parameters.items()
    }
    return {"model": [answer.model_name, answer.model_version], "id": answer.id, "parameters": parameters}


def failed(error: InferenceServerException) -> dict[str, Any]:
    return {"status": error.status(), "error": error.message()}


def infer(client: triton.InferenceServerClient, asked: dict[str, Any], arrays: dict[str, np.ndarray]) -> list[Any]:
    answers = []
    for number, call in enumerate(asked.get("calls", [])):
        try:
            answers.append(told(number, client.infer(**arguments(asked, call)), arrays))
        except InferenceServerException as error:
            answers.append(failed(error))
    return answers


async def infer_with_asyncio(asked: dict[str, Any], arrays: dict[str, np.ndarray]) -> list[str]:
    """All calls at once. Returns the names of the models that answered."""
    async with tritonclient.grpc.aio.InferenceServerClient(asked["address"]) as client:
        calls = (client.infer(**arguments(asked, call)) for call in asked["calls_at_once"])
        return [result.get_response().model_name for result in await asyncio.gather(*calls)]


def metadata(client: triton.InferenceServerClient, model: str) -> dict[str, Any]:
    server, described = client.get_server_metadata(), client.get_model_metadata(model)
    tensors = [*described.inputs, *described.outputs]
    return {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": client.is_model_ready(model),
        "version_ready": client.is_model_ready(model, "no such version"),
        "other_ready": client.is_model_ready("no such model"),
        "server": server.name,
        "versions": list(described.versions),
        "tensors": {tensor.name: [tensor.datatype, list(tensor.shape)] for tensor in tensors},
    }


def main() -> None:
    asked = json.loads(sys.argv[1])
    arrays: dict[str, np.ndarray] = {}
    ssl = {"ssl": True, "root_certificates": asked["ca"]} if "ca" in asked else {}
    with triton.InferenceServerClient(asked["address"], **ssl) as client:
        found = {"calls": infer(client, asked, arrays)}
        if "token" not in asked:
            found |= metadata(client, asked["model"])
    if "calls_at_once" in asked:
        found["at_once"] = asyncio.run(infer_with_asyncio(asked, arrays))
    np.savez(asked["out"], **arrays)
    print(json.dumps(found))


if __name__ == "__main__":
    main()

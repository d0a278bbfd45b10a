"""What a user of NVIDIA's client writes over HTTP: the unmodified `tritonclient.http`, and nothing of camserve.

Called as `triton_program.py` is. Each of `calls` has the arguments of `infer` beside the image; with `pixels` the image
is sent as UINT8 instead of BYTES, with `binary` of false as JSON. `outputs` are names, or pairs of a name and of
whether it is wanted in binary.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import numpy as np
import tritonclient.http as triton
import tritonclient.http.aio
from tritonclient.utils import InferenceServerException


def image_input(path: str, pixels: bool, binary: bool) -> triton.InferInput:
    if pixels:
        from PIL import Image

        array = np.asarray(Image.open(path).convert("RGB"))
        tensor = triton.InferInput("image", array.shape, "UINT8")
    else:
        with open(path, "rb") as file:
            array = np.array([file.read()], dtype=object)
        tensor = triton.InferInput("image", [1], "BYTES")
    tensor.set_data_from_numpy(array, binary_data=binary)
    return tensor


def output(wanted: str | list[Any]) -> triton.InferRequestedOutput:
    name, binary = (wanted, True) if isinstance(wanted, str) else wanted
    return triton.InferRequestedOutput(name, binary_data=binary)


def headers(asked: dict[str, Any]) -> dict[str, str] | None:
    return {"authorization": f"Bearer {asked['token']}"} if "token" in asked else None


def arguments(asked: dict[str, Any], call: dict[str, Any]) -> dict[str, Any]:
    call = dict(call)
    tensor = image_input(asked["image"], call.pop("pixels", False), call.pop("binary", True))
    outputs = call.pop("outputs", None)
    wanted = None if outputs is None else [output(each) for each in outputs]
    return {"model_name": asked["model"], "inputs": [tensor], "outputs": wanted, "headers": headers(asked), **call}


def told(number: int, result: triton.InferResult, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    answer = result.get_response()
    for each in answer["outputs"]:
        array = result.as_numpy(each["name"])
        if each["datatype"] == "BYTES":
            array = np.array([text.decode() if isinstance(text, bytes) else text for text in array])
        arrays[f"{number} {each['name']}"] = array
    return {
        "model": [answer["model_name"], answer["model_version"]],
        "id": answer.get("id"),
        "parameters": answer["parameters"],
        "in_json": [each["name"] for each in answer["outputs"] if "data" in each],
    }


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


async def infer_with_asyncio(asked: dict[str, Any]) -> list[str]:
    """All calls at once. Returns the names of the models that answered."""
    async with tritonclient.http.aio.InferenceServerClient(asked["address"]) as client:
        calls = (client.infer(**arguments(asked, call)) for call in asked["calls_at_once"])
        return [result.get_response()["model_name"] for result in await asyncio.gather(*calls)]


def metadata(client: triton.InferenceServerClient, asked: dict[str, Any]) -> dict[str, Any]:
    model, sent = asked["model"], headers(asked)
    server, described = client.get_server_metadata(sent), client.get_model_metadata(model, headers=sent)
    tensors = [*described["inputs"], *described["outputs"]]
    try:
        client.get_model_config(model, headers=sent)
    except InferenceServerException as error:
        config = failed(error)
    return {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": client.is_model_ready(model, headers=sent),
        "version_ready": client.is_model_ready(model, "no such version", headers=sent),
        "other_ready": client.is_model_ready("no such model", headers=sent),
        "server": server["name"],
        "extensions": server["extensions"],
        "versions": described["versions"],
        "tensors": {tensor["name"]: [tensor["datatype"], tensor["shape"]] for tensor in tensors},
        "config": config,
    }


def main() -> None:
    asked = json.loads(sys.argv[1])
    arrays: dict[str, np.ndarray] = {}
    ssl = {"ssl": True, "ssl_options": {"ca_certs": asked["ca"]}} if "ca" in asked else {}
    with triton.InferenceServerClient(asked["address"], **ssl) as client:
        found = {"calls": infer(client, asked, arrays)}
        if asked.get("metadata"):
            found |= metadata(client, asked)
    if "calls_at_once" in asked:
        found["at_once"] = asyncio.run(infer_with_asyncio(asked))
    np.savez(asked["out"], **arrays)
    print(json.dumps(found))


if __name__ == "__main__":
    main()

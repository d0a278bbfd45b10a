"""The Open Inference Protocol over HTTP: the unmodified tritonclient, and bodies made by hand, against the gateway."""

from __future__ import annotations

import asyncio
import hashlib
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from gateway_harness import GROUP, SCORE, arrays, ask, certified, photo, until
from PIL import Image
from test_web import door, problem
from triton_harness import HTTP, triton

from camserve.gateway.api.access import new_token
from camserve.gateway.pool.fake import FakeBackend
from camserve.v1 import explain_pb2 as pb

INFER = "/v2/models/fake/infer"


async def test_tritonclient_sees_the_server_and_its_model(tmp_path: Path):
    async with door() as (server, _):
        found, _ = await triton(server.gateway.web_address, photo(), tmp_path, HTTP, metadata=True)
    config = found.pop("config")
    assert found == {
        "calls": [],
        "live": True,
        "ready": True,
        "model_ready": True,
        "version_ready": False,
        "other_ready": False,
        "server": "camserve",
        "extensions": ["explain", "binary_tensor_data"],
        "versions": ["1.0"],
        "tensors": {
            "image": ["BYTES", [1]],
            "probabilities": ["FP32", [-1]],
            "class_indices": ["INT64", [-1]],
            "labels": ["BYTES", [-1]],
            "saliency": ["FP32", [-1, -1, -1]],
        },
    }
    assert config["status"] == "404"
    assert "there is no '/v2/models/fake/config'" in config["error"], "an unknown path is an error that is read"


async def test_tritonclient_gets_what_our_own_api_gives_in_every_form(tmp_path: Path):
    parameters = {
        "explain_method": "group_cam; score_cam",
        "explain_targets": "tabby,top2",
        "explain_top_predictions": 3,
    }
    in_json = [["saliency", False]]
    calls = [
        {"parameters": parameters, "request_id": "r-7", "priority": 1, "timeout": 60_000_000},
        {"parameters": parameters, "outputs": [["saliency", False], ["labels", False], ["probabilities", True]]},
        {"parameters": {"explain_size": "original"}, "pixels": True, "model_version": "1.0"},
        {"parameters": {"explain_size": "original"}, "pixels": True, "binary": False, "outputs": in_json},
        {"outputs": ["labels"], "response_compression_algorithm": "gzip"},
    ]
    async with door() as (server, _):
        found, got = await triton(server.gateway.web_address, photo(), tmp_path, HTTP, calls=calls)
        targets = [pb.Target(label="tabby"), pb.Target(top_k=2)]
        ours = await server.stub.Explain(ask(GROUP, SCORE, targets=targets, top_predictions=3))
        pixels = np.asarray(Image.open(tmp_path / "photo"))
        tensor = pb.Tensor(data_type=pb.Tensor.UINT8, shape=pixels.shape, data=pixels.tobytes())
        original = pb.Output(size=pb.Output.ORIGINAL)
        ours_of_pixels = await server.stub.Explain(pb.ExplainRequest(image=pb.Image(tensor=tensor), output=original))
        assert 'class="interactive",code="OK",method="several"' in await server.metrics()
    first, second, third, fourth, fifth = found["calls"]
    assert (first["model"], first["id"]) == (["fake", "1.0"], "r-7")
    assert [call["in_json"] for call in found["calls"]] == [[], ["saliency", "labels"], [], ["saliency"], []]
    for call in ("0", "1"):
        np.testing.assert_array_equal(got[f"{call} saliency"], np.stack(arrays(ours)))
        assert got[f"{call} saliency"].dtype == np.float32
        assert got[f"{call} labels"].tolist() == [prediction.label for prediction in ours.predictions]
        assert got[f"{call} probabilities"].tolist() == [prediction.probability for prediction in ours.predictions]
    assert got["0 class_indices"].tolist() == [prediction.index for prediction in ours.predictions]
    for call in ("2", "3"):
        np.testing.assert_array_equal(got[f"{call} saliency"], np.stack(arrays(ours_of_pixels)))
    assert first["parameters"]["complete"] is True
    assert json.loads(first["parameters"]["cost"])["queries"] == ours.cost.queries
    maps = json.loads(second["parameters"]["maps"])
    assert [(each["method"], each["target"]["label"]) for each in maps] == [
        (saliency.method.WhichOneof("method"), saliency.target.label) for saliency in ours.maps
    ]
    assert third["id"] is fourth["id"] is None
    assert "maps" not in fifth["parameters"], "predictions alone; that an answer may be compressed asks for nothing"


async def test_tritonclient_reads_what_was_wrong(tmp_path: Path):
    calls = [
        ({"parameters": {"explain_colour": "red"}}, "400", "unknown parameter 'explain_colour'"),
        ({"parameters": {"explain_method": "grad_kam"}}, "400", "grad_kam"),
        ({"model_name": "other"}, "404", "unknown model 'other'; there are: fake"),
        ({"model_version": "2.0"}, "404", "model fake is served in version 1.0, not '2.0'"),
        ({"outputs": ["logits"]}, "400", "outputs are probabilities"),
        ({"outputs": ["values"]}, "400", "the predictions of model fake are probabilities, and there are no values"),
        ({"sequence_id": 5, "sequence_start": True}, "400", "unknown parameter 'sequence_id'"),
        ({"request_compression_algorithm": "gzip"}, "415", "without compression, got 'gzip'"),
        ({"request_compression_algorithm": "deflate"}, "415", "without compression, got 'deflate'"),
    ]
    async with door() as (server, _):
        sent = [call for call, _, _ in calls]
        found, got = await triton(server.gateway.web_address, photo(), tmp_path, HTTP, calls=sent)
        assert server.upstream.steps == [], "nothing of it reaches a worker"
        text = await server.metrics()
    assert got == {}
    for answer, (_, status, said) in zip(found["calls"], calls, strict=True):
        assert answer["status"] == status
        assert said in answer["error"]
    counted = (
        'camserve_request_seconds_count{class="unknown",code="INVALID_ARGUMENT",method="unknown",model="fake"} 4.0'
    )
    assert counted in text, "they count as other calls do"


async def test_tritonclient_with_asyncio_asks_many_at_once(tmp_path: Path):
    calls = [{"parameters": {"explain_method": "score_cam"}}] * 6
    async with door() as (server, _):
        found, _ = await triton(server.gateway.web_address, photo(), tmp_path, HTTP, calls_at_once=calls)
    assert found["at_once"] == ["fake"] * 6


async def test_tritonclient_speaks_tls_and_has_a_token(tmp_path: Path):
    secret, entry = new_token("triton", priority="batch")
    (tmp_path / "tokens.toml").write_text(entry)
    files = {**certified(tmp_path)[1], "tokens": tmp_path / "tokens.toml"}
    options = {"ca": str(tmp_path / "ca.pem"), "calls": [{"priority": 1}]}
    async with door(ready=False, **files) as (server, _):
        await server.gateway.wait_ready(30)
        address = server.gateway.web_address
        found, got = await triton(address, photo(), tmp_path, HTTP, token=secret, metadata=True, **options)
        refused, _ = await triton(address, photo(), tmp_path, HTTP, token="wrong", **options)
        assert 'class="batch",code="OK",method="grad_cam",model="fake"} 1.0' in await server.metrics()
    assert "0 saliency" in got
    assert found["model_ready"]
    assert refused["calls"][0]["status"] == "401"
    assert "bearer token is not one of this server" in refused["calls"][0]["error"]


def inference(element: bytes, **members: Any) -> tuple[bytes, int]:
    """(body, bytes of its JSON): an image in binary behind the JSON."""
    raw = struct.pack("<I", len(element)) + element
    image = {"name": "image", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(raw)}}
    text = json.dumps({"inputs": [image], **members}).encode()
    return text + raw, len(text)


def posted(body: bytes, json_bytes: int | None = None, **headers: str) -> dict[str, Any]:
    length = {} if json_bytes is None else {"inference-header-content-length": str(json_bytes)}
    return {"content": body, "headers": length | {name.replace("_", "-"): value for name, value in headers.items()}}


async def test_an_error_is_a_problem_document_that_clients_of_the_protocol_read_too():
    body, json_bytes = inference(photo())
    packed, form = zlib.compress(body), "application/x-www-form-urlencoded"
    wrong = {
        "a length that is none": (posted(body, inference_header_content_length="x"), 400, "0.."),
        "a length beyond the body": (posted(body, len(body) + 1), 400, f"0..{len(body)}"),
        "a length that cuts the JSON": (posted(body, json_bytes - 1), 400, "no JSON"),
        "a body that is cut": (posted(body[:-1], json_bytes), 400, "bytes follow the JSON"),
        "no length": (posted(body), 400, "no UTF-8"),
        "no JSON": (posted(b"{"), 400, "line 1, column 2"),
        "a form": (posted(b"a=b", content_type=form), 415, "application/json"),
        "compressed": (posted(packed, json_bytes, content_encoding="deflate"), 415, "'deflate'"),
        "a picture that is none": (posted(*inference(b"no picture")), 400, "image"),
        "a timeout of nothing": (posted(body, json_bytes, request_timeout="0"), 400, "Request-Timeout"),
    }
    async with door() as (server, client):
        for name, (request, status, said) in wrong.items():
            response = await client.post(INFER, **request)
            code, _, detail = problem(response)
            assert (code, said in detail) == (status, True), (name, detail)
            assert response.json()["error"] == detail
            if status == 415:
                assert response.headers["accept-encoding"] == "identity"
        assert server.upstream.steps == []
        assert problem(await client.get(INFER))[0] == 405
        assert (await client.get("/v2/")).json()["error"]
        assert "error" not in (await client.get("/v1/models/other")).json(), "a member of this protocol alone"
        good = await client.post(INFER, **posted(body, json_bytes, x_request_id="mine-7"))
        assert good.status_code == 200
        assert good.headers["content-type"] == "application/json"
        assert good.headers["x-request-id"] == good.json()["parameters"]["request_id"] == "mine-7"


async def test_a_body_over_the_limit_is_refused_before_it_is_read():
    async with door(max_image_bytes=2**16) as (server, client):
        assert (await client.post(INFER, **posted(*inference(photo())))).status_code == 200
        reader, writer = await asyncio.open_connection(*server.gateway.web_address.split(":"))
        kind = "content-type: application/octet-stream"
        head = (f"POST {INFER} HTTP/1.1", "host: a", kind, "content-length: 9999999")
        writer.write("\r\n".join((*head, "", "")).encode())  # not one byte of the body
        answer = (await reader.read(4000)).decode()
        assert answer.startswith("HTTP/1.1 413 ")
        writer.close()
        large = await client.post(INFER, **posted(*inference(bytes(2**16 + 1))))
        assert (large.status_code, "at most 65536 bytes" in large.json()["error"]) == (400, True)


async def test_before_a_model_is_ready_the_answers_say_so():
    upstream = FakeBackend()
    upstream.workers = 0
    async with door(upstream, ready=False) as (server, client):
        assert (await client.get("/v2/health/live")).json() == {"live": True}
        assert problem(await client.get("/v2/health/ready"))[:2] == (503, "Unavailable")
        assert problem(await client.get("/v2/models/fake/ready"))[0] in (404, 503)
        assert problem(await client.post(INFER, **posted(*inference(photo()))))[:2] == (503, "Unavailable")
        upstream.workers = 1
        await server.gateway.wait_ready(30)
        assert (await client.get("/v2/health/ready")).json() == {"ready": True}
        for path in ("/v2/models/fake", "/v2/models/fake/versions/1.0"):
            assert (await client.get(f"{path}/ready")).json() == {"name": "fake", "ready": True}
            assert (await client.get(path)).json()["versions"] == ["1.0"]
        assert problem(await client.get("/v2/models/fake/versions/2/ready"))[:2] == (404, "NotFound")
        upstream.workers = 0
        await until(lambda: not server.gateway.registry.get("fake").ready)
        assert problem(await client.get("/v2/models/fake/ready"))[:2] == (503, "Unavailable")
        assert (await client.get("/v2/models/fake")).status_code == 200, "it is known, and comes back"


async def test_a_token_is_asked_for_and_nothing_is_told_without(tmp_path: Path):
    _, entry = new_token("reader")
    (tmp_path / "tokens.toml").write_text(entry)
    async with door(tokens=tmp_path / "tokens.toml", ready=False) as (server, client):
        for path in ("", "/models/fake", "/models/other", "/models/fake/ready", "/models/other/ready"):
            code, _, detail = problem(await client.get(f"/v2{path}"))
            assert (code, "fake" in detail) == (401, False), path
        assert problem(await client.post(INFER, **posted(*inference(photo()))))[0] == 401
        await server.gateway.wait_ready(30)
        assert (await client.get("/v2/health/live")).status_code == 200
        assert (await client.get("/v2/health/ready")).status_code == 200


async def test_deadlines_and_clients_that_go_end_an_inference():
    hurried = posted(*inference(photo(), parameters={"explain_method": "score_cam", "timeout": 200_000}))
    patient = posted(*inference(photo(), parameters={"explain_method": "score_cam"}))
    async with door() as (server, client):
        server.upstream.hold()
        assert problem(await client.post(INFER, **hurried))[:2] == (504, "DeadlineExceeded")
        call = asyncio.create_task(client.post(INFER, **patient))
        await until(lambda: server.gateway.calls.active == 1)
        call.cancel()
        await until(lambda: server.gateway.calls.active == 0)
        assert 'code="CANCELLED"' in await server.metrics()


async def test_the_description_fits_the_requests_and_the_answers():
    body, json_bytes = inference(photo(), id="1", outputs=[{"name": "labels"}])
    async with door() as (_, client):
        described = (await client.get("/openapi.json")).json()
        values = {
            "InferenceRequest": json.loads(body[:json_bytes]),
            "InferenceResponse": (await client.post(INFER, **posted(body, json_bytes))).json(),
            "InferenceModel": (await client.get("/v2/models/fake")).json(),
            "InferenceServer": (await client.get("/v2")).json(),
            "Problem": (await client.get("/v2/models/other")).json(),
        }
        ours = [path for path in described["paths"] if path.startswith("/v2")]
        for path in ours:
            known = path.replace("{name}", "fake").replace("{version}", "1.0")
            expected = 405 if "post" in described["paths"][path] else 200
            assert (await client.get(known)).status_code == expected, path
    assert len(ours) == 9
    for name, value in values.items():
        jsonschema.validate(value, {"$ref": f"#/components/schemas/{name}", "components": described["components"]})


async def test_maps_that_no_tensor_can_hold_are_refused_before_any_work():
    parameters = {"explain_method": "score_cam rise:masks=8", "explain_size": "layer"}
    async with door() as (server, client):
        code, _, detail = problem(await client.post(INFER, **posted(*inference(photo(), parameters=parameters))))
        assert (code, "one tensor holds maps of one size" in detail) == (400, True)
        assert server.upstream.steps == []


async def test_a_server_that_ends_takes_no_inference_and_is_not_ready():
    async with door() as (server, client):
        server.upstream.hold()
        running = asyncio.create_task(client.post(INFER, **posted(*inference(photo()))))
        await until(lambda: server.gateway.calls.active == 1)
        ending = asyncio.create_task(server.gateway.stop(30))
        while (await client.get("/v2/health/ready")).status_code == 200:
            await asyncio.sleep(0)
        assert problem(await client.post(INFER, **posted(*inference(photo()))))[:2] == (503, "Unavailable")
        server.upstream.release()
        assert (await running).status_code == 200
        await ending


@pytest.mark.parametrize("coding", ["gzip", "br", "identity, gzip"])
async def test_no_path_takes_a_compressed_body(coding: str):
    async with door() as (_, client):
        response = await client.post("/v1/explain", content=b"{}", headers={"content-encoding": coding})
        assert problem(response)[0] == 415


async def test_an_answer_has_its_evidence_record(tmp_path: Path):
    path = tmp_path / "evidence.jsonl"
    async with door(evidence_log=path) as (_, client):
        response = await client.post(INFER, **posted(*inference(photo(), parameters={"binary_data_output": True})))
    (record,) = map(json.loads, path.read_text().splitlines())
    assert response.headers["content-type"] == "application/octet-stream"
    assert record["reply"]["door"] == "inference.GRPCInferenceService/ModelInfer"
    assert record["reply"]["sha256"] == hashlib.sha256(response.content).hexdigest()

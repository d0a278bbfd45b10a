"""The HTTP door of a whole gateway, over the shipped fake: the same answers as by gRPC, and problems in words."""

from __future__ import annotations

import asyncio
import base64
import json
import resource
import select
import socket
import ssl
import sys
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import httpx
import jsonschema
import numpy as np
import pytest
from gateway_harness import GRAD, SCORE, ask, certified, photo, serving
from google.protobuf import json_format

from camserve.errors import InvalidOption
from camserve.gateway.api.access import new_token
from camserve.gateway.api.status import STATUS, abort
from camserve.gateway.ops.settings import Settings
from camserve.gateway.pool.fake import MODEL, FakeBackend
from camserve.gateway.web import connections
from camserve.gateway.web.problems import HTTP_STATUS, PROBLEM_TYPE
from camserve.images import mask_file
from camserve.types.model import TextInput
from camserve.v1 import explain_pb2 as pb

IMAGE = base64.b64encode(photo()).decode()


@asynccontextmanager
async def door(upstream: FakeBackend | None = None, ready: bool = True, **settings):
    """A gateway with its HTTP door, and an HTTP client of it."""
    async with serving(upstream, ready, web_listen="127.0.0.1:0", **settings) as server:
        address = f"http://{server.gateway.web_address}"
        async with httpx.AsyncClient(base_url=address, timeout=60, trust_env=False) as client:
            yield server, client


def problem(response: httpx.Response) -> tuple[int, str, str]:
    """(status, kind, detail) of a problem document."""
    assert response.headers["content-type"] == PROBLEM_TYPE
    found = response.json()
    assert found["status"] == response.status_code
    assert found["request_id"] == response.headers["x-request-id"]
    assert found["title"]
    return response.status_code, found["kind"], found["detail"]


def events(text: str) -> list[tuple[str, dict]]:
    found = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n", 1)
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


async def test_an_answer_is_that_of_grpc():
    request = ask(GRAD, SCORE, targets=[pb.Target(top_k=2)], evaluate=True)
    async with door() as (server, client):
        typed = await server.stub.Explain(request)
        sent = json_format.MessageToDict(request)
        response = await client.post("/v1/explain", json=sent, headers={"x-request-id": "mine-1"})
        assert response.status_code == 200
        assert response.headers["x-request-id"] == "mine-1"
        found = json_format.ParseDict(response.json(), pb.ExplainReply())
        assert found.request_id == "mine-1"
        assert found.maps == typed.maps
        assert found.predictions == typed.predictions
        names = json_format.MessageToDict(request, preserving_proto_field_name=True)
        again = await client.post("/v1/explain", json=names)
        assert json_format.ParseDict(again.json(), pb.ExplainReply()).maps == typed.maps
        assert 'camserve_request_seconds_count{class="normal",code="OK",method="several",model="fake"} 3.0' in (
            await server.metrics()
        )


async def test_a_form_has_the_file_and_the_request():
    async with door() as (_, client):
        given = json.dumps({"targets": [{"label": "tabby"}], "output": {"encoding": "PNG"}})
        form = {"image": ("cat.png", photo()), "request": (None, given, "application/json")}
        response = await client.post("/v1/explain", files=form)
        assert response.status_code == 200
        (saliency,) = response.json()["maps"]
        assert base64.b64decode(saliency["data"]).startswith(b"\x89PNG")
        assert saliency["targetText"] == "tabby"
        alone = await client.post("/v1/explain", files={"image": photo()})
        assert alone.json()["maps"][0]["method"] == {"gradCam": {}}


async def test_a_text_is_a_target_here_too():
    model = replace(MODEL, name="fake", outputs="text-image", labels=("a cat", "a dog"), dimension=3)
    async with door(FakeBackend([model])) as (_, client):
        body = {"image": {"encoded": IMAGE}, "targets": [{"text": "a cat; asleep, 3"}]}
        found = (await client.post("/v1/explain", json=body)).json()
    assert found["maps"][0]["targetText"] == "text:a cat; asleep, 3"
    assert [(one["probability"], one["similarity"]) for one in found["predictions"]] == [(0.5, 0.5), (0.25, 0.25)]


async def test_a_region_is_a_box_or_a_mask_here_too():
    places = replace(MODEL, name="fake", outputs="segmentation")
    mask = np.zeros((60, 80), bool)  # the size of `photo()`
    mask[3:20, 5:30] = True
    box = {"x0": 1, "y0": 2, "x1": 30, "y1": 20.5}
    sent = [
        {"region": {"of": {"index": 1}, "box": box}},
        {"region": {"contrast": {"of": {"index": 1}, "than": [{"index": 2}]}, "box": box}},
        {"region": {"of": {"label": "cup"}, "mask": base64.b64encode(mask_file(mask)).decode()}},
    ]
    typed = [
        pb.Target(region=pb.Region(of=pb.ClassTarget(index=1), box=pb.Edges(**box))),
        pb.Target(
            region=pb.Region(
                contrast=pb.Contrast(of=pb.ClassTarget(index=1), than=[pb.ClassTarget(index=2)]), box=pb.Edges(**box)
            )
        ),
        pb.Target(region=pb.Region(of=pb.ClassTarget(label="cup"), mask=mask_file(mask))),
    ]
    async with door(FakeBackend([places])) as (server, client):
        expected = await server.stub.Explain(ask(GRAD, targets=typed))
        body = {"image": {"encoded": IMAGE}, "methods": [{"gradCam": {}}], "targets": sent}
        answer = await client.post("/v1/explain", json=body)
        found = json_format.ParseDict(answer.json(), pb.ExplainReply())
    assert found.maps == expected.maps
    texts = [one.target_text for one in found.maps]
    assert texts[:2] == ["region:1,2,30,20.5:tiger_cat", "region:1,2,30,20.5:contrast:tiger_cat>Egyptian_cat"]
    assert texts[2].startswith("region:")


async def test_a_text_beside_the_image_reaches_the_network():
    asked = replace(MODEL, outputs="answers", text=TextInput("question", "is it a cat?", required=True, most_tokens=8))
    async with door(FakeBackend([asked])) as (server, client):
        body = {"image": {"encoded": IMAGE}, "targets": [{"index": 1}]}
        assert "is it a cat?" in problem(await client.post("/v1/explain", json=body))[2]
        for text in ("is it a dog?", "is it a boat?"):
            assert (await client.post("/v1/explain", json=body | {"text": text})).status_code == 200
        described = (await client.get("/v1/models/fake")).json()["text"]
    assert [item.text for step in server.upstream.steps for item in step] == ["is it a dog?", "is it a boat?"]
    assert (described["what"], described["example"]) == ("question", "is it a cat?")


async def test_a_stream_has_news_and_then_the_reply():
    async with door() as (_, client):
        body = {"image": {"encoded": IMAGE}, "methods": [{"scoreCam": {}}], "stream": {"maxMaps": 1}}
        response = await client.post("/v1/explain:stream", json=body)
        assert response.headers["content-type"] == "text/event-stream"
        found = events(response.text)
        assert [name for name, _ in found][-1] == "reply"
        assert {name for name, _ in found[:-1]} == {"progress"}
        assert found[0][1]["predictions"]
        assert found[-1][1]["maps"][0]["complete"] is True


async def test_models_and_health():
    async with door() as (server, client):
        listed = (await client.get("/v1/models")).json()
        assert [(model["name"], model["ready"]) for model in listed["models"]] == [("fake", True)]
        typed = await server.stub.GetModel(pb.GetModelRequest(name="fake"))
        assert json_format.ParseDict((await client.get("/v1/models/fake")).json(), pb.Model()) == typed
        assert problem(await client.get("/v1/models/other"))[:2] == (404, "NotFound")
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.get("/readyz")).json()["models"] == ["fake"]
    async with door(ready=False, upstream=FakeBackend([])) as (_, client):
        assert (await client.get("/healthz")).status_code == 200
        assert problem(await client.get("/readyz"))[:2] == (503, "Unavailable")


BAD = {
    "no JSON": (b'{"image": ', {}, 400, "line 1, column 11"),
    "no UTF-8": (b'{"model": "\xff"}', {}, 400, "no UTF-8"),
    "no object": (b"[1]", {}, 400, "a JSON object"),
    "a name twice": (b'{"model": "a", "model": "b"}', {}, 400, "'model' is there twice"),
    "NaN": (b'{"topPredictions": NaN}', {}, 400, "NaN is no number"),
    "deep": (b'{"image":' * 100_000, {}, 400, "no JSON"),
    "an unknown field": (b'{"metods": []}', {}, 400, "unknown field 'metods'; did you mean methods"),
    "an unknown field inside": (b'{"output": {"sise": 1}}', {}, 400, "unknown field 'output.sise'; did you mean size"),
    "a field of an element": (b'{"targets": [{}, {"lable": 1}]}', {}, 400, "'targets[1].lable'; did you mean label"),
    "an empty text": (
        b'{"image": {"encoded": "AAAA"}, "targets": [{"text": " "}]}',
        {},
        400,
        "a text target has words",
    ),
    "half a character": (b'{"targets": [{"text": "\\ud83d"}]}', {}, 400, "targets[0].text"),
    "no base64": (b'{"image": {"encoded": "no base64!"}}', {}, 400, "image.encoded is no base64"),
    "a wrong type": (b'{"topPredictions": "many"}', {}, 400, "topPredictions"),
    "no image": (b"{}", {}, 400, "no image"),
    "an image that is none": (b'{"image": {"encoded": "AAAA"}}', {}, 400, "image"),
    "a type of its own": (b"{}", {"content-type": "text/plain"}, 415, "application/json or multipart/form-data"),
    "no type": (b"{}", {"content-type": ""}, 415, "no content type"),
    "a form without boundary": (b"{}", {"content-type": "multipart/form-data"}, 400, "boundary"),
    "a form that is none": (b"{}", {"content-type": "multipart/form-data; boundary=x"}, 400, "form"),
    "a form without file": (
        b'--x\r\nContent-Disposition: form-data; name="request"\r\n\r\n{}\r\n--x--\r\n',
        {"content-type": "multipart/form-data; boundary=x"},
        400,
        "no file 'image'; it has 'request'",
    ),
    "a timeout that is none": (b"{}", {"request-timeout": "soon"}, 400, "Request-Timeout"),
    "a timeout of nothing": (b"{}", {"request-timeout": "0"}, 400, "Request-Timeout"),
}


@pytest.mark.parametrize("name", BAD)
async def test_bad_input_gets_a_problem_document_and_reaches_no_worker(name):
    body, headers, status, said = BAD[name]
    async with door() as (server, client):
        steps = len(server.upstream.steps)
        response = await client.post(
            "/v1/explain", content=body, headers={"content-type": "application/json"} | headers
        )
        code, _, detail = problem(response)
        assert code == status
        assert said in detail
        assert len(detail) < 400
        assert len(server.upstream.steps) == steps
        good = await client.post("/v1/explain", json={"image": {"encoded": IMAGE}})
        assert good.status_code == 200, "the connection, and the server, go on"


async def test_a_body_over_the_limit_is_refused_before_it_is_read():
    async with door(max_image_bytes=2**16) as (server, client):
        small = await client.post("/v1/explain", json={"image": {"encoded": IMAGE}})
        assert small.status_code == 200
        reader, writer = await asyncio.open_connection(*server.gateway.web_address.split(":"))
        head = ("POST /v1/explain HTTP/1.1", "host: a", "content-type: application/json", "content-length: 99999999")
        writer.write("\r\n".join((*head, "", "")).encode())  # not one byte of the body
        answer = (await reader.read(2000)).decode()
        assert answer.startswith("HTTP/1.1 413 ")
        assert "connection: close" in answer.lower()
        writer.close()

        async def chunks():
            for _ in range(64):
                yield b"a" * 2**16

        response = await client.post("/v1/explain", content=chunks(), headers={"content-type": "application/json"})
        assert problem(response)[:2] == (413, "ContentTooLarge")


async def test_paths_and_methods_that_there_are_not():
    async with door() as (_, client):
        code, _, detail = problem(await client.get("/v3"))
        assert code == 404
        assert "/v1/explain" in detail
        assert problem(await client.get("/v1/explain"))[0] == 405
        assert problem(await client.delete("/v1/models"))[0] == 405


async def test_a_token_is_asked_for_and_nothing_is_told_without(tmp_path):
    secret, entry = new_token("reader", priority="batch")
    (tmp_path / "tokens.toml").write_text(entry)
    async with door(tokens=tmp_path / "tokens.toml", ready=False) as (server, client):
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic a"}):
            for path in ("/v1/models", "/v1/models/fake", "/v1/models/other"):
                response = await client.get(path, headers=headers)
                assert problem(response)[:2] == (401, "Unauthenticated")
                assert response.headers["www-authenticate"].startswith("Bearer")
                assert "fake" not in response.json()["detail"]
            response = await client.post("/v1/explain", json={"image": {"encoded": IMAGE}}, headers=headers)
            assert problem(response)[0] == 401
        assert (await client.get("/healthz")).status_code == 200
        await server.gateway.wait_ready(30)
        mine = {"authorization": f"Bearer {secret}"}
        body = {"image": {"encoded": IMAGE}, "priority": "INTERACTIVE"}
        assert (await client.post("/v1/explain", json=body, headers=mine)).status_code == 200
        assert 'class="batch",code="OK"' in await server.metrics(), "the class is capped as by gRPC"


async def test_overload_says_when_to_come_back():
    async with door(max_calls=1) as (server, client):
        server.upstream.hold()
        body = {"image": {"encoded": IMAGE}}
        first = asyncio.create_task(client.post("/v1/explain", json=body))
        await until(lambda: server.gateway.calls.active == 1)
        response = await client.post("/v1/explain", json=body)
        assert problem(response)[:2] == (429, "Overloaded")
        assert int(response.headers["retry-after"]) >= 1
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)


async def test_a_deadline_is_kept():
    async with door() as (server, client):
        server.upstream.hold()
        response = await client.post(
            "/v1/explain", json={"image": {"encoded": IMAGE}}, headers={"request-timeout": "0.2"}
        )
        assert problem(response)[:2] == (504, "DeadlineExceeded")


async def test_a_stream_that_has_begun_ends_with_the_problem():
    async with door() as (server, client):
        server.upstream.hold()
        server.upstream.release(1)
        body = {"image": {"encoded": IMAGE}, "methods": [{"scoreCam": {}}]}
        headers = {"request-timeout": "1.5"}
        response = await client.post("/v1/explain:stream", json=body, headers=headers)
        found = events(response.text)
    assert response.status_code == 200, "it was said before anybody knew"
    assert [name for name, _ in found] == ["progress", "problem"]
    told = found[-1][1]
    assert (told["status"], told["kind"]) == (504, "DeadlineExceeded")
    assert told["request_id"] == response.headers["x-request-id"]


async def test_a_client_that_goes_ends_its_call():
    async with door() as (server, client):
        server.upstream.hold()
        call = asyncio.create_task(client.post("/v1/explain", json={"image": {"encoded": IMAGE}}))
        await until(lambda: server.gateway.calls.active == 1)
        call.cancel()
        await until(lambda: server.gateway.calls.active == 0)
        assert 'code="CANCELLED"' in await server.metrics()


async def test_a_connection_that_asks_nothing_is_closed_and_holds_nobody_up(monkeypatch):
    monkeypatch.setattr(connections, "HEAD_S", 0.5)
    async with door() as (server, client):
        idle = [await connected(server) for _ in range(200)]
        assert (await client.post("/v1/explain", json={"image": {"encoded": IMAGE}})).status_code == 200
        async with asyncio.timeout(60):
            assert {await reader.read() for reader, _ in idle} == {b""}


async def test_half_a_head_is_told_that_it_is_late_for_a_first_request_and_a_second(monkeypatch):
    monkeypatch.setattr(connections, "HEAD_S", 0.5)
    async with door() as (server, client):
        reader, writer = await connected(server)
        writer.write(b"POST /v1/explain HTTP/1.1\r\nhost: ")
        assert (await client.post("/v1/explain", json={"image": {"encoded": IMAGE}})).status_code == 200
        assert raw_problem(await read(reader)) == (408, "DeadlineExceeded")
        reader, writer = await connected(server)
        writer.write(b"GET /healthz HTTP/1.1\r\nhost: a\r\n\r\n")
        async with asyncio.timeout(60):
            assert b" 200 " in await reader.readline()
            await reader.readuntil(b"SERVING")
        writer.write(b"GET /healthz HTTP/1.1\r\nhost: ")
        assert raw_problem((await read(reader)).partition(b"HTTP/1.1 ")[2]) == (408, "DeadlineExceeded")


async def test_a_thousand_connections_that_ask_nothing_leave_room_for_one_that_does(monkeypatch):
    """The place is that of the one that has asked nothing for longest."""
    files(3000)
    monkeypatch.setattr(connections, "HEAD_S", 600.0)
    async with door() as (server, client):
        idle = [await connected(server) for _ in range(connections.MOST)]
        response = await client.post("/v1/explain", json={"image": {"encoded": IMAGE}})
        assert response.status_code == 200
        assert await read(idle[0][0]) == b""
        assert not any(reader.at_eof() for reader, _ in idle[1:])


FLOOD = """
import socket, sys
host, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
held = [socket.create_connection((host, port)) for _ in range(count)]
print("connected", flush=True)
sys.stdin.read()
"""


async def test_connections_leave_files_for_everything_else():
    """They come from another process, so that the files are the server's alone."""
    files(3000)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    try:
        async with door() as (server, client):
            host, port = server.gateway.web_address.split(":")
            flood = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", FLOOD, host, port, "1500"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard)),
            )
            assert await flood.stdout.readline() == b"connected\n"
            response = await client.post("/v1/explain", json={"image": {"encoded": IMAGE}})
            assert response.status_code == 200
            await flood.communicate(b"")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_where_all_connections_are_being_answered_one_more_is_told_so(monkeypatch):
    monkeypatch.setattr(connections, "MOST", 2)
    async with door() as (server, client):
        server.upstream.hold()
        body = {"image": {"encoded": IMAGE}}
        running = [asyncio.create_task(client.post("/v1/explain", json=body)) for _ in range(2)]
        await until(lambda: server.gateway.calls.active == 2)
        reader, _ = await connected(server)
        answer = await read(reader)
        assert raw_problem(answer) == (503, "Overloaded")
        assert b"retry-after: 1" in answer
        server.upstream.release()
        assert [(await one).status_code for one in running] == [200, 200]
        assert (await client.get("/healthz")).status_code == 200, "their places are free again"


async def test_a_client_that_takes_nothing_loses_its_connection(monkeypatch):
    monkeypatch.setattr(connections, "SEND_S", 0.3)
    async with door() as (server, client):
        host, port = server.gateway.web_address.split(":")
        with socket.create_connection((host, int(port))) as taker:
            taker.setblocking(False)
            asked = b"GET /openapi.json HTTP/1.1\r\nhost: a\r\n\r\n" * 1000
            poller = select.poll()
            poller.register(taker, select.POLLHUP | select.POLLERR)

            def gone() -> bool:
                with suppress(BlockingIOError, ConnectionError):
                    taker.send(asked)
                return bool(poller.poll(0))

            await until(gone)
        assert (await client.get("/healthz")).status_code == 200


async def test_a_client_that_closes_its_half_ends_its_call_and_reaches_no_worker():
    async with door() as (server, client):
        steps = len(server.upstream.steps)
        reader, writer = await connected(server)
        head = ("POST /v1/explain HTTP/1.1", "host: a", "content-type: application/json", "content-length: 100")
        writer.write("\r\n".join((*head, "", "{")).encode())
        await until(lambda: server.gateway.calls.active == 1)
        writer.write_eof()
        await until(lambda: server.gateway.calls.active == 0)
        assert await read(reader) == b""
        assert len(server.upstream.steps) == steps
        assert (await client.post("/v1/explain", json={"image": {"encoded": IMAGE}})).status_code == 200


@pytest.mark.parametrize(
    "sent",
    [
        b"hello\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",  # TLS
        b"GET /healthz HTTP/1.1\r\n\r\n",  # no host
        b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"a" * 20_000,
        b"POST /v1/explain HTTP/1.1\r\nhost: a\r\ncontent-length: many\r\n\r\n",
        b"POST /v1/explain HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
    ],
)
async def test_what_is_no_http_gets_a_problem_document(sent):
    async with door(ready=False) as (server, client):
        reader, writer = await connected(server)
        writer.write(sent)
        assert raw_problem(await read(reader)) == (400, "InvalidInput")
        assert (await client.get("/healthz")).status_code == 200


async def test_a_body_that_does_not_come_ends_at_the_deadline_and_holds_nobody_up():
    async with door(default_deadline_s=1.0) as (server, client):
        reader, writer = await asyncio.open_connection(*server.gateway.web_address.split(":"))
        head = ("POST /v1/explain HTTP/1.1", "host: a", "content-type: application/json", "content-length: 100")
        writer.write("\r\n".join((*head, "", "{")).encode())
        assert (await client.post("/v1/explain", json={"image": {"encoded": IMAGE}})).status_code == 200
        async with asyncio.timeout(60):
            answer = (await reader.read(2000)).decode()
        assert answer.startswith("HTTP/1.1 504 ")
        writer.close()


async def test_the_description_fits_the_answers_and_the_proto():
    async with door() as (_, client):
        described = (await client.get("/openapi.json")).json()
        request = {"image": {"encoded": IMAGE}, "methods": [{"groupCam": {"groups": 4}}], "output": {"boxes": {}}}
        reply = (await client.post("/v1/explain", json=request)).json()
        model = (await client.get("/v1/models/fake")).json()
        paths = problem(await client.get("/nothing"))[2]
    assert all(path in paths for path in described["paths"])
    for name, value in (("ExplainRequest", request), ("ExplainReply", reply), ("Model", model)):
        schema = {"$ref": f"#/components/schemas/{name}", "components": described["components"]}
        jsonschema.validate(value, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"metods": []}, {"$ref": "#/components/schemas/ExplainRequest", **described})
    for name, message in pb.DESCRIPTOR.message_types_by_name.items():
        if name in described["components"]["schemas"]:
            named = {field.json_name for field in message.fields}
            assert set(described["components"]["schemas"][name]["properties"]) == named


def test_every_status_of_grpc_has_one_of_http():
    assert set(STATUS.values()) == set(HTTP_STATUS)


async def test_the_door_has_the_certificates_of_the_grpc_port(tmp_path):
    _, names = certified(tmp_path)
    async with serving(web_listen="127.0.0.1:0", ready=False, **names) as server:
        context = ssl.create_default_context(cafile=tmp_path / "ca.pem")
        async with httpx.AsyncClient(verify=context, trust_env=False) as client:
            assert (await client.get(f"https://{server.gateway.web_address}/healthz")).status_code == 200
        async with httpx.AsyncClient(trust_env=False) as client:
            with pytest.raises(httpx.HTTPError):
                await client.get(f"http://{server.gateway.web_address}/healthz")


async def test_handshakes_that_do_not_come_take_no_place_from_one_that_does(tmp_path, monkeypatch):
    monkeypatch.setattr(connections, "MOST", 4)
    _, names = certified(tmp_path)
    async with serving(web_listen="127.0.0.1:0", ready=False, **names) as server:
        idle = [await connected(server) for _ in range(4)]
        context = ssl.create_default_context(cafile=tmp_path / "ca.pem")
        async with httpx.AsyncClient(verify=context, trust_env=False) as client:
            assert (await client.get(f"https://{server.gateway.web_address}/healthz")).status_code == 200
        assert await read(idle[0][0]) == b""
        monkeypatch.setattr(connections, "HEAD_S", 0.5)
        reader, writer = await connected(server)
        writer.write(b"GET / HTTP/1.1\r\n")  # plain text
        assert b"HTTP" not in await read(reader)
        reader, _ = await connected(server)
        assert await read(reader) == b"", "it is closed in time"


async def test_a_request_that_comes_with_the_end_of_the_handshake_is_answered(tmp_path):
    ca, names = certified(tmp_path)
    async with serving(web_listen="127.0.0.1:0", ready=False, **names) as server:
        context = ssl.create_default_context()
        ca.configure_trust(context)
        came, goes = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = context.wrap_bio(came, goes, server_hostname="127.0.0.1")
        reader, writer = await connected(server)
        while True:
            try:
                client.do_handshake()
                break
            except ssl.SSLWantReadError:
                writer.write(goes.read())
                came.write(await reader.read(2**16))
        client.write(b"GET /healthz HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        writer.write(goes.read())  # the last of the handshake and the request, at once
        answer = b""
        while not answer:  # not up to the end: the server waits half a minute for the client's goodbye
            part = await reader.read(2**16)
            assert part, "it is closed without an answer"
            came.write(part)
            with suppress(ssl.SSLWantReadError):
                answer = client.read(2**16)
        assert answer.startswith(b"HTTP/1.1 200 ")


def test_plain_text_for_other_machines_is_refused():
    with pytest.raises(InvalidOption, match=r"CAMSERVE_WEB_LISTEN=0\.0\.0\.0:1 would take plain text"):
        Settings.load(web_listen="0.0.0.0:1")


async def test_http_1_0_is_answered():
    async with door() as (server, _):
        reader, writer = await asyncio.open_connection(*server.gateway.web_address.split(":"))
        writer.write(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert b" 200 " in (await reader.read()).splitlines()[0]
        writer.close()


async def test_a_server_that_ends_takes_nothing_new():
    async with door() as (server, client):
        server.upstream.hold()
        running = asyncio.create_task(client.post("/v1/explain", json={"image": {"encoded": IMAGE}}))
        await until(lambda: server.gateway.calls.active == 1)
        ending = asyncio.create_task(server.gateway.stop(30))
        while (await client.get("/readyz")).status_code == 200:  # the test's own timeout is the bound
            pass
        assert problem(await client.get("/readyz"))[0] == 503
        assert problem(await client.get("/v1/models"))[:2] == (503, "Unavailable")
        server.upstream.release()
        assert (await running).status_code == 200
        await ending


async def test_a_post_by_http_1_0_is_answered_and_streamed():
    async with door() as (server, _):
        body = json.dumps({"image": {"encoded": IMAGE}}).encode()
        for path, last in ((b"/v1/explain", b"}"), (b"/v1/explain:stream", b"\n\n")):
            reader, writer = await connected(server)
            head = b"POST %s HTTP/1.0\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
            writer.write(head % (path, len(body)) + body)
            answer = await read(reader)
            assert b" 200 " in answer.splitlines()[0]
            assert b"transfer-encoding" not in answer.lower()
            assert answer.endswith(last)


async def test_a_head_is_told_as_of_a_get_and_a_wrong_method_which_ones_there_are():
    async with door() as (_, client):
        for path in ("/", "/healthz", "/v1/models"):
            got, told = await client.get(path), await client.head(path)
            assert (told.status_code, told.content) == (200, b"")
            assert told.headers["content-type"] == got.headers["content-type"]
        assert (await client.delete("/v1/models")).headers["allow"] == "GET, HEAD"
        assert (await client.get("/v1/explain")).headers["allow"] == "POST"


async def connected(server) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = server.gateway.web_address.split(":")
    return await asyncio.open_connection(host, port)


async def read(reader: asyncio.StreamReader) -> bytes:
    """All that comes until the server closes the connection."""
    async with asyncio.timeout(60):
        return await reader.read()


def raw_problem(answer: bytes) -> tuple[int, str]:
    """(status, kind) of a problem document, as it came from the socket."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert f"content-type: {PROBLEM_TYPE}".encode() in head.lower()
    assert b"connection: close" in head.lower()
    found = json.loads(body)
    assert str(found["status"]).encode() in head.splitlines()[0]
    return found["status"], found["kind"]


def files(count: int) -> None:
    """Allows this process to have so many files open, where the machine lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        pytest.skip(f"a process of this machine has at most {hard} files open")
    if soft != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count), hard))


async def until(holds) -> None:
    async with asyncio.timeout(60):
        while not holds():
            await asyncio.sleep(0.01)


async def test_a_stop_at_once_tells_every_running_call_why():
    async with door(step_queries=8) as (server, client):
        server.upstream.hold()
        body = {"image": {"encoded": IMAGE}, "methods": [{"scoreCam": {}}]}
        calls = [asyncio.create_task(client.post("/v1/explain", json=body)) for _ in range(3)]
        await until(lambda: server.gateway.calls.active == 3)
        await server.gateway.stop(0)
        for response in await asyncio.gather(*calls):
            assert problem(response) == (503, "Unavailable", "the server is shutting down")


async def test_a_stop_waits_until_a_client_was_told_of_its_error(monkeypatch):
    answered, go_on = asyncio.Event(), asyncio.Event()

    async def late(*arguments):
        answered.set()
        await go_on.wait()
        await abort(*arguments)

    monkeypatch.setattr("camserve.gateway.api.calls.abort", late)
    monkeypatch.setattr("camserve.gateway.server.LAST_WORDS_S", 20.0)  # however busy the machine is
    async with door() as (server, client):
        call = asyncio.create_task(client.post("/v1/explain", json={"image": {"encoded": "AAAA"}}))
        await answered.wait()
        stopping = asyncio.create_task(server.gateway.stop())
        await asyncio.sleep(0.3)  # several of the moments at which uvicorn looks whether it shall end
        assert not stopping.done()
        go_on.set()
        assert (await call).status_code == 400
        await stopping

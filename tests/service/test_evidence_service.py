"""Evidence records of a whole gateway, by every door: in replies that ask for them, and in the log of every answer."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from gateway_harness import (
    GRAD,
    PATIENT,
    QUICK,
    SCORE,
    TO_THE_MARGIN,
    ask,
    failure,
    jump,
    merged,
    photo,
    serving,
    until,
)
from google.protobuf import json_format

from camserve import Client
from camserve.codecs import v1
from camserve.errors import InvalidOption
from camserve.evidence.canonical import canonical, sha256
from camserve.evidence.log import full_files
from camserve.evidence.verify import parsed, verify
from camserve.gateway.api.access import new_token
from camserve.gateway.ops.settings import Settings
from camserve.gateway.pool.discovery import fixed
from camserve.gateway.pool.fake import MODEL, FakeBackend
from camserve.gateway.server import Gateway
from camserve.oip import inference_pb2 as oip
from camserve.oip import inference_pb2_grpc
from camserve.types.model import TextInput
from camserve.v1 import explain_pb2 as pb

PAGE = (Path(__file__).parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "evidence" / "evidence.jsonl"


def records(path: Path) -> list[dict[str, Any]]:
    return [parsed(line) for line in path.read_bytes().split(b"\n")[:-1]]


def infer() -> oip.ModelInferRequest:
    tensor = oip.ModelInferRequest.InferInputTensor(name="image", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(photo())
    request = oip.ModelInferRequest(model_name="fake")
    request.inputs.append(tensor)
    return request


def check(reply: pb.ExplainReply, sent: bytes) -> dict[str, Any]:
    """Holds a reply against its record, and returns that."""
    record = parsed(reply.evidence.encode())
    assert record["image"] == {"sha256": sha256(sent), "bytes": len(sent), "form": "file"}
    assert record["request_id"] == reply.request_id
    assert record["reply"]["sha256"] == sha256(v1.canonical_reply(reply))
    assert [one["sha256"] for one in record["maps"]] == [sha256(saliency.data) for saliency in reply.maps]
    assert [one["shape"] for one in record["maps"]] == [list(saliency.shape) for saliency in reply.maps]
    assert [one["target"] for one in record["maps"]] == [saliency.target_text for saliency in reply.maps]
    assert record["queries"] == reply.cost.queries
    return record


async def test_a_reply_has_its_record_by_every_door():
    request = ask(GRAD, SCORE, targets=[pb.Target(top_k=2)], evaluate=True, evidence=True, precision="EXACT")
    async with serving(web_listen="127.0.0.1:0") as server:
        found = [check(await server.stub.Explain(request), photo())]
        updates = [update async for update in server.stub.StreamExplain(request)]
        assert not any(update.HasField("progress") and "evidence" in str(update) for update in updates)
        found.append(check(updates[-1].reply, photo()))
        address = f"http://{server.gateway.web_address}"
        async with httpx.AsyncClient(base_url=address, timeout=60, trust_env=False) as client:
            sent = json_format.MessageToDict(request)
            response = await client.post("/v1/explain", json=sent)
            found.append(check(json_format.ParseDict(response.json(), pb.ExplainReply()), photo()))
            response = await client.post("/v1/explain:stream", json=sent)
            last = response.text.strip().split("\n\n")[-1].partition("data: ")[2]
            found.append(check(json_format.Parse(last, pb.ExplainReply()), photo()))
    doors = [one.pop("reply")["door"].rpartition("/")[2] for one in found]
    assert doors == ["Explain", "StreamExplain", "Explain", "StreamExplain"]
    for one in found:
        del one["time"], one["request_id"]
    assert found == found[:1] * 4
    first = found[0]
    assert not {"number", "previous"} & first.keys()
    assert first["methods"][1] == {
        "name": "score_cam",
        "parameters": {"variant": "reference", "normalise": "after", "tolerance": 0},
    }
    assert first["targets"] == [{"top_k": 2}]
    assert first["model"] == {"name": "fake", "version": MODEL.version, "weights": MODEL.weights}
    assert first["precision"] == {"asked": "exact", "used": "exact"}
    assert (first["evaluation_steps"], len(first["maps"])) == (28, 4)
    assert all(one["faithfulness"]["protocol"] == "rise" for one in first["maps"])
    assert first["workers"] == [{"camserve": "fake"}]
    assert first["preprocessing"] == {"resize_px": 8}


async def test_there_is_no_record_unless_it_is_asked_for(path: Path):
    async with serving() as server:
        assert not (await server.stub.Explain(ask(GRAD))).evidence
    async with serving(evidence_log=path) as server:
        assert not (await server.stub.Explain(ask(GRAD))).evidence
        asked = await server.stub.Explain(ask(GRAD, evidence=True))
    assert records(path)[1] == check(asked, photo())


async def test_the_log_has_every_answer_and_nothing_of_the_image_or_the_secret(path: Path, tmp_path: Path):
    secret, entry = new_token("ann")
    (tmp_path / "tokens.toml").write_text(entry)
    sent = (("authorization", f"Bearer {secret}"), ("x-request-id", "mine"))
    image = photo(4, (200, 300))
    settings = {"evidence_log": path, "tokens": tmp_path / "tokens.toml", "web_listen": "127.0.0.1:0"}
    async with serving(**settings) as server:
        await server.stub.Explain(ask(GRAD, image=image), metadata=sent)
        inference = inference_pb2_grpc.GRPCInferenceServiceStub(server.channel)
        await inference.ModelInfer(infer(), metadata=sent)
        assert [update async for update in server.stub.StreamExplain(ask(GRAD), metadata=sent)]
        await server.stub.Explain(ask(predictions_only=True), metadata=sent)
        assert (await failure(server.stub.Explain(ask(GRAD, image=b"none"), metadata=sent)))[0] == "INVALID_ARGUMENT"
        assert (await failure(server.stub.Explain(ask(GRAD))))[0] == "UNAUTHENTICATED"
        told = await server.metrics()
    assert "camserve_evidence_records_total 4.0" in told
    assert "camserve_evidence_failures_total 0.0" in told
    found = records(path)
    assert verify([path]).records == 4
    assert [one["reply"]["door"].rpartition("/")[2] for one in found] == [
        *("Explain", "ModelInfer", "StreamExplain", "Explain")
    ]
    assert {(one["token"], one["request_id"]) for one in found} == {("ann", "mine")}
    assert [len(one["maps"]) for one in found] == [1, 1, 1, 0]
    content = path.read_bytes()
    assert secret.encode() not in content
    assert not any(base64.b64encode(image)[at : at + 40] in content for at in range(0, 2000, 40))


async def test_words_of_a_request_are_hashes(path: Path):
    model = replace(MODEL, outputs="answers", text=TextInput("question", "what?", True, 32))
    async with serving(FakeBackend([model]), evidence_log=path) as server:
        await server.stub.Explain(ask(SCORE, text="is Ann Smith ill?", targets=[pb.Target(index=1)]))
    assert b"Smith" not in path.read_bytes()
    assert records(path)[0]["text"] == {"sha256": sha256(b"is Ann Smith ill?"), "bytes": 17}


async def test_no_reply_leaves_without_its_record(path: Path):
    async with serving(evidence_log=path) as server:
        await server.stub.Explain(ask(GRAD))
        shutil.rmtree(path.parent)
        code, text, kind = await failure(server.stub.Explain(ask(GRAD)))
        assert (code, kind) == ("UNAVAILABLE", "Unavailable")
        assert text == "this server keeps evidence of every answer, and cannot write it now; try again later"
        assert (await server.stub.ListModels(pb.ListModelsRequest())).models[0].ready
        path.parent.mkdir()
        assert (await server.stub.Explain(ask(GRAD))).maps
        told = await server.metrics()
    assert "camserve_evidence_records_total 2.0" in told
    assert "camserve_evidence_failures_total 1.0" in told
    assert verify([path]).first == 2


@pytest.fixture
def slow_disk(monkeypatch):
    """Has every sync wait; returns what tells that one waits, and what lets all go on."""
    waits, goes_on, sync = threading.Event(), threading.Event(), os.fdatasync

    def slow(descriptor: int) -> None:
        waits.set()
        goes_on.wait(60)
        sync(descriptor)

    monkeypatch.setattr(os, "fdatasync", slow)
    yield waits, goes_on
    goes_on.set()


async def test_a_slow_disk_holds_up_nobody_else(path: Path, slow_disk: tuple[threading.Event, threading.Event]):
    waits, goes_on = slow_disk
    async with serving(evidence_log=path) as server:
        call = server.stub.Explain(ask(GRAD))
        await until(waits.is_set)
        assert (await server.stub.ListModels(pb.ListModelsRequest())).models[0].ready
        more = [server.stub.Explain(ask(GRAD)) for _ in range(3)]
        await until(lambda: server.gateway.calls.active == 4)
        goes_on.set()
        await asyncio.gather(call, *more)
    assert verify([path]).records == 4


async def test_a_disk_that_never_answers_fails_calls_at_their_deadline(
    path: Path, slow_disk: tuple[threading.Event, threading.Event]
):
    waits, goes_on = slow_disk
    async with serving(evidence_log=path, **PATIENT) as server:
        call = server.stub.Explain(ask(GRAD))
        await until(waits.is_set)
        jump(TO_THE_MARGIN + 100)
        code, text, _ = await failure(call)
        goes_on.set()
        told = await server.metrics()
    assert (code, text) == ("DEADLINE_EXCEEDED", "the deadline passed before the evidence record was written")
    assert "camserve_evidence_failures_total 1.0" in told


async def test_two_gateways_do_not_share_a_log(path: Path):
    async with serving(evidence_log=path):
        second = Gateway(Settings(**QUICK, evidence_log=path), fixed({"fake": FakeBackend()}))
        with pytest.raises(InvalidOption, match="belongs to another gateway"):
            await second.start()


async def test_a_log_of_several_files_is_verified_as_one(path: Path):
    async with serving(evidence_log=path, evidence_log_bytes=2**16) as server:
        for _ in range(60):
            await server.stub.Explain(ask(GRAD))
    files = [*full_files(path), path]
    assert len(files) > 1
    assert verify(files).records == 60


async def test_kept_and_partial_replies_have_records_that_say_so(path: Path, monkeypatch: pytest.MonkeyPatch):
    async with serving(evidence_log=path, result_cache_bytes=10**7) as server:
        for _ in range(2):
            await server.stub.Explain(ask(SCORE, evidence=True))
    first, second = records(path)
    assert [first["cached"], second["cached"]] == [False, True]
    assert first["maps"] == second["maps"]
    path.unlink()
    async with serving(evidence_log=path, **PATIENT, step_queries=7) as server:
        merges = merged(monkeypatch)
        server.upstream.hold()
        call = server.stub.Explain(ask(SCORE, allow_partial=True))
        await server.upstream.received(1)
        server.upstream.release(1)
        await until(lambda: bool(merges))
        jump(TO_THE_MARGIN)
        await call
        server.upstream.release()
    (record,) = records(path)
    assert not record["maps"][0]["complete"]
    assert 0 < record["maps"][0]["fraction"] < 1


async def test_maps_for_evidence_are_not_those_kept_for_others():
    """They were added up in another order."""
    async with serving(result_cache_bytes=10**7) as server:
        await server.stub.Explain(ask(SCORE, precision="EXACT"))
        reply = await server.stub.Explain(ask(SCORE, precision="EXACT", evidence=True))
        assert not reply.cost.cached
        again = await server.stub.Explain(ask(SCORE, precision="EXACT", evidence=True))
        assert again.cost.cached
        assert parsed(again.evidence.encode())["maps"] == parsed(reply.evidence.encode())["maps"]


async def test_a_client_gets_the_record():
    async with serving() as server:

        def explain(**options: Any) -> str:
            with Client(server.gateway.address) as client:
                return client.explain(photo(), ["grad_cam"], **options).evidence

        assert not await asyncio.to_thread(explain)
        line = await asyncio.to_thread(explain, evidence=True)
    assert canonical(json.loads(line)) == line


def shape(value: Any) -> Any:
    """What a reader of the page relies on: names, and kinds of values."""
    if isinstance(value, dict):
        return {name: shape(one) for name, one in value.items()}
    if isinstance(value, list):
        return [shape(one) for one in value]
    return str if isinstance(value, str) else type(value) if isinstance(value, bool) else float


VOLATILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "time": lambda record: record.pop("time"),
    "image": lambda record: [record["image"].pop(name) for name in ("sha256", "bytes")],  # as zlib has made the file
    "maps": lambda record: [one.pop(name) for one in record["maps"] for name in ("sha256", "score", "faithfulness")],
    "gateway": lambda record: record.pop("gateway"),
    "workers": lambda record: record.pop("workers"),
    "reply": lambda record: record["reply"].pop("sha256"),
}
"""What differs from call to call, and from machine to machine."""


async def test_the_record_on_the_page_is_what_is_written(path: Path):
    (text,) = [block for block in PAGE.split("```json\n")[1:] if "camserve.evidence.v1" in block]
    shown = json.loads(text.partition("```")[0])
    group = pb.MethodSpec(group_cam={"groups": 16})
    asked = ask(group, targets=[pb.Target(index=1)], precision="EXACT", evaluate=True)
    async with serving(evidence_log=path) as server:
        await server.stub.Explain(asked, metadata=(("x-request-id", shown["request_id"]),))
    (written,) = records(path)
    assert shape(written) | {"workers": None} == shape(shown) | {"workers": None}
    for take in VOLATILE.values():
        take(written), take(shown)
    assert written == shown

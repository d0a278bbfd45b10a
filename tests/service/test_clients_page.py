"""docs/clients.md: its examples run, and its tables are what the code has."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import re
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import trustme
from gateway_harness import photo, serving
from google.protobuf.json_format import Parse
from PIL import Image
from tools import GRPCURL, needs_node, run, run_node, with_programs

from camserve.codecs import oip as oip_codec
from camserve.codecs import plain as plain_codec
from camserve.errors import KINDS
from camserve.gateway.api.access import Entry, new_token
from camserve.gateway.api.status import status
from camserve.gateway.pool.fake import MODEL, FakeBackend
from camserve.gateway.web.problems import HTTP_STATUS
from camserve.oip import inference_pb2 as oip
from camserve.oip import inference_pb2_grpc
from camserve.types import Cost
from camserve.v1 import explain_pb2 as pb

XRAY = dataclasses.replace(MODEL, name="xray", channels=1)
FIELDS = dataclasses.replace(MODEL, name="fields", channels=5)
PAGE = (Path(__file__).parents[2] / "docs" / "clients.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def table(heading: str) -> dict[str, list[str]]:
    """Rows by the names in their first cell, of the table whose head begins so."""
    rows = PAGE.partition(f"| {heading} |")[2].split("\n\n")[0].splitlines()[2:]
    cells = [re.split(r"(?<!\\) \| ", row.strip("| ")) for row in rows]
    return {name: rest for first, *rest in cells for name in re.findall(r"`(\w+)`", first)}


@asynccontextmanager
async def servers(example: str, folder: Path, upstream: FakeBackend) -> AsyncIterator[str]:
    """The example with the addresses of two servers, of which one has TLS and tokens; its files are in the folder."""
    ca, secret, entry = trustme.CA(), *new_token("reader")
    pair = ca.issue_cert("127.0.0.1")
    for name, content in {
        "ca.pem": ca.cert_pem.bytes(),
        "tls.key": pair.private_key_pem.bytes(),
        "tls.crt": pair.cert_chain_pems[0].bytes(),
        "token": f"{secret}\n".encode(),
        "tokens.toml": entry.encode(),
        "cat.jpg": photo(kind="JPEG"),
    }.items():
        (folder / name).write_bytes(content)
    names = {"tls_cert": "tls.crt", "tls_key": "tls.key", "tokens": "tokens.toml"}
    secured = {setting: folder / name for setting, name in names.items()}
    async with serving(upstream, web_listen="127.0.0.1:0") as plain, serving(**secured) as safe:
        for named, served in (
            ("127.0.0.1:8500", plain.gateway.address),
            ("127.0.0.1:8080", plain.gateway.web_address),
            ("camserve.example:8500", safe.gateway.address),
            ("lite0", "fake"),
        ):
            example = example.replace(named, served)
        yield example


@pytest.mark.parametrize("example", blocks("python"), ids=lambda text: re.findall(r"\w+", text)[-1])
async def test_each_python_example_runs(example: str, tmp_path: Path):
    seed = np.random.default_rng(0)
    grey = Image.fromarray(seed.integers(0, 2**16, (60, 80), dtype=np.uint16))
    for name in ("xray.png", "xray.tiff"):
        grey.save(tmp_path / name)
    np.save(tmp_path / "fields.npy", seed.integers(0, 2**16, (*FIELDS.input_size, 5), dtype=np.uint16))
    upstream = FakeBackend([XRAY, FIELDS] if '"fields"' in example else [MODEL])
    async with servers(example, tmp_path, upstream) as program:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", program, cwd=tmp_path, stdout=asyncio.subprocess.PIPE
        )
        printed, _ = await process.communicate()
    assert process.returncode == 0
    assert printed


SHELL = {
    "list": ("grpcurl", "jq"),
    '"bytes_contents"': ("grpcurl",),
    "/v2/models/": ("curl",),
}
"""Programs that the examples for a shell need, by a part of each."""


@pytest.mark.parametrize("part", SHELL)
async def test_each_example_for_a_shell_runs(part: str, tmp_path: Path):
    ours = [text for text in blocks("sh") if "127.0.0.1:8500" in text or "127.0.0.1:8080" in text]
    assert len(ours) == len(SHELL), "one of the page's is not run here"
    (example,) = [text for text in ours if part in text]
    for program in SHELL[part]:
        if not (GRPCURL if program == "grpcurl" else shutil.which(program)):
            pytest.skip(f"there is no {program}: the example is not run")
    async with servers(example, tmp_path, FakeBackend()) as script:
        done = await run("bash", "-euo", "pipefail", folder=tmp_path, given=script, **with_programs())
    assert (done.code, done.complained) == (0, "")
    if part == "list":
        assert "camserve.v1.ExplanationService\n" in done.printed
        assert '"status": "SERVING"' in done.printed
        assert done.printed.count('"name": "fake"') == 2, "in plain text, and by TLS with a token"
        assert (tmp_path / "cat-group_cam.png").read_bytes().startswith(b"\x89PNG")
    else:
        outputs = json.loads(done.printed)["outputs"]
        assert [output["name"] for output in outputs] == (["labels"] if "v2" in part else ["labels", "probabilities"])


@needs_node
async def test_the_example_for_node_runs(tmp_path: Path):
    (example,) = [text for text in blocks("js") if text.startswith("// cat.mjs")]
    async with servers(example, tmp_path, FakeBackend()) as program:
        done = await run_node(program, tmp_path)
        assert (done.code, done.complained) == (0, "")
        *news, last = done.printed.splitlines()
        assert all(re.fullmatch(r"\d+ of \d+ queries", line) for line in news), "none where all was answered at once"
        assert re.fullmatch(r"\w+ 16", last)
        assert (tmp_path / "cat-group_cam.png").read_bytes().startswith(b"\x89PNG")
        failed = await run_node(program.replace('"tabby"', '"no such class"'), tmp_path)
    assert failed.code == 1
    assert failed.complained.startswith("INVALID_ARGUMENT ")
    assert "no such class" in failed.complained


async def test_the_messages_of_the_grpcurl_examples_are_answered():
    image = base64.b64encode(photo()).decode()
    explain, infer, _ = re.findall(r"printf '(\{.*\})'", PAGE)
    async with serving() as server:
        request = Parse(explain % image, pb.ExplainRequest())
        reply = await server.stub.Explain(request)
        assert reply.maps[0].data.startswith(b"\x89PNG")
        inference = Parse(infer % image, oip.ModelInferRequest())
        inference.model_name = "fake"
        answer = await inference_pb2_grpc.GRPCInferenceServiceStub(server.channel).ModelInfer(inference)
        assert [(output.name, list(output.shape)) for output in answer.outputs] == [
            ("labels", [3]),
            ("probabilities", [3]),
        ]


def test_the_service_config_is_json():
    (config,) = blocks("json")
    assert json.loads(config)["methodConfig"][0]["retryPolicy"]["retryableStatusCodes"] == ["UNAVAILABLE"]


def test_every_error_has_its_row():
    rows = table("class in `camserve.errors`")
    no_client_sees = ("CamserveError", "Cancelled", "ImageMissing", "WorkerLost")
    expected = {name: status(kind("")).name for name, kind in KINDS.items() if name not in no_client_sees}
    assert {name: cells[0] for name, cells in rows.items()} == expected


def test_every_parameter_of_an_inference_has_its_row():
    assert list(table("parameter")) == [*oip_codec.PARAMETERS, "timeout"]


def test_every_figure_of_what_an_answer_cost_is_named():
    (_, meaning) = table("parameter of the response")["cost"]
    assert set(re.findall(r"`(\w+)`", meaning)) == {field.name for field in dataclasses.fields(Cost)}


def test_every_option_of_the_plain_api_and_every_format_has_its_row():
    rows = table("option")
    assert list(rows) == [*plain_codec.OPTIONS, "format"]
    assert re.findall(r"`(\w+)`", rows["format"][0]) == list(plain_codec.FORMATS)


def test_every_output_has_its_row():
    rows = table("output")
    models = (MODEL, dataclasses.replace(MODEL, outputs="boxes"))
    described = {tensor.name: tensor.datatype for model in models for tensor in oip_codec.metadata(model).outputs}
    assert {name: cells[0] for name, cells in rows.items()} == described


def test_every_key_of_a_token_has_its_row():
    assert set(table("key")) == set(Entry.model_fields)


async def test_the_curl_example_is_answered_and_the_status_table_is_the_servers(tmp_path):
    (tmp_path / "cat.jpg").write_bytes(photo(kind="JPEG"))
    (command,) = re.findall(r"^    (curl .*?)\n\n", PAGE, re.MULTILINE | re.DOTALL)  # the one that is indented
    async with serving(web_listen="127.0.0.1:0") as server:
        command = command.replace("127.0.0.1:8080", server.gateway.web_address)
        process = await asyncio.create_subprocess_shell(command, cwd=tmp_path, stdout=asyncio.subprocess.PIPE)
        printed, _ = await process.communicate()
    if process.returncode == 127:
        pytest.skip("there is no curl")
    assert json.loads(printed)["maps"][0]["method"]["groupCam"]["groups"] == 16
    told = re.findall(r"^\| ([0-9, ]+)[^|]* \| ([A-Z_, ]+)", PAGE[PAGE.index("## HTTP") :], re.MULTILINE)
    pairs = {
        name.strip(): int(number)
        for numbers, names in told
        for number, name in zip(numbers.split(","), names.split(","), strict=False)
        if number.strip() and name.strip()
    }
    assert pairs == {code.name: number for code, number in HTTP_STATUS.items() if code.name != "CANCELLED"}


def test_what_clients_are_installed_from_is_pinned_and_names_no_index():
    folder = Path(__file__).parents[1] / "clients"
    asked = json.loads((folder / "package.json").read_text())["dependencies"]
    locked = json.loads((folder / "package-lock.json").read_text())["packages"]
    assert asked == {name: locked[f"node_modules/{name}"]["version"] for name in asked}
    for name, package in locked.items():
        assert "resolved" not in package
        assert not name or package["integrity"].startswith("sha512-")
    *_, envoy, grpcurl = (folder / "requirements.txt").read_text().splitlines()
    for line in (envoy, grpcurl):
        assert re.fullmatch(r"[\w-]+==[\w.]+ --hash=sha256:[0-9a-f]{64}", line)

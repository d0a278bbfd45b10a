"""gRPC-Web through a real Envoy with the configuration of deploy/kubernetes/components/envoy, over a gateway of ours.

The clients are Connect's, unmodified, in Node. What is changed in the configuration: addresses, ports, paths of files,
and the times of health checks.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import pytest_asyncio
import trustme
import yaml
from gateway_harness import Harness, arrays, ask, failure, photo, serving, until
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from test_page import CHROMIUM, QUIET
from tools import ENVOY, ROOT, Done, describe, free_port, needs_envoy, needs_node, run, run_node

from camserve.client import AsyncClient, Tls
from camserve.errors import Unavailable
from camserve.gateway.api.access import new_token
from camserve.v1 import explain_pb2 as pb
from camserve.v1 import explain_pb2_grpc

try:
    from playwright.async_api import Error as PlaywrightError
    from playwright.async_api import async_playwright
except ImportError:
    CHROMIUM = None
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on PATH, or no playwright")

pytestmark = [needs_envoy, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]

COMPONENT = ROOT / "deploy" / "kubernetes" / "components" / "envoy"
PROGRAM = Path(__file__).with_name("grpc_web_program.mjs").read_text()
PAGES = (ROOT / "docs" / "clients.md").read_text()
ORIGIN = "https://pages.example.org"


@dataclass(frozen=True)
class Proxy:
    """A running Envoy."""

    address: str
    health: str
    folder: Path

    async def ready(self) -> int:
        """The status of /ready; 0 where nobody listens yet."""
        async with httpx.AsyncClient(trust_env=False) as client:
            try:
                return (await client.get(f"http://{self.health}/ready")).status_code
            except httpx.TransportError:
                return 0

    async def until_ready(self, status: int = 200) -> None:
        while await self.ready() != status:  # the test's own timeout is the bound
            await asyncio.sleep(0.02)


@dataclass(frozen=True)
class World:
    """A gateway with tokens, an Envoy in front of it, and files for clients."""

    server: Harness
    proxy: Proxy
    folder: Path
    secret: str

    async def calls(self, *calls: Mapping[str, Any], transport: str = "node", image: Path | None = None) -> list[Any]:
        """What Connect's client told of each event."""
        asked = self.asked(calls, transport, image)
        done = await run_node(PROGRAM, self.folder, json.dumps(asked), NODE_EXTRA_CA_CERTS="ca.pem")
        assert done.code == 0, done.complained
        return [json.loads(line) for line in done.printed.splitlines()]

    def asked(self, calls: Any, transport: str, image: Path | None) -> dict[str, Any]:
        headers = {"authorization": f"Bearer {self.secret}"}
        photo = str(image or self.folder / "cat.jpg")
        return {
            "address": self.proxy.address,
            "transport": transport,
            "image": photo,
            "headers": headers,
            "calls": list(calls),
        }


def configured(folder: Path, gateways: str, port: int, changed: Callable[[str], str] = str) -> tuple[str, str]:
    """Writes the configuration for this machine into a folder; returns the addresses of calls and of health."""
    texts = {name: (COMPONENT / f"{name}.yaml").read_text() for name in ("envoy", "served", "gateways-ca", gateways)}
    calls, health = free_port(), free_port()
    (folder / "envoy-tls").mkdir(exist_ok=True)
    for old, new in (
        ("0.0.0.0, port_value: 8443", f"127.0.0.1, port_value: {calls}"),
        ("0.0.0.0, port_value: 8502", f"127.0.0.1, port_value: {health}"),
        ("/etc/envoy/", f"{folder}/"),
        ("/etc/envoy-tls", f"{folder}/envoy-tls"),
        ("/etc/camserve/tls", f"{folder}"),
    ):
        texts = {name: text.replace(old, new) for name, text in texts.items()}
    cluster = yaml.safe_load(texts.pop(gateways))
    (one,) = cluster["resources"]
    where = one["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"]["socket_address"]
    assert where == {"address": "camserve-headless", "port_value": 8500}
    where |= {"address": "127.0.0.1", "port_value": port}
    one["health_checks"][0] |= {
        "interval": "0.1s",
        "no_traffic_interval": "0.1s",
        "timeout": "60s",
    }  # of a slow machine
    texts["gateways"] = yaml.safe_dump(cluster)
    texts["envoy"] = changed(texts["envoy"])
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)
    return f"127.0.0.1:{calls}", f"127.0.0.1:{health}"


def as_the_kubelet_writes(folder: Path, version: str, pair: trustme.LeafCert) -> None:
    """Writes a Secret's files into a directory of their own, and changes to it at once, by one link."""
    (folder / version).mkdir()
    pair.private_key_pem.write_to_path(folder / version / "tls.key")
    pair.cert_chain_pems[0].write_to_path(folder / version / "tls.crt")
    (folder / "..new").symlink_to(version)
    (folder / "..new").rename(folder / "..data")


@contextlib.asynccontextmanager
async def envoy(
    folder: Path, ca: trustme.CA, gateways: str, port: int, changed: Callable[[str], str] = str
) -> AsyncIterator[Proxy]:
    """An Envoy that is in front of the gateway on a port."""
    assert ENVOY is not None
    pair = ca.issue_cert("127.0.0.1")
    addresses = configured(folder, gateways, port, changed)
    ca.cert_pem.write_to_path(folder / "ca.pem")
    ca.cert_pem.write_to_path(folder / "ca.crt")
    as_the_kubelet_writes(folder / "envoy-tls", "first", pair)
    for name in ("tls.key", "tls.crt"):
        (folder / "envoy-tls" / name).symlink_to(f"..data/{name}")
    log = (folder / "envoy.log").open("wb")
    options = ("--concurrency", "1", "--disable-hot-restart", "--log-level", "warning")
    process = await asyncio.create_subprocess_exec(
        str(ENVOY), "--config-path", str(folder / "envoy.yaml"), *options, stdout=log, stderr=log
    )
    try:
        proxy = Proxy(*addresses, folder)
        while await proxy.ready() == 0:
            assert process.returncode is None, (folder / "envoy.log").read_text()
            await asyncio.sleep(0.02)
        yield proxy
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        log.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    folder = tmp_path_factory.mktemp("envoy")
    ca, secret, entry = trustme.CA(), *new_token("page")
    for name, content in {"token": secret, "tokens.toml": entry}.items():
        (folder / name).write_text(content)
    (folder / "cat.jpg").write_bytes(photo(kind="JPEG"))
    describe(folder)
    tokens = {"tokens": folder / "tokens.toml", "step_queries": 8}
    async with serving(**tokens) as server:
        port = int(server.gateway.address.rpartition(":")[2])
        async with envoy(folder, ca, "gateways-plaintext", port) as proxy:
            await proxy.until_ready()
            yield World(server, proxy, folder, secret)


@pytest.fixture
def released(world: World):
    """Has the upstream answer again after a test that held it."""
    yield
    world.server.upstream.release()


SCORE = {"methods": [{"method": {"case": "scoreCam", "value": {}}}]}


@needs_node
@pytest.mark.parametrize("transport", ["node", "web"])
async def test_calls_and_streams_are_answered(world: World, transport: str):
    found = await world.calls(
        {"method": "listModels", "request": {}},
        {"method": "getModel", "request": {"name": "fake"}},
        {"method": "explain", "request": SCORE},
        {"method": "streamExplain", "request": SCORE, "headers": {"x-request-id": "mine-7"}},
        transport=transport,
    )
    headers = [event["header"] for event in found if "header" in event]
    assert headers[-1] == "mine-7"
    assert [event["reply"] for event in found if "reply" in event] == [["fake"], "fake", [[32, 48]], 1]
    assert sum("progress" in event for event in found) >= 1


@needs_node
@pytest.mark.parametrize("transport", ["node", "web"])
async def test_errors_have_their_status_text_and_trailers(world: World, transport: str):
    wrong = {"targets": [{"target": {"case": "label", "value": "no such class"}}]}
    found = await world.calls(
        {"method": "getModel", "request": {"name": "other"}},
        {"method": "explain", "request": wrong},
        {"method": "streamExplain", "request": wrong},
        {"method": "explain", "request": {}, "headers": {"authorization": "Bearer wrong"}},
        transport=transport,
    )
    errors = [event for event in found if "code" in event]
    assert [(error["code"], error["kind"]) for error in errors] == [
        ("NotFound", "NotFound"),
        ("InvalidArgument", "InvalidOption"),
        ("InvalidArgument", "InvalidOption"),
        ("Unauthenticated", "Unauthenticated"),
    ]
    assert "unknown model 'other'; there are: fake" in errors[0]["text"]


@needs_node
async def test_news_come_while_the_call_goes_on_and_a_client_that_goes_ends_it(world: World, released: None):
    world.server.upstream.hold()
    world.server.upstream.release(1)  # the answer of one step, with which the news begin
    found = await world.calls({"method": "streamExplain", "request": SCORE, "abortAfter": 1})
    assert [sorted(event)[0] for event in found] == ["header", "progress", "code"], "nothing waits for the reply"
    assert found[-1]["code"] == "Canceled"
    await until(lambda: world.server.gateway.calls.active == 0)
    assert 'code="CANCELLED",method="score_cam"' in await world.server.metrics()


@needs_node
async def test_a_deadline_reaches_the_gateway(world: World, released: None):
    world.server.upstream.hold()
    found = await world.calls({"method": "explain", "request": SCORE, "timeoutMs": 1500})
    assert found[-1]["code"] == "DeadlineExceeded"
    await until(lambda: world.server.gateway.calls.active == 0)
    assert 'code="DEADLINE_EXCEEDED",method="score_cam"' in await world.server.metrics()


def block(first: str) -> str:
    """The example of docs/clients.md that begins with a comment."""
    (found,) = re.findall(rf"^```js\n(// {re.escape(first)}\n.*?)^```", PAGES, re.MULTILINE | re.DOTALL)
    return str(found)


@needs_node
async def test_the_example_of_the_docs_runs(world: World):
    program = block("web.mjs").replace("https://camserve.example", f"https://{world.proxy.address}")
    done: Done = await run_node(program, world.folder, NODE_EXTRA_CA_CERTS="ca.pem")
    assert (done.code, done.complained) == (0, "")
    *news, last = done.printed.splitlines()
    assert all(re.fullmatch(r"\d+ of \d+ queries", line) for line in news), "none where all was answered at once"
    assert last.endswith("[ 32, 48 ]")
    (world.folder / "token").write_text("wrong")
    failed = await run_node(program, world.folder, NODE_EXTRA_CA_CERTS="ca.pem")
    (world.folder / "token").write_text(world.secret)
    assert failed.code == 1
    assert failed.complained.startswith("Unauthenticated the bearer token is not one of this server")


@contextlib.asynccontextmanager
async def channel(proxy: Proxy) -> AsyncIterator[Any]:
    """A stub of plain gRPC through Envoy."""
    credentials = grpc.ssl_channel_credentials((proxy.folder / "ca.pem").read_bytes())
    async with grpc.aio.secure_channel(proxy.address, credentials) as opened:
        yield explain_pb2_grpc.ExplanationServiceStub(opened)


async def test_grpc_goes_through_with_images_larger_than_any_buffer(world: World):
    large = photo(size=(1400, 1400))
    assert len(large) > 5 * 2**20
    tls = Tls(ca=world.folder / "ca.pem")
    async with AsyncClient(world.proxy.address, tls=tls, token=world.secret) as client, channel(world.proxy) as stub:
        answer = await client.explain(large, ["grad_cam"])
        direct = await world.server.stub.Explain(ask(image=large), metadata=authorized(world))
        through = await stub.Explain(ask(image=large), metadata=authorized(world))
    assert answer.maps[0].array.tobytes() == arrays(direct)[0].tobytes() == arrays(through)[0].tobytes()


def authorized(world: World, **further: str) -> tuple[tuple[str, str], ...]:
    headers = {"authorization": f"Bearer {world.secret}", **further}
    return tuple((name.replace("_", "-"), value) for name, value in headers.items())


def trusting(text: str) -> str:
    """The configuration where clients count as internal, whose x-envoy- headers Envoy obeys."""
    told = "use_remote_address: true"
    assert told in text
    ranges = "internal_address_config: {cidr_ranges: [{address_prefix: 127.0.0.0, prefix_len: 8}]}"
    return text.replace(told, f"{told}\n{' ' * 16}{ranges}")


async def test_nothing_is_sent_twice_whatever_a_client_asks(tmp_path: Path):
    calls = []

    async def failing(requests: object, context: Any) -> None:
        calls.append(context)
        await context.abort(
            grpc.StatusCode.UNAVAILABLE, "not now"
        )  # before any metadata: such a call would be sent again

    server, healthy = grpc.aio.server(), health.aio.HealthServicer()
    port = server.add_insecure_port("127.0.0.1:0")
    handler = grpc.stream_stream_rpc_method_handler(failing)
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("camserve.v1.ExplanationService", {"Explain": handler})]
    )
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    await healthy.set("camserve.v1.ExplanationService", health_pb2.HealthCheckResponse.SERVING)
    await server.start()
    async with (
        envoy(tmp_path, trustme.CA(), "gateways-plaintext", port, trusting) as proxy,
        channel(proxy) as stub,
    ):
        await proxy.until_ready()
        again = (("x-envoy-retry-grpc-on", "unavailable"), ("x-envoy-retry-on", "5xx"), ("x-envoy-max-retries", "5"))
        code, text, _ = await failure(stub.Explain(ask(), metadata=again))
    await server.stop(None)
    assert (code, text, len(calls)) == ("UNAVAILABLE", "not now", 1)


IN_A_PAGE = """async ([url, token]) => {
    const headers = {"content-type": "application/grpc-web+proto", "x-grpc-web": "1", authorization: `Bearer ${token}`};
    const asked = Uint8Array.of(0, 0, 0, 0, 0);  // one message, which is empty: ListModelsRequest
    const found = await fetch(url, {method: "POST", headers, body: asked});
    const text = new TextDecoder("latin1").decode(await found.arrayBuffer());
    return {text, shown: Object.fromEntries(found.headers), status: found.status};
}"""


@needs_chromium
@pytest.mark.parametrize("origin", [ORIGIN, "https://evil.example"])
async def test_a_browser_lets_pages_of_named_origins_call_and_no_others(world: World, origin: str):
    url = f"https://{world.proxy.address}/camserve.v1.ExplanationService/ListModels"
    async with async_playwright() as run:
        browser = await run.chromium.launch(executable_path=CHROMIUM, args=[*QUIET])
        try:
            context = await browser.new_context(ignore_https_errors=True)
            await context.grant_permissions(["local-network-access"])  # which pages of the internet need for loopback
            page = await context.new_page()
            await page.route(
                f"{origin}/", lambda route: route.fulfill(body="<p>A page of others.", content_type="text/html")
            )
            await page.goto(f"{origin}/")
            if origin != ORIGIN:
                with pytest.raises(PlaywrightError, match="Failed to fetch"):
                    await page.evaluate(IN_A_PAGE, [url, world.secret])
                return
            found = await page.evaluate(IN_A_PAGE, [url, world.secret])
            refused = await page.evaluate(IN_A_PAGE, [url, "wrong"])
        finally:
            await browser.close()
    assert "fake" in found["text"]
    assert re.search(r"grpc-status: ?0\r\n", found["text"]), "trailers come as the last frame"
    assert refused["shown"]["x-request-id"]
    assert (refused["status"], refused["shown"]["grpc-status"]) == (200, "16")
    assert refused["shown"]["camserve-error"] == "Unauthenticated"


async def test_other_paths_and_reflection_stay_inside(world: World):
    context = ssl.create_default_context(cafile=world.folder / "ca.pem")
    async with httpx.AsyncClient(verify=context, trust_env=False) as client:
        for path in (
            "/",
            "/metrics",
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
            "/quitquitquit",
        ):
            assert (await client.post(f"https://{world.proxy.address}{path}")).status_code == 404
    async with httpx.AsyncClient(trust_env=False) as client:
        assert (await client.get(f"http://{world.proxy.health}/live")).status_code == 200
        assert (await client.post(f"http://{world.proxy.health}/quitquitquit")).status_code == 404


async def test_a_gateway_without_a_model_gets_no_calls_until_it_has_one(world: World):
    upstream, registry = world.server.upstream, world.server.gateway.registry
    upstream.workers = 0
    await until(lambda: not registry.get("fake").ready)
    await world.proxy.until_ready(503)
    async with channel(world.proxy) as stub:
        code, text, kind = await failure(stub.Explain(ask(), metadata=authorized(world)))
        assert (code, kind) == ("UNAVAILABLE", ""), "it is Envoy that says so"
        assert "no healthy upstream" in text
        upstream.workers = 1
        await world.proxy.until_ready()
        reply = None
        while reply is None:  # what sends calls hears of it a moment later than /ready
            with contextlib.suppress(grpc.aio.AioRpcError):
                reply = await stub.Explain(ask(), metadata=authorized(world))
        assert len(reply.maps) == 1


@pytest.mark.parametrize("name", ["camserve.camserve.svc", "another.name"])
async def test_with_tls_the_gateways_certificate_is_checked(name: str, tmp_path: Path):
    ca = trustme.CA()
    pair = ca.issue_cert(name, "127.0.0.1")
    pair.private_key_pem.write_to_path(tmp_path / "gateway.key")
    pair.cert_chain_pems[0].write_to_path(tmp_path / "gateway.crt")
    files = {"tls_cert": tmp_path / "gateway.crt", "tls_key": tmp_path / "gateway.key"}
    async with serving(ready=False, **files) as server:
        await server.gateway.wait_ready(30)
        port = int(server.gateway.address.rpartition(":")[2])
        async with (
            envoy(tmp_path, ca, "gateways-tls", port) as proxy,
            AsyncClient(proxy.address, tls=Tls(ca=tmp_path / "ca.pem")) as client,
        ):
            if name == "another.name":
                with pytest.raises(Unavailable, match="no healthy upstream"):
                    await client.explain(photo(), ["grad_cam"])
            else:
                await proxy.until_ready()
                assert len((await client.explain(photo(), ["grad_cam"])).maps) == 1


async def test_a_renewed_certificate_is_served_without_a_restart(world: World):
    host, port = world.proxy.address.split(":")

    async def served() -> bytes:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        _, writer = await asyncio.open_connection(host, int(port), ssl=context)
        found = writer.get_extra_info("ssl_object").getpeercert(True)
        writer.close()
        return bytes(found)

    before = await served()
    as_the_kubelet_writes(world.folder / "envoy-tls", "second", trustme.CA().issue_cert("127.0.0.1"))
    while await served() == before:  # the test's own timeout is the bound
        await asyncio.sleep(0.05)


async def test_the_configuration_is_what_envoy_takes_for_good(world: World):
    assert ENVOY is not None
    done = await run(ENVOY, "--mode", "validate", "--config-path", world.folder / "envoy.yaml", folder=world.folder)
    assert done.code == 0, done.complained
    assert "deprecated" not in done.complained.lower()
    assert pb.DESCRIPTOR.services_by_name["ExplanationService"].full_name in (COMPONENT / "envoy.yaml").read_text()

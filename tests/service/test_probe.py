"""`camserve probe`, as Docker and Kubernetes use it: of a gateway, in plain text and with TLS, and of TorchServe."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import trustme
from gateway_harness import QUICK, ask, serving

from camserve.addresses import has_ipv6
from camserve.errors import InvalidOption, Unavailable
from camserve.gateway.ops.settings import Settings
from camserve.gateway.pool.fake import FakeBackend
from camserve.supervisor import WorkerSettings
from camserve.supervisor.probe import probe_gateway, probe_worker


@asynccontextmanager
async def probed(upstream: FakeBackend | None = None, ready: bool = True, **settings: Any) -> AsyncIterator[Settings]:
    """A gateway, and the settings by which a probe finds it."""
    async with serving(upstream, ready, **settings) as harness:
        port = harness.gateway.address.rpartition(":")[2]
        yield Settings(**(QUICK | settings | {"listen": f"{settings.get('listen', '127.0.0.1:0')[:-1]}{port}"}))


async def look(settings: Settings, **how: Any) -> None:
    await asyncio.to_thread(probe_gateway, settings, timeout_s=20, **how)


async def test_a_gateway_that_serves_is_well():
    async with probed() as settings:
        await look(settings)
        await look(settings, live=True)
    with pytest.raises(Unavailable, match=f"the gateway on {settings.listen} does not answer"):
        await look(settings, live=True)


async def test_a_gateway_on_every_address_is_found():
    async with probed(listen="0.0.0.0:0", allow_plaintext=True) as settings:
        await look(settings)


async def test_a_gateway_without_a_model_lives_but_is_not_ready():
    async with probed(upstream=FakeBackend(models=()), ready=False) as settings:
        await look(settings, live=True)
        with pytest.raises(Unavailable, match="says NOT_SERVING"):
            await look(settings)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """TLS files for a name that is not of this machine, as cert-manager's: a leaf and its issuer."""
    authority = trustme.CA()
    pair = authority.issue_cert("camserve.camserve.svc", "*.example.org")
    (tmp_path / "tls.crt").write_bytes(b"".join(blob.bytes() for blob in pair.cert_chain_pems))
    (tmp_path / "tls.key").write_bytes(pair.private_key_pem.bytes())
    authority.cert_pem.write_to_path(tmp_path / "ca.crt")
    return {"tls_cert": tmp_path / "tls.crt", "tls_key": tmp_path / "tls.key", "tls_client_ca": tmp_path / "ca.crt"}


async def test_a_gateway_with_tls_is_found_by_its_own_certificate(files):
    del files["tls_client_ca"]
    async with probed(**files) as settings:
        await look(settings)
        await look(settings, live=True)


async def test_with_mutual_tls_it_shows_the_gateways_certificate(files):
    async with probed(**files) as settings:
        await look(settings)


async def test_a_certificate_that_is_none_is_named(files, tmp_path):
    (tmp_path / "rubbish").write_text("rubbish")
    for file, text in ((tmp_path / "rubbish", "is no certificate"), (tmp_path / "nowhere", "cannot read")):
        with pytest.raises(InvalidOption, match=text):
            probe_gateway(Settings(tls_cert=file, tls_key=files["tls_key"]))


class Management(BaseHTTPRequestHandler):
    """The management API of TorchServe, with workers in these states."""

    states: dict[str, list[str]]

    def do_GET(self) -> None:
        states = self.states.get(self.path.removeprefix("/models/"))
        self.send_response(404 if states is None else 200)
        self.end_headers()
        self.wfile.write(json.dumps([{"workers": [{"status": state} for state in states or []]}]).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def management() -> Iterator[dict[str, Any]]:
    """States to fill in, and where to look for them."""
    kind = type("Handler", (Management,), {"states": {}})
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield {"states": kind.states, "listen": f"127.0.0.1:{server.server_port}"}
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("states", "problem"),
    [
        ({"a": ["READY"], "b": ["UNLOADED", "READY"]}, None),
        ({"a": ["READY"], "b": ["UNLOADED"]}, "b has no worker that is READY: UNLOADED"),
        ({"a": [], "b": ["READY"]}, "a has no worker that is READY: none at all"),
        ({"a": ["READY"]}, "does not tell of b: HTTP Error 404"),
    ],
)
def test_torchserve_is_well_while_each_model_has_a_worker(management, states, problem):
    management["states"].update(states)
    settings = WorkerSettings(models=("a", "b"), management_listen=management["listen"])
    if problem is None:
        probe_worker(settings)
    else:
        with pytest.raises(Unavailable, match=problem):
            probe_worker(settings)


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
@pytest.mark.parametrize("host", ["[::1]", "[::]"])
async def test_a_gateway_on_ipv6_serves_and_is_probed(host: str):
    everywhere = {"listen": f"{host}:0", "metrics_listen": f"{host}:0", "allow_plaintext": True}
    async with serving(**everywhere) as server:
        assert server.gateway.address.startswith(f"{host}:")
        assert (await server.stub.Explain(ask())).maps
        assert "camserve_build_info" in await server.metrics()
        listen = server.gateway.address
        await asyncio.to_thread(probe_gateway, Settings(listen=listen, allow_plaintext=True), timeout_s=60)

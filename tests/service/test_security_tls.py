"""TLS and mutual TLS of the gateway, rotation, and what else a connection is held to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import trustme
from gateway_harness import QUICK, SCORE, Harness, ask, photo, serving, until
from grpc_health.v1 import health_pb2, health_pb2_grpc

from camserve import AsyncClient, Client, Tls
from camserve.errors import InvalidOption, Unavailable
from camserve.gateway.api.access import new_token
from camserve.gateway.ops.settings import Settings
from camserve.gateway.pool.discovery import fixed
from camserve.gateway.pool.fake import FakeBackend
from camserve.gateway.server import Gateway


@dataclass
class Authority:
    """Certificates of one authority, as files."""

    folder: Path
    name: str

    def __post_init__(self) -> None:
        self._ca = trustme.CA(organization_name=self.name)
        self.pem = self.folder / f"{self.name}.pem"
        self._ca.cert_pem.write_to_path(self.pem)

    def server_settings(self, **more: Path) -> dict[str, Any]:
        return {"tls_cert": self.folder / "tls.crt", "tls_key": self.folder / "tls.key", **more}

    def serve(self) -> None:
        """Puts a new pair where the server reads its own."""
        pair = self._ca.issue_cert("127.0.0.1", "localhost")
        (self.folder / "tls.key").write_bytes(pair.private_key_pem.bytes())
        (self.folder / "tls.crt").write_bytes(b"".join(blob.bytes() for blob in pair.cert_chain_pems))

    def client(self, name: str, trusts: Authority) -> Tls:
        """A client with a certificate of this authority."""
        pair = self._ca.issue_cert(name)
        cert, key = self.folder / f"{name}.crt", self.folder / f"{name}.key"
        cert.write_bytes(b"".join(blob.bytes() for blob in pair.cert_chain_pems))
        key.write_bytes(pair.private_key_pem.bytes())
        return Tls(trusts.pem, cert, key)


@pytest.fixture
def ours(tmp_path: Path) -> Authority:
    authority = Authority(tmp_path, "ours")
    authority.serve()
    return authority


@pytest.fixture
def theirs(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "theirs")


@asynccontextmanager
async def secured(**settings: Any) -> AsyncIterator[Gateway]:
    async with Gateway(Settings(**(QUICK | settings)), fixed({"fake": FakeBackend()})) as gateway:
        await gateway.wait_ready(30)
        yield gateway


async def explains(gateway: Gateway, tls: Tls | None) -> bool:
    """A client gets an answer; False: no connection comes about."""
    async with AsyncClient(gateway.address, tls=tls, timeout_s=20) as client:
        try:
            return bool((await client.explain(photo())).maps)
        except Unavailable:
            return False


async def test_a_client_that_trusts_the_authority_is_answered(ours: Authority):
    async with secured(**ours.server_settings()) as gateway:
        assert await explains(gateway, Tls(ours.pem))

        def with_threads() -> int:
            with Client(gateway.address, tls=Tls(ours.pem), timeout_s=20) as client:
                return len(client.explain(photo(), ["grad_cam", "score_cam"]).maps)

        assert await asyncio.to_thread(with_threads) == 2


async def test_other_authorities_public_ones_and_plain_text_do_not_get_through(ours: Authority, theirs: Authority):
    async with secured(**ours.server_settings()) as gateway:
        for tls in (Tls(theirs.pem), Tls(), None):
            assert not await explains(gateway, tls)


async def test_plain_text_servers_are_no_tls_servers(ours: Authority):
    async with secured() as gateway:
        assert not await explains(gateway, Tls(ours.pem))
        assert await explains(gateway, None)


async def test_mutual_tls_lets_in_certificates_of_its_authority_only(ours: Authority, theirs: Authority):
    async with secured(**ours.server_settings(tls_client_ca=ours.pem)) as gateway:
        assert await explains(gateway, ours.client("ann", trusts=ours))
        assert not await explains(gateway, theirs.client("eve", trusts=ours)), "of another authority"
        assert not await explains(gateway, Tls(ours.pem)), "none at all"


async def test_a_rotated_certificate_is_served_and_old_connections_live_on(ours: Authority, theirs: Authority):
    async with secured(**ours.server_settings()) as gateway, AsyncClient(gateway.address, tls=Tls(ours.pem)) as old:
        assert (await old.explain(photo())).maps
        theirs.serve()
        while not await explains(gateway, Tls(theirs.pem)):  # the test's own timeout is the bound
            await asyncio.sleep(0.1)
        assert not await explains(gateway, Tls(ours.pem)), "new connections get the new certificate only"
        assert (await old.explain(photo())).maps
        (ours.folder / "tls.key").write_text("half a file")
        await asyncio.sleep(1.1)  # the files are looked at once in a second
        assert await explains(gateway, Tls(theirs.pem)), "what is broken is not served"


async def test_the_end_of_the_served_certificate_is_a_metric(ours: Authority):
    name = "camserve_certificate_expiry_timestamp_seconds"
    async with serving() as plain:
        assert f"\n{name} " not in await plain.metrics()
    async with secured(**ours.server_settings()) as gateway:
        text = await Harness(gateway, FakeBackend(), None, None).metrics()
    value = float(text.partition(f"\n{name} ")[2].split()[0])
    assert value > 4e9, "trustme's certificates are good for decades"


async def test_bad_files_stop_the_start(ours: Authority):
    (ours.folder / "tls.key").write_text("nonsense")
    gateway = Gateway(Settings(**QUICK, **ours.server_settings()), fixed({"fake": FakeBackend()}))
    with pytest.raises(InvalidOption, match=r"CAMSERVE_TLS_KEY=.*must hold a private key"):
        await gateway.start()


async def test_a_bad_token_file_stops_the_start(tmp_path: Path):
    gateway = Gateway(Settings(**QUICK, tokens=tmp_path / "none.toml"), fixed({"fake": FakeBackend()}))
    with pytest.raises(InvalidOption, match=r"cannot read .*none\.toml"):
        await gateway.start()


async def test_plain_text_for_other_machines_needs_to_be_said(ours: Authority, caplog: pytest.LogCaptureFixture):
    everywhere = {"listen": "0.0.0.0:0", "metrics_listen": "127.0.0.1:0"}
    with pytest.raises(ValueError, match="would take plain text from other machines"):
        Settings(**everywhere)
    tokens = {"tokens": ours.folder / "tokens.toml"}
    tokens["tokens"].write_text(new_token("ann")[1])
    async with secured(**everywhere, **ours.server_settings(), **tokens):
        assert "plain text" not in caplog.text
    async with secured(**everywhere, allow_plaintext=True, **tokens):
        assert "tokens come in plain text on 0.0.0.0:" in caplog.text


async def test_metrics_can_be_closed():
    async with secured(metrics_listen="off") as gateway:
        assert gateway.metrics_address == ""
        assert await explains(gateway, None)


async def test_an_aged_connection_is_left_for_a_new_one_without_losing_a_call():
    async with serving(max_connection_age_s=1) as server:
        server.upstream.hold()
        running = server.stub.Explain(ask(SCORE))
        await server.upstream.received(1)
        first = _connections(server)
        assert len(first) == 1
        health = health_pb2_grpc.HealthStub(server.channel)
        check = health_pb2.HealthCheckRequest()
        await until(lambda: bool(_connections(server) - first), lambda: _after_a_while(health.Check(check)))
        assert first <= _connections(server), "the old one stays as long as a call runs on it"
        server.upstream.release()
        assert (await running).cost.queries == 96


async def _after_a_while(call: Any) -> None:
    await call
    await asyncio.sleep(0.1)


def _connections(server: Harness) -> set[int]:
    """Our ends of the connections to the server."""
    port = int(server.gateway.address.rpartition(":")[2])
    found = psutil.Process().net_connections("tcp")
    return {each.laddr.port for each in found if each.raddr and each.raddr.port == port}


async def test_a_client_of_grpc_itself_gets_by_with_the_authority(ours: Authority):
    """As grpcurl -cacert, or any client in another language."""
    async with secured(**ours.server_settings()) as gateway:
        credentials = grpc.ssl_channel_credentials(ours.pem.read_bytes())
        async with grpc.aio.secure_channel(gateway.address, credentials) as channel:
            found = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            assert found.status == health_pb2.HealthCheckResponse.SERVING

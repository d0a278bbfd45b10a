"""The port of the metrics: a scrape comes through, whatever else hangs on the port."""

from __future__ import annotations

import socket
import struct
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest
from prometheus_client import CollectorRegistry, Gauge

from camserve.addresses import has_ipv6
from camserve.gateway.ops.exposition import CONNECTIONS, MetricsServer

HALF = b"GET /metrics HTTP/1.1\r\nHost: x\r\n"
WHOLE = HALF + b"\r\n"


@pytest.fixture
def registry() -> CollectorRegistry:
    """More metrics than sockets hold while nobody reads."""
    registry = CollectorRegistry()
    gauge = Gauge("a_gauge", "With many series.", ["name"], registry=registry)
    for number in range(300):
        gauge.labels(f"{number}" + 40_000 * "x")
    return registry


@pytest.fixture
def server() -> Iterator[MetricsServer]:
    server = MetricsServer(CollectorRegistry(), "127.0.0.1:0")
    yield server
    server.stop()


def scrape(address: str) -> tuple[int, str]:
    """Status and content type of what Prometheus gets."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://{address}/metrics", timeout=60) as reply:
        reply.read()
        return reply.status, reply.headers["Content-Type"].partition(";")[0]


def connection(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host.strip("[]"), int(port)), timeout=60)


def cut(connection: socket.socket) -> bool:
    """Whether the server ends the connection, after whatever it has sent."""
    with suppress(ConnectionError):
        while connection.recv(2**16):
            pass
    return True


def test_a_scrape_comes_through_500_requests_that_are_half_sent(server: MetricsServer):
    threads = threading.active_count()
    with ExitStack() as stack:
        hanging = [stack.enter_context(connection(server.address)) for _ in range(500)]
        for one in hanging:
            one.sendall(HALF)
        assert scrape(server.address) == (200, "text/plain")
        assert server.connections <= CONNECTIONS
        assert threading.active_count() <= threads + CONNECTIONS
        assert cut(hanging[0])  # the eldest goes first


def test_a_scrape_comes_through_those_who_do_not_read(registry: CollectorRegistry):
    server = MetricsServer(registry, "127.0.0.1:0", exchange_s=3600)
    with ExitStack() as stack:
        for _ in range(2 * CONNECTIONS):
            stack.enter_context(connection(server.address)).sendall(WHOLE)
        assert scrape(server.address) == (200, "text/plain")
        assert server.connections <= CONNECTIONS
    server.stop()


@pytest.mark.parametrize("sent", [b"", HALF, WHOLE])
def test_a_connection_ends_in_time_whatever_its_client_does(registry: CollectorRegistry, sent: bytes):
    server = MetricsServer(registry, "127.0.0.1:0", exchange_s=0.1)
    with connection(server.address) as slow:
        slow.sendall(sent)
        while server.connections == 0 and not sent:  # it may not have been taken yet
            pass
        while server.connections:  # the test's own timeout is the bound
            threading.Event().wait(0.01)
        assert cut(slow)
    server.stop()


def test_a_stop_does_not_wait_for_connections(server: MetricsServer):
    with connection(server.address) as half:
        half.sendall(HALF)
        while not server.connections:
            threading.Event().wait(0.01)
        server.stop()
        assert cut(half)


@pytest.mark.parametrize(
    "sent", [b"\x00\xff\r\n\r\n", b"GET\r\n\r\n", b"POST /metrics HTTP/1.1\r\n\r\n", b"\r\n" * 50_000]
)
def test_rubbish_is_answered_and_leaves_no_word_on_stderr(
    server: MetricsServer, sent: bytes, capfd: pytest.CaptureFixture[str]
):
    with connection(server.address) as rude:
        with suppress(ConnectionError):
            rude.sendall(sent)
        assert cut(rude)
    assert scrape(server.address) == (200, "text/plain")
    assert capfd.readouterr() == ("", "")


def test_a_client_that_breaks_off_leaves_no_word_on_stderr(server: MetricsServer, capfd: pytest.CaptureFixture[str]):
    with connection(server.address) as rude:
        rude.sendall(HALF)
        while not server.connections:
            threading.Event().wait(0.01)
        rude.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing resets the connection
    while server.connections:
        threading.Event().wait(0.01)
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
@pytest.mark.parametrize(("host", "asked"), [("[::1]", "[::1]"), ("[::]", "[::1]"), ("[::]", "127.0.0.1")])
def test_it_is_served_over_ipv6(host: str, asked: str):
    server = MetricsServer(CollectorRegistry(), f"{host}:0")
    assert server.address.startswith(f"{host}:")
    assert scrape(f"{asked}:{server.address.rpartition(':')[2]}") == (200, "text/plain")
    server.stop()

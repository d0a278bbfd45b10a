"""The commands in bare environments: closed or unread streams, few file descriptors, a user without a name."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import grpc
import pytest
from gateway_harness import ask
from grpc_health.v1 import health_pb2, health_pb2_grpc

from camserve.v1 import explain_pb2_grpc

COMMAND = "from camserve.cli import main; main()"

Start = Callable[..., subprocess.Popen]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def start(port: int) -> Iterator[Start]:
    """Starts `camserve gateway` on the port."""
    started: list[subprocess.Popen] = []

    def start(**options: object) -> subprocess.Popen:
        own = {"CAMSERVE_LISTEN": f"127.0.0.1:{port}", "CAMSERVE_METRICS_LISTEN": "off", "CAMSERVE_DRAIN_S": "0"}
        started.append(
            subprocess.Popen([sys.executable, "-c", COMMAND, "gateway"], env={**os.environ, **own}, **options)
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def channel(port: int) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
        yield channel


def serves(channel: grpc.Channel) -> bool:
    stub = health_pb2_grpc.HealthStub(channel)
    reply = stub.Check(health_pb2.HealthCheckRequest(), timeout=60, wait_for_ready=True)
    return reply.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("closed", [(2,), (1,), (0, 1, 2)])
def test_it_serves_with_closed_streams(start: Start, channel: grpc.Channel, closed: tuple[int, ...]):
    process = start(preexec_fn=lambda: [os.close(descriptor) for descriptor in closed])
    assert serves(channel)
    for descriptor in closed:  # no socket has their numbers
        assert Path(f"/proc/{process.pid}/fd/{descriptor}").readlink() == Path(os.devnull)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


def test_it_serves_and_ends_though_nobody_reads_its_log(start: Start, channel: grpc.Channel):
    reading, writing = os.pipe()
    process = start(stderr=writing)
    os.close(writing)
    assert serves(channel)
    stub = explain_pb2_grpc.ExplanationServiceStub(channel)
    for _ in range(600):  # about 300 bytes of log each, while the pipe holds 64 KiB
        assert stub.Explain.future(ask(), timeout=60).code() is grpc.StatusCode.UNAVAILABLE
    assert serves(channel)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    os.close(reading)


def test_an_error_ends_it_though_nobody_reads_that(start: Start, port: int):
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with suppress(BlockingIOError):  # until it is full
        while True:
            os.write(writing, bytes(4096))
    os.set_blocking(writing, True)
    with socket.create_server(("127.0.0.1", port)):
        process = start(stderr=writing)
        assert process.wait(60) == 2  # the port is taken
    os.close(writing)
    os.close(reading)


def test_it_says_when_file_descriptors_run_out_and_when_there_are_enough_again(
    start: Start, channel: grpc.Channel, port: int
):
    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

    process = start(stderr=subprocess.PIPE, text=True, preexec_fn=few)
    assert "only 64 files and connections may be open at a time" in said(process, "open at a time")
    assert serves(channel)
    with ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
        assert "of 64 file descriptors are in use: new connections wait" in said(process, "in use: new")
    said(process, "there are file descriptors enough again")
    assert serves(channel)


NAMELESS = """
import os, pwd
def nobody(uid):
    raise KeyError("getpwuid(): uid not found")
pwd.getpwuid = nobody  # as with a number that is in no list of users, which OpenShift gives to containers
for name in ("USER", "LOGNAME", "LNAME", "USERNAME", "HOME"):
    os.environ.pop(name, None)
"""


def test_a_user_without_a_name_packs_an_archive(tmp_path: Path):
    words = ["archive", "torchvision:squeezenet1_1", "--weights", "random", "--name", "small", "--store", str(tmp_path)]
    packing = subprocess.run(
        [sys.executable, "-c", NAMELESS + COMMAND, *words], capture_output=True, text=True, check=False, timeout=300
    )
    assert packing.returncode == 0, packing.stderr
    assert (tmp_path / "small.mar").is_file()


def said(process: subprocess.Popen, text: str) -> str:
    """The line of the log that has the text."""
    assert process.stderr is not None
    for line in process.stderr:
        if text in line:
            return line
    raise AssertionError(f"the log ended without {text!r}")

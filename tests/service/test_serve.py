"""`serve` in a process of its own: the real TorchServe, the real handler, the gateway, and signals."""

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from camserve.archive import build_archive

pytestmark = [
    pytest.mark.torchserve,
    pytest.mark.skipif(sys.platform != "linux", reason="looks at processes through Linux's /proc"),
]

SERVE = """
import asyncio, logging, pathlib, sys
from camserve.errors import CamserveError
from camserve.gateway.settings import Settings
from camserve.supervisor import ServeOptions, serve

logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(name)s: %(message)s")

async def main():
    ready = asyncio.Event()
    settings = Settings(listen="127.0.0.1:0", metrics_listen="127.0.0.1:0")
    options = ServeOptions(pathlib.Path(sys.argv[1]), models=("small",))
    serving = asyncio.create_task(serve(settings, options, ready=ready))
    waiting = asyncio.create_task(ready.wait())
    await asyncio.wait({serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
    print("READY" if ready.is_set() else "NOT READY", flush=True)
    waiting.cancel()
    await serving

try:
    asyncio.run(main())
except CamserveError as error:
    sys.exit(f"failed: {error}")
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    store = tmp_path_factory.mktemp("store")
    build_archive("torchvision:squeezenet1_1", name="small", store=store, weights="random")
    return store


class Server:
    """A process that runs `serve`."""

    def __init__(self, store: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(store)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.output = ""

    def read_until(self, text: str) -> str:
        """The line that has the text."""
        for line in self.process.stdout:
            self.output += line
            if text in line:
                return line
        raise AssertionError(f"no {text!r} in:\n{self.output}")

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def finish(self) -> int:
        """The exit code, once all processes that hold its output have ended."""
        # Not communicate(): it reads the descriptor, and loses what read_until() has left in the file's buffer.
        self.output += self.process.stdout.read()
        return self.process.wait(timeout=60)


@pytest.fixture
def server(store) -> Iterator[Server]:
    server = Server(store)
    yield server
    for process in [*server.family(), server.process] if server.process.poll() is None else []:
        process.kill()
    server.process.wait()
    server.process.stdout.close()


def still_running(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def test_serves_until_sigterm_then_leaves_nothing(server):
    address = re.search(r"ready: small on (\S+);", server.read_until("ready: small"))[1]
    processes = server.family()
    assert len(processes) == 2  # the JVM and one worker
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        request = health_pb2.HealthCheckRequest(service="camserve.v1.ExplanationService")
        reply = health_pb2_grpc.HealthStub(channel).Check(request, timeout=30)
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
    server.process.send_signal(signal.SIGTERM)
    assert server.finish() == 0
    assert "READY" in server.output
    assert "Traceback" not in server.output
    assert still_running(processes) == []


def test_death_of_torchserve_ends_it_with_an_error(server):
    server.read_until("READY")
    processes = server.family()
    jvm = next(process for process in processes if process.ppid() == server.process.pid)
    jvm.kill()
    assert server.finish() == 1
    assert "failed: TorchServe died (exit code -9)" in server.output
    assert still_running(processes) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_starts_stops_it(server, number):
    server.read_until("Model server started")
    processes = server.family()
    server.process.send_signal(number)
    assert server.finish() == 0
    assert "NOT READY" in server.output
    assert "Traceback" not in server.output
    assert still_running(processes) == []

"""`serve`, and `worker` with `gateway`, in processes of their own: the real TorchServe and handler, and signals."""

import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import psutil
import pytest
from gateway_harness import photo
from grpc_health.v1 import health_pb2, health_pb2_grpc

from camserve.archive import build_archive
from camserve.client import Client
from camserve.errors import Unavailable
from camserve.types import StreamOptions

pytestmark = [
    pytest.mark.torchserve,
    pytest.mark.skipif(sys.platform != "linux", reason="looks at processes through Linux's /proc"),
]

SERVE = """
import asyncio, logging, pathlib, sys
from camserve.errors import CamserveError
from camserve.gateway.ops.settings import Settings
from camserve.supervisor import WorkerSettings, serve

logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(name)s: %(message)s")

async def main():
    ready = asyncio.Event()
    settings = Settings(listen="127.0.0.1:0", metrics_listen="127.0.0.1:0")
    options = WorkerSettings(store=pathlib.Path(sys.argv[1]), models=("small",))
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
    """A process that runs Python with these arguments."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
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

    def kill(self) -> None:
        """Ends it, if it runs, with all of its children."""
        for process in [*self.family(), self.process] if self.process.poll() is None else []:
            process.kill()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture
def server(store) -> Iterator[Server]:
    server = Server("-c", SERVE, str(store))
    yield server
    server.kill()


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


COMMAND = "from camserve.cli import main; main()"


@pytest.fixture
def file(store, tmp_path) -> Path:
    """Settings of a worker and a gateway that find each other."""
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        grpc_port, management_port = (listener.getsockname()[1] for listener in (one, other))
    path = tmp_path / "camserve.toml"
    path.write_text(f"""
[gateway]
listen = "127.0.0.1:0"
metrics_listen = "off"
log_format = "json"
upstreams = ["127.0.0.1:{grpc_port}:{management_port}"]

[worker]
store = "{store}"
models = ["small"]
device = "cpu"
grpc_listen = "127.0.0.1:{grpc_port}"
management_listen = "127.0.0.1:{management_port}"
""")
    return path


@pytest.fixture
def command(file) -> Iterator[Callable[..., Server]]:
    """Starts `camserve` with these words and the file of settings."""
    started = []

    def start(*words: str) -> Server:
        started.append(Server("-c", COMMAND, *words, "--config", str(file)))
        return started[-1]

    yield start
    for server in started:
        server.kill()


def test_worker_and_gateway_serve_as_two_processes(command):
    assert command("probe", "worker").finish() == 1
    worker = command("worker")
    assert "ready: small on 127.0.0.1:" in worker.read_until("ready: small")
    assert command("probe", "worker").finish() == 0
    gateway = command("gateway")
    address = re.search(r"gRPC on (127\.0\.0\.1:\d+)", gateway.read_until("gRPC on"))[1]
    gateway.read_until("is ready")
    with Client(address, timeout_s=60) as client:
        assert client.explain(photo()).maps
    processes = worker.family()
    for server in (gateway, worker):
        server.process.send_signal(signal.SIGTERM)
        assert server.finish() == 0
        assert "Traceback" not in server.output
    assert still_running(processes) == []


def test_a_second_signal_ends_it_at_once_and_in_order(command):
    """The running call is told why, TorchServe is gone though it was busy, and the exit code tells of the loss."""
    server = command("serve")
    address = re.search(r"ready: small on ([^\s;]+);", server.read_until("ready: small"))[1]
    processes = server.family()
    with Client(address) as client:
        news = client.stream(photo(), [("rise", {"masks": 100_000})], stream=StreamOptions(max_maps=0))
        next(news)
        server.process.send_signal(signal.SIGTERM)
        server.read_until("stopping: running requests have 25 s to finish")
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(Unavailable, match="the server is shutting down"):
            list(news)
    assert server.finish() == 1
    assert "stopped at once by a second signal" in server.output
    assert "Traceback" not in server.output
    assert still_running(processes) == []


def test_a_worker_whose_jvm_dies_ends_with_its_last_words(command):
    worker = command("worker")
    worker.read_until("ready: small")
    processes = worker.family()
    next(process for process in processes if process.ppid() == worker.process.pid).kill()
    assert worker.finish() == 1
    assert "TorchServe died (exit code -9); the last lines of its log:\n" in worker.output
    assert "Torch worker started" in worker.output.rpartition("last lines of its log")[2]
    assert still_running(processes) == []

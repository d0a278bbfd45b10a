"""TorchServe's settings: where they come from, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from camserve.errors import InvalidOption
from camserve.settings import KUBERNETES
from camserve.supervisor import WorkerSettings


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in list(os.environ):
        if variable.startswith("CAMSERVE_"):
            monkeypatch.delenv(variable)


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "camserve.toml"
    file.write_text('[worker]\nworkers = 2\nheap_mb = 512\nmodels = ["a", "b"]\nbatch_size = 4\n')
    monkeypatch.setenv("CAMSERVE_WORKER_HEAP_MB", "768")
    monkeypatch.setenv("CAMSERVE_WORKER_BATCH_SIZE", "5")
    settings = WorkerSettings.load(file, batch_size=6, threads=None)
    assert (settings.workers, settings.heap_mb, settings.batch_size) == (2, 768, 6)
    assert (settings.models, settings.threads) == (("a", "b"), None)


def test_models_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CAMSERVE_WORKER_MODELS", "a, b,")
    assert WorkerSettings.load().models == ("a", "b")


def test_the_store_is_that_of_all_commands(monkeypatch: pytest.MonkeyPatch):
    assert WorkerSettings.load().store == Path("model_store")
    monkeypatch.setenv("CAMSERVE_MODEL_STORE", "/models")
    assert WorkerSettings.load().store == Path("/models")
    monkeypatch.setenv("CAMSERVE_WORKER_STORE", "/others")
    assert WorkerSettings.load().store == Path("/others")


@pytest.mark.parametrize(
    ("variable", "value", "text"),
    [
        ("CAMSERVE_WORKER_WORKERS", "0", "CAMSERVE_WORKER_WORKERS='0': Input should be greater than or equal to 1"),
        ("CAMSERVE_WORKER_THREADS", "0", "greater than or equal to 1"),
        ("CAMSERVE_WORKER_HEAP_MB", "much", "largest heap of the JVM, in MiB"),
        ("CAMSERVE_WORKER_MODELS", ",", "at least 1 item"),
        ("CAMSERVE_WORKER_DEVICE", "gpu", "'auto' or 'cpu'"),
        ("CAMSERVE_WORKER_GRPC_LISTEN", "[::1]:7070", "host:port"),
        ("CAMSERVE_WORKER_STOP_TIMEOUT_S", "-1", "CAMSERVE_WORKER_STOP_TIMEOUT_S='-1'"),
        ("CAMSERVE_WORKER_HEAP", "8", "did you mean CAMSERVE_WORKER_HEAP_MB?"),
    ],
)
def test_a_bad_variable_stops_the_start(monkeypatch: pytest.MonkeyPatch, variable: str, value: str, text: str):
    monkeypatch.setenv(variable, value)
    with pytest.raises(InvalidOption) as caught:
        WorkerSettings.load()
    assert text in str(caught.value)


@pytest.mark.parametrize("name", ["grpc_listen", "management_listen", "inference_listen", "metrics_listen"])
def test_plain_text_for_other_machines_has_to_be_allowed(name: str):
    addresses = {name: "0.0.0.0:1"} | ({"grpc_listen": "0.0.0.0:2"} if name == "management_listen" else {})
    addresses |= {"management_listen": "0.0.0.0:3"} if name == "grpc_listen" else {}
    with pytest.raises(InvalidOption, match=r"_LISTEN=0\.0\.0\.0:.*plain text.*CAMSERVE_WORKER_ALLOW_PLAINTEXT=true"):
        WorkerSettings.load(**addresses)
    assert getattr(WorkerSettings.load(**addresses, allow_plaintext=True), name) == addresses[name]


def test_a_gateway_finds_both_of_its_listeners_on_one_host():
    with pytest.raises(InvalidOption, match=r"must have the same host.*got 10\.0\.0\.5 and 127\.0\.0\.1"):
        WorkerSettings.load(grpc_listen="10.0.0.5:7070", allow_plaintext=True)


def test_free_ports_are_for_listeners_that_nobody_set(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CAMSERVE_WORKER_MANAGEMENT_LISTEN", "127.0.0.1:8181")
    settings = WorkerSettings.load(inference_listen="127.0.0.1:8080").on_free_ports()
    assert (settings.grpc_listen, settings.management_listen) == ("127.0.0.1:0", "127.0.0.1:8181")
    assert (settings.inference_listen, settings.metrics_listen) == ("127.0.0.1:8080", "127.0.0.1:0")


def test_variables_of_kubernetes_are_left_alone(monkeypatch: pytest.MonkeyPatch):
    for variable in ("CAMSERVE_WORKER_SERVICE_HOST", "CAMSERVE_WORKER_PORT", "CAMSERVE_WORKER_PORT_7070_TCP_ADDR"):
        monkeypatch.setenv(variable, "tcp://10.0.0.1:7070")
    assert WorkerSettings.load() == WorkerSettings()


def test_no_setting_has_a_name_that_kubernetes_may_set():
    assert not [name for name in WorkerSettings.model_fields if KUBERNETES.search(WorkerSettings.variable(name))]


def test_every_setting_says_what_it_is():
    assert [name for name, field in WorkerSettings.model_fields.items() if not field.description] == []

"""What the ConfigMaps set is what the settings take; and TorchServe is set up as hard in a pod as anywhere."""

from __future__ import annotations

import re
from pathlib import Path

import manifests
import pytest
from manifests import Rendered, rendered

from camserve import __version__
from camserve.addresses import is_loopback
from camserve.errors import InvalidOption
from camserve.gateway.ops.settings import Settings
from camserve.supervisor import WorkerSettings
from camserve.supervisor.config import Addresses, properties, render

NAMES = ["base", "overlays/dev", "overlays/prod", "gpu", "tls", "split", "tls+split", "+".join(manifests.COMPONENTS)]


@pytest.fixture(params=NAMES)
def result(request: pytest.FixtureRequest) -> Rendered:
    return rendered(request.param)


def test_every_variable_is_a_setting(result: Rendered, variables):
    for command, classes in {"gateway": (Settings,), "worker": (WorkerSettings, Settings)}.items():
        for _, container in result.running(command):
            names = set(result.environment(container))
            assert names <= {layer.variable(name) for layer in classes for name in layer.model_fields}


def test_gateways_start_with_their_variables(result: Rendered, variables):
    for _, container in result.running("gateway"):
        variables(result.environment(container))
        settings = Settings.load()
        assert not is_loopback(settings.listen)
        assert settings.allow_plaintext == (settings.tls_cert is None)


def test_torchserve_starts_with_its_variables(result: Rendered, variables):
    for _, container in result.running("worker"):
        variables(result.environment(container))
        assert WorkerSettings.load().store == Path("/models")


def test_a_misspelt_variable_would_stop_the_start(variables):
    variables({"CAMSERVE_WORKER_HEAPMB": "1"})
    with pytest.raises(InvalidOption, match="did you mean CAMSERVE_WORKER_HEAP_MB"):
        WorkerSettings.load()


def test_the_heap_fits_beside_the_network(result: Rendered, variables):
    for _, container in result.running("worker"):
        variables(result.environment(container))
        memory = re.fullmatch(r"(\d+)Gi", container["resources"]["limits"]["memory"])
        assert memory is not None
        assert WorkerSettings.load().heap_mb <= int(memory[1]) * 1024 / 2


HARDENED = {
    "disable_token_authorization": "true",
    "enable_model_api": "false",
    "use_env_allowed_urls": "false",
    "enable_envvars_config": "false",
    "install_py_dep_per_model": "false",
    "disable_system_metrics": "true",
    "metrics_mode": "prometheus",
    "async_logging": "true",
    "load_models": "lite0=lite0.mar",
    "model_store": "/models",
    "allowed_urls": "file:///models/.*",
}


def test_torchserve_is_hardened(result: Rendered, variables):
    for _, container in result.running("worker"):
        variables(result.environment(container))
        written = parsed(render(torchserve_properties(WorkerSettings.load())))
        assert HARDENED.items() <= written.items()
        limits = {name: int(written[name]) for name in ("max_request_size", "max_response_size")}
        assert min(limits.values()) > Settings.model_fields["step_bytes"].default
        assert int(written["default_response_timeout"]) > Settings.model_fields["step_timeout_s"].default
        for word in ("TOKEN", "SECRET", "PASSWORD", "KEY"):
            assert re.fullmatch(written["blacklist_env_vars"], f"MY_{word}_1")


def test_torchserve_listens_on_loopback_unless_it_has_a_pod_of_its_own(result: Rendered, variables):
    for pod, container in result.running("worker"):
        variables(result.environment(container))
        written = torchserve_properties(WorkerSettings.load())
        hosts = {key: re.sub(r"^http://|:\d+$", "", value) for key, value in written.items() if "address" in key}
        reachable = {key for key, host in hosts.items() if host != "127.0.0.1"}
        alone = container in pod["containers"]
        assert reachable == ({"grpc_inference_address", "management_address"} if alone else set())


def torchserve_properties(settings: WorkerSettings) -> dict[str, str]:
    names = ("inference_listen", "management_listen", "metrics_listen", "grpc_listen")
    return properties(settings, Addresses(*(getattr(settings, name) for name in names), "127.0.0.1:0"))


def parsed(text: str) -> dict[str, str]:
    """A properties file, as Java reads it where nothing is escaped."""
    return dict(line.split("=", 1) for line in text.replace("\\\\", "\\").splitlines())


def test_the_image_is_what_the_pods_expect(variables):
    text = (manifests.ROOT / "Dockerfile").read_text()
    assert re.search(r"^USER 10001:10001$", text, re.MULTILINE)
    assert re.search(r'^ENTRYPOINT \["tini", "--", "camserve"\]$', text, re.MULTILINE)
    assert re.search(rf"^ARG VERSION={re.escape(__version__)}$", text, re.MULTILINE)
    variables({})
    with pytest.raises(InvalidOption, match="CAMSERVE_ALLOW_PLAINTEXT=true"):
        Settings.load()  # an image that says nothing of TLS does not start in plain text
    variables({"CAMSERVE_ALLOW_PLAINTEXT": "true"})
    assert Settings.load().listen == "0.0.0.0:8500"
    assert WorkerSettings.load().store == Path("/models")

"""What the pods are: secure, bounded, probed, and stopped in order; and that they run what the command line has."""

from __future__ import annotations

import json
from typing import Any

import manifests
import pytest
from manifests import Rendered, rendered

from camserve.cli.serving import COMMANDS
from camserve.gateway.ops.settings import Settings
from camserve.gateway.server import SERVICE
from camserve.supervisor import WorkerSettings

NAMES = ["base", "overlays/dev", "overlays/prod", "split", "tls", "tls+split", "+".join(manifests.COMPONENTS)]

commands = {command.name: command for command in COMMANDS}


@pytest.fixture(params=NAMES)
def result(request: pytest.FixtureRequest) -> Rendered:
    return rendered(request.param)


def test_pods_are_not_root_and_have_no_token(result: Rendered):
    for pod, _ in result.containers():
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["runAsGroup"] == 10001
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert result.named("ServiceAccount", pod["serviceAccountName"])["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)


def test_containers_may_do_nothing_but_write_to_their_own_two_directories(result: Rendered):
    for pod, container in result.containers():
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        writable = {path for path, volume in mounts.items() if "sizeLimit" in volume.get("emptyDir", {})}
        assert writable == {"/tmp", "/var/lib/camserve"}
        assert all("secret" in mounts[path] for path in mounts.keys() - writable)


def test_no_two_containers_share_a_directory(result: Rendered):
    for deployment in result.of("Deployment"):
        pod = deployment["spec"]["template"]["spec"]
        mounted = [
            mount["name"]
            for container in (*pod.get("initContainers", []), *pod["containers"])
            for mount in container["volumeMounts"]
        ]
        assert sorted(mounted) == sorted(volume["name"] for volume in pod["volumes"])


def test_containers_ask_for_what_they_use_and_have_limits(result: Rendered):
    for _, container in result.containers():
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert {"cpu", "memory", "ephemeral-storage"} <= requests.keys() == limits.keys()
        assert requests["memory"] == limits["memory"]


def test_directories_fit_into_the_storage_that_is_asked_for(result: Rendered):
    for pod, container in result.containers():
        sizes = {volume["name"]: volume.get("emptyDir", {}).get("sizeLimit", "0Mi") for volume in pod["volumes"]}
        mounted = sum(mebibytes(sizes[mount["name"]]) for mount in container["volumeMounts"])
        assert mounted <= mebibytes(container["resources"]["limits"]["ephemeral-storage"])


def mebibytes(quantity: str) -> int:
    return int(quantity[:-2]) * {"Mi": 1, "Gi": 1024}[quantity[-2:]]


def test_every_container_runs_a_command_that_there_is(result: Rendered):
    for _, container in result.containers():
        assert container["image"].rpartition("/")[2].partition(":")[0] == "camserve"
        (name,) = container["args"]
        commands[name].make_context(name, [])


def test_probes_ask_for_what_the_gateway_answers(result: Rendered):
    for _, container in result.running("gateway"):
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        probes = [container[f"{name}Probe"] for name in ("startup", "readiness", "liveness")]
        if "tls" in result.name:
            asked = [parsed_probe(probe) for probe in probes]
            assert [(probe["service"], probe["live"]) for probe in asked] == [
                ("gateway", True),
                ("gateway", False),
                ("gateway", True),
            ]
        else:
            assert {probe["grpc"]["port"] for probe in probes} == {ports["grpc"]}
            assert [probe["grpc"].get("service", "") for probe in probes] == ["", SERVICE, ""]


def test_torchserve_is_probed_from_inside(result: Rendered):
    for pod, container in result.running("worker"):
        assert parsed_probe(container["startupProbe"])["service"] == "worker"
        assert parsed_probe(container["livenessProbe"])["service"] == "worker"
        if container in pod["containers"]:
            assert parsed_probe(container["readinessProbe"])["service"] == "worker"


def parsed_probe(probe: dict[str, Any]) -> dict[str, Any]:
    """The command of an exec probe as click understands it; it answers before the kubelet gives up."""
    name, command, *arguments = probe["exec"]["command"]
    assert name == "camserve"
    parsed = commands[command].make_context(command, arguments).params
    assert parsed["timeout_s"] < probe["timeoutSeconds"]
    return parsed


def test_torchserve_has_the_time_that_its_settings_give_it_to_start(result: Rendered, variables):
    for _, container in result.running("worker"):
        variables(result.environment(container))
        probe = container["startupProbe"]
        assert probe["periodSeconds"] * probe["failureThreshold"] >= WorkerSettings.load().start_timeout_s


def test_torchserve_is_left_alone_while_it_restarts_a_worker(result: Rendered):
    for _, container in result.running("worker"):
        probe = container["livenessProbe"]
        assert probe["periodSeconds"] * probe["failureThreshold"] > 300  # it tries for so long


def test_a_pod_has_the_time_to_drain(result: Rendered, variables):
    for pod, container in result.running("gateway"):
        variables(result.environment(container))
        needed_s = manifests.seconds_of_sleep(container) + Settings.load(allow_plaintext=True).drain_s
        needed_s += WorkerSettings.load().stop_timeout_s if "initContainers" in pod else 0
        assert pod["terminationGracePeriodSeconds"] > needed_s + 5
    for pod, container in result.running("worker"):
        variables(result.environment(container))
        needed_s = manifests.seconds_of_sleep(container) + WorkerSettings.load().stop_timeout_s
        assert pod["terminationGracePeriodSeconds"] > needed_s + 5


def test_a_gateway_takes_no_calls_before_it_ends(result: Rendered):
    for _, container in result.running("gateway"):
        assert manifests.seconds_of_sleep(container) > 0


def test_torchserve_ends_after_the_gateway_of_its_pod(result: Rendered):
    beside = [container for pod, container in result.running("worker") if container in pod.get("initContainers", [])]
    assert len(beside) == (0 if "split" in result.name else 1)
    assert all(container["restartPolicy"] == "Always" for container in beside)


def test_gateways_ask_clients_to_connect_anew(result: Rendered, variables):
    for _, container in result.running("gateway"):
        variables(result.environment(container))
        assert 60 <= Settings.load(allow_plaintext=True).max_connection_age_s <= 3600


@pytest.mark.parametrize("name", ["gpu", "split+gpu", "keda+split+gpu", "overlays/prod"])
def test_a_gpu_is_where_torchserve_runs(name: str):
    result = rendered(name)
    for pod, container in result.containers():
        resources = container["resources"]
        wanted = 1 if container["args"] == ["worker"] else None
        assert resources["requests"].get("nvidia.com/gpu") == resources["limits"].get("nvidia.com/gpu") == wanted
        tolerated = "nvidia.com/gpu" in json.dumps(pod.get("tolerations", []))
        assert tolerated or container["args"] == ["gateway"]


@pytest.mark.parametrize("name", ["base", "overlays/dev", "split", "tls"])
def test_without_the_component_no_gpu_is_asked_for(name: str):
    assert "nvidia.com/gpu" not in json.dumps(rendered(name).resources)


def test_production_is_spread_over_zones_and_nodes():
    (deployment,) = rendered("overlays/prod").of("Deployment")
    template = deployment["spec"]["template"]
    constraints = template["spec"]["topologySpreadConstraints"]
    assert [constraint["topologyKey"] for constraint in constraints] == [
        "topology.kubernetes.io/zone",
        "kubernetes.io/hostname",
    ]
    assert all(manifests.chosen(one["labelSelector"], template["metadata"]["labels"]) for one in constraints)

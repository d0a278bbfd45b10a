"""What is around the pods: names, labels, selectors, ports, autoscalers, fences; and that the parts fit each other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import manifests
import monitoring
import pytest
import yaml
from manifests import LABELS, Rendered, Resource, chosen, rendered

from camserve import __version__
from camserve.cli.commands import camserve
from camserve.gateway.ops.metrics import catalogue
from camserve.gateway.ops.settings import Settings
from camserve.supervisor import WorkerSettings

WORK = "camserve_waiting_work_seconds"
ALL = "+".join(manifests.COMPONENTS)
NAMES = ["base", "overlays/dev", "overlays/prod", "split", "keda", "keda+split", "tls+split", ALL]


@pytest.fixture(params=NAMES)
def result(request: pytest.FixtureRequest) -> Rendered:
    return rendered(request.param)


def pod_labels(result: Rendered) -> dict[str, dict[str, str]]:
    """Of each Deployment's pods, by name."""
    return {one["metadata"]["name"]: one["spec"]["template"]["metadata"]["labels"] for one in result.of("Deployment")}


def selected(selector: dict[str, Any], result: Rendered) -> list[str]:
    return [name for name, labels in pod_labels(result).items() if chosen(selector, labels)]


@pytest.mark.parametrize("name", [*manifests.DIRECTORIES, ALL])
def test_everything_has_the_recommended_labels(name: str):
    result = rendered(name)
    for resource in result.resources:
        labels = resource["metadata"]["labels"]
        assert labels.keys() >= LABELS, resource["metadata"]["name"]
        assert labels["app.kubernetes.io/version"] == __version__
    assert all(labels.keys() >= LABELS for labels in pod_labels(result).values())


@pytest.mark.parametrize("name", ["overlays/dev", "overlays/prod"])
def test_images_have_the_version_of_the_package(name: str):
    assert {container["image"].rpartition(":")[2] for _, container in rendered(name).containers()} == {__version__}


def test_each_deployment_selects_its_own_pods(result: Rendered):
    for deployment in result.of("Deployment"):
        assert selected(deployment["spec"]["selector"], result) == [deployment["metadata"]["name"]]


def test_each_selector_chooses_the_pods_of_one_deployment(result: Rendered):
    for resource in result.of("PodDisruptionBudget"):
        assert len(selected(resource["spec"]["selector"], result)) == 1
    for resource in result.of("NetworkPolicy"):
        assert len(selected(resource["spec"]["podSelector"], result)) == 1
    for service in result.of("Service"):
        assert len(selected({"matchLabels": service["spec"]["selector"]}, result)) == 1


def test_services_name_ports_that_their_pods_have(result: Rendered):
    for service in result.of("Service"):
        (name,) = selected({"matchLabels": service["spec"]["selector"]}, result)
        ports = named_ports(result.named("Deployment", name))
        for port in service["spec"]["ports"]:
            assert port["port"] == ports[port["targetPort"]]


def named_ports(deployment: Resource) -> dict[str, int]:
    containers = deployment["spec"]["template"]["spec"]["containers"]
    return {port["name"]: port["containerPort"] for one in containers for port in one.get("ports", [])}


def test_ports_are_those_of_the_settings(result: Rendered, variables):
    for _, container in result.running("gateway"):
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        variables({})
        defaults = Settings.load(listen="127.0.0.1:8500")
        variables(result.environment(container))
        for settings in (defaults, Settings.load(allow_plaintext=True)):
            assert ports == {"grpc": port_of(settings.listen), "metrics": port_of(settings.metrics_listen)}
    for _, container in result.running("worker"):
        variables(result.environment(container))
        settings, usual = WorkerSettings.load(), WorkerSettings.model_fields
        for name in ("grpc_listen", "management_listen"):
            assert port_of(getattr(settings, name)) == port_of(usual[name].default)
        if "ports" in container:
            ports = {port["name"]: port["containerPort"] for port in container["ports"]}
            assert ports == {
                "torchserve": port_of(settings.grpc_listen),
                "management": port_of(settings.management_listen),
            }


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


def test_gateways_look_for_torchserve_where_it_is(result: Rendered, variables):
    ((_, gateway),), ((pod, worker),) = result.running("gateway"), result.running("worker")
    variables(result.environment(gateway))
    (upstream,) = Settings.load(allow_plaintext=True).upstreams
    host, *ports = upstream.split(":")
    variables(result.environment(worker))
    settings = WorkerSettings.load()
    assert [int(port) for port in ports] == [port_of(settings.grpc_listen), port_of(settings.management_listen)]
    if host == "127.0.0.1":
        assert gateway in pod["containers"]
    else:
        service = result.named("Service", host)
        assert service["spec"]["clusterIP"] == "None"
        assert {port["port"] for port in service["spec"]["ports"]} == {int(port) for port in ports}
        assert selected({"matchLabels": service["spec"]["selector"]}, result) == ["camserve-worker"]


def test_there_is_a_service_with_an_address_and_one_with_all_of_them(result: Rendered):
    assert result.named("Service", "camserve")["spec"]["type"] == "ClusterIP"
    assert result.named("Service", "camserve-headless")["spec"]["clusterIP"] == "None"


def test_replicas_are_the_autoscalers_to_say(result: Rendered):
    scaled = {one["spec"]["scaleTargetRef"]["name"] for one in result.of("HorizontalPodAutoscaler", "ScaledObject")}
    for deployment in result.of("Deployment"):
        assert ("replicas" in deployment["spec"]) == (deployment["metadata"]["name"] not in scaled)
    assert scaled <= set(pod_labels(result))


def test_work_that_waits_scales_where_torchserve_runs(result: Rendered):
    scalers = list(queue_scalers(result))
    if result.name != "overlays/dev":
        ((name, metric, _),) = scalers
        assert name == ("camserve-worker" if "split" in result.name else "camserve")
        assert metric in (WORK, f'sum({WORK}{{job="camserve"}})')
        assert catalogue()[WORK].type == "gauge"


@pytest.mark.parametrize("name", [name for name in NAMES if name != "overlays/dev"])
def test_more_pods_come_before_the_alert_and_the_alert_before_anything_is_refused(name: str):
    """All three count seconds of work, so that no component has a figure of its own: a GPU's seconds are as long."""
    ((_, _, work_s),) = queue_scalers(rendered(name))
    (alert,) = (rule for rule in monitoring.alerts() if rule["alert"] == "CamserveQueueSaturated")
    alert_s = float(alert["expr"].rpartition(">")[2])
    assert work_s == 15
    assert 2 * work_s < alert_s < Settings.model_fields["max_waiting_s"].default / 2


def queue_scalers(result: Rendered) -> Iterator[tuple[str, str, float]]:
    """Yields what is scaled on waiting work, the metric's name or the PromQL, and how much may wait for each pod."""
    for scaler in result.of("HorizontalPodAutoscaler"):
        for metric in scaler["spec"]["metrics"]:
            if metric["type"] != "Resource":
                one = metric[metric["type"].lower()]
                assert one["target"]["type"] == "AverageValue"
                target = float(one["target"]["averageValue"])
                yield scaler["spec"]["scaleTargetRef"]["name"], one["metric"]["name"], target
    for scaler in result.of("ScaledObject"):
        for trigger in scaler["spec"]["triggers"]:
            assert trigger["metricType"] == "AverageValue"
            told = trigger["metadata"]
            yield scaler["spec"]["scaleTargetRef"]["name"], told["query"], float(told["threshold"])


def test_scaling_down_is_slow(result: Rendered):
    for scaler in result.of("HorizontalPodAutoscaler"):
        assert scaler["spec"]["behavior"]["scaleDown"]["stabilizationWindowSeconds"] >= 300
    for scaler in result.of("ScaledObject"):
        behaviour = scaler["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
        assert behaviour["scaleDown"]["stabilizationWindowSeconds"] >= 300


def test_production_has_a_floor_and_a_budget():
    result = rendered("overlays/prod")
    (scaler,), (budget,) = result.of("HorizontalPodAutoscaler"), result.of("PodDisruptionBudget")
    assert scaler["spec"]["minReplicas"] >= 2
    assert budget["spec"]["maxUnavailable"] < scaler["spec"]["minReplicas"]
    assert result.of("NetworkPolicy")


def test_development_is_one_replica_without_what_a_laptop_lacks():
    result = rendered("overlays/dev")
    assert result.named("Deployment", "camserve")["spec"]["replicas"] == 1
    assert not result.of("HorizontalPodAutoscaler", "PodDisruptionBudget", "NetworkPolicy")


def test_the_adapter_has_rules_for_what_the_autoscalers_ask():
    rules = yaml.safe_load((manifests.KUBERNETES / "prometheus-adapter.yaml").read_text())["rules"]
    for kind, name in (("custom", "base"), ("external", "split")):
        asked = {metric for _, metric, _ in queue_scalers(rendered(name))}
        assert {rule["seriesQuery"].partition("{")[0] for rule in rules[kind]} == asked


def fences(result: Rendered) -> dict[str, Resource]:
    """The one policy of each Deployment."""
    policies = result.of("NetworkPolicy")
    found = {selected(policy["spec"]["podSelector"], result)[0]: policy["spec"] for policy in policies}
    assert len(found) == len(policies)
    return found


@pytest.mark.parametrize("name", ["base", "overlays/prod", "split", ALL])
def test_every_pod_is_fenced(name: str):
    result = rendered(name)
    assert fences(result).keys() == pod_labels(result).keys()
    for deployment, fence in fences(result).items():
        assert set(fence["policyTypes"]) == {"Ingress", "Egress"}
        ports = named_ports(result.named("Deployment", deployment))
        opened = [port["port"] for rule in fence["ingress"] for port in rule["ports"]]
        assert sorted(opened) == sorted(ports)
        assert all(rule["from"] for rule in fence["ingress"])


@pytest.mark.parametrize("name", ["base", "overlays/prod", "split"])
def test_pods_call_nobody_but_name_servers_and_torchserve(name: str):
    for deployment, fence in fences(rendered(name)).items():
        called = [port["port"] for rule in fence.get("egress", []) for port in rule["ports"]]
        torchserve = ["torchserve", "management"] if name == "split" else []
        assert called == ([] if deployment == "camserve-worker" else [53, 53, *torchserve])
        assert all(rule["to"] for rule in fence.get("egress", []))


def test_torchserve_in_pods_of_its_own_is_for_gateways_alone():
    result = rendered("split")
    (rule,) = fences(result)["camserve-worker"]["ingress"]
    (peer,) = rule["from"]
    assert set(peer) == {"podSelector"}
    assert selected(peer["podSelector"], result) == ["camserve"]


def test_prometheus_finds_each_pod_once():
    result = rendered("prometheus-operator+split")
    (monitor,) = result.of("ServiceMonitor")
    (endpoint,) = monitor["spec"]["endpoints"]
    found = [
        service["metadata"]["name"]
        for service in result.of("Service")
        if chosen(monitor["spec"]["selector"], service["metadata"]["labels"])
        and endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    ]
    assert found == ["camserve-headless"]
    assert result.named("Service", *found)["metadata"]["labels"][monitor["spec"]["jobLabel"]] == "camserve"


def test_the_rules_of_the_operator_are_those_of_prometheus():
    prometheus = manifests.ROOT / "deploy" / "prometheus"
    files = [yaml.safe_load((prometheus / name).read_text()) for name in ("recording.yml", "alerts.yml")]
    (rule,) = rendered("prometheus-operator").of("PrometheusRule")
    assert rule["spec"]["groups"] == [group for file in files for group in file["groups"]], (
        "run python deploy/kubernetes/components/prometheus-operator/generate.py"
    )


def test_the_dashboard_is_the_file_and_grafana_finds_it():
    (dashboard,) = [one for one in rendered("grafana-dashboard").of("ConfigMap") if "camserve.json" in one["data"]]
    text = (manifests.ROOT / "deploy" / "grafana" / "camserve.json").read_text()
    assert json.loads(dashboard["data"]["camserve.json"]) == json.loads(text)
    assert dashboard["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert len(text.encode()) < 2**20  # what a ConfigMap holds


def test_tls_takes_plain_text_away(variables):
    result = rendered("tls")
    ((pod, container),) = result.running("gateway")
    (volume,) = [volume for volume in pod["volumes"] if "secret" in volume]
    (mount,) = [mount for mount in container["volumeMounts"] if mount["name"] == volume["name"]]
    variables(result.environment(container))
    settings = Settings.load()
    assert settings.allow_plaintext is False
    assert {path.parent.as_posix() for path in (settings.tls_cert, settings.tls_key)} == {mount["mountPath"]}
    assert volume["secret"]["secretName"] == "camserve-tls"
    assert not any("appProtocol" in port for one in result.of("Service") for port in one["spec"]["ports"][:1])


def test_kserve_finds_the_runtime(variables):
    result = rendered("components/kserve")
    (runtime,), (service,) = result.of("ServingRuntime"), result.of("InferenceService")
    model = service["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    assert model["modelFormat"]["name"] in {one["name"] for one in runtime["spec"]["supportedModelFormats"]}
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
    (container,) = runtime["spec"]["containers"]
    variables({one["name"]: one["value"] for one in container["env"]})
    assert container["ports"][0]["containerPort"] == port_of(Settings.load().listen)
    assert str(port_of(Settings.load().metrics_listen)) == runtime["spec"]["annotations"]["prometheus.kserve.io/port"]
    needed_s = Settings.load().drain_s + WorkerSettings.load().stop_timeout_s
    assert service["spec"]["predictor"]["terminationGracePeriodSeconds"] > needed_s


def test_the_bulk_job_runs_a_command_that_there_is():
    (job,) = rendered("components/bulk").of("Job")
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    name, *arguments = container["args"]
    command = camserve.commands[name]
    given = command.make_context(name, list(arguments)).params
    mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in container["volumeMounts"]}
    assert mounts[str(given["image"])] is True
    assert mounts[str(given["out"])] is False, "the journal is written there"
    assert given["priority"] == "batch"
    host, _, port = given["address"].partition(":")
    prod = rendered("overlays/prod")
    service = prod.named("Service", host.split(".")[0])
    assert service["metadata"]["namespace"] == host.split(".")[1]
    assert int(port) in [each["port"] for each in service["spec"]["ports"]]
    (rule,) = job["spec"]["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}

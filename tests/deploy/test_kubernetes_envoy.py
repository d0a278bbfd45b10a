"""The component envoy: its pods, fences and files fit each other; tests/service/test_envoy.py has Envoy run them."""

from __future__ import annotations

import json
import re
from typing import Any

import manifests
import pytest
import yaml
from manifests import LABELS, Rendered, Resource, chosen, rendered
from test_kubernetes_valid import validate

from camserve import __version__
from camserve.gateway.ops.settings import Settings

NAMES = ["envoy", "envoy+tls", "envoy+tls+split"]


@pytest.fixture(params=NAMES)
def result(request: pytest.FixtureRequest) -> Rendered:
    return rendered(request.param)


def pod_of(result: Rendered) -> tuple[Resource, Resource]:
    """(the pod's template, its container)."""
    template = result.named("Deployment", "camserve-envoy")["spec"]["template"]
    (container,) = template["spec"]["containers"]
    return template, container


def test_every_resource_is_valid_and_labelled(result: Rendered):
    for resource in result.resources:
        validate(json.dumps(resource, sort_keys=True))
        assert resource["metadata"]["labels"].keys() >= LABELS
        assert resource["metadata"]["labels"]["app.kubernetes.io/version"] == __version__


def test_the_pod_is_as_secure_as_the_gateways(result: Rendered):
    template, container = pod_of(result)
    ((theirs, gateway),) = result.running("gateway")
    for name in ("securityContext", "automountServiceAccountToken", "enableServiceLinks"):
        assert template["spec"][name] == theirs[name]
    assert container["securityContext"] == gateway["securityContext"]
    assert "memory" in container["resources"]["limits"]
    needed_s = manifests.seconds_of_sleep(container)
    assert template["spec"]["terminationGracePeriodSeconds"] > needed_s + 5


def test_selectors_choose_the_pod_alone(result: Rendered):
    templates = {one["metadata"]["name"]: one["spec"]["template"] for one in result.of("Deployment")}
    for kind, selector in (
        ("Service", "selector"),
        ("PodDisruptionBudget", "selector"),
        ("NetworkPolicy", "podSelector"),
    ):
        found = result.named(kind, "camserve-envoy")["spec"][selector]
        wanted = found if "matchLabels" in found else {"matchLabels": found}
        assert [name for name, template in templates.items() if chosen(wanted, template["metadata"]["labels"])] == [
            "camserve-envoy"
        ]


def files(result: Rendered) -> dict[str, Any]:
    """Envoy's files by the path that the pod sees them under, read."""
    template, container = pod_of(result)
    (mount,) = [mount for mount in container["volumeMounts"] if mount["name"] == "config"]
    (volume,) = [volume["configMap"] for volume in template["spec"]["volumes"] if volume["name"] == "config"]
    data = result.named("ConfigMap", volume["name"])["data"]
    return {f"{mount['mountPath']}/{one['path']}": yaml.safe_load(data[one["key"]]) for one in volume["items"]}


def test_every_file_that_envoy_reads_is_mounted(result: Rendered):
    template, container = pod_of(result)
    there, text = files(result), json.dumps(files(result))
    mounted = tuple(mount["mountPath"] for mount in container["volumeMounts"])
    for path in re.findall(r'"(?:filename|path)": "(/etc/[^"]+)"', text):
        assert path in there or path.rpartition("/")[0] in mounted or path in mounted, path
    assert container["args"][2] in there
    secrets = {one["name"]: one["secret"]["secretName"] for one in template["spec"]["volumes"] if "secret" in one}
    expected = {"tls": "camserve-envoy-tls"} | ({"gateways-ca": "camserve-tls"} if "tls" in result.name else {})
    assert secrets == expected


def test_ports_are_those_of_the_files(result: Rendered):
    _, container = pod_of(result)
    read = files(result)
    listening = {
        listener["name"]: listener["address"]["socket_address"]["port_value"]
        for listener in read["/etc/envoy/envoy.yaml"]["static_resources"]["listeners"]
    }
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"https": listening["calls"], "health": listening["health"]}
    assert result.named("Service", "camserve-envoy")["spec"]["ports"][0]["targetPort"] == "https"
    (cluster,) = read["/etc/envoy/gateways.yaml"]["resources"]
    (endpoints,) = cluster["load_assignment"]["endpoints"]
    (one,) = endpoints["lb_endpoints"]
    where = one["endpoint"]["address"]["socket_address"]
    service = result.named("Service", where["address"])
    assert service["spec"]["clusterIP"] == "None", "all pods, and not one address in front of them"
    assert where["port_value"] == service["spec"]["ports"][0]["port"]


def test_envoy_speaks_to_the_gateways_as_they_do(result: Rendered, variables):
    ((_, gateway),) = result.running("gateway")
    variables(result.environment(gateway))
    settings = Settings.load()
    (cluster,) = files(result)["/etc/envoy/gateways.yaml"]["resources"]
    assert ("transport_socket" in cluster) == (settings.tls_cert is not None) == ("tls" in result.name)
    if "tls" in result.name:
        certificate = yaml.safe_load((manifests.KUBERNETES / "components/tls/certificate.yaml").read_text())
        assert cluster["transport_socket"]["typed_config"]["sni"] in certificate["spec"]["dnsNames"]


def test_the_two_ways_to_the_gateways_differ_by_tls_alone():
    (plain,) = files(rendered("envoy"))["/etc/envoy/gateways.yaml"]["resources"]
    (secured,) = files(rendered("envoy+tls"))["/etc/envoy/gateways.yaml"]["resources"]
    assert plain == {name: value for name, value in secured.items() if name != "transport_socket"}


def test_the_fences_let_envoy_reach_gateways_and_nothing_else(result: Rendered):
    template, _ = pod_of(result)
    labels = template["metadata"]["labels"]
    fence = result.named("NetworkPolicy", "camserve-envoy")["spec"]
    (rule,) = fence["ingress"]
    assert [port["port"] for port in rule["ports"]] == ["https"]
    assert [port["port"] for rule in fence["egress"] for port in rule["ports"]] == ["grpc", 53, 53]
    let_in = [
        [port["port"] for port in rule["ports"]]
        for rule in result.named("NetworkPolicy", "camserve")["spec"]["ingress"]
        for peer in rule["from"]
        if "podSelector" in peer and chosen(peer["podSelector"], labels)
    ]
    assert let_in == [["grpc"]]
    gateway = result.named("Deployment", "camserve")["spec"]["template"]["metadata"]["labels"]
    assert chosen(fence["egress"][0]["to"][0]["podSelector"], gateway)

"""Every kustomization, and every choice of components, is valid to the schemas, strictly."""

from __future__ import annotations

import functools
import json
from typing import Any

import jsonschema
import kubernetes_validate
import manifests
import pytest
import yaml
from manifests import rendered

OLDEST = "1.29"
"""Sidecar containers are on by default from here."""
VERSIONS = (OLDEST, "1.33", kubernetes_validate.latest_version())

NAMES = [*manifests.DIRECTORIES, *("+".join(components) for components in manifests.subsets() if components)]


@pytest.mark.parametrize("name", NAMES)
def test_every_resource_is_valid(name: str):
    for resource in rendered(name).resources:
        validate(json.dumps(resource, sort_keys=True))


@functools.cache
def validate(text: str) -> None:
    """A resource as JSON; cached, since most are the same everywhere."""
    resource = json.loads(text)
    schema = manifests.SCHEMAS / f"{resource['kind'].lower()}.json"
    if schema.exists():
        jsonschema.Draft202012Validator(json.loads(schema.read_text())).validate(resource)
        return
    for version in VERSIONS:
        kubernetes_validate.validate(resource, version, strict=True)


def test_the_pod_of_kserve_is_valid():
    (runtime,) = rendered("components/kserve").of("ServingRuntime")
    spec = {name: runtime["spec"][name] for name in ("containers", "volumes")}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "any"}, "spec": spec}
    for version in VERSIONS:
        kubernetes_validate.validate(pod, version, strict=True)


def test_the_example_of_a_certificate_is_valid():
    certificate = yaml.safe_load((manifests.KUBERNETES / "components/tls/certificate.yaml").read_text())
    validate(json.dumps(certificate))
    assert certificate["spec"]["secretName"] == "camserve-tls"


@pytest.mark.parametrize("kind", ["ScaledObject", "ServiceMonitor", "PrometheusRule"])
def test_a_misspelt_field_is_seen(kind: str):
    (resource,) = rendered("prometheus-operator+keda").of(kind)
    with pytest.raises(jsonschema.ValidationError):
        validate(json.dumps(resource | {"spec": resource["spec"] | {"selektor": {}}}))


def test_a_misspelt_field_of_a_deployment_is_seen():
    (deployment,) = rendered("base").of("Deployment")
    wrong: dict[str, Any] = json.loads(json.dumps(deployment))
    wrong["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(json.dumps(wrong))

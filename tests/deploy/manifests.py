"""The Kubernetes manifests as `kubectl kustomize` renders them, and how the tests look into them."""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

Resource = dict[str, Any]

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
SCHEMAS = Path(__file__).parent / "schemas"

COMPONENTS = ("prometheus-operator", "grafana-dashboard", "tls", "keda", "split", "gpu")
"""Those that go over the base, in the order in which they are to be named."""

DIRECTORIES = ("base", "overlays/dev", "overlays/prod", "components/kserve", "components/bulk")
"""What stands by itself."""

OLDEST_KUSTOMIZE = (5, 0)
"""It has components, and deletes with `$patch` in a patch of its own."""

LABELS = {f"app.kubernetes.io/{name}" for name in ("name", "instance", "version", "component", "part-of", "managed-by")}


def subsets() -> Iterator[tuple[str, ...]]:
    """Every choice of components."""
    for size in range(len(COMPONENTS) + 1):
        yield from itertools.combinations(COMPONENTS, size)


@dataclass(frozen=True)
class Rendered:
    """The resources of one kustomization."""

    name: str
    resources: tuple[Resource, ...]

    def of(self, *kinds: str) -> list[Resource]:
        """Those of some kinds."""
        return [resource for resource in self.resources if resource["kind"] in kinds]

    def named(self, kind: str, name: str) -> Resource:
        """The one; fails if there is none."""
        return next(resource for resource in self.of(kind) if resource["metadata"]["name"] == name)

    def environment(self, container: Resource) -> dict[str, str]:
        """The variables that a container gets from ConfigMaps, each of which has to be there."""
        return {
            key: value
            for source in container.get("envFrom", [])
            for key, value in self.named("ConfigMap", source["configMapRef"]["name"])["data"].items()
        }

    def containers(self) -> Iterator[tuple[Resource, Resource]]:
        """(pod's spec, container), of all Deployments."""
        for deployment in self.of("Deployment"):
            pod = deployment["spec"]["template"]["spec"]
            for container in (*pod.get("initContainers", []), *pod["containers"]):
                yield pod, container

    def running(self, command: str) -> list[tuple[Resource, Resource]]:
        """(pod's spec, container), where the container runs `camserve <command>`."""
        return [(pod, container) for pod, container in self.containers() if container["args"] == [command]]


def rendered(name: str) -> Rendered:
    """One of `DIRECTORIES`, or components over the base: `split+gpu`."""
    return Rendered(name, _rendered(name))


@functools.cache
def _rendered(name: str) -> tuple[Resource, ...]:
    if name in DIRECTORIES:
        return kustomize(KUBERNETES / name)
    with tempfile.TemporaryDirectory() as directory:
        # kustomize takes no absolute paths.
        where = {part: os.path.relpath(KUBERNETES / part, os.path.realpath(directory)) for part in _parts(name)}
        own = {"resources": [where.pop("base")], "components": list(where.values())}
        (Path(directory) / "kustomization.yaml").write_text(json.dumps(own))
        return kustomize(Path(directory))


def _parts(name: str) -> list[str]:
    return ["base", *(f"components/{component}" for component in name.split("+") if component != "base")]


def kustomize(directory: Path) -> tuple[Resource, ...]:
    """What `kubectl kustomize` makes of a directory; skips where there is none that can."""
    command = [_kubectl(), "kustomize", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return tuple(yaml.safe_load_all(done.stdout))


def _kubectl() -> str:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("the manifests are not checked: there is no kubectl on PATH to render them")
    version = _kustomize_version(kubectl)
    if version < OLDEST_KUSTOMIZE:
        found = ".".join(map(str, version)) or "none"
        pytest.skip(f"the manifests are not checked: kubectl has kustomize {found}, 5.0 or newer is needed")
    return kubectl


@functools.cache
def _kustomize_version(kubectl: str) -> tuple[int, ...]:
    """Empty where kubectl does not tell: it is older than all that would do."""
    command = [kubectl, "version", "--client", "--output=json"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False).stdout
    version = json.loads(told or "{}").get("kustomizeVersion", "")
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def seconds_of_sleep(container: Resource) -> float:
    """How long the container's preStop takes."""
    hook = container.get("lifecycle", {}).get("preStop")
    if hook is None:
        return 0.0
    name, seconds = hook["exec"]["command"]
    assert name == "sleep"
    return float(seconds)


def chosen(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a selector with nothing but matchLabels chooses these labels."""
    assert set(selector) == {"matchLabels"}
    return selector["matchLabels"].items() <= labels.items()


def dockerfile_environment() -> dict[str, str]:
    """The CAMSERVE_ variables that the image sets."""
    return dict(re.findall(r"(CAMSERVE_\w+)=(\S+)", (ROOT / "Dockerfile").read_text().partition("ENV PATH")[2]))

"""Writes prometheusrule.yaml: the rules of deploy/prometheus as a resource of the Prometheus operator.

kustomize cannot put a file into a resource, so the rules are there twice; a test holds both alike.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
RULES = HERE.parents[2] / "prometheus"
FILES = ("recording.yml", "alerts.yml")


class _Readable(yaml.SafeDumper):
    """Writes long texts over several lines, and indents lists within their keys."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        """Indents lists, as people write them."""
        super().increase_indent(flow, False)


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Readable.add_representer(str, _text)


def rules() -> dict[str, Any]:
    """Returns the resource."""
    groups = [group for name in FILES for group in yaml.safe_load((RULES / name).read_text("utf-8"))["groups"]]
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "camserve", "labels": {"app.kubernetes.io/component": "gateway"}},
        "spec": {"groups": groups},
    }


def text() -> str:
    """Returns the content of the file."""
    body = yaml.dump(rules(), Dumper=_Readable, sort_keys=False, width=120, allow_unicode=True)
    return f"# Generated from deploy/prometheus by generate.py beside it; do not edit.\n{body}"


if __name__ == "__main__":
    (HERE / "prometheusrule.yaml").write_text(text(), encoding="utf-8")

"""What importing camserve costs: each import in a fresh process."""

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "torchvision", "grpc", "scipy", "PIL", "click", "rich", "google.protobuf")


def loaded_by(code: str) -> set[str]:
    """Which of `HEAVY` a fresh Python has loaded after this code."""
    program = f"{code}\nimport json, sys; print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    return set(json.loads(answer.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("camserve", {"torch", "grpc", "scipy", "PIL", "google.protobuf"}),
        ("camserve.methods", {"torch", "grpc", "scipy", "PIL", "google.protobuf"}),
        ("camserve.client", {"torch", "scipy", "click", "rich"}),
        ("camserve.finalise.maps", {"torch", "grpc", "scipy"}),
        ("camserve.finalise.render", {"torch", "grpc", "scipy"}),
        ("camserve.planning", {"torch", "grpc", "google.protobuf"}),
        ("camserve.gateway.server", {"torch"}),
        ("camserve.archive", {"torch"}),
        ("camserve.saliency", {"grpc"}),
        ("camserve.cli", {"torch", "grpc", "scipy", "PIL", "rich", "google.protobuf"}),
    ],
)
def test_import_loads_only_what_it_needs(module, unwanted):
    assert not loaded_by(f"import {module}") & unwanted


def test_help_loads_nothing_heavy():
    code = """
from camserve.cli import main
import sys
sys.argv = ["camserve", "--help"]
try:
    main()
except SystemExit as end:
    assert end.code == 0, end.code
"""
    assert loaded_by(code) <= {"click"}


@pytest.mark.parametrize("name", ["Client", "AsyncClient", "Engine", "Tls"])
def test_names_of_the_package_are_loaded_on_first_use(name):
    assert loaded_by(f"import camserve; camserve.{name}")


def test_help_of_a_command_loads_nothing_heavy():
    code = """
from camserve.cli import main
import sys
sys.argv = ["camserve", "explain", "--help"]
try:
    main()
except SystemExit as end:
    assert end.code == 0, end.code
"""
    assert loaded_by(code) <= {"click"}

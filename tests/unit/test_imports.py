"""What importing camserve costs, each import in a fresh process; and who imports whom, read from the sources."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import camserve

HEAVY = ("torch", "torchvision", "grpc", "scipy", "PIL", "click", "rich", "google.protobuf", "numpy", "asyncio")


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
        ("camserve.types.request", {"torch", "grpc", "scipy", "google.protobuf"}),
        ("camserve.finalise.results", {"torch", "grpc", "scipy", "google.protobuf"}),
        ("camserve.planning", set(HEAVY)),
        ("camserve.gateway.server", {"torch", "torchvision"}),
        ("camserve.worker.service", {"grpc"}),
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
    assert loaded_by(code) <= {"click", "numpy"}


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
    assert loaded_by(code) <= {"click", "numpy"}


SOURCES = Path(camserve.__file__).parent


def modules(sources: Path = SOURCES) -> dict[str, Path]:
    """Every module under a package's folder, with its file."""
    found = {}
    for path in sources.rglob("*.py"):
        names = (sources.name, *path.relative_to(sources).with_suffix("").parts)
        found[".".join(names[:-1] if names[-1] == "__init__" else names)] = path
    return found


def run_on_import(statements: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run while a module is imported: not those of functions, nor those for type checkers."""
    for statement in statements:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        yield statement
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            yield from run_on_import(statement.orelse)
            continue
        for field in ("body", "orelse", "finalbody"):
            yield from run_on_import(getattr(statement, field, []))
        for handler in getattr(statement, "handlers", []):
            yield from run_on_import(handler.body)


def imported(path: Path, known: Mapping[str, Path]) -> set[str]:
    """Those of the known modules that a file imports when it is imported itself."""
    found = set()
    for statement in run_on_import(ast.parse(path.read_text()).body):
        if isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom):
            assert not statement.level, f"{path}: imports are absolute"
            names = {f"{statement.module}.{alias.name}" for alias in statement.names}
            found |= {name if name in known else str(statement.module) for name in names}
    return found & set(known)


def graph(sources: Path = SOURCES) -> dict[str, set[str]]:
    known = modules(sources)
    return {name: imported(path, known) - {name} for name, path in known.items()}


def circle(imports: Mapping[str, set[str]]) -> list[str]:
    """A circle of imports; empty where there is none."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_there_is_no_circle_of_imports():
    found = graph()
    assert len(found) > 100
    assert "camserve.methods" in found["camserve.types.request"]
    assert not circle(found), " <- ".join(circle(found))


def test_a_circle_would_be_seen(tmp_path):
    """Through a function's import and through one for type checkers there is none."""
    package = tmp_path / "package"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "inner" / "__init__.py").write_text("from package import one\n")
    (package / "two.py").write_text("try:\n    import package.inner\nexcept ImportError:\n    pass\n")
    lazy = "def late():\n    from package import two\n"
    typed = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from package.two import Name\n"
    for harmless in (lazy, typed):
        (package / "one.py").write_text(harmless)
        assert not circle(graph(package))
    (package / "one.py").write_text("class Name:\n    from package.two import other\n")
    assert set(circle(graph(package))) == {"package.one", "package.two", "package.inner"}


LAYERS = {
    "camserve.errors": (),
    "camserve.wording": (),
    "camserve.types": (
        *("camserve.errors", "camserve.wording"),
        *("camserve.types", "camserve.methods", "camserve.images", "camserve.labels"),
    ),
    "camserve.methods": ("camserve.errors", "camserve.wording", "camserve.methods"),
    "camserve.planning": ("camserve.errors", "camserve.methods", "camserve.planning"),
}


@pytest.mark.parametrize("package", LAYERS)
def test_the_lowest_layers_know_nothing_above_them(package):
    for name, imports in graph().items():
        is_program = name.endswith(".__main__")  # which nobody imports
        if (name == package or name.startswith(f"{package}.")) and not is_program:
            assert not [one for one in imports if not one.startswith(LAYERS[package])], name


@pytest.mark.parametrize(
    ("package", "stranger"),
    [
        ("camserve.saliency", "camserve.finalise"),
        ("camserve.saliency", "camserve.codecs"),
        ("camserve.finalise", "camserve.saliency"),
        ("camserve.finalise", "camserve.codecs"),
        ("camserve.finalise", "camserve.planning"),
        ("camserve.codecs", "camserve.saliency"),
        ("camserve.codecs", "camserve.planning"),
        ("camserve.codecs", "camserve.gateway"),
        ("camserve.worker", "camserve.gateway"),
        ("camserve.gateway", "camserve.client"),
        ("camserve.client", "camserve.gateway"),
    ],
)
def test_neighbours_do_not_know_each_other(package, stranger):
    for name, imports in graph().items():
        is_program = name.endswith(".__main__")  # which nobody imports
        if (name == package or name.startswith(f"{package}.")) and not is_program:
            assert not [one for one in imports if one == stranger or one.startswith(f"{stranger}.")], name

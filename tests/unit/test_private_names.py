"""A private name belongs to its module: no test and no benchmark imports, reads or replaces one of camserve's."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(path for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
PRIVATE = re.compile(r"_[a-z]\w*", re.IGNORECASE)
PATH = re.compile(r"camserve(\.\w+)*\._[a-z]\w*", re.IGNORECASE)


def imported(tree: ast.AST) -> set[str]:
    """Returns the names by which a module knows what it imported of camserve."""
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {
        alias.asname or alias.name
        for node in statements
        if (node.module or "").partition(".")[0] == "camserve"
        for alias in node.names
    }


def private_names(source: str) -> Iterator[str]:
    """Yields each private name of camserve that a source imports, reads as an attribute, or replaces by its name."""
    tree = ast.parse(source)
    known = imported(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "camserve":
            yield from (alias.name for alias in node.names if PRIVATE.fullmatch(alias.name))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in known:
            if PRIVATE.fullmatch(node.attr):
                yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and PATH.fullmatch(node.value):
            yield node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "setattr":
            owner, name = [*node.args[:2], None, None][:2]
            if isinstance(owner, ast.Name) and owner.id in known and isinstance(name, ast.Constant):
                yield from (found for found in [str(name.value)] if PRIVATE.fullmatch(found))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_private_names_are_left_alone(path: Path):
    assert list(private_names(path.read_text())) == []


@pytest.mark.parametrize(
    "source",
    [
        "from camserve.saliency.group_cam import _weighted",
        "from camserve.saliency import group_cam\ngroup_cam._weighted(1)",
        "from camserve.saliency import group_cam\nmonkeypatch.setattr(group_cam, '_weighted', 1)",
        "monkeypatch.setattr('camserve.saliency.group_cam._weighted', 1)",
        "from camserve.planning import Planner\nPlanner._changed",
    ],
)
def test_a_private_name_is_found(source: str):
    assert list(private_names(source))


@pytest.mark.parametrize(
    "source",
    [
        "from camserve import __version__",
        "from camserve.planning import Planner\nPlanner.__init__",
        "from torch import _C",
        "from camserve.types import Cost\nCost(1)._replace",
    ],
)
def test_other_names_are_not(source: str):
    assert list(private_names(source)) == []

"""Every docstring of the sources can be understood alone: no fragments, read from the sources without running them."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "camserve"

FRAGMENT = re.compile(r"(of|as|so|what|whoever|whatever|whichever|how|that|those|also|nor)\b", re.IGNORECASE)
"""First words that make a docstring lean on its neighbours, whatever follows them."""
PHRASE = re.compile(
    r"(with|without|in|inside|by|for|from|to|at|on|into|where|when|while|if|unless|until|because|since|before|after"
    r"|behind|beside|between|beyond)\b",
    re.IGNORECASE,
)
"""First words of fragments and of sentences: a short one without a comma is taken for a fragment."""
SHORT = 7
"""Words of a first sentence that is long enough to have a verb behind its first phrase."""
UNWANTED = re.compile(r"\bso (many|long|often)\b", re.IGNORECASE)
SECTION = re.compile(r"(Args|Returns|Raises|Yields|Attributes|Example|Examples|Note|Notes):")

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Docstring:
    """A docstring, what it belongs to, and where it stands."""

    kind: str
    """module, class, function or attribute."""
    name: str
    line: int
    text: str

    @property
    def public(self) -> bool:
        return not self.name.rpartition(".")[2].startswith("_") or self.name.endswith("__")


def docstrings(tree: ast.Module) -> Iterator[Docstring]:
    """Yields the docstrings of a module, its classes, functions and attributes, however deep they stand."""
    yield from _docstrings(tree, "module", "")


def _docstrings(node: ast.Module | ast.ClassDef | Function, kind: str, name: str) -> Iterator[Docstring]:
    own = node.body[0] if node.body else None
    if (text := _string(own)) is not None:
        yield Docstring(kind, name or "module", getattr(own, "lineno", 1), text)
    yield from _within(node.body, name)


def _within(body: list[ast.stmt], outer: str) -> Iterator[Docstring]:
    for statement, follower in zip_longest(body, body[1:]):
        if isinstance(statement, ast.ClassDef):
            yield from _docstrings(statement, "class", f"{outer}.{statement.name}".strip("."))
        elif isinstance(statement, Function):
            yield from _docstrings(statement, "function", f"{outer}.{statement.name}".strip("."))
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)) and follower is not None:
            if (text := _string(follower)) is None:
                continue
            target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
            yield Docstring("attribute", f"{outer}.{ast.unparse(target)}".strip("."), follower.lineno, text)
        else:
            for block in _blocks(statement):
                yield from _within(block, outer)


def _blocks(statement: ast.stmt) -> Iterator[list[ast.stmt]]:
    """Yields the blocks of `if`, `try`, `with`, a loop or `match`."""
    for inner in [statement, *getattr(statement, "handlers", []), *getattr(statement, "cases", [])]:
        for field in ("body", "orelse", "finalbody"):
            yield getattr(inner, field, [])


def _string(statement: ast.stmt | None) -> str | None:
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        value = statement.value.value
        return inspect.cleandoc(value) if isinstance(value, str) else None
    return None


def faults(found: Docstring) -> list[str]:
    """What is wrong with a docstring."""
    checks = {
        "begins as a fragment": _is_fragment(found),
        "says so many, so long or so often": bool(UNWANTED.search(found.text)),
        "does not end with a full stop, a colon or a code block": not _ends_well(found.text),
        "does not begin with a capital letter": found.kind == "function"
        and found.public
        and not found.text[:1].isupper(),
    }
    return [fault for fault, is_so in checks.items() if is_so]


def _is_fragment(found: Docstring) -> bool:
    first = re.split(r"(?<=[.?!])\s|\n\n", found.text, maxsplit=1)[0]
    if re.match(r"whether\b", first, re.IGNORECASE):  # an attribute may be "Whether it is on."; a function tells
        return found.kind != "attribute"
    is_short = len(first.split()) < SHORT and "," not in first
    return bool(FRAGMENT.match(first) or (is_short and PHRASE.match(first)))


def _ends_well(text: str) -> bool:
    if text.endswith((".", ":", "```")):
        return True
    *before, last = text.split("\n\n")
    lines = last.splitlines()
    if before and all(line.startswith("    ") for line in lines):
        return True  # an indented block behind an empty line
    head = next((number for number, line in enumerate(lines) if line.startswith("    ")), 0)
    return head > 0 and lines[head - 1].endswith(":") and not SECTION.fullmatch(lines[head - 1])


def sources() -> dict[str, list[Path]]:
    """Every module that is written by hand, by package; modules beside the packages stand for themselves."""
    found: dict[str, list[Path]] = {}
    for path in sorted([*PACKAGE.rglob("*.py"), *(ROOT / "handlers").rglob("*.py")]):
        if "_pb2" not in path.name:
            inner = path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else ROOT)
            found.setdefault(inner.parts[0], []).append(path)
    return found


SOURCES = sources()


@pytest.mark.parametrize("package", SOURCES)
def test_every_docstring_stands_alone(package):
    wrong = [
        f"{path.relative_to(ROOT)}:{found.line}: {found.name} {fault}: {found.text.splitlines()[0]!r}"
        for path in SOURCES[package]
        for found in docstrings(ast.parse(path.read_text(encoding="utf-8")))
        for fault in faults(found)
    ]
    assert not wrong, "\n".join([f"{len(wrong)} docstrings cannot be understood alone:", *wrong])


def test_all_packages_are_looked_at():
    assert {"saliency", "methods", "planning", "gateway", "worker", "images.py", "handlers"} <= set(SOURCES)
    assert not [path for paths in SOURCES.values() for path in paths if path.name.endswith(("_pb2.py", "_pb2_grpc.py"))]


EXAMPLE = '''
"""Of the module."""
LIMIT = 1
"""Of the limit."""
if LIMIT:
    OTHER = 2
    """Of the other."""
try:
    MORE = 3
    """Of the try."""
except ValueError:
    MORE = 4
    """Of the handler."""
else:
    MORE = 5
    """Of the else."""
finally:
    LAST = 6
    """Of the finally."""
match LIMIT:
    case 1:
        CASE = 7
        """Of the case."""


class Holder:
    """Of the class."""

    size: int
    """Of the size."""

    def __init__(self):
        self.kept = []
        """Of the kept."""

    async def give(self):
        """Of the giving."""
        def inner():
            """Of the inner."""
'''


def test_docstrings_are_found_wherever_they_stand():
    found = list(docstrings(ast.parse(EXAMPLE)))
    assert [(each.kind, each.name) for each in found] == [
        ("module", "module"),
        ("attribute", "LIMIT"),
        ("attribute", "OTHER"),
        ("attribute", "MORE"),
        ("attribute", "MORE"),
        ("attribute", "LAST"),
        ("attribute", "MORE"),
        ("attribute", "CASE"),
        ("class", "Holder"),
        ("attribute", "Holder.size"),
        ("attribute", "Holder.__init__.self.kept"),
        ("function", "Holder.give"),
        ("function", "Holder.give.inner"),
    ]
    assert all(faults(each) == ["begins as a fragment"] for each in found)


@pytest.mark.parametrize(
    ("kind", "name", "text", "fault"),
    [
        ("attribute", "STEPS", "Of its steps.", "fragment"),
        ("function", "same", "As it is.", "fragment"),
        ("class", "Held", "What is held.", "fragment"),
        ("attribute", "FREE", "How many are free.", "fragment"),
        ("function", "fits", "Whether it fits.", "fragment"),
        ("function", "near", "In flight.", "fragment"),
        ("function", "close", "Behind the layer, where it fits", "full stop"),
        ("function", "wait", "Waits so long as it takes.", "so many"),
        ("attribute", "LIMIT", "Number of queries, so many\nas fit.", "so many"),
        ("class", "Held", "Holds a thing", "full stop"),
        ("function", "area", "(H, W) of a map.", "capital"),
        ("function", "mean", "mean of a map.", "capital"),
        ("function", "run", "Runs.\n\nArgs:\n    x: the input", "full stop"),
    ],
)
def test_a_docstring_that_leans_on_its_neighbours_is_refused(kind, name, text, fault):
    (found,) = faults(Docstring(kind, name, 1, text))
    assert fault in found


@pytest.mark.parametrize(
    ("kind", "name", "text"),
    [
        ("module", "module", "In float32 every method equals its twin."),
        ("function", "merge", "Where steps are lost, sends them again."),
        ("attribute", "FREE", "Whether a step was observed."),
        ("attribute", "SIZE", "Height and width (u, v) of the layer."),
        ("function", "_area", "(H, W) of a map, which is private."),
        ("function", "run", "Runs what is written like this:\n\n    camserve run"),
        ("function", "run", "Runs the following:\n    camserve run"),
        ("function", "run", "Runs.\n\nReturns:\n    (K, u, v)."),
        ("function", "run", "Returns nothing:"),
    ],
)
def test_a_docstring_that_can_be_understood_alone_is_accepted(kind, name, text):
    assert not faults(Docstring(kind, name, 1, text))

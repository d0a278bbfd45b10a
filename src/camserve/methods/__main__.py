"""Writes the generated parts of the methods' page anew: `python -m camserve.methods docs/methods.md`.

They stand between `<!-- NAME: begin -->` and `<!-- NAME: end -->`: for the name of a method its paper, needs, cost and
parameters; for `overview` a table of all.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from camserve.methods import METHODS, MethodSpec, Parameter
from camserve.types import Layer

LAYER = Layer("_swish", 1280, 7, 7)
"""The default layer of EfficientNet-Lite0, for which costs are given."""

_BLOCK = re.compile(r"(<!-- (\w+): begin -->\n).*?(<!-- \2: end -->)", re.DOTALL)


def with_tables(text: str) -> str:
    """Returns the page with every generated part as the catalogue has it now."""
    return _BLOCK.sub(lambda block: f"{block[1]}{_generated(block[2])}\n{block[3]}", text)


def _generated(name: str) -> str:
    return _overview() if name == "overview" else _card(METHODS[name])


def _overview() -> str:
    rows = [(f"[{spec.title}](#{name})", f"`{name}`", *_facts(spec)) for name, spec in METHODS.items()]
    return _table(("method", "name", "passes", "made of", "network"), rows)


def _facts(spec: type[MethodSpec]) -> tuple[str, str, str]:
    return str(spec.default_passes(LAYER)), _made_of(spec), spec.needs or "any"


def _made_of(spec: type[MethodSpec]) -> str:
    if spec.uses_layer:
        return "pixels, a layer" if spec.resolution == "input" else "a layer"
    return "pixels" if spec.resolution == "input" else "tokens"


def _card(spec: type[MethodSpec]) -> str:
    passes, made_of, network = _facts(spec)
    paper, _, url = spec.paper.rpartition(", ")
    lines = [f"*{paper}*, <{url}>", "", f"Passes: {passes}. Made of: {made_of}. Network: {network}."]
    rows = [_row(parameter) for parameter in spec.parameters()]
    return "\n".join([*lines, *(["", _table(("parameter", "default", "allowed", "what"), rows)] if rows else [])])


def _row(parameter: Parameter) -> tuple[str, str, str, str]:
    return f"`{parameter.name}`", str(parameter.default), _allowed(parameter), parameter.description


def _allowed(parameter: Parameter) -> str:
    if parameter.choices:
        return ", ".join(parameter.choices)
    return (
        f"at least {parameter.minimum}" if parameter.maximum is None else f"{parameter.minimum} to {parameter.maximum}"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")

"""Writes the table of metrics anew: `python deploy/prometheus/metrics_table.py docs/operations.md`.

The table stands between `<!-- metrics: begin -->` and `<!-- metrics: end -->`, and says what
`camserve.gateway.ops.metrics` says.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from camserve.gateway.ops.metrics import Metrics

_BLOCK = re.compile(r"(<!-- metrics: begin -->\n).*?(<!-- metrics: end -->)", re.DOTALL)
_ENDINGS = {"counter": "_total", "info": "_info"}


def with_table(text: str) -> str:
    """Returns the page with the table of the gateway's metrics as they are now.

    Raises:
        ValueError: the page has no markers of the table.
    """
    if not _BLOCK.search(text):
        raise ValueError("the page has no <!-- metrics: begin --> with a <!-- metrics: end -->")
    return _BLOCK.sub(lambda block: f"{block[1]}{_table()}\n{block[2]}", text)


def _table() -> str:
    metrics = Metrics()
    described = metrics.catalogue()
    rows = ["| metric | type | labels | what it is |", "| --- | --- | --- | --- |"]
    for family in metrics.registry.collect():
        name = family.name + _ENDINGS.get(family.type, "")
        labels = ", ".join(f"`{label}`" for label in described[name].labels)
        rows.append(f"| `{name}` | {family.type} | {labels} | {family.documentation} |")
    return "\n".join(rows)


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(with_table(page.read_text(encoding="utf-8")), encoding="utf-8")

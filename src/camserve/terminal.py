"""What the command line shows: tables and the progress bar of `camserve explain` and `camserve demo`. Needs rich."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from camserve.methods import MethodSpec
from camserve.types import Cost, Prediction

STAGES = ("queue", "decode", "forward", "queries", "merge", "render")
"""Stages of a request, in their order."""


def predictions_table(title: str, predictions: Sequence[Prediction]) -> Table:
    """The most probable classes."""
    table = _table(title, "class", "label")
    table.add_column("probability", justify="right")
    for prediction in predictions:
        table.add_row(str(prediction.index), escape(prediction.label), f"{prediction.probability:.1%}")
    return table


def costs_table(rows: Iterable[tuple[str, float, Cost]]) -> Table:
    """For each row's name (of a method, say) the seconds it took for the caller, masked queries, and time per stage."""
    rows = list(rows)
    stages = [stage for stage in STAGES if any(stage in cost.stage_seconds for _, _, cost in rows)]
    table = _table("time, masked queries, and time of each stage", "method")
    for heading in ("time", "masked", *stages):
        table.add_column(heading, justify="right")
    for name, seconds, cost in rows:
        times = [duration(cost.stage_seconds[stage]) if stage in cost.stage_seconds else "" for stage in stages]
        table.add_row(name, duration(seconds), str(cost.queries), *times)
    return table


def _table(title: str, *headings: str) -> Table:
    """Without frame and edges: wide tables fit into 80 columns."""
    return Table(
        *headings, title=escape(title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )


def duration(seconds: float) -> str:
    """Milliseconds below one second, else seconds."""
    return f"{1000 * seconds:.0f} ms" if seconds < 0.9995 else f"{seconds:.1f} s"


def method_text(method: MethodSpec) -> str:
    """Title and, in brackets, the parameters that differ from their defaults."""
    changed = [
        f"{parameter.name}={getattr(method, parameter.name)}"
        for parameter in method.parameters()
        if getattr(method, parameter.name) != parameter.default
    ]
    return f"{method.title} ({', '.join(changed)})" if changed else method.title


@contextmanager
def query_bar(console: Console, text: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar that counts masked queries and goes when it is done; call what it gives with (done, total).

    Nothing is shown where the console is no terminal.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("masked queries"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(escape(text), total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)

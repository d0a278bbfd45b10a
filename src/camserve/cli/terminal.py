"""Shows tables of figures and the progress of explanations on the command line. Needs rich."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from camserve.types import Cost, Prediction

STAGES = ("queue", "decode", "forward", "queries", "evaluate", "merge", "render")
"""The stages of a request, in their order."""


def predictions_table(title: str, predictions: Sequence[Prediction]) -> Table:
    """Returns a table of the most probable classes, of the numbers, or of the most similar references or prompts."""
    what = _kind(predictions[0]) if predictions else "class"
    table = _table(title, what, "label")
    table.add_column("probability" if what == "class" else "", justify="right")
    for prediction in predictions:
        table.add_row(str(prediction.index), escape(prediction.label), escape(prediction.figure))
    return table


def _kind(prediction: Prediction) -> str:
    """Returns what a prediction is of, which shows in what it says."""
    if prediction.similarity is not None:
        return "reference" if prediction.probability is None else "prompt"
    return "class" if prediction.value is None else "number"


def costs_table(rows: Iterable[tuple[str, float, Cost]]) -> Table:
    """Returns a table of name, seconds for the caller, masked queries and time per stage; a name may be a method's."""
    rows = list(rows)
    stages = [stage for stage in STAGES if any(stage in cost.stage_seconds for _, _, cost in rows)]
    table = _table("time, masked queries, and time of each stage", "method")
    for heading in ("time", "masked", *stages):
        table.add_column(heading, justify="right")
    for name, seconds, cost in rows:
        times = [duration(cost.stage_seconds[stage]) if stage in cost.stage_seconds else "" for stage in stages]
        table.add_row(name, duration(seconds), str(cost.queries), *times)
    return table


def figures_table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Returns a table with names on the left, which are never cut, and figures on the right of their columns."""
    rows = list(rows)
    table = _table(title, headings[0])
    table.columns[0].min_width = max((len(row[0]) for row in rows), default=None)
    for heading in headings[1:]:
        table.add_column(escape(heading), justify="right")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _table(title: str, *headings: str) -> Table:
    """Returns a table without frame and edges, so that wide tables fit into 80 columns."""
    return Table(
        *headings, title=escape(title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )


def duration(seconds: float) -> str:
    """Returns a duration in milliseconds below one second, else in seconds."""
    return f"{1000 * seconds:.0f} ms" if seconds < 0.9995 else f"{seconds:.1f} s"


@contextmanager
def query_bar(console: Console, text: str) -> Iterator[Callable[[int, int], None]]:
    """Shows a bar that counts masked queries, until it is left; yields a function to call with (done, total).

    Nothing is shown where the console is no terminal.
    """
    with _bar(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(escape(text), total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def live_view(console: Console, text: str) -> Iterator[Callable[[Sequence[Prediction], int, int], None]]:
    """Shows the predictions above a bar of masked queries; yields a function of (predictions, done, total).

    The view goes when it is left. Where the console is no terminal, a line is printed for each call instead.
    """
    progress = _bar()
    task = progress.add_task(escape(text), total=None)
    with Live(progress, console=console, transient=True) if console.is_terminal else nullcontext() as live:

        def show(predictions: Sequence[Prediction], done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)
            if live is not None:
                live.update(Group(predictions_table(text, predictions), progress))
            else:
                first = f"{predictions[0].label}, " if predictions else ""
                console.print(f"{text}: {first}{done} of {total} masked queries", markup=False)

        yield show


def _bar(**options: Any) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("masked queries"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        **options,
    )

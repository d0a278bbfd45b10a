"""Defines the commands that look after evidence: verify, replay."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from camserve.cli.connection_options import Connection, connection_options
from camserve.cli.extras import needs_extra
from camserve.cli.serving import STORE_HELP
from camserve.errors import InvalidImage, InvalidInput

if TYPE_CHECKING:
    from camserve.images import ImageContent
    from camserve.types import Explanation


@click.group()
def evidence() -> None:
    """Verify evidence logs, and make maps of records again."""


@evidence.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE...")
@click.option("--anchor", default="", metavar="SHA256", help="Of a line, noted earlier, that must still be there.")
def verify(files: tuple[Path, ...], anchor: str) -> None:
    """Verify that no line of an evidence log was changed, removed, inserted or moved.

    FILE is the log, with its full files in any order. The exit status is 0 if all lines hold, else 2; the text names
    the first one that does not. What was removed from the end shows with --anchor alone.
    """
    with needs_extra("cli"):
        from camserve.evidence import verify as checks

        found = checks.verify(files, anchor)
        if found.first > 1:
            click.echo(f"records 1 to {found.first - 1} are not in these files")
        if found.torn_bytes:
            click.echo(f"{found.torn_bytes} bytes of an unfinished line at the end: its reply has not left the server")
        held = f"records {found.first} to {found.last} hold" if found.records else "no records"
        click.echo(f"{held}; anchor {found.digest}")


@evidence.command()
@click.argument("record_file", type=click.Path(path_type=Path), metavar="RECORD")
@click.argument("image", type=click.Path(path_type=Path))
@click.option("--number", type=click.IntRange(1), help="Of the record, where RECORD is a log of several.")
@click.option("--target", "targets", multiple=True, help="All targets, where the record holds hashes of some.")
@click.option("--text", default="", help="The text beside the image, of which the record holds the hash.")
@click.option("--model", default="", help="[default: as the record names it]")
@connection_options
@click.option("--timeout", "timeout_s", type=click.FloatRange(0, min_open=True), help="Deadline in seconds.")
@click.option("--local", is_flag=True, help="Explain in this process, without a server.")
@click.option("--store", type=click.Path(path_type=Path), help=f"With --local. {STORE_HELP}")
@click.pass_context
def replay(
    context: click.Context,
    /,
    record_file: Path,
    image: Path,
    number: int | None,
    targets: tuple[str, ...],
    text: str,
    model: str,
    **options: Any,
) -> None:
    """Make the maps of a record again, and compare them with its hashes.

    RECORD is a file with one record, or a log; IMAGE is the file that was explained, or the .npy of a tensor.

    The exit status is 0 where all maps are equal, 1 where one is not, 3 where image, text or weights are others, and 4
    where one is not equal and need not be, because precision, machine or versions are others than in the record.
    """
    with needs_extra("worker" if options["local"] else "cli"):
        from camserve.cli.commands import read_target
        from camserve.evidence.replay import Outcome, check_image, compare, read_record, request_options

        record = read_record(record_file, number)
        if not record["maps"]:
            raise InvalidInput("the record is of an answer without maps: there is nothing to make again")
        content = _read_image(image)
        if reason := check_image(record, content):
            click.echo(reason)
            context.exit(Outcome.OTHER_INPUT)
        asked = request_options(record, [read_target(one) for one in targets], text)
        with _explainer(model or record["model"]["name"], **options) as (weights, explain):
            if weights != record["model"]["weights"]:
                click.echo(f"other weights: {weights} here, {record['model']['weights']} in the record")
                context.exit(Outcome.OTHER_INPUT)
            compared = compare(record, json.loads(explain(content, **asked).evidence))
        for line in compared.lines:
            click.echo(line)
        context.exit(compared.outcome)


@contextmanager
def _explainer(
    model: str, local: bool, store: Path | None, connection: Connection, timeout_s: float | None
) -> Iterator[tuple[str, Callable[..., Explanation]]]:
    """Yields the hash of a model's weights, and what explains by it."""
    from functools import partial

    if local:
        from camserve.engine import Engine

        engine = Engine.load(model, store)
        yield engine.info.weights, engine.explain
        return
    with connection.client(timeout_s) as client:
        yield client.model(model).weights, partial(client.explain, model=model)


def _read_image(path: Path) -> ImageContent:
    from camserve.images import read_image

    if path.suffix != ".npy":
        return read_image(path)
    import numpy as np

    try:
        found: ImageContent = np.load(path, allow_pickle=False)
        return found
    except (OSError, ValueError, EOFError) as error:
        raise InvalidImage(f"cannot read a tensor from {path}: {error}") from None

"""Says which extra of camserve has a package that is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Turns a missing package into a message that names the extra which has it, without a traceback."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "camserve":
            raise
        raise click.ClickException(f"{error.name} is not installed: pip install 'camserve[{extra}]'") from None

"""The log of a command: JSON lines for machines, or coloured lines for a terminal.

Everything logs with the standard library; here, and only here, it is said where that goes. Commands call `set_up` once,
libraries never do. Inside a call each line has its `request_id` (see `camserve.gateway.requestid`), inside a step the
`request_ids` of all calls whose work is in it. Needs structlog.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import Any, Literal, TextIO

import structlog
from structlog.typing import Processor

Format = Literal["auto", "console", "json"]

_FIRST = ("timestamp", "level", "logger", "event", "request_id")


def set_up(log_format: Format, log_level: str, stream: TextIO | None = None) -> None:
    """From now on every logger of this process writes to one stream; what was set up before no longer counts.

    Args:
        log_format: json or console; auto: console on a terminal, else json.
        log_level: the least level that is written: debug, info, warning or error.
        stream: None: the standard error.
    """
    stream = sys.stderr if stream is None else stream
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter(log_format, stream.isatty()))
    logging.basicConfig(level=log_level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)


def formatter(log_format: Format, terminal: bool) -> logging.Formatter:
    """One line for each record, whoever made it; `terminal` is where it goes."""
    console = log_format == "console" or (log_format == "auto" and terminal)
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[
            structlog.contextvars.merge_contextvars,
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            structlog.stdlib.ExtraAdder(),
            structlog.processors.TimeStamper(fmt="iso", utc=True),
        ],
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_rendering(console, terminal)],
    )


def _rendering(console: bool, colours: bool) -> list[Processor]:
    if console:
        # structlog's own choice shows local variables: images, and what clients sent.
        plain = structlog.dev.plain_traceback
        return [structlog.dev.ConsoleRenderer(colors=colours, exception_formatter=plain)]
    return [structlog.processors.format_exc_info, _ordered, structlog.processors.JSONRenderer()]


def _ordered(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """What every line has comes first, for those who read them unaided."""
    return {key: event[key] for key in (*_FIRST, *event) if key in event}

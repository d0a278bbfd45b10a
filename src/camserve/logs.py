"""Writes the log of a command: JSON lines for machines, or coloured lines for a terminal. Needs structlog.

Everything logs with the standard library; this module alone says where that goes. Commands call `set_up` once,
libraries never do. Each line inside a call has its `request_id` (see `camserve.gateway.api.request_ids`), each line
inside a step the `request_ids` of all calls whose work is in it.
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
    """Makes every logger of this process write to one stream; what was set up before no longer counts.

    Args:
        log_format: json or console; auto: console on a terminal, else json.
        log_level: the least level that is written: debug, info, warning or error.
        stream: where the log goes; None: to the standard error.
    """
    stream = sys.stderr if stream is None else stream
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter(log_format, stream.isatty()))
    logging.basicConfig(level=log_level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)


def formatter(log_format: Format, terminal: bool) -> logging.Formatter:
    """Returns what makes one line of each record, whoever made it; `terminal` says whether one reads it."""
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
    """Returns the event with what every line has first, for those who read the log unaided."""
    return {key: event[key] for key in (*_FIRST, *event) if key in event}

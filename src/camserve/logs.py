"""Writes the log of a command: JSON lines for machines, or coloured lines for a terminal. Needs structlog.

Everything logs with the standard library; this module alone says where that goes. Commands call `set_up` once,
libraries never do. Each line inside a call has its `request_id` (see `camserve.gateway.api.request_ids`), each line
inside a step the `request_ids` of all calls whose work is in it.

Nobody waits for the log: lines are written by a thread of their own, and dropped and counted where they come faster
than they can be written. So a full disk, a pipe that nobody reads or a closed stderr never holds up a request.
"""

from __future__ import annotations

import logging
import os
import queue
import select
import sys
import threading
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from typing import Any, Literal, TextIO

import structlog
from structlog.typing import Processor

Format = Literal["auto", "console", "json"]

MOST_LINES = 10_000
"""Most lines that wait to be written."""

_LAST_LINES_S = 2.0
"""Seconds that the end of the process waits for the last lines to be written."""

_FIRST = ("timestamp", "level", "logger", "event", "request_id")


class Writer(logging.Handler):
    """Writes lines in a thread of its own; see the top of this file. Lines are formatted where they are logged.

    Args:
        stream: where the lines go. Those of a file are written past Python's buffers: a thread that hangs in one would
            keep the interpreter from ending.
        most_lines: number of lines that wait at most.
    """

    def __init__(self, stream: TextIO | None, most_lines: int = MOST_LINES) -> None:
        super().__init__()
        self._dropped = 0
        self._unwritten = 0
        self._told = 0
        self._write = _writing(stream)
        self._lines: queue.Queue[str | threading.Event | None] = queue.Queue(most_lines)
        self._thread = threading.Thread(target=self._work, name="log", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> int:
        """Number of lines that were dropped, since there was no room for them, or could not be written."""
        return self._dropped + self._unwritten

    def emit(self, record: logging.LogRecord) -> None:
        """Has a record written, or drops it."""
        try:
            self._lines.put_nowait(self.format(record))
        except Exception:  # the queue is full, or the record cannot be formatted; whoever logs is not to blame
            self._dropped += 1

    def flush(self) -> None:
        """Waits some seconds until all lines so far were written."""
        written = threading.Event()
        try:
            self._lines.put(written, timeout=_LAST_LINES_S)
        except queue.Full:
            return
        written.wait(_LAST_LINES_S)

    def close(self) -> None:
        """Ends the thread, once it has written the lines that wait."""
        with suppress(queue.Full):
            self._lines.put_nowait(None)
        super().close()

    def _work(self) -> None:
        while (line := self._lines.get()) is not None:
            if isinstance(line, threading.Event):
                line.set()
            elif not self._written(line):
                self._unwritten += 1
            elif self.lost > self._told:
                self._tell()

    def _written(self, line: str) -> bool:
        try:
            self._write(f"{line}\n")
        except (OSError, ValueError):  # a closed stream is a ValueError
            return False
        return True

    def _tell(self) -> None:
        """Writes how many lines are missing at this place."""
        missing, self._told = self.lost - self._told, self.lost
        text = "%d lines of the log were lost before this one: nobody has read them, or they came too fast"
        record = logging.LogRecord(__name__, logging.WARNING, __file__, 0, text, (missing,), None)
        self._written(self.format(record))


def lost_lines() -> int:
    """Returns how many lines of the log were lost in this process since the last `set_up`."""
    return sum(handler.lost for handler in logging.getLogger().handlers if isinstance(handler, Writer))


def set_up(log_format: Format, log_level: str, stream: TextIO | None = None) -> None:
    """Makes every logger of this process write to one stream; what was set up before no longer counts.

    Args:
        log_format: json or console; auto: console on a terminal, else json.
        log_level: the least level that is written: debug, info, warning or error.
        stream: where the log goes; None: to the standard error, and nowhere if that is closed.
    """
    stream = sys.stderr if stream is None else stream
    handler = Writer(stream)
    handler.setFormatter(formatter(log_format, stream is not None and stream.isatty()))
    logging.basicConfig(level=log_level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)


def _writing(stream: TextIO | None) -> Callable[[str], object]:
    """Returns what writes text to a stream at once."""
    if stream is None:
        return lambda text: None
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):  # it is no file, but a test's
        return stream.write
    encoding = stream.encoding or "utf-8"

    def write(text: str) -> None:
        rest = text.encode(encoding, "backslashreplace")
        while rest:
            try:
                rest = rest[os.write(descriptor, rest) :]
            except BlockingIOError:  # whoever shares the descriptor has made it so
                select.select([], [descriptor], [])

    return write


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

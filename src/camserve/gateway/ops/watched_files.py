"""Reads files again when they change: Kubernetes swaps the files of a Secret under a running process."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from camserve.errors import InvalidOption

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class Reloaded(Generic[_T]):
    """Keeps what some files say now. New content that is bad is logged once, and the old stays. Any thread may use it.

    Args:
        what: noun for the files in the log.
        paths: the files.
        parse: called with their contents. Raises InvalidOption when they are bad, or do not belong together.
        every_s: least time between two looks at the files.

    Raises:
        InvalidOption: the files cannot be read, or are bad from the start.
    """

    def __init__(
        self, what: str, paths: Sequence[Path], parse: Callable[[Sequence[bytes]], _T], every_s: float = 1.0
    ) -> None:
        self._what = what
        self._paths = tuple(paths)
        self._parse = parse
        self._every_s = every_s
        self._lock = threading.Lock()
        self._contents = self._read()
        self._value = parse(self._contents)
        self._problem = ""
        self._look_at_s = 0.0

    def get(self) -> _T:
        """Returns what the files say, or said before they went bad."""
        with self._lock:
            now_s = time.monotonic()
            if now_s >= self._look_at_s:
                self._look_at_s = now_s + self._every_s
                self._look()
            return self._value

    def _look(self) -> None:
        try:
            contents = self._read()
            if contents != self._contents:
                self._contents = contents  # before they are parsed: bad content is parsed and logged once
                self._value = self._parse(contents)
                self._problem = ""
                _log.info("%s: read again", self._what)
        except InvalidOption as error:
            if str(error) != self._problem:
                self._problem = str(error)
                _log.error("%s: the old ones stay in use: %s", self._what, error)

    def _read(self) -> tuple[bytes, ...]:
        return tuple(_content(self._what, path) for path in self._paths)


def _content(what: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidOption(f"{what}: cannot read {path}: {error.strerror}") from None

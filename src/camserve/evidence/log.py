"""Appends evidence records to a file of JSON lines, each of which holds the hash of the line before.

A file that would grow beyond its bound is renamed after the number of its first record, and the chain goes on in a new
one. Where there is a file of that name, copied back by hand, say, it gets the next free number: nothing is ever written
over. A record is on the disk before its reply leaves: one thread writes all that wait, and syncs them at once, so that
the event loop never waits for a disk.

What a crash or a full disk leaves of a line is cut off before the next one is written: its reply never left.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import queue
import re
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from camserve.errors import INTERNAL_MESSAGE, CamserveError, Internal, InvalidOption, Unavailable
from camserve.evidence.canonical import canonical, sha256
from camserve.evidence.record import FORM, Record

_log = logging.getLogger(__name__)

FIRST = "0" * 64
"""Hash of the line before that the first line of a chain has."""

_AT_ONCE = 256
"""Largest number of records that are written before they are synced."""

_TAIL_BYTES = 64 * 2**10
_CLOSE_S = 10.0

UNWRITTEN = "this server keeps evidence of every answer, and cannot write it now; try again later"


@dataclass(frozen=True)
class _Link:
    """Holds where the chain stands."""

    number: int = 0
    """Number of the last record; 0: there is none."""
    digest: str = FIRST
    """SHA-256 of its line, without the line feed."""


class EvidenceLog:
    """Appends records to one file; only one log at a time may have it.

    Args:
        path: of the file; it and its folder are made where they are missing. Beside it there are full files, and a
            lock, `<path>.lock`.
        max_bytes: size at which a file is full.

    Raises:
        InvalidOption: the file cannot be written, another gateway has it, or its last line is no evidence record.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path = path
        self._max_bytes = max_bytes
        self._waiting: queue.SimpleQueue[tuple[Record, Future[str]] | None] = queue.SimpleQueue()
        self._file, self._size = -1, 0
        self._closed = False
        with contextlib.ExitStack() as undone:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._lock = _locked(path)
                undone.callback(os.close, self._lock)  # another try in this process must not find it taken
                self._last = self._found()
                self._open()
            except OSError as error:
                raise InvalidOption(f"evidence log {path} cannot be written: {error.strerror or error}") from None
            undone.pop_all()
        self._thread = threading.Thread(target=self._work, name="evidence", daemon=True)
        self._thread.start()

    def append(self, record: Record) -> Future[str]:
        """Returns the line of a record, with its place in the chain, once it is on the disk.

        Its future raises Unavailable where it cannot be written; the chain then goes on without it.
        """
        written: Future[str] = Future()
        if self._closed:
            written.set_exception(Unavailable(UNWRITTEN))
        else:
            self._waiting.put((record, written))
        return written

    def close(self) -> None:
        """Writes what waits, and gives the file free."""
        self._closed = True
        self._waiting.put(None)
        self._thread.join(_CLOSE_S)
        for descriptor in (self._file, self._lock):
            os.close(descriptor)

    def _work(self) -> None:
        while (first := self._waiting.get()) is not None:
            batch, over = [first], False
            with contextlib.suppress(queue.Empty):
                while len(batch) < _AT_ONCE and not over:
                    more = self._waiting.get_nowait()
                    over = more is None
                    if more is not None:
                        batch.append(more)
            try:
                for some in self._parts(batch):
                    self._write(some)
            except Exception:  # the thread must live: nobody would get an answer any more
                _log.exception("evidence log %s", self.path)
                _fail([future for _, future in batch])
            if over:
                return

    def _parts(self, batch: list[tuple[Record, Future[str]]]) -> Iterator[list[tuple[bytes, Future[str]]]]:
        """Yields lines that go into one file, and makes room for the next ones in between."""
        lines: list[tuple[bytes, Future[str]]] = []
        with contextlib.suppress(OSError):  # what fails here fails when it is written
            self._look()
        last, size = self._last, self._size
        for record, future in batch:
            try:
                line = canonical({**record, "number": last.number + 1, "previous": last.digest}).encode() + b"\n"
            except (TypeError, ValueError):
                _log.exception("an evidence record cannot be written as JSON")
                _fail([future], Internal(INTERNAL_MESSAGE))
                continue
            if size + len(line) > self._max_bytes and size:
                yield lines
                lines, last = [], self._last  # the lines before may have failed
                line = canonical({**record, "number": last.number + 1, "previous": last.digest}).encode() + b"\n"
                if not self._rotated(future):
                    continue
                size = 0
            lines.append((line, future))
            last, size = _Link(last.number + 1, sha256(line[:-1])), size + len(line)
        yield lines

    def _write(self, lines: list[tuple[bytes, Future[str]]]) -> None:
        """Appends lines and syncs them, all or none."""
        if not lines:
            return
        content = b"".join(line for line, _ in lines)
        try:
            self._look()
            os.ftruncate(self._file, self._size)  # what an earlier failure has left
            view = memoryview(content)
            while view:
                view = view[os.pwrite(self._file, view, self._size + len(content) - len(view)) :]
            os.fdatasync(self._file)
        except OSError as error:
            self._failed(error, [future for _, future in lines])
            return
        self._size += len(content)
        self._last = _Link(self._last.number + len(lines), sha256(lines[-1][0][:-1]))
        for line, future in lines:
            if future.set_running_or_notify_cancel():
                future.set_result(line[:-1].decode())

    def _failed(self, error: OSError, futures: list[Future[str]]) -> None:
        _log.error("evidence log %s cannot be written: %s", self.path, error)
        with contextlib.suppress(OSError):
            os.ftruncate(self._file, self._size)
        _fail(futures)

    def _rotated(self, future: Future[str]) -> bool:
        """Begins a new file; where that fails, so does the record that would be its first."""
        try:
            kept = _free(self.path, self._first_number())
            try:
                os.rename(self.path, kept)
            except OSError:
                os.unlink(kept)
                raise
            self._open()
        except OSError as error:
            self._failed(error, [future])
            return False
        return True

    def _first_number(self) -> int:
        with self.path.open("rb") as file:
            return int(json.loads(file.readline())["number"])

    def _look(self) -> None:
        """Goes on in a new file where somebody has moved this one away, or where it ends where somebody has cut it."""
        try:
            is_there = os.path.samestat(os.stat(self.path), os.fstat(self._file))
        except FileNotFoundError:
            is_there = False
        if not is_there:
            _log.warning("evidence log %s was moved away; the chain goes on in a new file", self.path)
            self._open()
        elif (size := os.fstat(self._file).st_size) < self._size:
            _log.warning("evidence log %s was cut to %d bytes; the chain goes on behind them", self.path, size)
            self._size = size

    def _open(self) -> None:
        before, self._file = self._file, os.open(self.path, os.O_RDWR | os.O_CREAT, 0o640)
        if before >= 0:
            os.close(before)
        self._size = os.fstat(self._file).st_size
        if not self._size:
            _sync_folder(self.path.parent)

    def _found(self) -> _Link:
        """Returns where the chain stands; cuts off what a crash has left of a last line."""
        files = [*sorted(full_files(self.path)), self.path]
        for path in reversed(files):
            if path.exists() and (line := _last_line(path)) is not None:
                return _link(path, line)
        return _Link()


def full_files(path: Path) -> list[Path]:
    """Returns the full files of a log, in no order."""
    name = re.compile(rf"{re.escape(path.stem)}\.\d{{12}}{re.escape(path.suffix)}")
    return [one for one in path.parent.iterdir() if name.fullmatch(one.name)]


def _free(path: Path, first: int) -> Path:
    """Makes an empty file under the name of a full one, of the first number from `first` on that is free; returns it.

    It holds the name until the full file takes its place: nobody else's file can come in between.
    """
    number = first
    while True:
        kept = path.with_name(f"{path.stem}.{number:012d}{path.suffix}")
        try:
            os.close(os.open(kept, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640))
        except FileExistsError:
            number += 1
            continue
        if number > first:
            _log.warning("evidence log %s: there is a file of number %d already, the full one is %s", path, first, kept)
        return kept


def _locked(path: Path) -> int:
    """Returns the descriptor of the log's lock, which ends with this process."""
    lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT, 0o640)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise InvalidOption(f"evidence log {path} belongs to another gateway: each needs a file of its own") from None
    return lock


def _last_line(path: Path) -> bytes | None:
    """Returns the last whole line of a file, None where there is none; cuts off what comes after it."""
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        tail, start = b"", size
        while start and tail.count(b"\n") < 2:
            start = max(0, start - _TAIL_BYTES)
            file.seek(start)
            tail = file.read(size - start)
        whole = tail.rfind(b"\n") + 1
        if whole < len(tail):
            _log.warning("evidence log %s: %d bytes of an unfinished line are cut off", path, len(tail) - whole)
            file.truncate(start + whole)
    return tail[:whole].split(b"\n")[-2] if whole else None


def _link(path: Path, line: bytes) -> _Link:
    try:
        found: Any = json.loads(line)
        if found["record"] == FORM and isinstance(found["number"], int):
            return _Link(found["number"], sha256(line))
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise InvalidOption(f"evidence log {path}: its last line is no evidence record; move the file away to begin anew")


def _fail(futures: Iterable[Future[str]], error: CamserveError | None = None) -> None:
    """Has futures raise an error, as far as they are not done; by default that the log cannot be written."""
    for future in futures:
        if not future.done() and future.set_running_or_notify_cancel():
            future.set_exception(error or Unavailable(UNWRITTEN))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Verifies that no line of an evidence log was changed, removed, inserted or moved."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from camserve.errors import InvalidInput
from camserve.evidence.canonical import canonical, sha256
from camserve.evidence.log import FIRST
from camserve.evidence.record import FORM, Record
from camserve.wording import shown


class Broken(InvalidInput):
    """A line does not hold; the text names its file and number, and says why."""


@dataclass(frozen=True)
class Verified:
    """Tells what holds."""

    records: int
    first: int
    """Number of the first record; 0 where there is none. The records before it are not in the files."""
    last: int
    digest: str
    """SHA-256 of the last line: whoever has noted it can show later that nothing up to there was changed."""
    torn_bytes: int
    """Bytes of an unfinished line at the end, which a crash has left; its reply never left."""


@dataclass(frozen=True)
class _Line:
    where: str
    content: bytes
    record: Record


def verify(paths: Sequence[Path], anchor: str = "") -> Verified:
    """Returns what holds of a log.

    Args:
        paths: its files, in any order.
        anchor: SHA-256 of a line that must be there, noted earlier; "": none.

    Raises:
        Broken: a line does not hold, or the anchor's line is not there.
        InvalidInput: a file cannot be read.
    """
    before: _Line | None = None
    torn, records, first, anchored = 0, 0, 0, not anchor
    files = sorted(paths, key=_first_number)
    for path in files:
        content = _read(path)
        whole = content[: content.rfind(b"\n") + 1]
        torn = len(content) - len(whole)
        if torn and path != files[-1]:
            number = whole.count(b"\n") + 1
            raise Broken(f"{path}, line {number}: it is cut off, and other files follow")
        for line in _lines(path, whole):
            _check(line, before)
            records, first = records + 1, first or line.record["number"]
            anchored |= sha256(line.content) == anchor
            before = line
    if not anchored:
        raise Broken(f"no line has the hash {shown(anchor)}: it was removed, or the lines up to it were written anew")
    last, digest = (before.record["number"], sha256(before.content)) if before else (0, FIRST)
    return Verified(records, first, last, digest, torn)


def parsed(line: bytes) -> Record:
    """Returns the record of a line.

    Raises:
        ValueError: it is none; the text says why.
    """
    try:
        found: Any = json.loads(line)
        same = canonical(found).encode() == line
    except (ValueError, TypeError, OverflowError, RecursionError):  # of a number beyond float64, of too deep a nesting
        raise ValueError("it is no JSON of a record") from None
    if not isinstance(found, dict) or found.get("record") != FORM:
        raise ValueError(f"it is no record of form {FORM}")
    if not same:
        raise ValueError("it is not in canonical form, in which records are written")
    return found


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror or error}") from None


def _first_number(path: Path) -> float:
    """Returns the number of the first record of a file; infinity where that is none: an empty file is the newest."""
    try:
        with path.open("rb") as file:
            return int(parsed(file.readline().rstrip(b"\n"))["number"])
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError):
        return math.inf


def _lines(path: Path, content: bytes) -> Iterator[_Line]:
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        where = f"{path}, line {number}"
        try:
            record = parsed(line)
        except ValueError as error:
            raise Broken(f"{where}: {error}") from None
        if not isinstance(record.get("number"), int) or not isinstance(record.get("previous"), str):
            raise Broken(f"{where}: it has no place in a chain")
        yield _Line(where, line, record)


def _check(line: _Line, before: _Line | None) -> None:
    """Raises Broken where a line does not follow the one before it."""
    number, previous = line.record["number"], line.record["previous"]
    if before is None:
        if number < 1 or (number == 1 and previous != FIRST):
            raise Broken(f"{line.where}: record {number} cannot begin a chain")
        return
    expected = before.record["number"] + 1
    if number > expected:
        missing = f"record {expected} is" if number == expected + 1 else f"records {expected} to {number - 1} are"
        raise Broken(f"{line.where}: {missing} missing before record {number}")
    if number < expected:
        raise Broken(f"{line.where}: record {number} comes after record {expected - 1}: it was moved or inserted")
    if previous != sha256(before.content):
        raise Broken(
            f"{before.where}: record {expected - 1} was changed, or exchanged for another: "
            f"record {number} was written behind a line with another hash"
        )

"""Keeps the file that makes an evaluation, or another long run, resumable: one line of JSON for each record.

The first line has the settings. A second run with the same settings continues; one with others is refused, because
figures of different protocols, models and precisions must not be mixed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from camserve.errors import InvalidInput, InvalidOption

Record = dict[str, Any]


class Journal:
    """Holds the records of one report folder, in memory and on disk.

    Args:
        path: of the file; made when missing.
        settings: what must be the same in every run that appends to it.

    Raises:
        InvalidOption: the file was begun with other settings.
        InvalidInput: the file is not a journal.
    """

    def __init__(self, path: Path, settings: Record) -> None:
        self.path = path
        self._records: dict[str, Record] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = list(_whole_lines(path)) if path.exists() else []
        if not lines:
            self._append({"settings": settings})
            return
        _check(path, lines[0], json.loads(json.dumps(settings)))
        self._records = {_key(record): record for record in lines[1:]}

    def add(self, record: Record) -> None:
        """Appends a record; it is on disk when this returns."""
        self._append(record)
        self._records[_key(record)] = record

    def find(self, head: Record) -> Record | None:
        """Returns the record that begins so: with the same kind, image, digest, method and parameters."""
        return self._records.get(_key(head))

    def _append(self, record: Record) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def _key(record: Record) -> str:
    return json.dumps([record.get(name) for name in ("kind", "image", "sha256", "method", "parameters")])


def _whole_lines(path: Path) -> Iterator[Record]:
    """Yields the records; a last line that was cut off when a run was killed is removed from the file."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        path.write_bytes(whole)
    for line in whole.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise InvalidInput(f"{path} is not a journal of camserve: {line[:60]!r}")
        yield record


def _check(path: Path, first: Record, settings: Record) -> None:
    before = first.get("settings")
    if not isinstance(before, dict):
        raise InvalidInput(f"{path} is not a journal of camserve: it does not begin with settings")
    for name in {**before, **settings}:
        if before.get(name) != settings.get(name):
            raise InvalidOption(
                f"{path} was begun with {name} {before.get(name)!r}, got {settings.get(name)!r}: "
                "choose another folder, or delete it"
            )

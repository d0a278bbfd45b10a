"""Reads files of class names, as people and libraries write them."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from camserve.archive.untrusted import is_file, read_bytes, reading, short
from camserve.errors import InvalidInput, NotFound
from camserve.wording import shown

_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_FORMS = (
    "a name in each line, a JSON list of names, a JSON object from 0, 1, ... to names (as `id2label` of a "
    "config.json), or from names to these numbers"
)


def read_labels(path: Path) -> tuple[str, ...]:
    """Returns class names from a JSON list or object, or from a file with one name in each line.

    A byte order mark, line ends of any system, spaces around names and empty lines at the end do not matter. A JSON
    object maps indices to names, names to indices, or indices to (WordNet id, name) as Keras has them.

    Raises:
        NotFound: there is no such file.
        InvalidInput: it is not UTF-8, nor UTF-16 with a mark; it is JSON, but none of these; a name is empty; the
            indices are not 0, 1, ...
    """
    if not is_file(path):
        raise NotFound(f"there is no labels file {short(path)}")
    with reading(path, "a labels file"):
        text = _text(path).strip()
        labels = _from_json(json.loads(text)) if text.startswith(("[", "{")) else re.split(r"\r\n|\r|\n", text)
        names = [label.strip() if isinstance(label, str) else label for label in labels]
        if not all(isinstance(name, str) and name for name in names):
            number = next(index for index, name in enumerate(names) if not isinstance(name, str) or not name)
            raise InvalidInput(
                f"labels file {short(path)} must have {_FORMS}; name {number} is {shown(names[number])[:60]}"
            )
    return tuple(names)


def _text(path: Path) -> str:
    data = read_bytes(path, "a labels file")
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        number = 1 + data.count(b"\n", 0, error.start)
        raise InvalidInput(
            f"labels file {short(path)} must be UTF-8, and line {number} is not; "
            f"as Latin-1 it is {shown(_line(data, error.start).decode('latin-1'))}: convert the file to UTF-8"
        ) from None
    if "\0" in text:
        raise InvalidInput(f"labels file {short(path)} must be text, and has a byte 0: convert the file to UTF-8")
    return text


def _line(data: bytes, place: int) -> bytes:
    end = data.find(b"\n", place)
    return data[data.rfind(b"\n", 0, place) + 1 : end if end >= 0 else len(data)].rstrip(b"\r")


def _from_json(value: Any) -> list[Any]:
    """Returns the names in a JSON text, whatever they are; anything may be raised where there are none."""
    if isinstance(value, Mapping) and isinstance(value.get("id2label"), Mapping):
        value = value["id2label"]
    if isinstance(value, Mapping):
        names = len(value)
        if all(type(index) is int for index in value.values()):
            value = {str(index): name for name, index in value.items()}
        missing = [index for index in range(names) if str(index) not in value]
        if missing:
            raise ValueError(
                f"a JSON object of {names} class names must have the indices 0..{names - 1} once each; "
                f"{missing[0]} is not there"
            )
        value = [value[str(index)] for index in range(len(value))]
    if not isinstance(value, list) or not value:
        raise TypeError(f"it must have {_FORMS}")
    return [entry[1] if isinstance(entry, list) and len(entry) == 2 else entry for entry in value]

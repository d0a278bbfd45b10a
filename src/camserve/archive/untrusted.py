"""Reads files that a stranger may have made: one guard for each library, and a bound on all that a file can say.

Whatever zipfile, json, tomllib, safetensors and torch raise on such bytes leaves here as InvalidInput.
"""

from __future__ import annotations

import io
import json
import stat
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from camserve.errors import CamserveError, InvalidInput, NotFound

ARCHIVE = "a camserve archive"

MAX_TEXT_BYTES = 2**22
"""Bytes of a file of text: labels, a card, a manifest, a report. The labels of ImageNet-21k take 0.5 MB."""

MAX_MEMBERS = 1000
"""Files in an archive; camserve packs six."""

MAX_DIRECTORY_BYTES = 2**22
"""Bytes of a zip file's directory: about 50,000 files. In memory each takes ten times as many."""

MAX_NAME_LENGTH = 255
"""Characters of a member's name, as file systems have it."""

MAX_INFLATION = 4
"""Largest number of times that a zip file may grow when it is unpacked; weights shrink by a tenth when deflated."""

MIN_INFLATED_BYTES = 2**26
"""Bytes to which a zip file may always grow."""


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Makes whatever is raised on the content of a file an InvalidInput that names the file and what it is not.

    Raises:
        InvalidInput: the block raised; a lack of memory stays MemoryError.
    """
    try:
        yield
    except (CamserveError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InvalidInput(f"{short(path)} is not {what}: {reason}") from None


def short(path: object) -> str:
    """Returns a path for a message, its middle left out where it is long."""
    text = str(path)
    return text if len(text) <= 200 else f"{text[:100]}...{text[-90:]}"


def is_file(path: Path) -> bool:
    """Returns whether there is a file of this name; a name that no file can have is none."""
    mode = _mode(path)
    return mode is not None and stat.S_ISREG(mode)


def read_text(path: Path, what: str) -> str:
    """Returns the text of a file.

    Raises:
        InvalidInput: it cannot be read, is longer than `MAX_TEXT_BYTES`, or is not UTF-8.
    """
    with reading(path, what):
        return read_bytes(path, what).decode("utf-8-sig")


def read_bytes(path: Path, what: str) -> bytes:
    """Returns the content of a file of text; raises as `read_text`, whatever its encoding is."""
    with reading(path, what), path.open("rb") as file:
        return _checked_text(file.read(MAX_TEXT_BYTES + 1))


def parse_json(path: Path, data: bytes, what: str) -> Any:
    """Returns what the JSON text of a file says.

    Raises:
        InvalidInput: it is not JSON, is nested too deeply, or is longer than `MAX_TEXT_BYTES`.
    """
    with reading(path, what):
        return json.loads(_checked_text(data))


def read_member(path: Path, member: str, most: int = sys.maxsize) -> bytes:
    """Returns the content of one file of a `.mar` file or of an unpacked archive directory.

    Args:
        path: the archive.
        member: name of the file.
        most: number of bytes that it may have.

    Raises:
        NotFound: there is no such file or directory.
        InvalidInput: it is not an archive, lacks this member, or would unpack to more than is allowed.
    """
    mode = _mode(path)
    if mode is None:
        raise NotFound(f"there is no archive {short(path)}")
    with reading(path, ARCHIVE):
        if stat.S_ISDIR(mode):
            _check_size(member, (path / member).stat().st_size, most)
            return (path / member).read_bytes()
        with opened_zip(path) as archive:
            _check_names(archive)
            info = archive.getinfo(member)
            _check_size(member, info.file_size, most)
            with archive.open(info) as file:
                # With a number: without one zipfile inflates everything before it looks at the size that was promised.
                content = file.read(info.file_size + 1)
            if len(content) != info.file_size:
                raise ValueError(f"{member} is cut off")
            return content


@contextmanager
def opened_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """Opens a zip file whose directory is small, and that promises to unpack to what is in proportion to its size.

    Raises:
        InvalidInput: it grows too much, or is compressed in a way that cannot be bounded.
    """
    with path.open("rb", buffering=0) as raw:
        file = _WithSmallDirectory(raw)
        with zipfile.ZipFile(file) as archive:
            file.most = sys.maxsize
            _check_inflation(archive, path)
            yield archive


class _WithSmallDirectory(io.BufferedReader):
    """A file that zipfile may read in small pieces only, until `most` is set anew: its directory is one piece."""

    most = MAX_DIRECTORY_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > self.most:
            raise ValueError(f"its directory may have at most {self.most} bytes, has {size}")
        return super().read(size)


def _check_inflation(archive: zipfile.ZipFile, path: Path) -> None:
    size, allowed = path.stat().st_size, (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    if any(info.compress_type not in allowed for info in archive.infolist()):
        raise InvalidInput(f"{short(path)} must be stored or deflated, as zip files usually are")
    most, total = max(MIN_INFLATED_BYTES, MAX_INFLATION * size), sum(info.file_size for info in archive.infolist())
    if total > most:
        raise InvalidInput(f"{short(path)} of {size} bytes may unpack to at most {most} bytes, got {total}")


def _check_names(archive: zipfile.ZipFile) -> None:
    """Checks the names of an archive, all of which TorchServe unpacks."""
    names = [info.filename for info in archive.infolist()]
    if len(names) > MAX_MEMBERS:
        raise ValueError(f"it may have at most {MAX_MEMBERS} files, has {len(names)}")
    if len(set(names)) < len(names):  # zipfile would read the last of two, others may read the first
        raise ValueError("it has two files of one name")
    for name in names:
        path = PurePosixPath(name)
        if len(name) > MAX_NAME_LENGTH or path.is_absolute() or ".." in path.parts or "\\" in name:
            raise ValueError(f"it may not have a file of this name: {short(repr(name))}")


def _check_size(member: str, size: int, most: int) -> None:
    if size > most:
        raise ValueError(f"{member} may have at most {most} bytes, has {size}")


def _checked_text(data: bytes) -> bytes:
    if len(data) > MAX_TEXT_BYTES:
        raise ValueError(f"it may have at most {MAX_TEXT_BYTES} bytes")
    return data


def _mode(path: Path) -> int | None:
    """Returns the kind and the rights of a file; None where there is none, or can be none of this name."""
    try:
        return path.stat().st_mode
    except (OSError, ValueError):
        return None

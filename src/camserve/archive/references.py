"""Reads the references that are to be packed with a network, and reads and writes those of an archive. No torch.

References are given as a directory of pictures or as a file of vectors. In an archive they are one small member of
safetensors; their names are the labels of the card.
"""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from camserve.archive.card import ModelCard
from camserve.archive.untrusted import ARCHIVE, opened_zip, read_member, reading, short
from camserve.errors import InvalidInput, InvalidOption, NotFound
from camserve.types.model import OF_VECTORS
from camserve.types.references import MAX_REFERENCE_NUMBERS, MAX_REFERENCES, References
from camserve.wording import shown

REFERENCES = "references.safetensors"
_TENSOR = "references"

_MAX_BYTES = 4 * MAX_REFERENCE_NUMBERS + 2**12
"""Bytes of the member: its numbers, and a header."""

_MAX_ARRAY_BYTES = 2 * _MAX_BYTES
"""Bytes of an array of vectors in a file: they may have float64."""

_VECTORS = "a file of vectors: NAME.npz with an array for each reference, or NAME.npy with a row for each, and --labels"

Given = Mapping[str, Sequence[Path] | Sequence[str] | np.ndarray]
"""Pictures by name of the reference, or prompts, or its vectors (n, D); several are averaged."""


def given_references(path: Path, names: Sequence[str] = ()) -> Given:
    """Returns what there is of each reference, in order of the files or of the arrays; pictures are not opened.

    Args:
        path: a directory of pictures, each of which is a reference of the file's name, and of directories of pictures,
            each of which is one reference; or an `.npz` file with an array (D,) or (n, D) for each reference; or an
            `.npy` file with an array (R, D). Names that begin with a dot are passed over.
        names: names of the rows of an `.npy` file, in their order.

    Raises:
        NotFound: there is no such file or directory.
        InvalidOption: a name comes twice, is given for other than an `.npy` file, or is missing for one; there are too
            many references.
        InvalidInput: a file has no such arrays; a directory has no pictures, or directories in its directories.
    """
    if not path.exists():
        raise NotFound(f"there are no references {short(path)}: a directory of pictures, or {_VECTORS}")
    is_rows = path.suffix == ".npy" and not path.is_dir()
    if names and not is_rows:
        raise InvalidOption(f"the references in {short(path)} have names of their own; --labels names those of an .npy")
    with reading(path, _VECTORS):
        if path.is_dir():
            return _named(_pictures(path))
        if path.suffix == ".npz":
            return _named(_arrays(path))
        if not is_rows:
            raise ValueError(f"its name ends in {path.suffix!r}")
        return _named(_rows(path, names))


def load_array(file: IO[bytes], size: int) -> np.ndarray:
    """Returns the array of an `.npy` file, its numbers as float64.

    Args:
        file: the file.
        size: its number of bytes.

    Raises:
        ValueError: it is no such file, has no numbers, or not as many as it says; nothing of the size that it says is
            made before that.
    """
    if size > _MAX_ARRAY_BYTES:
        raise ValueError(f"an array may have at most {_MAX_ARRAY_BYTES} bytes, got {size}")
    data = io.BytesIO(file.read(size))
    version = np.lib.format.read_magic(data)
    if version not in _HEADERS:
        raise ValueError(f"its format is {version}")
    shape, by_columns, dtype = _HEADERS[version](data)
    content = data.getbuffer()[data.tell() :]
    if dtype.kind not in "fiu":
        raise ValueError(f"its elements are numbers, got {dtype}")
    if len(content) != dtype.itemsize * int(np.prod(shape, dtype=object)):
        raise ValueError(f"an array of {dtype} {list(shape)} has another size than {len(content)} bytes")
    flat = np.frombuffer(content, dtype)
    return flat.reshape(shape, order="F" if by_columns else "C").astype(np.float64)


_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def reference_members(references: References | None) -> dict[str, bytes]:
    """Returns the file that `read_references` reads, by name; none where there are no references."""
    if references is None:
        return {}
    from safetensors.numpy import save

    return {REFERENCES: save({_TENSOR: np.ascontiguousarray(references.vectors, "<f4")})}


def read_references(path: Path, card: ModelCard) -> References | None:
    """Returns the references of a `.mar` file or of an unpacked archive directory; None where it has none.

    Raises:
        NotFound: there is no such archive.
        InvalidInput: the card has names of references, and the archive has no vectors for them, or bad ones.
    """
    if card.outputs not in OF_VECTORS or not card.labels:
        return None
    from safetensors.numpy import load

    data = read_member(path, REFERENCES, _MAX_BYTES)
    with reading(path, f"{ARCHIVE} with references"):
        found = load(data)
        if list(found) != [_TENSOR]:
            raise ValueError(f"{REFERENCES} has one tensor, {_TENSOR!r}, got {shown(list(found))}")
        try:
            return References(card.labels, found[_TENSOR])
        except InvalidOption as error:  # of which the caller has given none
            raise ValueError(error) from None


def _named(found: Iterator[tuple[str, Sequence[Path] | np.ndarray]]) -> Given:
    given: dict[str, Sequence[Path] | np.ndarray] = {}
    for name, content in found:
        name = unicodedata.normalize("NFC", name)  # file systems differ in how they write an accent
        if name in given:
            raise InvalidOption(f"each reference has a name of its own, and {shown(name)} comes twice")
        given[name] = content
        if len(given) > MAX_REFERENCES:
            raise InvalidOption(f"a model has at most {MAX_REFERENCES} references")
    return given


def _pictures(path: Path) -> Iterator[tuple[str, list[Path]]]:
    for each in _visible(path):
        if not each.is_dir():
            yield each.stem, [each]
            continue
        pictures = list(_visible(each))
        if not pictures or any(one.is_dir() for one in pictures):
            raise InvalidInput(f"the directory of a reference has pictures alone: {short(each)} has none, or others")
        yield each.name, pictures


def _visible(path: Path) -> Iterator[Path]:
    found = sorted(each for each in path.iterdir() if not each.name.startswith("."))
    if not found:
        raise InvalidInput(f"there are no pictures in {short(path)}")
    yield from found


def _arrays(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    with opened_zip(path) as archive:
        for info in archive.infolist():
            if not info.filename.endswith(".npy"):
                raise ValueError(f"it has arrays alone, got {short(repr(info.filename))}")
            with archive.open(info) as file:
                array = load_array(file, info.file_size)
            if array.ndim not in (1, 2) or not array.size:
                raise ValueError(f"a vector has the shape [dimension], several [n, dimension], got {list(array.shape)}")
            yield info.filename.removesuffix(".npy"), np.atleast_2d(array)


def _rows(path: Path, names: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
    with path.open("rb") as file:
        array = load_array(file, path.stat().st_size)
    if array.ndim != 2 or not array.size:
        raise ValueError(f"its array has the shape [references, dimension], got {list(array.shape)}")
    if len(array) != len(names):
        raise InvalidOption(f"{short(path)} has {len(array)} references, and --labels has {len(names)} names")
    yield from zip(names, array[:, None], strict=True)

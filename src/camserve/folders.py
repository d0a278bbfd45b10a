"""Finds the images of a folder or of a list; used by all commands that take many."""

from __future__ import annotations

import os
from pathlib import Path

from camserve.errors import InvalidOption, NotFound

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

LIST_SUFFIX = ".txt"
"""Suffix of a file with one path in each line."""


def image_names(folder: Path, out: Path) -> list[str]:
    """Returns the paths of the images in a folder and its subfolders, relative to it, in order.

    Raises:
        NotFound: no such folder, or no image in it.
        InvalidOption: `out` is in the folder, or is the folder: what is written there would be taken for images.
    """
    if not folder.is_dir():
        raise NotFound(f"there is no folder {folder}")
    if out.resolve().is_relative_to(folder.resolve()):
        raise InvalidOption(f"what is written must go outside the folder of the images {folder}, got {out}")
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not names:
        raise NotFound(f"there is no image ({', '.join(SUFFIXES)}) in {folder}")
    return names


def listed_images(file: Path) -> tuple[Path, list[str]]:
    """Returns the folder that all images of a list lie in, and their paths relative to it, in the order of the list.

    Args:
        file: text in UTF-8 with one path in each line, absolute or relative to the file's folder; each counts once.

    Raises:
        NotFound: the list cannot be read, or names no image.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise NotFound(f"cannot read the list {file}: {error}") from None
    paths = list(dict.fromkeys(Path(os.path.abspath(file.parent / line.strip())) for line in lines if line.strip()))
    if not paths:
        raise NotFound(f"the list {file} names no image")
    folder = Path(os.path.commonpath([path.parent for path in paths]))
    return folder, [path.relative_to(folder).as_posix() for path in paths]

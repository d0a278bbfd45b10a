"""Describes a packed model, and reads and writes that description in an archive."""

from __future__ import annotations

import dataclasses
import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from camserve.errors import InvalidInput, InvalidOption, NotFound
from camserve.types import Preprocessing

CARD = "model.json"
LABELS = "labels.json"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class ModelCard:
    """Describes a packed model without its weights.

    Raises:
        InvalidOption: the name or version cannot be part of a path and of a URL.
    """

    name: str
    version: str
    architecture: str
    """Source that rebuilds the module: `efficientnet-lite0`, `torchvision:resnet18`, `mypackage.models:build`."""
    preprocessing: Preprocessing
    labels: tuple[str, ...]
    """Class names, in the order of the network's outputs."""
    layer: str | None
    """Address of the layer explained by default; None: found automatically."""
    source: str
    """Origin of the weights, for people."""
    licence: str
    """Licence of the weights; empty when unknown."""
    evaluation: Mapping[str, float] = field(default_factory=dict)
    """Overall score (insertion - deletion) of methods by title, as `camserve evaluate` found it."""

    def __post_init__(self) -> None:
        check_name("model name", self.name)
        check_name("model version", self.version)


def check_name(what: str, value: str) -> str:
    """Returns the value, if it may be part of a path and of a URL.

    Raises:
        InvalidOption: it has other characters than letters, digits, `_`, `.` and `-`, or starts with one of the three.
    """
    if not _NAME.fullmatch(value):
        raise InvalidOption(f"{what} must match {_NAME.pattern}, got {value!r}")
    return value


def read_card(path: Path) -> ModelCard:
    """Returns the card of a `.mar` file or of an unpacked archive directory.

    Raises:
        NotFound: there is no such file or directory.
        InvalidInput: it is not an archive of camserve.
    """
    try:
        card = json.loads(read_member(path, CARD))
        return _card(card, labels=json.loads(read_member(path, LABELS)))
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f"{path} is not a camserve archive: {error}") from None


def read_member(path: Path, member: str) -> bytes:
    """Returns the content of one file of a `.mar` file or of an unpacked archive directory.

    Raises:
        NotFound: there is no such file or directory.
        InvalidInput: it is not an archive, or lacks this member.
    """
    if not path.exists():
        raise NotFound(f"there is no archive {path}")
    try:
        if path.is_dir():
            return (path / member).read_bytes()
        with zipfile.ZipFile(path) as archive:
            return archive.read(member)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise InvalidInput(f"{path} is not a camserve archive: no readable {member} ({error})") from None


def card_members(card: ModelCard) -> dict[str, bytes]:
    """Returns the files that `read_card` reads, by name."""
    content = dataclasses.asdict(card)
    return {LABELS: as_json(content.pop("labels")), CARD: as_json(content)}


def as_json(value: object) -> bytes:
    """Returns a value as readable JSON, the same bytes for the same value."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _card(content: dict[str, Any], labels: Sequence[str]) -> ModelCard:
    values = content.pop("preprocessing")
    values |= {key: tuple(values[key]) for key in ("crop_px", "mean", "std")}
    return ModelCard(**content, preprocessing=Preprocessing(**values), labels=tuple(labels))

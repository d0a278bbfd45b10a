"""Describes a packed model, and reads and writes that description in an archive."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

from camserve.archive.untrusted import ARCHIVE, parse_json, read_member, reading, short
from camserve.errors import InvalidOption
from camserve.types import OUTPUTS, Outputs, Preprocessing
from camserve.types.model import DECODINGS, OF_VECTORS, Decoding

CARD = "model.json"
LABELS = "labels.json"

MAX_LABEL_LENGTH = 256
"""Characters of a class name; those of ImageNet have 131 at most."""

MAX_UNIT_LENGTH = 32
"""Characters of the unit of a number."""

MAX_TEXT_LENGTH = 4096
"""Characters of any other text of a card."""

MAX_INPUT_PX = 4096
"""Pixels of an input's side: beyond that one image takes gigabytes in any network."""

MAX_CHANNELS = 1024
"""Channels of an input; hyperspectral cameras have some hundreds."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")  # with `.mar` and a temporary's letters a name of a file


@dataclass(frozen=True)
class ModelCard:
    """Describes a packed model without its weights.

    Raises:
        InvalidOption: the name or version cannot be part of a path and of a URL; a text is none, or too long; a size is
            none.
    """

    name: str
    version: str
    architecture: str
    """Source that rebuilds the module: `efficientnet-lite0`, `torchvision:resnet18`, `mypackage.models:build`."""
    preprocessing: Preprocessing
    labels: tuple[str, ...]
    """Class names, in the order of the network's outputs; names of packed references where these are vectors."""
    layer: str | None
    """Address of the layer explained by default; None: found automatically."""
    source: str
    """Origin of the weights, for people."""
    licence: str
    """Licence of the weights; empty when unknown."""
    evaluation: Mapping[str, float] = field(default_factory=dict)
    """Overall score (insertion - deletion) of methods by title, as `camserve evaluate` found it."""
    outputs: Outputs = "softmax"
    """Kind of the network's outputs: see `camserve.scores`. `labels` names its classes, or the numbers of "value"."""
    output: str | None = None
    """Name of the tensor that is explained, among those that the network returns; None where it returns one."""
    units: tuple[str, ...] = ()
    """Unit of each number of "value"; empty where they have none."""
    detections: Decoding | None = None
    """Form of the answers that detections of "boxes" are made of; None where the network gives detections."""

    @property
    def head(self) -> int:
        """Number of outputs with which a source builds the network; 0: without a head."""
        return 0 if self.outputs in OF_VECTORS else 1 if self.outputs == "binary" else len(self.labels)

    def __post_init__(self) -> None:
        check_name("model name", self.name)
        check_name("model version", self.version)
        for label in self.labels:
            _check_text("class name", label, MAX_LABEL_LENGTH)
        for what, text in (("architecture", self.architecture), ("source", self.source), ("licence", self.licence)):
            _check_text(what, text, MAX_TEXT_LENGTH)
        for what, some in (("layer", self.layer), ("output", self.output)):
            if some is not None:
                _check_text(what, some, MAX_TEXT_LENGTH)
        if self.outputs not in OUTPUTS:
            raise InvalidOption(f"outputs must be one of {', '.join(OUTPUTS)}, got {short(repr(self.outputs))}")
        if self.detections is not None and self.detections not in DECODINGS:
            given = short(repr(self.detections))
            raise InvalidOption(f"detections are made of {', '.join(DECODINGS)}, got {given}")
        for unit in self.units:
            _check_text("unit", unit, MAX_UNIT_LENGTH)
        channels = self.preprocessing.channels
        if not isinstance(channels, int) or channels > MAX_CHANNELS:
            raise InvalidOption(f"the channels of the input must be 1..{MAX_CHANNELS}, got {channels!r}")
        resize = self.preprocessing.resize_px
        for size_px in (*(resize if isinstance(resize, tuple) else (resize,)), *self.preprocessing.crop_px):
            if not isinstance(size_px, int) or not 1 <= size_px <= MAX_INPUT_PX:
                raise InvalidOption(f"the sizes of the input must be 1..{MAX_INPUT_PX} pixels, got {size_px!r}")


def _check_text(what: str, text: object, most: int) -> None:
    if not isinstance(text, str) or len(text) > most:
        raise InvalidOption(f"{what} must be a text of at most {most} characters, got {short(repr(text))}")


def check_name(what: str, value: str) -> str:
    """Returns the value, if it may be part of a path and of a URL.

    Raises:
        InvalidOption: it has other characters than letters, digits, `_`, `.` and `-`, starts with one of the three, or
            has more than 128.
    """
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise InvalidOption(f"{what} must match {_NAME.pattern}, got {short(repr(value))}")
    return value


def read_card(path: Path) -> ModelCard:
    """Returns the card of a `.mar` file or of an unpacked archive directory.

    Raises:
        NotFound: there is no such file or directory.
        InvalidInput: it is not an archive of camserve.
    """
    card, labels = (parse_json(path, read_member(path, member), ARCHIVE) for member in (CARD, LABELS))
    with reading(path, ARCHIVE):
        try:
            return _card(card, labels)
        except InvalidOption as error:  # of which the caller has given none
            raise ValueError(error) from None


def card_members(card: ModelCard) -> dict[str, bytes]:
    """Returns the files that `read_card` reads, by name."""
    content = dataclasses.asdict(card)
    return {LABELS: as_json(content.pop("labels")), CARD: as_json(content)}


def as_json(value: object) -> bytes:
    """Returns a value as readable JSON, the same bytes for the same value."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _card(content: dict[str, Any], labels: list[str]) -> ModelCard:
    """Returns what two JSON texts say; anything may be raised where they say something else."""
    if not isinstance(labels, list):
        raise TypeError(f"{LABELS} must be a list")
    values = content.pop("preprocessing")
    height, width = values["crop_px"]
    values |= {"crop_px": (height, width)} | {name: tuple(map(float, values[name])) for name in ("mean", "std")}
    if isinstance(values["resize_px"], list):
        height, width = values["resize_px"]
        values["resize_px"] = (height, width)
    for name, default in (("interpolation", "bicubic"), ("crop_start", "even")):
        if values.get(name, default) not in get_args(get_type_hints(Preprocessing)[name]):
            raise ValueError(f"unknown {name}")
    content["evaluation"] = {str(key): float(value) for key, value in content.get("evaluation", {}).items()}
    if not isinstance(units := content.get("units", []), list):
        raise TypeError("units must be a list")
    content["units"] = tuple(units)
    return ModelCard(**content, preprocessing=Preprocessing(**values), labels=tuple(labels))

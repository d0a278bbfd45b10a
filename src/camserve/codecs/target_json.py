"""Reads the JSON form of targets: a class index, a text form, or an object with one of the names of the proto.

    281   "tabby"   "contrast:tabby>lynx"   {"label": "up:age"}   {"top_k": 3}
    {"contrast": {"of": "tabby", "than": ["lynx", 287], "gamma": 0.6}}
    {"finer": {"of": "tabby", "nearest": 5}}   {"against": {"of": "tabby"}}
    {"value": {"of": "age", "direction": "up"}}
    {"vector": [0.25, -1.5]}   {"reference": "base64 of an image file"}   {"text": "a seven left of a two"}
    {"region": {"of": "cat", "box": [10, 20, 90, 80]}}   {"region": {"of": "cat", "mask": "base64 of a grey PNG file"}}
    {"box": {"edges": [10, 20, 90, 80], "of": "cat"}}   {"detection": 0}
    {"word": {"at": 2, "words": "seven two"}}

What is inside is counted and measured before it is read.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from camserve.errors import InvalidImage, InvalidOption
from camserve.types import (
    Against,
    AnyTarget,
    BoxTarget,
    Contrast,
    Detection,
    Finer,
    Region,
    Target,
    Text,
    Value,
    Vector,
    Word,
)
from camserve.types.request import RequestLimits
from camserve.types.targets import class_texts, free_texts, parse_class, parse_target
from camserve.wording import shown

_CLASS = ("index", "label", "top_k")
_FIELDS: Mapping[str, tuple[str, ...]] = {
    "contrast": ("of", "than", "gamma"),
    "finer": ("of", "gamma", "nearest"),
    "against": ("of",),
    "value": ("of", "direction"),
}
_KINDS: Mapping[str, Callable[..., AnyTarget]] = {
    "contrast": Contrast,
    "finer": Finer,
    "against": Against,
    "value": Value,
}
_WITHOUT_CLASS = ("vector", "reference", "text", "word", "detection")
_REGION = ("of", "box", "mask", "grid")
NAMES = (*_CLASS, *_FIELDS, *_WITHOUT_CLASS, "box", "region")
"""Names that an object may have, one at a time."""


def check_targets(entries: Sequence[Any], limits: RequestLimits) -> None:
    """Raises InvalidOption where entries name too many classes, or hold a name or text too long, before one is read."""
    named = [text for entry in entries for text in _classes_in(entry)]
    limits.check_classes(len(named))
    limits.check_names(text for text in named if isinstance(text, str))
    limits.check_texts(text for entry in entries for text in _texts_in(entry))


def _classes_in(entry: Any) -> Sequence[Any]:
    """Returns what names the classes in an entry: texts, indices, or what is none of either."""
    if isinstance(entry, str):
        return class_texts(entry)
    if not isinstance(entry, dict):
        return [entry]
    if "region" in entry:
        region = entry["region"]
        return _classes_in(region.get("of", "")) if isinstance(region, dict) else []
    inside = [value for key, value in entry.items() if key not in _WITHOUT_CLASS]
    held = [one for value in inside if isinstance(value, dict) for one in _listed(value.get("than"))]
    of = [value.get("of") if isinstance(value, dict) else value for value in inside]
    return [one.get("label") if isinstance(one, dict) else one for one in (*of, *held)]


def _texts_in(entry: Any) -> Sequence[str]:
    """Returns the free text in an entry."""
    if isinstance(entry, str):
        return free_texts(entry)
    if not isinstance(entry, dict):
        return []
    word = entry.get("word")
    words = [entry.get("text"), word.get("words") if isinstance(word, dict) else None]
    return [one for one in words if isinstance(one, str)]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def read_target(name: str, value: Any) -> AnyTarget:
    """Returns the target of an entry of an option.

    Raises:
        InvalidOption: it has none of the forms, or says what cannot be.
        InvalidImage: a reference is no base64.
    """
    if isinstance(value, str):
        return parse_target(value)
    if isinstance(value, dict) and len(value) == 1:
        ((kind, content),) = value.items()
        if kind in _FIELDS:
            return _of_classes(name, kind, content)
        if kind == "vector":
            return Vector(np.array(()) if content is None else content)
        if kind == "reference":
            return Vector(image=_file(name, content))
        if kind == "text":
            return Text(content)
        if kind == "region":
            return _region(name, content)
        if kind == "box":
            return _box(name, content)
        if kind == "detection":
            return Detection(content)
        if kind == "word":
            return _word(name, content)
        if kind in _CLASS:
            return _class(name, value)
    elif isinstance(value, int) and not isinstance(value, bool):
        return Target(index=value)
    raise InvalidOption(
        f"{name}: a target is a class index, a text, or an object with one of {', '.join(NAMES)}; got {_shown(value)}"
    )


def _of_classes(name: str, kind: str, content: Any) -> AnyTarget:
    allowed = _FIELDS[kind]
    if not isinstance(content, dict) or not {"of"} <= set(content) <= set(allowed):
        raise InvalidOption(
            f"{name}: {kind} is an object with of, and may have {', '.join(allowed)}; got {_shown(content)}"
        )
    values = dict(content)
    values["of"] = _class(name, values["of"])
    if kind == "contrast":
        values["than"] = tuple(_class(name, one) for one in _listed(values.get("than", [])))
    return _KINDS[kind](**values)


def _region(name: str, content: Any) -> AnyTarget:
    if not isinstance(content, dict) or not set(content) <= set(_REGION):
        raise InvalidOption(f"{name}: region is an object that may have {', '.join(_REGION)}; got {_shown(content)}")
    values = dict(content)
    if "of" in values:
        values["of"] = read_target(name, values["of"])
    for file in ("mask", "grid"):
        if file in values:
            values[file] = _file(name, values[file], f"a {file} is the base64 of a grey PNG file")
    return Region(**values)


def _box(name: str, content: Any) -> BoxTarget:
    if not isinstance(content, dict) or not {"edges"} <= set(content) <= {"edges", "of"}:
        raise InvalidOption(
            f"{name}: box is an object with edges [x0, y0, x1, y1], and may have of; got {_shown(content)}"
        )
    return BoxTarget(content["edges"], _class(name, content["of"]) if "of" in content else None)


def _word(name: str, content: Any) -> Word:
    if not isinstance(content, dict) or not {"at"} <= set(content) <= {"at", "words"}:
        raise InvalidOption(f"{name}: word is an object with at, and may have words; got {_shown(content)}")
    return Word(**content)


def _class(name: str, value: Any) -> Target:
    if isinstance(value, str):
        return parse_class(value)
    if isinstance(value, dict) and len(value) == 1 and set(value) <= set(_CLASS):
        return Target(**value)
    if isinstance(value, int) and not isinstance(value, bool):
        return Target(index=value)
    raise InvalidOption(
        f"{name}: a class is an index, a text, or an object with one of {', '.join(_CLASS)}; got {_shown(value)}"
    )


def _file(name: str, content: Any, what: str = "a reference is the base64 of an image file") -> bytes:
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise InvalidImage(f"{name}: {what}, got {_shown(content)}") from None


def _shown(value: Any) -> str:
    return "nothing" if value is None else shown(value)

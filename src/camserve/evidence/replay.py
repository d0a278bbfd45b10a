"""Asks again what an evidence record tells of, and holds the maps against its hashes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

from google.protobuf import json_format

from camserve.codecs import v1
from camserve.errors import InvalidInput, InvalidOption
from camserve.evidence.record import FORM, Record, image_told, target_told, text_told
from camserve.images import ImageContent
from camserve.types import AnyTarget
from camserve.v1 import explain_pb2 as pb


class Outcome(IntEnum):
    """Says how a replay has ended; the value is the exit status of `camserve evidence replay`."""

    EQUAL = 0
    """Every map, and every curve that was measured, is the one of the record."""
    DIFFERENT = 1
    """One is not, although it should be: the record is not of this image, model and request."""
    OTHER_INPUT = 3
    """The image, a text or the weights are others: nothing was compared."""
    NOT_EXPECTED = 4
    """One is not, and need not be: the record's precision, machine or versions are others."""


@dataclass(frozen=True)
class Compared:
    """Tells what came of a replay."""

    outcome: Outcome
    lines: tuple[str, ...] = field(default=())
    """Sentences that say what was found."""


_SHAPE: Mapping[str, Any] = {
    "model": {"name": str, "weights": str},
    "image": {"sha256": str},
    "methods": [{"name": str, "parameters": {}}],
    "targets": [{}],
    "layers": [str],
    "fusion": str,
    "output": {"size": str, "signed": bool},
    "evaluation_steps": int,
    "precision": {"asked": str},
    "piece": int,
    "workers": [{}],
    "gateway": {},
    "maps": [{"method": int, "target": str | dict, "complete": bool}],
}
"""Tells what a replay looks at in a record: the type of each value, or what is inside of it."""


def read_record(path: Path, number: int | None = None) -> Record:
    """Returns a record of a file.

    Args:
        path: a file with one record, or an evidence log.
        number: number of the record in the log; None: the file has one record only.

    Raises:
        InvalidInput: the file cannot be read, has no such record, or has several and no number is given; or the record
            is not as camserve writes one.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        found = [json.loads(line) for line in lines]
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidInput(f"cannot read a record from {path}: {error}") from None
    records = [one for one in found if isinstance(one, dict) and one.get("record") == FORM]
    if len(records) < len(found) or not records:
        raise InvalidInput(f"{path} has lines that are no records of form {FORM}" if found else f"{path} is empty")
    if number is None and len(records) > 1:
        raise InvalidInput(f"{path} has {len(records)} records: say which, by its number")
    wanted = [one for one in records if number is None or one.get("number") == number]
    if not wanted:
        raise InvalidInput(f"{path} has no record {number}")
    _check_shape(path, wanted[0])
    return wanted[0]


def _check_shape(path: Path, record: Record) -> None:
    for name, shape in _SHAPE.items():
        if not _has_shape(record.get(name), shape):
            raise InvalidInput(f"{path} has a record whose {name} is not as camserve writes it")
    if any(not 0 <= one["method"] < len(record["methods"]) for one in record["maps"]):
        raise InvalidInput(f"{path} has a record with a map of a method that it does not tell of")


def _has_shape(value: Any, shape: Any) -> bool:
    if isinstance(shape, Mapping):
        return isinstance(value, dict) and all(_has_shape(value.get(name), inner) for name, inner in shape.items())
    if isinstance(shape, list):
        return isinstance(value, list) and all(_has_shape(one, shape[0]) for one in value)
    return isinstance(value, shape)


def check_image(record: Record, image: ImageContent) -> str:
    """Returns what is wrong where an image is not that of a record; "" where it is."""
    told, asked = image_told(image), record["image"]
    if told == asked:
        return ""
    return f"this is another image: its SHA-256 is {told['sha256']}, that of the record's is {asked['sha256']}"


def request_options(record: Record, targets: Sequence[AnyTarget] = (), text: str = "") -> dict[str, Any]:
    """Returns what a client or an engine is asked, but for image and model.

    Args:
        record: the record.
        targets: the targets, where the record holds hashes instead of words, vectors or pictures.
        text: the text beside the image, where there was one.

    Raises:
        InvalidOption: targets or a text are needed, or are others than the record's.
    """
    text_asked = record.get("text")
    if (text_told(text) if text else None) != text_asked:
        raise InvalidOption("the record is of another text: give the one that was asked" if text_asked else NO_TEXT)
    return {
        "methods": [(one["name"], one["parameters"]) for one in record["methods"]],
        "targets": _targets(record["targets"], targets),
        "layer": tuple(record["layers"]),
        "fusion": record["fusion"],
        "size": record["output"]["size"],
        "signed": record["output"]["signed"],
        "evaluate": bool(record["evaluation_steps"]),
        **({"evaluation_steps": record["evaluation_steps"]} if record["evaluation_steps"] else {}),
        "precision": "exact",
        "text": text,
        "evidence": True,
    }


NO_TEXT = "the record is of a request without a text"


def _targets(told: Sequence[Mapping[str, Any]], given: Sequence[AnyTarget]) -> tuple[AnyTarget, ...]:
    """Returns the targets of a record: those that are given, if they are its own, or else read from it."""
    if given:
        if [target_told(target) for target in given] != list(told):
            raise InvalidOption("these are not the targets of the record; give all of them, in its order")
        return tuple(given)
    try:
        return tuple(v1.target_from_proto(json_format.ParseDict(dict(one), pb.Target())) for one in told)
    except json_format.ParseError:
        raise InvalidOption(
            "the record holds hashes of words, vectors or pictures among its targets: give all targets"
        ) from None


def compare(record: Record, again: Record) -> Compared:
    """Returns how the maps of a record compare with those of the record of its replay."""
    if record["model"]["weights"] != again["model"]["weights"]:
        line = f"other weights: {again['model']['weights']} here, {record['model']['weights']} in the record"
        return Compared(Outcome.OTHER_INPUT, (line,))
    different = [
        f"map {number} ({_name(record, one)}) is another one"
        for number, one in enumerate(record["maps"])
        if number >= len(again["maps"]) or not _is_same(one, again["maps"][number])
    ]
    if len(record["maps"]) != len(again["maps"]):
        different.append(f"{len(again['maps'])} maps instead of {len(record['maps'])}")
    if not different:
        return Compared(Outcome.EQUAL, (f"{len(record['maps'])} maps are equal to those of the record, bit by bit",))
    if reasons := _why_not_expected(record, again):
        return Compared(Outcome.NOT_EXPECTED, (*different, *reasons))
    return Compared(Outcome.DIFFERENT, tuple(different))


def _name(record: Record, told: Record) -> str:
    target = told["target"]
    return f"{record['methods'][told['method']]['name']}, {target if isinstance(target, str) else 'a text'}"


def _is_same(told: Record, again: Record) -> bool:
    compared = ("shape", "sha256", "faithfulness")
    return all(told.get(name) == again.get(name) for name in compared)


def _why_not_expected(record: Record, again: Record) -> list[str]:
    """Returns why maps need not be equal; empty where they must be."""
    reasons = []
    if not record["piece"]:
        asked = record["precision"]["asked"]
        reasons.append(
            f"not expected to be equal: precision {asked} was asked, and only exact is made again bit by bit"
        )
    if not all(one["complete"] for one in record["maps"]):
        reasons.append("not expected to be equal: the record is of a map of some of the queries, at its deadline")
    for what in ("workers", "gateway"):
        before, now = _facts(record[what]), _facts(again[what])
        for name in sorted({*before, *now}):
            if before.get(name) != now.get(name):
                said = f"{what} had {name} {before.get(name)}, and here it is {now.get(name)}"
                reasons.append(f"not expected to be equal: {said}")
    return reasons


def _facts(environments: Any) -> dict[str, str]:
    """Returns versions and machines by name; of several kinds of workers, all that they have."""
    found: dict[str, list[str]] = {}
    for one in environments if isinstance(environments, list) else [environments]:
        for name, value in one.items():
            found.setdefault(name, []).append(str(value))
    return {name: " and ".join(sorted(set(values))) for name, values in found.items()}

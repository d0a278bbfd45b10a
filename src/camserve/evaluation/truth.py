"""Reads true boxes from the files they come in: COCO JSON and Pascal VOC XML. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from xml.etree import ElementTree

from camserve.errors import InvalidInput, NotFound

T = TypeVar("T")


@dataclass(frozen=True)
class TrueBox:
    """Says where an object of a class is: half-open, in pixels of the image."""

    label: str
    left: float
    top: float
    right: float
    bottom: float


BoxesByImage = Mapping[str, tuple[TrueBox, ...]]
"""Boxes by file name of the image, without folder."""


def read_boxes(path: Path) -> BoxesByImage:
    """Returns the boxes of a COCO JSON file, of a Pascal VOC XML file, or of all XML files of a folder.

    COCO boxes are [x, y, width, height]. Pascal VOC counts pixels from 1 and includes the last one: xmin..xmax becomes
    xmin - 1 .. xmax. Crowd regions of COCO, which are no boxes around one object, are left out.

    Raises:
        NotFound: there is no such file, or no XML file in the folder.
        InvalidInput: the file has another form.
    """
    if not path.exists():
        raise NotFound(f"there is no box file {path}")
    if path.is_dir():
        files = sorted(path.glob("*.xml"))
        if not files:
            raise NotFound(f"there is no XML file in {path}")
        return dict(_parsed(file, _pascal_voc) for file in files)
    if path.suffix.lower() == ".xml":
        return dict([_parsed(path, _pascal_voc)])
    return _parsed(path, _coco)


def _parsed(path: Path, parse: Callable[[Path], T]) -> T:
    try:
        return parse(path)
    except (ElementTree.ParseError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInput(f"{path} is neither a COCO JSON nor a Pascal VOC XML file of boxes: {error!r}") from None


def _coco(path: Path) -> BoxesByImage:
    content = json.loads(path.read_text(encoding="utf-8"))
    names = {image["id"]: Path(image["file_name"]).name for image in content["images"]}
    labels = {category["id"]: str(category["name"]) for category in content["categories"]}
    found: dict[str, list[TrueBox]] = {name: [] for name in names.values()}
    for annotation in content["annotations"]:
        if annotation.get("iscrowd"):
            continue
        left, top, width, height = map(float, annotation["bbox"])
        box = TrueBox(labels[annotation["category_id"]], left, top, left + width, top + height)
        found[names[annotation["image_id"]]].append(box)
    return {name: tuple(boxes) for name, boxes in found.items()}


def _pascal_voc(path: Path) -> tuple[str, tuple[TrueBox, ...]]:
    root = ElementTree.parse(path).getroot()
    return Path(_text(root, "filename")).name, tuple(map(_voc_box, root.iter("object")))


def _voc_box(element: ElementTree.Element) -> TrueBox:
    left, top, right, bottom = (float(_text(element, f"bndbox/{name}")) for name in ("xmin", "ymin", "xmax", "ymax"))
    return TrueBox(_text(element, "name"), left - 1, top - 1, right, bottom)


def _text(element: ElementTree.Element, path: str) -> str:
    text = element.findtext(path)
    if not text:
        raise ValueError(f"no {path}")
    return text.strip()

"""Collects what is evaluated: images with or without true boxes, from a folder or from a benchmark that is shipped."""

from __future__ import annotations

import hashlib
import io
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from camserve.errors import InvalidInput, InvalidOption, NotFound, Unsupported
from camserve.evaluation.truth import BoxesByImage, TrueBox
from camserve.folders import SUFFIXES
from camserve.images import read_image
from camserve.labels import resolve_label
from camserve.types import InputView, ModelInfo


@dataclass(frozen=True)
class Example:
    """Describes an image with what is known of it."""

    name: str
    """Name that is unique among the examples."""
    source: Path | bytes
    boxes: tuple[TrueBox, ...] = ()
    """Boxes of all classes, in pixels of the image."""
    masks: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Pixels (height, width), bool, of the image that are of a class with boxes, by its label, where they are known."""

    def read(self) -> bytes:
        """Returns the file's bytes."""
        content = read_image(self.source)
        assert isinstance(content, bytes)
        return content

    def digest(self, content: bytes) -> str:
        """Returns a digest of the file's bytes, the boxes and the masks: figures made of the same have the same."""
        masks = b"".join(label.encode() + self.masks[label].tobytes() for label in sorted(self.masks))
        return hashlib.sha256(content + repr(self.boxes).encode() + masks).hexdigest()


def folder_examples(folder: Path, boxes: BoxesByImage | None = None) -> list[Example]:
    """Returns the images of a folder, in order of their names; those of a box file that the folder lacks are left out.

    Raises:
        NotFound: no such folder, no image in it, or boxes of which none belongs to an image in it.
    """
    if not folder.is_dir():
        raise NotFound(f"there is no folder {folder}")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise NotFound(f"there is no image ({', '.join(SUFFIXES)}) in {folder}")
    if boxes is not None and not any(path.name in boxes for path in paths):
        raise NotFound(f"the box file has no image of {folder}: it names {', '.join(list(boxes)[:3])}, ...")
    return [Example(path.name, path, (boxes or {}).get(path.name, ())) for path in paths]


def digits_examples(count: int, masks: bool = False, labels: Sequence[str] = ()) -> list[Example]:
    """Returns the first scenes of the digits benchmark.

    Args:
        count: how many.
        masks: whether the pixels of each digit are wanted.
        labels: of the network: where "a three" is one of them, a 3 is called so.
    """
    from camserve.evaluation.digits.scenes import benchmark_scenes
    from camserve.evaluation.digits.towers import PROMPTS

    names = {str(digit): text if text in labels else str(digit) for digit, text in enumerate(PROMPTS)}
    examples = []
    for number, scene in enumerate(benchmark_scenes(count)):
        file = io.BytesIO()
        Image.fromarray(scene.pixels).save(file, "PNG")
        boxes = tuple(replace(box, label=names[box.label]) for box in scene.boxes)
        pixels = {names[box.label]: scene.owners == int(box.label) for box in scene.boxes} if masks else {}
        examples.append(Example(f"scene-{number:03}.png", file.getvalue(), boxes, pixels))
    return examples


def check_images_alone(model: ModelInfo) -> None:
    """Raises Unsupported where a model takes a text beside the image, which a folder of images does not have."""
    if model.text is not None:
        raise Unsupported(
            f"model {model.name} takes a {model.text.what} beside the image, and here are images alone; maps of its "
            "answers, with their curves, are made by `camserve explain --text --evaluate`"
        )


def classes_of(boxes: Iterable[TrueBox], labels: Sequence[str]) -> Mapping[int, tuple[TrueBox, ...]]:
    """Returns the boxes by class index; boxes whose label is not one of the network's are left out."""
    found: dict[int, list[TrueBox]] = defaultdict(list)
    for box in boxes:
        try:
            found[resolve_label(box.label, labels)].append(box)
        except InvalidOption:
            continue
    return {index: tuple(some) for index, some in found.items()}


def unknown_labels(examples: Iterable[Example], labels: Sequence[str]) -> list[str]:
    """Returns the labels of boxes that are not classes of the network.

    Raises:
        InvalidInput: there are boxes, and none of a class of the network.
    """
    every = {box.label for example in examples for box in example.boxes}
    known = {box.label for example in examples for some in classes_of(example.boxes, labels).values() for box in some}
    if every and not known:
        some = ", ".join(sorted(every)[:5])
        raise InvalidInput(
            f"no label of the boxes is a class of the network, whose first is {labels[0]!r}: {some}; "
            "without boxes, what it predicts itself is explained"
        )
    return sorted(every - known)


def seen_boxes(boxes: Iterable[TrueBox], view: InputView) -> tuple[TrueBox, ...]:
    """Returns the boxes cut to the part of the image that the network saw; those outside are left out."""
    left, top, right, bottom = view.crop
    cut = (
        TrueBox(box.label, max(box.left, left), max(box.top, top), min(box.right, right), min(box.bottom, bottom))
        for box in boxes
    )
    return tuple(box for box in cut if box.left < box.right and box.top < box.bottom)

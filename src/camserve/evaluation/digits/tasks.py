"""Says what each network of digit scenes was asked to learn: its scenes, what is true of them, how well it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import numpy as np
from torch import Tensor

from camserve.evaluation.digits import asked
from camserve.evaluation.digits.scenes import BACKGROUND, SIZE_PX, Content, Scene, Split, make_scene
from camserve.evaluation.digits.towers import PROMPTS, TEXTS, truths
from camserve.evaluation.truth import TrueBox
from camserve.scores.detections import find_detections

SEVEN = 7
NUMBERS = Content(sides_px=(20, 40), apart_px=5)
"""Content of the scenes of numbers: digits of many sizes, of which the largest is clearly so."""


@dataclass(frozen=True)
class Task:
    """Describes what a network learns."""

    question: str
    """Question that the network answers, for people."""
    scene: Callable[[int, int, Split], Scene]
    """Returns scene (seed, index, split) of those that the network learns from."""
    truth: Callable[[Scene], Sequence[float]]
    """Returns what the outputs must say of a scene."""
    figures: Callable[[np.ndarray, np.ndarray], Mapping[str, float]]
    """Returns how well outputs (N, ...) agree with truths (N, K), by name; the first is the one that counts."""
    told: str
    """Format string that makes a sentence of the figures, for people."""
    least: float
    """Least value of the first figure that a trained network has on held-out scenes."""
    answers: Callable[[Any, Tensor], Tensor] = lambda module, x: module(x)
    """Returns the outputs (N, K) of a network that are compared to the truths, for normalised scenes."""


_MOST_DIGITS = 3
_UP_TO_THREE = (1, 2, 3, 2, 1, 2, 3, 0)
"""Numbers of digits of eight scenes."""


def _one_digit(seed: int, index: int, split: Split) -> Scene:
    return make_scene(seed, index, 1, split)


def _some_digits(seed: int, index: int, split: Split) -> Scene:
    """Returns a scene of up to three digits, with a blot in half of those that have room for one."""
    digits = _UP_TO_THREE[index % 8]
    return make_scene(seed, index, digits, split, Content(blots=_blots(digits, index)))


def _with_or_without_seven(seed: int, index: int, split: Split) -> Scene:
    """Returns a scene of up to three digits; every second one has a seven."""
    digits = 1 + index // 2 % 3
    present, absent = (SEVEN, None) if index % 2 == 0 else (None, SEVEN)
    content = Content(blots=_blots(digits, index), present=present, absent=absent)
    return make_scene(seed, index, digits, split, content)


def _of_many_sizes(seed: int, index: int, split: Split) -> Scene:
    """Returns a scene as `_some_digits` does, of digits whose sizes differ."""
    digits = _UP_TO_THREE[index % 8]
    return make_scene(seed, index, digits, split, replace(NUMBERS, blots=_blots(digits, index)))


_ONE_OR_MORE = (1, 2, 3, 2, 3, 2, 2, 3)
"""Numbers of digits of eight scenes of which something can be said."""


def _said_of(seed: int, index: int, split: Split) -> Scene:
    digits = _ONE_OR_MORE[index % 8]
    return make_scene(seed, index, digits, split, Content(blots=_blots(digits, index)))


def _blots(digits: int, index: int) -> int:
    return int(digits < 3 and index // 8 % 2)


def _present(scene: Scene) -> list[float]:
    """Returns 1 for each digit that is in the scene and 0 for the others."""
    return [float(any(box.label == str(digit) for box in scene.boxes)) for digit in range(10)]


def _seven(scene: Scene) -> list[float]:
    return [_present(scene)[SEVEN]]


def _numbers(scene: Scene) -> list[float]:
    """Returns the sum of the digits, and the size of the largest: the longer side of its box, in pixels; else 0."""
    return [float(sum(int(box.label) for box in scene.boxes)), max(map(size_px, scene.boxes), default=0.0)]


def size_px(box: TrueBox) -> float:
    """Returns the size of a digit: the longer side of its box."""
    return max(box.right - box.left, box.bottom - box.top)


def _classes_right(outputs: np.ndarray, truths: np.ndarray) -> dict[str, float]:
    return {"right": float((outputs.argmax(axis=1) == truths.argmax(axis=1)).mean())}


def _labels_right(outputs: np.ndarray, truths: np.ndarray) -> dict[str, float]:
    """Returns in how many scenes all labels are right, and how many labels are."""
    right = (outputs > 0) == (truths > 0.5)
    return {"right": float(right.all(axis=1).mean()), "labels": float(right.mean())}


def _numbers_right(outputs: np.ndarray, truths: np.ndarray) -> dict[str, float]:
    """Returns the shares of the numbers' variance that are explained, the smaller one first, and the mean errors."""
    errors = outputs - truths
    explained = 1 - (errors**2).mean(axis=0) / truths.var(axis=0)
    total, largest = np.abs(errors).mean(axis=0)
    return {"explained": float(explained.min()), "sum_error": float(total), "size_error_px": float(largest)}


def _similarity(module: Any, x: Tensor) -> Tensor:
    similarity: Tensor = module.similarity(x, TEXTS)
    return similarity


def _texts_right(outputs: np.ndarray, truths: np.ndarray) -> dict[str, float]:
    """Returns the shares of true texts that are more similar to their scene than all false ones: of all texts, of those
    of one digit among themselves; and of scenes whose most similar text is true."""
    found = _found(outputs, truths)
    of_one = _found(outputs[:, : len(PROMPTS)], truths[:, : len(PROMPTS)])
    nearest = truths[np.arange(len(truths)), outputs.argmax(axis=1)]
    return {"found": found, "one_digit": of_one, "nearest": float((nearest > 0).mean())}


def _found(outputs: np.ndarray, truths: np.ndarray) -> float:
    highest = np.where(truths == 0, outputs, -np.inf).max(axis=1, keepdims=True)
    return float((outputs > highest)[truths == 1].mean())


MASK_PX = SIZE_PX // 2
"""Size of the masks that say what each place of a scene is, in both directions."""


def _owners(scene: Scene) -> list[float]:
    """Returns the class of each place, row by row: that of a digit if it has half of the place's four pixels."""
    pixels = scene.owners.reshape(MASK_PX, 2, MASK_PX, 2)
    owned = (pixels < BACKGROUND).sum(axis=(1, 3)) >= 2
    found: list[float] = np.where(owned, pixels.min(axis=(1, 3)), BACKGROUND).ravel().tolist()
    return found


def _places_right(outputs: np.ndarray, truths: np.ndarray) -> dict[str, float]:
    """Returns the mean over the classes of intersection over union, and the share of all places that are right."""
    classes = outputs.shape[1]
    said, true = outputs.argmax(axis=1).ravel(), truths.ravel().astype(np.int64)
    counts = np.bincount(classes * true + said, minlength=classes**2).reshape(classes, classes)
    both = counts.diagonal()
    united = counts.sum(axis=0) + counts.sum(axis=1) - both
    return {"iou": float((both / united).mean()), "places": float(both.sum() / counts.sum())}


def _boxes(scene: Scene) -> list[float]:
    """Returns class and edges of each digit, and -1 for those that there are not."""
    told = [(float(box.label), box.left, box.top, box.right, box.bottom) for box in scene.boxes]
    return [number for one in [*told, *[(-1.0,) * 5] * (_MOST_DIGITS - len(told))] for number in one]


def _detections(module: Any, x: Tensor) -> Tensor:
    """Returns the detections in rows, as the score of boxes has them."""
    rows: Tensor = find_detections(module, x[:2]).network(x)
    return rows


def _digits_found(outputs: np.ndarray, truths: np.ndarray) -> dict[str, float]:
    """Returns the average precision of detections (as PASCAL VOC since 2010, all classes together), and two figures.

    A detection is right where an IoU of at least 0.5 with a digit of its class is, and nothing better was. `recall` and
    `precision` are those of detections with a score of at least 0.5.
    """
    told = []
    digits = truths.reshape(len(truths), _MOST_DIGITS, 5)
    for found, boxes in zip(outputs.reshape(len(outputs), -1, 6), digits, strict=True):
        free = [box for box in boxes if box[0] >= 0]
        for *edges, score, label in found[found[:, 4] > 0]:
            shares = [_overlap(edges, box[1:]) if box[0] == label else 0.0 for box in free]
            is_right = bool(shares) and max(shares) >= 0.5
            if is_right:
                free.pop(int(np.argmax(shares)))
            told.append((score, is_right))
    total = int((digits[:, :, 0] >= 0).sum())
    told.sort(key=lambda one: -one[0])
    scores, right = np.array([one[0] for one in told]), np.array([one[1] for one in told])
    recall, precision = right.cumsum() / total, right.cumsum() / np.arange(1, len(right) + 1)
    best_from_here = np.maximum.accumulate(precision[::-1])[::-1]
    sure = scores >= 0.5
    return {
        "ap50": float((np.diff(recall, prepend=0) * best_from_here).sum()),
        "recall": float(right[sure].sum() / total),
        "precision": float(right[sure].mean()),
    }


def _overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Returns the share of two boxes' intersection in their union."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    both = max(width, 0.0) * max(height, 0.0)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return both / (areas - both)


def _some_sevens(seed: int, index: int, split: Split) -> Scene:
    """Returns a scene of one to three digits; in every fifth any number of them are sevens."""
    rng = np.random.default_rng([seed, index, split == "test"])
    digits, sevens = (int(number) for number in rng.integers((1, 0), (4, 4)))
    if index % 5:
        return make_scene(seed, index, digits, split)
    content = Content(present=SEVEN, copies=sevens) if sevens else Content(absent=SEVEN)
    return make_scene(seed, index, max(digits, sevens), split, content)


def side_by_side(seed: int, index: int, split: Split, digits: int | None = None) -> Scene:
    """Returns a scene of one to three digits, whose order from left to right is clear."""
    for other in count():
        scene = make_scene(seed, index + other * _OTHER, digits or 1 + index % 3, split)
        if asked.is_ordered(scene.boxes):
            return scene
    raise AssertionError("there is always another scene")


_OTHER = 1_000_003
"""Difference of the indices of scenes of which one is taken: larger than any index."""


def _answers(scene: Scene) -> list[float]:
    """Returns the answer to each question; -1 where there is none."""
    found = (asked.answer(question, scene.boxes)[0] for question in asked.QUESTIONS)
    return [-1.0 if one is None else float(one) for one in found]


def _answers_right(outputs: np.ndarray, truths: np.ndarray) -> dict[str, float]:
    """Returns the shares of the questions that are answered right, of all and of the number of sevens."""
    right, there = outputs == truths, truths >= 0
    return {"right": float(right[there].mean()), "sevens": float(right[:, -1].mean())}


def _caption(scene: Scene) -> list[float]:
    """Returns the digits from left to right, and the end of the caption for those that are missing."""
    words = [float(box.label) for box in asked.in_order(scene.boxes)]
    return [*words, *[float(asked.END)] * (asked.MOST_WORDS + 1 - len(words))]


def _captions_right(outputs: np.ndarray, truths: np.ndarray) -> dict[str, float]:
    """Returns the share of the captions that are right, and that of the words in their places, ends included."""
    right = outputs == truths
    return {"right": float(right.all(axis=1).mean()), "words": float(right.mean())}


ONE_DIGIT = Task(
    question="which digit is it?",
    scene=_one_digit,
    truth=_present,
    figures=_classes_right,
    told="{right:.2%} of the scenes right",
    least=0.95,
)
DIGITS_PRESENT = Task(
    question="which digits are in the scene?",
    scene=_some_digits,
    truth=_present,
    figures=_labels_right,
    told="{right:.2%} of the scenes right in all ten labels, {labels:.2%} of the labels",
    least=0.9,
)
SEVEN_PRESENT = Task(
    question="is there a seven?",
    scene=_with_or_without_seven,
    truth=_seven,
    figures=_labels_right,
    told="{right:.2%} of the scenes right",
    least=0.95,
)
SUM_AND_SIZE = Task(
    question="what do the digits add up to, and how large is the largest?",
    scene=_of_many_sizes,
    truth=_numbers,
    figures=_numbers_right,
    told="mean error {sum_error:.2f} of the sum and {size_error_px:.2f} px of the size; of each number at least "
    "{explained:.1%} of the variance explained",
    least=0.9,
)
WHAT_IS_SAID = Task(
    question="which texts are true of the scene?",
    scene=_said_of,
    truth=lambda scene: truths(scene.boxes),
    figures=_texts_right,
    told="{found:.2%} of the true texts more similar than every false one of 370, {one_digit:.2%} of those of one "
    "digit among the 10; the most similar text is true of {nearest:.2%} of the scenes",
    least=0.8,
    answers=_similarity,
)
PLACES = Task(
    question="what is each place: background, or which digit?",
    scene=_some_digits,
    truth=_owners,
    figures=_places_right,
    told="mean intersection over union {iou:.1%}, {places:.2%} of the places right",
    least=0.85,
)
DIGITS_FOUND = Task(
    question="where is which digit?",
    scene=_some_digits,
    truth=_boxes,
    figures=_digits_found,
    told="AP50 {ap50:.1%}; with a score of 0.5 recall {recall:.1%} and precision {precision:.1%}",
    least=0.9,
    answers=_detections,
)
WHAT_IS_ASKED = Task(
    question="which digit is left, right, top or bottom, and how many sevens are there?",
    scene=_some_sevens,
    truth=_answers,
    figures=_answers_right,
    told="{right:.2%} of the questions answered right, {sevens:.2%} of those for the number of sevens",
    least=0.95,
    answers=asked.answered,
)
WHAT_IS_WRITTEN = Task(
    question="which digits are there, from left to right?",
    scene=side_by_side,
    truth=_caption,
    figures=_captions_right,
    told="{right:.2%} of the captions right, {words:.2%} of the words",
    least=0.9,
    answers=asked.written,
)

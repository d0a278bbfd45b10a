"""Says which targets a model takes, by the kind of its outputs, and holds a target against a model.

Every door comes through `fitted_target`, so that all refuse the same targets with the same words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from camserve.errors import InvalidOption, Unsupported
from camserve.types.model import OF_VECTORS, ModelInfo, Outputs
from camserve.types.targets import (
    EXAMPLES,
    Against,
    AnyTarget,
    BoxTarget,
    Contrast,
    Detection,
    Finer,
    OfClasses,
    Region,
    Target,
    Text,
    Value,
    Vector,
)
from camserve.wording import shown

_GIVES = {
    "softmax": "classes",
    "sigmoid": "classes",
    "binary": "two classes",
    "probabilities": "classes",
    "value": "numbers",
    "embedding": "vectors",
    "text-image": "vectors",
    "segmentation": "classes of places",
    "boxes": "boxes",
    "answers": "answers",
    "tokens": "words",
}
"""Words for what a model of each kind of outputs gives."""

_CLASS = {
    "embedding": "What makes the image similar to a packed reference.",
    "text-image": "What makes the image fit a packed prompt.",
    "segmentation": "What speaks for a class where the image is of it.",
    "boxes": "What the best detection of a class is made of, or with top3 the three best detections.",
    "answers": "What speaks for an answer.",
    "tokens": "What speaks for a word as the next one after the caption so far.",
}
"""Description of the target "class" by kind of outputs, where it is no class."""

_WITHOUT_CLASS: Mapping[Outputs, tuple[str, ...]] = {
    "embedding": ("vector", "reference"),
    "text-image": ("text", "vector", "reference"),
}
"""Targets that need no class, by kind of outputs."""

_TEXT = {"answers": "What speaks for an answer.", "tokens": "What speaks for words after the caption so far."}
"""Description of the target "text" by kind of outputs, where it is a text that the model itself may give."""

_BEHIND_CLASS: Mapping[Outputs, tuple[str, ...]] = {
    "segmentation": ("region",),
    "answers": ("text",),
    "tokens": ("text", "word"),
}
"""Targets that a model with classes takes beside those of classes, by kind of outputs."""

_FEWEST = {"contrast": 2, "finer": 2}
"""Number of classes that a model must have for a target, where it is more than one."""


_NONE_PACKED: Mapping[Outputs, str] = {
    "embedding": "no references are packed with it",
    "text-image": "no prompts are packed with it",
}
"""Says what a model of vectors does not have where it has no labels."""


@dataclass(frozen=True)
class TargetForm:
    """Describes a kind of target that a model takes."""

    name: str
    """Name of the target's field in the proto; index, label and top_k go by the name "class"."""
    description: str
    example: str
    """Text form of one that the model takes. The command line alone reads the file of a vector, reference or mask."""


def target_forms(model: ModelInfo) -> tuple[TargetForm, ...]:
    """Returns the kinds of targets that a model takes, each with an example in the model's own labels."""
    first, second = (Target(index=index) for index in range(2))
    number = Value(first).text(model.labels)
    forms = {
        "class": TargetForm("class", _CLASS.get(model.outputs, "What speaks for a class."), first.text(model.labels)),
        "contrast": TargetForm(
            "contrast", "Why a class and not others.", Contrast(first, (second,)).text(model.labels)
        ),
        "finer": TargetForm(
            "finer", "What tells a class from those whose scores are nearest.", Finer(first).text(model.labels)
        ),
        "against": TargetForm("against", "What speaks against a class.", Against(first).text(model.labels)),
        "value": TargetForm("value", "What makes a number go up, or with down: go down.", number),
        "vector": TargetForm(
            "vector", f"What makes the image similar to a vector of {model.dimension} numbers.", "vector:face.npy"
        ),
        "box": TargetForm(
            "box",
            "What makes the model detect something like a box, in pixels of the sent image, of a class or of any.",
            BoxTarget((10, 20, 90, 80), first).text(model.labels),
        ),
        "detection": TargetForm(
            "detection", "What a detection is made of, by its number among the predictions.", Detection(0).text()
        ),
        "reference": TargetForm("reference", "What makes the image similar to another image.", "reference:face.jpg"),
        "text": TargetForm("text", _TEXT.get(model.outputs, "What makes the image fit a text."), _a_text(model)),
        "word": TargetForm("word", "What speaks for one word of the model's own caption, or a given one.", "word:1"),
        "region": TargetForm(
            "region",
            "What speaks for a class, or for one of the other forms, inside a box or a mask of the sent image.",
            Region(first, box=(10, 20, 90, 80)).text(model.labels),
        ),
    }
    return tuple(forms[name] for name in _taken(model))


def _a_text(model: ModelInfo) -> str:
    """Returns the text form of words that the model knows: the name of its first prompt, mostly the prompt."""
    return Text(model.labels[0]).text() if model.labels else EXAMPLES["text"]


def _taken(model: ModelInfo) -> tuple[str, ...]:
    if model.outputs == "value":
        return ("value",)
    if model.outputs == "boxes":
        return ("class", "detection", "box")
    names = ("class", "contrast", "finer", "against")  # of vectors, a class is a packed reference, or prompt
    classes = tuple(name for name in names if len(model.labels) >= _FEWEST.get(name, 1))
    return (*_WITHOUT_CLASS.get(model.outputs, ()), *classes, *_BEHIND_CLASS.get(model.outputs, ()))


def fitted_target(target: AnyTarget, model: ModelInfo) -> AnyTarget:
    """Returns a target that the model takes, resolved.

    A class of a model that gives numbers is the number going up, one of a model that gives classes of places is the
    region that is of it, and the text of an answer is that answer.

    Raises:
        Unsupported: the model's outputs have no such target. The text says what it takes, with examples.
        InvalidOption: a class does not exist, or there are more or fewer numbers in it than the model's vectors, or its
            classes, have. The text of one that looks like a form says what the model takes.
    """
    if model.outputs == "value" and isinstance(target, Target) and target.top_k is None:
        target = Value(target)
    if model.outputs == "segmentation" and isinstance(target, OfClasses):
        target = Region(target)
    if model.outputs == "boxes" and isinstance(target, Target):
        target = Detection(of=target)
    if model.outputs == "answers" and isinstance(target, Text):
        target = Target(label=target.words)
    if _name(target) not in _taken(model):
        raise Unsupported(
            f"this model gives {_GIVES[model.outputs]}, and its targets are {_forms(model)}; got {shown(target.text())}"
        )
    if isinstance(target, Vector) and target.values is not None and len(target.values) != model.dimension:
        raise InvalidOption(f"a vector of this model has {model.dimension} numbers, got {len(target.values)}")
    if isinstance(target, BoxTarget) and target.probabilities and len(target.probabilities) != len(model.labels):
        count = len(target.probabilities)
        raise InvalidOption(f"a box has the probabilities of all {len(model.labels)} classes, got {count}")
    try:
        return target.resolved(model.labels)
    except InvalidOption as error:
        raise InvalidOption(f"{error}{_hint(target, model)}") from None


def _hint(target: AnyTarget, model: ModelInfo) -> str:
    """Returns what an unknown label in a target may have been meant as."""
    if any(":" in each.label for each in target.classes if each.label is not None):
        return f"; the targets of this model are {_forms(model)}"
    if isinstance(target, Target) and target.label is not None and "text" in _taken(model):
        return f"; any other text is {shown('text:' + target.label)}"
    return ""


def _forms(model: ModelInfo) -> str:
    return ", ".join(f"{form.name} ({form.example!r})" for form in target_forms(model))


def default_target(model: ModelInfo) -> AnyTarget:
    """Returns what a request without targets explains: the most probable class, or the first number going up.

    Raises:
        InvalidOption: the model gives vectors, and has no packed references: it must be said what to be similar to.
    """
    if model.outputs == "value":
        return Value(Target(index=0))
    if "class" in _taken(model):
        return fitted_target(Target(top_k=1), model)
    raise InvalidOption(
        f"this model gives vectors, and {_NONE_PACKED[model.outputs]}: say what to be similar to, by {_forms(model)}"
    )


def check_predicts(model: ModelInfo) -> None:
    """Raises Unsupported where a model has no predictions: it gives vectors, and none are packed to compare them to."""
    if model.outputs in OF_VECTORS and not model.labels:
        option = "prompts" if model.outputs == "text-image" else "references"
        raise Unsupported(
            f"model {model.name} gives vectors and has no predictions, since {_NONE_PACKED[model.outputs]} to "
            f"compare them to (`camserve archive --{option}`)"
        )


def sample_target(model: ModelInfo) -> AnyTarget:
    """Returns some target that the model takes, for looks at its workers."""
    if model.outputs in OF_VECTORS and not model.labels:
        return Vector(np.ones(model.dimension, np.float32))
    return default_target(model)


def _name(target: AnyTarget) -> str:
    match target:
        case Target():
            return "class"
        case BoxTarget():
            return "box"
        case Detection():
            return "detection" if target.of is None else "class"
        case Vector():
            return "vector" if target.image is None else "reference"
        case Region():
            return "region" if target.is_placed else _name(target.of)
        case _:
            return type(target).__name__.lower()

"""Defines what a map can be a map of, and the text form of each: written and read here alone.

A target names classes, or numbers of a network that gives numbers, or a vector, or a text. `Target` is a class; most
others hold class targets inside. All are values: two that say the same are equal and have the same hash.

=====================================  ==============================================================================
text form                              target
=====================================  ==============================================================================
`tabby`, `281`, `top3`                 `Target`: a class by its label or index, or the three most probable ones
`contrast:tabby>lynx,tiger cat`        `Contrast`: why a class and not others; `tabby>0.6*lynx` has gamma 0.6
`finer:tabby`                          `Finer`: the contrast with the classes whose scores are nearest
`against:tabby`                        `Against`: what speaks against a class
`up:age`, `down:age`                   `Value`: a number going up, or down
`text:a seven left of a two`           `Text`: words; all that follows the colon belongs to them
`region:10,20,90,80:cat`               `Region`: a class, or any of the first four forms, inside a box; x right, y down
`box:10,20,90,80:cat`                  `BoxTarget`: a detection like this box, of a class or of any; x right, y down
`detection:0`                          `Detection`: a detection by its number among the predictions, from 0
`word:2`, `word:2:seven two`           `Word`: the second word of the network's own caption, or of a given one
=====================================  ==============================================================================

A label that looks like one of these is named by its index, or with `Target(label=...)`. A vector has no text form.
"""

from __future__ import annotations

import hashlib
import math
import operator
import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Self, cast, get_args

import numpy as np

from camserve.errors import InvalidOption
from camserve.labels import resolve_label
from camserve.wording import shown

if TYPE_CHECKING:
    from camserve.images import ImageLike
    from camserve.types.model import InputView

MAX_GAMMA = 10.0
"""Largest weight of the classes that a class is held against."""

MAX_WORD = 4096
"""Largest number of a word of a caption."""

MAX_NEAREST = 100
"""Largest number of nearest classes that `Finer` takes."""

Direction = Literal["up", "down"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)


@dataclass(frozen=True)
class Target:
    """Names the class to explain, or the `top_k` most probable ones.

    Raises:
        InvalidOption: on construction, when not exactly one of the three is given, one has another type, or `top_k` is
            below 1.
    """

    index: int | None = None
    label: str | None = None
    top_k: int | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.index, self.label, self.top_k) if value is not None]
        if len(given) != 1:
            raise InvalidOption(f"a target is an index, a label or top_k: exactly one, got {len(given)}")
        if self.label is not None and not isinstance(self.label, str):
            raise InvalidOption(f"a label is a text, got {shown(self.label)}")
        for name in ("index", "top_k"):
            object.__setattr__(self, name, _whole_or_none(name, getattr(self, name)))
        if self.top_k is not None and self.top_k < 1:
            raise InvalidOption(f"top_k must be at least 1, got {shown(self.top_k)}")

    @property
    def classes(self) -> tuple[Target, ...]:
        """The class targets inside, the class explained first."""
        return (self,)

    @property
    def maps(self) -> int:
        """Number of maps that the target stands for."""
        return self.top_k or 1

    def resolved(self, labels: Sequence[str]) -> Target:
        """Returns the target with its label, if it has one, replaced by the index; an index is checked.

        Raises:
            InvalidOption: unknown or ambiguous label, or index or top_k out of range.
        """
        if self.label is not None:
            return Target(index=resolve_label(self.label, labels))
        what, number, low = ("class index", self.index, 0) if self.top_k is None else ("top_k", self.top_k, 1)
        if not low <= cast("int", number) < low + len(labels):
            raise InvalidOption(f"{what} must be {low}..{low + len(labels) - 1}, got {shown(number)}")
        return self

    def each(self, ranked: Sequence[int]) -> tuple[Target, ...]:
        """Returns a target of one class for each map; `ranked` has class indices, the most probable one first."""
        return (self,) if self.top_k is None else tuple(Target(index=int(index)) for index in ranked[: self.top_k])

    def text(self, labels: Sequence[str] = ()) -> str:
        """Returns the text form, with the label where it can be read back, else with the index."""
        if self.top_k is not None:
            return f"top{self.top_k}"
        if self.index is None:
            return str(self.label)
        label = labels[self.index] if self.index < len(labels) else ""
        return label if _reads_back(label, self, labels) else str(self.index)


@dataclass(frozen=True)
class Contrast:
    """Asks why a class and not others: score(of) - gamma * mean of score(than).

    Raises:
        InvalidOption: on construction, when `than` is empty or has a top_k, or `gamma` is outside of 0..`MAX_GAMMA`.
    """

    of: Target
    than: tuple[Target, ...]
    gamma: float = 1.0

    def __post_init__(self) -> None:
        _check_class("contrast", self.of)
        object.__setattr__(self, "than", _classes("contrast", self.than))
        if not self.than:
            raise InvalidOption(f"contrast holds a class against at least one other, got none: {EXAMPLES['contrast']}")
        for other in self.than:
            _check_class("contrast", other)
            if other.top_k is not None:
                raise InvalidOption(f"contrast holds a class against named ones, got {other.text()}")
        object.__setattr__(self, "gamma", _gamma("contrast", self.gamma))

    @property
    def classes(self) -> tuple[Target, ...]:
        """The class targets inside, the class explained first."""
        return (self.of, *self.than)

    @property
    def maps(self) -> int:
        """Number of maps that the target stands for."""
        return self.of.maps

    def resolved(self, labels: Sequence[str]) -> Contrast:
        """Returns the target with indices for labels, the classes that it is held against in order of their index.

        Raises:
            InvalidOption: a class that does not exist, or a class that is named twice.
        """
        of, than = self.of.resolved(labels), [other.resolved(labels) for other in self.than]
        named = [one.index for one in (of, *than)]
        for index in named:
            if named.count(index) > 1:
                raise InvalidOption(f"contrast names each class once, got {Target(index=index).text(labels)} twice")
        return Contrast(of, tuple(sorted(than, key=operator.attrgetter("index"))), self.gamma)

    def each(self, ranked: Sequence[int]) -> tuple[Contrast, ...]:
        """Returns a target of one class for each map; raises InvalidOption where one is held against itself."""
        found = self.of.each(ranked)
        for of in found:
            if of in self.than:
                raise InvalidOption(
                    f"contrast: class {of.index} is among the {self.of.maps} most probable ones, and would be held "
                    "against itself: name the class to explain"
                )
        return tuple(Contrast(of, self.than, self.gamma) for of in found)

    def text(self, labels: Sequence[str] = ()) -> str:
        """Returns the text form; classes whose labels cannot be read back are named by index."""
        gamma = "" if self.gamma == 1 else f"{self.gamma:g}*"
        return f"contrast:{_in_list(self.of, labels)}>{gamma}{','.join(_in_list(each, labels) for each in self.than)}"


@dataclass(frozen=True)
class _OfOneClass:
    """Holds the class, or the classes by top_k, that a target with nothing else inside is about."""

    of: Target

    @property
    def classes(self) -> tuple[Target, ...]:
        """The class targets inside."""
        return (self.of,)

    @property
    def maps(self) -> int:
        """Number of maps that the target stands for."""
        return self.of.maps

    def resolved(self, labels: Sequence[str]) -> Self:
        """Returns the target with an index for its label; raises as `Target.resolved`."""
        return replace(self, of=self.of.resolved(labels))

    def each(self, ranked: Sequence[int]) -> tuple[Self, ...]:
        """Returns a target of one class for each map."""
        return tuple(replace(self, of=of) for of in self.of.each(ranked))


@dataclass(frozen=True)
class Finer(_OfOneClass):
    """Asks what tells a class from those whose scores are nearest: Finer-CAM (Zhang et al. 2025).

    Its gamma and number of classes are those of the authors' code. The outputs decide which classes these are, so a
    worker turns it into a `Contrast`.

    Raises:
        InvalidOption: on construction, when `gamma` is outside of 0..`MAX_GAMMA` or `nearest` of 1..`MAX_NEAREST`.
    """

    gamma: float = 0.6
    nearest: int = 3
    """Number of classes that it is held against; all others where there are fewer."""

    def __post_init__(self) -> None:
        _check_class("finer", self.of)
        object.__setattr__(self, "gamma", _gamma("finer", self.gamma))
        object.__setattr__(self, "nearest", _whole("finer: nearest", self.nearest))
        if not 1 <= self.nearest <= MAX_NEAREST:
            raise InvalidOption(f"finer: nearest must be 1..{MAX_NEAREST}, got {shown(self.nearest)}")

    def contrast(self, scores: np.ndarray) -> Contrast:
        """Returns the contrast with the classes whose scores are nearest, of equal ones those of lower index.

        Args:
            scores: (K,) scores of all classes, K at least 2; the target has an index.
        """
        assert self.of.index is not None, "a worker knows the class"
        distance = np.abs(scores - scores[self.of.index])
        order = [int(index) for index in distance.argsort(kind="stable") if index != self.of.index]
        return Contrast(self.of, tuple(Target(index=index) for index in sorted(order[: self.nearest])), self.gamma)

    def text(self, labels: Sequence[str] = ()) -> str:
        """Returns the text form, which does not say another gamma or number of classes than the authors'."""
        return f"finer:{self.of.text(labels)}"


@dataclass(frozen=True)
class Against(_OfOneClass):
    """Asks what speaks against a class: the method on the opposite score."""

    def __post_init__(self) -> None:
        _check_class("against", self.of)

    def text(self, labels: Sequence[str] = ()) -> str:
        """Returns the text form."""
        return f"against:{self.of.text(labels)}"


@dataclass(frozen=True)
class Value(_OfOneClass):
    """Asks what makes a number go up, or down, of a network whose outputs are numbers.

    Raises:
        InvalidOption: on construction, when `of` has a top_k, or the direction is unknown.
    """

    direction: Direction = "up"

    def __post_init__(self) -> None:
        _check_class("a value", self.of)
        if self.direction not in DIRECTIONS:
            raise InvalidOption(f"direction must be one of {', '.join(DIRECTIONS)}, got {shown(self.direction)}")
        if self.of.top_k is not None:
            raise InvalidOption(f"a value goes {self.direction} by name or index, got {self.of.text()}")

    def text(self, labels: Sequence[str] = ()) -> str:
        """Returns the text form."""
        return f"{self.direction}:{self.of.text(labels)}"


class _OfNoClass:
    """Gives a target that names no class what follows from that: it is of one map, and there is nothing to resolve."""

    @property
    def classes(self) -> tuple[Target, ...]:
        """No class is inside."""
        return ()

    @property
    def maps(self) -> int:
        """Number of maps that the target stands for."""
        return 1

    def resolved(self, labels: Sequence[str]) -> Self:
        """Returns the target: no label is in it."""
        return self

    def each(self, ranked: Sequence[int]) -> tuple[Self, ...]:
        """Returns the target: it is of one map."""
        return (self,)


@dataclass(frozen=True, eq=False)
class Vector(_OfNoClass):
    """Asks what makes an embedding similar to a vector, or to the embedding of a reference image.

    Args:
        values: (D,) finite numbers, not all zero; they become float32.
        image: the reference image, where there are no values.

    Raises:
        InvalidOption: on construction, when not exactly one of the two is given, or the values are no such numbers.
    """

    values: np.ndarray | None = field(default=None, repr=False)
    image: ImageLike | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if (self.values is None) == (self.image is None):
            raise InvalidOption(f"a vector has values or an image: exactly one, got {2 * (self.image is not None)}")
        if self.values is not None:
            object.__setattr__(self, "values", _vector(self.values))

    @cached_property
    def key(self) -> bytes:
        """Name of the vector by its values, or by its image's content: 16 bytes."""
        if self.image is None:
            return hashlib.blake2b(np.asarray(self.values, "<f4").tobytes(), digest_size=16).digest()
        from camserve.images import digest, read_image  # Pillow stays out of `import camserve`

        return digest(read_image(self.image))

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, Vector) and (self.image is None) == (other.image is None)
        return same and self.key == cast("Vector", other).key

    def __hash__(self) -> int:
        return hash(self.key)

    def text(self, labels: Sequence[str] = ()) -> str:
        """Returns what tells the vector from others; it cannot be read back."""
        return f"{'vector' if self.image is None else 'reference'}:{self.key.hex()[:8]}"


@dataclass(frozen=True)
class Text(_OfNoClass):
    """Asks what makes the image fit a text: a description, an answer or a caption, by the kind of outputs.

    Two texts of the same words are equal, whatever was made of them.

    Args:
        words: the text; spaces around it are taken off.
        values: vector (D,) that a text encoder made of it on a worker; it does not travel.

    Raises:
        InvalidOption: on construction, when the text is none, is empty or cannot be written as UTF-8.
    """

    words: str
    values: np.ndarray | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.words, str):
            raise InvalidOption(f"a text target is a text, got {shown(self.words)}")
        object.__setattr__(self, "words", self.words.strip())
        if not self.words:
            raise InvalidOption(f"a text target has words, such as {EXAMPLES['text']!r}; got an empty text")
        check_utf8(self.words)

    def text(self, labels: Sequence[str] = ()) -> str:
        """Returns the text form."""
        return f"text:{self.words}"


@dataclass(frozen=True)
class Word(_OfNoClass):
    """Asks for one word of a caption, given the words before it, of a network that writes.

    Args:
        at: number of the word, from 1, behind the caption so far; a word is a token of the network's.
        words: the caption's words; "": those that the network itself writes, which a worker fills in.

    Raises:
        InvalidOption: on construction, when `at` is no number from 1, or the words are no text.
    """

    at: int
    words: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "at", _whole("word", self.at))
        if not 1 <= self.at <= MAX_WORD:
            raise InvalidOption(f"the number of a word must be 1..{MAX_WORD}, got {shown(self.at)}")
        if not isinstance(self.words, str):
            raise InvalidOption(f"the words of a caption are a text, got {shown(self.words)}")
        object.__setattr__(self, "words", self.words.strip())
        check_utf8(self.words)

    def text(self, labels: Sequence[str] = ()) -> str:
        """Returns the text form."""
        return f"word:{self.at}" + (f":{self.words}" if self.words else "")


def check_utf8(text: str) -> None:
    """Raises InvalidOption where a text cannot be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can carry
        raise InvalidOption(f"a text is written in UTF-8, which has nothing for {shown(text)}") from None


OfClasses = Target | Contrast | Finer | Against
"""Type of the targets that name classes and nothing else."""

Edges = tuple[float, float, float, float]
"""Edges (x0, y0, x1, y1) of a box in pixels of the sent image, after EXIF orientation; x right, y down."""


@dataclass(frozen=True, eq=False)
class Region:
    """Asks for a class where a network tells the class of every place: the mean of its score over a region.

    The region is a box, or a mask of the sent image, or a mask of the network's outputs. Without any it is where the
    class is the most probable one. What covers a part of a place counts by that part.

    Args:
        of: the class, or what else names classes alone; by default the class that most of the region is.
        box: (x0, y0, x1, y1) in pixels of the sent image, after EXIF orientation.
        mask: of the size of the sent image, after EXIF orientation: the bytes or path of a grey PNG file, a picture, or
            an array (H, W), bool, uint8, or floats in [0, 1]. What is brighter counts more; 0 is outside.
        grid: the same, of the size of the network's outputs.
        shares: by how much each place of the outputs counts, (h, w) float32; a worker makes it of the others.

    Raises:
        InvalidOption: on construction, when there are several regions, `of` is another target, or the box has no area.
        InvalidImage: a mask's file cannot be read, or it is nothing that can be a mask.
    """

    of: OfClasses = field(default_factory=lambda: Target(top_k=1))
    box: Edges | None = None
    mask: bytes | None = field(default=None, repr=False)
    grid: bytes | None = field(default=None, repr=False)
    shares: np.ndarray | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.of, OfClasses):
            raise InvalidOption(f"a region is of a class, or of a contrast, finer or against; got {shown(self.of)}")
        given = [name for name in ("box", "mask", "grid") if getattr(self, name) is not None]
        if len(given) > 1:
            raise InvalidOption(f"a region is a box, a mask or a grid: at most one, got {' and '.join(given)}")
        if self.box is not None:
            object.__setattr__(self, "box", edges("a region's box", self.box))
        for name in ("mask", "grid"):
            if not isinstance(content := getattr(self, name), bytes | None):
                from camserve.images import mask_file  # Pillow stays out of `import camserve`

                object.__setattr__(self, name, mask_file(content))
            if getattr(self, name) == b"":
                raise InvalidOption(f"the {name} of a region is a grey PNG file, got zero bytes")

    @cached_property
    def _key(self) -> tuple[object, ...]:
        file = self.mask or self.grid or b""
        return self.of, self.box, self.mask is None, hashlib.blake2b(file, digest_size=16).digest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Region) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def is_placed(self) -> bool:
        """Tells whether it says where the region is."""
        return any(where is not None for where in (self.box, self.mask, self.grid))

    @property
    def classes(self) -> tuple[Target, ...]:
        """The class targets inside, the class explained first."""
        return self.of.classes

    @property
    def maps(self) -> int:
        """Largest number of maps that the target stands for; there are fewer where fewer classes have a place."""
        return self.of.maps

    def resolved(self, labels: Sequence[str]) -> Region:
        """Returns the target with indices for labels; raises as that inside."""
        return replace(self, of=self.of.resolved(labels))

    def each(self, ranked: Sequence[int]) -> tuple[Region, ...]:
        """Returns a target of one class for each map."""
        return tuple(replace(self, of=of) for of in self.of.each(ranked))

    def text(self, labels: Sequence[str] = ()) -> str:
        """Returns the text form; that of a mask has a name of its content instead, and cannot be read back."""
        of = self.of.text(labels)
        if self.box is None and self.mask is None:
            return of
        content = self.mask or b""
        where = hashlib.blake2b(content, digest_size=4).hexdigest() if self.box is None else _numbers(self.box)
        return f"region:{where}" + ("" if self.of == Target(top_k=1) else f":{of}")


@dataclass(frozen=True)
class BoxTarget:
    """Asks what makes a network detect something like a box: D-RISE's similarity to it.

    Args:
        box: (x0, y0, x1, y1) in pixels of the sent image, after EXIF orientation.
        of: the class that is detected there; None: whatever the class is.
        seen: the same box in pixels of the network's input; a worker makes it of the other.
        probabilities: the probability of each class, in place of 1 for `of`; a worker makes them of a detection that
            tells them.

    Raises:
        InvalidOption: on construction, when the box has no area, `of` is no class alone, or the probabilities are no
            numbers of at least 0 that are not all 0.
    """

    box: Edges
    of: Target | None = None
    seen: Edges | None = field(default=None, repr=False, compare=False)
    probabilities: tuple[float, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "box", edges("a box", self.box))
        if self.of is not None:
            _check_class("a box", self.of)
            if self.of.top_k is not None:
                raise InvalidOption(f"a box is of a class by name or index, got {self.of.text()}")
        object.__setattr__(self, "probabilities", _probabilities("a box", self.probabilities))

    @property
    def classes(self) -> tuple[Target, ...]:
        """The class target inside; none where the class does not matter."""
        return () if self.of is None else (self.of,)

    @property
    def maps(self) -> int:
        """Number of maps that the target stands for."""
        return 1

    def resolved(self, labels: Sequence[str]) -> BoxTarget:
        """Returns the target with an index for its label; raises as `Target.resolved`."""
        return self if self.of is None else replace(self, of=self.of.resolved(labels))

    def each(self, ranked: Sequence[int]) -> tuple[BoxTarget, ...]:
        """Returns the target: it is of one box."""
        return (self,)

    def text(self, labels: Sequence[str] = ()) -> str:
        """Returns the text form."""
        of = "" if self.of is None else f":{self.of.text(labels)}"
        return f"box:{_numbers(self.box)}{of}"


@dataclass(frozen=True)
class Detection:
    """Names a detection by its number among the predictions, or the best one of a class, or the `top_k` best ones.

    A worker makes the `BoxTarget` of it that the detection is. Where an image has no detection at all the target stays
    as it is, and its map is empty.

    Raises:
        InvalidOption: on construction, when not exactly one of the two is given, or the number is below 0.
    """

    index: int | None = None
    of: Target | None = None
    view: InputView | None = field(default=None, repr=False, compare=False)
    """Part of the sent image that the network sees; a worker fills it in."""

    def __post_init__(self) -> None:
        if (self.index is None) == (self.of is None):
            raise InvalidOption("a detection is named by its number or by a class: exactly one")
        object.__setattr__(self, "index", _whole_or_none("a detection's number", self.index))
        if self.index is not None and self.index < 0:
            raise InvalidOption(f"detections are numbered from 0, got {shown(self.index)}")
        if self.of is not None:
            _check_class("a detection", self.of)

    @property
    def classes(self) -> tuple[Target, ...]:
        """The class target inside; none for a number."""
        return () if self.of is None else (self.of,)

    @property
    def maps(self) -> int:
        """Largest number of maps that the target stands for; there are fewer where there are fewer detections."""
        return 1 if self.of is None else self.of.maps

    def resolved(self, labels: Sequence[str]) -> Detection:
        """Returns the target with an index for its label; raises as `Target.resolved`.

        There may be more detections than classes, so that `top_k` is not held against their number.
        """
        return self if self.of is None or self.of.top_k is not None else replace(self, of=self.of.resolved(labels))

    def each(self, ranked: Sequence[int]) -> tuple[Detection, ...]:
        """Returns the target: classes alone do not tell which detections there are."""
        return (self,)

    def text(self, labels: Sequence[str] = ()) -> str:
        """Returns the text form."""
        return f"detection:{self.index}" if self.of is None else self.of.text(labels)


def edges(what: str, values: Any) -> Edges:
    """Returns the edges of a box in pixels as floats.

    Raises:
        InvalidOption: they are no four finite numbers, or enclose nothing.
    """
    try:
        found = tuple(map(_number, values))
    except TypeError:  # a number alone
        found = ()
    if len(found) != 4 or any(each is None or not math.isfinite(each) for each in found):
        raise InvalidOption(f"{what} is four numbers x0, y0, x1, y1 in pixels of the sent image, got {shown(values)}")
    x0, y0, x1, y1 = cast("Edges", found)
    if not (x0 < x1 and y0 < y1):
        raise InvalidOption(f"{what} has x0 < x1 and y0 < y1, got {_numbers((x0, y0, x1, y1))}")
    return x0, y0, x1, y1


def _probabilities(what: str, values: Any) -> tuple[float, ...]:
    try:
        found = tuple(map(_number, values))
    except TypeError:  # a number alone
        found = (None,)
    fit = all(each is not None and 0 <= each < math.inf for each in found)  # NaN fails as well
    if found and not (fit and any(found)):
        raise InvalidOption(f"{what} has probabilities of at least 0, not all 0; got {shown(values)}")
    return cast("tuple[float, ...]", found)


def _numbers(box: Edges) -> str:
    return ",".join(f"{edge:.10g}" for edge in box)


AnyTarget = Target | Contrast | Finer | Against | Value | Vector | Text | Region | BoxTarget | Detection | Word
"""Type of everything that a map can be a map of."""

TargetLike = AnyTarget | int | str
"""Type of what callers may pass as a target: a class index, a text form, or one of the targets."""

EXAMPLES = {
    "class": "tabby",
    "contrast": "contrast:tabby>lynx",
    "finer": "finer:tabby",
    "against": "against:tabby",
    "up": "up:age",
    "down": "down:age",
    "text": "text:a seven left of a two",
    "region": "region:10,20,90,80:cat",
    "box": "box:10,20,90,80:cat",
    "detection": "detection:0",
    "word": "word:2:seven two",
}
"""An example of each text form, by the word that it begins with."""


def is_final(target: AnyTarget) -> bool:
    """Returns whether the target is of one map and a worker answers with just this one: by index, values or words."""
    if isinstance(target, Vector):
        return target.image is None
    if isinstance(target, Region):
        return target.is_placed and is_final(target.of)
    if isinstance(target, Word):
        return bool(target.words)
    return not isinstance(target, Finer) and all(one.index is not None for one in target.classes)


def network_made(target: AnyTarget) -> Hashable | None:
    """Returns the name of what a network is asked to make something of before it is asked the target; None: nothing.

    That is a reference image, by its content, or a text.
    """
    match target:
        case Vector() if target.image is not None:
            return target.key
        case Text():
            return target.words
        case _:
            return None


def final_targets(targets: Iterable[AnyTarget], ranked: Sequence[int], scores: np.ndarray) -> tuple[AnyTarget, ...]:
    """Returns what a worker explains: for each map one target, each once, in the order asked.

    Args:
        targets: resolved targets; reference images are vectors already.
        ranked: class indices, the most probable one first.
        scores: (K,) scores of all classes, of which `Finer` takes the nearest.

    Raises:
        InvalidOption: a class would be held against itself.
    """
    found = [one for target in targets for one in target.each(ranked)]
    return tuple(dict.fromkeys(with_nearest(one, scores) for one in found))


def with_nearest(target: AnyTarget, scores: np.ndarray) -> AnyTarget:
    """Returns the target, for `Finer` the contrast with the classes whose scores (K,) are nearest."""
    if isinstance(target, Region):
        return replace(target, of=cast("OfClasses", with_nearest(target.of, scores)))
    return target.contrast(scores) if isinstance(target, Finer) else target


def as_target(value: TargetLike) -> AnyTarget:
    """Returns the target that a class index, a text form or a target stands for.

    Raises:
        InvalidOption: it is none of these, or a text that begins like a form and does not go on like it.
    """
    if isinstance(value, AnyTarget):
        return value
    if isinstance(value, str):
        return parse_target(value)
    try:
        return Target(index=_whole("index", value))
    except InvalidOption:
        raise InvalidOption(
            f"a target is a class index, a text such as {', '.join(map(repr, EXAMPLES.values()))} or 'top3', or a "
            f"target of camserve.types; got {shown(value)}"
        ) from None


def parse_target(text: str) -> AnyTarget:
    """Returns the target of a text form; what looks like none is a label.

    Raises:
        InvalidOption: the text begins like a form and does not go on like it.
    """
    word, colon, rest = text.partition(":")
    if not colon or word not in _FORMS:
        return parse_class(text)
    if not rest.strip():
        raise InvalidOption(f"{word}: what of? For example {EXAMPLES.get(word, word)!r}, got {shown(text)}")
    return cast("AnyTarget", _FORMS[word](rest))


def parse_class(text: str) -> Target:
    """Returns the class of a text: `281` an index, `top3` the three most probable classes, all else a label."""
    text = text.strip()
    if re.fullmatch(r"\d{1,18}", text, re.ASCII):
        return Target(index=int(text))
    top = re.fullmatch(r"top(\d{1,18})", text, re.ASCII)
    return Target(top_k=int(top[1])) if top else Target(label=text)


def _parse_contrast(rest: str) -> Contrast:
    of, more, others = rest.partition(">")
    if not (of.strip() and more and others.strip()):
        raise InvalidOption(
            f"contrast holds a class against others, such as {EXAMPLES['contrast']!r}, got {shown('contrast:' + rest)}"
        )
    gamma, times, than = others.partition("*")
    if not times or (number := _number(gamma)) is None:
        number, than = 1.0, others
    return Contrast(parse_class(of), tuple(parse_class(each) for each in than.split(",")), number)


def _parse_region(rest: str) -> Region:
    where, _, of = rest.partition(":")
    numbers = where.split(",")
    if len(numbers) != 4 or any(_number(each) is None for each in numbers):
        raise InvalidOption(
            f"region is x0,y0,x1,y1 in pixels of the sent image and perhaps a class, such as {EXAMPLES['region']!r}, "
            f"got {shown('region:' + rest)}; the file of a mask is read by the command line alone"
        )
    inside = parse_target(of) if of.strip() else Target(top_k=1)
    return Region(cast("OfClasses", inside), cast("Edges", tuple(numbers)))


def _parse_box(rest: str) -> BoxTarget:
    where, colon, of = rest.partition(":")
    numbers = where.split(",")
    if len(numbers) != 4 or any(_number(each) is None for each in numbers) or (colon and not of.strip()):
        raise InvalidOption(
            f"box is x0,y0,x1,y1 in pixels of the sent image and perhaps a class, such as {EXAMPLES['box']!r}, "
            f"got {shown('box:' + rest)}"
        )
    return BoxTarget(cast("Edges", tuple(numbers)), parse_class(of) if colon else None)


def _parse_detection(rest: str) -> Detection:
    if not re.fullmatch(r"\d{1,9}", rest.strip(), re.ASCII):
        raise InvalidOption(
            f"detection is a number among the predictions, such as {EXAMPLES['detection']!r}, "
            f"got {shown('detection:' + rest)}"
        )
    return Detection(int(rest))


def _parse_word(rest: str) -> Word:
    at, _, words = rest.partition(":")
    if not re.fullmatch(r"\s*\d{1,18}\s*", at, re.ASCII):
        raise InvalidOption(f"word: which one? For example {EXAMPLES['word']!r}, got {shown('word:' + rest)}")
    return Word(int(at), words)


def _no_text(kind: str) -> Any:
    def refuse(rest: str) -> AnyTarget:
        raise InvalidOption(f"a {kind} has no text form: give its {'numbers' if kind == 'vector' else 'image'}")

    return refuse


_FORMS = {
    "contrast": _parse_contrast,
    "finer": lambda rest: Finer(parse_class(rest)),
    "against": lambda rest: Against(parse_class(rest)),
    "up": lambda rest: Value(parse_class(rest), "up"),
    "down": lambda rest: Value(parse_class(rest), "down"),
    "vector": _no_text("vector"),
    "reference": _no_text("reference"),
    "text": Text,
    "region": _parse_region,
    "box": _parse_box,
    "word": _parse_word,
    "detection": _parse_detection,
}

_ONE = re.compile(
    r"\s*(?:(?:region|box):(?:[^,:]*,){3}[^,:]*(?::|(?=,)|$))?(?:\s*(?:contrast|text):.*|word:[^,:]*:.*|[^,]*)",
    re.DOTALL,
)
"""Matches a text form in a list: commas are part of a box, of a contrast and of words."""


def split_targets(text: str) -> list[str]:
    """Returns the text forms in a list of them, such as `281,tabby;contrast:tabby>lynx,tiger cat;top3`.

    Semicolons separate them, and so do commas but for those behind `contrast:`, which separate its classes, those
    behind `text:`, which belong to the text, and those between the four numbers behind `region:` or `box:`. So a text
    with a semicolon cannot stand in such a list.
    """
    found: list[str] = []
    for part in text.split(";"):
        at = 0
        while at <= len(part):
            one = _ONE.match(part, at)
            assert one is not None, "it matches nothing as well"
            found.append(one[0])
            at = one.end() + 1  # behind the comma
    return [each.strip() for each in found if each.strip()]


def class_texts(text: str) -> list[str]:
    """Returns the parts of a text form that name classes; they can be counted and measured before the text is read."""
    word, rest = _form(text)
    if not word:
        return [text]
    if word == "region":
        return class_texts(rest.partition(":")[2])
    if word == "box":
        of = rest.partition(":")[2]
        return [of] if of else []
    return {"contrast": re.split("[>,]", rest), "text": [], "word": [], "detection": []}.get(word, [rest])


def free_texts(text: str) -> list[str]:
    """Returns the part of a text form that is words of a `Text`; it can be measured before the text is read."""
    word, rest = _form(text)
    return [rest] if word in ("text", "word") else []


def words_in(target: AnyTarget) -> tuple[str, ...]:
    """Returns the free text inside of a target."""
    return (target.words,) if isinstance(target, Text | Word) else ()


def mask_of(target: AnyTarget) -> bytes | None:
    """Returns the file of the mask inside of a target; None where there is none."""
    if not isinstance(target, Region):
        return None
    return target.grid if target.mask is None else target.mask


def may_be_fewer(target: AnyTarget) -> bool:
    """Tells whether a target may stand for fewer maps than it asks for.

    Fewer classes may have a place in an image, and it may have fewer detections.
    """
    may = isinstance(target, Detection) or (isinstance(target, Region) and not target.is_placed)
    return may and target.maps > 1


def is_settled(target: AnyTarget) -> bool:
    """Tells whether the target is of one map that no other final target is of; two detections may be the same."""
    return is_final(target) and not isinstance(target, Detection)


def _form(text: str) -> tuple[str, str]:
    """Returns the word that a text form begins with and the rest, or "" and the text where it begins with none."""
    word, colon, rest = text.partition(":")
    return (word.strip(), rest) if colon and word.strip() in _FORMS else ("", text)


def _in_list(target: Target, labels: Sequence[str]) -> str:
    """Returns the text of a class among others, where a label with a separator cannot stand."""
    text = target.text(labels)
    return str(target.index) if target.index is not None and re.search(r"[>,;*]", text) else text


def _reads_back(label: str, target: Target, labels: Sequence[str]) -> bool:
    word, colon, _ = label.partition(":")
    if not label or (colon and word in _FORMS) or parse_class(label).label != label:
        return False
    try:
        return resolve_label(label, labels) == target.index
    except InvalidOption:  # several classes share the label
        return False


def _check_class(what: str, value: object) -> None:
    if not isinstance(value, Target):
        raise InvalidOption(f"{what} is of a class, a Target; got {shown(value)}")


def _classes(what: str, values: Any) -> tuple[Target, ...]:
    if isinstance(values, Target):
        return (values,)
    try:
        return tuple(values)
    except TypeError:
        raise InvalidOption(f"{what} holds a class against Targets, got {shown(values)}") from None


def _gamma(what: str, value: Any) -> float:
    number = _number(value)
    if number is None or not 0 <= number <= MAX_GAMMA:  # NaN fails as well
        raise InvalidOption(f"{what}: gamma must be 0..{MAX_GAMMA:g}, got {shown(value)}")
    return number


def _number(value: Any) -> float | None:
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _whole_or_none(name: str, value: Any) -> int | None:
    return None if value is None else _whole(name, value)


def _whole(name: str, value: Any) -> int:
    """Returns a whole number as int, numpy's included."""
    try:
        return operator.index(None if isinstance(value, bool) else value)  # type: ignore[arg-type]  # None raises
    except TypeError:
        raise InvalidOption(f"{name} must be a whole number, got {shown(value)}") from None


def _vector(values: Any) -> np.ndarray:
    try:
        with np.errstate(over="ignore"):  # what is beyond float32 is infinite, and refused below
            found = np.array(values, np.float32)
    except (TypeError, ValueError, OverflowError):
        raise InvalidOption(f"a vector has numbers, got {shown(values)}") from None
    if found.ndim != 1 or not found.size:
        raise InvalidOption(f"a vector has the shape [dimension], got {list(found.shape)}")
    if not np.isfinite(found).all():
        raise InvalidOption(f"a vector has finite numbers, got {shown(found[~np.isfinite(found)][0].item())}")
    if not found.any():
        raise InvalidOption("a vector must not be all zeros: nothing is similar to it")
    found.setflags(write=False)
    return found

"""Holds the two towers of digit scenes: one makes a vector of a scene, the other of a text such as "a three".

The cosine between the two says how well the text fits. What can be said: "a three", and of two digits "a seven left of
a two", with left of, right of, above or below.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations

import torch
from torch import Tensor, nn
from torch.nn import functional

from camserve.errors import InvalidOption
from camserve.evaluation.truth import TrueBox
from camserve.wording import shown

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
"""Words for the digits, by digit."""
RELATIONS = ("left of", "right of", "above", "below")
WORDS = ("a", "an", *NAMES, "left", "right", "of", "above", "below")
"""Words that a text may have; the token of each is its index plus 1, and 0 stands behind the end of a text."""
MAX_LENGTH = 6
"""Number of words of the longest text, "a seven left of a two"."""
APART_PX = 10.0
"""Least distance between the centres of two digits, in the direction of a relation, at which it counts as true."""

_WIDTHS = ((3, 16, 2), (16, 24, 2), (24, 32, 2), (32, 32, 1), (32, 32, 1))
"""Channels in, channels out and stride of each convolution: the layers of `DigitsNet`, narrower."""
_VECTOR, _WORD = 32, 16


def text_of(digit: int) -> str:
    """Returns "a three", "an eight"."""
    return f"{'an' if NAMES[digit] == 'eight' else 'a'} {NAMES[digit]}"


PROMPTS = tuple(map(text_of, range(10)))
"""Texts of one digit each, by digit."""
_PAIRS = tuple((first, relation, second) for relation in RELATIONS for first, second in permutations(range(10), 2))
TEXTS = (*PROMPTS, *(f"{PROMPTS[first]} {relation} {PROMPTS[second]}" for first, relation, second in _PAIRS))
"""All texts that can be said: of one digit, then of two."""


def digits_in(text: str) -> tuple[int, ...]:
    """Returns the digits that a text names, in its order."""
    return tuple(NAMES.index(word) for word in text.split() if word in NAMES)


def truths(boxes: Sequence[TrueBox]) -> list[float]:
    """Returns for each of `TEXTS` 1 where it is true of digits with these boxes, 0 where not, 0.5 where it is close."""
    there = {int(box.label): box for box in boxes}
    of_two = (
        _relation(there[first], relation, there[second]) if first in there and second in there else 0.0
        for first, relation, second in _PAIRS
    )
    return [*(float(digit in there) for digit in range(10)), *of_two]


def _relation(first: TrueBox, relation: str, second: TrueBox) -> float:
    if relation in ("right of", "below"):
        first, second = second, first
    if relation in ("left of", "right of"):
        ahead = (second.left + second.right - first.left - first.right) / 2
    else:
        ahead = (second.top + second.bottom - first.top - first.bottom) / 2
    return 0.5 if abs(ahead) < APART_PX else float(ahead > 0)


class TextTower(nn.Module):
    """Makes vectors (n, 32) of texts: word vectors, read by a recurrent layer in the order of the words."""

    max_length = MAX_LENGTH

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(len(WORDS) + 1, _WORD, padding_idx=0)
        self.reader = nn.GRU(_WORD, _VECTOR, batch_first=True)
        self.head = nn.Linear(_VECTOR, _VECTOR)
        self.log_scale = nn.Parameter(torch.tensor(3.0))

    @property
    def scale(self) -> float:
        """Factor of the cosines before a softmax over texts."""
        return math.exp(self.log_scale)

    def tokens(self, text: str) -> Sequence[int]:
        """Returns the token of each word; raises InvalidOption where a word is not known."""
        words = text.lower().split()
        for word in words:
            if word not in WORDS:
                raise InvalidOption(f"the words of this model are {', '.join(WORDS)}; got {shown(word)}")
        return [WORDS.index(word) + 1 for word in words]

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Returns a vector for each text, (n, 32)."""
        tokens = torch.zeros(len(texts), MAX_LENGTH, dtype=torch.long)
        for row, text in zip(tokens, texts, strict=True):
            found = self.tokens(text)
            row[: len(found)] = torch.tensor(found)
        vectors: Tensor = self(tokens.to(self.words.weight.device))
        return vectors

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns the vectors of tokens (n, 6): what the recurrent layer holds after the last word of each."""
        states = self.reader(self.words(tokens))[0]
        last = (tokens != 0).sum(dim=1).clamp(min=1) - 1
        vectors: Tensor = self.head(states[torch.arange(len(tokens), device=tokens.device), last])
        return vectors


class TextImageNet(nn.Module):
    """Makes vectors (n, 32) of scenes (n, 3, 96, 96), from 32 maps of 12 x 12 cells; beside it stands a `TextTower`.

    Each map is pooled three times: its mean, and its means weighted by how far right and how far down a cell is. So the
    vector of "a seven left of a two" can be a sum of what is there and of where it is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(*(_block(*widths) for widths in _WIDTHS))
        self.head = nn.Linear(3 * _WIDTHS[-1][1], _VECTOR)
        self.text_encoder = TextTower()

    def forward(self, x: Tensor) -> Tensor:
        """Returns the vectors."""
        maps = self.features(x)
        across, down = (torch.linspace(-1, 1, size, dtype=maps.dtype, device=maps.device) for size in maps.shape[:1:-1])
        pooled = [maps.mean(dim=(2, 3)), (maps * across).mean(dim=(2, 3)), (maps * down[:, None]).mean(dim=(2, 3))]
        vectors: Tensor = self.head(torch.cat(pooled, dim=1))
        return vectors

    def similarity(self, x: Tensor, texts: Sequence[str]) -> Tensor:
        """Returns the cosine (n, texts) of each scene (n, 3, 96, 96) to each text."""
        images, said = (functional.normalize(each, dim=1) for each in (self(x), self.text_encoder.encode(texts)))
        cosines: Tensor = images @ said.T
        return cosines


def _block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())

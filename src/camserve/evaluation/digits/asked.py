"""Holds the networks of digit scenes that take a text beside the scene: one answers a question, one writes a caption.

The questions: which digit is left, right, top or bottom, and how many sevens there are. The caption has a word for each
digit, from left to right, and then ends: "seven two".
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from camserve.evaluation.digits.towers import APART_PX, NAMES
from camserve.evaluation.truth import TrueBox
from camserve.types.tokenisers import Words

SIDES = ("left", "right", "top", "bottom")
QUESTIONS = (*(f"which digit is {side}?" for side in SIDES), "how many sevens?")
"""All questions that can be asked."""
ANSWERS = NAMES
"""Answers, by digit or number."""
CAPTION = (*NAMES, "end")
"""Tokens of a caption: a word for each digit, and its end."""
END = len(NAMES)
MOST_WORDS = 3
"""Number of digits in a scene, at most."""

_WIDTHS = ((3, 16, 2), (16, 32, 2), (32, 32, 2), (32, 32, 1), (32, 40, 1))
"""Channels in, channels out and stride of each convolution."""
_MAPS, _TEXT = 40, 32
"""Maps, and numbers that a text has."""
_PLACE = 4.0
"""Weight of a place's coordinates, -1 to 1, in the look."""
_RARE = 2.0
"""Logit against a place's being counted."""
_CELLS_OF_A_DIGIT = 16.0


class AskedNet(nn.Module):
    """Makes numbers (n, outputs) of scenes (n, 3, 96, 96) and tokens (n, T), from 40 maps of 12 x 12 cells.

    The text decides where the network looks: the look is a mean over places, weighted by a softmax of what is there and
    where it is. It is taken linearly: what the maps say of a place is what they say of the scene. A text is the sum of
    its words' vectors: their order does not matter here.

    Args:
        tokeniser: what turns texts into tokens.
        outputs: number of answers, or of next words.
    """

    def __init__(self, tokeniser: Words, outputs: int) -> None:
        super().__init__()
        self.tokeniser = tokeniser
        self.features = nn.Sequential(*(_block(*widths) for widths in _WIDTHS))
        self.words = nn.Embedding(len(tokeniser.words), _TEXT)
        self.look = nn.Linear(_TEXT, _MAPS + 2)
        self.head = nn.Linear(_MAPS, outputs)
        self.said = nn.Linear(_TEXT, outputs, bias=False)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Returns the numbers."""
        return self.looked(self.features(x), self.words(tokens).sum(dim=1))[0]

    def looked(self, maps: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the numbers (n, outputs) of maps (n, 40, 12, 12) and texts (n, 32), and the looks (n, 144)."""
        found, look = self.found(maps, text)
        return found + self.said(text), look

    def found(self, maps: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the same but for what the text says by itself."""
        asked = self.look(text)
        sides = (torch.linspace(-1, 1, size, dtype=maps.dtype, device=maps.device) for size in maps.shape[2:])
        down, across = torch.meshgrid(*sides, indexing="ij")
        places, flat = torch.stack([across, down]).flatten(1), maps.flatten(2)
        wanted = torch.einsum("nc,ncp->np", asked[:, :_MAPS], flat) + _PLACE * (asked[:, _MAPS:] @ places)
        look = wanted.softmax(dim=1)
        return self.head(torch.einsum("np,ncp->nc", look, flat)), look


class AnswersNet(AskedNet):
    """Answers questions as `AskedNet` does, of one place, and those for a number by counting over all places.

    Each place has its share of the number, from 0 to 1 / 16. With the number n, an answer k has the logit
    k n - k^2 / 2, which is the largest for the nearest k. It is -(n - k)^2 / 2 without what all answers share, so that
    nothing that is counted speaks against any of them. The text decides whether a place answers or the number.
    """

    numbers: Tensor
    """Numbers (outputs,) that the answers stand for; 0 of those that are not counted to, since no scene shows them."""

    def __init__(self, tokeniser: Words, outputs: int) -> None:
        super().__init__(tokeniser, outputs)
        self.counts = nn.Linear(_TEXT, _MAPS + 1)
        self.takes = nn.Linear(_TEXT, 2)
        self.log_sharpness = nn.Parameter(torch.tensor(1.5))
        numbers = torch.arange(outputs, dtype=torch.float32)
        self.register_buffer("numbers", numbers * (numbers <= MOST_WORDS), persistent=False)

    def shares(self, maps: Tensor, text: Tensor) -> Tensor:
        """Returns the shares (n, 144) that places have in what texts (n, 32) count."""
        counts = self.counts(text)
        found = torch.einsum("nc,ncp->np", counts[:, :_MAPS], maps.flatten(2)) + counts[:, _MAPS:] - _RARE
        shares: Tensor = found.sigmoid() / _CELLS_OF_A_DIGIT
        return shares

    def found(self, maps: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the numbers and looks of `looked` but for what the text says by itself."""
        seen, look = super().found(maps, text)
        number = self.shares(maps, text).sum(dim=1, keepdim=True)
        counted = self.log_sharpness.exp() * (number * self.numbers - self.numbers**2 / 2)
        takes = self.takes(text).softmax(dim=1)
        return takes[:, :1] * seen + takes[:, 1:] * counted, look


def answers_net() -> AnswersNet:
    """Returns the network of questions, untrained."""
    known = ("which", "digit", "is", *SIDES, "how", "many", "sevens")
    return AnswersNet(Words(known, QUESTIONS[0], max_length=8), len(ANSWERS))


def caption_net() -> AskedNet:
    """Returns the network of captions, untrained."""
    return AskedNet(Words(CAPTION, "", max_length=8, end=END), len(CAPTION))


def answer(question: str, boxes: Sequence[TrueBox]) -> tuple[int | None, tuple[TrueBox, ...]]:
    """Returns the answer, None where no digit or two nearly as far out decide it, and the boxes that it is about."""
    if question == QUESTIONS[-1]:
        sevens = tuple(box for box in boxes if box.label == "7")
        return len(sevens), sevens
    side = QUESTIONS.index(question)
    axis, sign = side // 2, 1 - 2 * (side % 2)
    ordered = sorted(boxes, key=lambda box: sign * centre(box)[axis])
    if not ordered or (len(ordered) > 1 and abs(centre(ordered[0])[axis] - centre(ordered[1])[axis]) < APART_PX):
        return None, ()
    return int(ordered[0].label), (ordered[0],)


def in_order(boxes: Sequence[TrueBox]) -> tuple[TrueBox, ...]:
    """Returns boxes in the order in which a caption names them."""
    return tuple(sorted(boxes, key=lambda box: centre(box)[0]))


def is_ordered(boxes: Sequence[TrueBox]) -> bool:
    """Tells whether the order from left to right is clear."""
    across = [centre(box)[0] for box in in_order(boxes)]
    return all(right - left >= APART_PX for left, right in pairwise(across))


def centre(box: TrueBox) -> tuple[float, float]:
    """Returns the centre (x, y) of a box."""
    return (box.left + box.right) / 2, (box.top + box.bottom) / 2


def answered(module: Any, x: Tensor) -> Tensor:
    """Returns the answer (n, questions) to each question."""
    tokens = [torch.tensor([module.tokeniser.tokens(question)]) for question in QUESTIONS]
    return torch.stack([module(x, each.expand(len(x), -1)).argmax(dim=1) for each in tokens], dim=1)


def written(module: Any, x: Tensor) -> Tensor:
    """Returns the caption (n, 4) that the network itself writes; what comes behind an end is an end."""
    tokens, ended = torch.zeros(len(x), 0, dtype=torch.long), torch.zeros(len(x), dtype=torch.bool)
    for _ in range(MOST_WORDS + 1):
        word = module(x, tokens).argmax(dim=1)
        ended = ended | (word == END)
        tokens = torch.cat([tokens, word.masked_fill(ended, END)[:, None]], dim=1)
    return tokens


def _block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())

"""Says how a text becomes what a network takes beside an image, and has a plain way to do it.

A network of outputs "answers" or "tokens" is a module (images (n, C, H, W), tokens (n, T) int64) -> (n, numbers), and
has its tokeniser as the attribute `tokeniser`. All images of a pass are asked with the same tokens, so there is no
padding; T is 0 where a caption begins.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from camserve.errors import InvalidOption
from camserve.wording import close_to, shown


@runtime_checkable
class Tokeniser(Protocol):
    """Turns a text into tokens: numbers from 0 that the network knows."""

    @property
    def example(self) -> str:
        """Returns a text that the network takes, for people and for looks at workers; "" may begin a caption."""

    @property
    def max_length(self) -> int:
        """Returns how many tokens the network takes at most."""

    def tokens(self, text: str) -> Sequence[int]:
        """Returns the tokens of a text; raises InvalidOption where no token stands for something in it."""


@runtime_checkable
class Writer(Tokeniser, Protocol):
    """Turns tokens back into a text as well, for a network that writes. Its tokens are the indices of its outputs."""

    @property
    def end(self) -> int:
        """Returns the token that ends a caption; it is no word."""

    def text(self, tokens: Sequence[int]) -> str:
        """Returns the text of tokens, of which `tokens` makes the same tokens again."""


class Words:
    """Has one token for each word of a list; case and punctuation do not matter.

    Args:
        words: the words, in the order of their tokens.
        example: a text that the network takes.
        max_length: how many tokens the network takes at most.
        end: token that ends a caption, for a network that writes.
    """

    def __init__(self, words: Sequence[str], example: str, max_length: int, end: int = -1) -> None:
        self.words = tuple(words)
        self.example = example
        self.max_length = max_length
        self.end = end
        self._tokens = {word.casefold(): token for token, word in enumerate(self.words)}

    def tokens(self, text: str) -> list[int]:
        """Returns the tokens of the words; raises InvalidOption for a word that is not in the list."""
        words = re.findall(r"[^\W_]+", text.casefold())
        for word in words:
            if word not in self._tokens:
                near = close_to(word, self._tokens)
                hint = f"; close to it: {', '.join(near)}" if near else ""
                raise InvalidOption(f"unknown word {shown(word)}{hint}")
        return [self._tokens[word] for word in words]

    def text(self, tokens: Sequence[int]) -> str:
        """Returns the words, with spaces between them."""
        return " ".join(self.words[token] for token in tokens)

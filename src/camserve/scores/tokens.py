"""Scores of networks that take a text beside the image: answers to a question, and captions, written token by token.

A network of (image, tokens) is asked with one sequence of tokens for each pass. `Score.read` says with which, for
the text of an item and its targets; what the passes return lies side by side, (n, passes * numbers).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from camserve.errors import InvalidOption, Unsupported
from camserve.scores.classes import OfClasses, Softmax
from camserve.scores.score import Predictions, Reading, largest
from camserve.scores.targets import Combination, terms_of
from camserve.types import Against, AnyTarget, Contrast, Finer, Prediction, Target, Text, Word
from camserve.types.tokenisers import Tokeniser, Writer
from camserve.wording import shown

LOG_SIZE = 1.0
"""Least size at which sums of log-probabilities are compared: that of a logit."""


class Answers(Softmax):
    """Describes logits (n, K) over answers, of a network of an image and a question; scores are those of "softmax"."""

    kind = "answers"
    takes_text = "question"

    def read(self, tokeniser: Tokeniser, text: str, targets: Sequence[AnyTarget], caption: Sequence[int]) -> Reading:
        """Returns that the network is asked once, with the question."""
        tokens = encoded(tokeniser, "the question", text)
        if not tokens:
            raise InvalidOption(f"text: the question has no word that the network knows, got {shown(text)}")
        return Reading((tokens,), tuple(targets), self)


class Tokens(OfClasses):
    """Describes next-token logits (n, V), of a network of an image and the tokens so far.

    A class is a word as the next one after the caption so far. A `Text` is words that follow it, the score the sum of
    their log-probabilities, each given the words before it. A `Word` is one of those alone. Both scores are
    log-probabilities: a caption's probability would be smaller the longer it is.

    Args:
        shape: (V,).
        writer: what turns texts into tokens; None until a text is read.
        so_far: tokens of the caption so far.
        rows: number of the pass, by the tokens that it is asked with.
    """

    kind = "tokens"
    takes_text = "caption so far"
    needs_text = False
    writes = True
    linear = False
    has_zero = False

    def __init__(
        self,
        shape: Sequence[int] = (),
        writer: Writer | None = None,
        so_far: tuple[int, ...] = (),
        rows: Sequence[tuple[int, ...]] = ((),),
    ) -> None:
        super().__init__(shape)
        self._writer = writer
        self._so_far = so_far
        self._rows = {tokens: row for row, tokens in enumerate(rows)}

    def check(self, outputs: Tensor) -> None:
        """Raises InvalidOption where there is one output: a network that writes has several tokens to choose from."""
        if outputs.shape[1] < 2:
            raise InvalidOption("outputs tokens are the logits of several next tokens, and this network has one output")

    def classes(self, numbers: int) -> int:
        """Returns V, whatever the number of passes."""
        return self.shape[0] if self.shape else numbers

    def values(self, outputs: Tensor) -> Tensor:
        """Returns the log-probabilities of the tokens of each pass, side by side."""
        return self._each(outputs).log_softmax(dim=-1).flatten(-2)

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Returns the probabilities (..., V) of the next tokens after the caption so far, or else of the first pass."""
        return self._each(outputs)[..., self._rows.get(self._so_far, 0), :].softmax(dim=-1)

    def _each(self, outputs: Tensor) -> Tensor:
        return outputs.reshape(*outputs.shape[:-1], -1, self.shape[0])

    def predictions(self, outputs: Tensor) -> Predictions:
        """Returns the next tokens after the caption so far, the most probable one first."""
        found = self.probabilities(outputs)
        return NextWords(found, {"probability": found}, self, outputs)

    def query_value(self, outputs: Tensor, asked: Combination) -> Tensor:
        """Returns the same log-probabilities as `value`."""
        return self.value(outputs, asked)

    def size(self, outputs: Tensor, asked: Combination) -> Tensor:
        """Returns the sums of the logits' sizes, (n, K): a log-probability is the difference of two of them."""
        largest = self._each(outputs).abs().amax(dim=-1, keepdim=True).expand_as(self._each(outputs)).flatten(-2)
        weights = torch.ones_like(asked.classes, dtype=torch.float64) if asked.weights is None else asked.weights.abs()
        return Combination(asked.classes, weights).sums(largest)

    def query_size(self, asked: Combination) -> Tensor:
        """Returns `LOG_SIZE`."""
        return torch.full(asked.classes.shape[:2], LOG_SIZE, device=asked.classes.device)

    def is_class(self, asked: Combination) -> Tensor:
        """Returns that none is: a log-probability does not start at 0."""
        return torch.zeros(asked.classes.shape[:2], dtype=torch.bool, device=asked.classes.device)

    def ask(self, targets: Sequence[AnyTarget], device: torch.device) -> Combination:
        """Returns the tokens that targets stand for, by their places among the log-probabilities of all passes."""
        return Combination.of_terms([self._terms(target) for target in targets], device)

    def _terms(self, target: AnyTarget) -> list[tuple[int, float]]:
        match target:
            case Text() | Word():
                return [(self._place(before, token), 1.0) for before, token in self._steps(target)]
            case Target() | Contrast() | Against():
                return [(self._place(self._so_far, index), weight) for index, weight in terms_of(target)]
        raise Unsupported(f"outputs {self.kind} tell words, and have no {type(target).__name__.lower()}")

    def _place(self, before: tuple[int, ...], token: int) -> int:
        if before not in self._rows:
            raise Unsupported("the network was not asked with the words before this one")
        return self._rows[before] * self.shape[0] + token

    def _steps(self, target: Text | Word) -> list[tuple[tuple[int, ...], int]]:
        """Returns the tokens that a target asks for, each behind all that comes before it."""
        assert self._writer is not None, "a text has been read"
        tokens = encoded(self._writer, "the words asked for", target.words, len(self._so_far), self.shape[0])
        steps = [((*self._so_far, *tokens[:at]), token) for at, token in enumerate(tokens)]
        if isinstance(target, Text):
            return steps
        if target.at > len(steps):
            raise InvalidOption(
                f"there are {len(steps)} words in {shown(target.words)}, word {target.at} was asked for"
            )
        return [steps[target.at - 1]]

    def read(self, tokeniser: Tokeniser, text: str, targets: Sequence[AnyTarget], caption: Sequence[int]) -> Reading:
        """Returns that the network is asked with the tokens before each word that the targets ask for.

        A `Word` of the network's own caption becomes that of the caption's text.
        """
        assert isinstance(tokeniser, Writer), "it was seen to be one"
        so_far = encoded(tokeniser, "the caption so far", text, vocabulary=self.shape[0])
        reading = Tokens(self.shape, tokeniser, so_far)
        known = tuple(_with_words(target, tokeniser, caption) for target in targets)
        rows = tuple(dict.fromkeys(before for one in known for before in reading._before(one))) or (so_far,)
        return Reading(rows, known, Tokens(self.shape, tokeniser, so_far, rows))

    def _before(self, target: AnyTarget) -> list[tuple[int, ...]]:
        return [before for before, _ in self._steps(target)] if isinstance(target, Text | Word) else [self._so_far]

    def resolved(self, target: AnyTarget, outputs: Tensor) -> tuple[AnyTarget, ...]:
        """Returns a target for each of the most probable next words that are meant, with the nearest words named."""
        if isinstance(target, Text | Word):
            return (target,)
        values, most = self.probabilities(outputs).log(), max((each.top_k or 0 for each in target.classes), default=0)
        found = target.each(largest(values, most) if most else ())
        return tuple(one.contrast(values.double().cpu().numpy()) if isinstance(one, Finer) else one for one in found)

    def words(self, target: Text | Word, outputs: Tensor) -> tuple[Prediction, ...]:
        """Returns the words that a target asks for, each with its probability given the words before it."""
        values = self.values(outputs)
        return tuple(
            Prediction(token, "", values[self._place(before, token)].exp().item())
            for before, token in self._steps(target)
        )


@dataclass(frozen=True)
class NextWords(Predictions):
    """Holds what a network that writes says of the next word, and of the words that it was asked for."""

    score: Tokens
    outputs: Tensor

    def about(self, target: AnyTarget, score: float) -> tuple[Prediction, ...]:
        """Returns what is said of the words of a text; of another target as for a class."""
        if isinstance(target, Text | Word):
            return self.score.words(target, self.outputs)
        return super().about(target, score)


def _with_words(target: AnyTarget, writer: Writer, caption: Sequence[int]) -> AnyTarget:
    if not isinstance(target, Word) or target.words:
        return target
    words = writer.text(caption)
    if target.at > len(caption):
        raise InvalidOption(
            f"the network's caption has {len(caption)} words ({shown(words)}), word {target.at} was asked for"
        )
    return Word(target.at, writer.text(caption[: target.at]))


def encoded(
    tokeniser: Tokeniser, what: str, text: str, before: int = 0, vocabulary: int | None = None
) -> tuple[int, ...]:
    """Returns the tokens of a text.

    Args:
        tokeniser: the network's tokeniser.
        what: name of the text, for people.
        text: the text.
        before: number of tokens that come before it; then the last one of the text is not put in, but asked for.
        vocabulary: number of tokens that there are; None: unknown.

    Raises:
        InvalidOption: a word is unknown, or there are more tokens than the network takes.
    """
    try:
        tokens = tuple(int(token) for token in tokeniser.tokens(text))
    except InvalidOption as error:
        raise InvalidOption(f"{what}: {error}") from None
    if vocabulary is not None and any(not 0 <= token < vocabulary for token in tokens):
        raise Unsupported(f"{what}: the tokeniser has tokens that the network has no output for")
    if before + len(tokens) > tokeniser.max_length:
        after = f" behind {before}" if before else ""
        raise InvalidOption(
            f"{what}: the network takes at most {tokeniser.max_length} tokens, got {len(tokens)}{after}: {shown(text)}"
        )
    return tokens

"""Networks that take a text beside the image against twins in float64: a loop over the words, the image's part once."""

import functools

import numpy as np
import pytest
import torch
from reference import twins
from reference.models import PREPROCESSING, build, picture
from reference.test_perturbation_against_twins import normalised
from reference.test_scores_against_twins import LAYER, METHODS, SMALL_DIFFERENCES
from reference.twins_scores import Alone, TwinScore, asked_of_masked_images, softmax
from torch import Tensor, nn

from camserve import Engine
from camserve.types import AnyTarget, Contrast, Target, Text, Word
from camserve.types.tokenisers import Words

VOCABULARY = ("one", "two", "three", "four", "five", "six", "end")


def picture_maps(net: nn.Module) -> int:
    """Returns the number of maps of the last feature layer."""
    return net.features(normalised(picture(2))[None]).shape[1]


class Beside(nn.Module):
    """A small network whose maps are weighed by a text before its head."""

    def __init__(self, example: str) -> None:
        super().__init__()
        net = build("perceptron", 2, torch.float64)
        self.features, self.head = net.features, net.head
        channels = picture_maps(net)
        self.words = nn.Embedding(len(VOCABULARY), channels).double()
        self.words.weight.data = torch.randn(7, channels, generator=torch.Generator().manual_seed(5)).double()
        self.tokeniser = Words(VOCABULARY, example, max_length=5, end=6)

    def rest(self, maps: Tensor, tokens: Tensor) -> Tensor:
        return self.head(maps * (1 + 0.7 * self.words(tokens).sum(dim=1).tanh())[..., None, None])

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        return self.rest(self.features(x), tokens)


class Looped(nn.Module):
    """The twin: the image's part once, then the rest for each text, one after the other."""

    def __init__(self, net: Beside, asked: list[list[int]]) -> None:
        super().__init__()
        self.features, self.head, self._rest, self.asked = net.features, net.head, net.rest, asked

    def forward(self, x: Tensor) -> Tensor:
        maps = self.features(x)
        each = [torch.tensor([tokens], dtype=torch.long).expand(len(x), -1) for tokens in self.asked]
        return torch.cat([self._rest(maps, tokens) for tokens in each], dim=1)


def log_p(z, row: int, token: int):
    mine = torch.stack(tuple(torch.as_tensor(one, dtype=torch.float64) for one in z[7 * row : 7 * row + 7]))
    return mine[token] - torch.logsumexp(mine, 0)


def words(*asked: tuple[int, int]) -> TwinScore:
    def value(z):
        return sum(log_p(z, row, token) for row, token in asked)

    return TwinScore(value, lambda z: float(value(torch.tensor(z, dtype=torch.float64))))


def index(number: int) -> Target:
    return Target(index=number)


ASKED: dict[str, tuple[str, str, AnyTarget, list[list[int]], TwinScore]] = {
    "answer": ("answers", "two three", index(5), [[1, 2]], TwinScore(lambda z: z[5], lambda z: softmax(z, 5))),
    "next word": ("tokens", "", index(2), [[]], words((0, 2))),
    "word behind a caption": ("tokens", "four one", Text("two"), [[3, 0]], words((0, 1))),
    "three words": ("tokens", "five", Text("one one three"), [[4], [4, 0], [4, 0, 0]], words((0, 0), (1, 0), (2, 2))),
    "second word": ("tokens", "", Word(2, "six two"), [[5]], words((0, 1))),
    "contrast": (
        "tokens",
        "two",
        Contrast(index(3), (index(0), index(6)), 0.5),
        [[1]],
        TwinScore(
            lambda z: log_p(z, 0, 3) - 0.25 * (log_p(z, 0, 0) + log_p(z, 0, 6)),
            lambda z: float(log_p(z, 0, 3) - 0.25 * (log_p(z, 0, 0) + log_p(z, 0, 6))),
        ),
    ),
}


@functools.cache
def maps_of(name: str) -> dict[str, object]:
    kind, text, target, _, _ = ASKED[name]
    engine = Engine(Beside("one two"), preprocessing=PREPROCESSING, outputs=kind)
    answer = engine.explain(picture(2), [spec for spec, _ in METHODS.values()], [target], layer=LAYER, text=text)
    return dict(zip(METHODS, answer.maps, strict=True))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ASKED)
def test_maps_are_those_of_the_twins(name, method):
    kind, _, target, asked, twin = ASKED[name]
    module = Alone(Looped(Beside("one two"), asked), twin)
    module.kind, module.plain = kind, kind == "answers" and isinstance(target, Target)
    module.is_class = kind == "answers" and isinstance(target, Target)
    with asked_of_masked_images(twin):
        raw = METHODS[method][1](module, normalised(picture(2)), f"net.{LAYER}", 0)
    expected, found = twins.final(raw), maps_of(name)[method]
    assert found.degenerate == (not expected.any())
    np.testing.assert_allclose(found.array, expected, rtol=0, atol=SMALL_DIFFERENCES)


@pytest.mark.parametrize("name", ASKED)
def test_the_score_of_the_image_and_its_curves_are_those_of_the_twin(name):
    kind, text, target, asked, twin = ASKED[name]
    x, net = normalised(picture(2)), Beside("one two")
    engine = Engine(net, preprocessing=PREPROCESSING, outputs=kind)
    (found,) = engine.explain(picture(2), ["grad_cam"], [target], evaluate=True, evaluation_steps=3, text=text).maps
    with torch.no_grad():
        whole, nothing = (twin.query(Looped(net, asked)(one[None])[0].tolist()) for one in (x, torch.zeros_like(x)))
    assert found.score == pytest.approx(whole, rel=1e-9)
    assert found.faithfulness.deletion[[0, -1]] == pytest.approx([whole, nothing], rel=1e-9)
    assert found.faithfulness.insertion[-1] == pytest.approx(whole, rel=1e-9)


def test_a_caption_is_the_most_probable_word_each_time_until_one_ends_it():
    net, x = Beside(""), normalised(picture(2))
    net.head[-1].bias.data[6] += 0.2
    answer = Engine(net, preprocessing=PREPROCESSING, outputs="tokens").explain(picture(2), [], top_predictions=7)
    tokens: list[int] = []
    probabilities = []
    with torch.no_grad():
        while len(tokens) < 5:
            z = net(x[None], torch.tensor([tokens], dtype=torch.long))[0].softmax(dim=0)
            if z.argmax() == 6:
                break
            tokens.append(int(z.argmax()))
            probabilities.append(float(z.max()))
    assert [one.index for one in answer.predictions] == tokens
    assert [one.probability for one in answer.predictions] == pytest.approx(probabilities, rel=1e-6)

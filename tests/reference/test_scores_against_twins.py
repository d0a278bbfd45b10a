"""Every method on every kind of outputs and target against twins in float64: equal to rounding."""

import functools

import numpy as np
import pytest
import torch
from reference import twins, twins_gradient, twins_perturbation
from reference.models import PREPROCESSING, build, picture
from reference.test_gradient_against_twins import smooth
from reference.test_perturbation_against_twins import normalised, rise_masks, ss_cam
from reference.twins_scores import Alone, TwinScore, asked_of_masked_images, cosine, sigmoid, softmax
from torch import Tensor, nn

from camserve import Engine
from camserve.errors import Unsupported
from camserve.evaluation.confidence import confidence
from camserve.images import mask_file
from camserve.methods import (
    AblationCam,
    GradCam,
    GradCamPlusPlus,
    GroupCam,
    HiresCam,
    IsCam,
    LayerCam,
    MethodSpec,
    Occlusion,
    ReciproCam,
    Rise,
    ScoreCam,
    SmoothGradCamPlusPlus,
    SsCam,
    XgradCam,
)
from camserve.scores import make_score
from camserve.types import Against, AnyTarget, Contrast, Region, Target, Text, Value, Vector

SMALL_DIFFERENCES = 1e-6
"""A map of RISE, or of small differences of scores, is scaled up from what is left of sums a hundred times as large: so
is the rounding of its float32 end."""

LAYER = "features.8"
VECTOR = np.array([0.3, -1.2, 0.8, 0.1, 0.5, -0.4, 1.5], np.float32)


WORDS = {
    "a cat": [0.3, -1.2, 0.8, 0.1, 0.5, -0.4, 1.5],
    "a dog": [-0.5, 0.2, 1.1, 0.9, -0.3, 0.6, 0.4],
    "a cow": [3.0, -2.0, 0.1, 0.7, 1.0, 0.0, -1.0],
}
"""Vectors of texts, of other lengths than 1."""


class Words:
    """A text encoder that looks its vectors up."""

    max_length, scale = 9, 20.0

    def tokens(self, text: str) -> list[int]:
        return list(text.encode())

    def encode(self, texts: list[str]) -> Tensor:
        return torch.tensor([WORDS[text] for text in texts], dtype=torch.float64)


class Ended(nn.Module):
    """A small network whose logits go through a function."""

    def __init__(self, name: str, end) -> None:
        super().__init__()
        net = build(name, 2, torch.float64)
        self.features, self.head, self.end = net.features, net.head, end
        self.pooled = name == "pooled"
        self.text_encoder = Words()

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        return self.end(self.head(features.mean(dim=(2, 3)) if self.pooled else features))


def classes(index: int) -> Target:
    return Target(index=index)


def logit(index: int) -> TwinScore:
    return TwinScore(lambda z: z[index], lambda z: softmax(z, index))


CONTRAST = Contrast(classes(2), (classes(0), classes(5)), 0.7)
SCORES: dict[str, tuple[str, object, AnyTarget, TwinScore]] = {
    "softmax": ("softmax", nn.Identity(), classes(5), logit(5)),
    "contrast": (
        "softmax",
        nn.Identity(),
        CONTRAST,
        TwinScore(
            lambda z: z[2] - 0.7 * (z[0] + z[5]) / 2,
            lambda z: softmax(z, 2) - 0.7 * (softmax(z, 0) + softmax(z, 5)) / 2,
        ),
    ),
    "against": ("softmax", nn.Identity(), Against(classes(5)), TwinScore(lambda z: -z[5], lambda z: 1 - softmax(z, 5))),
    "sigmoid": ("sigmoid", nn.Identity(), classes(1), TwinScore(lambda z: z[1], lambda z: sigmoid(z[1]))),
    "sigmoid contrast": (
        "sigmoid",
        nn.Identity(),
        Contrast(classes(1), (classes(3),)),
        TwinScore(lambda z: z[1] - z[3], lambda z: sigmoid(z[1]) - sigmoid(z[3])),
    ),
    "binary yes": (
        "binary",
        lambda z: z[:, 5:6] / 4,
        classes(1),
        TwinScore(lambda z: z[0], lambda z: sigmoid(z[0])),
    ),
    "binary no": (
        "binary",
        lambda z: z[:, 5:6] / 4,
        classes(0),
        TwinScore(lambda z: -z[0], lambda z: 1 - sigmoid(z[0])),
    ),
    "probabilities": (
        "probabilities",
        lambda z: (z / 4).softmax(dim=1),
        classes(5),
        TwinScore(lambda p: p[5].log(), lambda p: p[5]),
    ),
    "one probability": (
        "probabilities",
        lambda z: (z[:, 5:6] / 4).sigmoid(),
        classes(0),
        TwinScore(lambda p: (1 - p[0]).log(), lambda p: 1 - p[0]),
    ),
    "value up": ("value", lambda z: 40 + z[:, 4:6], Value(classes(1)), TwinScore(lambda v: v[1], lambda v: v[1])),
    "value down": (
        "value",
        lambda z: z[:, 4:6] - 3,
        Value(classes(0), "down"),
        TwinScore(lambda v: -v[0], lambda v: -v[0]),
    ),
    "embedding": (
        "embedding",
        nn.Identity(),
        Vector(VECTOR),
        TwinScore(lambda z: slow_cosine(z, VECTOR.tolist()), lambda z: cosine(z, VECTOR.tolist())),
    ),
}


def slow_cosine(z, vector) -> Tensor:
    product = sum(a * b for a, b in zip(z, vector, strict=True))
    return product / (sum(a * a for a in z).sqrt() * sum(b * b for b in vector) ** 0.5)


def of_words(**weights: float) -> TwinScore:
    """The sum of the cosines to the vectors of "a cat" and so on, each times a weight."""
    pairs = [(weight, WORDS[f"a {name}"]) for name, weight in weights.items()]
    return TwinScore(
        lambda z: sum(weight * slow_cosine(z, vector) for weight, vector in pairs),
        lambda z: sum(weight * cosine(z, vector) for weight, vector in pairs),
    )


PROMPTS = ("a cat", "a dog", "a cow")
SCORES |= {
    "text": ("text-image", nn.Identity(), Text("a cow"), of_words(cow=1)),
    "prompt": ("text-image", nn.Identity(), classes(1), of_words(dog=1)),
    "prompt contrast": (
        "text-image",
        nn.Identity(),
        Contrast(classes(0), (classes(1), classes(2)), 0.7),
        of_words(cat=1, dog=-0.35, cow=-0.35),
    ),
    "prompt against": ("text-image", nn.Identity(), Against(classes(2)), of_words(cow=-1)),
}


PLACES = np.array([[0, 51, 255, 102], [204, 0, 255, 153]], np.uint8)
"""By how much each of 2 x 4 places counts."""


def as_places(z: Tensor) -> Tensor:
    """Returns logits (n, 3, 2, 4) that depend on all 7 numbers."""
    mixed = z @ torch.sin(torch.arange(7 * 24, dtype=z.dtype)).reshape(7, 24)
    return mixed.reshape(-1, 3, 2, 4)


def over_places(**weights: float) -> TwinScore:
    """The sum of the means of classes a, b and c over the places, each times a weight; rows of outputs are maps."""
    total = float(PLACES.sum())
    counted = [(place, float(share) / total) for place, share in enumerate(PLACES.ravel()) if share]
    pairs = [("abc".index(name), weight) for name, weight in weights.items()]

    def value(z):
        return sum(weight * share * z[8 * c + place] for c, weight in pairs for place, share in counted)

    def query(z):
        at = {place: [z[8 * c + place] for c in range(3)] for place, _ in counted}
        found = sum(weight * share * softmax(at[place], c) for c, weight in pairs for place, share in counted)
        return 1 + found if tuple(weights.values()) == (-1,) else found

    return TwinScore(value, query)


GRID = mask_file(PLACES)
SCORES |= {
    "places": ("segmentation", as_places, Region(classes(2), grid=GRID), over_places(c=1)),
    "places contrast": (
        "segmentation",
        as_places,
        Region(Contrast(classes(0), (classes(1), classes(2)), 0.7), grid=GRID),
        over_places(a=1, b=-0.35, c=-0.35),
    ),
    "places against": ("segmentation", as_places, Region(Against(classes(1)), grid=GRID), over_places(b=-1)),
}


def score_cam(module, image, layer, target, variant):
    """As the twin, but REFERENCE and PAPER of numbers and cosines measure the gain over the black image."""
    if variant == "logit" or has_zero(module):
        return twins_perturbation.score_cam(module, image, layer, target, variant=variant)
    live = twins_perturbation.channels(module, image, layer, target)
    black = twins.probability(module, torch.zeros_like(image), target)
    gains = [twins.probability(module, image * twins_perturbation.mask_of(a, image), target) - black for _, a in live]
    weights = gains if variant == "reference" else twins_perturbation.softmax(gains)
    return twins_perturbation.weighted_sum(weights, [a for _, a in live], image)


def has_zero(module: Alone) -> bool:
    return module.kind not in ("value", "embedding", "text-image", "tokens")


def ablation_cam(module, image, layer, target):
    """As the twin, but a loss is a share of the score for a class of a softmax alone."""
    raw = twins_perturbation.ablation_cam(module, image, layer, target)
    whole = twins_perturbation.logit(module, image, target)
    return raw if module.plain else raw * whole


def rise(module, image, layer, target):
    """sum_i (s(x m_i) - level) m_i, from its least value on; the level of a class is 0, of others the score of x."""
    spec = METHODS["rise"][0]
    level = 0.0 if module.is_class else twins.probability(module, image, target)
    total = torch.zeros_like(image[0])
    for mask in rise_masks(spec, tuple(image.shape[1:])):
        total += (twins.probability(module, image * mask, target) - level) * mask
    return total - min(0.0, total.min().item())


METHODS: dict[str, tuple[MethodSpec, object]] = {
    "grad_cam": (GradCam(), twins.grad_cam),
    "hires_cam": (HiresCam(), twins_gradient.hires_cam),
    "xgrad_cam": (XgradCam(), twins_gradient.xgrad_cam),
    "layer_cam": (LayerCam(), twins_gradient.layer_cam),
    "grad_cam_plus_plus": (GradCamPlusPlus(), twins_gradient.grad_cam_plus_plus_paper),
    "smooth_grad_cam_plus_plus": (SmoothGradCamPlusPlus(samples=4, seed=3), smooth),
    "score_cam": (ScoreCam(), functools.partial(score_cam, variant="reference")),
    "score_cam_paper": (ScoreCam(variant="paper"), functools.partial(score_cam, variant="paper")),
    "score_cam_logit": (ScoreCam(variant="logit"), functools.partial(score_cam, variant="logit")),
    "ss_cam": (SsCam(samples=2, seed=5), functools.partial(ss_cam, samples=2)),
    "is_cam": (IsCam(samples=2), functools.partial(twins_perturbation.is_cam, samples=2)),
    "group_cam": (GroupCam(groups=5), functools.partial(twins.group_cam_paper, groups=5, theta=70.0)),
    "group_cam_reference": (
        GroupCam(groups=5, variant="reference"),
        functools.partial(twins.group_cam_reference, groups=5),
    ),
    "ablation_cam": (AblationCam(), ablation_cam),
    "recipro_cam": (ReciproCam(), twins_perturbation.recipro_cam),
    "occlusion": (
        Occlusion(positions=5, window=2),
        lambda module, image, layer, target: twins_perturbation.occlusion(module, image, target, 5, 2),
    ),
    "rise": (Rise(masks=9, grid=4, keep_prob=0.4, seed=2), rise),
}


def _inside(target: AnyTarget) -> AnyTarget:
    return target.of if isinstance(target, Region) else target


def engine_of(name: str, score: str) -> Engine:
    kind, end, _, _ = SCORES[score]
    prompts = PROMPTS if kind == "text-image" else None
    return Engine(Ended(name, end), preprocessing=PREPROCESSING, outputs=kind, prompts=prompts)


@functools.cache
def maps_of(name: str, score: str) -> dict[str, object]:
    """Returns the maps of all methods, from one request."""
    target = SCORES[score][2]
    methods = [spec for spec, _ in METHODS.values()]
    answer = engine_of(name, score).explain(picture(2), methods, [target], layer=LAYER)
    return dict(zip(METHODS, answer.maps, strict=True))


@pytest.mark.parametrize(
    ("name", "method"),
    [("perceptron", method) for method in METHODS]
    + [("pooled", method) for method in ("grad_cam", "xgrad_cam", "layer_cam", "ablation_cam", "group_cam")],
)
@pytest.mark.parametrize("score", SCORES)
def test_maps_are_those_of_the_twins(name, score, method):
    """Behind global average pooling gradients and ablations have a closed form, unless the score is not linear."""
    kind, end, target, twin = SCORES[score]
    module = Alone(Ended(name, end), twin)
    module.kind, module.plain = kind, score in ("softmax", "places")
    module.is_class = isinstance(_inside(target), Target) and has_zero(module)
    image = normalised(picture(2))
    with asked_of_masked_images(twin):
        raw = METHODS[method][1](module, image, f"net.{LAYER}", 0)
    expected, found = twins.final(raw), maps_of(name, score)[method]
    assert found.degenerate == (not expected.any())
    np.testing.assert_allclose(found.array, expected, rtol=0, atol=SMALL_DIFFERENCES)


@pytest.mark.parametrize("score", SCORES)
def test_the_score_of_the_image_and_its_curves_are_those_of_the_twin(score):
    _, end, target, twin = SCORES[score]
    tight = 1e-7 if score.startswith("prompt") else 1e-9  # packed prompts are float32
    module = Ended("perceptron", end)
    x = normalised(picture(2))
    engine = engine_of("perceptron", score)
    (found,) = engine.explain(picture(2), ["grad_cam"], [target], evaluate=True, evaluation_steps=3).maps
    with torch.no_grad():
        whole, nothing = (twin.query(module(one[None]).flatten().tolist()) for one in (x, torch.zeros_like(x)))
    assert found.score == pytest.approx(whole, rel=tight)
    assert found.faithfulness.deletion[[0, -1]] == pytest.approx([whole, nothing], rel=tight, abs=1e-12)
    assert found.faithfulness.insertion[-1] == pytest.approx(whole, rel=tight)


def test_a_drop_of_any_score_is_the_share_that_is_lost():
    kind, end, target, twin = SCORES["value down"]
    module = Ended("perceptron", end)
    x = normalised(picture(2))
    score = make_score(kind)
    with torch.no_grad():
        (found,) = confidence(module, x, torch.full((1, *x.shape[1:]), 0.5), score.targets([target]), micro_batch=2)
        whole, kept = (twin.query(module(one[None])[0].tolist()) for one in (x, x * 0.5))
    assert (found.whole, found.kept) == pytest.approx((whole, kept), rel=1e-9)
    assert found.drop == pytest.approx(max(0, whole - kept) / abs(whole), rel=1e-9)
    assert found.increased == (kept > whole)


CAM_SCORES = [name for name in SCORES if SCORES[name][0] in ("softmax", "sigmoid", "binary", "value")]


@pytest.mark.parametrize("score", CAM_SCORES)
def test_cam_weighs_channels_by_the_rows_of_the_head(score):
    """The weights of channel k are what the score, a sum of outputs, makes of column k of the head's matrix."""
    kind, end, target, twin = SCORES[score]
    module = Folded(end)
    activations, _ = twins.activations_and_gradients(module, normalised(picture(2)), LAYER, 0)
    outputs = module.head.weight.detach().T  # (C, numbers)
    raw = sum(twin.value(column.unbind()).item() * a for column, a in zip(outputs, activations, strict=True))
    engine = Engine(module, preprocessing=PREPROCESSING, outputs=kind)
    (found,) = engine.explain(picture(2), ["cam"], [target], layer=LAYER).maps
    expected = twins.final(twins.up(raw.clamp(min=0), normalised(picture(2))))
    np.testing.assert_allclose(found.array, expected, rtol=0, atol=SMALL_DIFFERENCES)


class Folded(nn.Module):
    """`Ended` on `pooled`, with an end that is linear put into the head's matrix and bias."""

    def __init__(self, end) -> None:
        super().__init__()
        net = build("pooled", 2, torch.float64)
        self.features = net.features
        columns = torch.cat([net.head.weight.T, net.head.bias[None], torch.zeros_like(net.head.bias[None])]).detach()
        ended = end(columns)
        constant = ended[-1]
        self.head = nn.Linear(len(columns) - 2, ended.shape[1]).double()
        self.head.weight.data, self.head.bias.data = (ended[:-2] - constant).T.contiguous(), ended[-2]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean(dim=(2, 3)))


@pytest.mark.parametrize("score", ["probabilities", "embedding"])
def test_cam_says_that_a_score_is_not_linear(score):
    kind, _, target, _ = SCORES[score]
    engine = Engine(Folded(nn.Identity()), preprocessing=PREPROCESSING, outputs="embedding")
    if kind == "embedding":
        with pytest.raises(Unsupported, match="outputs embedding have a score that is not linear"):
            engine.explain(picture(2), ["cam"], [target], layer=LAYER)
    else:
        with pytest.raises(Unsupported, match="global average pooling and one linear layer"):
            engine_of("pooled", score).explain(picture(2), ["cam"], [target], layer=LAYER)

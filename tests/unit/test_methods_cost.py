"""What a method says of its cost and of its layer is what happens."""

import numpy as np
import pytest
import torch
from reference.models import CLASSES, PREPROCESSING, build, picture, silence
from torch import nn
from torchvision.models import VisionTransformer

from camserve import Engine
from camserve.errors import Unsupported
from camserve.methods import (
    METHODS,
    AblationCam,
    GroupCam,
    IntegratedGradCam,
    IsCam,
    MethodSpec,
    ScoreCam,
    SmoothGrad,
    SsCam,
    Xrai,
    parse_method,
)
from camserve.scores import SCORES
from camserve.types import OUTPUTS, Layer, ModelInfo, Preprocessing, Vector

QUICK = {"samples": 2, "steps": 3, "groups": 3, "masks": 5, "positions": 3}
"""Few passes, where a method lets one choose."""
LAYER = "features.1"
"""Before its ReLU: none of its channels is constant, so that every mask is asked."""
SIDE = 32


def quick(name: str, **given: object) -> MethodSpec:
    known = {parameter.name for parameter in METHODS[name].parameters()}
    return parse_method(name, {key: value for key, value in QUICK.items() if key in known} | given)


SPECS = [*map(quick, METHODS), IntegratedGradCam(steps=3, variant="reference")]


def convolutional(name: str = "perceptron") -> Engine:
    return Engine(build(name, 2), preprocessing=PREPROCESSING, layer=LAYER)


def transformer() -> Engine:
    torch.manual_seed(0)
    module = VisionTransformer(SIDE, 8, 2, 2, hidden_dim=8, mlp_dim=12, num_classes=4)
    nn.init.normal_(module.heads.head.weight)  # torchvision sets it to zero: so would be every gradient
    size = Preprocessing(SIDE, (SIDE, SIDE), (0.45, 0.5, 0.55), (0.25, 0.3, 0.2))
    return Engine(module, preprocessing=size)


def cost(engine: Engine, spec: MethodSpec, **options: object) -> int:
    return engine.explain(picture(2), methods=[spec], targets=[3, 1], **options).cost.queries


def passes(engine: Engine, spec: MethodSpec) -> int:
    return spec.passes(engine.info.layer(""), 2, engine.info.has_zero)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_passes_are_what_a_reply_counts(spec):
    engine = transformer() if spec.needs == "ViT" else convolutional()
    if spec.needs == "GAP head":
        engine = Engine(build("pooled", 2), preprocessing=PREPROCESSING)
    cost(engine, spec)  # now tails and attentions have been found for all that follow
    seen: list[int] = []
    with engine.network.module.register_forward_pre_hook(lambda _module, inputs: seen.append(len(inputs[0]))):
        counted = cost(engine, spec)
    assert counted == passes(engine, spec)
    first = 1  # whatever comes behind it, such as a ranking
    assert sum(seen) - first == (0 if spec.kind == "tail" else counted)  # a tail is no whole pass


@pytest.mark.parametrize("outputs", ["value", "embedding"])
@pytest.mark.parametrize(
    "spec", [spec for spec in (*SPECS, ScoreCam("paper"), ScoreCam("logit")) if not spec.needs], ids=str
)
def test_passes_are_what_a_reply_counts_where_scores_have_no_zero(spec, outputs):
    engine = Engine(build("perceptron", 2), preprocessing=PREPROCESSING, layer=LAYER, outputs=outputs)
    numbers = ["up:0", "up:1"] if outputs == "value" else [Vector(np.eye(CLASSES)[row]) for row in range(2)]
    counted = engine.explain(picture(2), methods=[spec], targets=numbers).cost.queries
    assert counted == passes(engine, spec)


@pytest.mark.parametrize("outputs", OUTPUTS)
def test_a_model_says_as_its_score_does_whether_scores_have_a_zero(outputs):
    assert ModelInfo("", "", (), (1, 1), (), "", outputs=outputs).has_zero == SCORES[outputs].has_zero


@pytest.mark.parametrize("spec", [ScoreCam(), GroupCam(groups=20), SsCam(samples=2), IsCam(samples=2)], ids=str)
def test_constant_masks_are_not_asked(spec):
    module = silence(build("pooled", 2), "features.7", slice(0, 5), value=-1.0)
    engine = Engine(module, preprocessing=PREPROCESSING, layer="features.8")
    assert 0 < cost(engine, spec) < passes(engine, spec)


def test_ablation_needs_no_pass_where_it_has_a_closed_form():
    assert cost(convolutional("pooled"), AblationCam(), layer="features.8") == 0


@pytest.mark.parametrize(
    ("spec", "channels", "targets", "expected"),
    [
        (SmoothGrad(), 40, 3, 25),
        (Xrai(), 40, 3, 200),
        (IntegratedGradCam(), 40, 3, 21),
        (ScoreCam(), 40, 3, 40),
        (SsCam(), 40, 3, 1400),
        (GroupCam(groups=8), 40, 3, 25),
        (AblationCam(), 40, 3, 41),
    ],
    ids=str,
)
def test_passes(spec, channels, targets, expected):
    assert spec.passes(Layer("layer", channels, 7, 7), targets) == expected


def test_cost_of_the_defaults_is_known_where_they_fit():
    assert GroupCam.default_passes(Layer("layer", 32, 7, 7)) == 33
    assert GroupCam.default_passes(Layer("layer", 31, 7, 7)) is None
    assert ScoreCam.default_passes(Layer("layer", 31, 7, 7)) == 31
    assert ScoreCam.default_passes(Layer("layer", 31, 7, 7), has_zero=False) == 32


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_map_depends_on_the_layer_where_the_method_says_so(spec):
    if spec.needs == "ViT":
        engine, layers = transformer(), ("encoder.layers.encoder_layer_0.ln_1", "encoder.layers.encoder_layer_1.ln_1")
    elif spec.needs == "GAP head":
        pooled = Engine(build("pooled", 2), preprocessing=PREPROCESSING)
        with pytest.raises(Unsupported):
            pooled.explain(picture(2), methods=[spec], layer="features.3")
        return
    else:
        engine, layers = convolutional(), ("features.3", "features.8")
    first, second = (engine.explain(picture(2), methods=[spec], targets=[3], layer=layer).maps[0] for layer in layers)
    assert not first.degenerate
    assert np.allclose(first.array, second.array, rtol=0, atol=1e-6) != spec.uses_layer


def test_layers_that_do_not_matter_are_those_of_methods_without_one():
    without = {name for name, spec in METHODS.items() if not spec.uses_layer}
    of_input = {name for name, spec in METHODS.items() if spec.resolution == "input"}
    assert without == (of_input - {"guided_grad_cam"}) | {"attention_rollout", "gradient_weighted_attention", "le_grad"}

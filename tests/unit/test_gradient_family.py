"""The gradient family: its identities, what may not change a map, what it costs, and input with nothing to see."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest
import torch
from asked import asked_each
from reference.models import CHANNELS, CLASSES, HEIGHT, MODELS, PREPROCESSING, WIDTH, build, picture, silence
from torch import nn

from camserve import Engine
from camserve.errors import InvalidOption
from camserve.methods import (
    METHODS,
    EigenCam,
    GradCam,
    GradCamPlusPlus,
    GroupCam,
    HiresCam,
    IntegratedGradCam,
    LayerCam,
    MethodSpec,
    SmoothGradCamPlusPlus,
    XgradCam,
    parse_method,
)
from camserve.saliency.capture import Capture, capture
from camserve.saliency.eigen import principal_scores
from camserve.saliency.gradient import quotient
from camserve.saliency.noise import gaussian
from camserve.types import Item, ItemResult, Layer, Target, Task
from camserve.worker.executor import Executor
from camserve.worker.network import Network

FAMILY: dict[str, MethodSpec] = {
    "hires_cam": HiresCam(),
    "xgrad_cam": XgradCam(),
    "layer_cam": LayerCam(),
    "grad_cam_plus_plus": GradCamPlusPlus(),
    "grad_cam_plus_plus_product": GradCamPlusPlus(variant="product"),
    "smooth_grad_cam_plus_plus": SmoothGradCamPlusPlus(samples=10),
    "integrated_grad_cam": IntegratedGradCam(),
    "integrated_grad_cam_reference": IntegratedGradCam(variant="reference"),
    "eigen_cam": EigenCam(),
}
INTEGRATED = ("integrated_grad_cam", "integrated_grad_cam_reference")
FLOAT64 = {"rtol": 1e-9, "atol": 1e-11}
"""The order of a few thousand float64 additions, relative to the map's maximum."""
FLOAT32 = {"rtol": 0, "atol": 1e-4}
"""Convolutions of another batch size add in another order."""
FLOAT32_MAP = {"rtol": 0, "atol": 1e-6}
"""Float32 sums in another order, scaled to [0, 1]."""


def executor(name: str = "perceptron", dtype: torch.dtype = torch.float64, micro_batch: int = 8) -> Executor:
    return Executor(Network(build(name, 2, dtype), preprocessing=PREPROCESSING, micro_batch=micro_batch))


def partial(runner: Executor, spec: MethodSpec, span: tuple[int, int] | None = None, layer: str = "features.3"):
    """At a layer with two ReLUs and a max pool behind it, so that gradients depend on the image."""
    start, stop = span or (0, spec.queries(Layer("layer", CHANNELS, 7, 7), 2))
    item = Item(picture(2), (Target(5), Target(1)), (Task(0, spec, start, stop, layer),))
    (outcome,) = runner.execute([item]).outcomes
    assert isinstance(outcome, ItemResult), outcome
    assert np.isfinite(outcome.partials[0].sums).all()
    return outcome.partials[0]


def maps(name: str, layer: str, *methods: MethodSpec, seed: int = 2, dtype=torch.float64) -> list[list[np.ndarray]]:
    """For each method the maps of all classes."""
    engine = Engine(build(name, seed, dtype), preprocessing=PREPROCESSING, layer=layer)
    found = engine.explain(picture(seed), methods=list(methods), targets=[*range(CLASSES)]).maps
    arrays = [result.array for result in found]
    assert any(array.any() for array in arrays)
    return [arrays[first : first + CLASSES] for first in range(0, len(arrays), CLASSES)]


# What may not change a map


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("method", FAMILY)
def test_map_does_not_depend_on_the_micro_batch(method, dtype):
    whole, *others = (partial(executor(dtype=dtype, micro_batch=size), FAMILY[method]).sums for size in (64, 1, 3))
    scale = np.abs(whole).max()
    assert scale > 0
    for other in others:
        np.testing.assert_allclose(other / scale, whole / scale, **(FLOAT64 if dtype == torch.float64 else FLOAT32))


@pytest.mark.parametrize("shards", [1, 2, 7])
@pytest.mark.parametrize("method", INTEGRATED)
def test_map_does_not_depend_on_sharding(method, shards):
    runner, spec = executor(), FAMILY[method]
    whole = partial(runner, spec)
    cuts = np.linspace(0, spec.queries(Layer("layer", CHANNELS, 7, 7), 2), shards + 1).round().astype(int).tolist()
    parts = [partial(runner, spec, span) for span in itertools.pairwise(cuts)]
    merged = functools.reduce(lambda a, b: a.merge(b), reversed(parts))
    scale = np.abs(whole.sums).max()
    np.testing.assert_allclose(merged.sums / scale, whole.sums / scale, **FLOAT64)
    black = shards - 1 if method == "integrated_grad_cam" else 0  # each shard looks at the black image again
    assert merged.queries == whole.queries + black


@pytest.mark.parametrize("method", INTEGRATED)
def test_an_empty_shard_adds_nothing_and_costs_nothing(method):
    nothing = partial(executor(), FAMILY[method], (3, 3))
    assert not nothing.sums.any()
    assert nothing.queries == 0


@pytest.mark.parametrize("micro_batch", [1, 3])
@pytest.mark.parametrize("method", FAMILY)
def test_no_pass_is_larger_than_the_micro_batch_and_none_leaves_a_hook(method, micro_batch):
    runner, sizes = executor(micro_batch=micro_batch), []
    with runner.network.module.register_forward_pre_hook(lambda _module, inputs: sizes.append(len(inputs[0]))):
        cost = partial(runner, FAMILY[method]).queries
    assert max(sizes) <= micro_batch
    assert sum(sizes) == 1 + cost
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in runner.network.module.modules())


@pytest.mark.parametrize(
    ("spec", "asked", "made"),
    [
        (HiresCam(), 0, 0),
        (EigenCam(), 0, 0),
        (SmoothGradCamPlusPlus(), 25, 25),
        (IntegratedGradCam(), 20, 21),  # and the black image
        (IntegratedGradCam(variant="reference"), 50, 50),
        (IntegratedGradCam(steps=7), 7, 8),
    ],
    ids=str,
)
def test_cost_in_queries(spec, asked, made):
    assert spec.queries(Layer("layer", CHANNELS, 7, 7), targets=3) == asked
    assert partial(executor(), spec).queries == made


# Identities


@pytest.mark.parametrize("name", ["pooled", "reused"])
@pytest.mark.parametrize("seed", range(3))
def test_grad_cam_hires_cam_and_xgrad_cam_are_cam_on_pooled_linear_heads(name, seed):
    specs = [parse_method("cam"), GradCam(), HiresCam(), XgradCam()]
    cam, *others = maps(name, MODELS[name][1], *specs, seed=seed)
    for other in others:
        # XGrad-CAM's 1e-7 beside a channel's sum: 1e-6 of a weight for the faintest channels here.
        np.testing.assert_allclose(other, cam, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "agree"), [("pooled", True), ("reused", True), ("perceptron", False)])
def test_both_variants_of_grad_cam_plus_plus_agree_where_gradients_do_not_vary_over_space(name, agree):
    module = build(name, 2, torch.float64)
    last = [child for child in module.modules() if isinstance(child, nn.Linear)][-1]
    with torch.no_grad():
        last.weight *= 1e4  # so that the variants' eps vanish beside the squares of the gradients
    engine = Engine(module, preprocessing=PREPROCESSING, layer=MODELS[name][1])
    specs = [GradCamPlusPlus(), GradCamPlusPlus(variant="product")]
    paper, product = engine.explain(picture(2), methods=specs, targets=[5]).maps
    assert not paper.degenerate
    differ = np.abs(paper.array - product.array).max()
    assert (differ < 1e-6) if agree else (differ > 1e-2)


def test_layer_cam_is_hires_cam_where_no_gradient_is_negative():
    module = build("pooled", 2, torch.float64)
    with torch.no_grad():
        module.head.weight.abs_()
    engine = Engine(module, preprocessing=PREPROCESSING, layer="features.8")
    hires, layer = engine.explain(picture(2), methods=["hires_cam", "layer_cam"], targets=[3]).maps
    assert not hires.degenerate
    np.testing.assert_array_equal(hires.array, layer.array)


@pytest.mark.parametrize("name", MODELS)
def test_smooth_grad_cam_plus_plus_without_noise_is_grad_cam_plus_plus(name):
    plain, smooth, noisy = maps(
        name,
        MODELS[name][1],
        GradCamPlusPlus(),
        SmoothGradCamPlusPlus(sigma=0, samples=7),
        SmoothGradCamPlusPlus(samples=7),
    )
    np.testing.assert_allclose(smooth, plain, **FLOAT32_MAP)
    assert (np.abs(np.array(noisy) - np.array(plain)).max() > 1e-3) == (name in ("early", "signed"))


def test_integrated_grad_cam_in_one_step_is_grad_cam_of_the_difference_to_black():
    """PAPER's only step is the image itself; a layer that is zero for black makes it Grad-CAM."""
    module = build("perceptron", 2, torch.float64)
    black = torch.tensor([-m / s for m, s in zip(PREPROCESSING.mean, PREPROCESSING.std, strict=True)])
    module.features[0].register_forward_pre_hook(lambda _m, inputs: inputs[0] - black.to(inputs[0])[:, None, None])
    with torch.no_grad():
        for child in module.features:
            if isinstance(child, nn.Conv2d):
                child.bias.zero_()
    module.features[1] = nn.Identity()
    engine = Engine(module, preprocessing=PREPROCESSING, layer="features.8")
    specs = [GradCam(), IntegratedGradCam(steps=1), IntegratedGradCam(steps=1, variant="reference")]
    plain, paper, reference = engine.explain(picture(2), methods=specs, targets=[5], size="layer").maps
    assert not plain.degenerate
    np.testing.assert_allclose(paper.array, plain.array, **FLOAT32_MAP)
    assert reference.value_range[1] < 1e-6 * plain.value_range[1]  # its only step is the black image, but for rounding


# Closed form


GRADIENTS = [HiresCam(), GradCam(), XgradCam(), LayerCam(), GradCamPlusPlus(), GroupCam(groups=4)]
NOISY = [SmoothGradCamPlusPlus(samples=10), IntegratedGradCam(steps=3)]


class Pooled(nn.Module):
    """Swin's way: channels last, which the layer returns; then the head of a pooled linear network."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm, self.head = nn.Conv2d(3, 8, 4, stride=4), nn.LayerNorm(8), nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.patch(x).permute(0, 2, 3, 1)).mean(dim=(1, 2)))


def batch(*seeds: int) -> torch.Tensor:
    return torch.from_numpy(np.stack([picture(seed) for seed in seeds]))


def counted(monkeypatch) -> list[torch.Tensor]:
    """What is differentiated from now on."""
    differentiated, grad = [], torch.autograd.grad
    monkeypatch.setattr(
        torch.autograd, "grad", lambda y, *args, **options: differentiated.append(y) or grad(y, *args, **options)
    )
    return differentiated


def both_ways(network: Network, layer: str, x: torch.Tensor) -> tuple[Capture, Capture]:
    """Of the network that knows its classifier, and of one that does not."""
    found = network.capture(x, layer)
    return found, dataclasses.replace(found, _classifier=None)


@pytest.mark.parametrize(
    ("module", "layer"),
    [
        (build("pooled", 2, torch.float64), "features.8"),
        (build("reused", 2, torch.float64), "act"),
        (Pooled().double().eval(), "norm"),
    ],
    ids=["pooled", "reused", "channels last"],
)
def test_closed_form_is_what_autograd_finds(monkeypatch, module, layer):
    network = Network(module, preprocessing=PREPROCESSING)
    closed, backward = both_ways(network, layer, network.normalise(batch(0, 1, 2)))
    classes = torch.arange(CLASSES).expand(3, -1)
    expected, differentiated = backward.gradients(asked_each(classes)), counted(monkeypatch)
    found = closed.gradients(asked_each(classes))
    assert not differentiated
    assert found.shape == expected.shape
    # One division instead of a chain of them: a few ulp, 1e-16 of the largest.
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("name", "layer"), [("pooled", "features.7"), ("signed", "features.7"), ("perceptron", "features.8")]
)
def test_other_heads_are_differentiated(monkeypatch, name, layer):
    network = Network(build(name, 2, torch.float64), preprocessing=PREPROCESSING)
    captured, _ = both_ways(network, layer, network.normalise(batch(0, 1)))
    differentiated = counted(monkeypatch)
    captured.gradients(asked_each([[0, 3], [1, 2]]))
    assert len(differentiated) == 2  # one for each column of classes


def test_an_image_with_another_head_has_its_own_gradients():
    """Where the layer is positive, the ReLU behind it does nothing: for one image of the batch, not for the other."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    ).double()
    with torch.no_grad():
        module[0].weight.abs_()
        module[0].bias.zero_()
    x = torch.rand(2, 3, 5, 6, dtype=torch.float64) + 0.1
    x[1] -= 0.5
    classes = torch.tensor([[2], [2]])
    alone = [capture(module, one[None], "0", classifier=module[4]).gradients(asked_each(classes[:1])) for one in x]
    together = capture(module, x, "0", classifier=module[4]).gradients(asked_each(classes))
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=0)
    assert (alone[0] == alone[0][..., :1, :1]).all()
    assert not (alone[1] == alone[1][..., :1, :1]).all()


@pytest.mark.parametrize(("name", "runs"), [("pooled", False), ("perceptron", True)])
@pytest.mark.parametrize("spec", [*GRADIENTS, *NOISY], ids=str)
def test_no_backward_pass_runs_behind_a_pooled_linear_head(monkeypatch, name, runs, spec):
    engine = Engine(build(name, 2), preprocessing=PREPROCESSING, layer="features.8")
    differentiated = counted(monkeypatch)
    engine.explain(picture(2), methods=[spec], targets=[5, 1])
    assert bool(differentiated) == runs


# Nothing to see


@pytest.mark.parametrize("value", [0.0, 0.7, -1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("method", FAMILY)
def test_a_constant_layer_gives_zeros_and_says_so(method, dtype, value):
    """All zero, all the same, and nowhere positive before the ReLU."""
    module = silence(build("pooled", 2, dtype), "features.7", slice(None), value)
    engine = Engine(module, preprocessing=PREPROCESSING)
    for layer in ("features.7", "features.8"):
        for result in engine.explain(picture(2), methods=[FAMILY[method]], targets=[0, 5], layer=layer).maps:
            assert result.degenerate
            assert result.complete
            assert not result.array.any()
            assert np.isfinite(result.value_range).all()


@pytest.mark.parametrize("pixels", [0, 90, 255])
@pytest.mark.parametrize("name", MODELS)
def test_a_blank_image_gives_no_nan(name, pixels):
    engine = Engine(build(name, 2), preprocessing=PREPROCESSING, layer=MODELS[name][1])
    blank = np.full((HEIGHT, WIDTH, 3), pixels, dtype=np.uint8)
    for result in engine.explain(blank, methods=list(FAMILY.values()), targets=[*range(CLASSES)]).maps:
        assert np.isfinite(result.array).all()
        if pixels == 0 and result.method == IntegratedGradCam():
            assert result.degenerate  # there is no way to go


def test_the_reference_variant_of_integrated_grad_cam_sees_a_black_image_all_the_way():
    engine = Engine(build("perceptron", 2), preprocessing=PREPROCESSING, layer="features.8")
    black = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    methods = [GradCam(), IntegratedGradCam(variant="reference")]
    maps = engine.explain(black, methods=methods, targets=[*range(CLASSES)]).maps
    assert not all(result.degenerate for result in maps)
    for plain, integrated in zip(maps[:CLASSES], maps[CLASSES:], strict=True):
        np.testing.assert_allclose(integrated.array, plain.array, **FLOAT32)


def test_a_denominator_of_zero_gives_zero():
    found = quotient(torch.tensor([1.0, 0.0, -3.0, 2.0]), torch.tensor([0.0, 0.0, 2.0, -0.0]))
    assert found.tolist() == [0.0, 0.0, -1.5, 0.0]


@pytest.mark.parametrize("shape", [(9, 4, 5), (30, 4, 5)], ids=["over channels", "over places"])
def test_channels_that_vary_by_rounding_alone_are_no_component(shape):
    constant = torch.rand(shape[0], 1, 1, generator=torch.Generator().manual_seed(0)).expand(shape)
    rounded = constant * (1 + 1e-7 * torch.rand(shape, generator=torch.Generator().manual_seed(1)))
    assert rounded.std(dim=(1, 2)).max() > 0
    assert not principal_scores(rounded).any()
    assert not principal_scores(constant.double()).any()
    varied = constant * (1 + 1e-4 * torch.rand(shape, generator=torch.Generator().manual_seed(1)))
    assert principal_scores(varied).any()


# Noise


def test_noise_depends_on_seed_and_number_alone():
    like = torch.zeros(3, 5, 7, dtype=torch.float64)
    whole = gaussian(4, range(9), like)
    assert whole.shape == (9, 3, 5, 7)
    assert whole.dtype == torch.float64
    parts = torch.cat([gaussian(4, range(2), like), gaussian(4, range(2, 9), like)])
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)
    torch.testing.assert_close(gaussian(4, range(5, 6), like.float()).double(), whole[5:6], rtol=0, atol=0)
    assert not torch.equal(gaussian(5, range(9), like), whole)
    assert len({sample.sum().item() for sample in whole}) == 9


def test_noise_is_standard_normal_and_samples_do_not_resemble_each_other():
    noise = gaussian(0, range(64), torch.zeros(50, 50, dtype=torch.float64)).flatten(1)  # 160 000 values
    assert abs(noise.mean().item()) < 0.01  # four standard errors
    assert abs(noise.var().item() - 1) < 0.015
    assert abs((noise**4).mean().item() - 3) < 0.1  # 0 for no heavier or lighter tails than normal
    correlation = torch.corrcoef(noise) - torch.eye(64)
    assert correlation.abs().max() < 0.1  # five standard errors of 1 / sqrt(2500)


# Options


@pytest.mark.parametrize(
    ("method", "value", "message"),
    [
        ("grad_cam_plus_plus", {"variant": "torchcam"}, "variant must be one of paper, product, got 'torchcam'"),
        ("smooth_grad_cam_plus_plus", {"samples": 0}, r"samples must be 1\.\.1000, got 0"),
        ("smooth_grad_cam_plus_plus", {"sigma": -0.1}, r"sigma must be 0\.\.1, got -0.1"),
        ("smooth_grad_cam_plus_plus", {"seed": -1}, r"seed must be 0\.\..*, got -1"),
        ("integrated_grad_cam", {"steps": 1001}, r"steps must be 0\.\.1000, got 1001"),
        ("integrated_grad_cam", {"variant": "mean"}, "variant must be one of paper, reference, got 'mean'"),
        ("eigen_cam", {"seed": 1}, "unknown parameter 'seed'; it has no parameters"),
    ],
    ids=str,
)
def test_a_value_outside_its_range_is_refused_with_range_and_value(method, value, message):
    assert method in METHODS
    with pytest.raises(InvalidOption, match=f"{method}: {message}"):
        parse_method(method, value)

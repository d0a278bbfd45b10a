"""Every method there is: what may not change its map, what it may not leave behind, what it makes of nothing."""

import functools
import itertools
import random
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from asked import BFLOAT16
from reference.models import CHANNELS, HEIGHT, MODELS, PREPROCESSING, WIDTH, build, silence
from reference.test_attention_against_twins import PREPROCESSING as SQUARE
from reference.test_attention_against_twins import transformer
from reference.test_backprop_against_twins import rough
from torch import nn

from camserve import Engine
from camserve.errors import INTERNAL_MESSAGE, Internal
from camserve.finalise.finish import finished
from camserve.methods import (
    METHODS,
    AblationCam,
    AttentionRollout,
    Cam,
    Deconvolution,
    DRise,
    EigenCam,
    GradCam,
    GradCamPlusPlus,
    GradientWeightedAttention,
    GroupCam,
    GuidedBackprop,
    GuidedGradCam,
    HiresCam,
    IntegratedGradCam,
    IntegratedGradients,
    IsCam,
    LayerCam,
    LeGrad,
    MethodSpec,
    Occlusion,
    ReciproCam,
    Rise,
    ScoreCam,
    SmoothGrad,
    SmoothGradCamPlusPlus,
    SsCam,
    XgradCam,
    Xrai,
)
from camserve.saliency import xrai
from camserve.types import Item, ItemResult, Layer, Partial, SaliencyMap, Target, Task
from camserve.worker.executor import Executor
from camserve.worker.network import Network

SPECS: tuple[MethodSpec, ...] = (
    Cam(),
    GradCam(),
    HiresCam(),
    GradCamPlusPlus(),
    GradCamPlusPlus(variant="product"),
    SmoothGradCamPlusPlus(samples=7),
    XgradCam(),
    LayerCam(),
    IntegratedGradCam(steps=8),
    IntegratedGradCam(steps=8, variant="reference"),
    EigenCam(),
    GuidedBackprop(),
    Deconvolution(),
    GuidedGradCam(),
    IntegratedGradients(steps=9),
    SmoothGrad(samples=7),
    Xrai(steps=5),
    GroupCam(groups=6),
    GroupCam(groups=6, variant="reference"),
    GroupCam(groups=6, grouping="kmeans"),
    GroupCam(groups=6, grouping="agglomerative"),
    ScoreCam(),
    ScoreCam(variant="paper"),
    ScoreCam(variant="logit", normalise="before"),
    SsCam(samples=2),
    IsCam(samples=3),
    Rise(masks=9, grid=4),
    DRise(masks=9, grid=5),
    AblationCam(),
    ReciproCam(),
    ReciproCam(kernel="gaussian"),
    Occlusion(positions=4),
    AttentionRollout(),
    GradientWeightedAttention(),
    LeGrad(),
)
"""Every method with few samples, and every variant that is computed in another way."""
TARGETS = (3, 1)
FLOAT64 = {"rtol": 1e-9, "atol": 1e-10}
"""Of the map's range: convolutions of another batch size, and sums of a few hundred terms, add in another order."""


@pytest.fixture(autouse=True)
def one_segmentation(monkeypatch):
    """XRAI's six take longer than all the other methods together."""
    monkeypatch.setattr(xrai, "SCALES", (250,))


def label(spec: MethodSpec) -> str:
    chosen = [getattr(spec, parameter.name) for parameter in spec.parameters() if parameter.choices]
    defaults = [parameter.default for parameter in spec.parameters() if parameter.choices]
    return "-".join([spec.name, *(one for one, default in zip(chosen, defaults, strict=True) if one != default)])


each_method = pytest.mark.parametrize("spec", SPECS, ids=label)


def home(spec: MethodSpec) -> str:
    """A network that has what the method needs."""
    return {"GAP head": "pooled", "ViT": "transformer"}.get(spec.needs, "perceptron")


def served(name: str) -> list[MethodSpec]:
    """What a network can be asked."""
    able = {"pooled": ("", "ReLU", "GAP head"), "perceptron": ("", "ReLU"), "transformer": ("", "ViT")}[name]
    return [spec for spec in SPECS if spec.needs in able]


def network(name: str, micro_batch: int = 8) -> Network:
    """In float64."""
    if name == "transformer":
        return Network(transformer(), preprocessing=SQUARE, micro_batch=micro_batch)
    return Network(build(name, 2, torch.float64), preprocessing=PREPROCESSING, micro_batch=micro_batch)


def item(
    on: Network, specs: Sequence[MethodSpec], seed=2, targets=TARGETS, span=(0, 10_000), layer="", **options
) -> Item:
    """The methods' queries `span`, of a picture of the network's input size."""
    image = rough(seed)[:, : on.info.input_size[1]]
    asked = on.info.layer(layer)
    totals = [spec.queries(asked, len(targets)) for spec in specs]
    tasks = [
        Task(place, spec, min(span[0], total), min(span[1], total), layer)
        for place, (spec, total) in enumerate(zip(specs, totals, strict=True))
    ]
    return Item(image, tuple(map(Target, targets)), tuple(tasks), **options)


def partials(on: Network, items: Sequence[Item]) -> list[tuple[Partial, ...]]:
    """Of each item of one step, one for each method."""
    outcomes = Executor(on).execute(items).outcomes
    for outcome in outcomes:
        assert isinstance(outcome, ItemResult), outcome
    return [outcome.partials for outcome in outcomes]


def alone(on: Network, spec: MethodSpec, **options) -> Partial:
    return partials(on, [item(on, [spec], **options)])[0][0]


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    """Of each target, relative to its map's range."""
    scale = np.abs(expected).max(axis=(1, 2), keepdims=True)
    scale[scale == 0] = 1
    np.testing.assert_allclose(found / scale, expected / scale, **FLOAT64)


def test_no_method_is_forgotten():
    assert {type(spec) for spec in SPECS} == set(METHODS.values())


# What may not change a map


@each_method
def test_a_map_does_not_depend_on_the_micro_batch(spec):
    expected, *others = (alone(network(home(spec), size), spec) for size in (64, 1, 3))
    assert np.abs(finished(spec, expected)).max() > 0
    for other in others:
        assert_same(finished(spec, other), finished(spec, expected))
        assert other.queries == expected.queries


SHARDED = [spec for spec in SPECS if spec.queries(Layer("layer", CHANNELS, 10, 12), len(TARGETS))]
each_sharded_method = pytest.mark.parametrize("spec", SHARDED, ids=label)


def shards(on: Network, spec: MethodSpec, parts: int | None) -> list[tuple[int, int]]:
    """Ranges of all its queries, as even as can be; None: of one query each."""
    total = spec.queries(on.info.layer(""), len(TARGETS))
    cuts = np.linspace(0, total, (parts or total) + 1).round().astype(int).tolist()
    return list(itertools.pairwise(cuts))


def merged(found: Sequence[Partial]) -> Partial:
    return functools.reduce(lambda one, other: one.merge(other), found)


@each_sharded_method
def test_a_map_does_not_depend_on_sharding(spec):
    on = network(home(spec))
    whole = alone(on, spec)
    for parts in (1, 2, 7):
        found = [alone(on, spec, span=span) for span in shards(on, spec, parts)]
        for seed in range(5):
            random.Random(seed).shuffle(found)
            assert_same(finished(spec, merged(found)), finished(spec, whole))


@each_sharded_method
def test_any_permutation_of_queries_gives_the_same_map(spec):
    """All queries in one step, each an item of its own, in any order."""
    on = network(home(spec), micro_batch=5)
    items = [item(on, [spec], span=span) for span in shards(on, spec, None)]
    random.Random(0).shuffle(items)
    together = merged([one for (one,) in partials(on, items)])
    assert_same(finished(spec, together), finished(spec, alone(on, spec)))


@each_sharded_method
def test_an_empty_shard_adds_nothing(spec):
    assert not alone(network(home(spec)), spec, span=(3, 3)).sums.any()


@pytest.mark.parametrize("name", ["pooled", "perceptron", "transformer"])
def test_a_map_does_not_depend_on_its_neighbours_in_the_step(name):
    """Every method beside every other one, of other images, another layer and in another precision."""
    on = network(name)
    layer = on.info.layers[0].name
    items = [item(on, [spec], seed) for seed, spec in enumerate(served(name))]
    items.insert(3, item(on, [ScoreCam(), GroupCam(groups=3)], precision=BFLOAT16))
    items.insert(9, item(on, [GradCam(), Rise(masks=4)], layer=layer))
    together = partials(on, items)
    for place, one in enumerate(items):
        if one.precision == "exact":
            ((expected, *_),) = partials(on, [one])
            spec = one.tasks[0].method
            assert_same(finished(spec, together[place][0]), finished(spec, expected))


@pytest.mark.parametrize("name", ["pooled", "perceptron", "transformer"])
def test_methods_of_one_request_do_not_touch_each_other(name):
    on, specs = network(name), served(name)
    (together,) = partials(on, [item(on, specs)])
    assert [partial.position for partial in together] == list(range(len(specs)))
    for found, spec in zip(together, specs, strict=True):
        assert_same(finished(spec, found), finished(spec, alone(on, spec)))


@each_method
def test_a_map_does_not_depend_on_the_other_targets(spec):
    on, targets = network(home(spec)), (3, 1, 0)
    expected = [finished(spec, alone(on, spec, targets=(target,)))[0] for target in targets]
    for order in ([0, 1, 2], [2, 1, 0]):
        found = finished(spec, alone(on, spec, targets=[targets[place] for place in order]))
        assert_same(found, np.stack([expected[place] for place in order]))


def modes() -> Iterator[tuple[str, object]]:
    yield "no_grad", torch.no_grad()
    yield "inference_mode", torch.inference_mode()
    yield "autocast", torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("name", ["pooled", "perceptron", "transformer"])
def test_the_callers_modes_do_not_matter(name):
    """In float32, because autocast leaves float64 alone."""
    module = network(name).module.float()
    on = Network(module, preprocessing=network(name).preprocessing)
    (expected,) = partials(on, [item(on, served(name))])
    for _, mode in modes():
        with mode:
            (found,) = partials(on, [item(on, served(name))])
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one.sums, other.sums)


# What may not be left behind


class Trouble:
    """A hook that counts the calls of its module, and raises at one of them."""

    def __init__(self, fails_at: int = 0) -> None:
        self.calls, self.fails_at = 0, fails_at

    def __call__(self, *_: object) -> None:
        self.calls += 1
        if self.calls == self.fails_at:
            raise RuntimeError("secret detail")


def state(module: nn.Module) -> list:
    """Everything that a run could leave on a module, its weights and statistics included."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    found: list = [
        (name, child.training, list(vars(child)), *(len(getattr(child, hook)) for hook in hooks))
        for name, child in module.named_modules()
    ]
    found += [(name, p.requires_grad, p.grad is None, p._version) for name, p in module.named_parameters()]
    found += [(name, value.sum().item()) for name, value in module.state_dict().items()]
    found.append((torch.is_grad_enabled(), torch.backends.cudnn.conv.fp32_precision))
    return found


@each_method
def test_nothing_is_left_on_the_module(spec):
    """After success, and after its first, its second and its last pass failed."""
    on = network(home(spec), micro_batch=2)
    module, counter = on.module.train(), Trouble()
    next(module.children()).eval()  # this one is in another mode than the others, and frozen, and must stay so
    next(module.parameters()).requires_grad_(False)
    head = [child for child in module.modules() if isinstance(child, nn.Linear)][-1]
    with head.register_forward_pre_hook(counter):
        before = state(module)
        alone(on, spec)
        assert state(module) == before
        counter.calls = 0
        alone(on, spec)  # now that the network has been traced
    for fails_at in {1, min(2, counter.calls), counter.calls}:
        with head.register_forward_pre_hook(Trouble(fails_at)):
            (outcome,) = Executor(on).execute([item(on, [spec])]).outcomes
            assert isinstance(outcome, Internal)
            assert str(outcome) == INTERNAL_MESSAGE
            assert state(module) == before
    assert alone(on, spec).sums.any()  # and all is well again


@pytest.mark.parametrize("place", [0, 5, 9], ids=["before the layer", "between", "behind the layer"])
@pytest.mark.parametrize("fails_at", [1, 2, 3], ids=["first forward", "first queries", "middle of the queries"])
def test_nothing_is_left_wherever_a_pass_fails(fails_at, place):
    on = network("perceptron", micro_batch=2)
    module = on.module.train()
    module.features.insert(place, nn.Identity())
    with module.features[place].register_forward_pre_hook(Trouble(fails_at)):
        before = state(module)
        (outcome,) = Executor(on).execute([item(on, [ScoreCam()], layer="features.4")]).outcomes
        assert isinstance(outcome, Internal)
        assert state(module) == before


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_left_on_whatever_network(name, frozen):
    module = build(name, 2).train().requires_grad_(not frozen)
    before = state(module)
    engine = Engine(module, preprocessing=PREPROCESSING, layer=MODELS[name][1])
    assert state(module) == before
    engine.explain(rough(2), methods=[GradCam(), GroupCam(groups=6), ScoreCam(), AblationCam()], targets=TARGETS)
    assert state(module) == before


@pytest.mark.parametrize("name", ["pooled", "perceptron", "transformer"])
def test_no_forward_pass_is_larger_than_the_micro_batch(name):
    """However many queries, targets, methods and items are asked."""
    micro_batch = 3
    on, sizes = network(name, micro_batch), list[int]()
    with on.module.register_forward_pre_hook(lambda _module, inputs: sizes.append(len(inputs[0]))):
        partials(on, [item(on, served(name), seed) for seed in range(2)])
        assert max(sizes) <= micro_batch
        partials(on, [item(on, [GradCam()], seed) for seed in range(10)])
    assert max(sizes) == micro_batch


# What is made of nothing


def explain(module: nn.Module, specs: Sequence[MethodSpec], image: np.ndarray, layer: str = "") -> list[SaliencyMap]:
    """Maps of both targets: finite, in [0, 1], and flagged exactly where they are empty."""
    engine = Engine(module, preprocessing=SQUARE if image.shape[0] == image.shape[1] else PREPROCESSING)
    maps = engine.explain(image, methods=specs, targets=TARGETS, layer=layer).maps
    for result in maps:
        assert np.isfinite(result.array).all()
        assert np.isfinite(result.value_range).all()
        assert result.array.max() == (0 if result.degenerate else 1)
        assert result.array.min() == 0
    return list(maps)


def blank(name: str, value: int) -> np.ndarray:
    return np.full((HEIGHT, HEIGHT if name == "transformer" else WIDTH, 3), value, np.uint8)


@pytest.mark.parametrize("value", [0, 255])
@pytest.mark.parametrize("name", ["pooled", "perceptron", "transformer"])
def test_a_blank_image_gives_no_nan(name, value):
    """It need not give an empty map: convolutions see the image's border, and transformers where a patch lies."""
    explain(network(name).module.float(), served(name), blank(name, value))


class Homogeneous(nn.Sequential):
    """All places are alike to this network: it has no border, no stride and no pooling but the last."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"),
            nn.ReLU(),
            nn.Conv2d(8, CHANNELS, 3, padding=1, padding_mode="circular"),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(CHANNELS, 7),
        )


TELLS_PLACES_APART = {
    "smooth_grad": "its noisy copies of the image are not constant",
    "rise": "its masks are not constant, and a few of them do not show all places alike",
    "d_rise": "its masks are those of rise",
    "occlusion": "windows that the border cuts off hide less than the others",
    "recipro_cam-gaussian": "a place at the border has fewer neighbours that are shown with it",
    "attention_rollout": "patches have embeddings of their positions",
    "gradient_weighted_attention": "patches have embeddings of their positions",
    "le_grad": "patches have embeddings of their positions",
}
"""Methods that have a map of a constant image even where the network itself tells no places apart, and why."""


@each_method
def test_a_constant_image_gives_zeros_and_says_so(spec):
    name = home(spec)
    module = transformer() if name == "transformer" else Homogeneous().double().eval()
    maps = [one for value in (0, 127, 255) for one in explain(module, [spec], blank(name, value))]
    assert all(result.degenerate for result in maps) == (label(spec) not in TELLS_PLACES_APART)


WEIGHS_PLACES = {
    "rise": "scores are all the same, and the map is how often each place was shown",
    "d_rise": "its masks are those of rise",
    "attention_rollout": "it does not look at the logits",
}
"""Methods that have a map where nothing behind a dead layer depends on the image, and why."""
WEIGHS_PLACES_OF_A_CONSTANT_LAYER = {"hires_cam", "layer_cam", "recipro_cam"} | set(WEIGHS_PLACES)
"""Two multiply what is the same everywhere with gradients that are not; Recipro-CAM asks each place by itself."""


@pytest.mark.parametrize("value", [0.0, 0.7, -1.0], ids=["dead", "constant", "negative"])
@each_method
def test_a_dead_layer_gives_zeros_and_says_so(spec, value):
    """All zero, all the same, and nowhere positive before the ReLU. A transformer's head is dead instead."""
    on = network(home(spec))
    if home(spec) == "transformer":
        on.module.heads.head.weight.data.zero_()
    else:
        silence(on.module, "features.7", slice(None), value)
    maps = explain(on.module, [spec], item(on, [spec]).image)
    excepted = WEIGHS_PLACES_OF_A_CONSTANT_LAYER if value > 0 else WEIGHS_PLACES
    assert all(result.degenerate for result in maps) == (spec.name not in excepted)

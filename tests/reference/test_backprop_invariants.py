"""What may not change a map that goes back to the pixels, what may not be left behind, and what is refused."""

import functools
import itertools
import re

import numpy as np
import pytest
import torch
from reference.models import HEIGHT, PREPROCESSING, WIDTH, build, picture
from reference.test_backprop_against_twins import rough

from camserve import Engine
from camserve.errors import InvalidOption
from camserve.finalise.finish import finished
from camserve.methods import (
    METHODS,
    Deconvolution,
    GuidedBackprop,
    GuidedGradCam,
    IntegratedGradients,
    SmoothGrad,
    Xrai,
)
from camserve.types import Item, ItemResult, Layer, Partial, Target, Task
from camserve.worker.executor import Executor
from camserve.worker.network import Network

SPECS = {
    spec.name: spec
    for spec in (
        GuidedBackprop(),
        Deconvolution(),
        GuidedGradCam(),
        IntegratedGradients(steps=11),
        SmoothGrad(samples=7),
        Xrai(steps=6),
    )
}
FLOAT64 = {"rtol": 1e-9, "atol": 1e-12}
FLOAT32 = {"rtol": 1e-4, "atol": 1e-5}
"""Convolutions of another batch size add in another order."""


def executor(dtype=torch.float64, micro_batch: int = 8) -> Executor:
    return Executor(Network(build("perceptron", 2, dtype), preprocessing=PREPROCESSING, micro_batch=micro_batch))


def partial(runner: Executor, spec, targets=(5, 1), span=None, image=None):
    span = span or (0, spec.queries(Layer("layer", 20, 7, 7), len(targets)))
    image = rough(2) if image is None else image
    item = Item(image, tuple(map(Target, targets)), (Task(0, spec, *span, "features.8"),))
    (outcome,) = runner.execute([item]).outcomes
    assert isinstance(outcome, ItemResult), outcome
    return outcome.partials[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("method", SPECS)
def test_map_does_not_depend_on_the_micro_batch(method, dtype):
    results = [closed(method, partial(executor(dtype, size), SPECS[method])) for size in (64, 1, 3)]
    scale = np.abs(results[0]).max()
    assert scale > 0
    for other in results[1:]:
        tolerance = FLOAT64 if dtype == torch.float64 else FLOAT32
        np.testing.assert_allclose(other / scale, results[0] / scale, **tolerance)


def closed(method: str, found: Partial) -> np.ndarray:
    """Returns (K, H, W); for XRAI it is what is ranked, because the ranking is a second stage."""
    maps = finished(SPECS[method], found)
    assert maps.shape[1:] == (HEIGHT, WIDTH)
    return maps


CUT = ("integrated_gradients", "smooth_grad", "xrai")


@pytest.mark.parametrize("shards", [1, 2, 7])
@pytest.mark.parametrize("method", CUT)
def test_map_does_not_depend_on_sharding(method, shards):
    spec, runner = SPECS[method], executor()
    whole, total = partial(runner, spec), spec.queries(Layer("layer", 20, 7, 7), 2)
    cuts = np.linspace(0, total, shards + 1).round().astype(int).tolist()
    parts = [partial(runner, spec, span=span) for span in itertools.pairwise(cuts)]
    merged = functools.reduce(lambda a, b: a.merge(b), reversed(parts))
    np.testing.assert_allclose(closed(method, merged), closed(method, whole), **FLOAT64)
    assert merged.queries == whole.queries == total


@pytest.mark.parametrize("method", CUT)
def test_an_empty_shard_adds_nothing(method):
    empty = partial(executor(), SPECS[method], span=(4, 4))
    assert not empty.sums.any()
    assert empty.queries == 0


@pytest.mark.parametrize("method", SPECS)
def test_a_target_does_not_know_the_others(method):
    runner = executor()
    together = closed(method, partial(runner, SPECS[method], targets=(5, 1, 3)))
    for row, target in enumerate((5, 1, 3)):
        alone = closed(method, partial(runner, SPECS[method], targets=(target,)))
        np.testing.assert_allclose(alone[0], together[row], **FLOAT64)


@pytest.mark.parametrize(
    ("method", "images"),
    [
        ("guided_backprop", 1),
        ("deconvolution", 1),
        ("guided_grad_cam", 1),
        ("integrated_gradients", 11),
        ("smooth_grad", 7),
        ("xrai", 12),
    ],
)
def test_cost_counts_images_and_targets_share_them(method, images):
    assert partial(executor(), SPECS[method], targets=(5, 1, 3)).queries == images


@pytest.mark.parametrize("micro_batch", [1, 3, 8])
@pytest.mark.parametrize("method", SPECS)
def test_no_pass_is_larger_than_the_micro_batch(method, micro_batch):
    runner, sizes = executor(micro_batch=micro_batch), []
    runner.network.module.register_forward_pre_hook(lambda _module, inputs: sizes.append(len(inputs[0])))
    partial(runner, SPECS[method], targets=(5, 1, 3))
    assert max(sizes) <= micro_batch


@pytest.mark.parametrize("span", [(0, 12), (1, 9), (0, 1)])
def test_a_constant_image_shares_its_pass_with_no_other(span):
    """XRAI begins with two of them; rounding decides which place a max pooling takes there, and company rounding."""
    runner, batches = executor(), []
    runner.network.module.register_forward_pre_hook(lambda _module, inputs: batches.append(inputs[0].detach()))
    partial(runner, SPECS["xrai"], span=span)
    constant = [batch for batch in batches if any(image.min() == image.max() for image in batch)]
    assert len(constant) == len({*range(*span)} & {0, 1})
    assert all(len(batch) == 1 for batch in constant)


@pytest.mark.parametrize("seed", [0, 1])
def test_noise_comes_from_the_seed_and_the_sample_alone(seed):
    few, many = (found_with(executor(), samples=n, seed=seed) for n in (1, 2))
    assert np.abs(few - many).max() > 0
    np.testing.assert_allclose(found_with(executor(micro_batch=1), samples=2, seed=seed), many, **FLOAT64)
    assert np.abs(found_with(executor(), samples=2, seed=seed + 1) - many).max() > 0


def found_with(runner: Executor, **options: int) -> np.ndarray:
    spec = SmoothGrad(**options)
    return finished(spec, partial(runner, spec))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("method", SPECS)
def test_nothing_is_left_on_the_module(method, frozen, training):
    module = build("perceptron", 2).train(training).requires_grad_(not frozen)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    engine = Engine(module, preprocessing=PREPROCESSING, layer="features.8")
    engine.explain(picture(2), methods=[SPECS[method]], targets=[0, 1])
    for child in module.modules():
        assert child.training == training
        assert not [*child._forward_hooks, *child._forward_pre_hooks, *child._backward_hooks]
    for parameter in module.parameters():
        assert parameter.grad is None
        assert parameter.requires_grad != frozen
    for name, value in module.state_dict().items():
        assert torch.equal(value, state[name])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", SPECS)
def test_the_callers_grad_mode_does_not_matter(method, context):
    engine = Engine(build("perceptron", 2), preprocessing=PREPROCESSING, layer="features.8")
    expected = engine.explain(rough(2), methods=[SPECS[method]]).maps[0].array
    with context():
        np.testing.assert_array_equal(engine.explain(rough(2), methods=[SPECS[method]]).maps[0].array, expected)


RANGED = [
    (name, parameter)
    for name in SPECS
    for parameter in METHODS[name].parameters()
    if parameter.minimum is not None and parameter.maximum is not None
]


@pytest.mark.parametrize(("name", "parameter"), RANGED, ids=lambda value: getattr(value, "name", value))
def test_a_number_outside_its_range_is_refused_with_range_and_value(name, parameter):
    allowed = f"{parameter.minimum:g}..{parameter.maximum:g}"
    for value in (parameter.minimum - 1, parameter.maximum + 1):
        message = f"{name}: {parameter.name} must be {allowed}, got {value}"
        with pytest.raises(InvalidOption, match=f"^{re.escape(message)}$"):
            METHODS[name](**{parameter.name: value})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GuidedGradCam(interpolation="cubic"), "interpolation must be one of bilinear, nearest, got 'cubic'"),
        (lambda: IntegratedGradients(baseline="white"), "baseline must be one of zero, black, got 'white'"),
    ],
)
def test_an_unknown_choice_is_refused_with_those_that_exist(make, message):
    with pytest.raises(InvalidOption, match=message):
        make()

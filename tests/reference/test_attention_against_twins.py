"""Attention maps against a transformer written out by hand, in float64; and what they leave behind."""

import itertools
import threading

import numpy as np
import pytest
import torch
from reference import twins, twins_attention
from reference.models import build, picture
from torch import nn
from torchvision.models import VisionTransformer, swin_t

from camserve import Engine
from camserve.errors import Internal, Unsupported
from camserve.methods import AttentionRollout, GradientWeightedAttention
from camserve.types import Item, Preprocessing, Target, Task
from camserve.worker.executor import Executor
from camserve.worker.network import Network

SIDE, CLASSES = 40, 5
PREPROCESSING = Preprocessing(SIDE, (SIDE, SIDE), (0.45, 0.5, 0.55), (0.25, 0.3, 0.2), "bilinear")
FLOAT32_ULP = 1.2e-7
"""Maps are float32 in [0, 1] at the end, so this is all that may differ when everything before is float64."""
FLOAT64 = {"rtol": 1e-9, "atol": 1e-12}
"""Products of a few matrices of 26 x 26 float64 numbers, added up in another order."""

METHODS = {
    "attention_rollout": (AttentionRollout(), twins_attention.attention_rollout),
    "gradient_weighted_attention": (GradientWeightedAttention(), twins_attention.gradient_weighted_attention),
}


def transformer(seed: int = 0, layers: int = 3, heads: int = 2, dtype: torch.dtype = torch.float64) -> nn.Module:
    """25 patches; attention is made uneven, and the head, which torchvision sets to zero, is not."""
    torch.manual_seed(seed)
    module = VisionTransformer(SIDE, 8, layers, heads, hidden_dim=12, mlp_dim=20, num_classes=CLASSES)
    with torch.no_grad():
        for child in module.modules():
            if isinstance(child, nn.MultiheadAttention):
                child.in_proj_weight *= 3
                child.in_proj_bias.normal_()
        module.class_token.normal_()
        module.heads.head.weight.normal_()
    return module.to(dtype).eval()


def image_of(seed: int = 0) -> tuple[np.ndarray, torch.Tensor]:
    image = picture(seed, SIDE, SIDE)
    return image, twins.normalised(image, PREPROCESSING.mean, PREPROCESSING.std)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (3, 2), (4, 3)])
def test_method_equals_its_twin(method, layers, heads):
    module, (image, x) = transformer(layers, layers, heads), image_of(layers)
    spec, twin = METHODS[method]
    targets = tuple(range(CLASSES))
    item = Item(image, tuple(map(Target, targets)), (Task(0, spec, 0, 0),))
    (outcome,) = Executor(Network(module, preprocessing=PREPROCESSING)).execute([item]).outcomes
    sums = outcome.partials[0].sums
    assert sums.shape == (CLASSES, 5, 5)
    results = Engine(module, preprocessing=PREPROCESSING).explain(image, methods=[spec], targets=targets).maps
    for target, low, result in zip(targets, sums, results, strict=True):
        expected = twin(module, x, target)
        np.testing.assert_allclose(twins.up(torch.from_numpy(low), x), expected, **FLOAT64)
        np.testing.assert_allclose(result.array, twins.final(expected), rtol=0, atol=FLOAT32_ULP)
        assert result.degenerate == (not expected.any())
    assert not all(result.degenerate for result in results)


def test_the_forward_written_by_hand_is_torchvisions():
    module, (_, x) = transformer(), image_of()
    torch.testing.assert_close(twins_attention.forward(module, x)[0], module(x[None])[0], rtol=1e-10, atol=1e-12)


def test_rollout_is_the_same_for_every_class_and_gradient_weighted_attention_is_not():
    engine, image = Engine(transformer(), preprocessing=PREPROCESSING), image_of()[0]
    for method, same in (("attention_rollout", True), ("gradient_weighted_attention", False)):
        one, other = engine.explain(image, methods=[method], targets=[0, 1]).maps
        assert np.array_equal(one.array, other.array) == same


def test_a_head_of_zeros_gives_an_empty_map_and_says_so():
    module = transformer()
    with torch.no_grad():
        module.heads.head.weight.zero_()
    engine = Engine(module, preprocessing=PREPROCESSING)
    (result,) = engine.explain(image_of()[0], methods=["gradient_weighted_attention"], targets=[0]).maps
    assert result.degenerate
    assert not result.array.any()


@pytest.mark.parametrize("method", METHODS)
def test_a_constant_image_gives_no_nan(method):
    engine = Engine(transformer(), preprocessing=PREPROCESSING)
    blank = np.zeros((SIDE, SIDE, 3), np.uint8)
    (result,) = engine.explain(blank, methods=[method], targets=[0]).maps
    assert np.isfinite(result.array).all()


class Ensemble(nn.Module):
    """Runs one transformer on the image and on its mirror image."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = transformer()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.transformer(x) + self.transformer(x.flip(-1))


class Wrapped(nn.Module):
    """A transformer behind a normalisation of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = transformer()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(2 * x)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: build("pooled"), "need a VisionTransformer of torchvision"),
        (lambda: swin_t(num_classes=4), "need a VisionTransformer of torchvision"),
        (lambda: nn.Sequential(Ensemble()), "exactly once"),
    ],
    ids=["CNN", "Swin", "two passes"],
)
def test_other_networks_are_refused_with_the_reason(make, reason, method):
    side = (SIDE, SIDE)
    preprocessing = Preprocessing(SIDE, side, (0.5,) * 3, (0.5,) * 3)
    engine = Engine(make().eval().to(torch.float32), preprocessing=preprocessing)
    with pytest.raises(Unsupported, match=reason):
        engine.explain(np.zeros((*side, 3), np.uint8), methods=[method])


def test_a_wrapped_transformer_is_found():
    (result,) = (
        Engine(Wrapped(), preprocessing=PREPROCESSING)
        .explain(image_of()[0], methods=["gradient_weighted_attention"], targets=[1])
        .maps
    )
    expected = twins_attention.gradient_weighted_attention(transformer(), 2 * image_of()[1], 1)
    np.testing.assert_allclose(result.array, twins.final(expected), rtol=0, atol=FLOAT32_ULP)


def state(module: nn.Module) -> list:
    return [
        (name, child.training, len(child._forward_hooks), len(child._forward_pre_hooks), len(child._backward_hooks))
        for name, child in module.named_modules()
    ] + [(name, p.requires_grad, p.grad is None, p._version) for name, p in module.named_parameters()]


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_nothing_is_left_on_the_module(frozen, fails):
    module = transformer().requires_grad_(not frozen)
    engine, before = Engine(module, preprocessing=PREPROCESSING), state(module)
    if fails:
        calls = itertools.count()
        handle = module.heads.register_forward_pre_hook(lambda *_: 1 / (1 - next(calls)))  # fails at the second call
        with pytest.raises(Internal):
            engine.explain(image_of()[0], methods=["gradient_weighted_attention"])
        handle.remove()
    else:
        engine.explain(image_of()[0], methods=list(METHODS), targets=[0, 3])
    assert state(module) == before


def test_another_thread_in_the_same_module_is_not_disturbed():
    """The other thread's attention neither returns weights nor appears in the map: it runs in the middle of ours."""
    module, (image, x) = transformer(), image_of()
    spec, twin = METHODS["gradient_weighted_attention"]
    expected_logits, other = module(x[None].flip(-1)), []
    engine = Engine(module, preprocessing=PREPROCESSING)
    calls = []

    def meanwhile(_module, _inputs):
        calls.append(1)
        if len(calls) == 2 and threading.current_thread() is threading.main_thread():  # 1: the step's own forward
            thread = threading.Thread(target=lambda: other.append(module(x[None].flip(-1))))
            thread.start()
            thread.join()

    handle = module.encoder.layers[1].register_forward_pre_hook(meanwhile)
    (result,) = engine.explain(image, methods=[spec], targets=[2]).maps
    handle.remove()
    torch.testing.assert_close(other[0], expected_logits, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(result.array, twins.final(twin(module, x, 2)), rtol=0, atol=FLOAT32_ULP)

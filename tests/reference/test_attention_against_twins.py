"""Attention maps against a transformer written out by hand, in float64; and what they leave behind."""

import itertools
import threading

import numpy as np
import pytest
import timm
import torch
from reference import twins, twins_attention
from reference.attention_networks import (
    CLASSES,
    IN_TWO_WAYS,
    NETWORKS,
    SIDE,
    TIMM,
    build,
    forward,
    hugging_face,
    of_torchvision,
    timm_vit,
    uneven,
)
from reference.models import picture
from torch import nn
from torchvision.models import VisionTransformer, resnet18, swin_t

from camserve import Engine
from camserve.errors import Internal, Unsupported
from camserve.methods import AttentionRollout, GradientWeightedAttention, LeGrad, MethodSpec, ReciproCam
from camserve.types import Item, Preprocessing, Target, Task
from camserve.worker.executor import Executor
from camserve.worker.network import Network

PREPROCESSING = Preprocessing(SIDE, (SIDE, SIDE), (0.45, 0.5, 0.55), (0.25, 0.3, 0.2), "bilinear")
FLOAT32_ULP = 1.2e-7
"""Maps are float32 in [0, 1] at the end, so this is all that may differ when everything before is float64."""
FLOAT64 = {"rtol": 1e-9, "atol": 1e-12}
"""Products of a few matrices of 26 x 26 float64 numbers, added up in another order."""

METHODS = {
    "attention_rollout": (AttentionRollout(), twins_attention.attention_rollout),
    "gradient_weighted_attention": (GradientWeightedAttention(), twins_attention.gradient_weighted_attention),
    "le_grad": (LeGrad(), twins_attention.le_grad),
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


def sums_of(module: nn.Module, spec: MethodSpec, image: np.ndarray) -> np.ndarray:
    """What a worker makes of all classes, in float64: (classes, 5, 5)."""
    network = Network(module, preprocessing=PREPROCESSING)
    queries = spec.queries(network.info.layer(""), CLASSES)
    item = Item(image, tuple(map(Target, range(CLASSES))), (Task(0, spec, 0, queries),))
    (outcome,) = Executor(network).execute([item]).outcomes
    return outcome.partials[0].sums


def assert_equals_twin(module: nn.Module, spec: MethodSpec, twin, image: np.ndarray) -> None:
    """Holds the sums and the final maps of all classes against a twin, a function of the class."""
    x = image_of()[1]
    results = Engine(module, preprocessing=PREPROCESSING).explain(image, methods=[spec], targets=range(CLASSES)).maps
    for target, low, result in zip(range(CLASSES), sums_of(module, spec, image), results, strict=True):
        expected = twin(target)
        assert low.shape == (5, 5)
        np.testing.assert_allclose(twins.up(torch.from_numpy(low), x), expected, **FLOAT64)
        np.testing.assert_allclose(result.array, twins.final(expected), rtol=0, atol=FLOAT32_ULP)
        assert result.degenerate == (not expected.any())
    assert not all(result.degenerate for result in results)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (4, 3)])
def test_method_equals_its_twin_with_any_number_of_layers_and_heads(method, layers, heads):
    module, (image, x) = transformer(layers, layers, heads), image_of(layers)
    spec, twin = METHODS[method]
    assert_equals_twin(module, spec, lambda target: twin(of_torchvision(module), x, target), image)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETWORKS)
def test_method_equals_its_twin_on_transformers_of_every_library(name, method):
    (module, by_hand), (image, x) = build(name), image_of(1)
    spec, twin = METHODS[method]
    assert_equals_twin(module, spec, lambda target: twin(by_hand, x, target), image)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_forward_written_by_hand_is_the_librarys(name):
    (module, by_hand), (_, x) = build(name), image_of()
    returned = module(x[None])
    logits = returned if isinstance(returned, torch.Tensor) else returned.logits
    torch.testing.assert_close(forward(by_hand, x)[0], logits[0], rtol=1e-10, atol=1e-12)


IN_FLOAT32 = 2e-6
"""Their own attention takes its softmax in float32, also in a network in float64; seen were 3e-7 of a map in [0, 1]."""


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", IN_TWO_WAYS)
def test_maps_are_the_same_whether_hugging_face_or_pytorch_makes_the_attention(name, method):
    """BEiT adds to what the softmax sees how far two patches are apart: PyTorch's attention gets that as a mask."""
    found = []
    config, network, options = IN_TWO_WAYS[name]
    for attention in ("sdpa", "eager"):
        module = uneven(hugging_face(config, network, attention, **options))
        found.append(Engine(module, preprocessing=PREPROCESSING).explain(image_of(2)[0], [method], [0, 1, 2]).maps)
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one.array, other.array, rtol=0, atol=IN_FLOAT32)
    assert not all(one.degenerate for one in found[0])


ONE_READ = [name for name in NETWORKS if "averaged" not in name and "without class" not in name]


@pytest.mark.parametrize("kernel", ["point", "gaussian"])
@pytest.mark.parametrize("name", ONE_READ)
def test_recipro_cam_on_tokens_equals_its_twin_and_keeps_the_networks_own_tokens(name, kernel):
    (module, by_hand), (image, x) = build(name), image_of(1)
    assert_equals_twin(
        module, ReciproCam(kernel=kernel), lambda target: twins_attention.recipro_cam(by_hand, x, target, kernel), image
    )


def test_rollout_is_the_same_for_every_class_and_gradient_weighted_attention_is_not():
    engine, image = Engine(transformer(), preprocessing=PREPROCESSING), image_of()[0]
    for method, same in (("attention_rollout", True), ("gradient_weighted_attention", False), ("le_grad", False)):
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


class Wrapped(nn.Module):
    """A transformer behind a normalisation of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = transformer()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(2 * x)


def test_a_wrapped_transformer_is_found():
    (result,) = (
        Engine(Wrapped(), preprocessing=PREPROCESSING)
        .explain(image_of()[0], methods=["gradient_weighted_attention"], targets=[1])
        .maps
    )
    by_hand = of_torchvision(transformer())
    expected = twins_attention.gradient_weighted_attention(by_hand, 2 * image_of()[1], 1)
    np.testing.assert_allclose(result.array, twins.final(expected), rtol=0, atol=FLOAT32_ULP)


class Ensemble(nn.Module):
    """Runs one transformer on the image and on its mirror image."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = transformer(dtype=torch.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.transformer(x) + self.transformer(x.flip(-1))


def of_timm(name: str, **options) -> nn.Module:
    return timm.create_model(name, num_classes=CLASSES, **options)


def small_swin() -> nn.Module:
    options = {"embed_dim": 12, "depths": (1, 1, 1), "num_heads": (1, 2, 2), "window_size": 5}
    return of_timm("swin_tiny_patch4_window7_224", img_size=SIDE, patch_size=2, **options)


NO_ATTENTION, NO_TOKENS, WINDOWS = "no attention was seen", "holds no sequence of tokens", "within windows"
CHANGES, SIDE_BY_SIDE, POOLED, NO_BLOCKS = "number of tokens changes", "side by side", "one that pools", "of blocks"
REFUSED = {
    "torchvision's ResNet": (lambda: resnet18(num_classes=4), 40, dict.fromkeys(METHODS, NO_ATTENTION)),
    "torchvision's Swin": (lambda: swin_t(num_classes=4), 40, dict.fromkeys(METHODS, "attention")),
    "timm's Swin": (small_swin, 40, dict.fromkeys(METHODS, WINDOWS)),
    "timm's MobileViT": (lambda: of_timm("mobilevit_xxs"), 64, dict.fromkeys(METHODS, NO_TOKENS)),
    "timm's LeViT": (lambda: of_timm("levit_128s", img_size=160), 160, dict.fromkeys(METHODS, CHANGES)),
    "timm's ViT with attentions in pairs": (
        lambda: of_timm(
            "vit_small_patch16_18x2_224", **{key: value for key, value in TIMM.items() if key != "num_classes"}
        ),
        40,
        dict.fromkeys(METHODS, SIDE_BY_SIDE),
    ),
    "an ensemble": (lambda: nn.Sequential(Ensemble()), 40, dict.fromkeys(METHODS, "exactly once")),
    "timm's ViT with an attention that pools": (
        lambda: timm_vit(class_token=False, global_pool="map"),
        40,
        {"attention_rollout": POOLED, "gradient_weighted_attention": POOLED},
    ),
    "timm's PVT": (lambda: of_timm("pvt_v2_b0"), 64, {"attention_rollout": POOLED, "le_grad": NO_BLOCKS}),
}
"""Networks of others by what they are, each with the size of its input, and why each method refuses it."""


@pytest.mark.parametrize("name", REFUSED)
def test_other_networks_are_refused_with_the_reason(name):
    make, side, reasons = REFUSED[name]
    torch.manual_seed(0)
    engine = Engine(
        make().eval(),
        preprocessing=Preprocessing(side, (side, side), (0.5,) * 3, (0.5,) * 3),
    )
    for method, reason in reasons.items():
        with pytest.raises(Unsupported, match=reason):
            engine.explain(picture(0, side, side), methods=[method])


def test_an_attention_that_pools_the_tokens_is_part_of_legrads_head():
    module = uneven(timm_vit(class_token=False, global_pool="map"))
    image, x = image_of()
    (result,) = Engine(module, preprocessing=PREPROCESSING).explain(image, methods=["le_grad"], targets=[1]).maps
    stream, shares, kept = module._pos_embed(module.patch_embed(x[None])), [], []
    for block in module.blocks:
        block.attn.fused_attn = False  # its probabilities are a module's input then
        block.attn.attn_drop.register_forward_hook(lambda _module, inputs, _output: kept.append(inputs[0]))
        stream = block(stream)
        (gradient,) = torch.autograd.grad(module.forward_head(module.norm(stream))[0, 1], kept[-1], retain_graph=True)
        shares.append(gradient[0].clamp(min=0).mean(dim=(0, 1)))
    expected = twins.up((sum(shares) / 3).reshape(5, 5), x)
    np.testing.assert_allclose(result.array, twins.final(expected), rtol=0, atol=FLOAT32_ULP)


HALF = 0.05
"""A map in [0, 1] of a network in bfloat16, whose numbers have 8 bits; seen were 0.02."""


@pytest.mark.parametrize("method", METHODS)
def test_a_network_in_half_precision_has_nearly_the_same_maps(method):
    found = [
        Engine(uneven(timm_vit(), dtype), preprocessing=PREPROCESSING).explain(image_of()[0], [method], [1]).maps[0]
        for dtype in (torch.bfloat16, torch.float64)
    ]
    np.testing.assert_allclose(found[0].array, found[1].array, rtol=0, atol=HALF)


class Streamed(nn.Module):
    """A transformer whose stream is its own forward's: no module returns it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = timm_vit()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.inner._pos_embed(self.inner.patch_embed(x))
        for block in self.inner.blocks:
            tokens = tokens + block.attn(block.norm1(tokens))
            tokens = tokens + block.mlp(block.norm2(tokens))
        return self.inner.forward_head(self.inner.norm(tokens))


class Counted(nn.Module):
    """A transformer whose head has been told how many pictures there are."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = timm_vit()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.inner.forward_features(x)
        return self.inner.head(tokens.reshape(len(x), -1, 12)[:, 0])


@pytest.mark.parametrize("make", [Streamed, Counted])
def test_legrad_needs_blocks_and_a_head_that_takes_the_tokens_of_each(make):
    engine = Engine(uneven(make()), preprocessing=PREPROCESSING)
    with pytest.raises(Unsupported, match=NO_BLOCKS):
        engine.explain(image_of()[0], methods=["le_grad"])
    assert not engine.explain(image_of()[0], methods=["attention_rollout"]).maps[0].degenerate


class Detached(nn.Module):
    """A transformer that learns behind its first two blocks alone."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = timm_vit()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.inner._pos_embed(self.inner.patch_embed(x))
        tokens = self.inner.blocks[:2](tokens).detach()
        return self.inner.forward_head(self.inner.norm(self.inner.blocks[2](tokens)))


def test_attention_that_no_gradient_reaches_has_a_rollout_and_legrad_and_no_product_of_gradients():
    """LeGrad's scores are those of each block's own tokens, and nothing is cut behind its attention."""
    engine = Engine(uneven(Detached()), preprocessing=PREPROCESSING)
    whole = Engine(uneven(timm_vit()), preprocessing=PREPROCESSING)
    with pytest.raises(Unsupported, match="no gradient of the scores reaches some of the network's attentions"):
        engine.explain(image_of()[0], methods=["gradient_weighted_attention"])
    for method in ("attention_rollout", "le_grad"):
        (one,), (other,) = (each.explain(image_of()[0], methods=[method], targets=[1]).maps for each in (engine, whole))
        np.testing.assert_allclose(one.array, other.array, rtol=0, atol=FLOAT32_ULP)


def test_a_layer_of_another_grid_than_the_tokens_is_refused():
    module = of_timm("vit_tiny_r_s16_p8_224", img_size=64, depth=2)
    engine = Engine(module.eval(), preprocessing=Preprocessing(64, (64, 64), (0.5,) * 3, (0.5,) * 3))
    stem = next(layer for layer in engine.info.layers if layer.height > 4)
    for method in METHODS:
        assert not engine.explain(picture(0, 64, 64), methods=[method], targets=[1]).maps[0].degenerate
        with pytest.raises(Unsupported, match="ask for a layer of tokens"):
            engine.explain(picture(0, 64, 64), methods=[method], layer=stem.name)


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


@pytest.mark.parametrize("call", [2, 3, 4])
@pytest.mark.parametrize("method", ["gradient_weighted_attention", "le_grad"])
def test_another_thread_in_the_same_module_is_not_disturbed(method, call):
    """The other thread's attention neither returns weights nor appears in the map: it runs in the middle of ours.

    The passes are: the step's own forward, the one in which attentions are found, the one in which blocks are tried,
    and the method's.
    """
    module, (image, x) = transformer(), image_of()
    spec, twin = METHODS[method]
    expected_logits, other = module(x[None].flip(-1)), []
    engine = Engine(module, preprocessing=PREPROCESSING)
    calls = []

    def meanwhile(_module, _inputs):
        if threading.current_thread() is threading.main_thread():
            calls.append(1)
            if len(calls) == call:
                thread = threading.Thread(target=lambda: other.append(module(x[None].flip(-1))))
                thread.start()
                thread.join()

    handle = module.encoder.layers[1].register_forward_pre_hook(meanwhile)
    (result,) = engine.explain(image, methods=[spec], targets=[2]).maps
    handle.remove()
    torch.testing.assert_close(other[0], expected_logits, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(result.array, twins.final(twin(of_torchvision(module), x, 2)), rtol=0, atol=FLOAT32_ULP)

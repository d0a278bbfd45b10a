"""CAMs on token grids beside grad-cam 1.5.7 with the reshaping that its documentation gives for ViT and Swin; LeGrad
beside torchcam 0.5.0; Recipro-CAM beside what OpenVINO-XAI 1.1 does, written out slowly."""

import numpy as np
import pytest
import torch
from pytorch_grad_cam import GradCAM, HiResCAM, LayerCAM, XGradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from reference import twins
from reference.attention_networks import attended, of_torchvision
from reference.models import PREPROCESSING as OBLONG
from reference.models import build, picture
from torch import nn
from torchcam.methods import LeGrad
from torchvision.models import SwinTransformer, VisionTransformer

from camserve import Engine
from camserve.errors import Unsupported
from camserve.types import Preprocessing

SIDE = 32
PREPROCESSING = Preprocessing(SIDE, (SIDE, SIDE), (0.45, 0.5, 0.55), (0.25, 0.3, 0.2), "bilinear")
TOLERANCE = 2e-5
"""float32 rounding of attention in two kernels, and 1e-7 in grad-cam's min-max, in maps in [0, 1]."""


def vit() -> tuple[nn.Module, str]:
    torch.manual_seed(3)
    module = VisionTransformer(SIDE, 8, 3, 2, hidden_dim=24, mlp_dim=32, num_classes=5)
    nn.init.normal_(module.heads.head.weight)  # torchvision sets it to zero
    return module.eval(), "encoder.layers.encoder_layer_2.ln_1"


def swin() -> tuple[nn.Module, str]:
    torch.manual_seed(3)
    return SwinTransformer([4, 4], 12, [2, 2], [2, 2], [4, 4], num_classes=5).eval(), "norm"


def without_class_token(raw: torch.Tensor) -> torch.Tensor:
    return raw[:, 1:].reshape(len(raw), 4, 4, -1).permute(0, 3, 1, 2)


def channels_first(raw: torch.Tensor) -> torch.Tensor:
    return raw.permute(0, 3, 1, 2)


@pytest.mark.parametrize(("make", "reshape"), [(vit, without_class_token), (swin, channels_first)], ids=["vit", "swin"])
@pytest.mark.parametrize(
    ("method", "theirs"),
    [("grad_cam", GradCAM), ("hires_cam", HiResCAM), ("layer_cam", LayerCAM), ("xgrad_cam", XGradCAM)],
)
def test_cam_on_a_token_grid(method, theirs, make, reshape):
    module, layer = make()
    image = picture(4, SIDE, SIDE)
    engine = Engine(module, preprocessing=PREPROCESSING)
    x = twins.normalised(image, PREPROCESSING.mean, PREPROCESSING.std)[None].float()
    compared = 0
    for target in range(5):
        (ours,) = engine.explain(image, methods=[method], targets=[target]).maps
        assert ours.layer == layer
        with theirs(module, [module.get_submodule(layer)], reshape_transform=reshape) as extractor:
            expected = extractor(x, [ClassifierOutputTarget(target)])[0]
        np.testing.assert_allclose(ours.array, expected, rtol=0, atol=TOLERANCE)
        compared += not ours.degenerate
    assert compared >= 2


def test_cam_equals_grad_cam_on_swin_whose_head_pools_and_is_refused_on_vit_whose_head_reads_a_token():
    image = picture(4, SIDE, SIDE)
    engine = Engine(swin()[0], preprocessing=PREPROCESSING)
    cam, grad_cam = engine.explain(image, methods=["cam", "grad_cam"], targets=[1]).maps
    np.testing.assert_allclose(cam.array, grad_cam.array, rtol=0, atol=TOLERANCE)
    with pytest.raises(Unsupported, match="CAM needs"):
        Engine(vit()[0], preprocessing=PREPROCESSING).explain(image, methods=["cam"])


SECOND = 1e-5
"""float32 rounding of maps in [0, 1]: attention is the same formula in both, its sums in another order."""


def own_head(module: nn.Module):
    """What torchvision's transformer makes of its tokens: of the class token alone."""
    return lambda tokens: module.heads(module.encoder.ln(tokens)[:, 0])


def torchcams_le_grad(module: nn.Module, image: np.ndarray, target: int, projection=None) -> np.ndarray:
    x = twins.normalised(image, PREPROCESSING.mean, PREPROCESSING.std)[None].float()
    with LeGrad(module, list(module.encoder.layers), score_projection=projection) as extractor:
        scores = module(x)
        (cam,) = extractor.compute_cams(target, scores, normalized=False)
    return twins.final(twins.up(cam[0].double(), x))


def test_legrad_equals_torchcams_with_the_networks_own_head():
    module, _ = vit()
    image = picture(4, SIDE, SIDE)
    engine = Engine(module, preprocessing=PREPROCESSING)
    for target in range(5):
        (ours,) = engine.explain(image, methods=["le_grad"], targets=[target]).maps
        expected = torchcams_le_grad(module, image, target, own_head(module))
        np.testing.assert_allclose(ours.array, expected, rtol=0, atol=SECOND)
        assert not ours.degenerate


class Averaging(nn.Module):
    """torchvision's transformer with torchcam's own projection for a head: the mean of all tokens, then the norm."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.module._process_input(x)
        tokens = torch.cat([self.module.class_token.expand(len(x), -1, -1), tokens], dim=1)
        tokens = self.module.encoder.layers(tokens + self.module.encoder.pos_embedding)
        return self.module.heads(self.module.encoder.ln(tokens.mean(dim=1)))


def test_torchcams_own_projection_is_another_networks_head():
    """Left alone, torchcam scores the mean of all tokens, which torchvision's head has never seen: that is all that
    its maps differ by."""
    module, _ = vit()
    image = picture(4, SIDE, SIDE)
    expected = torchcams_le_grad(module, image, 1)
    (ours,) = Engine(module, preprocessing=PREPROCESSING).explain(image, ["le_grad"], [1]).maps
    (averaged,) = Engine(Averaging(module), preprocessing=PREPROCESSING).explain(image, ["le_grad"], [1]).maps
    assert np.abs(ours.array - expected).max() > 0.1
    np.testing.assert_allclose(averaged.array, expected, rtol=0, atol=SECOND)


ROUNDING = 4e-6
"""float32 rounding of scores, as a share of the largest: a softmax multiplies that of logits by their size."""


def openvinos_scale(scores: torch.Tensor) -> np.ndarray:
    """(x - min) / (max - min + 1e-12): what OpenVINO-XAI embeds as 0..255, without the 255."""
    return ((scores - scores.min()) / (scores.max() - scores.min() + 1e-12)).numpy()


def assert_recipro_cams_equal(engine: Engine, image: np.ndarray, kernel: str, expected: torch.Tensor, layer="") -> None:
    """Holds scores and scaled maps against scores (classes, u, v) made elsewhere.

    Scaling divides by the range of the scores, and so it does with the rounding of float32: a class of probability 0.99
    has a range of 1/500 of that here. In float64 all are equal.
    """
    results = engine.explain(
        image, [("recipro_cam", {"kernel": kernel})], range(len(expected)), layer=layer, size="layer"
    ).maps
    for scores, ours in zip(expected, results, strict=True):
        low, high = scores.min().item(), scores.max().item()
        size = max(abs(low), abs(high))
        assert ours.value_range[1] - ours.value_range[0] == pytest.approx(high - low, abs=ROUNDING * size)
        largest = max(SECOND, ROUNDING * size / (high - low)) if scores.dtype == torch.float32 else 1e-7
        assert largest < 0.01
        np.testing.assert_allclose(ours.array, openvinos_scale(scores), rtol=0, atol=largest)


def openvinos_recipro_cam(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Probabilities (classes, u, v) of `ReciproCAM`: one mask of a batch for each place, and the network's softmax."""
    with torch.no_grad():
        features = module.features(x)
        height, width = features.shape[2:]
        masks = torch.zeros(height * width, *features.shape[1:], dtype=features.dtype)
        for place in range(height * width):
            masks[place, :, place // width, place % width] = 1
        scores = module.head(features.repeat(height * width, 1, 1, 1) * masks).softmax(dim=1)
    return scores.T.reshape(-1, height, width)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_recipro_cam_equals_openvinos_on_a_convolutional_network(dtype):
    module = build("perceptron", 2, dtype)
    image = picture(2)
    x = twins.normalised(image, OBLONG.mean, OBLONG.std)[None].to(dtype)
    engine = Engine(module, preprocessing=OBLONG)
    assert_recipro_cams_equal(engine, image, "point", openvinos_recipro_cam(module, x), "features.8")


def openvinos_vit_recipro_cam(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Logits (classes, u, v) of `ViTReciproCAM`: Gaussian, class token kept, before the last block.

    It multiplies the stream before the last block with a mask, and once more what the block's norm makes of the whole
    stream; block and head run on both.
    """
    by_hand = of_torchvision(module)
    gaussian = torch.tensor([[1, 2, 1], [2, 4, 2], [1, 2, 1]]).to(x) / 16
    with torch.no_grad():
        stream = by_hand.tokens(x)
        for block in by_hand.blocks[:-1]:
            stream = stream + attended(block, stream, by_hand.heads)[0]
            stream = stream + block.after(stream)
        last, side, rows = by_hand.blocks[-1], 4, []
        for place in range(side**2):
            padded = torch.zeros(side + 2, side + 2).to(x)
            padded[place // side : place // side + 3, place % side : place % side + 3] = gaussian
            mask = torch.cat([torch.ones(1).to(x), padded[1:-1, 1:-1].flatten()])[:, None]
            normed, past = last.before(stream) * mask, stream * mask
            shown = type(last)(lambda _, normed=normed: normed, last.weights, last.out, last.after)
            out = past + attended(shown, stream, by_hand.heads)[0]
            rows.append(by_hand.head(out + last.after(out)))
    return torch.stack(rows, dim=1).reshape(-1, side, side)


@pytest.mark.parametrize("outputs", ["value", "softmax"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_recipro_cam_equals_openvinos_on_a_transformer_that_reads_its_class_token(dtype, outputs):
    """OpenVINO-XAI maps a transformer's logits, and those of numbers are asked here as well; of classes it is the
    probability, as for other networks and in the authors' code: what its softmax makes of the logits."""
    module, image = vit()[0].to(dtype), picture(4, SIDE, SIDE)
    logits = openvinos_vit_recipro_cam(module, twins.normalised(image, PREPROCESSING.mean, PREPROCESSING.std).to(dtype))
    engine = Engine(module, preprocessing=PREPROCESSING, outputs=outputs)
    assert_recipro_cams_equal(engine, image, "gaussian", logits.softmax(dim=0) if outputs == "softmax" else logits)
    assert np.abs(openvinos_scale(logits[1]) - openvinos_scale(logits.softmax(dim=0)[1])).max() > 0.01

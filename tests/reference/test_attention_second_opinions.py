"""CAMs on token grids beside grad-cam 1.5.7 with the reshaping that its documentation gives for ViT and Swin."""

import numpy as np
import pytest
import torch
from pytorch_grad_cam import GradCAM, HiResCAM, LayerCAM, XGradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from reference import twins
from reference.models import picture
from torch import nn
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

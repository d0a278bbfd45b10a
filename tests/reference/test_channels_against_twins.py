"""Networks of one and of many channels, with a rectangular input, against the twins, in float64: equal to rounding."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from reference import twins, twins_backprop, twins_evaluation, twins_gradient, twins_perturbation
from torch import Tensor, nn

from camserve import Engine
from camserve.types import Preprocessing

HEIGHT, WIDTH = 96, 64
LAYER = "features.3"
TARGET = 2
FLOAT32_ULP = 1.2e-7
"""Maps are float32 in [0, 1] at the end, so this is all that may differ when everything before is float64."""


class Net(nn.Module):
    """Two convolutions and a head of two linear layers, whose probabilities are far from 0 and 1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        torch.manual_seed(13)
        self.features = nn.Sequential(nn.Conv2d(channels, 8, 5, 4, 2), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 5))

    def forward(self, x: Tensor) -> Tensor:
        return 3 * self.head(self.features(x).mean(dim=(2, 3)))


def preprocessing(channels: int) -> Preprocessing:
    mean, std = np.linspace(0.3, 0.6, channels), np.linspace(0.2, 0.4, channels)
    return Preprocessing(WIDTH, (HEIGHT, WIDTH), tuple(mean.tolist()), tuple(std.tolist()), "bilinear")


def picture(channels: int, seed: int = 0) -> np.ndarray:
    """Slow waves with some noise, float32 (HEIGHT, WIDTH, channels) in [0, 1]."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    waves = [np.sin((x * (c + 1) + y * (3 - c)) / 17 + c) for c in range(channels)]
    noise = np.random.default_rng(seed).normal(0, 0.1, (HEIGHT, WIDTH, channels))
    return (0.5 + 0.3 * np.stack(waves, axis=-1) + noise).clip(0, 1).astype(np.float32)


def normalised(pixels: np.ndarray) -> Tensor:
    """(H, W, C) in [0, 1] to (C, H, W), one channel after the other."""
    known = preprocessing(pixels.shape[2])
    planes = [(pixels[..., c].astype(np.float64) - known.mean[c]) / known.std[c] for c in range(pixels.shape[2])]
    return torch.from_numpy(np.stack(planes))


def black(image: Tensor) -> Tensor:
    known = preprocessing(len(image))
    return twins_gradient.black(known.mean, known.std, image)


METHODS = {
    "grad_cam": ({}, lambda net, x: twins.grad_cam(net, x, LAYER, TARGET)),
    "score_cam": ({}, lambda net, x: twins.score_cam(net, x, LAYER, TARGET)),
    "group_cam": ({"groups": 4}, lambda net, x: twins.group_cam_paper(net, x, LAYER, TARGET, 4)),
    "integrated_grad_cam": (
        {"steps": 5},
        lambda net, x: twins_gradient.integrated_grad_cam_paper(net, x, LAYER, TARGET, black(x), 5),
    ),
    "integrated_gradients": (
        {"steps": 6, "baseline": "black"},
        lambda net, x: twins_backprop.integrated_gradients(net, x, TARGET, black(x), 6),
    ),
    "occlusion": (
        {"positions": 5, "window": 2},
        lambda net, x: twins_perturbation.occlusion(net, x, TARGET, 5, 2),
    ),
}


@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize("method", METHODS)
def test_a_map_of_any_number_of_channels_is_its_twins(method, channels):
    net, pixels = Net(channels).double().eval(), picture(channels)
    engine = Engine(net, preprocessing=preprocessing(channels))
    parameters, twin = METHODS[method]
    (found,) = engine.explain(pixels, [(method, parameters)], [TARGET], layer=LAYER).maps
    expected = twins.final(twin(net, normalised(pixels)))
    assert expected.std() > 0.05, "the map says something"
    np.testing.assert_allclose(found.array, expected, atol=2 * FLOAT32_ULP)


def test_curves_of_two_channels_are_their_twins():
    net, pixels = Net(2).double().eval(), picture(2)
    engine = Engine(net, preprocessing=preprocessing(2))
    answer = engine.explain(pixels, ["grad_cam"], [TARGET], layer=LAYER, evaluate=True, evaluation_steps=6)
    (found,) = answer.maps
    image = normalised(pixels)
    step_px, blurred = HEIGHT * WIDTH // 6, twins_evaluation.rise_blur(image)
    deletion = twins_evaluation.curve(net, image, torch.zeros_like(image), found.array, TARGET, step_px)
    insertion = twins_evaluation.curve(net, blurred, image, found.array, TARGET, step_px)
    np.testing.assert_allclose(found.faithfulness.deletion, deletion, atol=1e-6)  # they travel as float32
    np.testing.assert_allclose(found.faithfulness.insertion, insertion, atol=1e-6)


def test_the_last_bits_of_16_bit_grey_count():
    """All of the picture lies within one level of 8 bits, of which the preprocessing makes the whole range."""
    net, pixels = Net(1).double().eval(), picture(1)
    levels = (30_000 + 100 * pixels[..., 0]).astype(np.uint16)
    assert len(np.unique((levels / 257).round())) == 1
    stretched = Preprocessing(WIDTH, (HEIGHT, WIDTH), (30_050 / 65535,), (25 / 65535,))
    engine = Engine(net, preprocessing=stretched)
    image = torch.from_numpy((levels.astype(np.float64) - 30_050) / 25)[None]
    expected = twins.final(twins.grad_cam(net, image, LAYER, TARGET))
    assert expected.std() > 0.05
    for file_format in ("PNG", "TIFF"):
        file = io.BytesIO()
        Image.fromarray(levels).save(file, file_format)
        (found,) = engine.explain(file.getvalue(), ["grad_cam"], [TARGET], layer=LAYER).maps
        # Pixels are float32 in [0, 1] before they are stretched by 2600: an ulp of 0.46 becomes 8e-5.
        np.testing.assert_allclose(found.array, expected, atol=1e-3)


def test_a_rectangular_picture_is_explained_whole_through_every_form():
    """A picture of just the input's size, whose shorter side is already the one that resizing wants."""
    net, pixels = Net(3).double().eval(), (picture(3) * 255).round().astype(np.uint8)
    engine = Engine(net, preprocessing=preprocessing(3))
    expected = twins.final(twins.grad_cam(net, normalised(pixels / np.float64(255)), LAYER, TARGET))
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    for content in (pixels, Image.fromarray(pixels), file.getvalue()):
        answer = engine.explain(content, ["grad_cam"], [TARGET], layer=LAYER)
        np.testing.assert_allclose(answer.maps[0].array, expected, atol=2 * FLOAT32_ULP)
        assert answer.input.crop == (0, 0, WIDTH, HEIGHT)
        np.testing.assert_array_equal(np.asarray(answer.maps[0].image), pixels)

"""Signed maps: evidence for and against in [-1, 1], of the methods that add up both; the others say why not."""

from __future__ import annotations

import io
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from reference import twins
from reference.models import CHANNELS, PREPROCESSING, build, picture
from torch.nn import functional as F

from camserve import Engine
from camserve.errors import InvalidOption
from camserve.finalise.encode import decode, encode
from camserve.finalise.maps import final_map, into_original, normalise_signed
from camserve.finalise.render import overlay
from camserve.images import whole_view
from camserve.methods import METHODS, SIGNED, Auto, GradCam, GroupCam, IntegratedGradCam, MethodSpec
from camserve.types import Against, BoxOptions, Prediction, Target
from camserve.types.request import make_request

SMALL = {
    "group_cam": {"groups": 4},
    "rise": {"masks": 20},
    "d_rise": {"masks": 20},
    "occlusion": {"positions": 4},
    "integrated_gradients": {"steps": 3},
    "integrated_grad_cam": {"steps": 3},
}


def spec_of(name: str) -> MethodSpec:
    return METHODS[name](**SMALL.get(name, {}))


def engine(name: str = "perceptron") -> Engine:
    return Engine(build(name, 2, torch.float64), preprocessing=PREPROCESSING)


def signed(name: str, target=5, net: str = "perceptron", **options) -> np.ndarray:
    (found,) = engine(net).explain(picture(2), [spec_of(name)], [target], signed=True, **options).maps
    assert found.signed
    return found.array


def test_the_methods_that_have_signed_maps():
    assert set(SIGNED) == {
        *("cam", "grad_cam", "hires_cam", "xgrad_cam", "integrated_grad_cam", "group_cam"),
        *("ablation_cam", "occlusion", "rise", "d_rise", "integrated_gradients"),
    }


@pytest.mark.parametrize("name", SIGNED)
def test_a_signed_map_is_scaled_by_its_largest_absolute_value(name):
    net = "pooled" if name == "cam" else "perceptron"
    array = signed(name, net=net)
    assert np.abs(array).max() == 1
    assert array.min() < 0 < array.max()
    plain = engine(net).explain(picture(2), [spec_of(name)], [5]).maps[0]
    assert not plain.signed
    assert plain.array.min() == 0


def test_grad_cam_keeps_what_its_relu_would_cut_off():
    image = twins.normalised(picture(2), PREPROCESSING.mean, PREPROCESSING.std)
    module = build("perceptron", 2, torch.float64)
    activations, gradients = twins.activations_and_gradients(module, image, "features.8", 5)
    sums = torch.zeros_like(activations[0])
    for k in range(CHANNELS):
        sums += gradients[k].mean() * activations[k]
    large = F.interpolate(sums[None, None], size=image.shape[1:], mode="bilinear", align_corners=False)[0, 0]
    np.testing.assert_allclose(signed("grad_cam"), (large / large.abs().max()).numpy(), rtol=0, atol=2e-7)


def test_rise_is_measured_from_its_mean():
    array = signed("rise").astype(np.float64)
    assert abs(array.mean()) < 1e-7
    plain = engine().explain(picture(2), [spec_of("rise")], [5]).maps[0].array
    assert np.corrcoef(array.ravel(), plain.ravel())[0, 1] == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("name", ["grad_cam", "hires_cam", "xgrad_cam", "integrated_gradients", "occlusion"])
def test_what_speaks_against_a_class_is_the_negative_of_what_speaks_for_it(name):
    np.testing.assert_allclose(signed(name, Against(Target(index=5))), -signed(name), rtol=0, atol=2e-7)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in SIGNED])
def test_other_methods_say_why_they_have_none(name):
    with pytest.raises(
        InvalidOption, match=rf"{name} has no signed maps: \w+ .*; these methods have some: cam, grad_cam"
    ):
        make_request(picture(), [METHODS[name]()], signed=True)
    make_request(picture(), [METHODS[name]()])


@pytest.mark.parametrize("spec", [GroupCam(variant="reference"), IntegratedGradCam(variant="reference"), Auto()])
def test_variants_that_cut_off_negative_evidence_have_none(spec):
    with pytest.raises(InvalidOption, match="has no signed maps"):
        make_request(picture(), [GradCam(), spec], signed=True)


def test_a_method_that_says_nothing_of_its_sign_has_no_signed_maps():
    class New(MethodSpec):
        title, paper = "New", ""

    assert New().unsigned == "it shows positive evidence alone"


# Finishing


def finished(*sums, **options):
    view = whole_view((8, 12))
    layers = [f"layer {index}" for index in range(len(sums))]
    target = Prediction(0, "cat", 1.0)
    return final_map(list(sums), method=GradCam(), target=target, layers=layers, view=view, signed=True, **options)


def test_values_keep_their_sign():
    array, degenerate = normalise_signed(np.array([[-4.0, 1.0], [0.0, 2.0]]))
    assert (array.tolist(), degenerate) == ([[-1, 0.25], [0, 0.5]], False)


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
def test_a_constant_map_is_degenerate(value):
    found = finished(np.full((4, 6), value))
    assert found.degenerate
    assert not found.array.any()


def test_several_layers_are_fused_by_their_mean_or_by_what_is_further_from_zero():
    one, other = np.zeros((8, 12)), np.zeros((8, 12))
    one[0, 0], one[0, 1], other[0, 0], other[0, 1], other[5, 5] = -2, 1, 0.2, 0.2, 0.4
    mean = finished(one, other).array  # -1 and 0.5, against 0.5, 0.5 and 1
    np.testing.assert_allclose(mean[[0, 0, 5], [0, 1, 5]], [-0.5, 1, 1], atol=1e-6)
    most = finished(one, other, fusion="max").array
    np.testing.assert_allclose(most[[0, 0, 5], [0, 1, 5]], [-1, 0.5, 1], atol=1e-6)


def test_boxes_are_around_what_speaks_for_the_target():
    sums = np.zeros((8, 12))
    sums[1, 2], sums[6, 9] = 1, -5
    (box,) = finished(sums, boxes=BoxOptions()).boxes
    assert (box.left, box.top, box.right, box.bottom) == (2, 1, 3, 2)


def test_a_signed_map_is_laid_into_the_sent_image():
    view = whole_view((8, 12))
    array = np.linspace(-1, 1, 96, dtype=np.float32).reshape(8, 12)
    np.testing.assert_allclose(into_original(array, view), array, atol=1e-6)


@pytest.mark.parametrize(
    ("encoding", "exact"), [("float32", 0), ("float16", 2**-11), ("uint8", 1 / 255), ("png", 1 / 255)]
)
def test_signed_maps_travel(encoding, exact):
    found = finished(np.linspace(-3, 2, 96).reshape(8, 12))
    array = decode(encode(found, encoding, None), encoding, (8, 12), signed=True)
    assert np.abs(array - found.array).max() <= exact + 1e-7
    assert array.dtype == np.float32


def test_overlays_have_diverging_colours_whatever_the_colormap():
    found = finished(np.linspace(-1, 1, 96).reshape(8, 12))
    image = Image.new("RGB", (12, 8))
    drawn = np.asarray(overlay(image, found.array, colormap="viridis", opacity=1, signed=True))
    table = matplotlib.colormaps["coolwarm"](np.arange(256), bytes=True)[:, :3]
    levels = ((found.array + np.float32(1)) / 2 * np.float32(255)).round().astype(int)
    np.testing.assert_array_equal(drawn, table[levels])
    blue, red = drawn[0, 0], drawn[-1, -1]
    assert blue[2] > blue[0]
    assert red[0] > red[2]
    file = encode(replace(found, lies_on=lambda: image), "overlay_png", opacity=1)
    with Image.open(io.BytesIO(file)) as read:
        np.testing.assert_array_equal(np.asarray(read), drawn)
    (own,) = engine().explain(picture(2), ["grad_cam"], [5], signed=True).maps
    assert own.overlay(opacity=1).getpixel((0, 0)) == tuple(table[round(float(own.array[0, 0] + 1) / 2 * 255)].tolist())

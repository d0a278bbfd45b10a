"""The first methods against their twins on EfficientNet-Lite0 and two photographs: real sizes, depthwise layers."""

import numpy as np
import pytest
import torch
from reference import twins

from camserve.methods import GradCam, GroupCam, ScoreCam

pytest_plugins = ["reference.default_model"]

FLOAT32_ULP = 1.2e-7
"""All that may differ when everything before the final map is float64."""
EARLY = "_blocks.2"
"""24 channels: Score-CAM asks one query a channel, and the twin makes them one by one, so of small photographs."""

METHODS = {
    "grad_cam": (GradCam(), "", twins.grad_cam),
    "group_cam": (GroupCam(groups=4), "", lambda *given: twins.group_cam_paper(*given, groups=4)),
    "group_cam_reference": (
        GroupCam(groups=4, variant="reference"),
        "_bn1",
        lambda *given: twins.group_cam_reference(*given, groups=4),
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_method_equals_its_twin(engines, lite0_float64, photo, method):
    assert_equal(engines, lite0_float64, photo, *METHODS[method])


def test_score_cam_equals_its_twin(small_engines, lite0_float64, small_photo):
    assert_equal(small_engines, lite0_float64, small_photo[0], ScoreCam(), EARLY, twins.score_cam)


def assert_equal(engines, module, photo, spec, layer, twin):
    """Holds the engines' maps against the twin's, in both precisions."""
    single, double = (
        engines[dtype].explain(photo, methods=[spec], layer=layer).maps[0] for dtype in ("float32", "float64")
    )
    preprocessing = engines["float64"].network.preprocessing
    image = twins.normalised(photo, preprocessing.mean, preprocessing.std)
    expected = twins.final(twin(module, image, double.layer, double.target.index))
    assert expected.max() == 1
    np.testing.assert_allclose(double.array, expected, rtol=0, atol=FLOAT32_ULP)
    # float32 rounds the activations at each of 60 layers, and the scores are differences of close probabilities.
    np.testing.assert_allclose(single.array, expected, rtol=0, atol=1e-4)


def test_the_photographs_are_recognised(engines, photo):
    labels = [prediction.label for prediction in engines["float32"].explain(photo).predictions]
    assert "espresso" in labels[:1] or {"tiger cat", "Egyptian cat", "tabby"} & set(labels[:2])


def test_the_default_layer_is_the_last_call_of_a_module_that_runs_many_times(engines, photo):
    module = engines["float32"]._executor.network.module
    calls = []
    handle = module.get_submodule(engines["float32"].info.default_layer).register_forward_hook(
        lambda _module, _inputs, output: calls.append(tuple(output.shape))
    )
    with handle, torch.no_grad():
        module(torch.zeros(1, 3, 224, 224))
    layer = engines["float32"].info.layer("")
    assert len(calls) > 1
    assert calls[-1] == (1, layer.channels, layer.height, layer.width) == (1, 1280, 7, 7)

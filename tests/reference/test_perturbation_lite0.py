"""The perturbation family against its twins on EfficientNet-Lite0 and two photographs, in float64.

At an early layer of few channels, with few samples and small photographs: a twin makes its passes one by one.
"""

import functools

import numpy as np
import pytest
from reference import twins
from reference import twins_perturbation as twin
from reference.test_perturbation_against_twins import FLOAT32_ULP, grouped, occlusion, rise, ss_cam

from camserve.methods import AblationCam, GroupCam, IsCam, Occlusion, Rise, ScoreCam, SsCam

pytest_plugins = ["reference.default_model"]

LAYER = "_blocks.0"
"""16 channels of 48 x 48, some of their values negative."""
RISE = Rise(masks=4, grid=4, keep_prob=0.4, seed=2)
OCCLUSION = Occlusion(positions=3, window=2)
KMEANS = GroupCam(groups=8, grouping="kmeans")
AGGLOMERATIVE = GroupCam(groups=8, grouping="agglomerative", variant="reference")
METHODS = {
    "score_cam_paper": (ScoreCam(variant="paper"), functools.partial(twin.score_cam, variant="paper")),
    "ss_cam": (SsCam(samples=1, std=0.5), functools.partial(ss_cam, samples=1, std=0.5, seed=0)),
    "is_cam": (IsCam(samples=2), functools.partial(twin.is_cam, samples=2)),
    "group_cam_kmeans": (KMEANS, grouped(twins.group_cam_paper, KMEANS)),
    "group_cam_agglomerative": (AGGLOMERATIVE, grouped(twins.group_cam_reference, AGGLOMERATIVE)),
    "rise": (RISE, rise(RISE)),
    "ablation_cam": (AblationCam(), twin.ablation_cam),
    "occlusion": (OCCLUSION, occlusion(OCCLUSION)),
}
"""Score-CAM's and Group-CAM's defaults are in `test_lite0_against_twins`."""


@pytest.mark.parametrize("method", METHODS)
def test_method_equals_its_twin(small_engines, lite0_float64, small_photo, method):
    (spec, by_twin), (photo, preprocessing) = METHODS[method], small_photo
    (found,) = small_engines["float64"].explain(photo, methods=[spec], layer=LAYER).maps
    image = twins.normalised(photo, preprocessing.mean, preprocessing.std)
    expected = twins.final(by_twin(lite0_float64, image, LAYER, found.target.index))
    assert expected.max() == 1
    np.testing.assert_allclose(found.array, expected, rtol=0, atol=FLOAT32_ULP)

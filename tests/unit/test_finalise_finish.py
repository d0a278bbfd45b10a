"""What is made of merged sums where a map is not linear in them, against loops over the queries themselves."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from camserve.finalise.finish import FINISHES, finished, ranking_of
from camserve.methods import (
    METHODS,
    GradCam,
    IsCam,
    ReciproCam,
    Rise,
    ScoreCam,
    SmoothGrad,
    SmoothGradCamPlusPlus,
    SsCam,
    Xrai,
)
from camserve.types import Partial

RNG = np.random.default_rng(1)
ACTIVATIONS = RNG.standard_normal((3, 2, 4)).astype(np.float32)
"""(C, u, v)."""


def colours(queries: int) -> np.ndarray:
    """(queries, K, 3, H, W): a gradient with respect to the pixels for each query and class."""
    return RNG.standard_normal((queries, 2, 3, 4, 5))


def powers(gradients: np.ndarray) -> np.ndarray:
    """(K, 3, C, u, v): what Smooth Grad-CAM++ sums up of (n, K, C, u, v) gradients."""
    return np.stack([(gradients**power).sum(axis=0) for power in (1, 2, 3)], axis=1)


@pytest.mark.parametrize("method", [SmoothGrad(), Xrai()], ids=lambda method: method.name)
def test_a_mean_over_queries_then_the_strongest_channel(method):
    gradients = colours(7)
    found = finished(method, Partial(0, 7, gradients.sum(axis=0)))
    for target in range(2):
        for row in range(4):
            for column in range(5):
                means = [sum(one[target, channel, row, column] for one in gradients) / 7 for channel in range(3)]
                strongest = max(map(abs, means)) if isinstance(method, SmoothGrad) else max(means)
                assert found[target, row, column] == pytest.approx(strongest, rel=1e-12)


def test_smooth_grad_cam_plus_plus_is_a_ratio_of_means_of_powers():
    gradients = np.random.default_rng(1).standard_normal((6, 2, 3, 2, 4))
    found = finished(SmoothGradCamPlusPlus(), Partial(0, 6, powers(gradients), context=ACTIVATIONS))
    for target in range(2):
        expected = np.zeros((2, 4))
        for channel in range(3):
            weight = 0.0
            for row in range(2):
                for column in range(4):
                    g = gradients[:, target, channel, row, column]
                    first, second, third = (float((g**power).mean()) for power in (1, 2, 3))
                    denominator = 2 * second + float(ACTIVATIONS[channel].astype(np.float64).sum()) * third + 1e-6
                    weight += second / denominator * max(first, 0.0)
            expected += weight * ACTIVATIONS[channel].astype(np.float64)
        np.testing.assert_allclose(found[target], np.maximum(expected, 0), rtol=1e-9)
        assert (expected < 0).any(), "what is negative is cut off"


@pytest.mark.parametrize("method", [SsCam(), IsCam()], ids=lambda method: method.name)
def test_sampled_channels_weigh_by_the_exponential_of_their_mean_gain(method):
    gains, counts = RNG.standard_normal((2, 3)), np.array([4.0, 2.0, 0.0])
    sums = np.concatenate([gains * counts, counts[None]])
    found = finished(method, Partial(0, 6, sums, context=ACTIVATIONS))
    for target in range(2):
        expected = sum(math.exp(gains[target, channel]) * ACTIVATIONS[channel].astype(np.float64) for channel in (0, 1))
        np.testing.assert_allclose(found[target], expected, rtol=1e-12)


def test_a_gain_without_bounds_still_makes_finite_maps():
    sums = np.array([[1e30, -1e30, 5.0], [1.0, 1.0, 1.0]])
    found = finished(SsCam(), Partial(0, 3, sums, context=ACTIVATIONS))
    assert np.isfinite(found.astype(np.float32)).all()


@pytest.mark.parametrize(
    ("method", "sums", "shape"),
    [
        (SmoothGradCamPlusPlus(), np.ones((2, 3, 3, 2, 4)), (2, 2, 4)),
        (SsCam(), np.ones((3, 3)), (2, 1, 1)),
        (IsCam(), np.ones((3, 3)), (2, 1, 1)),
    ],
)
def test_without_a_context_there_is_nothing_yet(method, sums, shape):
    found = finished(method, Partial(0, 1, sums))
    assert found.shape == shape
    assert not found.any()


@pytest.mark.parametrize("method", [ReciproCam(), Rise()], ids=lambda method: method.name)
def test_negative_scores_that_differ_by_rounding_alone_make_no_map(method):
    """A number that is -3 wherever the network looks, in float32; beside it, one that is -3 and -2.9."""
    sums = np.full((2, 7, 7), -3, np.float32)
    sums[0, 2] = np.nextafter(np.float32(-3), np.float32(0))
    sums[1, 2] = -2.9
    same, other = finished(method, Partial(0, 49, sums))
    assert not same.any()
    np.testing.assert_allclose(other[2], 0.1, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name, spec in METHODS.items() if spec not in FINISHES])
def test_the_map_of_any_other_method_is_its_sums(name):
    sums = np.ones((1, 2, 2))
    assert finished(METHODS[name](), Partial(0, 1, sums)) is sums


def test_only_xrai_is_ranked_and_what_is_ranked_is_its_finish():
    partial = Partial(0, 7, colours(7).sum(axis=0))
    assert [name for name, spec in METHODS.items() if ranking_of(spec(), partial) is not None and spec.ranked] == [
        "xrai"
    ]
    ranking = ranking_of(Xrai(), partial)
    assert ranking is not None
    np.testing.assert_array_equal(ranking.attribution, finished(Xrai(), partial))
    assert ranking_of(GradCam(), partial) is ranking_of(ScoreCam(), partial) is None


def test_what_is_not_finite_stays_so_without_a_warning():
    """The final map refuses it."""
    sums = np.full((1, 3, 3, 2, 4), np.inf)
    with np.errstate(all="raise"):
        assert np.isnan(finished(SmoothGradCamPlusPlus(), Partial(0, 2, sums, context=ACTIVATIONS))).all()


@given(st.integers(0, 2**32 - 1), st.sets(st.integers(1, 11)), st.randoms(use_true_random=False))
def test_the_finish_of_a_merge_does_not_depend_on_how_the_queries_were_cut(seed, cuts, random):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(-3, 4, (12, 2, 3, 4, 5)).astype(np.float32)  # whole numbers: their sums are exact
    gradients = rng.integers(-3, 4, (12, 2, 3, 2, 4)).astype(np.float32)
    edges = [0, *sorted(cuts), 12]
    ranges = list(itertools.pairwise(edges))
    random.shuffle(ranges)
    for method, sums_of in (
        (SmoothGrad(), lambda at: pixels[at].sum(0)),
        (SmoothGradCamPlusPlus(), lambda at: powers(gradients[at])),
    ):
        parts = [
            Partial(0, stop - start, sums_of(slice(start, stop)), context=ACTIVATIONS if start == 0 else None)
            for start, stop in ranges
        ]
        merged = parts[0]
        for part in parts[1:]:
            merged = merged.merge(part)
        whole = finished(method, Partial(0, 12, sums_of(slice(0, 12)), context=ACTIVATIONS))
        np.testing.assert_array_equal(finished(method, merged), whole)

"""The finishes, in numpy from merged sums, against formulas in torch that have every sample."""

import numpy as np
import pytest
import torch
from reference import twins_finish as twin

from camserve.finalise.finish import FINISHES, finished, ranking_of
from camserve.methods import (
    METHODS,
    Cam,
    DRise,
    GradCam,
    HiresCam,
    IsCam,
    LayerCam,
    ReciproCam,
    Rise,
    SmoothGrad,
    SmoothGradCamPlusPlus,
    SsCam,
    XgradCam,
    Xrai,
)
from camserve.types import Layer, Partial

FLOAT64 = {"rtol": 1e-12, "atol": 1e-13}
"""Float64 sums of a few terms in another order."""
SAMPLES, TARGETS, CHANNELS, SIZE = 6, 2, 4, (3, 5)
LAYER = Layer("layer", CHANNELS, *SIZE)
SPECS = (SmoothGrad(), SmoothGradCamPlusPlus(), SsCam(samples=SAMPLES), IsCam(samples=SAMPLES), Xrai())


OF_THEIR_SUMS = (Cam, GradCam, HiresCam, XgradCam, Rise, DRise, ReciproCam)
"""Methods whose finish only cuts off, or shifts, sums that are maps already."""


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_every_method_with_other_sums_than_its_maps_has_a_finish():
    plain = {spec for spec in METHODS.values() if spec().sums_shape(LAYER, (8, 9), 2) in ((2, *SIZE), (2, 8, 9))}
    assert set(FINISHES) - set(OF_THEIR_SUMS) == {type(spec) for spec in SPECS} == set(METHODS.values()) - plain
    assert set(OF_THEIR_SUMS) <= plain


@pytest.mark.parametrize("method", OF_THEIR_SUMS)
def test_maps_of_both_signs_are_cut_off_or_shifted_value_by_value(method):
    sums = random(TARGETS, *SIZE).numpy()
    sums[1] = np.abs(sums[1])  # a map of probabilities stays as it is
    cut, signed = finished(method(), Partial(0, 0, sums)), finished(method(), Partial(0, 0, sums), signed=True)
    for target, plane in enumerate(sums):
        least, mean = min(0, min(plane.flat)), sum(plane.flat) / plane.size
        for place, value in np.ndenumerate(plane):
            assert cut[target][place] == (value - least if method in (Rise, DRise, ReciproCam) else max(value, 0))
            assert signed[target][place] == pytest.approx(value - mean if method in (Rise, DRise) else value, abs=1e-15)


@pytest.mark.parametrize("answered", [1, 4, SAMPLES])
def test_the_finish_of_colours_is_that_of_a_mean_of_the_samples_answered(answered):
    """The samples come from two partials, so that the mean is not of the one or the other."""
    samples = random(answered, TARGETS, 3, 8, 9)
    halves = [Partial(0, len(part), part.sum(dim=0).numpy()) for part in (samples[:1], samples[1:])]
    whole = halves[0].merge(halves[1])
    assert whole.sums.shape == SmoothGrad().sums_shape(LAYER, (8, 9), TARGETS)
    np.testing.assert_allclose(finished(SmoothGrad(), whole), twin.smooth_grad(samples).numpy(), **FLOAT64)
    np.testing.assert_allclose(finished(Xrai(), whole), twin.xrai(samples).numpy(), **FLOAT64)
    ranking = ranking_of(Xrai(), whole)
    assert ranking is not None
    np.testing.assert_array_equal(ranking.attribution, finished(Xrai(), whole))
    assert ranking_of(SmoothGrad(), whole) is None


@pytest.mark.parametrize("scale", [1.0, 1e-3, 0.0], ids=["large", "beside the epsilon", "zero"])
@pytest.mark.parametrize("answered", [1, SAMPLES])
def test_the_finish_of_smooth_grad_cam_plus_plus_is_the_ratio_of_mean_powers(answered, scale):
    gradients = scale * random(answered, TARGETS, CHANNELS, *SIZE)
    activations = random(CHANNELS, *SIZE, seed=1).abs()
    powers = torch.stack([(gradients**power).sum(dim=0) for power in (1, 2, 3)], dim=1)
    partial = Partial(0, answered, powers.numpy(), context=activations.numpy())
    assert partial.sums.shape == SmoothGradCamPlusPlus().sums_shape(LAYER, (8, 9), TARGETS)
    found = finished(SmoothGradCamPlusPlus(), partial)
    assert found.any() == (scale > 0)
    np.testing.assert_allclose(found, twin.smooth_grad_cam_plus_plus(gradients, activations).numpy(), **FLOAT64)


@pytest.mark.parametrize("spec", [SsCam(samples=SAMPLES), IsCam(samples=SAMPLES)], ids=str)
def test_the_finish_of_samples_is_the_exponential_of_the_mean_gain_of_those_answered(spec):
    """One channel has all its samples, one has some, one has none, and one gains more than the exponential may."""
    gains, activations = random(TARGETS, CHANNELS, SAMPLES), random(CHANNELS, *SIZE, seed=1)
    answered = torch.tensor([[True] * 6, [True, False] * 3, [False] * 6, [False] * 5 + [True]])
    sums = torch.cat([(gains * answered).sum(dim=2), answered.sum(dim=1)[None]])
    partial = Partial(0, int(answered.sum()), sums.numpy(), context=activations.numpy())
    assert partial.sums.shape == spec.sums_shape(LAYER, (8, 9), TARGETS)
    found = finished(spec, partial)
    np.testing.assert_allclose(found, twin.sampled_channels(gains, answered, activations).numpy(), **FLOAT64)


def test_an_enormous_gain_is_cut_off_so_that_the_map_stays_finite():
    sums = np.array([[1e4, 2e4], [1.0, 1.0]])
    found = finished(SsCam(), Partial(0, 2, sums, context=np.ones((2, *SIZE), np.float32)))
    assert np.isfinite(found.astype(np.float32)).all()
    assert (found > 1e19).all()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_without_any_answer_the_map_is_zero(spec):
    sums = np.zeros(spec.sums_shape(LAYER, (8, 9), TARGETS), np.float32)
    for context in (None, np.ones((CHANNELS, *SIZE), np.float32)):
        found = finished(spec, Partial(0, 0, sums, context=context))
        assert (len(found), found.ndim) == (TARGETS, 3)
        assert not found.any()


def test_most_methods_need_no_finish():
    sums = random(TARGETS, *SIZE).numpy()
    assert finished(LayerCam(), Partial(0, 0, sums)) is sums

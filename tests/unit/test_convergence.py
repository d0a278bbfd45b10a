"""How far a map is from that of all queries: the estimate against a slow twin, when it counts, how well it holds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from camserve.evaluation.digits.scenes import benchmark_scenes
from camserve.evaluation.digits.shipped import SHIPPED, load_engine
from camserve.finalise.convergence import FACTOR, FEW, LEAST_BLOCKS, MOST_SHARE, POWER, Convergence, looks
from camserve.methods import METHODS, AblationCam, DRise, IsCam, MethodSpec, Rise, ScoreCam, SsCam
from camserve.types import Partial

TOLERANT = [AblationCam, DRise, IsCam, Rise, ScoreCam, SsCam]


def partial(sums: np.ndarray, context: np.ndarray | None = None) -> Partial:
    return Partial(0, 1, sums, context=context)


def growing(blocks: int, side: int = 5, targets: int = 2, seed: int = 0) -> tuple[np.ndarray, list[float]]:
    """Sums (blocks, targets, side, side) after 1, 2, ... blocks, each smaller than the one before, and the energies."""
    random = np.random.default_rng(seed)
    energies = sorted(random.uniform(0.1, 1, blocks), reverse=True)
    added = random.uniform(0, 1, (blocks, targets, side, side)) * np.array(energies)[:, None, None, None]
    return added.cumsum(axis=0), energies


def twin(sums: Sequence[np.ndarray], at: Sequence[int], energies: Sequence[float], target: int, power: float) -> float:
    """The estimate after the last of some looks, number by number, from the formula."""

    def scaled(blocks: int) -> list[float]:
        values = [max(0.0, value) for value in sums[blocks - 1][target].ravel().tolist()]
        low, high = min(values), max(values)
        return [(value - low) / (high - low) for value in values]

    def share(blocks: int) -> float:
        return sum(energies[:blocks]) / sum(energies)

    now = at[-1]
    before = max(blocks for blocks in at if blocks <= now / 2)
    changes = []
    for blocks in at:
        if before <= blocks < now:
            changes += [abs(one - other) for one, other in zip(scaled(now), scaled(blocks), strict=True)]
    missing = (1 - share(now)) / (1 - share(before) / share(now))
    return min(1.0, FACTOR * (1 + FEW / now) * max(changes) * missing**power)


@pytest.mark.parametrize(
    "method",
    [ScoreCam(tolerance=0.01), Rise(masks=80, tolerance=0.01), DRise(masks=80, grid=7, tolerance=0.01)],
    ids=["score_cam", "rise", "d_rise"],
)
@pytest.mark.parametrize("seed", range(3))
def test_the_estimate_is_that_of_the_formula(seed, method):
    """RISE has no energies: all of its masks have the same, and its map is a mean."""
    sums, energies = growing(80, seed=seed)
    convergence = Convergence(method, 80, energies if method.name == "score_cam" else (), signed=False)
    energies, power = (energies, POWER) if method.name == "score_cam" else ([1.0] * 80, 0.5)
    at = [5, 9, 16, 21, 30, 44, 60, 70]
    for place, blocks in enumerate(at):
        convergence.note(partial(sums[blocks - 1]), blocks)
        if blocks < 16:
            assert convergence.estimates is None, "nothing was seen of half as many"
            continue
        want = [twin(sums, at[: place + 1], energies, target, power) for target in (0, 1)]
        np.testing.assert_allclose(convergence.estimates, want, rtol=1e-5)  # maps are float32


def test_looks_that_stand_close_are_not_all_kept_but_the_estimate_stays():
    """A step may have few queries: an estimate after each is much like that after some of them."""
    sums, energies = growing(400)
    every, some = (Convergence(ScoreCam(tolerance=1e-9), 400, energies, signed=False) for _ in range(2))
    for blocks in range(1, 301):
        every.note(partial(sums[blocks - 1]), blocks)
    for blocks in range(10, 301, 10):
        some.note(partial(sums[blocks - 1]), blocks)
    assert every.estimates == pytest.approx(some.estimates, rel=0.25)


@pytest.mark.parametrize("make", TOLERANT)
def test_a_method_that_asks_for_the_exact_map_gets_it(make):
    assert make().accepted_difference == 0
    assert make(tolerance=0.05).accepted_difference == 0.05
    assert make(tolerance=0.05).asking_all == make()


def test_the_methods_that_may_stop_early():
    """Group-CAM has 32 queries, and those of Occlusion are places: without one there is a hole in the map."""
    having = {kind for kind in METHODS.values() if any(each.name == "tolerance" for each in kind.parameters())}
    assert having == set(TOLERANT)


def settled(blocks: int, looks_at: Sequence[int], change: float = 0.0, **options) -> list[bool]:
    """Whether maps that hardly change are enough, after each look."""
    convergence = Convergence(ScoreCam(tolerance=0.1), blocks, (), **{"signed": False} | options)
    found, sums = [], np.arange(25.0).reshape(1, 5, 5)
    for place, done in enumerate(looks_at):
        convergence.note(partial(sums * done + change * place), done)
        found.append(convergence.enough)
    return found


def test_no_map_is_enough_before_the_least_number_or_just_before_the_end():
    assert settled(1000, [10, 20, 31, 49, 50, 60]) == [False] * 4 + [True] * 2  # 5 % of them
    assert settled(100, [8, 16, LEAST_BLOCKS - 1, LEAST_BLOCKS]) == [False, False, False, True]
    late = math.floor(MOST_SHARE * 100)
    assert settled(100, [20, late + 1]) == [False, False]
    assert settled(100, [20, late]) == [False, True]
    assert settled(20, [5, 10, 18, 20]) == [False] * 4


def test_a_map_without_evidence_is_never_enough():
    """It has not changed, because nothing has come yet that could have."""
    convergence = Convergence(ScoreCam(tolerance=0.5), 100, (), signed=False)
    for blocks in (20, 40, 60):
        convergence.note(partial(np.zeros((1, 5, 5))), blocks)
        assert not convergence.enough
    assert convergence.estimates == (1.0,)


def test_all_targets_must_be_within_the_tolerance():
    calm, sums = np.arange(25.0).reshape(5, 5), []
    for blocks in (20, 40, 45):
        wild = np.roll(calm, blocks)
        sums.append((blocks, np.stack([calm * blocks, wild])))
    convergence = Convergence(ScoreCam(tolerance=0.2), 100, (), signed=False)
    for blocks, both in sums:
        convergence.note(partial(both), blocks)
    assert convergence.estimates is not None
    assert convergence.estimates[0] < 1e-6 < 0.2 < convergence.estimates[1]
    assert not convergence.enough


def test_what_comes_after_a_map_was_enough_does_not_make_its_estimate_worse():
    convergence = Convergence(ScoreCam(tolerance=0.2), 100, (), signed=False)
    calm = np.arange(25.0).reshape(1, 5, 5)
    for blocks in (20, 40):
        convergence.note(partial(calm * blocks), blocks)
    assert convergence.enough
    convergence.note(partial(np.roll(calm, 7)), 44)
    assert convergence.enough
    assert convergence.estimates is not None
    assert max(convergence.estimates) <= 0.2
    convergence.note(partial(np.roll(calm, 9)), 100)
    assert convergence.estimates == (0.0,)


def test_signed_maps_may_differ_by_two():
    convergence = Convergence(AblationCam(tolerance=0.2), 100, (), signed=True)
    calm = np.linspace(-1, 1, 25).reshape(1, 5, 5)
    for blocks, sign in ((20, 1), (40, -1)):
        convergence.note(partial(sign * calm), blocks)
    assert convergence.estimates == (2.0,)


def test_a_channel_of_several_queries_is_one_block():
    """SS-CAM's sums are gains of channels; its energies are those of channels as well."""
    context = np.tile(np.arange(16.0).reshape(1, 4, 4), (64, 1, 1))
    convergence = Convergence(SsCam(samples=5, tolerance=0.9), 320, [1.0] * 64, signed=False)
    for channels in (16, 32, 40):
        sums = np.zeros((2, 64))
        sums[0, :channels], sums[1, :channels] = 0.5, 5
        convergence.note(partial(sums, context), 5 * channels)
        assert convergence.enough == (channels >= 32)


def test_the_change_of_a_running_mean_is_its_standard_error():
    """RISE: what the map has changed by since half of the masks is, over the pixels, as large as the standard error
    that all samples together tell."""
    random = np.random.default_rng(0)
    samples = random.normal(1.0, 1.0, (400, 1, 40, 40)) + np.arange(40)[:, None]
    sums = samples.cumsum(axis=0)

    def scaled(values: np.ndarray) -> np.ndarray:
        return (values - values.min()) / (values.max() - values.min())

    change = scaled(sums[399] / 400) - scaled(sums[199] / 200)
    error = samples.std(axis=0) / math.sqrt(400) / np.ptp(sums[399] / 400)
    assert math.sqrt((change**2).mean()) == pytest.approx(
        math.sqrt((error**2).mean()), rel=0.25
    )  # minimum and maximum are single pixels
    convergence = Convergence(Rise(masks=4000, tolerance=0.001), 4000, (), signed=False)
    for done in (100, 200, 400):
        convergence.note(partial(sums[done - 1]), done)
    assert convergence.estimates is not None
    assert convergence.estimates[0] > 3 * float(error.mean()), "the largest of 1600 differences, not a typical one"


@pytest.mark.parametrize("blocks", [1, 8, 31, 64, 1280, 4000])
def test_a_worker_that_asks_alone_looks_more_and_more_seldom(blocks):
    found = looks(blocks)
    assert found[-1] == blocks
    assert found == sorted(set(found))
    steps = [later / earlier for earlier, later in itertools.pairwise(found)]
    assert all(step <= 1.34 for step in steps[:-1])  # 1.25, rounded up
    assert sum(done <= max(LEAST_BLOCKS, 0.05 * blocks) / 2 for done in found[:-1]) == (blocks > LEAST_BLOCKS // 2)


def test_the_true_difference_of_a_mean_over_masks_is_below_the_estimate():
    """RISE in a world of its own: a score that is what is left of a pattern, and noise. 95 % are promised."""
    random = np.random.default_rng(0)
    late = stopped = 0
    for _ in range(40):
        cells = random.integers(0, 2, (600, 4, 4)).astype(np.float64)
        masks = cells.repeat(6, axis=1).repeat(6, axis=2)
        pattern = random.uniform(0, 1, (4, 4)) ** 3
        scores = (cells * pattern).sum(axis=(1, 2)) + random.normal(0, 0.3, 600)
        sums = (scores[:, None, None] * masks).cumsum(axis=0)[:, None]
        final = sums[-1] - sums[-1].min()
        convergence = Convergence(Rise(masks=600, tolerance=0.5), 600, (), signed=False)
        for done in range(20, 540, 20):
            convergence.note(partial(sums[done - 1]), done)
            if convergence.enough:
                early = sums[done - 1] - sums[done - 1].min()
                assert convergence.estimates is not None
                true = np.abs(early / early.max() - final / final.max()).max()
                late += true > convergence.estimates[0]
                stopped += 1
                break
    assert stopped >= 30, "else nothing is shown"
    assert late <= 2


# Networks


def within(
    method: type[MethodSpec], tolerance: float, scenes: int, layer: str, **parameters
) -> list[tuple[float, float, float]]:
    """(share asked, estimate, true difference) of the maps of scenes."""
    engine, found = load_engine(), []
    for scene in benchmark_scenes(scenes):
        full, early = (
            engine.explain(scene.pixels, [method(**parameters, tolerance=each)], layer=layer).maps[0]
            for each in (0.0, tolerance)
        )
        assert full.estimated_difference is None
        assert early.estimated_difference is not None
        assert early.complete
        found.append((early.fraction, early.estimated_difference, float(np.abs(early.array - full.array).max())))
    return found


@pytest.mark.parametrize(
    ("method", "layer", "parameters"),
    [(ScoreCam, "", {}), (AblationCam, "features.4.1", {}), (IsCam, "", {"samples": 3})],
    ids=["score_cam", "ablation_cam", "is_cam"],
)
def test_the_true_difference_is_below_the_estimate(method, layer, parameters):
    """95 % of the maps are promised; of twelve that makes one that may be above.

    Ablation-CAM is asked before the last ReLU: behind it it is a formula, all of which is asked at once.
    """
    found = within(method, 0.2, 12, layer, **parameters)
    assert sum(share < 1 for share, _, _ in found) >= 9, "else nothing is shown"
    assert all(estimate <= 0.2 for _, estimate, _ in found)
    assert all(share >= LEAST_BLOCKS / 400 for share, _, _ in found)
    assert sum(true > estimate for share, estimate, true in found if share < 1) <= 1
    # Where all is asked the estimate is 0, and sums of several steps round otherwise than those of one.
    assert all(estimate == 0 and true < 1e-6 for share, estimate, true in found if share == 1)


def test_a_score_cam_that_stopped_is_the_sum_over_its_channels_computed_slowly():
    """The first channels by energy, one masked image each, in float64: the twin knows nothing of steps or sums."""
    engine, scene = load_engine(), benchmark_scenes(3)[2].pixels
    answer = engine.explain(scene, [ScoreCam(tolerance=0.3)])
    (saliency,) = answer.maps
    asked = round(64 * saliency.fraction)
    assert LEAST_BLOCKS <= asked < 64
    module = SHIPPED["digits"].trained().double()
    pixels = torch.from_numpy(scene).double().permute(2, 0, 1) / 255
    image = (pixels - 0.5) / 0.25
    with torch.no_grad():
        activations = module.features(image[None])[0]
        total = torch.zeros(image.shape[1:], dtype=torch.float64)
        for channel in sorted(range(64), key=lambda k: -float(activations[k].abs().mean()))[:asked]:
            mask = F.interpolate(activations[channel][None, None], image.shape[1:], mode="bilinear")[0, 0]
            if mask.max() > mask.min():
                query = image * (mask - mask.min()) / (mask.max() - mask.min())
                total += module(query[None]).softmax(dim=1)[0, saliency.target.index] * mask
    want = ((total - total.min()) / (total.max() - total.min())).numpy()
    np.testing.assert_allclose(saliency.array, want, atol=1e-4)  # float32 probabilities of 64 passes


def test_a_rise_that_stopped_is_the_rise_of_as_many_masks():
    engine, scene = load_engine(), benchmark_scenes(1)[0].pixels
    early = engine.explain(scene, [Rise(masks=400, tolerance=1.0)]).maps[0]
    masks = round(400 * early.fraction)
    assert LEAST_BLOCKS <= masks < 400
    np.testing.assert_allclose(early.array, engine.explain(scene, [Rise(masks=masks)]).maps[0].array, atol=1e-5)

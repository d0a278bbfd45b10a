"""The fitted cost of a step, and the choice of a method by it."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

import pytest

from camserve.errors import InvalidOption
from camserve.planning import Rung, StepCost, choose
from camserve.planning.cost import FIRST_QUERIES, MANY_QUERIES, in_words

CPU = (0.012, 0.03, 0.02)
GPU = (0.0002, 0.0015, 0.004)
"""(a, b, c) in seconds for each query, image and step."""


def seconds_of(cost: tuple[float, float, float], queries: int, images: int) -> float:
    return cost[0] * queries + cost[1] * images + cost[2]


def teach(
    fit: StepCost, cost: tuple[float, float, float], steps: int, noise: Callable[[], float], seed: int = 0
) -> None:
    chosen = random.Random(seed)
    for _ in range(steps):
        queries, images = chosen.randint(0, 64), chosen.randint(1, 8)
        fit.observe(queries, images, seconds_of(cost, queries, images) * noise())


def lognormal(sigma: float, seed: int = 1) -> Callable[[], float]:
    drawn = random.Random(seed)
    return lambda: drawn.lognormvariate(0.0, sigma)


def with_outliers(seed: int = 2) -> Callable[[], float]:
    drawn = random.Random(seed)
    return lambda: 10.0 if drawn.random() < 0.03 else drawn.lognormvariate(0.0, 0.05)


@pytest.mark.parametrize("cost", [CPU, GPU])
def test_the_costs_are_recovered_without_noise(cost):
    fit = StepCost(0.01)
    teach(fit, cost, 300, lambda: 1.0)
    # The prior weighs 1 % of one observation, and the solver stops after a few sweeps.
    assert (fit.query_s, fit.image_s, fit.step_s) == pytest.approx(cost, rel=0.03)


@pytest.mark.parametrize("cost", [CPU, GPU])
@pytest.mark.parametrize("noise", [lognormal(0.1), with_outliers()])
def test_predictions_hold_under_noise_and_outliers(cost, noise):
    fit = StepCost(0.01)
    teach(fit, cost, 300, noise)
    # 33 remembered steps of 10 % noise leave 2 to 4 %; the smallest step is the one known worst.
    for queries, images, tolerance in [(64, 1, 0.08), (32, 4, 0.08), (0, 1, 0.3)]:
        assert fit.predict(queries, images) == pytest.approx(seconds_of(cost, queries, images), rel=tolerance)


def test_one_step_ten_times_as_slow_changes_little():
    fit = StepCost(0.01)
    teach(fit, CPU, 100, lognormal(0.05))
    before = fit.predict(32, 2)
    fit.observe(32, 2, 10 * before)
    assert fit.predict(32, 2) == pytest.approx(before, rel=0.05)


def test_openings_after_full_steps_are_no_outliers():
    fit = StepCost(0.01)
    for _ in range(100):
        fit.observe(16, 1, 0.2)
    assert fit.predict(0, 1) < 0.02, "all of it was put down to the queries"
    for _ in range(20):
        fit.observe(0, 1, 0.04)
    assert (fit.predict(0, 1), fit.predict(16, 1)) == pytest.approx((0.04, 0.2), rel=0.1)


@pytest.mark.parametrize("factor", [0.25, 4.0])
def test_a_lasting_change_is_followed(factor):
    fit = StepCost(0.01)
    teach(fit, CPU, 100, lognormal(0.05))
    teach(fit, CPU, 150, lambda: factor)
    assert fit.predict(32, 2) == pytest.approx(factor * seconds_of(CPU, 32, 2), rel=0.1)  # 0.97^150 is 1 %


def test_no_coefficient_is_ever_negative():
    fit, drawn = StepCost(0.01), random.Random(3)
    for _ in range(500):
        fit.observe(drawn.randint(0, 64), drawn.randint(1, 8), drawn.choice([0.0, 0.001, 0.1, 3.0]) * drawn.random())
        assert min(fit.query_s, fit.image_s, fit.step_s) >= 0
        assert fit.predict(0, 1) > 0


@pytest.mark.parametrize(("queries", "images"), [(32, 1), (8, 8)])
def test_steps_that_are_all_alike_are_predicted(queries, images):
    fit = StepCost(0.01)
    for _ in range(100):
        fit.observe(queries, images, 0.3)
    assert fit.predict(queries, images) == pytest.approx(0.3, rel=0.01)
    assert 0.3 < fit.predict(2 * queries, images) < 0.61, "a larger step takes longer"


def test_what_a_query_takes_is_remembered_while_none_is_asked():
    fit = StepCost(0.5)
    teach(fit, CPU, 100, lambda: 1.0)
    for _ in range(1000):
        fit.observe(0, 1, CPU[1] + CPU[2])
    assert fit.query_s == pytest.approx(CPU[0], rel=0.1)


def test_before_the_first_step_the_prior_speaks():
    fit = StepCost(0.02)
    assert fit.predict(10, 3) == pytest.approx(0.2)
    assert fit.queries_within(0.1, 1) == 5
    assert fit.observed == 0


def test_a_budget_is_what_fits_and_at_least_one_query():
    fit = StepCost(0.01)
    teach(fit, CPU, 200, lambda: 1.0)
    for images in (1, 4):
        most = fit.queries_within(0.3, images)
        assert fit.predict(most, images) <= 0.3 < fit.predict(most + 1, images)
    assert fit.queries_within(0.001, 8) == 1


def test_steps_grow_at_most_twofold():
    fit = StepCost(1e-9)
    seen = []
    for _ in range(5):
        seen.append(fit.queries_within(MANY_QUERIES, 1))
        fit.observe(seen[-1], 1, 0.001)
    assert seen == [FIRST_QUERIES * 2**power for power in range(5)]


# The choice of a method


LADDER = [
    Rung("grad_cam", "grad", 0),
    Rung("group_cam with 32 groups", "group", 32),
    Rung("score_cam", "score", 1000),
]


def per_query(seconds: float) -> Callable[[int], float]:
    return lambda queries: 0.1 + seconds * queries


@pytest.mark.parametrize(
    ("budget_s", "spec", "reason"),
    [
        (2.0, "group", "score_cam would take 12.1 s of 2.0 s; group_cam with 32 groups takes 0.48 s"),
        (0.2, "grad", "group_cam with 32 groups would take 0.48 s of 0.2 s; grad_cam takes 0.1 s"),
        (0.05, "grad", "group_cam with 32 groups would take 0.48 s of 0.05 s; grad_cam takes 0.1 s"),
        (60.0, "score", "score_cam, the most faithful, takes 12.1 s of 60.0 s"),
    ],
)
def test_the_most_faithful_rung_that_fits_is_chosen_and_says_why(budget_s, spec, reason):
    choice = choose(LADDER, per_query(0.012), budget_s)
    assert (choice.rung.spec, choice.reason) == (spec, reason)


def test_a_rung_needs_some_room():
    assert choose(LADDER, per_query(0.012), 12.2).rung.spec == "group"
    assert choose(LADDER, per_query(0.012), 1.25 * 12.2).rung.spec == "score"


def test_a_faithful_rung_may_be_cheaper_than_the_one_before_it():
    ladder = [Rung("grad_cam", 0, 0), Rung("score_cam", 1, 1000), Rung("group_cam", 2, 32)]
    assert choose(ladder, per_query(0.012), 2.0).rung.spec == 2


def test_as_long_as_nothing_was_measured_the_cheapest_is_chosen():
    choice = choose(LADDER, lambda queries: None, 60.0)
    assert choice.rung.spec == "grad"
    assert choice.reason == "no step was measured yet; grad_cam is the cheapest"


def test_an_empty_ladder_is_refused():
    with pytest.raises(InvalidOption, match="at least one"):
        choose([], per_query(1.0), 1.0)


@pytest.mark.parametrize(
    ("seconds", "words"), [(12.06, "12.1 s"), (0.0337, "0.034 s"), (-0.5, "-0.5 s"), (120, "120.0 s")]
)
def test_seconds_in_words(seconds, words):
    assert in_words(seconds) == words


def test_where_nothing_fits_the_cheapest_is_chosen_wherever_it_stands():
    ladder = [Rung("many", 1, 100), Rung("few", 2, 1), Rung("some", 3, 10)]
    choice = choose(ladder, per_query(1.0), 0.5)
    assert choice.rung.spec == 2
    assert re.fullmatch(r"many would take 100\.\d s of 0\.5 s; few takes 1\.\d s", choice.reason)

"""The fitted cost of a step, and the choice of a method by it."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pytest

from camserve.errors import InvalidOption
from camserve.methods.work import KINDS, Kind
from camserve.planning import Candidate, Load, StepCost, choose
from camserve.planning.cost import FIRST_UNITS, in_words

CPU = (0.012, 0.03, 0.02)
GPU = (0.0002, 0.0015, 0.004)
"""(a, b, c) in seconds for each masked forward, item and step."""


def queries(number: int, items: int) -> Load:
    return Load({"masked_forward": number}, items)


def cost_of(prior_s: float) -> StepCost:
    return StepCost(prior_s, target_s=0.3)


def predict(fit: StepCost, number: int, items: int) -> float:
    return fit.predict(queries(number, items))


def seconds_of(cost: tuple[float, float, float], number: int, items: int) -> float:
    return cost[0] * number + cost[1] * items + cost[2]


def teach(
    fit: StepCost, cost: tuple[float, float, float], steps: int, noise: Callable[[], float], seed: int = 0
) -> None:
    chosen = random.Random(seed)
    for _ in range(steps):
        number, items = chosen.randint(0, 64), chosen.randint(1, 8)
        fit.observe(queries(number, items), seconds_of(cost, number, items) * noise())


def lognormal(sigma: float, seed: int = 1) -> Callable[[], float]:
    drawn = random.Random(seed)
    return lambda: drawn.lognormvariate(0.0, sigma)


def with_outliers(seed: int = 2) -> Callable[[], float]:
    drawn = random.Random(seed)
    return lambda: 10.0 if drawn.random() < 0.03 else drawn.lognormvariate(0.0, 0.05)


@pytest.mark.parametrize("cost", [CPU, GPU])
def test_the_costs_are_recovered_without_noise(cost):
    fit = cost_of(0.01)
    teach(fit, cost, 300, lambda: 1.0)
    # The prior weighs 1 % of one observation, and the solver stops after a few sweeps.
    assert (fit["masked_forward"], fit.item_s, fit.step_s) == pytest.approx(cost, rel=0.03)


@pytest.mark.parametrize("cost", [CPU, GPU])
@pytest.mark.parametrize("noise", [lognormal(0.1), with_outliers()])
def test_predictions_hold_under_noise_and_outliers(cost, noise):
    fit = cost_of(0.01)
    teach(fit, cost, 300, noise)
    # 33 remembered steps of 10 % noise leave 2 to 4 %; the smallest step is the one known worst.
    for number, items, tolerance in [(64, 1, 0.08), (32, 4, 0.08), (0, 1, 0.3)]:
        assert predict(fit, number, items) == pytest.approx(seconds_of(cost, number, items), rel=tolerance)


def test_one_step_ten_times_as_slow_changes_little():
    fit = cost_of(0.01)
    teach(fit, CPU, 100, lognormal(0.05))
    before = predict(fit, 32, 2)
    fit.observe(queries(32, 2), 10 * before)
    assert predict(fit, 32, 2) == pytest.approx(before, rel=0.05)


def test_openings_after_full_steps_are_no_outliers():
    fit = cost_of(0.01)
    for _ in range(100):
        fit.observe(queries(16, 1), 0.2)
    assert predict(fit, 0, 1) < 0.02, "all of it was put down to the queries"
    for _ in range(20):
        fit.observe(queries(0, 1), 0.04)
    assert predict(fit, 0, 1) == pytest.approx(0.04, rel=0.1)
    for _ in range(5):
        fit.observe(queries(16, 1), 0.2)
    assert (predict(fit, 0, 1), predict(fit, 16, 1)) == pytest.approx((0.04, 0.2), rel=0.2)


@pytest.mark.parametrize("factor", [0.25, 4.0])
def test_a_lasting_change_is_followed(factor):
    fit = cost_of(0.01)
    teach(fit, CPU, 100, lognormal(0.05))
    teach(fit, CPU, 150, lambda: factor)
    assert predict(fit, 32, 2) == pytest.approx(factor * seconds_of(CPU, 32, 2), rel=0.1)  # 0.97^150 is 1 %


def test_no_coefficient_is_ever_negative():
    fit, drawn = cost_of(0.01), random.Random(3)
    for _ in range(500):
        load = queries(drawn.randint(0, 64), drawn.randint(1, 8))
        fit.observe(load, drawn.choice([0.0, 0.001, 0.1, 3.0]) * drawn.random())
        assert min(fit["masked_forward"], fit.item_s, fit.step_s) >= 0
        assert predict(fit, 0, 1) > 0


@pytest.mark.parametrize(("number", "items"), [(32, 1), (8, 8)])
def test_steps_that_are_all_alike_are_predicted(number, items):
    fit = cost_of(0.01)
    for _ in range(100):
        fit.observe(queries(number, items), 0.3)
    assert predict(fit, number, items) == pytest.approx(0.3, rel=0.01)
    assert 0.3 < predict(fit, 2 * number, items) < 0.61, "a larger step takes longer"


def test_what_a_query_takes_is_remembered_while_none_is_asked():
    fit = cost_of(0.5)
    teach(fit, CPU, 100, lambda: 1.0)
    for _ in range(1000):
        fit.observe(queries(0, 1), CPU[1] + CPU[2])
    assert fit["masked_forward"] == pytest.approx(CPU[0], rel=0.1)


def test_before_the_first_step_the_prior_speaks():
    fit = cost_of(0.02)
    assert predict(fit, 10, 3) == pytest.approx(0.2)
    assert fit.observed == 0


def test_a_kind_is_trusted_up_to_twice_of_what_was_seen_of_it():
    fit = cost_of(0.01)
    fit.observe(Load({"tail": 100, "opening": 1}, 1), 0.1)
    assert {kind: fit.most_units(kind) for kind in ("tail", "opening", "ranking")} == {
        "tail": 200,
        "opening": FIRST_UNITS,
        "ranking": FIRST_UNITS,
    }


# Several kinds of work

COSTS: dict[Kind, float] = {
    "decode": 0.012,
    "opening": 0.03,
    "masked_forward": 0.001,
    "layer_gradient": 0.002,
    "pixel_gradient": 0.1,
    "tail": 0.0001,
    "closed_form": 0.0,
    "ranking": 0.3,
}
"""They differ by far more than 100 x, and not as they usually do."""


def seconds_for(load: Load, costs: Mapping[Kind, float] = COSTS) -> float:
    return sum(units * costs[kind] for kind, units in load.units.items()) + 0.005 * load.items + 0.01


def quartile(errors: Iterable[float]) -> float:
    """What three of four keep below."""
    ordered = sorted(errors)
    return ordered[3 * len(ordered) // 4]


def some_loads(steps: int, kinds: Sequence[Kind] = KINDS, seed: int = 0) -> Iterator[Load]:
    """Steps of some 0.3 s, as the planner makes them: of one to three kinds, each of at most 0.1 s or one unit."""
    drawn = random.Random(seed)
    for _ in range(steps):
        some = drawn.sample(kinds, min(len(kinds), drawn.randint(1, 3)))
        most = {kind: max(1, int(0.1 / max(0.0002, COSTS[kind]))) for kind in some}
        yield Load({kind: drawn.randint(1, most[kind]) for kind in some}, drawn.randint(1, 8))


@pytest.mark.parametrize("noise", [lambda: 1.0, lognormal(0.1), with_outliers()], ids=["exact", "noise", "outliers"])
def test_every_kind_has_a_cost_of_its_own(noise):
    fit = cost_of(0.01)
    for load in some_loads(600):
        fit.observe(load, seconds_for(load) * noise())
    for kind in ("pixel_gradient", "ranking", "opening"):
        assert fit[kind] == pytest.approx(COSTS[kind], rel=0.2)
    loads = [load for load in some_loads(300, seed=1) if seconds_for(load) > 0.1]
    assert quartile(abs(fit.predict(load) / seconds_for(load) - 1) for load in loads) < 0.15


def test_a_kind_that_costs_nothing_is_learnt_to_cost_nothing():
    fit, drawn = cost_of(0.01), random.Random(5)
    for _ in range(100):
        load = Load({"masked_forward": drawn.randint(0, 64), "closed_form": drawn.randint(0, 512)}, 1)
        fit.observe(load, seconds_for(load) * drawn.lognormvariate(0.0, 0.05))
    assert 512 * fit["closed_form"] < 0.01
    assert fit["masked_forward"] == pytest.approx(COSTS["masked_forward"], rel=0.1)


def test_an_unseen_kind_is_taken_to_be_as_usual_beside_those_that_are_known():
    fit = cost_of(0.01)
    for number in range(60):
        fit.observe(Load({"masked_forward": number}, 1), 0.05 * number)
    assert fit["pixel_gradient"] == pytest.approx(4 * 0.05, rel=0.1)
    assert fit["closed_form"] == pytest.approx(0.01 * 0.05, rel=0.1)
    assert not fit.has_seen("tail")


def test_what_another_worker_knows_is_believed_until_one_has_seen_it_oneself():
    fit, other = cost_of(0.01), cost_of(0.01)
    for load in some_loads(300):
        other.observe(load, seconds_for(load))
    fit.hear_of(other)
    fit.observe(Load({"masked_forward": 16}, 1), seconds_for(Load({"masked_forward": 16}, 1)))
    fit.hear_of(other)
    assert fit["pixel_gradient"] == pytest.approx(other["pixel_gradient"])
    assert fit.most_units("pixel_gradient") == other.most_units("pixel_gradient")
    for number in [8, 16] * 20:
        fit.observe(Load({"pixel_gradient": number}, 1), 0.2 * number)
    fit.hear_of(other)
    assert fit["pixel_gradient"] == pytest.approx(0.2, rel=0.1)


@pytest.mark.parametrize("slow", [4, 16, 100, 500])
def test_one_slow_first_step_does_not_spoil_what_follows(slow):
    """It makes the next step small; what that takes cannot be less than the truth."""
    fit = cost_of(0.01)
    first = Load({"opening": 1, "masked_forward": 16}, 1)
    fit.observe(first, slow * seconds_of(CPU, 16, 1))
    assert fit.predict(first) > 2 * seconds_of(CPU, 16, 1)
    for _ in range(6):
        most = max([1, *(number for number in range(1, 17) if predict(fit, number, 1) <= 0.3)])
        fit.observe(queries(most, 1), seconds_of(CPU, most, 1))
    assert predict(fit, 16, 1) == pytest.approx(seconds_of(CPU, 16, 1), rel=0.2)


def test_what_is_faster_by_far_leaves_what_is_known_of_other_kinds_alone():
    fit = cost_of(0.01)
    for load in some_loads(300, ("pixel_gradient", "masked_forward")):
        fit.observe(load, seconds_for(load))
    before = fit["pixel_gradient"]
    load = Load({"tail": 16}, 1)
    fit.observe(load, 3.0)
    for _ in range(3):
        fit.observe(load, seconds_for(load))
    assert fit.predict(load) < 0.05
    assert fit["pixel_gradient"] == pytest.approx(before, rel=0.02)
    assert fit["masked_forward"] == pytest.approx(COSTS["masked_forward"], rel=0.5)


@pytest.mark.parametrize("drift", [0.3, 4.0])
def test_the_drift_of_others_is_not_put_down_to_a_kind_that_is_absent(drift):
    fit = cost_of(0.01)
    kinds: tuple[Kind, ...] = ("masked_forward", "pixel_gradient", "opening")
    for load in some_loads(300, kinds):
        fit.observe(load, seconds_for(load))
    before = fit["pixel_gradient"]
    for load in some_loads(600, ("masked_forward", "opening")):
        fit.observe(load, drift * seconds_for(load))
    assert fit["pixel_gradient"] == pytest.approx(before, rel=0.1)
    load = Load({"masked_forward": 64}, 1)
    assert fit.predict(load) == pytest.approx(drift * seconds_for(load), rel=0.1)


def test_a_kind_that_was_absent_for_long_is_soon_learnt_anew():
    fit = cost_of(0.01)
    for load in some_loads(300, ("masked_forward", "pixel_gradient")):
        fit.observe(load, seconds_for(load))
    for load in some_loads(300, ("masked_forward",)):
        fit.observe(load, seconds_for(load))
    load = Load({"pixel_gradient": 1}, 1)
    for _ in range(10):
        fit.observe(load, 4 * seconds_for(load))
    assert fit.predict(load) == pytest.approx(4 * seconds_for(load), rel=0.3)


@pytest.mark.parametrize("factor", [0.25, 4.0])
def test_a_lasting_change_is_followed_within_some_thirty_steps(factor):
    fit = cost_of(0.01)
    for load in some_loads(200):
        fit.observe(load, seconds_for(load))
    for load in some_loads(60, seed=1):
        fit.observe(load, factor * seconds_for(load))
    loads = [load for load in some_loads(300, seed=2) if seconds_for(load) > 0.1]
    assert quartile(abs(fit.predict(load) / (factor * seconds_for(load)) - 1) for load in loads) < 0.2


# The choice of a method


LADDER = [
    Candidate("grad_cam", "grad", 0),
    Candidate("group_cam with 32 groups", "group", 32),
    Candidate("score_cam", "score", 1000),
]


def per_query(seconds: float) -> Callable[[Candidate[Any]], float]:
    return lambda candidate: 0.1 + seconds * candidate.work_s


@pytest.mark.parametrize(
    ("budget_s", "spec", "reason"),
    [
        (2.0, "group", "score_cam would take 12.1 s of 2.0 s; group_cam with 32 groups takes 0.48 s"),
        (0.2, "grad", "group_cam with 32 groups would take 0.48 s of 0.2 s; grad_cam takes 0.1 s"),
        (0.05, "grad", "group_cam with 32 groups would take 0.48 s of 0.05 s; grad_cam takes 0.1 s"),
        (60.0, "score", "score_cam, the most faithful, takes 12.1 s of 60.0 s"),
    ],
)
def test_the_most_faithful_candidate_that_fits_is_chosen_and_says_why(budget_s, spec, reason):
    choice = choose(LADDER, per_query(0.012), budget_s)
    assert (choice.candidate.spec, choice.reason) == (spec, reason)


def test_a_candidate_needs_some_room():
    assert choose(LADDER, per_query(0.012), 12.2).candidate.spec == "group"
    assert choose(LADDER, per_query(0.012), 1.25 * 12.2).candidate.spec == "score"


def test_a_faithful_candidate_may_be_cheaper_than_the_one_before_it():
    ladder = [Candidate("grad_cam", 0, 0), Candidate("score_cam", 1, 1000), Candidate("group_cam", 2, 32)]
    assert choose(ladder, per_query(0.012), 2.0).candidate.spec == 2


def test_as_long_as_nothing_was_measured_the_cheapest_is_chosen():
    choice = choose(LADDER, lambda candidate: None, 60.0)
    assert choice.candidate.spec == "grad"
    assert choice.reason == "no step was measured yet; grad_cam is the cheapest"


def test_an_empty_ladder_is_refused():
    with pytest.raises(InvalidOption, match="at least one"):
        choose([], per_query(1.0), 1.0)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(12.06, "12.1 s"), (0.0337, "0.034 s"), (-0.5, "-0.5 s"), (99.94, "99.9 s"), (1200.0, "1200 s")],
)
def test_seconds_in_words(seconds, words):
    assert in_words(seconds) == words


def test_where_nothing_fits_the_cheapest_is_chosen_wherever_it_stands():
    ladder = [Candidate("many", 1, 100), Candidate("few", 2, 1), Candidate("some", 3, 10)]
    choice = choose(ladder, per_query(1.0), 0.5)
    assert choice.candidate.spec == 2
    assert re.fullmatch(r"many would take 100 s of 0\.5 s; few takes 1\.\d s", choice.reason)

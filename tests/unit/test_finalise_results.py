"""What has come in of a request: opened, merged, asked for the rest, and made into maps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from camserve.errors import Unsupported
from camserve.finalise.finish import finished
from camserve.finalise.results import EVALUATION, Results, follow_ups, maps_of, ranking_position, rankings
from camserve.gateway.pool.fake import MODEL, FakeBackend
from camserve.gateway.pool.fake_answers import answer, ranked
from camserve.methods import AblationCam, GradCam, GroupCam, MethodSpec, Rise, ScoreCam, SmoothGrad, SsCam, Xrai
from camserve.types import BoxOptions, Item, ItemResult, MapCurves, Partial, Ranking, StepResult, Target
from camserve.types.request import ExplainRequest, FittedRequest, OutputOptions, RequestLimits

IMAGE = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
ONE = (Target(index=4),)
THREE = (Target(index=4), Target(index=2), Target(index=7))


def fitted(*methods: MethodSpec, targets=ONE, **fields) -> FittedRequest:
    return ExplainRequest(IMAGE, methods, tuple(targets), **fields).fit(MODEL, RequestLimits())


def answered(item: Item) -> ItemResult:
    (outcome,) = answer(MODEL, [item]).outcomes
    assert isinstance(outcome, ItemResult)
    return outcome


def opened(request: FittedRequest, *ranges: tuple[int, int, int]) -> Results:
    """The results with these ranges of queries in the opening."""
    results = Results(request)
    item = results.item(ranges)
    outcome = answered(item)
    results.take(outcome)
    results.merge(item, outcome)
    return results


def advance(results: Results, *ranges: tuple[int, int, int]) -> Item:
    item = results.item(ranges)
    outcome = answered(item)
    results.take(outcome)
    results.merge(item, outcome)
    return item


def rounds(results: Results) -> Iterator[Item]:
    """Asks for all that can be asked, round after round, and yields what was asked."""
    while (item := results.next_item()) is not None:
        outcome = answered(item)
        results.take(outcome)
        results.merge(item, outcome)
        yield item


def complete(request: FittedRequest) -> Results:
    results = Results(request)
    assert list(rounds(results))
    return results


# What is asked when


def test_everything_is_asked_at_once_then_the_rankings_and_the_curves_last():
    request = fitted(
        Xrai(steps=2), GradCam(), Xrai(steps=3), ScoreCam(), targets=THREE, evaluate=True, evaluation_steps=4
    )
    first, second, third = rounds(Results(request))
    assert [task.method for task in first.tasks] == list(request.methods)
    assert [(task.start, task.stop) for task in first.tasks] == [(0, 4), (0, 0), (0, 6), (0, 96)]
    assert [(task.position, type(task.method), task.start, task.stop) for task in second.tasks] == [
        (4, Ranking, 0, 1),
        (5, Ranking, 0, 1),
    ]
    assert [(task.position, type(task.method), task.start, task.stop) for task in third.tasks] == [
        (6 + number, MapCurves, 0, 10) for number in range(12)
    ]
    targets = [task.method.target.index for task in third.tasks if isinstance(task.method, MapCurves)]
    assert targets == [4, 2, 7] * 4


def test_without_rankings_and_curves_one_round_is_all():
    assert len(list(rounds(Results(fitted(GradCam(), ScoreCam()))))) == 1
    assert len(list(rounds(Results(fitted(Xrai(steps=2)))))) == 2
    assert len(list(rounds(Results(fitted(GradCam(), evaluate=True))))) == 2
    assert len(list(rounds(Results(fitted())))) == 1


def test_where_a_ranking_stands():
    request = fitted(Xrai(steps=2), GradCam(), Xrai(steps=3))
    assert rankings(request) == 2
    assert [ranking_position(request, position) for position in range(3)] == [3, -1, 4]


def test_the_curves_are_those_of_the_ranked_maps():
    """Of the network's input size, whatever size the reply has."""
    request = fitted(Xrai(steps=2), GradCam(), evaluate=True, output=OutputOptions(size="layer"))
    *_, last = rounds(results := Results(request))
    maps = list(maps_of(results.snapshot(), "input"))
    for task, saliency in zip(last.tasks, maps, strict=True):
        assert isinstance(task.method, MapCurves)
        np.testing.assert_array_equal(task.method.saliency, saliency.array)
        assert task.method.saliency.shape == MODEL.input_size


def test_nothing_is_asked_twice():
    results = complete(fitted(Xrai(steps=2), evaluate=True))
    assert follow_ups(results.snapshot()) == {}
    assert results.next_item() is None


def test_once_opened_the_same_classes_are_explained_in_the_same_order_of_queries():
    """Another worker may round otherwise, and would then sum up other things."""
    request = fitted(ScoreCam(), GroupCam(groups=6, grouping="kmeans"), targets=[Target(top_k=2)], top_predictions=4)
    results = Results(request)
    first = results.item([(0, 0, 5), (1, 0, 3)])
    assert (first.targets, first.top_predictions) == ((Target(top_k=2),), 4)
    assert all(task.ordered and not task.numbers and not task.labels for task in first.tasks)
    outcome = answered(first)
    results.take(outcome)
    later = results.item([(0, 5, 9), (1, 3, 12)])
    assert later.targets == tuple(explained.target for explained in outcome.targets)
    assert later.top_predictions == 1
    assert [task.ordered for task in later.tasks] == [False, False]
    assert later.tasks[0].numbers == outcome.partials[0].order[5:9]
    assert later.tasks[1].numbers == outcome.partials[1].order[3:12]
    assert later.tasks[1].labels == outcome.partials[1].labels
    assert len(later.tasks[1].labels) == 96 * 2
    assert (later.image is request.request.image, later.digest) == (True, request.digest)


def test_all_at_once_needs_no_order():
    first = next(rounds(Results(fitted(ScoreCam()))))
    assert not first.tasks[0].ordered


# Merging


def slices(queries: int, size: int) -> list[tuple[int, int, int]]:
    return [(0, start, min(start + size, queries)) for start in range(0, queries, size)]


METHODS: list[Callable[[], MethodSpec]] = [
    ScoreCam,
    lambda: GroupCam(groups=7),
    lambda: Rise(masks=50),
    lambda: SmoothGrad(samples=20),
    lambda: SsCam(samples=2),
    lambda: Xrai(steps=10),
]


@pytest.mark.parametrize("make", METHODS, ids=lambda make: make().name)
def test_merging_from_several_threads_loses_nothing(make):
    method = make()
    request = fitted(method, targets=THREE)
    total = request.part(0).queries(3)
    first, *others = slices(total, 3)
    results = opened(request, first)
    items = [results.item([one]) for one in others]
    outcomes = [answered(item) for item in items]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(results.merge, items, outcomes))
    known = results.snapshot()
    assert results.answered == total
    assert known.answered == {0: total}
    assert known.partials[0].queries == total
    whole = FakeBackend.whole(IMAGE, method, MODEL, "features", [4, 2, 7])
    whole = ranked(whole) if method.ranked else whole  # the fake's ranking undoes itself: what it was made of
    np.testing.assert_array_equal(known.map_sums(0), whole)


def test_merges_at_the_same_time_wait_for_each_other(monkeypatch):
    merge = Partial.merge

    def slow(one: Partial, other: Partial) -> Partial:
        time.sleep(0.002)  # so that without a lock every thread would read the sums before another has written them
        return merge(one, other)

    monkeypatch.setattr(Partial, "merge", slow)
    test_merging_from_several_threads_loses_nothing(ScoreCam)


def test_a_snapshot_stays_as_it_is():
    results = opened(fitted(ScoreCam()), (0, 0, 10))
    before = results.snapshot()
    sums, fraction = before.map_sums(0).copy(), before.fraction([0])
    advance(results, (0, 10, 96))
    np.testing.assert_array_equal(before.map_sums(0), sums)
    assert (before.fraction([0]), fraction) == (10 / 96, 10 / 96)
    assert results.snapshot().fraction([0]) == 1


def test_a_range_beyond_the_end_counts_only_what_there_is():
    """How many queries there are may turn out smaller than what the opening asked."""
    top = opened(fitted()).opening.predictions[0]
    request = fitted(GroupCam(groups=5), targets=[Target(index=top.index), Target(top_k=2)])
    assert request.max_maps == 3
    results = Results(request)
    (first,) = rounds(results)
    assert (first.tasks[0].start, first.tasks[0].stop) == (0, 15)
    assert len(results.opening.targets) == 2
    assert results.answered == request.part(0).queries(2) == 10
    assert results.snapshot().fraction([0]) == 1


# Maps


def test_partial_maps_of_xrai_are_its_attribution():
    request = fitted(Xrai(steps=10), targets=THREE)
    results = opened(request, (0, 0, 4))
    known = results.snapshot()
    np.testing.assert_array_equal(known.map_sums(0), finished(Xrai(steps=10), known.partials[0]))
    assert [saliency.complete for saliency in maps_of(known)] == [False] * 3
    assert known.fraction([0]) == 4 / 21
    advance(results, (0, 4, 20))
    known = results.snapshot()
    attribution = known.map_sums(0)
    whole = FakeBackend.whole(IMAGE, Xrai(steps=10), MODEL, "features", [4, 2, 7])
    np.testing.assert_array_equal(attribution, ranked(whole))  # the fake's ranking undoes itself
    assert known.fraction([0]) == 20 / 21, "the ranking is still to come"
    assert not any(saliency.complete for saliency in maps_of(known))
    (asked,) = follow_ups(known).values()
    assert isinstance(asked, Ranking)
    np.testing.assert_array_equal(asked.attribution, attribution)
    results.follow_ups |= follow_ups(known)
    advance(results, (1, 0, 1))
    known = results.snapshot()
    np.testing.assert_array_equal(known.map_sums(0), attribution[:, ::-1])  # so ranks the fake
    assert all(saliency.complete for saliency in maps_of(known))


def test_maps_come_by_method_then_class_with_labels_layers_and_choices():
    request = fitted(GradCam(), Rise(masks=3), targets=THREE[:2], layers=("stem", "features"))
    results = complete(replace(request, choices={1: "in time"}))
    maps = list(maps_of(results.snapshot()))
    found = [(saliency.method.name, saliency.target.label, saliency.layers, saliency.choice) for saliency in maps]
    assert found == [
        ("grad_cam", "cup", ("stem", "features"), ""),
        ("grad_cam", "Egyptian_cat", ("stem", "features"), ""),
        ("rise", "cup", ("stem",), "in time"),
        ("rise", "Egyptian_cat", ("stem",), "in time"),
    ]
    assert all(saliency.complete and saliency.fraction == 1 for saliency in maps)


def test_a_method_is_complete_when_all_its_layers_are():
    request = fitted(ScoreCam(), GradCam(), layers=("stem", "features"))
    results = opened(request, (0, 0, 16), (1, 0, 48), (2, 0, 0), (3, 0, 0))
    score_cam, grad_cam = maps_of(results.snapshot())
    assert (score_cam.complete, score_cam.fraction) == (False, 64 / 112)
    assert (grad_cam.complete, grad_cam.fraction) == (True, 1)


def test_what_has_not_been_answered_at_all_is_an_empty_map():
    results = opened(fitted(ScoreCam(), GradCam()), (1, 0, 0))
    score_cam, grad_cam = maps_of(results.snapshot())
    assert (score_cam.fraction, score_cam.degenerate, score_cam.array.any()) == (0, True, False)
    assert grad_cam.complete


@pytest.mark.parametrize(("size", "shape"), [("input", (32, 48)), ("layer", (4, 6)), ("original", (64, 96))])
def test_maps_have_the_size_that_was_asked_or_another_one(size, shape):
    large = np.repeat(np.repeat(IMAGE, 2, axis=0), 2, axis=1)
    request = ExplainRequest(large, (GradCam(),), THREE, output=OutputOptions(size=size, boxes=BoxOptions()))
    known = complete(request.fit(MODEL)).snapshot()
    assert [saliency.array.shape for saliency in maps_of(known)] == [shape] * 3
    assert all(saliency.boxes for saliency in maps_of(known))
    other = list(maps_of(known, "input"))
    assert [saliency.array.shape for saliency in other] == [(32, 48)] * 3
    assert not any(saliency.boxes for saliency in other)
    assert all(saliency.boxes for saliency in maps_of(known, "input", BoxOptions()))


def test_curves_come_when_all_their_points_are_there():
    request = fitted(GradCam(), targets=THREE[:2], evaluate=True, evaluation_steps=4)
    results = opened(request, (0, 0, 0))
    results.follow_ups |= follow_ups(results.snapshot())
    assert sorted(results.follow_ups) == [1, 2]
    advance(results, (1, 0, 10), (2, 0, 7))
    first, second = maps_of(results.snapshot())
    assert first.faithfulness is not None
    assert (len(first.faithfulness.deletion), len(first.faithfulness.insertion)) == (5, 5)
    assert second.faithfulness is None
    advance(results, (2, 7, 10))
    assert all(saliency.faithfulness is not None for saliency in maps_of(results.snapshot()))


def test_sums_that_are_not_finite_are_unsupported():
    results = Results(fitted(GradCam()))
    item = results.next_item()
    assert item is not None
    outcome = answered(item)
    broken = replace(outcome.partials[0], sums=np.full((1, 4, 6), np.nan, np.float32))
    results.take(outcome)
    results.merge(item, replace(outcome, partials=(broken,)))
    with pytest.raises(Unsupported):
        list(maps_of(results.snapshot()))


# Accounts


def test_the_total_is_a_forecast_until_the_opening_and_grows_with_what_follows():
    request = fitted(
        GroupCam(groups=5), Xrai(steps=2), targets=[Target(index=4), Target(top_k=2)], evaluate=True, evaluation_steps=4
    )
    results = Results(request)
    assert (results.answered, results.total) == (0, 3 * 5 + 4)
    totals = []
    for _ in rounds(results):
        assert results.answered == results.total
        totals.append(results.total)
    targets = len(results.opening.targets)
    first = 5 * targets + 4
    assert totals == [first, first + 1, first + 1 + 2 * targets * 10]


def test_queries_are_counted_by_method_and_those_of_curves_apart():
    request = fitted(ScoreCam(), Xrai(steps=2), GradCam(), evaluate=True, evaluation_steps=4)
    results = complete(request)
    assert results.queries() == {"score_cam": 96, "xrai": 4, "grad_cam": 0, EVALUATION: 3 * 10}


def test_a_cost_adds_up():
    results = complete(fitted(ScoreCam(), evaluate=True, evaluation_steps=4, precision="bfloat16"))
    results.spent(StepResult((), {"decode": 0.25, "forward": 0.5, "queries": 1.0, "unknown": 7.0}, "first"))
    results.spent(StepResult((), {"forward": 0.5, "queries": 2.0}, "second", micro_batch=8))
    assert results.cost(10.0, 0.125).precision == "exact"  # nobody has asked a query in bfloat16 so far
    results.take(replace(results.opening, precision="bfloat16", runtime="eager"))
    results.take(replace(results.opening, precision="exact", runtime="onnx"))
    cost = results.cost(10.0, 0.125)
    assert (cost.queries, cost.evaluation_queries, cost.steps) == (96 + 10, 10, 2)
    assert (cost.precision, cost.worker, cost.cached) == ("bfloat16", "second", False)
    assert (cost.runtime, cost.micro_batch) == ("onnx", 8)
    stages = dict(cost.stage_seconds)
    merge_s = stages.pop("merge")
    assert merge_s > 0
    assert stages == {
        "queue": pytest.approx(10.0 - 4.25 - merge_s),
        "decode": 0.25,
        "forward": 1.0,
        "queries": 3.0,
        "render": 0.125,
    }


def test_time_in_a_queue_is_never_negative():
    """Steps of one request may run at the same time at several workers."""
    results = complete(fitted(ScoreCam()))
    results.spent(StepResult((), {"queries": 5.0}, "one"))
    results.spent(StepResult((), {"queries": 5.0}, "other"))
    assert results.cost(6.0, 0.0).stage_seconds["queue"] == 0


def test_partials_of_the_opening_are_not_kept_twice():
    results = opened(fitted(ScoreCam()), (0, 0, 4))
    assert results.opening is not None
    assert results.opening.partials == ()
    assert isinstance(results.snapshot().partials[0], Partial)


# Parts that may stop early


WITHIN = ScoreCam(tolerance=1.0)
"""The first look that may count is enough: that of 32 channels."""


def test_a_part_that_may_stop_early_is_asked_from_look_to_look():
    results = Results(fitted(WITHIN, GradCam(), ScoreCam(), evaluate=True, evaluation_steps=4))
    items = list(rounds(results))
    asked = [(task.start, task.stop) for item in items[:-1] for task in item.tasks if task.position == 0]
    assert asked == [(0, 16), (16, 20), (20, 25), (25, 32)]
    assert [(task.start, task.stop) for task in items[0].tasks[1:]] == [(0, 0), (0, 96)]
    assert [len(item.tasks) for item in items] == [3, 1, 1, 1, 3], "the curves of all three come last"
    early, plain, whole = maps_of(results.snapshot())
    assert (early.complete, early.fraction) == (True, 32 / 96)
    assert 0 < (early.estimated_difference or 0) <= 1
    assert (plain.estimated_difference, whole.estimated_difference, whole.fraction) == (None, None, 1)
    assert results.enough == {0}
    assert results.answered == results.total


def test_a_formula_is_asked_at_once_whatever_the_tolerance():
    """All of it takes less time than one look at the map, each of which would be an item of its own."""
    pooled = replace(MODEL, layers=tuple(replace(layer, pooled_head=True) for layer in MODEL.layers))
    asked = ExplainRequest(IMAGE, (AblationCam(tolerance=1.0),), ONE)
    (whole,), (first, *others) = (list(rounds(Results(asked.fit(model, RequestLimits())))) for model in (pooled, MODEL))
    assert [(task.start, task.stop, task.ordered) for task in whole.tasks] == [(0, 96, False)]
    assert [(task.start, task.stop, task.ordered) for task in first.tasks] == [(0, 16, True)]
    assert len(others) == 3
    (saliency,) = maps_of(complete(asked.fit(pooled, RequestLimits())).snapshot())
    assert (saliency.complete, saliency.fraction, saliency.estimated_difference) == (True, 1, 0)


def test_its_queries_are_asked_by_energy_each_once():
    results = Results(fitted(WITHIN))
    first, *later = rounds(results)
    assert first.tasks[0].ordered
    order = answered(first).partials[0].order
    assert len(order) == 96
    numbers = [number for item in later for number in item.tasks[0].numbers]
    assert len(numbers) == len(set(numbers)) == 16


def test_a_tolerance_that_is_never_met_asks_all():
    results = complete(fitted(ScoreCam(tolerance=1e-9)))
    (saliency,) = maps_of(results.snapshot())
    assert (saliency.complete, saliency.fraction, saliency.estimated_difference) == (True, 1, 0)
    assert results.enough == frozenset()


def test_a_map_that_is_not_good_enough_yet_is_not_complete_and_may_have_an_estimate():
    results = opened(fitted(WITHIN), (0, 0, 10))
    (saliency,) = maps_of(results.snapshot())
    assert (saliency.complete, saliency.estimated_difference) == (False, None)
    advance(results, (0, 10, 24))
    (saliency,) = maps_of(results.snapshot())
    assert not saliency.complete
    assert saliency.estimated_difference is not None


def test_the_largest_estimate_of_several_layers_is_said_and_all_must_be_good_enough():
    request = fitted(WITHIN, layers=("stem", "features"))
    results = opened(request, (0, 0, 4), (1, 0, 16))
    at = results.fitted.part(0).queries(1)
    advance(results, (1, 16, 40))
    assert results.enough == {1}
    (saliency,) = maps_of(results.snapshot())
    assert not saliency.complete
    assert saliency.estimated_difference is None, "nothing is known of the other layer yet"
    advance(results, (0, 4, at))
    (saliency,) = maps_of(results.snapshot())
    assert saliency.complete
    estimates = results.snapshot().estimates
    assert saliency.estimated_difference == max(estimates[0][0], estimates[1][0])

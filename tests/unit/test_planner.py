"""The planner's rules, one at a time."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from camserve.errors import InvalidOption, Overloaded
from camserve.planning import CLASSES, MAX_LOSSES, NOBODY, Counts, Limits, Owner, Planner, Span, Step
from camserve.planning.ledger import Backlog

LIMITS = Limits(queries=8, items=3, size_bytes=100, requests=100, waiting_queries=10_000)


def planner(places: dict[str, int] | None = None, **changes: Any) -> Planner:
    plan = Planner(Limits(**{**vars(LIMITS), **changes}))
    for name, workers in (places or {"here": 100}).items():
        plan.set_workers(name, workers)
    return plan


def ask(plan: Planner, totals: list[int | None], now_s: float = 0.0, **options: Any) -> int:
    return plan.admit(totals, now_s=now_s, **options)


def step_of(plan: Planner, now_s: float = 0.0) -> Step:
    step = plan.next_step(now_s)
    assert step is not None
    return step


def finish(plan: Planner, step: Step) -> None:
    for part in step.slices:
        assert plan.done(step.number, part.request)


def started(plan: Planner, total: int, **options: Any) -> int:
    """A request whose opening has come back; `total` queries wait."""
    request = ask(plan, [total + LIMITS.queries], **options)
    finish(plan, step_of(plan))
    return request


def teach(plan: Planner, place: str = "here", query_s: float = 0.01, image_s: float = 0.0, step_s: float = 0.0) -> None:
    """Observations without noise, until the fit is good."""
    for turn in range(200):
        queries, images = turn % 13, 1 + turn % 3
        seconds = query_s * queries + image_s * images + step_s
        plan.observe(place, "worker", queries, images, seconds, now_s=0.0)


def shares(step: Step) -> dict[int, int]:
    return {part.request: part.queries for part in step.slices}


# Requests and their phases


def test_nothing_to_do_is_no_step():
    assert planner().next_step(0.0) is None


def test_a_gradient_method_is_done_with_its_opening():
    plan = planner()
    request = ask(plan, [0])
    step = step_of(plan)
    assert step.slices[0].opening
    assert step.slices[0].spans == (Span(0, 0, 0),)
    finish(plan, step)
    assert request not in plan
    assert plan.idle


def test_the_opening_takes_what_fits_and_the_rest_waits_for_it():
    plan = planner()
    ask(plan, [0, 20])
    opening = step_of(plan)
    assert opening.slices[0].spans == (Span(0, 0, 0), Span(1, 0, 8))
    assert plan.next_step(0.0) is None, "targets are not known yet"
    finish(plan, opening)
    first, second = step_of(plan), step_of(plan)
    assert first.slices[0].spans == (Span(1, 8, 16),)
    assert second.slices[0].spans == (Span(1, 16, 20),)
    assert not first.slices[0].opening
    finish(plan, second)
    finish(plan, first)
    assert plan.idle
    assert plan.counts() == Counts(asked=20, waiting=0, in_flight=0, done=20, cancelled=0)


def test_a_total_that_depends_on_the_targets_is_fixed_by_the_opening():
    plan = planner()
    request = ask(plan, [None, 3])
    opening = step_of(plan)
    assert opening.slices[0].spans == (Span(1, 0, 3),)
    assert plan.done(opening.number, request, [6, 3])
    assert step_of(plan).slices[0].spans == (Span(0, 0, 6),)
    assert plan.counts().asked == 9


def test_positions_that_come_later_are_settled_when_all_else_is_done():
    plan = planner()
    request = ask(plan, [4])
    opening = step_of(plan)
    assert plan.done(opening.number, request, [4, None, None])
    assert plan.stalled(request)
    assert plan.next_step(0.0) is None
    plan.settle(request, 1, 3)
    assert not plan.stalled(request)
    step = step_of(plan)
    assert step.slices[0].spans == (Span(1, 0, 3),)
    finish(plan, step)
    assert plan.stalled(request)
    plan.settle(request, 2, 0)
    assert request not in plan
    assert not plan.stalled(request)
    assert plan.counts() == Counts(asked=7, done=7)


def test_cancelling_drops_what_waits_ignores_what_flies_and_is_idempotent():
    plan = planner()
    request, neighbour = ask(plan, [20]), ask(plan, [1])
    step = step_of(plan)
    plan.cancel(request)
    assert plan.counts() == Counts(asked=21, waiting=0, in_flight=8, done=0, cancelled=13)
    plan.cancel(request)
    assert plan.next_step(0.0) is None
    assert not plan.done(step.number, request)
    assert plan.done(step.number, neighbour)
    assert plan.counts() == Counts(asked=21, waiting=0, in_flight=0, done=1, cancelled=20)
    plan.cancel(request)
    plan.cancel(12345)
    assert plan.idle


def test_a_cancelled_request_leaves_its_neighbours_alone():
    plan = planner()
    first, second, third = (ask(plan, [2]) for _ in range(3))
    step = step_of(plan)
    plan.cancel(second)
    assert [plan.done(step.number, request) for request in (first, second, third)] == [True, False, True]
    assert plan.counts() == Counts(asked=6, done=4, cancelled=2)


def test_queries_are_counted_by_class():
    plan = planner()
    for priority in CLASSES:
        ask(plan, [4], priority=priority)
    step_of(plan)
    ask(plan, [7], priority="batch")
    assert plan.counts_by_class() == {
        "interactive": Counts(asked=4, in_flight=4),
        "normal": Counts(asked=4, in_flight=4),
        "batch": Counts(asked=11, waiting=11),
    }


# Order


def test_several_requests_share_a_step():
    plan = planner()
    first, second, third, fourth = (ask(plan, [2]) for _ in range(4))
    assert shares(step_of(plan)) == {first: 2, second: 2, third: 2}
    assert shares(step_of(plan)) == {fourth: 2}


def test_an_opening_of_any_class_enters_the_next_step_of_a_running_long_request():
    plan = planner()
    long = started(plan, 1000, priority="interactive")
    quick = ask(plan, [0], priority="batch")
    step = step_of(plan)
    assert shares(step) == {long: 8, quick: 0}


def test_openings_leave_one_place_to_started_requests():
    plan = planner()
    long = started(plan, 1000)
    first, second, third = (ask(plan, [0]) for _ in range(3))
    assert shares(step_of(plan)) == {first: 0, second: 0, long: 8}
    assert shares(step_of(plan)) == {third: 0, long: 8}


def test_openings_take_the_place_that_nobody_needs():
    plan = planner()
    started(plan, 1000)
    first, second, third = (ask(plan, [4]) for _ in range(3))
    assert shares(step_of(plan)) == {first: 4, second: 4, third: 0}, "the shorter requests come first"


@pytest.mark.parametrize("state", ["opening", "started"])
def test_better_classes_come_first(state):
    plan = planner(items=2, queries=8, share=1.0)
    make = ask if state == "opening" else lambda plan, totals, **options: started(plan, totals[0], **options)
    order = {priority: make(plan, [20], priority=priority) for priority in reversed(CLASSES)}
    firsts = []
    while len(firsts) < 3:
        step = step_of(plan)
        finish(plan, step)
        firsts += [part.request for part in step.slices if part.queries and part.request not in firsts]
    assert firsts == [order[priority] for priority in CLASSES]


def test_in_a_class_the_earliest_deadline_comes_first_then_the_least_work():
    plan = planner(items=8, queries=100)
    totals = {"late": 10, "early": 60, "short": 20, "first": 30, "second": 30}
    deadlines = {"late": 90.0, "early": 50.0, "short": 70.0, "first": 70.0, "second": 70.0}
    asked = {ask(plan, [total], deadline_s=deadlines[name]): name for name, total in totals.items()}
    plan.observe("here", "worker", 100, 1, 0.3, 0.0)
    order = [asked[part.request] for part in step_of(plan).slices]
    assert order == ["early", "short", "first", "second", "late"]


def test_while_others_wait_nobody_takes_more_than_the_share():
    plan = planner()
    first, second = ask(plan, [100]), ask(plan, [100])
    assert shares(step_of(plan)) == {first: 4, second: 4}
    plan = planner(share=0.25)
    requests = [ask(plan, [100]) for _ in range(3)]
    assert shares(step_of(plan)) == {requests[0]: 4, requests[1]: 2, requests[2]: 2}


def test_what_one_leaves_goes_to_the_others():
    plan = planner()
    first, second = ask(plan, [100]), ask(plan, [1])
    assert shares(step_of(plan)) == {first: 7, second: 1}


def test_bytes_bound_a_step_but_never_a_request_alone():
    plan = planner()
    huge, small, next_one = ask(plan, [0], size_bytes=500), ask(plan, [0], size_bytes=60), ask(plan, [0], size_bytes=60)
    assert shares(step_of(plan)) == {huge: 0}
    assert shares(step_of(plan)) == {small: 0}
    assert shares(step_of(plan)) == {next_one: 0}


def test_past_its_deadline_a_request_is_put_into_no_step():
    plan = planner()
    ask(plan, [4], deadline_s=10.0)
    assert plan.next_step(10.0) is None
    plan = planner()
    ask(plan, [4], deadline_s=10.0)
    assert plan.next_step(9.9) is not None


@pytest.mark.parametrize("priority", CLASSES)
def test_nothing_starves(priority):
    """Interactive requests come faster than they can be served; the bound is that of the planner's docstring."""
    plan = planner(requests=10**6, waiting_queries=10**6, age_s=10.0)
    elders = [ask(plan, [30], priority="batch", deadline_s=10**6) for _ in range(3)]
    victim = ask(plan, [40], priority=priority, deadline_s=10**7)
    bound = 1 + sum(1 + math.ceil(30 / 4) for _ in elders)  # a share of 8 queries is 4
    aged_s = 10.0 * (CLASSES.index(priority) + 1)
    turns: list[int] = []
    for turn in range(1000):
        now_s = 0.1 * turn
        for _ in range(4):
            ask(plan, [20], now_s=now_s, priority="interactive", deadline_s=now_s + 1000)
        step = step_of(plan, now_s)
        finish(plan, step)
        turns += [turn for part in step.slices if part.request == victim]
        if victim not in plan:
            break
    aged = math.ceil(10 * aged_s)
    assert len([turn for turn in turns if turn < aged]) <= (1 if priority != "interactive" else 1000), "class order"
    assert min(turn for turn in turns if turn >= aged) <= aged + bound
    assert turns[-1] <= aged + bound + 1 + math.ceil(40 / 4), "it is complete, too"


def test_of_two_aged_requests_that_do_not_fit_together_the_elder_comes_first():
    plan = planner()
    elder = ask(plan, [8], priority="batch", size_bytes=80)
    younger = ask(plan, [100], priority="interactive", size_bytes=80)
    step = step_of(plan)
    assert list(shares(step)) == [younger]
    finish(plan, step)
    assert list(shares(step_of(plan, 1000.0))) == [elder]
    assert list(shares(step_of(plan, 1000.0))) == [younger]


def test_a_backlog_of_aged_batch_work_does_not_stop_interactive_requests():
    plan = planner(items=4, age_s=10.0, waiting_queries=10**6)
    for _ in range(20):
        ask(plan, [1000], priority="batch")
    while (step := plan.next_step(0.0)) is not None and step.slices[0].opening:
        finish(plan, step)
    quick = ask(plan, [100], now_s=1000.0, priority="interactive")
    given = []
    for _ in range(5):
        step = step_of(plan, 1000.0)
        finish(plan, step)
        given.append(shares(step)[quick])
    assert given == [4] * 5, "half of each step"


# Places


def test_steps_go_where_the_fewest_are_for_each_worker():
    plan = planner({"large": 2, "small": 1, "none": 0})
    for _ in range(20):
        ask(plan, [8])
    steps = [step_of(plan) for _ in range(6)]
    assert [step.place for step in steps] == ["large", "small", "large", "large", "small", "large"]
    assert plan.next_step(0.0) is None, "two steps for each worker"
    finish(plan, steps[1])
    assert step_of(plan).place == "small"


def test_nothing_is_sent_to_a_place_without_workers_or_to_one_that_was_removed():
    plan = planner({"here": 1, "there": 1})
    for _ in range(20):
        ask(plan, [8])
    assert {step_of(plan).place, step_of(plan).place} == {"here", "there"}
    plan.set_workers("here", 0)
    plan.remove_place("there")
    plan.remove_place("nowhere")
    assert plan.next_step(0.0) is None
    plan.set_workers("here", 1)
    assert step_of(plan).place == "here"


def test_a_step_of_a_removed_place_can_still_be_answered_or_lost():
    plan = planner({"here": 1})
    for _ in range(6):
        ask(plan, [8])
    first, second = step_of(plan), step_of(plan)
    plan.remove_place("here")
    plan.observe("here", "worker", 8, 1, 0.1, 0.0)
    finish(plan, first)
    assert all(plan.lost(second.number, part.request) for part in second.slices)
    assert plan.next_step(0.0) is None
    plan.set_workers("here", 1)
    assert [step_of(plan).place, step_of(plan).place] == ["here", "here"]
    assert plan.next_step(0.0) is None


def test_a_step_is_as_large_as_the_slowest_worker_does_in_the_target_time():
    plan = planner(queries=1000, target_s=0.3)
    for _ in range(200):
        plan.observe("here", "fast", 50, 1, 0.1, now_s=0.0)
        plan.observe("here", "slow", 50, 1, 0.5, now_s=0.0)
    ask(plan, [1000])
    assert step_of(plan).queries == pytest.approx(30, abs=1)


def test_a_place_may_have_a_target_time_of_its_own():
    plan = planner({"cpu": 1}, queries=512, target_s=0.3)
    plan.set_workers("gpu", 0)
    plan.set_workers("gpu", 1, Limits(queries=512, target_s=0.03, steps_per_worker=2))
    plan.set_workers("gpu", 0)  # it stays its own
    plan.set_workers("gpu", 1)
    for place, query_s in {"cpu": 0.01, "gpu": 0.0005}.items():
        teach(plan, place, query_s)
        plan.observe(place, "worker", 100, 1, 100 * query_s, now_s=0.0)  # no more than twice as many are dared
    for _ in range(3):
        started(plan, 1000)
    sizes = {(step.place, step.queries) for step in (step_of(plan) for _ in range(3))}
    assert {place for place, _ in sizes} == {"cpu", "gpu"}
    assert all(abs(queries - {"cpu": 30, "gpu": 60}[place]) <= 1 for place, queries in sizes)


def test_a_place_that_comes_back_on_another_device_is_learnt_anew():
    plan = planner({"here": 1}, target_s=0.3)
    teach(plan, query_s=0.1)
    assert plan.predicted_s(0) is not None
    plan.set_workers("here", 1, Limits(target_s=0.03))
    assert plan.predicted_s(0) is None


def test_a_step_that_a_gradient_map_waits_for_takes_half_the_time():
    plan = planner({"here": 1}, queries=512, target_s=0.3)
    teach(plan, query_s=0.01)
    started(plan, 10_000)
    ask(plan, [0])
    assert step_of(plan).queries == pytest.approx(15, abs=1)


def test_a_fixed_cost_of_more_than_a_tenth_is_not_paid_for_haste():
    plan = planner({"here": 1}, queries=512, target_s=0.3)
    teach(plan, query_s=0.01, step_s=0.024)
    started(plan, 10_000)
    ask(plan, [0])
    assert step_of(plan).queries == pytest.approx((0.24 - 0.024) / 0.01, abs=1)


def test_a_worker_that_was_not_heard_of_for_long_does_not_count():
    plan = planner(queries=1000, target_s=0.3, forget_s=60.0)
    for now_s in range(200):
        plan.observe("here", "fast", 50, 1, 0.1, now_s)
        if now_s < 100:
            plan.observe("here", "slow", 50, 1, 0.5, now_s)
    ask(plan, [1000])
    assert step_of(plan).queries == 100, "twice of what was seen; three times would be in time"


def test_images_take_their_part_of_the_time():
    plan = planner(items=8, queries=1000, target_s=0.3)
    teach(plan, query_s=0.01, image_s=0.1)
    requests = [ask(plan, [100]) for _ in range(4)]
    step = step_of(plan)
    assert list(shares(step)) == requests[:2], "a third image would leave no time for queries"
    assert step.queries == pytest.approx(10, abs=1)


def test_without_time_for_a_query_there_is_one():
    plan = planner(target_s=0.3)
    teach(plan, query_s=0.01, image_s=1.0)
    ask(plan, [100])
    assert step_of(plan).queries == 1


# Lost work


def test_lost_work_is_sent_again_alone_and_counted_once():
    plan = planner()
    first, second = ask(plan, [6]), ask(plan, [6])
    step = step_of(plan)
    for part in step.slices:
        assert plan.lost(step.number, part.request)
    quick = ask(plan, [0], priority="interactive")
    again, other, third = step_of(plan), step_of(plan), step_of(plan)
    assert [part.request for part in again.slices] == [first]
    assert [part.request for part in other.slices] == [second]
    assert [part.request for part in third.slices] == [quick]
    assert again.slices[0].opening
    for each in (again, other, third):
        finish(plan, each)
    while (each := plan.next_step(0.0)) is not None:
        finish(plan, each)
    assert plan.counts() == Counts(asked=12, waiting=0, in_flight=0, done=12, cancelled=0)


@pytest.mark.parametrize("totals", [[0], [20]])
def test_work_that_is_lost_three_times_fails_its_request(totals: list[int]):
    plan = planner()
    request = ask(plan, totals)
    assert [plan.lost(step_of(plan).number, request) for _ in range(MAX_LOSSES)] == [True, True, False]
    assert request not in plan
    assert plan.counts() == Counts(asked=sum(totals), waiting=0, in_flight=0, done=0, cancelled=sum(totals))


def test_later_work_that_is_lost_goes_first_and_alone_and_fails_its_request_the_third_time():
    plan = planner()
    unlucky = started(plan, 8)
    for losses in range(1, MAX_LOSSES + 1):
        ask(plan, [0], priority="interactive")
        step = step_of(plan)
        assert (list(shares(step)) == [unlucky]) == (losses > 1)
        assert plan.lost(step.number, unlucky) == (losses < MAX_LOSSES)
    assert unlucky not in plan


def test_lost_work_comes_back_in_its_order():
    plan = planner(queries=12)
    request = ask(plan, [1, 2, 3, 100])
    opening = step_of(plan)
    assert plan.lost(opening.number, request)
    assert [(span.position, span.start, span.stop) for span in step_of(plan).slices[0].spans] == [
        (0, 0, 1), (1, 0, 2), (2, 0, 3), (3, 0, 6)
    ]  # fmt: skip
    assert opening.queries == 12


def test_losses_of_different_pieces_do_not_add_up():
    plan = planner()
    request = started(plan, 8 * 5)
    for _ in range(4):
        for _ in range(MAX_LOSSES - 1):
            assert plan.lost(step_of(plan).number, request)
        finish(plan, step_of(plan))
    assert request in plan


def test_a_lost_slice_of_a_cancelled_request_is_not_sent_again():
    plan = planner()
    request = ask(plan, [4])
    step = step_of(plan)
    plan.cancel(request)
    assert not plan.lost(step.number, request)
    assert plan.next_step(0.0) is None


# Stragglers


def straggling() -> tuple[Planner, int, Step]:
    """A step of a known place, of which nothing was heard for 2 s; it was predicted to take 0.08 s."""
    plan = planner({"here": 1, "there": 1})
    teach(plan, "here")
    request = ask(plan, [8])
    step = step_of(plan)
    assert step.place == "here"
    return plan, request, step


def test_an_overdue_step_is_sent_once_more_to_another_place():
    plan, _, step = straggling()
    assert plan.wake_s(0.0) == 1.0
    assert plan.next_step(0.99) is None
    copy = step_of(plan, 1.0)
    assert (copy.place, copy.slices, copy.copy_of) == ("there", step.slices, step.number)
    assert plan.next_step(1000.0) is None
    assert plan.wake_s(1000.0) is None
    assert plan.counts() == Counts(asked=8, in_flight=8)


@pytest.mark.parametrize("first", ["step", "copy"])
@pytest.mark.parametrize("end", ["done", "lost"])
def test_the_first_answer_counts_and_the_other_is_ignored(first, end):
    plan, request, step = straggling()
    copy = step_of(plan, 2.0)
    winner, loser = (step, copy) if first == "step" else (copy, step)
    assert plan.done(winner.number, request)
    assert plan.counts() == Counts(asked=8, done=8)
    assert request not in plan
    assert not plan.idle
    assert not getattr(plan, end)(loser.number, request)
    assert plan.counts() == Counts(asked=8, done=8)
    assert plan.idle


def test_a_lost_copy_is_no_loss_while_the_other_is_on_its_way():
    plan, request, step = straggling()
    copy = step_of(plan, 2.0)
    assert plan.lost(copy.number, request)
    assert plan.next_step(2.0) is None
    assert plan.counts() == Counts(asked=8, in_flight=8)
    assert plan.lost(step.number, request)
    assert plan.counts() == Counts(asked=8, waiting=8)
    assert [plan.lost(step_of(plan, 2.0).number, request) for _ in range(2)] == [True, False]


def test_fresh_work_goes_before_copies():
    plan, request, _ = straggling()
    other = ask(plan, [0], now_s=2.0)
    assert shares(step_of(plan, 2.0)) == {other: 0}
    assert shares(step_of(plan, 2.0)) == {request: 8}


def test_a_copy_has_only_what_is_still_wanted():
    plan = planner({"here": 1, "there": 1})
    teach(plan, "here")
    answered, cancelled, kept = (ask(plan, [2]) for _ in range(3))
    step = step_of(plan)
    plan.done(step.number, answered)
    plan.cancel(cancelled)
    assert shares(step_of(plan, 5.0)) == {kept: 2}


def test_a_step_is_overdue_by_a_multiple_of_what_was_predicted_for_it_and_for_those_before_it():
    plan = planner({"here": 1, "there": 1}, straggler_factor=3.0, straggler_s=0.0, queries=100, target_s=10.0)
    teach(plan, "here", query_s=0.05)
    teach(plan, "there", query_s=0.05)
    for _ in range(3):
        ask(plan, [12])
        step_of(plan)  # each takes 0.6 s; the third waits for the first
    due_s = [3 * 0.6, 3 * 0.6, 3 * 1.2]
    assert plan.wake_s(0.0) == pytest.approx(due_s[0], rel=0.02)
    assert plan.wake_s(1.9) == pytest.approx(due_s[2], rel=0.02) or plan.next_step(1.9) is not None


def test_there_are_no_copies_without_another_place_or_without_a_prediction():
    plan = planner({"here": 2})
    teach(plan)
    ask(plan, [8])
    step_of(plan)
    assert plan.next_step(1000.0) is None
    assert plan.wake_s(0.0) is None
    plan = planner({"here": 1, "there": 1})
    ask(plan, [8])
    step_of(plan)
    assert plan.next_step(1000.0) is None
    assert plan.wake_s(0.0) is None


# Admission


def test_too_many_requests_or_queries_are_refused():
    plan = planner(requests=2, waiting_queries=10)
    ask(plan, [8])
    with pytest.raises(Overloaded, match="at most 10 masked queries") as refusal:
        ask(plan, [3])
    assert refusal.value.reason == "queries"
    ask(plan, [0])
    with pytest.raises(Overloaded, match="at most 2 requests") as refusal:
        ask(plan, [0])
    assert refusal.value.reason == "requests"


def test_an_owner_has_bounds_of_its_own_and_nobody_has_none():
    plan, ann = planner(), Owner("ann", requests=2, waiting_queries=10)
    first = ask(plan, [8], owner=ann)
    with pytest.raises(Overloaded, match="at most 10 masked queries of ann") as refusal:
        ask(plan, [3], owner=ann)
    assert refusal.value.reason == "token_queries"
    second = ask(plan, [0], owner=ann)
    with pytest.raises(Overloaded, match="at most 2 requests of ann") as refusal:
        ask(plan, [0], owner=ann)
    assert refusal.value.reason == "token_requests"
    for owner in (Owner("bob", requests=1), NOBODY, NOBODY, NOBODY):
        ask(plan, [8], owner=owner)
    plan.cancel(first)
    plan.cancel(second)
    ask(plan, [10], owner=ann)


def test_bounds_of_an_owner_may_change_while_its_requests_run():
    plan = planner()
    ask(plan, [8], owner=Owner("ann"))
    with pytest.raises(Overloaded, match="at most 1 requests of ann"):
        ask(plan, [0], owner=Owner("ann", requests=1))
    assert ask(plan, [8], owner=Owner("ann", requests=2, waiting_queries=16))


def test_a_lone_request_may_be_larger_than_the_bound_on_waiting_queries():
    plan = planner(waiting_queries=10)
    assert ask(plan, [5000], owner=Owner("ann", waiting_queries=10))


def test_what_cannot_be_in_time_is_refused_with_a_hint():
    plan = planner({"here": 2}, target_s=0.1, queries=1000)
    teach(plan, query_s=0.01)
    ask(plan, [1000])
    seconds = plan.predicted_s(500)
    # 10 queries of its own in its opening; 1490 others at 200 a second
    assert seconds == pytest.approx(0.1 + 7.45, rel=0.02)
    ask(plan, [500], deadline_s=seconds + 100.01, now_s=100.0)
    seconds = plan.predicted_s(500, deadline_s=102.0)
    assert seconds == pytest.approx(0.1 + 2.45, rel=0.02), "nobody has an earlier deadline"
    with pytest.raises(Overloaded, match=r"the deadline is in 2\.0 s, but .* would take 2\.") as refusal:
        ask(plan, [500], deadline_s=102.0, now_s=100.0)
    assert refusal.value.retry_after_s == pytest.approx(seconds - 2.0)
    assert refusal.value.reason == "deadline"
    assert ask(plan, [500], deadline_s=102.0, now_s=100.0, in_time=False), "a part of it is wanted as well"


def test_the_prediction_counts_better_classes_and_earlier_deadlines():
    plan = planner({"here": 1}, target_s=0.1, queries=1000)
    teach(plan, query_s=0.01)
    alone_s = plan.predicted_s(100, priority="normal", deadline_s=50.0)
    for priority, deadline_s in [("batch", 30.0), ("normal", 60.0), ("normal", math.inf), ("normal", 5000.0)]:
        ask(plan, [1000], priority=priority, deadline_s=deadline_s)
    openings_s = plan.predicted_s(0) - plan.predicted_s(0, priority="interactive")
    assert plan.predicted_s(100, deadline_s=50.0) == pytest.approx(alone_s + openings_s)
    ask(plan, [1000], priority="interactive")
    ask(plan, [500], priority="normal", deadline_s=40.0)
    assert plan.predicted_s(100, deadline_s=50.0) == pytest.approx(alone_s + 15.0, rel=0.02)
    assert plan.predicted_s(100, priority="batch", deadline_s=5.0) == pytest.approx(alone_s + 45.0, rel=0.02)


def test_a_gradient_map_waits_only_for_what_is_in_flight():
    plan = planner({"here": 1}, target_s=0.1, queries=1000)
    teach(plan, query_s=0.01, image_s=0.01)
    started(plan, 100_000 - 8)
    before_s = plan.predicted_s(0)
    step_of(plan)
    assert plan.predicted_s(0) == pytest.approx(before_s + 0.1, rel=0.1)


def test_without_observations_nothing_is_refused_for_time():
    plan = planner()
    ask(plan, [10_000])
    assert plan.predicted_s(0) is None
    assert ask(plan, [0], deadline_s=1e-6)


def test_places_not_observed_yet_are_taken_to_be_like_the_others():
    plan = planner({"here": 1}, target_s=0.1)
    teach(plan, query_s=0.01)
    one_s = plan.predicted_s(1000)
    plan.set_workers("there", 3)
    assert plan.predicted_s(1000) == pytest.approx(one_s / 4, rel=0.05)
    plan.set_workers("here", 0)
    assert plan.predicted_s(1000) is None


def test_refusals_for_queries_say_when_there_is_room():
    plan = planner({"here": 1}, target_s=0.1, waiting_queries=100)
    teach(plan, query_s=0.01)
    ask(plan, [100])
    with pytest.raises(Overloaded) as refusal:
        ask(plan, [50])
    assert refusal.value.retry_after_s == pytest.approx(0.5, rel=0.05)


def test_the_backlog_is_the_sum_over_earlier_deadlines():
    drawn = random.Random(0)
    backlog, all_of_them = Backlog(), []
    for _ in range(300):
        deadline_s = drawn.choice([drawn.uniform(0, 300), drawn.uniform(0, 1e6), math.inf])
        all_of_them.append((deadline_s, drawn.randint(1, 9)))
        backlog.add(*all_of_them[-1])
    for deadline_s, queries in all_of_them[:100]:
        backlog.add(deadline_s, -queries)
    for limit_s in [0.0, 4095.0, 4096.0, 1e7, math.inf, *(deadline_s for deadline_s, _ in all_of_them)]:
        second = min(limit_s, 1e9) // 1
        expected = sum(queries for deadline_s, queries in all_of_them[100:] if min(deadline_s, 1e9) // 1 <= second)
        assert backlog.until(limit_s) == expected


def test_nothing_is_kept_of_requests_that_are_over():
    plan = planner()
    for turn in range(600):
        request = ask(plan, [turn % 30], deadline_s=turn + 50.0, owner=Owner(f"owner {turn}"))
        if turn % 2:
            plan.cancel(request)
        elif turn % 20 == 0:  # in between they pile up
            while (step := plan.next_step(0.0)) is not None:
                finish(plan, step)
    for request in list(plan._requests):
        plan.cancel(request)
    assert plan.idle
    assert not plan._ledger._owners
    assert not any(counts for backlog in plan._ledger._backlogs for counts in backlog._counts)
    for line in (plan._queue.suspects, plan._queue.openings, plan._queue.started):
        for heap in (line._urgent, *line._eldest):
            assert len(heap) == 0
            assert len(heap._heap) < 100, "leftovers of dropped entries are cleared away"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"queries": 1}, "at least 2 queries"),
        ({"items": 1}, "at least 2 queries and 2 items"),
        ({"share": 0.0}, "above 0 and at most 1, got 0"),
        ({"share": 1.5}, "got 1.5"),
        ({"target_s": 0.0}, "target_s"),
        ({"steps_per_worker": 0}, "steps_per_worker at least 1"),
    ],
)
def test_limits_that_make_no_sense_are_refused(changes, text):
    with pytest.raises(InvalidOption, match=text):
        Limits(**changes)


def calls_of(work: Callable[[], object]) -> int:
    """Python functions called and generators resumed: what it takes, without a clock."""
    count = 0

    def note(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("state", ["openings", "started", "aged"])
def test_a_decision_does_not_look_at_every_request(state):
    def decision(waiting: int) -> int:
        plan = planner(requests=10**6, waiting_queries=10**9, queries=64, items=8)
        for number in range(waiting):
            ask(plan, [1000 + number % 7], deadline_s=1e6 + number % 1000, priority=CLASSES[number % 3])
        while state == "started" and plan._queue.openings.first(0.0) is not None:
            finish(plan, step_of(plan))
        now_s = 1000.0 if state == "aged" else 0.0

        def work() -> None:
            for _ in range(10):
                finish(plan, step_of(plan, now_s))
                plan.counts()
                ask(plan, [1000], now_s=now_s, deadline_s=2e6)

        return calls_of(work)

    assert decision(3000) < 1.3 * decision(100)  # a scan would make it some thirty times as much


def test_the_planner_needs_nothing_but_itself():
    code = (
        "import sys, camserve.planning;"
        "print(sorted({'torch', 'grpc', 'asyncio', 'numpy', 'google.protobuf'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"

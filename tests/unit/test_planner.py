"""The planner's rules, one at a time."""

from __future__ import annotations

import math
import pickle
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from types import FrameType
from typing import Any

import pytest

from camserve.errors import InvalidOption, Overloaded
from camserve.methods.work import Work
from camserve.planning import (
    CLASSES,
    MAX_LOSSES,
    NOBODY,
    Counts,
    Demand,
    Fate,
    Limits,
    Load,
    Owner,
    Planner,
    Span,
    Step,
)
from camserve.planning.ledger import Backlog

LIMITS = Limits(queries=8, items=3, size_bytes=100, requests=100, waiting_s=10_000.0)
OPENING = [Work("opening", 1)]


def planner(backends: dict[str, int] | None = None, **changes: Any) -> Planner:
    plan = Planner(Limits(**{**vars(LIMITS), **changes}))
    for name, workers in (backends or {"here": 100}).items():
        plan.set_workers(name, workers)
    return plan


def masked(total: int | None, most: int = 1000) -> Demand:
    return Demand("masked_forward", total, most if total is None else total)


def demands(totals: list[int | None]) -> list[Demand]:
    return [masked(total) for total in totals]


def ask(plan: Planner, totals: list[int | None], now_s: float = 0.0, **options: Any) -> int:
    return plan.admit(demands(totals), now_s=now_s, **options)


def predicted(plan: Planner, total: int, **options: Any) -> float | None:
    return plan.predicted_s(demands([total]), **options)


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


def observe(plan: Planner, backend: str, worker: str, queries: int, items: int, seconds: float, now_s: float) -> None:
    plan.observe(backend, worker, Load({"masked_forward": queries}, items), seconds, now_s)


def teach(
    plan: Planner, backend: str = "here", query_s: float = 0.01, item_s: float = 0.0, step_s: float = 0.0
) -> None:
    """Observations without noise, until the fit is good."""
    for turn in range(200):
        queries, items = turn % 13, 1 + turn % 3
        seconds = query_s * queries + item_s * items + step_s
        observe(plan, backend, "worker", queries, items, seconds, now_s=0.0)


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


def test_a_number_that_depends_on_the_targets_is_fixed_by_the_opening():
    plan = planner()
    request = ask(plan, [None, 3])
    opening = step_of(plan)
    assert opening.slices[0].spans == (Span(1, 0, 3),)
    assert plan.done(opening.number, request, demands([6, 3]))
    assert step_of(plan).slices[0].spans == (Span(0, 0, 6),)
    assert plan.counts().asked == 9


def test_positions_that_come_later_are_settled_when_all_else_is_done():
    plan = planner()
    request = ask(plan, [4, None])
    opening = step_of(plan)
    assert plan.reserved_units() == {"masked_forward": 1000}
    assert plan.done(opening.number, request, [masked(4), masked(None, most=3), masked(None, most=900)])
    assert plan.reserved_units() == {"masked_forward": 903}
    assert plan.stalled(request)
    assert plan.next_step(0.0) is None
    plan.settle(request, 1, 3)
    assert not plan.stalled(request)
    assert (plan.reserved_units(), plan.waiting_units()) == ({"masked_forward": 900}, {"masked_forward": 3})
    step = step_of(plan)
    assert step.slices[0].spans == (Span(1, 0, 3),)
    finish(plan, step)
    assert plan.stalled(request)
    plan.settle(request, 2, 0)
    assert request not in plan
    assert not plan.stalled(request)
    assert plan.counts() == Counts(asked=7, done=7)
    assert plan.reserved_units() == {}


GOES_BEYOND = {
    "more queries": [masked(21), masked(None, most=50)],
    "heavier queries": [Demand("masked_forward", 20, 20, weight=2), masked(None, most=50)],
    "another kind": [Demand("tail", 20, 20), masked(None, most=50)],
    "no longer known": [masked(None, most=20), masked(None, most=50)],
    "a position that is gone": [],
    "more at most": [masked(20), masked(None, most=51)],
    "more in several": [masked(20), masked(None, most=30), masked(None, most=21)],
    "more that is known": [masked(20), masked(51)],
    "other work": [masked(20), Demand("tail", None, 1)],
}


@pytest.mark.parametrize("final", GOES_BEYOND.values(), ids=GOES_BEYOND)
def test_a_request_never_needs_more_than_was_admitted_for_it(final):
    plan = planner()
    request = plan.admit([masked(20), masked(None, most=50)], now_s=0.0)
    opening = step_of(plan)
    before = (plan.counts(), plan.waiting_units(), plan.reserved_units())
    with pytest.raises(ValueError, match="admitted"):
        plan.done(opening.number, request, final)
    assert (plan.counts(), plan.waiting_units(), plan.reserved_units()) == before
    assert plan.done(opening.number, request, [masked(20), masked(None, most=30), masked(20)])
    with pytest.raises(ValueError, match="0 to 30 queries, got 31"):
        plan.settle(request, 1, 31)
    with pytest.raises(ValueError, match="is known"):
        plan.settle(request, 2, 1)
    plan.settle(request, 1, 30)
    while (step := plan.next_step(0.0)) is not None:
        finish(plan, step)
    assert plan.idle
    assert plan.counts() == Counts(asked=70, done=70)


def test_the_final_demands_may_be_smaller():
    plan = planner()
    heavy = [Demand("masked_forward", 30, 30, weight=3), Demand("tail", 10, 10)]
    request = plan.admit(heavy, now_s=0.0)
    opening = step_of(plan)
    assert opening.queries == 5, "16 units"
    final = [Demand("masked_forward", 12, 12, weight=2), Demand("tail", 0, 0)]
    assert plan.done(opening.number, request, final)
    assert plan.counts() == Counts(asked=40, waiting=7, done=5, cancelled=28)
    assert plan.waiting_units() == {"masked_forward": 14}
    step = step_of(plan)
    assert step.slices[0].spans == (Span(0, 5, 12),)
    assert step.slices[0].work == (Work("masked_forward", 14),)
    finish(plan, step)
    assert plan.idle


def test_demands_that_come_with_a_copy_or_after_a_cancel_are_ignored():
    plan = planner()
    request = ask(plan, [4])
    step = step_of(plan)
    plan.cancel(request)
    assert not plan.done(step.number, request, demands([100]))
    assert plan.idle


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
    observe(plan, "here", "worker", 100, 1, 0.3, 0.0)
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


@pytest.mark.parametrize("behind", ["batch", "normal"])
def test_what_an_owner_has_behind_an_expired_request_takes_its_own_place(behind):
    """It does not go where the expired one would have gone, before what others have."""
    plan = planner()
    alone = {"size_bytes": LIMITS.size_bytes}  # a step holds one of them
    first = ask(plan, [0], owner=CAT, priority="interactive", deadline_s=50.0, **alone)
    ask(plan, [0], owner=ANN, priority="interactive", deadline_s=1.0)
    last = ask(plan, [0], owner=ANN, priority=behind, deadline_s=90.0, **alone)
    second = ask(plan, [0], owner=BOB, priority="normal", deadline_s=50.0, **alone)
    assert [opened(step_of(plan, 2.0)) for _ in range(3)] == [[first], [second], [last]]


@pytest.mark.parametrize("priority", CLASSES)
def test_nothing_starves(priority):
    """Interactive requests come faster than they can be served; the bound is that of the planner's docstring."""
    plan = planner(requests=10**6, waiting_s=1e9, age_s=10.0)
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
    plan = planner(items=4, age_s=10.0, waiting_s=1e9)
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
    steps = [step_of(plan, now_s) for now_s in (0.0, 0.0, 0.0, 10.0, 10.0, 10.0)]
    assert [step.backend for step in steps] == ["large", "small", "large", "large", "small", "large"]
    assert plan.next_step(10.0) is None, "two steps for each worker"
    finish(plan, steps[1])
    assert step_of(plan, 20.0).backend == "small"


def test_nothing_is_sent_to_a_place_without_workers_or_to_one_that_was_removed():
    plan = planner({"here": 1, "there": 1})
    for _ in range(20):
        ask(plan, [8])
    assert {step_of(plan).backend, step_of(plan).backend} == {"here", "there"}
    plan.set_workers("here", 0)
    plan.remove_backend("there")
    plan.remove_backend("nowhere")
    assert plan.next_step(0.0) is None
    plan.set_workers("here", 1)
    assert step_of(plan, 10.0).backend == "here"


def test_a_step_of_a_removed_place_can_still_be_answered_or_lost():
    plan = planner({"here": 1})
    for _ in range(6):
        ask(plan, [8])
    first, second = step_of(plan), step_of(plan, 10.0)
    plan.remove_backend("here")
    observe(plan, "here", "worker", 8, 1, 0.1, 0.0)
    finish(plan, first)
    assert all(plan.lost(second.number, part.request) is Fate.GOES_ON for part in second.slices)
    assert plan.next_step(0.0) is None
    plan.set_workers("here", 1)
    assert [step_of(plan, 10.0).backend, step_of(plan, 20.0).backend] == ["here", "here"]
    assert plan.next_step(20.0) is None


def busy(workers: int = 1, requests: int = 20, **changes: Any) -> Planner:
    """A known place with more work than it can be sent; a step takes 0.08 s."""
    plan = planner({"here": workers}, **{"lead_s": 0.02, **changes})
    teach(plan)
    for _ in range(requests):
        ask(plan, [8])
    return plan


def test_a_second_step_is_sent_just_in_time():
    plan = busy()
    step_of(plan)
    assert plan.next_step(0.0) is None
    wake_s = plan.wake_s(0.0)
    assert wake_s == pytest.approx(0.06, rel=0.02)
    assert plan.next_step(wake_s - 0.001) is None
    assert plan.wake_s(wake_s - 0.001) == wake_s
    step_of(plan, wake_s)
    assert plan.next_step(1.0) is None, "two steps for each worker"
    assert plan.wake_s(wake_s) is None


def test_whoever_comes_before_the_second_step_is_sent_goes_into_it():
    plan = busy()
    step_of(plan)
    hasty = ask(plan, [0], now_s=0.05, priority="interactive")
    assert hasty in shares(step_of(plan, 0.07))


def test_a_step_that_is_late_or_early_moves_those_after_it():
    plan = busy()
    first = step_of(plan)
    second = step_of(plan, 0.07)
    observe(plan, "here", "worker", 8, 1, 0.08, now_s=0.5)
    finish(plan, first)  # only now the second can have begun
    assert plan.next_step(0.5) is None
    assert plan.wake_s(0.5) == pytest.approx(0.56, rel=0.02)
    observe(plan, "here", "worker", 8, 1, 0.08, now_s=0.51)
    finish(plan, second)
    step_of(plan, 0.51)
    assert plan.wake_s(0.51) == pytest.approx(0.57, rel=0.02)


def test_a_lost_step_at_hand_makes_room_for_another():
    plan = busy()
    step_of(plan)
    second = step_of(plan, 0.07)
    assert all(plan.lost(second.number, part.request) is Fate.GOES_ON for part in second.slices)
    step_of(plan, 0.07)
    assert plan.next_step(0.07) is None


def test_each_step_at_hand_takes_the_worker_that_is_free_before():
    plan = busy(workers=2)
    step_of(plan, 0.0)
    step_of(plan, 0.03)
    assert plan.wake_s(0.03) == pytest.approx(0.06, rel=0.02)
    step_of(plan, 0.065)
    assert plan.next_step(0.065) is None, "the other worker is free 0.03 s later"
    assert plan.wake_s(0.065) == pytest.approx(0.09, rel=0.02)
    step_of(plan, 0.095)


def test_a_new_worker_begins_the_step_at_hand():
    plan = busy()
    step_of(plan)
    step_of(plan, 0.065)
    plan.set_workers("here", 2)
    assert plan.next_step(0.075) is not None, "the first is about to end"
    assert plan.wake_s(0.075) == pytest.approx(0.125, abs=0.003), "the second began at 0.065 s"


def test_the_lead_is_half_of_the_target_at_most():
    plan = busy(lead_s=1.0, target_s=0.1)
    step_of(plan)
    assert plan.wake_s(0.0) == pytest.approx(0.03, rel=0.02)


def test_a_backend_of_unlike_workers_is_expected_to_be_as_fast_as_they_are_on_average():
    plan = planner({"here": 2}, lead_s=0.02, target_s=10.0)
    for _ in range(200):
        observe(plan, "here", "fast", 8, 1, 0.1, now_s=0.0)
        observe(plan, "here", "slow", 8, 1, 0.3, now_s=0.0)
    for _ in range(3):
        ask(plan, [8])
        plan.next_step(0.0)
    step = step_of(plan, 5.0)
    assert step.expected_s == pytest.approx(2 / 3 * step.predicted_s, rel=0.05)


def test_nobody_wakes_for_room_that_nobody_wants():
    plan = busy(requests=1)
    step_of(plan)
    assert plan.wake_s(0.0) is None
    late = ask(plan, [8], deadline_s=0.01, in_time=False)
    assert plan.wake_s(0.0) is not None
    assert plan.wake_s(0.02) is None, "its deadline has passed"
    plan.cancel(late)
    plan = busy(steps_per_worker=1)
    step_of(plan)
    assert plan.wake_s(0.0) is None, "there is no room before the step has come back"
    assert plan.next_step(1000.0) is None


def test_a_lead_is_not_negative():
    with pytest.raises(InvalidOption, match="lead_s"):
        Limits(lead_s=-0.001)


def test_a_copy_of_an_overdue_step_waits_for_room_as_well():
    plan = planner({"here": 1, "there": 1}, lead_s=0.02)
    for backend in ("here", "there"):
        teach(plan, backend, query_s=0.2)
    ask(plan, [1])
    first = step_of(plan)
    ask(plan, [1], now_s=2.0)
    assert step_of(plan, 2.0).backend == "there"
    assert plan.next_step(2.1) is None, "it is overdue, and the other place busy"
    assert plan.wake_s(2.1) == pytest.approx(2.18, abs=0.005)
    assert step_of(plan, 2.19).copy_of == first.number


def test_a_step_is_as_large_as_the_slowest_worker_does_in_the_target_time():
    plan = planner({"here": 1}, queries=1000, target_s=0.3)
    for _ in range(200):
        observe(plan, "here", "fast", 50, 1, 0.1, now_s=0.0)
        observe(plan, "here", "slow", 50, 1, 0.5, now_s=0.0)
    ask(plan, [1000])
    assert step_of(plan).queries == pytest.approx(30, abs=1)


def test_a_place_may_have_a_target_time_of_its_own():
    plan = planner({"cpu": 1}, queries=512, target_s=0.3)
    plan.set_workers("gpu", 0)
    plan.set_workers("gpu", 1, Limits(queries=512, target_s=0.03, steps_per_worker=2))
    plan.set_workers("gpu", 0)  # it stays its own
    plan.set_workers("gpu", 1)
    for backend, query_s in {"cpu": 0.01, "gpu": 0.0005}.items():
        teach(plan, backend, query_s)
        observe(plan, backend, "worker", 100, 1, 100 * query_s, now_s=0.0)  # no more than twice as many are dared
    for _ in range(3):
        started(plan, 1000)
    sizes = {(step.backend, step.queries) for step in (step_of(plan, now_s) for now_s in (0.0, 0.0, 0.9))}
    assert {place for place, _ in sizes} == {"cpu", "gpu"}
    assert all(abs(queries - {"cpu": 30, "gpu": 60}[place]) <= 1 for place, queries in sizes)


def test_a_place_that_comes_back_on_another_device_is_learnt_anew():
    plan = planner({"here": 1}, target_s=0.3)
    teach(plan, query_s=0.1)
    assert predicted(plan, 0) is not None
    plan.set_workers("here", 1, Limits(target_s=0.03))
    assert predicted(plan, 0) is None


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


def idle(workers: int, lead_s: float = 0.0) -> Planner:
    """A planner of workers that have nothing to do; a masked forward takes 10 ms, a step 20 ms beside."""
    plan = planner({"here": workers}, queries=512, target_s=0.3, lead_s=lead_s)
    teach(plan, step_s=0.02)
    observe(plan, "here", "worker", 100, 1, 1.02, 0.0)  # no more than twice as many are dared
    return plan


def sizes_of(plan: Planner, now_s: float = 0.0) -> list[int]:
    """Numbers of the queries of all steps that can be sent now."""
    sizes = []
    while (step := plan.next_step(now_s)) is not None:
        sizes.append(step.queries)
    return sizes


def test_an_opening_takes_one_query_where_other_workers_would_wait_for_it():
    plan = idle(2)
    ask(plan, [100])
    opening = step_of(plan)
    assert opening.queries == 1
    assert opening.predicted_s <= 1.001 * opening.allowed_s
    finish(plan, opening)
    assert sizes_of(plan) == [27, 27], "each worker has a full step"
    plan = idle(1)
    ask(plan, [100])
    assert step_of(plan).queries == 27, "nobody waits"


def test_what_would_not_fill_a_step_of_each_worker_is_shared_by_them():
    plan = idle(4)
    ask(plan, [61])
    finish(plan, step_of(plan))
    assert sizes_of(plan) == pytest.approx([15] * 4, abs=3)
    assert plan.waiting == 0


def test_a_step_ends_with_those_that_run():
    plan = idle(2)
    request = ask(plan, [1 + 27 + 27 + 20])
    finish(plan, step_of(plan))
    first, second = step_of(plan), step_of(plan)
    assert (first.queries, second.queries) == (27, 27)
    plan.done(second.number, request)
    third = step_of(plan, now_s=0.2)  # the first one has 0.1 s left, and 0.2 s wait
    assert third.queries == pytest.approx(15, abs=2)


def test_while_there_is_enough_for_all_workers_steps_are_full():
    plan = idle(2)
    started(plan, 1000)
    ask(plan, [100])
    assert step_of(plan).predicted_s == pytest.approx(0.3, abs=0.015), "others have queries meanwhile"


def test_nothing_is_cut_where_a_further_step_costs_more_than_it_saves():
    plan = idle(2, lead_s=0.06)
    ask(plan, [16])
    assert step_of(plan).queries == 16, "75 ms would be saved; a step takes 20 ms, its way 60 ms"
    plan = idle(2, lead_s=0.04)
    ask(plan, [16])
    assert step_of(plan).queries == 1


def test_nothing_is_cut_by_a_cost_that_is_not_known():
    plan = planner({"here": 4}, queries=512)
    ask(plan, [16])
    assert step_of(plan).queries == 16


def test_steps_that_take_longer_than_predicted_do_not_hold_up_the_others():
    plan = idle(2)
    request = ask(plan, [1 + 27 + 27 + 20])
    finish(plan, step_of(plan))
    _, second = step_of(plan), step_of(plan)
    plan.done(second.number, request)
    assert step_of(plan, now_s=5.0).queries == pytest.approx(10, abs=2), "the first one will be back at any time"


def test_a_worker_that_was_not_heard_of_for_long_does_not_count():
    plan = planner({"here": 1}, queries=1000, target_s=0.3, forget_s=60.0)
    for now_s in range(200):
        observe(plan, "here", "fast", 50, 1, 0.1, now_s)
        if now_s < 100:
            observe(plan, "here", "slow", 50, 1, 0.5, now_s)
    ask(plan, [1000])
    assert step_of(plan).queries == 100, "twice of what was seen; three times would be in time"


def test_images_take_their_part_of_the_time():
    plan = planner(items=8, queries=1000, target_s=0.3)
    teach(plan, query_s=0.01, item_s=0.1)
    requests = [ask(plan, [100]) for _ in range(4)]
    step = step_of(plan)
    assert list(shares(step)) == requests[:2], "a third image would leave no time for queries"
    assert step.queries == pytest.approx(10, abs=1)


def test_openings_whose_own_work_takes_long_do_not_pile_up_in_one_step():
    plan = planner(items=8, queries=1000, target_s=0.3)
    for _ in range(50):
        plan.observe("here", "worker", Load({"opening": 1, "layer_gradient": 10}, 1), 0.1, 0.0)
    small = [*OPENING, Work("layer_gradient", 10)]
    large = [*OPENING, Work("layer_gradient", 100)]
    requests = [plan.admit([], opening=opening, now_s=0.0) for opening in (small, small, small, small, large, large)]
    steps = [list(shares(step_of(plan))) for _ in range(4)]
    assert steps == [requests[:2], requests[2:4], requests[4:5], requests[5:]], "two of 0.1 s and a query, or one"
    assert plan.next_step(0.0) is None


@pytest.mark.parametrize("long", ["opening", "queries"])
def test_neither_openings_nor_started_requests_can_stop_the_others(long):
    plan = planner(items=8, target_s=0.3)
    costs = {"opening": 0.001, "masked_forward": 0.001, "layer_gradient": 1.0 if long == "opening" else 0.001}
    teach(plan, query_s=costs["masked_forward"] if long == "opening" else 1.0)
    for _ in range(50):
        plan.observe("here", "worker", Load({"opening": 1, "layer_gradient": 1}, 1), costs["layer_gradient"], 0.0)
    started_one = started(plan, 100)
    openings = [plan.admit([], opening=[*OPENING, Work("layer_gradient", 1)], now_s=0.0) for _ in range(5)]
    step = shares(step_of(plan))
    assert openings[0] in step
    assert step[started_one] >= 1


def test_what_an_opening_does_itself_is_taken_from_the_time_for_queries():
    plan = planner({"here": 1}, items=8, queries=1000, target_s=0.3)
    teach(plan, query_s=0.01)
    for _ in range(50):
        plan.observe("here", "worker", Load({"pixel_gradient": 2}, 1), 0.1, 0.0)
    plan.admit([masked(1000)], opening=[Work("pixel_gradient", 4)], now_s=0.0)
    step = step_of(plan)
    assert step.queries == pytest.approx(10, abs=1)
    assert step.load == Load({"pixel_gradient": 4, "masked_forward": step.queries}, 1)
    assert step.predicted_s == pytest.approx(0.3, abs=0.02)
    assert step.allowed_s == 0.3


def test_a_share_is_one_of_seconds_whatever_the_kinds():
    plan = planner({"here": 1}, items=2, queries=1000, target_s=0.3)
    teach(plan, query_s=0.01)
    for _ in range(50):
        plan.observe("here", "worker", Load({"tail": 500}, 1), 0.25, 0.0)
    first = ask(plan, [1000])
    second = plan.admit([Demand("tail", 100_000, 100_000)], now_s=0.0)
    assert shares(step_of(plan)) == {first: pytest.approx(15, abs=1), second: pytest.approx(300, abs=20)}


def test_a_query_larger_than_a_share_goes_if_the_time_is_enough_and_the_first_one_always():
    plan = planner({"here": 1}, items=8, queries=1000, target_s=0.3)
    teach(plan, query_s=0.01)
    observe(plan, "here", "worker", 100, 1, 1.0, 0.0)
    light = ask(plan, [10])
    medium = plan.admit([Demand("masked_forward", 5, 5, weight=16)], now_s=0.0)
    assert shares(step_of(plan)) == {light: 10, medium: 1}
    plan = planner({"here": 1}, items=8, queries=1000, target_s=0.3)
    teach(plan, query_s=0.01)
    observe(plan, "here", "worker", 100, 1, 1.0, 0.0)
    heavy = plan.admit([Demand("masked_forward", 4, 4, weight=40)], now_s=0.0, priority="interactive")
    light = ask(plan, [20])
    assert shares(step_of(plan)) == {heavy: 1, light: 0}


def test_of_a_kind_that_is_new_a_step_has_few_units_and_then_at_most_twice_as_many():
    plan = planner({"here": 1}, queries=512, target_s=0.3)
    teach(plan, query_s=0.01)
    plan.admit([Demand("closed_form", 5000, 5000)], now_s=0.0)
    sizes = []
    for _ in range(8):
        step = step_of(plan)
        sizes.append(step.queries)
        plan.observe("here", "worker", step.load, 0.001, 0.0)
        finish(plan, step)
    assert sizes == [16, 32, 64, 128, 256, 512, 512, 512]


def test_without_time_for_a_query_there_is_one():
    plan = planner(target_s=0.3)
    teach(plan, query_s=0.01, item_s=1.0)
    ask(plan, [100])
    assert step_of(plan).queries == 1


# Lost work


def test_lost_work_is_sent_again_alone_and_counted_once():
    plan = planner()
    first, second = ask(plan, [6]), ask(plan, [6])
    step = step_of(plan)
    for part in step.slices:
        assert plan.lost(step.number, part.request) is Fate.GOES_ON
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
    fates = [plan.lost(step_of(plan).number, request) for _ in range(MAX_LOSSES)]
    assert fates == [Fate.GOES_ON, Fate.GOES_ON, Fate.GIVEN_UP]
    assert request not in plan
    assert plan.counts() == Counts(asked=sum(totals), waiting=0, in_flight=0, done=0, cancelled=sum(totals))


def test_later_work_that_is_lost_goes_first_and_alone_and_fails_its_request_the_third_time():
    plan = planner()
    unlucky = started(plan, 8)
    for losses in range(1, MAX_LOSSES + 1):
        ask(plan, [0], priority="interactive")
        step = step_of(plan)
        assert (list(shares(step)) == [unlucky]) == (losses > 1)
        fate = plan.lost(step.number, unlucky)
        assert fate is (Fate.GOES_ON if losses < MAX_LOSSES else Fate.GIVEN_UP)
    assert unlucky not in plan


def test_lost_work_comes_back_in_its_order():
    plan = planner(queries=12)
    request = ask(plan, [1, 2, 3, 100])
    opening = step_of(plan)
    assert plan.lost(opening.number, request) is Fate.GOES_ON
    assert [(span.position, span.start, span.stop) for span in step_of(plan).slices[0].spans] == [
        (0, 0, 1), (1, 0, 2), (2, 0, 3), (3, 0, 6)
    ]  # fmt: skip
    assert opening.queries == 12


def test_losses_of_different_pieces_do_not_add_up():
    plan = planner()
    request = started(plan, 8 * 5)
    for _ in range(4):
        for _ in range(MAX_LOSSES - 1):
            assert plan.lost(step_of(plan).number, request) is Fate.GOES_ON
        finish(plan, step_of(plan))
    assert request in plan


def test_a_lost_slice_of_a_cancelled_request_is_not_sent_again():
    plan = planner()
    request = ask(plan, [4])
    step = step_of(plan)
    plan.cancel(request)
    assert plan.lost(step.number, request) is Fate.OVER
    assert plan.next_step(0.0) is None


# Who is to blame


def lose(plan: Planner, step: Step) -> list[Fate]:
    """Tells the planner what the gateway does where a worker dies over a step."""
    now_s = float(step.number)
    plan.blame.lost(step.backend, [part.request for part in step.slices], step.predicted_s, now_s, now_s)
    return [plan.lost(step.number, part.request, by_worker=True) for part in step.slices]


def proven(*backends: str) -> Planner:
    plan = planner(dict.fromkeys(backends, 1))
    for name in backends:
        plan.blame.answered(name, 1.0)
    return plan


def test_lost_work_goes_to_a_backend_that_has_not_lost_it():
    plan = proven("east", "west")
    first = ask(plan, [4])
    step = step_of(plan)
    assert (step.backend, lose(plan, step)) == ("east", [Fate.GOES_ON])
    other = step_of(plan)
    assert (other.backend, shares(other)) == ("west", {first: 4})


def test_lost_work_waits_for_such_a_backend_and_holds_up_nobody_else():
    plan = proven("east", "west")
    first, second = ask(plan, [4]), ask(plan, [4])
    step = step_of(plan)
    busy = ask(plan, [30])
    assert step_of(plan).backend == "west"
    assert lose(plan, step) == [Fate.GOES_ON, Fate.GOES_ON]
    third = ask(plan, [0])
    assert shares(step_of(plan)) == {third: 0}, "at the backend that has lost the other two"
    assert {first, second, busy} <= {number for number in range(9) if number in plan}


def test_a_request_over_which_two_workers_died_is_at_fault():
    plan = proven("east", "west")
    request = ask(plan, [4])
    assert [lose(plan, step_of(plan)) for _ in range(2)] == [[Fate.GOES_ON], [Fate.AT_FAULT]]
    assert request not in plan
    assert plan.counts() == Counts(asked=4, cancelled=4)
    assert all(plan.blame.is_witness(name, 99) for name in ("east", "west")), "nothing is left on their records"


def test_a_request_is_not_at_fault_where_nothing_else_was_ever_answered():
    plan = planner({"east": 1, "west": 1, "north": 1})
    ask(plan, [4])
    steps = []
    for _ in range(2):
        steps.append(step_of(plan))
        assert lose(plan, steps[-1]) == [Fate.GOES_ON]
    assert {step.backend for step in steps} | {step_of(plan).backend} == {"east", "west", "north"}


def test_losses_by_anything_but_a_worker_are_nobodys_fault():
    plan = proven("here")
    request = ask(plan, [4])
    fates = [plan.lost(step_of(plan).number, request, by_worker=False) for _ in range(MAX_LOSSES)]
    assert fates == [Fate.GOES_ON, Fate.GOES_ON, Fate.GIVEN_UP]


def test_what_waits_behind_a_request_that_breaks_workers_is_not_at_fault():
    plan = proven("here")
    plan.set_workers("here", 2)
    breaks, waits = ask(plan, [4]), 0
    fates = []
    for now_s in (1.0, 2.0):
        first = step_of(plan)
        waits = waits or ask(plan, [4])
        second = step_of(plan)
        assert (shares(first), shares(second)) == ({breaks: 4}, {waits: 4})
        for step in (first, second):  # both were sent before the first was found to be lost
            requests = [part.request for part in step.slices]
            own = plan.blame.lost("here", requests, 0.1, began_s=now_s - 0.5, now_s=now_s)
            fates.append(plan.lost(step.number, requests[0], by_worker=own))
    assert fates == [Fate.GOES_ON, Fate.GOES_ON, Fate.AT_FAULT, Fate.GOES_ON]


def test_what_another_backend_answers_speaks_against_the_one_that_lost_it():
    plan = proven("east", "west")
    request = started(plan, 40)
    plan.set_workers("west", 0)
    for _ in range(2):  # both are the request's alone, so far
        assert lose(plan, step := step_of(plan)) == [Fate.GOES_ON]
        plan.set_workers("west", 1)
        plan.set_workers("east", 0)
        finish(plan, again := step_of(plan))
        assert (step.backend, again.backend) == ("east", "west")
        plan.set_workers("west", 0)
        plan.set_workers("east", 1)
    assert not plan.blame.is_witness("east", request)
    lose(plan, step_of(plan))
    assert plan.blame.pause_until_s("east") is not None, "three losses in a row"


def test_what_was_answered_after_a_loss_in_company_speaks_against_nobody():
    plan = proven("east", "west")
    first, second = ask(plan, [4]), ask(plan, [4])
    lose(plan, step_of(plan))
    finish(plan, step_of(plan))
    assert first not in plan
    assert plan.blame.is_witness("east", second), "the other one may have broken the worker"


# Stragglers


def whole(plan: Planner, queries: int, now_s: float = 0.0) -> int:
    """A request whose queries go in one step, however many workers are idle."""
    return plan.admit([Demand("masked_forward", queries, queries, piece=queries)], now_s=now_s)


def straggling() -> tuple[Planner, int, Step]:
    """A step of a known place, of which nothing was heard for 2 s; it was predicted to take 0.08 s."""
    plan = planner({"here": 1, "there": 1})
    teach(plan, "here")
    request = whole(plan, 8)
    step = step_of(plan)
    assert step.backend == "here"
    return plan, request, step


def test_an_overdue_step_is_sent_once_more_to_another_place():
    plan, _, step = straggling()
    assert plan.wake_s(0.0) == 1.0
    assert plan.next_step(0.99) is None
    copy = step_of(plan, 1.0)
    assert (copy.backend, copy.slices, copy.copy_of) == ("there", step.slices, step.number)
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
    assert getattr(plan, end)(loser.number, request) in (False, Fate.OVER)
    assert plan.counts() == Counts(asked=8, done=8)
    assert plan.idle


def test_a_lost_copy_is_no_loss_while_the_other_is_on_its_way():
    plan, request, step = straggling()
    copy = step_of(plan, 2.0)
    assert plan.lost(copy.number, request) is Fate.GOES_ON
    assert plan.next_step(2.0) is None
    assert plan.counts() == Counts(asked=8, in_flight=8)
    assert plan.lost(step.number, request) is Fate.GOES_ON
    assert plan.counts() == Counts(asked=8, waiting=8)
    # It was alone in the step and in the copy: both backends have lost it, and the third loss is the last.
    assert plan.lost(step_of(plan, 2.0).number, request) is Fate.GIVEN_UP


def test_fresh_work_goes_before_copies():
    plan, request, _ = straggling()
    other = ask(plan, [0], now_s=2.0)
    assert shares(step_of(plan, 2.0)) == {other: 0}
    assert shares(step_of(plan, 2.0)) == {request: 8}


def test_a_copy_has_only_what_is_still_wanted():
    plan = planner({"here": 1, "there": 1}, lead_s=0.03)  # more than cutting the opening would save
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
    for now_s, backend in ((0.0, "here"), (0.0, "there"), (0.6, "here")):
        whole(plan, 12, now_s)
        assert step_of(plan, now_s).backend == backend
    due_s = [3 * 0.6, 3 * 0.6, 0.6 + 3 * 1.2]  # each takes 0.6 s; the third waits for the first
    assert plan.wake_s(0.6) == pytest.approx(due_s[0], rel=0.02)
    assert plan.next_step(1.9) is not None, "the first of the two is copied, whose place is not full"
    assert plan.next_step(1.9) is None
    assert plan.wake_s(1.9) == pytest.approx(due_s[2], rel=0.02)


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


def taught(workers: int = 1, **changes: Any) -> Planner:
    """A masked forward takes 10 ms, an opening and all else nothing."""
    plan = planner({"here": workers}, **{"target_s": 0.1, "queries": 1000, **changes})
    teach(plan, query_s=0.01)
    return plan


def test_too_many_requests_are_refused():
    plan = planner(requests=2)
    ask(plan, [8])
    ask(plan, [0])
    with pytest.raises(Overloaded, match="at most 2 requests") as refusal:
        ask(plan, [0])
    assert refusal.value.reason == "requests"


def test_too_much_work_for_the_workers_that_are_there_is_refused_in_seconds():
    plan = taught(workers=2, waiting_s=10.0)
    ask(plan, [900])
    ask(plan, [600])
    assert plan.waiting_s() == pytest.approx(15.0, rel=0.02)
    text = r"at most 10\.0 s of work may wait for each worker; this would add 3\.0 s to 7\.5 s; try again later"
    with pytest.raises(Overloaded, match=text) as refusal:
        ask(plan, [600])
    assert refusal.value.reason == "work"
    assert refusal.value.retry_after_s == pytest.approx(0.5, rel=0.2)
    ask(plan, [400])
    plan.set_workers("here", 3)
    ask(plan, [600])


def test_kinds_of_work_are_weighed_by_what_they_cost():
    plan = taught(waiting_s=10.0)
    for _ in range(50):
        plan.observe("here", "worker", Load({"pixel_gradient": 2}, 1), 0.2, 0.0)
    ask(plan, [500])
    with pytest.raises(Overloaded, match=r"add 6\.\d s to 5\.\d s"):
        plan.admit([Demand("pixel_gradient", 60, 60)], now_s=0.0)
    with pytest.raises(Overloaded, match=r"add 6\.\d s to 5\.\d s"):
        plan.admit([Demand("pixel_gradient", 20, 20, weight=3)], now_s=0.0)
    plan.admit([Demand("pixel_gradient", 40, 40)], now_s=0.0)
    assert plan.waiting_s() == pytest.approx(9.0, rel=0.05)
    assert plan.waiting_units() == {"masked_forward": 500, "pixel_gradient": 40}


@pytest.mark.parametrize("owner", [NOBODY, Owner("ann", waiting_s=10.0)])
def test_what_is_not_known_yet_counts_as_the_most_it_can_be(owner):
    plan = taught(waiting_s=10.0 if owner is NOBODY else 1000.0)
    curves = [masked(8), masked(None, most=480)]
    first = plan.admit(curves, now_s=0.0, owner=owner)
    with pytest.raises(Overloaded, match=r"add 5\.2 s to 4\.9 s"):
        ask(plan, [520], owner=owner)
    assert plan.waiting_s() == pytest.approx(0.08, rel=0.1), "what is reserved does not wait"
    step = step_of(plan)
    plan.done(step.number, first, [masked(8), masked(200), masked(None, most=50)])
    second = plan.admit(curves, now_s=0.0, owner=owner)
    with pytest.raises(Overloaded, match=r"add 2\.7 s to 7\.4 s"):
        ask(plan, [270], owner=owner)
    plan.cancel(second)
    ask(plan, [270], owner=owner)


def test_a_gradient_map_is_never_refused_for_lack_of_room():
    plan = taught(waiting_s=1.0)
    ann = Owner("ann", waiting_s=1.0)
    ask(plan, [5000], owner=ann)
    for _ in range(20):
        plan.admit([], opening=[*OPENING, Work("layer_gradient", 100)], now_s=0.0, owner=ann)
    with pytest.raises(Overloaded, match="may wait for each worker"):
        ask(plan, [1], owner=ann)


def test_an_owner_has_bounds_of_its_own_and_nobody_has_none():
    plan, ann = taught(), Owner("ann", requests=2, waiting_s=0.1)
    first = ask(plan, [8], owner=ann)
    text = r"at most 0\.1 s of one worker's work may wait for ann; this would add 0\.03 s to 0\.08 s; try again later"
    with pytest.raises(Overloaded, match=text) as refusal:
        ask(plan, [3], owner=ann)
    assert refusal.value.reason == "token_work"
    assert refusal.value.retry_after_s == pytest.approx(0.01, rel=0.2)
    second = ask(plan, [0], owner=ann)
    with pytest.raises(Overloaded, match="at most 2 requests of ann") as refusal:
        ask(plan, [0], owner=ann)
    assert refusal.value.reason == "token_requests"
    for owner in (Owner("bob", requests=1), NOBODY, NOBODY, NOBODY):
        ask(plan, [8], owner=owner)
    plan.cancel(first)
    plan.cancel(second)
    ask(plan, [10], owner=ann)


def test_an_owner_beside_others_leaves_them_their_part():
    plan, ann, bob = taught(requests=5, waiting_s=10.0), Owner("ann", part=0.5), Owner("bob", part=0.5)
    ask(plan, [300], owner=ann)
    with pytest.raises(Overloaded, match=r"at most 5\.0 s of one worker's work may wait for ann; .* 3\.0 s to 3\.0 s"):
        ask(plan, [300], owner=ann)
    ask(plan, [0], owner=ann)
    with pytest.raises(Overloaded, match="at most 2 requests of ann"):
        ask(plan, [0], owner=ann)
    ask(plan, [300], owner=bob)
    ask(plan, [0], owner=Owner("ann", requests=3, part=0.5))


def test_bounds_of_an_owner_may_change_while_its_requests_run():
    plan = taught()
    ask(plan, [8], owner=Owner("ann"))
    with pytest.raises(Overloaded, match="at most 1 requests of ann"):
        ask(plan, [0], owner=Owner("ann", requests=1))
    assert ask(plan, [8], owner=Owner("ann", requests=2, waiting_s=0.17))


def test_an_idle_planner_takes_one_request_whatever_the_estimate():
    plan = taught(waiting_s=0.1)
    assert ask(plan, [5000], owner=Owner("ann", requests=0, waiting_s=0.1), deadline_s=1.0)
    with pytest.raises(Overloaded):
        ask(plan, [5000])


def test_an_owner_without_a_request_may_exceed_his_bound_by_work_that_nobody_measures():
    plan, ann = taught(), Owner("ann", waiting_s=0.1)
    ask(plan, [8])
    with pytest.raises(Overloaded, match="may wait for ann"):
        ask(plan, [5000], owner=ann)
    assert plan.admit([Demand("tail", 5000, 5000)], now_s=0.0, owner=ann)
    with pytest.raises(Overloaded, match="may wait for ann"):
        ask(plan, [1], owner=ann)


@pytest.mark.parametrize("most", [None, 10**7])
def test_one_request_leaves_half_of_the_room_to_the_others(most):
    """It is larger than the room itself, which only an idle planner takes: by what is known, or by what may come."""
    plan = taught(waiting_s=10.0)
    first = plan.admit([masked(10**6), masked(most and None, most=most or 0)], now_s=0.0)
    assert plan.waiting_s() > 1000
    ask(plan, [300])
    with pytest.raises(Overloaded, match=r"add 3\.0 s to 8\.0 s"):
        ask(plan, [300])
    ask(plan, [100])
    with pytest.raises(Overloaded, match="may wait for each worker"):
        ask(plan, [10**6])
    plan.cancel(first)
    ask(plan, [490])
    with pytest.raises(Overloaded, match=r"add 1\.2 s to 8\.9 s"):
        ask(plan, [120])


def test_nobody_is_refused_for_a_deadline_on_account_of_work_that_is_not_being_measured():
    """Its first step was slow, and since then nobody was let in who would have shown that it no longer is."""
    plan = taught()
    plan.observe("here", "worker", Load({"tail": 16}, 1), 100.0, 0.0)
    ask(plan, [1000])
    tails = [Demand("tail", 320, 320)]
    assert plan.predicted_s(tails) - predicted(plan, 0) > 10
    first = plan.admit(tails, now_s=0.0, deadline_s=5.0)
    with pytest.raises(Overloaded, match=r"the deadline is in 5\.0 s"):
        plan.admit(tails, now_s=0.0, deadline_s=5.0)
    plan.cancel(first)
    assert plan.admit(tails, now_s=0.0, deadline_s=5.0)


def test_work_in_flight_is_being_measured_too():
    plan = taught()
    ask(plan, [8])
    step_of(plan)
    assert plan.waiting_units() == {}
    with pytest.raises(Overloaded, match="the deadline is in"):
        ask(plan, [1000], deadline_s=5.0)


def test_work_that_is_still_to_come_will_be_measured_too():
    """Else several requests whose curves are hours of work were taken at once, each with a deadline of seconds."""
    plan = taught(waiting_s=1000.0)
    curves = [masked(None, most=10_000)]
    plan.admit(curves, opening=OPENING, now_s=0.0, deadline_s=5.0)
    assert plan.waiting_units() == {"opening": 1}
    with pytest.raises(Overloaded, match="the deadline is in"):
        plan.admit(curves, opening=OPENING, now_s=0.0, deadline_s=5.0)


def test_what_cannot_be_in_time_is_refused_with_a_hint():
    plan = planner({"here": 2}, target_s=0.1, queries=1000)
    teach(plan, query_s=0.01)
    ask(plan, [1000])
    seconds = predicted(plan, 500)
    # 10 queries of its own in its opening; 1490 others at 200 a second
    assert seconds == pytest.approx(0.1 + 7.45, rel=0.02)
    ask(plan, [500], deadline_s=seconds + 100.01, now_s=100.0)
    seconds = predicted(plan, 500, deadline_s=102.0)
    assert seconds == pytest.approx(0.1 + 2.45, rel=0.02), "nobody has an earlier deadline"
    with pytest.raises(Overloaded, match=r"the deadline is in 2\.0 s, but .* would take 2\.") as refusal:
        ask(plan, [500], deadline_s=102.0, now_s=100.0)
    assert refusal.value.retry_after_s == pytest.approx(seconds - 2.0)
    assert refusal.value.reason == "deadline"
    assert ask(plan, [500], deadline_s=102.0, now_s=100.0, in_time=False), "a part of it is wanted as well"


def test_the_prediction_counts_better_classes_and_earlier_deadlines():
    plan = planner({"here": 1}, target_s=0.1, queries=1000)
    teach(plan, query_s=0.01)
    alone_s = predicted(plan, 100, priority="normal", deadline_s=50.0)
    for priority, deadline_s in [("batch", 30.0), ("normal", 60.0), ("normal", math.inf), ("normal", 5000.0)]:
        ask(plan, [1000], priority=priority, deadline_s=deadline_s)
    openings_s = predicted(plan, 0) - predicted(plan, 0, priority="interactive")
    assert predicted(plan, 100, deadline_s=50.0) == pytest.approx(alone_s + openings_s)
    ask(plan, [1000], priority="interactive")
    ask(plan, [500], priority="normal", deadline_s=40.0)
    assert predicted(plan, 100, deadline_s=50.0) == pytest.approx(alone_s + 15.0, rel=0.02)
    assert predicted(plan, 100, priority="batch", deadline_s=5.0) == pytest.approx(alone_s + 45.0, rel=0.02)


def test_one_request_does_not_make_the_others_late_on_paper():
    """It is idle when it comes, so that it is taken although its own deadline is too early for it."""
    plan = taught(waiting_s=100.0, share=0.5)
    ask(plan, [10**5], deadline_s=59.0, priority="interactive")
    predicted_s = predicted(plan, 100, deadline_s=60.0)
    with pytest.raises(Overloaded, match=r"the deadline is in 60\.0 s, but .* this would take 64\.0 s"):
        ask(plan, [3200], deadline_s=60.0)
    request, now_s = ask(plan, [100], deadline_s=60.0), 0.0
    while request in plan:
        step = step_of(plan, now_s)
        now_s += sum(shares(step).values()) * 0.01
        finish(plan, step)
    assert 1.0 < now_s <= predicted_s + 0.01 < 2.3


def test_a_gradient_map_waits_only_for_what_is_in_flight():
    plan = planner({"here": 1}, target_s=0.1, queries=1000)
    teach(plan, query_s=0.01, item_s=0.01)
    started(plan, 100_000 - 8)
    before_s = predicted(plan, 0)
    step_of(plan)
    assert predicted(plan, 0) == pytest.approx(before_s + 0.1, rel=0.1)


def test_without_observations_nothing_is_refused_for_time():
    plan = planner()
    ask(plan, [10_000])
    assert predicted(plan, 0) is None
    assert ask(plan, [0], deadline_s=1e-6)


def test_places_not_observed_yet_are_taken_to_be_like_the_others():
    plan = planner({"here": 1}, target_s=0.1)
    teach(plan, query_s=0.01)
    one_s = predicted(plan, 1000)
    plan.set_workers("there", 3)
    assert predicted(plan, 1000) == pytest.approx(one_s / 4, rel=0.05)
    plan.set_workers("here", 0)
    assert predicted(plan, 1000) is None


def test_refusals_say_nothing_of_when_while_nothing_was_observed():
    plan = planner({"here": 1}, waiting_s=1.0)
    ask(plan, [100])
    with pytest.raises(Overloaded) as refusal:
        ask(plan, [50])
    assert refusal.value.retry_after_s is None


# Owners


ANN, BOB, CAT = (Owner(name) for name in ("ann", "bob", "cat"))


def opened(step: Step) -> list[int]:
    return [part.request for part in step.slices if part.opening]


@pytest.mark.parametrize("priority", CLASSES)
def test_a_flood_of_one_owner_leaves_another_its_place_in_the_next_step(priority):
    """Whatever class and deadlines the flood claims."""
    plan = planner(items=4)
    flood = [ask(plan, [0], owner=ANN, deadline_s=1.0, priority=priority) for _ in range(50)]
    other = ask(plan, [0], owner=BOB, deadline_s=100.0)
    assert set(opened(step_of(plan))) == {*flood[:3], other}
    assert opened(step_of(plan)) == flood[3:7], "nobody else waits"


def test_half_of_a_step_is_so_many_items_bytes_or_seconds():
    for change, size_bytes, opening in (("items", 0, 0), ("bytes", 30, 0), ("time", 0, 6)):
        plan = planner(items=8 if change != "items" else 4)
        teach(plan)
        work = [Work("masked_forward", opening)] if opening else OPENING
        options = {"size_bytes": size_bytes, "opening": work, "owner": ANN, "priority": "interactive"}
        flood = [ask(plan, [0], **options) for _ in range(8)]
        other = ask(plan, [0], owner=BOB, priority="batch", opening=[Work("masked_forward", 1)])
        step = opened(step_of(plan))
        assert step.index(flood[1]) < len(step)
        assert other in step, change


def test_what_does_not_fit_any_more_keeps_nobody_else_out_and_goes_first_in_the_next_step():
    plan = planner(items=8)
    small = [ask(plan, [0], owner=BOB, size_bytes=10) for _ in range(5)]
    large = [ask(plan, [0], owner=ANN, size_bytes=95) for _ in range(2)]
    assert opened(step_of(plan)) == small
    assert opened(step_of(plan)) == large[:1]
    more = [ask(plan, [0], owner=BOB, size_bytes=10) for _ in range(2)]
    last = [opened(step_of(plan)) for _ in range(2)]
    assert last == [more, large[1:]]


def test_owners_of_a_class_take_turns():
    plan = planner(items=2)
    owners = [Owner(f"owner {number}") for number in range(5)]
    floods = [
        [ask(plan, [0], owner=owner, deadline_s=1.0 + number) for _ in range(4)] for number, owner in enumerate(owners)
    ]
    for turn in range(2):
        five_steps = {request for _ in range(5) for request in opened(step_of(plan))}
        assert five_steps == {request for flood in floods for request in flood[2 * turn : 2 * turn + 2]}


def test_an_owner_who_had_its_turn_comes_after_those_who_wait():
    """A client that asks again at once does not go before everybody each time."""
    plan = planner(items=2, queries=2)
    ask(plan, [0], owner=ANN)
    waiting = [ask(plan, [0], owner=owner) for owner in (BOB, CAT)]
    assert waiting[0] in opened(step_of(plan))
    again = ask(plan, [0], owner=ANN, deadline_s=1.0)
    assert set(opened(step_of(plan))) == {waiting[1], again}


def test_an_owner_has_its_share_of_the_queries_however_many_requests_it_has():
    plan = planner(items=8)
    teach(plan, query_s=0.03)
    flood = [started(plan, 500, owner=ANN, deadline_s=50.0) for _ in range(5)]
    other = started(plan, 500, owner=BOB, deadline_s=1000.0)
    got = Counter()
    for _ in range(20):
        step = step_of(plan)
        got.update(shares(step))
        finish(plan, step)
    assert got[other] == pytest.approx(sum(got[each] for each in flood), rel=0.2)


def test_what_nobody_else_wants_goes_to_one_owner():
    plan = planner()
    request = started(plan, 500, owner=ANN)
    assert shares(step_of(plan)) == {request: LIMITS.queries}


def test_a_prediction_knows_that_owners_take_turns():
    plan = taught()
    for _ in range(20):
        ask(plan, [900], owner=ANN, deadline_s=500.0)
    mine = plan.predicted_s(demands([100]), deadline_s=1000.0, owner=BOB)
    like_ann = plan.predicted_s(demands([100]), deadline_s=1000.0, owner=ANN)
    assert mine == pytest.approx(2 * 100 * 0.01, rel=0.3)
    assert like_ann > 20 * mine


def test_a_prediction_counts_of_the_openings_of_others_one_for_each_of_its_own():
    plan = planner(backends={"here": 1})
    for _ in range(100):
        plan.observe("here", "worker", Load({"opening": 1}, 1), 0.1, 0.0)
    for _ in range(20):
        ask(plan, [0], owner=ANN, opening=OPENING)
    alone_s = plan.predicted_s(demands([0]), opening=OPENING, priority="interactive", owner=BOB)
    others_s, all_s = (plan.predicted_s(demands([0]), opening=OPENING, owner=owner) - alone_s for owner in (BOB, ANN))
    assert others_s == pytest.approx(all_s / 20)
    ask(plan, [0], owner=BOB, opening=OPENING)
    assert plan.predicted_s(demands([0]), opening=OPENING, owner=BOB) - alone_s == pytest.approx(3 * others_s)


def test_queries_that_go_with_an_opening_are_a_turn():
    """Others who open something new each time do not keep out who is started."""
    plan = planner(items=8)
    teach(plan, query_s=0.03)
    other = started(plan, 500, owner=BOB, deadline_s=1000.0)
    for owner in (ANN, CAT):
        ask(plan, [500], owner=owner, deadline_s=10.0)
    assert shares(step_of(plan)).get(other, 0) == 0
    for owner in (ANN, CAT):
        ask(plan, [500], owner=owner, deadline_s=10.0)
    assert shares(step_of(plan))[other] == 4


def test_a_flood_does_not_make_another_owner_late_on_paper():
    plan = taught()
    for _ in range(20):
        ask(plan, [900], owner=ANN, deadline_s=500.0)
    with pytest.raises(Overloaded):
        ask(plan, [100], owner=ANN, deadline_s=20.0, priority="batch")
    assert ask(plan, [100], owner=BOB, deadline_s=20.0, priority="batch")


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
    """What is kept is what is pickled."""
    plan = planner()
    sizes = []
    for turn in range(2000):
        request = plan.admit(
            [masked(turn % 30), masked(None)],
            now_s=0.0,
            deadline_s=turn % 1000 + 50.0,
            owner=Owner(f"owner {turn % 1000}"),
            priority=CLASSES[turn % 3],
        )
        if turn % 2:
            plan.cancel(request)
        elif turn % 20 == 0:  # in between they pile up
            while (step := plan.next_step(0.0)) is not None:
                for part in step.slices:
                    plan.done(step.number, part.request)
                    plan.cancel(part.request)
        if turn % 1000 == 999:
            while (step := plan.next_step(0.0)) is not None:
                for part in step.slices:
                    plan.done(step.number, part.request)
                    plan.cancel(part.request)
            assert plan.idle
            sizes.append(len(pickle.dumps(plan)))
    assert sizes[1] < 1.1 * sizes[0]
    assert sizes[0] < 20_000


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


def bytecodes_of(work: Callable[[], object]) -> int:
    """Instructions of Python executed: what it takes, without a clock. A scan in a comprehension counts with each of
    its turns."""
    count = 0

    def note(frame: FrameType, event: str, argument: object) -> Callable[..., Any]:
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return note

    before = sys.gettrace()
    sys.settrace(note)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def test_a_scan_in_a_comprehension_is_counted():
    assert bytecodes_of(lambda: [each for each in range(1000) if each < 0]) > 3000


@pytest.mark.parametrize("state", ["openings", "started", "aged"])
def test_a_decision_does_not_look_at_every_request(state):
    def decision(waiting: int) -> int:
        plan = planner(requests=10**6, waiting_s=1e9, queries=64, items=8)
        for number in range(waiting):
            wanted = [masked(1000 + number % 7), masked(None)]
            owner = Owner(f"owner {number % 1000}", waiting_s=1e6)
            deadline_s = 1e6 + number % 1000
            plan.admit(wanted, now_s=0.0, deadline_s=deadline_s, priority=CLASSES[number % 3], owner=owner)
        opened = 0
        while state == "started" and opened < waiting:
            step = step_of(plan)
            opened += sum(part.opening for part in step.slices)
            finish(plan, step)
        now_s = 1000.0 if state == "aged" else 0.0

        def work() -> None:
            for _ in range(10):
                finish(plan, step_of(plan, now_s))
                plan.counts()
                plan.waiting_s()
                ask(plan, [1000], now_s=now_s, deadline_s=2e6, owner=Owner("ann", waiting_s=1e9))

        work()  # heaps put off a part of their work until the next look
        return bytecodes_of(work)

    assert decision(10_000) < 1.3 * decision(100)  # a scan of one instruction each would double it


def test_the_planner_needs_nothing_but_itself():
    code = (
        "import sys, camserve.planning;"
        "print(sorted({'torch', 'grpc', 'asyncio', 'numpy', 'google.protobuf'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# Requests that stop early


def test_what_is_withdrawn_is_asked_no_more_and_what_is_in_flight_still_counts():
    plan = planner()
    request = ask(plan, [30])
    finish(plan, step_of(plan))
    flying = step_of(plan)
    assert plan.withdraw(request, [0]) == 14
    assert plan.counts() == Counts(asked=30, waiting=0, in_flight=8, done=8, cancelled=14)
    assert plan.next_step(0.0) is None
    assert request in plan
    assert plan.withdraw(request, [0]) == 0
    finish(plan, flying)
    assert plan.counts() == Counts(asked=30, waiting=0, in_flight=0, done=16, cancelled=14)
    assert plan.idle


def test_a_request_of_which_nothing_is_left_is_over_and_frees_its_place():
    plan = planner(requests=1)
    request = ask(plan, [30])
    finish(plan, step_of(plan))
    with pytest.raises(Overloaded, match="at most 1 requests"):
        ask(plan, [1])
    assert plan.withdraw(request, [0]) == 22
    assert request not in plan
    assert plan.waiting_units() == {}
    ask(plan, [1])


def test_what_was_withdrawn_and_is_lost_is_not_sent_again():
    plan = planner()
    request = ask(plan, [30])
    finish(plan, step_of(plan))
    flying = step_of(plan)
    plan.withdraw(request, [0])
    assert plan.lost(flying.number, request) is Fate.GOES_ON
    assert plan.next_step(0.0) is None
    assert plan.counts() == Counts(asked=30, waiting=0, in_flight=0, done=8, cancelled=22)
    assert plan.idle


def test_losses_of_what_is_not_asked_any_more_fail_no_request():
    """Its map is there: two workers that died over the same queries would else have been enough."""
    plan = planner({"one": 2, "two": 2})
    for name in ("one", "two"):
        plan.blame.answered(name, 1.0)
    request = ask(plan, [60, 9])
    finish(plan, step_of(plan))
    assert plan.lost(step_of(plan).number, request, by_worker=True) is Fate.GOES_ON
    again = step_of(plan)
    plan.withdraw(request, [0])
    assert plan.lost(again.number, request, by_worker=True) is Fate.GOES_ON
    while (step := plan.next_step(0.0)) is not None:
        assert {span.position for part in step.slices for span in part.spans} == {1}
        finish(plan, step)
    assert plan.idle


def test_other_positions_and_what_follows_are_asked_all_the_same():
    plan = planner()
    request = ask(plan, [20, 12, None])
    finish(plan, step_of(plan))
    assert plan.withdraw(request, [0]) == 12
    asked = 0
    while (step := plan.next_step(0.0)) is not None:
        asked += step.queries
        finish(plan, step)
    assert asked == 12
    assert plan.stalled(request)
    plan.settle(request, 2, 5)
    assert step_of(plan).queries == 5


def test_the_others_get_the_place_of_what_is_withdrawn():
    plan = planner({"here": 1}, share=0.5)
    first, second = started(plan, 40), started(plan, 40)
    step = step_of(plan)
    assert shares(step) == {first: 4, second: 4}
    plan.withdraw(first, [0])
    finish(plan, step)
    assert shares(step_of(plan)) == {second: 8}


def test_time_is_predicted_by_what_is_usual_and_room_is_kept_for_the_most():
    plan, narrow = planner({"here": 1}), planner({"here": 1}, waiting_s=5.0)
    teach(plan)
    teach(narrow)
    usual = Demand("masked_forward", 1000, 1000, usual=250)
    asked, predicted_s = predicted(plan, 250), plan.predicted_s([usual])
    assert asked is not None
    assert predicted_s == pytest.approx(asked)
    assert predicted_s == pytest.approx(2.5, rel=0.05)
    ask(plan, [100])
    plan.admit([usual], now_s=0.0, deadline_s=6.0)
    with pytest.raises(Overloaded, match="the deadline is in"):
        plan.admit([replace(usual, usual=None)], now_s=0.0, deadline_s=6.0)
    ask(narrow, [1])
    with pytest.raises(Overloaded, match="of work may wait"):
        narrow.admit([usual], now_s=0.0)

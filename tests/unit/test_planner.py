"""The planner's rules, one at a time."""

from __future__ import annotations

import subprocess
import sys

import pytest

from camserve.errors import InvalidOption, Overloaded
from camserve.planning import MAX_LOSSES, Counts, Limits, Planner, Span, Step

LIMITS = Limits(queries=8, items=3, size_bytes=100, requests=100, waiting_queries=10_000)


def planner(**changes: int) -> Planner:
    return Planner(Limits(**{**vars(LIMITS), **changes}))


def step_of(plan: Planner, now_s: float = 0.0) -> Step:
    step = plan.next_step(now_s)
    assert step is not None
    return step


def finish(plan: Planner, step: Step) -> None:
    for part in step.slices:
        assert plan.done(step.number, part.request)


def shares(step: Step) -> dict[int, int]:
    return {part.request: part.queries for part in step.slices}


def test_nothing_to_do_is_no_step():
    assert planner().next_step(0.0) is None


def test_a_gradient_method_is_done_with_its_opening():
    plan = planner()
    request = plan.admit([0])
    step = step_of(plan)
    assert step.slices[0].opening
    assert step.slices[0].spans == (Span(0, 0, 0),)
    finish(plan, step)
    assert request not in plan
    assert plan.idle


def test_the_opening_takes_what_fits_and_the_rest_waits_for_it():
    plan = planner()
    plan.admit([0, 20])
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
    request = plan.admit([None, 3])
    opening = step_of(plan)
    assert opening.slices[0].spans == (Span(1, 0, 3),)
    assert plan.done(opening.number, request, [6, 3])
    assert step_of(plan).slices[0].spans == (Span(0, 0, 6),)
    assert plan.counts().asked == 9


def test_several_requests_share_a_step():
    plan = planner()
    first, second, third, fourth = (plan.admit([2]) for _ in range(4))
    assert shares(step_of(plan)) == {first: 2, second: 2, third: 2}
    assert shares(step_of(plan)) == {fourth: 2}


def test_an_opening_enters_the_next_step_of_a_running_long_request():
    plan = planner()
    long = plan.admit([1000])
    finish(plan, step_of(plan))
    quick = plan.admit([0])
    step = step_of(plan)
    assert shares(step) == {long: 8, quick: 0}
    assert step.slices[1].opening


def test_while_others_wait_nobody_takes_more_than_half():
    plan = planner()
    first, second = plan.admit([100]), plan.admit([100])
    assert shares(step_of(plan)) == {first: 4, second: 4}


def test_what_one_leaves_goes_to_the_eldest():
    plan = planner()
    first, second = plan.admit([100]), plan.admit([1])
    assert shares(step_of(plan)) == {first: 7, second: 1}


def test_openings_leave_half_to_the_eldest_started_request():
    plan = planner()
    long = plan.admit([1000])
    finish(plan, step_of(plan))
    openings = [plan.admit([100]) for _ in range(5)]
    assert shares(step_of(plan)) == {long: 4, openings[0]: 4, openings[1]: 0}


def test_the_eldest_started_request_has_a_place_however_many_come():
    plan = planner()
    long = plan.admit([24])
    finish(plan, step_of(plan))
    for _ in range(4):
        for _ in range(3):
            plan.admit([8])
        step = step_of(plan)
        assert long in shares(step)
        finish(plan, step)
    assert long not in plan, "16 queries at 4 a step"


def test_bytes_bound_a_step_but_never_a_request_alone():
    plan = planner()
    huge, small, next_one = plan.admit([0], 500), plan.admit([0], 60), plan.admit([0], 60)
    assert shares(step_of(plan)) == {huge: 0}
    assert shares(step_of(plan)) == {small: 0}
    assert shares(step_of(plan)) == {next_one: 0}


def test_lost_work_is_sent_again_alone_and_counted_once():
    plan = planner()
    first, second = plan.admit([6]), plan.admit([6])
    step = step_of(plan)
    for part in step.slices:
        assert plan.lost(step.number, part.request)
    again, other = step_of(plan), step_of(plan)
    assert [part.request for part in again.slices] == [first]
    assert [part.request for part in other.slices] == [second]
    assert again.slices[0].opening
    finish(plan, again)
    finish(plan, other)
    while (step := plan.next_step(0.0)) is not None:
        finish(plan, step)
    assert plan.counts() == Counts(asked=12, waiting=0, in_flight=0, done=12, cancelled=0)


@pytest.mark.parametrize("totals", [[0], [20]])
def test_work_that_is_lost_three_times_fails_its_request(totals: list[int]):
    plan = planner()
    request = plan.admit(totals)
    assert [plan.lost(step_of(plan).number, request) for _ in range(MAX_LOSSES)] == [True, True, False]
    assert request not in plan
    assert plan.counts() == Counts(asked=sum(totals), waiting=0, in_flight=0, done=0, cancelled=sum(totals))


def test_lost_work_comes_back_in_its_order():
    plan = planner(queries=12)
    request = plan.admit([1, 2, 3, 100])
    opening = step_of(plan)
    assert plan.lost(opening.number, request)
    assert [(span.position, span.start, span.stop) for span in step_of(plan).slices[0].spans] == [
        (0, 0, 1), (1, 0, 2), (2, 0, 3), (3, 0, 6)
    ]  # fmt: skip
    assert opening.queries == 12


def test_losses_of_different_pieces_do_not_add_up():
    plan = planner()
    request = plan.admit([8 * 6])
    finish(plan, step_of(plan))
    for _ in range(4):
        for _ in range(MAX_LOSSES - 1):
            assert plan.lost(step_of(plan).number, request)
        finish(plan, step_of(plan))
    assert request in plan


def test_cancelling_drops_what_waits_ignores_what_flies_and_is_idempotent():
    plan = planner()
    request, neighbour = plan.admit([20]), plan.admit([1])
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


def test_a_lost_slice_of_a_cancelled_request_is_not_sent_again():
    plan = planner()
    request = plan.admit([4])
    step = step_of(plan)
    plan.cancel(request)
    assert not plan.lost(step.number, request)
    assert plan.next_step(0.0) is None


def test_past_its_deadline_a_request_is_put_into_no_step():
    plan = planner()
    plan.admit([4], deadline_s=10.0)
    assert plan.next_step(10.0) is None
    assert plan.next_step(9.9) is not None


def test_too_many_requests_or_queries_are_refused():
    plan = planner(requests=2, waiting_queries=10)
    plan.admit([8])
    with pytest.raises(Overloaded, match="at most 10 masked queries"):
        plan.admit([3])
    plan.admit([0])
    with pytest.raises(Overloaded, match="at most 2 requests"):
        plan.admit([0])


def test_a_lone_request_may_be_larger_than_the_bound_on_waiting_queries():
    assert planner(waiting_queries=10).admit([5000])


def test_a_step_too_small_for_the_rules_is_refused():
    with pytest.raises(InvalidOption, match="at least 2"):
        Limits(queries=1)


def test_the_planner_needs_nothing_but_itself():
    code = (
        "import sys, camserve.planning;"
        "print(sorted({'torch', 'grpc', 'asyncio', 'numpy', 'google.protobuf'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"

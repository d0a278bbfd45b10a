"""Who is to blame for a lost step: the rules one at a time, and laws that hold whatever happens."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from camserve.errors import InvalidOption
from camserve.planning import Blame, Limits

CLOCK = map(float, itertools.count(10**6))
"""Times of steps that tests do not set themselves; none is twice."""
LIMITS = Limits(losses=3, pause_s=1.0, most_pause_s=8.0)


def blame(*proven: str) -> Blame:
    found = Blame(LIMITS)
    for name in proven:
        found.answered(name, 1.0)
    return found


def lose(found: Blame, *requests: int, size_s: float = 1.0, now_s: float | None = None) -> bool:
    """A step is sent and lost; returns whether that puts the backend into quarantine."""
    before, began_s = found.pause_until_s("here"), next(CLOCK) if now_s is None else now_s
    assert found.lost("here", requests, size_s, began_s, began_s)
    return before is None and found.pause_until_s("here") is not None


def test_what_was_on_its_way_when_a_step_was_lost_is_no_loss_of_its_own():
    """Else a gateway that has three steps at a worker would quarantine it for one."""
    found = blame("here")
    assert found.lost("here", [1], 1.0, began_s=1.0, now_s=5.0)
    assert not any(found.lost("here", [number], 1.0, began_s=2.0, now_s=6.0) for number in range(9))
    assert found.pause_until_s("here") is None
    assert found.is_witness("here", 1)
    assert found.lost("here", [2], 1.0, began_s=5.1, now_s=6.0)
    assert not found.is_witness("here", 1)


def test_three_losses_in_a_row_quarantine_a_backend_and_a_canary_after_the_pause_brings_it_back():
    found = blame("here")
    assert [lose(found, number, now_s=number) for number in (1, 2, 3)] == [False, False, True]
    assert (found.quarantined, found.pause_until_s("here")) == (1, 4.0)
    assert not found.greeted("here", 3.9), "a canary that was on its way does not end the pause"
    assert found.greeted("here", 4.0)
    assert (found.quarantined, found.pause_until_s("here")) == (0, None)


def test_an_answer_in_between_ends_the_row():
    found = blame()
    for number in range(20):
        assert not lose(found, number)
        assert not lose(found, number + 1)
        found.answered("here", 1.0)


def test_small_steps_do_not_end_a_row_of_large_ones_until_there_are_many():
    found = blame()
    for number in (1, 2):
        lose(found, number)
        found.answered("here", 0.4)
    assert lose(found, 3)
    found = blame()
    for number in range(20):
        assert not lose(found, number)
        for _ in range(32):
            found.answered("here", 0.4)


def test_pauses_double_up_to_a_bound_and_one_loss_is_enough_until_something_as_large_was_answered():
    found, now_s, pauses_s = blame(), 0.0, []
    for number in range(3):
        lose(found, number, now_s=(now_s := now_s + 1))
    for number in range(5):
        pauses_s.append(found.pause_until_s("here") - now_s)
        now_s = found.pause_until_s("here")
        assert found.greeted("here", now_s)
        found.answered("here", 0.1)
        assert lose(found, number, now_s=now_s)
    assert pauses_s == [1, 2, 4, 8, 8]
    found.greeted("here", now_s + 8)
    found.answered("here", 1.0)
    assert [lose(found, number) for number in (1, 2)] == [False, False]


def test_a_backend_is_a_witness_only_where_it_was_seen_to_work_and_lost_nothing_else():
    found = blame()
    lose(found, 1)
    assert not found.is_witness("here", 1), "it has never answered anything"
    found.controlled("here", True)
    assert found.is_witness("here", 1)
    found.controlled("here", False)
    assert not found.is_witness("here", 1)
    found.controlled("elsewhere", True)
    assert not found.is_witness("nowhere", 1)
    found = blame("here")
    lose(found, 1)
    lose(found, 2)
    assert not found.is_witness("here", 1)
    assert not found.is_witness("here", 2)


def test_a_step_lost_with_others_speaks_against_the_one_that_is_lost_alone_afterwards():
    found = blame("here")
    lose(found, 1, 2, 3)
    lose(found, 2)
    assert found.is_witness("here", 2)
    assert not found.is_witness("here", 1)


def test_a_request_that_another_backend_answers_was_not_to_blame():
    found = blame("here")
    quarantined = []
    for _ in range(3):
        quarantined.append(lose(found, 1))
        found.controlled("here", True)
        assert quarantined[-1] or found.is_witness("here", 1) == (len(quarantined) == 1)
        found.contradicted("here", 1)
    assert quarantined == [False, False, True], "three losses, none of them the request's"


def test_requests_that_break_workers_do_not_quarantine_a_backend_that_answers_the_controls():
    """One or several, however often: what they did is explained, and each can be told from the others."""
    found = blame("here")
    for number in [1, 1, 1, 1, 2, 3, 4, 5] * 20:
        assert not lose(found, number)
        found.controlled("here", True)
        assert found.is_witness("here", number)
    assert [lose(found, number) for number in (2, 3, 4)] == [False, False, True], (
        "without controls that is another thing"
    )


def test_where_one_request_after_the_other_is_to_blame_it_is_the_backend():
    found = blame("here")
    for number in range(10):
        assert not lose(found, number)
        found.excuse(number)
    assert lose(found, 10)
    found = blame("here")
    for number in range(20):
        assert not lose(found, number)
        found.excuse(number)
        found.answered("here", 0.01)


@pytest.mark.parametrize("wrong", [{"losses": 0}, {"pause_s": 0.0}, {"pause_s": 9.0, "most_pause_s": 8.0}])
def test_limits_that_make_no_sense_are_refused(wrong: dict[str, float]):
    with pytest.raises(InvalidOption, match="losses must be at least 1"):
        Limits(**wrong)


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["lost", "answered", "controlled", "failed", "excuse", "contradicted", "greeted"]),
        st.sampled_from(["a", "b"]),
        st.integers(1, 4),
        st.sampled_from([0.01, 0.3, 1.0]),
    ),
    max_size=60,
)


@given(EVENTS)
def test_whatever_happens(events: list[tuple[str, str, int, float]]):
    """Blame of one backend is none of another; a pause is bounded; who is away is no witness."""
    both, alone, now_s = Blame(LIMITS), Blame(LIMITS), 0.0
    for what, name, request, size_s in events:
        now_s += 0.5
        for found in (both, alone) if name == "a" or what == "excuse" else (both,):
            before = found.pause_until_s(name)
            if what == "lost":
                assert found.lost(name, [request], size_s, now_s, now_s)
                if before is None and found.pause_until_s(name) is not None:
                    assert 1.0 <= found.pause_until_s(name) - now_s <= 8.0
            elif what == "answered":
                found.answered(name, size_s)
            elif what in ("controlled", "failed"):
                found.controlled(name, what == "controlled")
            elif what == "excuse":
                found.excuse(request)
            elif what == "contradicted":
                found.contradicted(name, request)
            else:
                assert found.greeted(name, now_s) == (before is None or now_s >= before)
        assert both.pause_until_s("a") == alone.pause_until_s("a")
        assert [both.is_witness("a", each) for each in range(5)] == [alone.is_witness("a", each) for each in range(5)]
        assert both.quarantined == sum(both.pause_until_s(each) is not None for each in "ab")

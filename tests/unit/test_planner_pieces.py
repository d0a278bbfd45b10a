"""Queries that are asked in pieces: no step cuts one, whatever is lost, withdrawn or beside them."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from camserve.methods.work import Work
from camserve.planning import Demand, Limits, Load, Planner, Step

OPENING = [Work("opening", 1)]


def plan(**limits: int | float) -> Planner:
    made = Planner(Limits(**{"items": 4, "size_bytes": 100, "waiting_s": 10_000.0, "steps_per_worker": 1, **limits}))
    made.set_workers("here", 2)
    made.set_workers("there", 1)
    return made


def pieces_of(step: Step, request: int) -> list[tuple[int, int, int]]:
    slices = [one for one in step.slices if one.request == request]
    return [(span.position, span.start, span.stop) for one in slices for span in one.spans if span.queries]


@pytest.mark.parametrize("seed", range(40))
def test_no_step_cuts_a_piece(seed: int):
    rng = random.Random(seed)
    planner = plan(queries=rng.choice([5, 20, 64]), share=rng.choice([0.3, 1.0]), target_s=rng.choice([0.05, 0.3]))
    totals, size = [rng.randint(1, 90), rng.randint(0, 40)], rng.choice([7, 16])
    demands = [Demand("masked_forward", total, total, piece=size) for total in totals]
    request = planner.admit(demands, opening=OPENING, now_s=0.0)
    others = {
        planner.admit([Demand("masked_forward", 30, 30)], opening=OPENING, now_s=0.0, priority="interactive"): 30
        for _ in range(rng.randint(0, 5))
    }
    answered: Counter[tuple[int, int]] = Counter()
    flying: list[Step] = []
    losses, now_s = 2, 0.0
    while True:
        now_s += 0.001
        if (step := planner.next_step(now_s)) is not None:
            flying.append(step)
        elif not flying:
            break
        if step is not None and rng.random() < 0.6:
            continue
        step = flying.pop(rng.randrange(len(flying)))
        planner.observe(step.backend, step.backend, Load({"masked_forward": step.queries or 1}, 1), 0.02, now_s)
        for position, start, stop in pieces_of(step, request):
            assert start % size == 0
            assert stop % size == 0 or stop == totals[position]
        for one in step.slices:
            if losses and one.request == request and rng.random() < 0.3:
                losses -= 1
                planner.lost(step.number, one.request)
            elif planner.done(step.number, one.request) and one.request == request:
                spans = [(span.position, range(span.start, span.stop)) for span in one.spans]
                answered.update((position, number) for position, numbers in spans for number in numbers)
    assert planner.idle
    assert answered == Counter((position, number) for position, total in enumerate(totals) for number in range(total))
    assert planner.counts().done == sum(totals) + sum(others.values())


def test_a_piece_goes_at_once_however_long_it_takes():
    planner = plan(queries=5, target_s=0.001)
    request = planner.admit([Demand("masked_forward", 40, 40, piece=16)], opening=OPENING, now_s=0.0)
    found = []
    while (step := planner.next_step(0.0)) is not None:
        found += pieces_of(step, request)
        planner.done(step.number, request)
    assert found == [(0, 0, 16), (0, 16, 32), (0, 32, 40)]

"""What `auto` makes of methods that may stop early: where they stand on the ladder, how long they are to take."""

from __future__ import annotations

import numpy as np
import pytest

from camserve.errors import Overloaded
from camserve.gateway.ops.settings import Settings
from camserve.gateway.pool.fake import MODEL
from camserve.gateway.requests.auto import ranked, resolved
from camserve.gateway.requests.demands import demands_of
from camserve.methods import Auto, GradCam, GroupCam, MethodSpec, ScoreCam, SsCam
from camserve.planning import NOBODY, Limits, Load, Planner
from camserve.types.request import ExplainRequest, FittedRequest, RequestLimits

IMAGE = np.zeros((32, 48, 3), np.uint8)
LADDER = (GradCam(), ScoreCam(tolerance=0.05), ScoreCam())


def fitted(*methods: MethodSpec) -> FittedRequest:
    return ExplainRequest(IMAGE, methods).fit(MODEL, RequestLimits(auto=True))


def taught(query_s: float) -> Planner:
    planner = Planner(Limits())
    planner.set_workers("here", 1)
    for turn in range(200):
        load = Load({"masked_forward": turn % 13, "opening": 1, "layer_gradient": 1}, 1)
        planner.observe("here", "worker", load, query_s * (turn % 13) + 0.001, 0.0)
    return planner


@pytest.mark.parametrize(
    ("budget_s", "usual", "method"),
    [
        (0.1, 0.25, GradCam()),
        (5.0, 0.25, ScoreCam(tolerance=0.05)),  # 24 queries of 0.1 s
        (5.0, 0.9, GradCam()),
        (20.0, 0.9, ScoreCam()),
    ],
)
def test_a_rung_with_a_tolerance_is_taken_where_what_it_usually_asks_is_in_time(budget_s, usual, method):
    found = resolved(fitted(Auto()), LADDER, taught(0.1), budget_s, budget_s, NOBODY, lambda part: usual)
    assert found.methods == (method,)
    assert found.choices[0]


def test_a_method_that_may_stop_early_comes_just_before_the_same_that_asks_all():
    scores = {"Grad-CAM": 0.3, "Group-CAM": 0.5, "Score-CAM": 0.4}
    mixed = (ScoreCam(), ScoreCam(tolerance=0.2), GroupCam(), ScoreCam(tolerance=0.05), GradCam())
    assert ranked(mixed, scores) == [
        GradCam(),
        ScoreCam(tolerance=0.2),
        ScoreCam(tolerance=0.05),
        ScoreCam(),
        GroupCam(),
    ]
    assert ranked(mixed, {"Grad-CAM": 0.3}) == mixed


def test_the_ladder_as_it_is_shipped_rises_to_score_cam_through_its_tolerances():
    ladder = Settings().ladder()
    assert ladder[0] == GradCam()
    assert ladder[-3:] == (ScoreCam(tolerance=0.2), ScoreCam(tolerance=0.05), ScoreCam())


def test_a_demand_says_what_is_usual_of_methods_that_may_stop_early_alone():
    request = fitted(ScoreCam(tolerance=0.1), ScoreCam(), SsCam(samples=5, tolerance=0.1))
    asked = demands_of(request, usual=lambda part: 0.3)
    assert [demand.usual for demand in asked] == [29, None, 144]
    assert [demand.queries for demand in asked] == [96, 96, 480]
    assert [demand.usual for demand in demands_of(request)] == [96, None, 480]


def test_such_a_request_is_admitted_by_all_of_its_queries():
    planner = Planner(Limits(waiting_s=5.0))
    planner.set_workers("here", 1)
    for turn in range(200):
        planner.observe("here", "worker", Load({"masked_forward": turn % 13, "opening": 1}, 1), 0.1 * (turn % 13), 0.0)
    first = demands_of(fitted(ScoreCam(tolerance=0.1)), usual=lambda part: 0.3)
    planner.admit(first, now_s=0.0)
    with pytest.raises(Overloaded, match="of work may wait"):
        planner.admit(first, now_s=0.0)

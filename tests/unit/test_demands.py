"""What a request asks of the planner is bounded by what it was admitted with, whatever its targets turn out to be."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from camserve.finalise.results import rankings
from camserve.gateway.pool.fake import MODEL
from camserve.gateway.requests.demands import demands_of, opening_of
from camserve.methods import (
    METHODS,
    AblationCam,
    GradCam,
    GroupCam,
    IntegratedGradients,
    Rise,
    ScoreCam,
    SmoothGrad,
    SsCam,
    Xrai,
)
from camserve.methods.work import Work
from camserve.planning import Demand, Limits, Planner
from camserve.types import Target, Text, Vector
from camserve.types.request import ExplainRequest, FittedRequest

IMAGE = np.zeros((32, 48, 3), np.uint8)


def fitted(*methods, targets=(), layers=(), **fields) -> FittedRequest:
    return ExplainRequest(IMAGE, tuple(methods), tuple(targets), layers=tuple(layers), **fields).fit(MODEL)


TWO_OR_THREE = (Target(index=4), Target(top_k=2))
"""Two classes if class 4 is one of the two most probable, else three."""


def test_a_method_that_is_made_in_one_go_asks_nothing_and_is_work_of_the_opening():
    request = fitted(GradCam(), targets=[Target(top_k=3)])
    assert demands_of(request) == (Demand("layer_gradient", 0, 0, 3),)
    assert opening_of(request) == (Work("opening", 1), Work("layer_gradient", 3))


@pytest.mark.parametrize(("size", "units"), [((1023, 1024), 0), ((1024, 1024), 1), ((3000, 4000), 11)])
def test_a_large_photo_is_work_by_its_megapixels(size, units):
    request = ExplainRequest(np.broadcast_to(np.uint8(0), (*size, 3)), (GradCam(),)).fit(MODEL)
    assert [work.units for work in opening_of(request) if work.kind == "decode"] == [units] * (units > 0)


def test_a_reference_image_is_work_of_the_opening_as_well():
    model = replace(MODEL, outputs="embedding", dimension=4)
    targets = (Vector(image=np.broadcast_to(np.uint8(0), (2048, 1024, 3))), Vector(np.ones(4)))
    request = ExplainRequest(IMAGE, (ScoreCam(),), targets).fit(model)
    assert opening_of(request) == (Work("decode", 2), Work("opening", 2))


def test_a_text_is_a_pass_of_the_opening_where_a_vector_is_made_of_it():
    model = replace(MODEL, outputs="text-image", dimension=4)
    request = ExplainRequest(IMAGE, (ScoreCam(),), (Text("a cat"), Text("a dog"), Target(index=1))).fit(model)
    assert opening_of(request) == (Work("opening", 3),)


def test_every_layer_has_a_forward_pass_in_the_opening():
    request = fitted(GradCam(), ScoreCam(), layers=["stem", "features"])
    assert opening_of(request) == (Work("opening", 2), Work("layer_gradient", 1), Work("layer_gradient", 1))
    assert [demand.queries for demand in demands_of(request)] == [0, 0, 16, 96]


def test_no_method_is_an_opening_all_the_same():
    request = fitted()
    assert (demands_of(request), opening_of(request)) == ((), (Work("opening", 1),))


@pytest.mark.parametrize(
    ("method", "before", "after"),
    [
        (ScoreCam(), Demand("masked_forward", 96, 96), Demand("masked_forward", 96, 96)),
        (Rise(masks=7), Demand("masked_forward", 7, 7), Demand("masked_forward", 7, 7)),
        (GroupCam(groups=8), Demand("masked_forward", None, 24), Demand("masked_forward", 16, 16)),
        (SmoothGrad(samples=5), Demand("pixel_gradient", 5, 5, 3), Demand("pixel_gradient", 5, 5, 2)),
    ],
)
def test_what_depends_on_the_number_of_classes_is_bounded_until_it_is_known(method, before, after):
    request = fitted(method, targets=TWO_OR_THREE)
    assert (request.max_targets, request.known_targets) == (3, None)
    assert demands_of(request) == (before,)
    assert demands_of(request, 2) == (after,)


def test_the_number_of_classes_is_known_at_once_where_it_cannot_change():
    for targets in ([Target(index=4), Target(index=2)], [Target(top_k=2)]):
        (demand,) = demands_of(fitted(GroupCam(groups=8), targets=targets))
        assert demand == Demand("masked_forward", 16, 16)


def test_curves_have_a_position_for_each_map_once_there_are_maps():
    request = fitted(ScoreCam(), GradCam(), targets=TWO_OR_THREE, evaluate=True, evaluation_steps=8)
    assert request.curve_queries == 18
    assert demands_of(request)[2:] == (Demand("masked_forward", None, 6 * 18),)
    assert demands_of(request, 2)[2:] == (Demand("masked_forward", None, 18),) * 4


def test_a_ranking_is_one_query_that_weighs_as_many_as_there_are_classes():
    request = fitted(Xrai(steps=2), GradCam(), Xrai(steps=3), targets=TWO_OR_THREE)
    assert demands_of(request)[3:] == (Demand("ranking", None, 1, 3),) * 2
    assert demands_of(request, 2)[3:] == (Demand("ranking", None, 1, 2),) * 2


# Every request, through a planner

SMALL = {
    "group_cam": GroupCam(groups=5),
    "rise": Rise(masks=7),
    "smooth_grad": SmoothGrad(samples=3),
    "ss_cam": SsCam(samples=2),
    "xrai": Xrai(steps=2),
    "integrated_gradients": IntegratedGradients(steps=4),
    "ablation_cam": AblationCam(),
}
methods = st.sampled_from([SMALL.get(name) or spec() for name, spec in METHODS.items()])
classes = st.lists(st.integers(0, 9), unique=True, max_size=4)


@st.composite
def requests(draw: st.DrawFn) -> tuple[FittedRequest, int]:
    """A request, and how many classes its targets turn out to be."""
    indices, tops = draw(classes), draw(st.lists(st.integers(1, 5), unique=True, max_size=2))
    request = fitted(
        *draw(st.lists(methods, max_size=3)),
        targets=[Target(index=index) for index in indices] + [Target(top_k=k) for k in tops],
        layers=draw(st.sampled_from([(), ("stem",), ("stem", "features")])) if not draw(st.booleans()) else (),
        evaluate=draw(st.booleans()),
        evaluation_steps=draw(st.integers(1, 40)),
    )
    least = max([len(indices), *tops, 1])
    if request.known_targets is not None:
        return request, request.known_targets
    return request, draw(st.integers(least, max(least, min(request.max_targets, 10))))


def answered(planner: Planner, number: int, final: tuple[Demand, ...]) -> int:
    """Answers steps until nothing is sent any more; returns how many queries that were."""
    queries = 0
    while (step := planner.next_step(0.0)) is not None:
        for part in step.slices:
            assert planner.done(step.number, number, final if part.opening else None)
            queries += part.queries
    return queries


@given(requests())
def test_no_request_ever_asks_more_than_it_was_admitted_with(drawn):
    """`Planner.done` and `Planner.settle` raise where more is asked than was admitted."""
    request, targets = drawn
    planner = Planner(Limits())
    planner.set_workers("a", 1)
    number = planner.admit(demands_of(request), opening=opening_of(request), now_s=0.0)
    most = sum(demand.most for demand in demands_of(request))
    asked = answered(planner, number, demands_of(request, targets))
    assert asked == sum(part.queries(targets) for part in request.parts)
    ranked = len(request.parts) + rankings(request)
    maps = len(request.methods) * targets if request.request.evaluate else 0
    for start, stop, queries in ((len(request.parts), ranked, 1), (ranked, ranked + maps, request.curve_queries)):
        assert planner.stalled(number) == (ranked + maps > start)
        for position in range(start, stop):
            planner.settle(number, position, queries)
        asked += answered(planner, number, ())
    assert planner.idle, "it is complete"
    assert asked <= most
    assert asked == planner.counts().done == planner.counts().asked
    assert not planner.reserved_units()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("evaluate", [False, True])
def test_every_method_keeps_its_bound(name, evaluate):
    for targets in range(1, 4):
        request = fitted(
            SMALL.get(name) or METHODS[name](),
            targets=[Target(index=4), Target(top_k=2)],
            layers=["features"],
            evaluate=evaluate,
            evaluation_steps=3,
        )
        before, after = demands_of(request), demands_of(request, targets)
        for kind in {demand.kind for demand in before}:
            bound, needed = (
                sum(demand.most * demand.weight for demand in demands if demand.kind == kind)
                for demands in (before, after)
            )
            assert needed <= bound, kind

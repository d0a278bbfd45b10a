"""Every method through a gateway over the shipped fake, whose answers are as large as a worker's."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from gateway_harness import arrays, ask, photo, serving

from camserve.codecs import v1
from camserve.finalise.maps import final_map
from camserve.gateway.pool.fake import MODEL, FakeBackend
from camserve.methods import METHODS, GroupCam, IsCam, MethodSpec, SsCam, parse_method
from camserve.types import Prediction

INPUT, LAYER = (32, 48), (4, 6)
"""Of the fake's model and its default layer."""


def spec_of(name: str) -> MethodSpec:
    return parse_method(name, {"masks": 40} if name in {"rise", "d_rise"} else {})


@pytest.mark.parametrize("name", METHODS)
async def test_every_method_is_answered_by_the_fake(name: str):
    spec, image = spec_of(name), photo()
    async with serving(step_queries=7) as harness:
        request = ask(v1.method_to_proto(spec), image=image, targets=[{"index": 3}, {"index": 1}])
        reply = await harness.stub.Explain(request)
    whole = FakeBackend.whole(image, spec, MODEL, "", [3, 1])
    assert whole.shape == (2, *(INPUT if spec.resolution == "input" else LAYER))
    view = v1.view_from_proto(reply.input)
    for found, sums in zip(arrays(reply), whole, strict=True):
        expected = final_map([sums], method=spec, target=Prediction(0, "", 0.0), layers=["features"], view=view)
        np.testing.assert_array_equal(found, expected.array)
        assert found.any()


async def test_the_clusters_of_the_opening_are_those_of_every_later_step():
    """The fake clusters each step otherwise that brings no labels, and answers otherwise for other labels."""
    spec = GroupCam(groups=8, grouping="kmeans")
    async with serving(step_queries=3) as harness:
        await harness.stub.Explain(ask(v1.method_to_proto(spec), targets=[{"index": 3}, {"index": 1}]))
        opening, *rest = [task for (item,) in harness.upstream.steps for task in item.tasks]
    assert opening.labels == ()
    assert {len(task.labels) for task in rest} == {2 * 96}
    assert len({task.labels for task in rest}) == 1


@pytest.mark.parametrize("spec", [SsCam(samples=4), IsCam(samples=4)], ids=str)
async def test_a_channel_of_several_queries_has_one_place_in_the_order(spec: MethodSpec):
    async with serving(step_queries=7) as harness:
        reply = await harness.stub.Explain(ask(v1.method_to_proto(spec), targets=[{"index": 3}]))
        opening, *rest = [task for (item,) in harness.upstream.steps for task in item.tasks]
    assert reply.cost.queries == 4 * 96
    assert opening.ordered
    later = [number for task in sorted(rest, key=lambda task: task.start) for number in task.numbers]
    assert len(later) == len(set(later)) == 4 * 96 - opening.stop
    channels = [number // 4 for number in later]
    assert channels != sorted(channels)
    for number, after in itertools.pairwise(later):
        assert after == number + 1 or number % 4 == 3  # a channel's samples follow each other

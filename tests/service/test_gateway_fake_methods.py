"""Every method through a gateway over the shipped fake, whose answers are as large as a worker's."""

from __future__ import annotations

import numpy as np
import pytest
from gateway_harness import arrays, ask, photo, serving

from camserve import wire
from camserve.finalise.maps import final_map
from camserve.gateway.fake import MODEL, FakeUpstream
from camserve.methods import METHODS, MethodSpec, Rise, parse_method
from camserve.types import Prediction

INPUT, LAYER = (32, 48), (4, 6)
"""Of the fake's model and its default layer."""


def spec_of(name: str) -> MethodSpec:
    return Rise(masks=40) if name == "rise" else parse_method(name)


@pytest.mark.parametrize("name", METHODS)
async def test_every_method_is_answered_by_the_fake(name: str):
    spec, image = spec_of(name), photo()
    async with serving(step_queries=7) as harness:
        request = ask(wire.method_to_proto(spec), image=image, targets=[{"index": 3}, {"index": 1}])
        reply = await harness.stub.Explain(request)
    whole = FakeUpstream.whole(image, spec, MODEL, "", [3, 1])
    assert whole.shape == (2, *(INPUT if spec.resolution == "input" else LAYER))
    view = wire.view_from_proto(reply.input)
    for found, sums in zip(arrays(reply), whole, strict=True):
        expected = final_map([sums], method=spec, target=Prediction(0, "", 0.0), layers=["features"], view=view)
        np.testing.assert_array_equal(found, expected.array)
        assert found.any()

"""Tests of a model without layers and gradients behind a gateway: it starts, says what it has, and refuses the rest."""

from __future__ import annotations

from dataclasses import replace

import grpc
import pytest
from service.gateway_harness import GRAD, ask, serving

from camserve.gateway.pool.fake import MODEL, FakeBackend
from camserve.v1 import explain_pb2 as pb

BARE = replace(
    MODEL, layers=(), default_layer="", lacks=dict.fromkeys(("layer", "gradients", "tail", "modules"), "it has boxes")
)
RISE = pb.MethodSpec(rise=pb.Rise(masks=40))


async def test_a_model_without_layers_starts_and_answers_the_methods_that_it_has():
    async with serving(FakeBackend([BARE])) as harness:
        reply = await harness.stub.Explain(ask(RISE, pb.MethodSpec(occlusion={})))
        assert [list(one.layers) for one in reply.maps] == [[], []]
        assert [list(one.shape) for one in reply.maps] == [[32, 48]] * 2
        model = await harness.stub.GetModel(pb.GetModelRequest())
        assert model.lacks["layer"] == "it has boxes"
        assert [one.name for one in model.methods if not one.refused][-3:] == ["rise", "d_rise", "occlusion"]
        assert harness.upstream.canaries == 1


async def test_the_other_methods_are_refused_with_the_reason_before_a_worker_is_asked():
    async with serving(FakeBackend([BARE])) as harness:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await harness.stub.Explain(ask(GRAD))
        assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        assert "it needs a layer with maps: it has boxes" in caught.value.details()
        assert "the methods that work: rise, d_rise, occlusion" in caught.value.details()
        assert not harness.upstream.steps


async def test_auto_takes_a_method_of_the_ladder_that_the_model_has():
    auto = pb.MethodSpec(auto={})
    async with serving(FakeBackend([BARE]), auto_ladder="grad_cam rise:masks=30 score_cam") as harness:
        (one,) = (await harness.stub.Explain(ask(auto))).maps
        assert one.method.rise.masks == 30
    async with serving(FakeBackend([BARE]), auto_ladder="grad_cam") as harness:
        with pytest.raises(grpc.aio.AioRpcError, match="auto: no method of the server's ladder fits"):
            await harness.stub.Explain(ask(auto))


BOXES = replace(BARE, outputs="boxes", lacks={"layer": "it detects", "gradients": "it chooses"})


async def test_detections_and_boxes_come_through_the_typed_door():
    async with serving(FakeBackend([BOXES])) as harness:
        box = pb.BoxTarget(box=pb.Edges(x0=1, y0=2, x1=30, y1=20), of=pb.ClassTarget(label="dog"))
        targets = [pb.Target(detection=1), pb.Target(box=box), pb.Target(top_k=3), pb.Target(label="boat")]
        reply = await harness.stub.Explain(ask(pb.MethodSpec(d_rise=pb.DRise(masks=20)), targets=targets))
        assert all(one.HasField("box") for one in reply.predictions)
        texts = [one.target_text for one in reply.maps]
        assert texts[0].startswith("box:1,1,9,7:")  # by the index of a class whose label is another's too
        assert reply.maps[0].target == reply.predictions[1]
        assert texts[1] == "box:1,2,30,20:dog"
        assert len(texts) == len(set(texts)) <= 5  # a detection that is named twice is explained once
        forms = (await harness.stub.GetModel(pb.GetModelRequest())).targets
        assert [form.name for form in forms] == ["class", "detection", "box"]


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (pb.Target(detection=77), "there is no detection 77"),
        (pb.Target(box=pb.BoxTarget(box=pb.Edges(x0=5, y0=5, x1=5, y1=9))), "a box has x0 < x1 and y0 < y1"),
        (pb.Target(box=pb.BoxTarget()), "a box has x0 < x1 and y0 < y1"),
    ],
)
async def test_a_target_of_boxes_that_cannot_be_is_an_invalid_argument(target, said):
    async with serving(FakeBackend([BOXES])) as harness:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await harness.stub.Explain(ask(pb.MethodSpec(d_rise={}), targets=[target]))
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert said in caught.value.details()

"""Targets of every kind through a whole gateway, over the shipped fake."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
from gateway_harness import GRAD, SCORE, Harness, arrays, ask, failure, photo, same, serving

from camserve.client import AsyncClient
from camserve.errors import InvalidOption
from camserve.gateway.pool.fake import MODEL, FakeBackend
from camserve.images import digest, mask_file, probe
from camserve.oip import inference_pb2 as oip
from camserve.oip import inference_pb2_grpc
from camserve.types import Against, Contrast, MapCurves, Region, Target, Text, Vector
from camserve.v1 import explain_pb2 as pb

VALUES = replace(MODEL, name="fake", outputs="value", labels=("age", "size"), units=("years", "px"))
FACES = replace(MODEL, name="fake", outputs="embedding", labels=(), dimension=3)
OTHER = photo(9)
HEIGHT, WIDTH = probe(photo())
MASK, OTHER_MASK = (mask_file(np.arange(WIDTH) < at * np.ones((HEIGHT, 1))) for at in (50, 51))


def contrast(of: int, *than: int, gamma: float = 1.0) -> pb.Target:
    others = [pb.ClassTarget(index=index) for index in than]
    return pb.Target(contrast=pb.Contrast(of=pb.ClassTarget(index=of), than=others, gamma=gamma))


def serving_model(model) -> object:
    return serving(FakeBackend([model]))


async def targets_of_steps(server: Harness) -> list[tuple[object, ...]]:
    return [item.targets for step in server.upstream.steps for item in step]


async def test_a_reply_says_what_each_map_is_of():
    targets = [
        pb.Target(label="tiger cat"),
        contrast(0, 3, 1, gamma=0.5),
        pb.Target(against=pb.Against(of=pb.ClassTarget(index=4))),
        pb.Target(index=7),
    ]
    async with serving() as server:
        reply = await server.stub.Explain(ask(SCORE, targets=targets, top_predictions=10))
    said = {one.index: one.probability for one in reply.predictions}
    texts = ["tiger_cat", "contrast:tabby>0.5*tiger_cat,espresso", "against:cup", "7"]
    assert [saliency.target_text for saliency in reply.maps] == texts
    assert [[one.index for one in saliency.classes] for saliency in reply.maps] == [[1], [0, 1, 3], [4], [7]]
    assert [saliency.target.label for saliency in reply.maps] == ["tiger_cat", "tabby", "cup", "crane"]
    scores = [said[1], said[0] - 0.25 * (said[1] + said[3]), 1 - said[4], said[7]]
    assert [saliency.score for saliency in reply.maps] == pytest.approx(scores)
    assert len({array.tobytes() for array in arrays(reply)}) == 4


async def test_finer_and_top_k_are_pinned_to_what_the_first_worker_found():
    finer = pb.Target(finer=pb.Finer(of=pb.ClassTarget(top_k=2), nearest=2))
    async with serving(step_queries=16) as server:
        reply = await server.stub.Explain(ask(SCORE, targets=[finer]))
        first, *later = await targets_of_steps(server)
    assert len(first) == 1
    assert len(later) > 2
    (pinned,) = set(later)
    assert [type(target) for target in pinned] == [Contrast, Contrast]
    assert [target.gamma for target in pinned] == [0.6, 0.6]
    assert [saliency.target_text for saliency in reply.maps] == [target.text(MODEL.labels) for target in pinned]
    assert [saliency.target.index for saliency in reply.maps] == [one.index for one in reply.predictions[:2]]


async def test_the_curves_are_of_the_targets_of_their_maps():
    targets = [contrast(0, 1), pb.Target(against=pb.Against(of=pb.ClassTarget(index=0)))]
    async with serving() as server:
        await server.stub.Explain(ask(GRAD, SCORE, targets=targets, evaluate=True, evaluation_steps=4))
        tasks = {task.position: task for step in server.upstream.steps for item in step for task in item.tasks}
    curves = [task.method.target for _, task in sorted(tasks.items()) if isinstance(task.method, MapCurves)]
    assert curves == [Contrast(Target(index=0), (Target(index=1),)), Against(Target(index=0))] * 2


async def test_a_model_of_numbers_goes_up_and_down():
    async with serving_model(VALUES) as server:
        reply = await server.stub.Explain(ask(GRAD))
        down = pb.Target(value=pb.Value(of=pb.ClassTarget(label="size"), direction="DOWN"))
        other = await server.stub.Explain(ask(GRAD, targets=[down, pb.Target(index=1)]))
        model = await server.stub.GetModel(pb.GetModelRequest())
    assert (model.outputs, list(model.units)) == ("value", ["years", "px"])
    assert [(form.name, form.example) for form in model.targets] == [("value", "up:age")]
    assert reply.maps[0].target_text == "up:age"
    assert {one.unit for one in reply.predictions} == {"years", "px"}
    assert all(one.HasField("value") and one.probability == 0 for one in reply.predictions)
    assert [saliency.target_text for saliency in other.maps] == ["down:size", "up:size"]
    assert [saliency.score for saliency in other.maps] == [-other.maps[1].target.value, other.maps[1].target.value]


async def test_a_reference_becomes_a_vector_and_its_image_is_sent_once():
    targets = [pb.Target(reference=pb.Image(encoded=OTHER)), pb.Target(vector=np.array([1, 2, 3], "<f4").tobytes())]
    async with serving(FakeBackend([FACES]), step_queries=16) as server:
        reply = await server.stub.Explain(ask(SCORE, targets=targets))
        first, *later = await targets_of_steps(server)
        nothing = await failure(server.stub.Explain(ask(GRAD)))
        broken = await failure(
            server.stub.Explain(ask(GRAD, targets=[pb.Target(reference=pb.Image(encoded=OTHER[:200]))]))
        )
    assert first == (Vector(image=OTHER), Vector([1.0, 2.0, 3.0]))
    (pinned,) = set(later)
    assert [target.image for target in pinned] == [None, None]
    assert pinned[1] == first[1]
    assert reply.cost.image_bytes == len(photo()) + len(OTHER)
    assert [saliency.target_text.partition(":")[0] for saliency in reply.maps] == ["vector", "vector"]
    assert [list(saliency.classes) for saliency in reply.maps] == [[], []]
    assert [saliency.target.similarity for saliency in reply.maps] == [0.25, 0.25]
    assert nothing[1].startswith("this model gives vectors, and no references are packed with it: say what to be")
    assert broken[0] == "INVALID_ARGUMENT"


async def test_kept_replies_are_told_apart_by_what_is_asked():
    asked = [
        {"targets": [pb.Target(index=1)]},
        {"targets": [contrast(1, 2)]},
        {"targets": [contrast(1, 2, gamma=0.5)]},
        {"targets": [contrast(1, 3)]},
        {"targets": [pb.Target(against=pb.Against(of=pb.ClassTarget(index=1)))]},
        {"targets": [pb.Target(finer=pb.Finer(of=pb.ClassTarget(index=1)))]},
        {"targets": [pb.Target(finer=pb.Finer(of=pb.ClassTarget(index=1), nearest=2))]},
        {"targets": [pb.Target(index=1)], "output": pb.Output(signed=True)},
    ]
    async with serving(result_cache_bytes=10 * 2**20) as server:
        replies = [await server.stub.Explain(ask(GRAD, **fields)) for fields in asked]
        again = [await server.stub.Explain(ask(GRAD, **fields)) for fields in asked]
    assert not any(reply.cost.cached for reply in replies)
    assert all(reply.cost.cached for reply in again)
    assert all(map(same, replies, again))


async def test_kept_replies_know_a_reference_by_its_content():
    def asked(image: bytes) -> pb.ExplainRequest:
        return ask(GRAD, targets=[pb.Target(reference=pb.Image(encoded=image))])

    async with serving(FakeBackend([FACES]), result_cache_bytes=10 * 2**20) as server:
        cached = [(await server.stub.Explain(asked(image))).cost.cached for image in (OTHER, photo(8), OTHER)]
    assert cached == [False, False, True]
    assert digest(OTHER) != digest(photo(8))


async def test_a_python_client_asks_and_reads_targets_of_every_kind():
    async with serving(FakeBackend([FACES])) as server, AsyncClient(server.gateway.address) as client:
        answer = await client.explain(photo(), targets=[Vector(image=OTHER), Vector([1, 2, 3])])
        forms = (await client.model()).targets
    assert [saliency.score for saliency in answer.maps] == [0.25, 0.25]
    assert [form.name for form in forms] == ["vector", "reference"]
    async with serving() as server, AsyncClient(server.gateway.address) as client:
        answer = await client.explain(photo(), targets="contrast:tabby>cup,boat", signed=True)
    assert answer.maps[0].target_text == "contrast:tabby>cup,boat"
    assert [one.label for one in answer.maps[0].classes] == ["tabby", "cup", "boat"]
    assert answer.maps[0].signed


def infer(*outputs: str) -> oip.ModelInferRequest:
    """Asks for these outputs of an image, without any target."""
    request = oip.ModelInferRequest(model_name="fake")
    request.inputs.add(name="image", datatype="BYTES", shape=[1]).contents.bytes_contents.append(photo())
    for name in outputs:
        request.outputs.add(name=name)
    return request


PEOPLE = replace(FACES, labels=("ann", "bob", "zoe"))


async def test_predictions_alone_are_the_nearest_references():
    async with serving_model(PEOPLE) as server:
        inference = inference_pb2_grpc.GRPCInferenceServiceStub(server.channel)
        reply = await inference.ModelInfer(infer("labels", "similarities"))
        (step,) = server.upstream.steps
        typed = await server.stub.Explain(ask(GRAD))
        model = await server.stub.GetModel(pb.GetModelRequest())
        assert 'code="OK",method="none"' in await server.metrics()
    names, similarities = (list(output.contents.ListFields()[0][1]) for output in reply.outputs)
    assert similarities == [0.5, 0.25, 0.125]
    assert [item.tasks for item in step] == [()], "nothing but the forward pass is asked"
    assert [(one.label.encode(), one.similarity) for one in typed.predictions] == list(
        zip(names, similarities, strict=True)
    )
    assert typed.maps[0].target_text == names[0].decode()
    assert list(model.labels) == ["ann", "bob", "zoe"]
    forms = [(form.name, form.example) for form in model.targets]
    assert forms[2:] == [
        ("class", "ann"),
        ("contrast", "contrast:ann>bob"),
        ("finer", "finer:ann"),
        ("against", "against:ann"),
    ]


PLACES = replace(MODEL, name="fake", outputs="segmentation")


def region(**fields) -> pb.Target:
    return pb.Target(region=pb.Region(**fields))


async def test_a_region_is_pinned_and_sent_to_every_step():
    box, of = pb.Edges(x0=1, y0=2, x1=30, y1=20.5), pb.ClassTarget(index=1)
    targets = [region(of=of, box=box), pb.Target(label="cup"), region(box=box), region(of=of, mask=MASK)]
    targets += [region(contrast=pb.Contrast(of=of, than=[pb.ClassTarget(index=2)]), box=box)]
    async with serving(FakeBackend([PLACES]), step_queries=16) as server:
        reply = await server.stub.Explain(ask(SCORE, targets=targets, evaluate=True, evaluation_steps=2))
        first, *later = await targets_of_steps(server)
        curves = [
            task.method.target
            for step in server.upstream.steps
            for item in step
            for task in item.tasks
            if isinstance(task.method, MapCurves)
        ]
        model = await server.stub.GetModel(pb.GetModelRequest())
    (pinned,) = set(later)
    assert first[0] == pinned[0] == Region(Target(index=1), box=(1, 2, 30, 20.5))
    assert (first[1], pinned[1].is_placed) == (Region(Target(index=4)), True), "no other worker looks for its places"
    assert pinned[1] == Region(Target(index=4), grid=pinned[1].grid)
    assert pinned[3] == Region(Target(index=1), mask=MASK)
    assert pinned[4].of == Contrast(Target(index=1), (Target(index=2),))
    assert set(curves) == set(pinned)
    most = reply.predictions[0].label
    texts = [one.target_text for one in reply.maps]
    assert texts[:3] == ["region:1,2,30,20.5:tiger_cat", "cup", f"region:1,2,30,20.5:{most}"]
    assert texts[4] == "region:1,2,30,20.5:contrast:tiger_cat>Egyptian_cat"
    assert [(one.share, one.probability) for one in reply.predictions[:2]] == [(0.5, 0), (0.25, 0)]
    assert (model.outputs, model.targets[-1].name) == ("segmentation", "region")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (region(box=pb.Edges(x0=5, y0=5, x1=5, y1=9)), "a region's box has x0 < x1 and y0 < y1"),
        (region(box=pb.Edges(x0=float("nan"), y1=1, x1=2)), "four numbers x0, y0, x1, y1"),
        (region(box=pb.Edges(x0=5000, y0=5, x1=5005, y1=9)), "lies in what the network sees: x "),
        (region(mask=b""), "got zero bytes"),
        (region(mask=photo(1)), "a mask is a grey PNG file"),
        (region(mask=mask_file(np.ones((3, 5), bool))), "size of the sent image"),
        (region(mask=mask_file(np.zeros((3, 5), bool))), "size of the sent image"),
        (region(grid=mask_file(np.ones((3, 5), bool))), "size of the network's outputs, 16 x 12 pixels; got 5 x 3"),
        (region(of=pb.ClassTarget(label="unicorn")), "unicorn"),
        (region(of=pb.ClassTarget(index=10**6)), "class index must be"),
    ],
)
async def test_a_region_that_cannot_be_is_an_invalid_argument_with_what_was_allowed(target, message):
    async with serving(FakeBackend([PLACES])) as server:
        code, text, *_ = await failure(server.stub.Explain(ask(GRAD, targets=[target])))
        assert (await server.stub.Explain(ask(GRAD))).maps
    assert code == "INVALID_ARGUMENT"
    assert message in text


async def test_a_neighbour_of_a_region_outside_of_its_image_is_answered():
    outside, inside = (region(box=pb.Edges(x0=at, y0=2, x1=at + 20, y1=20)) for at in (5000, 2))
    async with serving(FakeBackend([PLACES])) as server:
        alone = await server.stub.Explain(ask(GRAD, targets=[inside]))
        bad, good = await asyncio.gather(
            failure(server.stub.Explain(ask(GRAD, targets=[outside]))), server.stub.Explain(ask(GRAD, targets=[inside]))
        )
    assert bad[0] == "INVALID_ARGUMENT"
    assert same(alone, good)


async def test_kept_replies_know_a_region_by_where_it_is():
    of = pb.ClassTarget(index=1)
    asked = [
        pb.Target(index=1),
        *(region(of=of, box=pb.Edges(x0=1, y0=2, x1=x1, y1=20)) for x1 in (30, 31)),
        *(region(of=of, mask=mask) for mask in (MASK, OTHER_MASK)),
        region(of=pb.ClassTarget(index=2), mask=MASK),
    ]
    async with serving(FakeBackend([PLACES]), result_cache_bytes=10 * 2**20) as server:
        once = [(await server.stub.Explain(ask(GRAD, targets=[one]))).cost.cached for one in asked]
        twice = [(await server.stub.Explain(ask(GRAD, targets=[one]))).cost.cached for one in asked]
    assert (once, twice) == ([False] * len(asked), [True] * len(asked))


async def test_predictions_alone_are_the_shares_of_the_image():
    async with serving_model(PLACES) as server:
        inference = inference_pb2_grpc.GRPCInferenceServiceStub(server.channel)
        reply = await inference.ModelInfer(infer("class_indices", "shares"))
    assert list(reply.outputs[1].contents.fp32_contents)[:3] == [0.5, 0.25, 0.125]


async def test_the_open_inference_protocol_and_clients_take_regions():
    request = infer("saliency")
    request.parameters["explain_targets"].string_param = "region:1,2,30,20:cup,boat"
    async with serving_model(PLACES) as server, AsyncClient(server.gateway.address) as client:
        inference = inference_pb2_grpc.GRPCInferenceServiceStub(server.channel)
        reply = await inference.ModelInfer(request)
        answer = await client.explain(
            photo(), targets=["region:1,2,30,20:cup", Region(Target(label="boat"), mask=MASK)]
        )
    assert reply.outputs[0].shape[0] == 2
    assert [one.target.label for one in answer.maps] == ["cup", "boat"]


PROMPTS = replace(FACES, outputs="text-image", labels=("a cat", "a dog", "a cow"))


async def test_a_text_is_asked_of_every_step_and_said_again_as_it_was():
    targets = [pb.Target(text=" a cat; asleep, 3 "), pb.Target(label="a dog"), contrast(0, 1)]
    async with serving(FakeBackend([PROMPTS]), step_queries=16) as server:
        reply = await server.stub.Explain(ask(SCORE, targets=targets, evaluate=True, evaluation_steps=2))
        steps = await targets_of_steps(server)
        curves = [
            task.method.target
            for step in server.upstream.steps
            for item in step
            for task in item.tasks
            if isinstance(task.method, MapCurves)
        ]
        model = await server.stub.GetModel(pb.GetModelRequest())
    asked = (Text("a cat; asleep, 3"), Target(index=1), Contrast(Target(index=0), (Target(index=1),)))
    assert set(steps) == {asked}, "no other worker is told a vector"
    assert len(steps) > 2
    assert set(curves) == set(asked)
    assert [one.target_text for one in reply.maps] == ["text:a cat; asleep, 3", "a dog", "contrast:a cat>a dog"]
    assert (reply.maps[0].target.similarity, list(reply.maps[0].classes)) == (0.25, [])
    assert [(one.probability, one.similarity) for one in reply.predictions] == [(p, p) for p in (0.5, 0.25, 0.125)]
    forms = [(form.name, form.example) for form in model.targets]
    assert forms[:4] == [
        ("text", "text:a cat"),
        ("vector", "vector:face.npy"),
        ("reference", "reference:face.jpg"),
        ("class", "a cat"),
    ]
    assert [name for name, _ in forms[4:]] == ["contrast", "finer", "against"]


async def test_texts_come_through_every_door_and_make_other_requests():
    async with serving(FakeBackend([PROMPTS]), result_cache_bytes=2**20) as server:
        async with AsyncClient(server.gateway.address) as client:
            answers = [
                await client.explain(photo(), ["grad_cam"], [f"text:{words}"]) for words in ("a cat", "cats", "a cat")
            ]
            with pytest.raises(InvalidOption, match="a text has at most 1000 characters, got 1001"):
                await client.explain(photo(), ["grad_cam"], [Text("x" * 1001)])
        request = infer("labels", "probabilities", "similarities", "saliency")
        request.parameters["explain_targets"].string_param = "text:a cat, asleep;a dog"
        reply = await inference_pb2_grpc.GRPCInferenceServiceStub(server.channel).ModelInfer(request)
        asked = [item.targets for step in server.upstream.steps for item in step][-1]
    assert [answer.maps[0].target_text for answer in answers] == ["text:a cat", "text:cats", "text:a cat"]
    assert [answer.cost.cached for answer in answers] == [False, False, True]
    assert answers[0].predictions[0].figure == "similarity 0.50, 50.0%"
    assert [output.name for output in reply.outputs] == ["labels", "probabilities", "similarities", "saliency"]
    assert list(reply.outputs[1].contents.fp32_contents) == list(reply.outputs[2].contents.fp32_contents)
    assert asked == (Text("a cat, asleep"), Target(index=1))


async def test_an_empty_text_is_an_invalid_argument():
    async with serving(FakeBackend([PROMPTS])) as server:
        refused = await failure(server.stub.Explain(ask(GRAD, targets=[pb.Target(text=" ")])))
    assert refused[0] == "INVALID_ARGUMENT"
    assert "a text target has words" in refused[1]


async def test_a_typed_client_asks_predictions_alone_by_no_method():
    """Also of a model that answers for no target that nobody names, and where nothing but the flag says so."""
    async with serving_model(PEOPLE) as server, AsyncClient(server.gateway.address) as client:
        answer = await client.explain(photo(), [])
        typed = await server.stub.Explain(ask(GRAD, predictions_only=True))
        steps = list(server.upstream.steps)
    names = [one.label for one in answer.predictions]
    assert sorted(names) == ["ann", "bob", "zoe"]
    assert [one.label for one in typed.predictions] == names
    assert not answer.maps
    assert not typed.maps
    assert [item.tasks for step in steps for item in step] == [(), ()]


async def test_what_predictions_alone_do_not_run_is_checked():
    async with serving() as server:
        request = ask(GRAD, targets=[pb.Target(index=99)], predictions_only=True)
        code, text, _ = await failure(server.stub.Explain(request))
    assert code == "INVALID_ARGUMENT"
    assert "class index must be" in text


async def test_predictions_alone_of_a_model_without_references_are_refused_before_any_work():
    async with serving_model(FACES) as server:
        inference = inference_pb2_grpc.GRPCInferenceServiceStub(server.channel)
        code, text, kind = await failure(inference.ModelInfer(infer("labels", "similarities")))
        typed = await failure(server.stub.Explain(ask(GRAD, predictions_only=True)))
        assert not server.upstream.steps
    assert (code, kind) == ("FAILED_PRECONDITION", "Unsupported")
    assert typed == (code, text, kind)
    assert text.startswith("model fake gives vectors and has no predictions, since no references are packed with it")


@pytest.mark.parametrize(
    ("model", "wanted", "has"),
    [
        (VALUES, "probabilities", "values"),
        (PEOPLE, "probabilities", "similarities"),
        (FACES, "values", "similarities"),
        (replace(MODEL, name="fake"), "similarities", "probabilities"),
    ],
)
async def test_an_output_that_a_model_does_not_have_is_refused_before_any_work(model, wanted, has):
    async with serving_model(model) as server:
        inference = inference_pb2_grpc.GRPCInferenceServiceStub(server.channel)
        code, text, _ = await failure(inference.ModelInfer(infer("saliency", wanted)))
        assert not server.upstream.steps
    assert (code, text) == (
        "INVALID_ARGUMENT",
        f"the predictions of model fake are {has}, and there are no {wanted}",
    )

"""The gateway end to end over gRPC, with the fake upstream: what is answered, and how bad input is refused."""

from __future__ import annotations

import asyncio
import io
import subprocess
import sys
import zlib

import numpy as np
import pytest
from gateway_harness import (
    GRAD,
    GROUP,
    PATIENT,
    QUICK,
    SCORE,
    SCRAPED,
    TO_THE_MARGIN,
    Harness,
    arrays,
    ask,
    failure,
    jump,
    merged,
    photo,
    same,
    serving,
    until,
)
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from PIL import Image

from camserve.codecs.v1 import view_from_proto
from camserve.errors import InvalidOption, Unsupported
from camserve.finalise.maps import final_map
from camserve.gateway.ops.settings import Settings
from camserve.gateway.pool.discovery import fixed
from camserve.gateway.pool.fake import MODEL, FakeBackend, Faults
from camserve.gateway.server import Gateway
from camserve.methods import GroupCam, ScoreCam
from camserve.planning import Load
from camserve.types import MapCurves, ModelInfo, Prediction, Target
from camserve.v1 import explain_pb2 as pb


async def test_one_request_brings_predictions_and_a_map_for_each_method_and_target():
    async with serving() as server:
        targets = [pb.Target(top_k=2), pb.Target(label="Espresso")]
        reply = await server.stub.Explain(ask(GRAD, GROUP, SCORE, targets=targets, top_predictions=3))
    assert (reply.model, reply.version) == ("fake", "1.0")
    assert len(reply.predictions) == 3
    assert [prediction.label for prediction in reply.predictions] == [
        MODEL.labels[prediction.index] for prediction in reply.predictions
    ]
    names = [map_.method.WhichOneof("method") for map_ in reply.maps]
    assert names == ["grad_cam"] * 3 + ["group_cam"] * 3 + ["score_cam"] * 3
    top = [prediction.index for prediction in reply.predictions[:2]]
    assert [map_.target.index for map_ in reply.maps] == [*top, 3] * 3
    assert all(list(map_.shape) == [32, 48] and map_.complete for map_ in reply.maps)
    assert reply.maps[3].method.group_cam.groups == 32, "defaults are filled in"
    assert reply.cost.queries == 3 * 32 + 96 == server.asked()
    assert reply.cost.steps == len(server.upstream.steps) > 1
    assert set(reply.cost.stage_seconds) == {"queue", "decode", "forward", "queries", "merge", "render"}
    assert (reply.cost.precision, reply.cost.worker) == (pb.EXACT, "fake:0:cpu")


@pytest.mark.parametrize(("message", "spec"), [(SCORE, ScoreCam()), (GROUP, GroupCam())])
async def test_the_map_is_that_of_every_query_counted_once(message: pb.MethodSpec, spec: ScoreCam):
    image = photo(3)
    async with serving(step_queries=7) as server:
        reply = await server.stub.Explain(ask(message, image=image, targets=[pb.Target(index=4), pb.Target(index=1)]))
    sums = FakeBackend.whole(image, spec, MODEL, "", [4, 1])
    for row, (array, index) in enumerate(zip(arrays(reply), [4, 1], strict=True)):
        target = Prediction(index, "", 0.0)
        view = view_from_proto(reply.input)
        expected = final_map([sums[row]], method=spec, target=target, layers=["features"], view=view)
        np.testing.assert_array_equal(array, expected.array)


async def test_the_maps_of_several_layers_are_fused():
    image, fields = photo(3), {"targets": [pb.Target(index=4)]}
    names = [layer.name for layer in MODEL.layers]
    async with serving(step_queries=7) as server:
        alone = [
            arrays(await server.stub.Explain(ask(SCORE, GRAD, image=image, layers=[name], **fields))) for name in names
        ]
        reply = await server.stub.Explain(ask(SCORE, GRAD, image=image, layers=names, fusion="MAX", **fields))
    channels = sum(layer.channels for layer in MODEL.layers)
    assert reply.cost.queries == channels
    for row, array in enumerate(arrays(reply)):
        raw = np.max([maps[row] for maps in alone], axis=0)
        np.testing.assert_allclose(array, (raw - raw.min()) / (raw.max() - raw.min()), rtol=0, atol=1e-6)
        assert list(reply.maps[row].layers) == names


async def test_evaluation_asks_the_curves_of_the_very_maps_that_are_returned():
    targets = [pb.Target(top_k=2)]
    async with serving(step_queries=7) as server:
        plain = await server.stub.Explain(ask(GRAD, SCORE, targets=targets))
        server.upstream.steps.clear()
        reply = await server.stub.Explain(ask(GRAD, SCORE, targets=targets, evaluate=True, evaluation_steps=4))
        sent = [task for step in server.upstream.steps for item in step for task in item.tasks]
    curves = {task.position: task.method for task in sent if isinstance(task.method, MapCurves)}
    assert sorted(curves) == [2, 3, 4, 5]
    for saliency, array, one in zip(reply.maps, arrays(reply), (curves[key] for key in sorted(curves)), strict=True):
        np.testing.assert_array_equal(one.saliency, array)
        assert (one.target, one.steps) == (Target(index=saliency.target.index), 4)
        found = saliency.faithfulness
        np.testing.assert_allclose([*found.deletion, *found.insertion], 1 / np.arange(1, 11), rtol=1e-6)
        assert found.overall == pytest.approx(found.insertion_auc - found.deletion_auc)
        assert found.protocol == "rise"
    assert [saliency.data for saliency in plain.maps] == [saliency.data for saliency in reply.maps]
    assert not plain.maps[0].HasField("faithfulness")
    assert reply.cost.evaluation_queries == 4 * 2 * 5
    assert reply.cost.queries == plain.cost.queries + 40


async def test_a_lost_step_of_an_evaluation_is_asked_again():
    upstream = FakeBackend(faults=Faults(lost_steps={3, 5}))
    request = ask(SCORE, evaluate=True)
    async with serving(step_queries=48) as server:
        expected = await server.stub.Explain(request)
    async with serving(upstream, step_queries=48) as server:
        assert same(await server.stub.Explain(request), expected)


async def test_the_progress_of_an_evaluation_never_goes_back():
    async with serving(step_queries=16) as server:
        updates = [update async for update in server.stub.StreamExplain(ask(SCORE, evaluate=True))]
    done = [update.progress.done for update in updates[:-1]]
    assert done == sorted(done)
    assert updates[-1].reply.maps[0].HasField("faithfulness")


async def test_a_stream_sharpens_its_maps():
    async with serving(step_queries=16, steps_per_worker=1) as server:
        request = ask(SCORE, GRAD, stream={"max_maps": 100, "min_interval_s": 0})
        *updates, last = await step_by_step(server, request)
        reply = await server.stub.Explain(request)
    assert same(last.reply, reply)
    fractions = [update.progress.maps[0].fraction for update in updates]
    assert fractions == sorted(fractions)
    assert 0 < fractions[0] < fractions[-1] < 1
    for update in updates:
        score_cam, grad_cam = update.progress.maps
        assert (score_cam.complete, grad_cam.complete) == (False, True)
        assert grad_cam.data == reply.maps[1].data
        assert update.progress.predictions == reply.predictions
        assert update.progress.input == reply.input
    early, late = (correlation(updates[i].progress.maps[0], reply.maps[0]) for i in (0, -1))
    assert early < late


async def step_by_step(server: Harness, request: pb.ExplainRequest) -> list[pb.ExplainUpdate]:
    """The updates of a stream; a step is answered when the update of the one before it has come."""
    server.upstream.hold()
    server.upstream.release(1)
    updates = []
    async for update in server.stub.StreamExplain(request):
        updates.append(update)
        server.upstream.release(1)
    server.upstream.release()
    return updates


def correlation(one: pb.SaliencyMap, other: pb.SaliencyMap) -> float:
    return float(np.corrcoef(np.frombuffer(one.data, "<f4"), np.frombuffer(other.data, "<f4"))[0, 1])


@pytest.mark.parametrize(
    ("stream", "maps"), [({"max_maps": 0}, 0), ({"max_maps": 2, "min_interval_s": 0}, 2), ({"min_interval_s": 60}, 1)]
)
async def test_a_stream_has_maps_as_often_as_was_asked(stream: dict[str, float], maps: int):
    async with serving(step_queries=8) as server:
        updates = await step_by_step(server, ask(SCORE, stream=stream))
    assert len(updates) > 4
    assert sum(bool(update.progress.maps) for update in updates[:-1]) == maps


@pytest.mark.parametrize("field", [{"min_interval_s": -1.0}, {"min_interval_s": float("nan")}])
async def test_stream_options_out_of_range_are_refused(field: dict[str, float]):
    async with serving() as server:
        code, text, _ = await failure(server.stub.Explain(ask(stream=field)))
    assert (code, "min_interval_s must be at least 0" in text) == ("INVALID_ARGUMENT", True)


async def test_at_the_deadline_a_partial_answer_has_what_is_known(monkeypatch: pytest.MonkeyPatch):
    merges = merged(monkeypatch)
    upstream = FakeBackend(faults=Faults(hanging_steps=frozenset({2, 3})))
    async with serving(upstream, step_queries=16, steps_per_worker=1, **PATIENT) as server:
        call = server.stub.Explain(ask(SCORE, GRAD, GROUP, allow_partial=True))
        await until(lambda: len(merges) == 2)
        jump(TO_THE_MARGIN)
        reply = await call
        metrics = await server.metrics()
    by_name = {map_.method.WhichOneof("method"): map_ for map_ in reply.maps}
    assert [(map_.complete, map_.degenerate) for map_ in by_name.values()] == [
        (False, False),
        (True, False),
        (False, True),
    ]
    assert 0 < by_name["score_cam"].fraction < 1
    assert by_name["grad_cam"].fraction == 1
    assert by_name["group_cam"].fraction == 0
    assert not any(by_name["group_cam"].data)
    assert reply.cost.queries == round(96 * by_name["score_cam"].fraction)
    assert 'camserve_partial_answers_total{model="fake"} 1.0' in metrics


async def test_without_any_answer_there_is_nothing_partial():
    upstream = FakeBackend(faults=Faults(hanging_steps=frozenset({0})))
    async with serving(upstream) as server:
        code, _, _ = await failure(server.stub.Explain(ask(SCORE, allow_partial=True), timeout=0.3))
    assert code == "DEADLINE_EXCEEDED"


async def test_repeated_targets_are_explained_once():
    async with serving() as server:
        probe = await server.stub.Explain(ask())
        best = probe.predictions[0].index
        targets = [pb.Target(index=best), pb.Target(top_k=3), pb.Target(index=best)]
        reply = await server.stub.Explain(ask(GROUP, SCORE, targets=targets))
    ranking = [prediction.index for prediction in reply.predictions[:3]]
    assert [map_.target.index for map_ in reply.maps] == ranking * 2
    assert reply.cost.queries == 3 * 32 + 96


async def test_an_index_given_twice_is_asked_for_once():
    async with serving() as server:
        reply = await server.stub.Explain(ask(GROUP, targets=[pb.Target(index=index) for index in (4, 4, 1, 4)]))
    assert [map_.target.index for map_ in reply.maps] == [4, 1]
    assert reply.cost.queries == 2 * 32 == server.asked()


async def test_after_the_opening_the_targets_are_pinned():
    async with serving(step_queries=8) as server:
        reply = await server.stub.Explain(ask(SCORE, GRAD, targets=[pb.Target(top_k=2)]))
        (opening,), *rest = server.upstream.steps
    assert opening.targets == (Target(top_k=2),)
    assert [task.position for task in opening.tasks] == [0, 1]
    pinned = tuple(Target(index=map_.target.index) for map_ in reply.maps[:2])
    assert rest
    assert all(item.targets == pinned and item.top_predictions == 1 for (item,) in rest)


async def test_a_reply_that_turns_out_too_large_is_refused():
    request = ask(image=photo(0, (800, 800), "JPEG"), output={"size": "ORIGINAL", "encoding": "OVERLAY_PNG"})
    async with serving(max_message_bytes=2**20, max_image_bytes=2**20 - 2**16) as server:
        code, text, _ = await failure(server.stub.Explain(request))
    assert (code, text) == ("INVALID_ARGUMENT", "a reply may have at most 1048576 bytes: ask for fewer classes")


async def test_no_method_means_grad_cam_for_the_best_class():
    async with serving() as server:
        reply = await server.stub.Explain(ask())
    assert [map_.method.WhichOneof("method") for map_ in reply.maps] == ["grad_cam"]
    assert reply.maps[0].target.index == reply.predictions[0].index
    assert len(reply.predictions) == 5


@pytest.mark.parametrize("size", ["INPUT", "LAYER", "ORIGINAL"])
@pytest.mark.parametrize("encoding", ["FLOAT32", "FLOAT16", "UINT8", "PNG", "OVERLAY_PNG", "OVERLAY_JPEG"])
async def test_every_size_and_encoding(size: str, encoding: str):
    output = pb.Output(size=size, encoding=encoding, colormap="viridis", opacity=0.25, boxes={})
    async with serving() as server:
        call = server.stub.Explain(ask(GRAD, output=output))
        if size == "LAYER" and encoding.startswith("OVERLAY"):
            assert (await failure(call))[0] == "INVALID_ARGUMENT"
            return
        (map_,) = (await call).maps
    height, width = {"INPUT": (32, 48), "LAYER": (4, 6), "ORIGINAL": (60, 80)}[size]
    assert list(map_.shape) == [height, width]
    assert map_.encoding == pb.Output.Encoding.Value(encoding)
    assert len(map_.boxes) == 1
    raw = {"FLOAT32": 4, "FLOAT16": 2, "UINT8": 1}.get(encoding)
    if raw:
        assert len(map_.data) == raw * height * width
    else:
        assert Image.open(io.BytesIO(map_.data)).size == (width, height)


async def test_an_overlay_lies_on_the_part_that_the_network_saw():
    async with serving() as server:
        output = pb.Output(encoding="OVERLAY_PNG", opacity=0.0)
        image = photo(1, (32, 48))
        pixels = np.asarray(Image.open(io.BytesIO(image)))
        tensor = pb.Image(tensor=pb.Tensor(data_type="UINT8", shape=pixels.shape, data=pixels.tobytes()))
        (map_,) = (await server.stub.Explain(pb.ExplainRequest(image=tensor, output=output))).maps
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(map_.data))), pixels)


async def test_float_tensors_are_explained_and_laid_under_overlays():
    pixels = np.random.default_rng(0).random((32, 48, 3), dtype=np.float32)
    tensor = pb.Image(tensor=pb.Tensor(data_type="FLOAT32", shape=pixels.shape, data=pixels.tobytes()))
    async with serving() as server:
        output = pb.Output(encoding="OVERLAY_PNG", opacity=0.0, size="ORIGINAL")
        (map_,) = (await server.stub.Explain(pb.ExplainRequest(image=tensor, output=output))).maps
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(map_.data))), (pixels * 255).round())


_HEADER = b"IHDR" + bytes.fromhex("000fffff000fffff0802000000")
HUGE = b"\x89PNG\r\n\x1a\n\0\0\0\x0d" + _HEADER + zlib.crc32(_HEADER).to_bytes(4) + b"\0\0\0\0IDAT" + bytes(4)
"""A PNG header that announces 2^40 pixels."""

TENSOR = pb.Image(tensor={"data_type": "UINT8", "shape": [20, 20, 3], "data": bytes(1200)})
FLOAT = pb.Image(tensor={"data_type": "FLOAT32", "shape": [1, 1, 3], "data": bytes(12)})
TWOS = pb.Image(tensor={"data_type": "FLOAT32", "shape": [32, 48, 3], "data": b"\0\0\0\x40" * (32 * 48 * 3)})


def group(**parameters: float) -> pb.MethodSpec:
    return pb.MethodSpec(group_cam=parameters)


BAD_IMAGES: list[tuple[pb.ExplainRequest, dict[str, int], str]] = [
    (ask(image=b"hello"), {}, "not a JPEG, PNG, WEBP image"),
    (pb.ExplainRequest(), {}, "no image"),
    (ask(image=b""), {}, "zero bytes"),
    (ask(image=photo(kind="JPEG")[:900]), {}, "broken or truncated"),
    (ask(), {"max_image_bytes": 500}, "at most 500 bytes"),
    (pb.ExplainRequest(image=TENSOR), {"max_image_bytes": 500}, "at most 500 bytes, got 1200"),
    (ask(image=HUGE), {}, "at most 64000000 pixels"),
    (pb.ExplainRequest(image=TENSOR), {"max_image_pixels": 399}, "at most 399 pixels, got 20 x 20 = 400"),
    (pb.ExplainRequest(image=FLOAT), {}, "must have the network's input size [32, 48], got [1, 1]"),
    (pb.ExplainRequest(image=TWOS), {}, "pixels in [0, 1]"),
]
BAD_OPTIONS: list[tuple[pb.ExplainRequest, dict[str, int], str]] = [
    (ask(targets=[pb.Target(label="tabi")]), {}, "unknown label 'tabi'; close to it: 'tabby'"),
    (ask(targets=[pb.Target(label="crane")]), {}, "names classes 7, 9"),
    (ask(targets=[pb.Target(index=10)]), {}, "must be 0..9, got 10"),
    (ask(targets=[pb.Target(top_k=11)]), {}, "must be 1..10, got 11"),
    (ask(targets=[pb.Target()]), {}, "exactly one"),
    (ask(targets=[pb.Target(top_k=3)]), {"max_targets": 2}, "at most 2 classes, got 3"),
    (ask(GRAD, GRAD), {"max_methods": 1}, "at most 1 methods, got 2"),
    (ask(pb.MethodSpec()), {}, "names no method"),
    (ask(layers=["feature"]), {}, "unknown layer 'feature'; the default is 'features'; close to it: features"),
    (ask(group(groups=97)), {}, "1..96 at this layer, got 97"),
    (ask(GROUP, layers=["stem"]), {}, "1..16 at this layer, got 32"),
    (ask(group(groups=0)), {}, "at least 1, got 0"),
    (ask(group(theta=101)), {}, "0..100, got 101"),
    (ask(group(variant=9)), {}, "unknown enum value 9"),
    (ask(precision=7), {}, "unknown precision 7"),
    (ask(output={"size": 9}), {}, "unknown size 9"),
    (ask(output={"encoding": 9}), {}, "unknown encoding 9"),
    (ask(output={"colormap": "pink"}), {}, "got 'pink'"),
    (ask(output={"opacity": 1.5}), {}, "0..1, got 1.5"),
    (ask(output={"boxes": {"threshold": 2}}), {}, "0..1, got 2"),
    (ask(output={"size": "LAYER", "encoding": "OVERLAY_PNG"}), {}, "input or original"),
    (ask(output={"size": "ORIGINAL"}), {"max_map_pixels": 4799}, "at most 4799 pixels; 1 maps of 60 x 80 have 4800"),
    (
        ask(image=photo(0, (400, 800)), targets=[pb.Target(top_k=2)], output={"size": "ORIGINAL"}),
        {"max_message_bytes": 2**21, "max_image_bytes": 2**20 + 2**19},
        "at most 2097152 bytes; 2 maps of 400 x 800 as float32 have 2560000",
    ),
]
NOT_FOUND: list[tuple[pb.ExplainRequest, dict[str, int], str]] = [
    (ask(model="resnet"), {}, "unknown model 'resnet'; there are: fake"),
    (ask(version="2.0"), {}, "served in version 1.0, not '2.0'"),
]
REFUSED = [
    *(("INVALID_ARGUMENT", "InvalidImage", *row) for row in BAD_IMAGES),
    *(("INVALID_ARGUMENT", "InvalidOption", *row) for row in BAD_OPTIONS),
    *(("NOT_FOUND", "NotFound", *row) for row in NOT_FOUND),
]


@pytest.mark.parametrize(("code", "kind", "request_", "settings", "text"), REFUSED, ids=[row[-1] for row in REFUSED])
async def test_bad_input_is_refused_and_changes_nothing(
    code: str, kind: str, request_: pb.ExplainRequest, settings: dict[str, int], text: str
):
    async with serving(**settings) as server:
        got_code, got_text, got_kind = await failure(server.stub.Explain(request_))
        assert (got_code, got_kind) == (code, kind)
        assert text in got_text
        assert "Traceback" not in got_text
        steps = len(server.upstream.steps)
        assert steps == (text == "broken or truncated"), "only decoding finds a truncated file"
        if not settings:
            assert len((await server.stub.Explain(ask())).maps) == 1


async def test_a_worker_that_says_that_the_model_cannot_do_it():
    image = photo(9)
    upstream = FakeBackend(faults=Faults(item_errors={image: Unsupported("cam needs a pooling head")}))
    async with serving(upstream) as server:
        answer = await failure(server.stub.Explain(ask(pb.MethodSpec(cam={}), image=image)))
        assert answer == ("FAILED_PRECONDITION", "cam needs a pooling head", "Unsupported")


async def test_a_message_over_the_bound_is_refused_by_grpc():
    async with serving(max_message_bytes=2**20, max_image_bytes=2**19) as server:
        code, text, _ = await failure(server.stub.Explain(ask(image=bytes(2**20 + 1))))
        assert code == "RESOURCE_EXHAUSTED"
        assert "larger than max" in text


async def test_models_are_listed_and_described():
    other = ModelInfo("other", "3", ("a", "b"), (16, 16), (MODEL.layers[0],), "stem")
    async with serving(FakeBackend([MODEL, other])) as server:
        await _all_ready(server, 2)
        models = (await server.stub.ListModels(pb.ListModelsRequest())).models
        assert [(model.name, model.version, model.ready) for model in models] == [
            ("fake", "1.0", True), ("other", "3", True)
        ]  # fmt: skip
        model = await server.stub.GetModel(pb.GetModelRequest(name="fake"))
        assert model.ready
        assert tuple(model.labels) == MODEL.labels
        assert (model.input_height, model.input_width, model.default_layer) == (32, 48, "features")
        methods = {method.name: method for method in model.methods}
        costs = {"cam": 0, "grad_cam": 0, "group_cam": 33, "score_cam": 96, "rise": 4000}
        assert {name: methods[name].queries for name in costs} == costs
        groups, theta, variant, _ = methods["group_cam"].parameters
        assert (groups.name, groups.type, groups.default, groups.minimum) == ("groups", "integer", "32", 1)
        assert not groups.HasField("maximum")
        assert (theta.default, theta.minimum, theta.maximum) == ("70.0", 0, 100)
        assert list(variant.choices) == ["paper", "reference"]
        code, text, kind = await failure(server.stub.GetModel(pb.GetModelRequest(name="no")))
        assert (code, text, kind) == ("NOT_FOUND", "unknown model 'no'; there are: fake, other", "NotFound")
        code, text, _ = await failure(server.stub.Explain(ask()))
        assert (code, text) == ("INVALID_ARGUMENT", "name one of the models: fake, other")
        assert (await server.stub.Explain(ask(GRAD, model="other"))).model == "other"


async def _all_ready(server: Harness, number: int) -> None:
    await until(lambda: sum(model.ready for model in server.gateway.registry.models) == number)


async def test_reflection_names_the_services():
    async with serving() as server:
        stub = reflection_pb2_grpc.ServerReflectionStub(server.channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        async for reply in stub.ServerReflectionInfo(iter([request])):
            names = {service.name for service in reply.list_services_response.service}
    assert {"camserve.v1.ExplanationService", "grpc.health.v1.Health"} <= names


async def test_a_taken_port_is_an_error_with_the_address():
    async with serving(**SCRAPED) as server:
        for changes in ({"listen": server.gateway.address}, {"metrics_listen": server.gateway.metrics_address}):
            with pytest.raises(InvalidOption, match=next(iter(changes.values()))):
                await Gateway(Settings(**(QUICK | changes)), fixed({"fake": FakeBackend()})).start()


def test_importing_the_server_loads_no_torch():
    code = (
        "import sys, camserve.gateway.server, camserve.gateway.pool.fake;"
        "print([name for name in ('torch', 'torchvision', 'ts', 'matplotlib') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


async def test_an_idle_server_takes_a_request_whatever_it_has_learnt():
    """One slow step has taught it that a Score-CAM takes hours; what is refused would never teach it better."""
    async with serving(step_queries=8) as server:
        planner = server.gateway.registry.get("fake").dispatcher.planner
        planner.observe("fake", "fake:0:cpu", Load({"masked_forward": 8}, 1), 3600.0, asyncio.get_running_loop().time())
        assert planner.seconds_of({"masked_forward": 96}) > 3600
        assert (await server.stub.Explain(ask(SCORE), timeout=600)).cost.queries == 96
        assert planner.seconds_of({"masked_forward": 96}) < 600  # it has learnt

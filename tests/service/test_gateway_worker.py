"""What travels between a gateway and a worker: images once, sums of one model only, and large things in threads."""

from __future__ import annotations

import asyncio
import io
import itertools
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest
import tiny
from gateway_harness import GRAD, QUICK, SCORE, arrays, ask, failure, photo, same, serving, until
from PIL import Image
from worker_backend import WorkerBackend

from camserve import Engine
from camserve.errors import WorkerLost
from camserve.finalise.results import Results
from camserve.gateway.ops.settings import Settings
from camserve.gateway.pool.discovery import fixed
from camserve.gateway.pool.fake import MODEL, FakeBackend
from camserve.gateway.pool.readiness import canary, pattern
from camserve.gateway.server import Gateway
from camserve.images import digest
from camserve.types import Item, ItemResult, Preprocessing, StepResult
from camserve.v1 import explain_pb2 as pb
from camserve.v1 import explain_pb2_grpc
from camserve.worker.network import Network

XRAI = pb.MethodSpec(xrai={"steps": 3})


@asynccontextmanager
async def over(worker: WorkerBackend, **settings: Any) -> AsyncIterator[Any]:
    """A stub of a gateway over one worker."""
    async with Gateway(Settings(**(QUICK | settings)), fixed({"here": worker})) as gateway:
        await gateway.wait_ready(30)
        options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        async with grpc.aio.insecure_channel(gateway.address, options=options) as channel:
            yield explain_pb2_grpc.ExplanationServiceStub(channel)


def noise(megapixels: float) -> np.ndarray:
    side = round(1000 * megapixels**0.5)
    return np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)


def tensor(pixels: np.ndarray) -> pb.Image:
    return pb.Image(tensor=pb.Tensor(data_type=pb.Tensor.UINT8, shape=pixels.shape, data=pixels.tobytes()))


@pytest.fixture(scope="module")
def engine() -> Engine:
    preprocessing = Preprocessing(resize_px=64, crop_px=tiny.TINY_SIZE, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    return Engine(tiny.tiny_module(), preprocessing=preprocessing, labels=tiny.TINY_LABELS)


async def test_the_bytes_of_an_image_are_sent_once():
    worker, image = WorkerBackend(tiny.tiny_network()), tiny.png(noise(1.7))
    assert len(image) > 5_000_000
    async with over(worker, step_queries=2) as stub:
        canary = worker.sent_bytes
        reply = await stub.Explain(ask(SCORE, image=image))
    assert reply.cost.steps >= 5
    assert worker.sent_bytes - canary < 1.1 * len(image)


async def test_a_worker_that_keeps_no_images_gets_them_at_once_with_every_step(engine: Engine):
    """Otherwise each step would take two rounds."""
    worker, image = WorkerBackend(tiny.tiny_network(), memory_bytes=0), tiny.png(tiny.pixels(1))
    async with over(worker, step_queries=2) as stub:
        before = worker.steps
        reply = await stub.Explain(ask(SCORE, image=image))
    assert worker.steps - before == reply.cost.steps
    expected = engine.explain(image, ["score_cam"]).maps[0].array
    np.testing.assert_allclose(arrays(reply)[0], expected, atol=1e-5)  # float32 sums in another order


async def test_an_image_that_a_worker_has_forgotten_is_sent_again():
    image = photo(3)
    async with serving(step_queries=7) as server:
        expected = await server.stub.Explain(ask(SCORE, image=image))
    async with serving(step_queries=7, steps_per_worker=1) as server:
        server.upstream.hold()
        call = server.stub.Explain(ask(SCORE, image=image))
        await server.upstream.received(1)
        server.upstream.release(1)
        await server.upstream.received(2)
        server.upstream.forget_images()
        server.upstream.release()
        assert same(await call, expected)
        assert server.upstream.image_bytes == 2 * len(image)
        assert [item.image is None for step in server.upstream.steps for item in step].count(False) == 2


@pytest.mark.parametrize("change", [{"version": "2.0"}, {"weights": "ffff"}], ids=str)
async def test_sums_of_two_models_are_never_merged(change: dict[str, str]):
    async with serving(step_queries=7, steps_per_worker=1) as server:
        server.upstream.hold()
        call = server.stub.Explain(ask(SCORE))
        await server.upstream.received(1)
        server.upstream.release(1)
        await server.upstream.received(2)
        server.upstream.serve(replace(MODEL, **change))
        server.upstream.release()
        assert await failure(call) == (
            "UNAVAILABLE",
            "model fake was replaced while this request ran; try again",
            "ModelChanged",
        )
        model = server.gateway.registry.get("fake")
        await until(lambda: model.info == replace(MODEL, **change))
        reply = await server.stub.Explain(ask(SCORE))
        assert (reply.version, reply.maps[0].complete) == (change.get("version", "1.0"), True)


async def test_a_second_backend_with_other_weights_is_not_used():
    first, second = FakeBackend(), FakeBackend([replace(MODEL, weights="other")])
    async with Gateway(Settings(**QUICK, step_queries=8), fixed({"a": first, "b": second})) as gateway:
        await gateway.wait_ready(30)
        await until(lambda: first.canaries + second.canaries >= 2)
        async with grpc.aio.insecure_channel(gateway.address) as channel:
            stub = explain_pb2_grpc.ExplanationServiceStub(channel)
            assert (await stub.Explain(ask(SCORE))).maps[0].complete
    assert not (first.steps and second.steps)


async def test_limits_above_the_defaults_hold_in_the_worker_too():
    """An image of 18 MB, where 16 MiB is the default, and one of 65 megapixels, where 64 is."""
    large, wide = noise(6), np.zeros((8000, 8100, 3), np.uint8)
    settings = {"max_image_bytes": 2**25, "max_image_pixels": 7 * 10**7, "step_bytes": 2**27 - 2**24}
    async with over(WorkerBackend(tiny.tiny_network()), **settings) as stub:
        assert (await stub.Explain(pb.ExplainRequest(image=tensor(large), methods=[GRAD]))).predictions
        reply = await stub.Explain(ask(GRAD, image=tiny.png(wide)))
    assert (reply.input.original_height, reply.input.original_width) == (8000, 8100)


def endless(scans: int) -> bytes:
    """A JPEG of 9 megapixels whose last scan is repeated."""
    file = io.BytesIO()
    Image.new("L", (3000, 3000), 77).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * scans + data[-2:]


async def test_an_image_that_takes_too_long_to_decode_fails_alone_and_is_not_sent_again(
    monkeypatch: pytest.MonkeyPatch,
):
    """The bound on scans is lifted, for without the one on processor time the worker would decode for minutes."""
    monkeypatch.setattr("camserve.containers.MAX_SCANS", 10**9)
    monkeypatch.setattr("camserve.images.MIN_DECODE_S", 0.3)
    monkeypatch.setattr("camserve.images.DECODE_S_PER_PIXEL", 0.0)
    worker = WorkerBackend(tiny.tiny_network())
    async with over(worker) as stub:
        before = worker.steps
        assert await failure(stub.Explain(ask(GRAD, image=endless(3000)))) == (
            "INVALID_ARGUMENT",
            "decoding an image of this size may take at most 0.3 s of processor time",
            "InvalidImage",
        )
        assert worker.steps == before + 1
        assert (await stub.Explain(ask(GRAD))).predictions


async def test_what_grows_with_a_request_is_done_in_threads(monkeypatch: pytest.MonkeyPatch):
    loop, merged, probed = threading.get_ident(), [], []
    merge = Results.merge

    def noting(self: Results, *arguments: Any) -> None:
        merged.append(threading.get_ident())
        merge(self, *arguments)

    def header(*arguments: Any) -> tuple[int, int]:
        probed.append(threading.get_ident())
        return 60, 80

    monkeypatch.setattr(Results, "merge", noting)
    monkeypatch.setattr("camserve.images.probe", header)
    async with serving(step_queries=16) as server:
        await server.stub.Explain(ask(SCORE))
    assert merged
    assert probed
    assert loop not in {*merged, *probed}


async def test_a_ranking_and_then_curves_follow_when_everything_before_is_there(engine: Engine):
    image = tiny.png(tiny.pixels(2))
    async with over(WorkerBackend(tiny.tiny_network())) as stub:
        updates = [u async for u in stub.StreamExplain(ask(XRAI, GRAD, image=image, evaluate=True, evaluation_steps=4))]
    reply = updates[-1].reply
    expected = engine.explain(image, [("xrai", {"steps": 3}), "grad_cam"], evaluate=True, evaluation_steps=4)
    for found, wanted in zip(reply.maps, expected.maps, strict=True):
        assert wanted.faithfulness is not None
        np.testing.assert_allclose(np.frombuffer(found.data, "<f4"), wanted.array.ravel(), atol=1e-5)
        np.testing.assert_allclose(found.faithfulness.deletion, wanted.faithfulness.deletion, atol=1e-5)
    assert reply.cost.evaluation_queries == expected.cost.evaluation_queries
    done = [(update.progress.done, update.progress.total) for update in updates[:-1]]
    assert done == sorted(done)


async def test_a_request_ends_when_its_follow_ups_cannot_be_made(monkeypatch: pytest.MonkeyPatch):
    def broken(known: Any) -> Any:
        raise RuntimeError("a secret")

    monkeypatch.setattr("camserve.gateway.pool.dispatcher.follow_ups", broken)
    async with serving() as server:
        async with asyncio.timeout(20):
            code, text, _ = await failure(server.stub.Explain(ask(GRAD, evaluate=True)))
        assert (code, text) == ("INTERNAL", "internal error; the server's log has the details")
        assert server.gateway.registry.get("fake").dispatcher.planner.idle


class Mortal(WorkerBackend):
    """A worker that dies over every other step, and answers canaries and controls.

    Attributes:
        controls: answers to controls.
    """

    def __init__(self, network: Network) -> None:
        super().__init__(network)
        self.controls: list[StepResult] = []
        self._own = {digest(pattern(network.info.input_size)), canary(network.info).digest}
        self._dies = itertools.cycle([True, False])

    async def step(self, model: str, items: Sequence[Item], timeout_s: float) -> StepResult:
        if items[0].digest not in self._own and next(self._dies):
            raise WorkerLost("the worker died while it answered")
        result = await super().step(model, items, timeout_s)
        self.controls += [result] if items[0].digest == digest(pattern((48, 64))) else []
        return result


async def test_each_kind_of_work_that_is_lost_can_be_asked_of_another_image():
    """A control that a worker cannot read would make its backend look broken, and a refusal says nothing."""
    group = pb.MethodSpec(group_cam={"groups": 4, "grouping": pb.GroupCam.KMEANS})
    asked = [
        ask(GRAD, SCORE, group, targets=[pb.Target(index=1), pb.Target(top_k=2)], image=tiny.png(tiny.pixels(1))),
        ask(XRAI, GRAD, evaluate=True, image=tiny.png(tiny.pixels(2))),
    ]
    async with over(WorkerBackend(tiny.tiny_network()), step_queries=4) as stub:
        expected = [await stub.Explain(request) for request in asked]
    worker = Mortal(tiny.tiny_network())
    async with over(worker, step_queries=4) as stub:
        for request, right in zip(asked, expected, strict=True):
            reply = await stub.Explain(request)
            for ours, theirs in zip(arrays(reply), arrays(right), strict=True):
                np.testing.assert_allclose(ours, theirs, atol=1e-5)  # float32 sums in another order
    assert len(worker.controls) > 8
    for control in worker.controls:
        assert all(isinstance(outcome, ItemResult) for outcome in control.outcomes)


async def test_a_map_that_stopped_early_is_that_of_the_queries_asked(engine: Engine):
    """RISE's masks come in the order of their numbers, so that the first n of 400 make the map of n masks."""
    image = tiny.png(noise(0.01))
    async with over(WorkerBackend(tiny.tiny_network()), step_queries=16) as stub:
        reply = await stub.Explain(ask(pb.MethodSpec(rise={"masks": 400, "tolerance": 1.0}), image=image))
    (saliency,) = reply.maps
    assert saliency.complete
    assert 0 < saliency.estimated_difference <= 1
    masks = round(400 * saliency.fraction)
    assert 32 <= masks == reply.cost.queries < 400
    whole = engine.explain(image, [("rise", {"masks": masks})]).maps[0].array
    np.testing.assert_allclose(arrays(reply)[0], whole, atol=1e-5)  # float32 sums of other steps

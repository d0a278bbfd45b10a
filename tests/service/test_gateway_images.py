"""What becomes of an image's bytes: how often they are sent to a worker, and where that is told."""

import asyncio

from gateway_harness import SCORE, Harness, ask, photo, serving, until
from prometheus_client.parser import text_string_to_metric_families

from camserve.v1 import explain_pb2 as pb


async def explained(server: Harness, image: bytes, forgotten: int = 0) -> pb.ExplainReply:
    """Returns a Score-CAM of several steps, before some of which the worker forgets the image after the first."""
    upstream, first = server.upstream, len(server.upstream.steps) + 1
    upstream.hold()
    call = asyncio.ensure_future(server.stub.Explain(ask(SCORE, image=image)))
    await upstream.received(first)
    for number in range(first + 1, first + 1 + 2 * forgotten, 2):
        upstream.release(1)
        await upstream.received(number)
        upstream.forget_images()
        upstream.release(1)
        await upstream.received(number + 1)  # the same step, with the image
    upstream.release()
    return await call


def resends(text: str) -> dict[str, float]:
    """Returns the count by model."""
    families = {family.name: family for family in text_string_to_metric_families(text)}
    return {
        sample.labels["model"]: sample.value
        for sample in families["camserve_image_resends"].samples
        if sample.name.endswith("_total")
    }


async def test_an_image_that_a_worker_did_not_keep_is_sent_again_and_counted():
    async with serving(step_queries=16) as server:
        assert resends(await server.metrics()) == {"fake": 0}
        await explained(server, photo(1))
        assert resends(await server.metrics()) == {"fake": 0}
        reply = await explained(server, photo(2), forgotten=2)
        assert reply.maps[0].complete
        assert resends(await server.metrics()) == {"fake": 2}


async def test_an_answer_tells_how_many_bytes_of_its_image_were_sent():
    async with serving(step_queries=16) as server:
        first = await explained(server, photo(1))
        assert first.cost.image_bytes == len(photo(1)) == server.upstream.image_bytes
        again = await explained(server, photo(1))
        assert again.cost.image_bytes == 0 < again.cost.steps
        forgotten = await explained(server, photo(2), forgotten=2)
        assert forgotten.cost.image_bytes == 3 * len(photo(2))
        assert server.upstream.image_bytes == len(photo(1)) + 3 * len(photo(2))


async def test_an_image_of_pixels_counts_its_pixels():
    """Two requests share a step, and each counts its own image."""
    pixels = pb.Image(tensor=pb.Tensor(data_type=pb.Tensor.UINT8, shape=[10, 20, 3], data=bytes(range(200)) * 3))
    async with serving() as server:
        server.upstream.hold()
        calls = [asyncio.ensure_future(server.stub.Explain(ask(SCORE, image=photo(1))))]
        await server.upstream.received(1)
        calls += [
            asyncio.ensure_future(server.stub.Explain(pb.ExplainRequest(image=image, methods=[SCORE])))
            for image in (pixels, pb.Image(encoded=photo(2)))
        ]
        await until(lambda: len(server.gateway.registry.get("fake").dispatcher.planner) == 3)
        server.upstream.release()
        replies = await asyncio.gather(*calls)
    assert [reply.cost.image_bytes for reply in replies] == [len(photo(1)), 600, len(photo(2))]


async def test_a_gateway_keeps_libtiff_off_its_stderr(monkeypatch):
    noted: list[str] = []
    monkeypatch.setattr("camserve.images.silence_libtiff", lambda: noted.append("gateway"))
    async with serving(ready=False):
        assert noted == ["gateway"]

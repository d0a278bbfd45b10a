"""A gateway over a fake upstream, with a channel to it, for the tests of this folder."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import trustme
from PIL import Image
from prometheus_client import generate_latest

from camserve.finalise.results import Results
from camserve.gateway.ops.settings import Settings
from camserve.gateway.pool.discovery import fixed
from camserve.gateway.pool.fake import FakeBackend
from camserve.gateway.server import Gateway
from camserve.types import Item, ItemResult
from camserve.v1 import explain_pb2 as pb
from camserve.v1 import explain_pb2_grpc

GRAD = pb.MethodSpec(grad_cam={})
GROUP = pb.MethodSpec(group_cam={})
SCORE = pb.MethodSpec(score_cam={})
PATIENT = {"default_deadline_s": 600, "partial_margin_s": 100, "step_timeout_s": 10_000}
"""Nothing ends before a `jump`; after `TO_THE_MARGIN`, partial answers are made while there is time enough for them."""
TO_THE_MARGIN = 550
QUICK = {"listen": "127.0.0.1:0", "metrics_listen": "off", "poll_s": 0.01, "drain_s": 5.0}
"""There is no port for the metrics, whose end would be waited for each time."""
SCRAPED = {"metrics_listen": "127.0.0.1:0"}


@dataclass
class Harness:
    gateway: Gateway
    upstream: FakeBackend
    channel: grpc.aio.Channel
    stub: Any

    async def metrics(self) -> str:
        """What Prometheus would get."""
        return str(await asyncio.to_thread(generate_latest, self.gateway.metrics.registry), "utf-8")

    def asked(self) -> int:
        """Masked queries that the upstream was asked."""
        return sum(task.stop - task.start for step in self.upstream.steps for item in step for task in item.tasks)


@asynccontextmanager
async def serving(upstream: FakeBackend | None = None, ready: bool = True, **settings: Any) -> AsyncIterator[Harness]:
    upstream = upstream or FakeBackend()
    async with Gateway(Settings(**(QUICK | settings)), fixed({"fake": upstream})) as gateway:
        if ready:
            await gateway.wait_ready(30)
        async with grpc.aio.insecure_channel(
            gateway.address, options=[("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        ) as channel:
            yield Harness(gateway, upstream, channel, explain_pb2_grpc.ExplanationServiceStub(channel))


def certified(folder: Path) -> tuple[trustme.CA, dict[str, Path]]:
    """Writes the certificate of a server on loopback; returns its authority, also in ca.pem, and settings."""
    ca = trustme.CA()
    pair = ca.issue_cert("127.0.0.1")
    ca.cert_pem.write_to_path(folder / "ca.pem")
    pair.private_key_pem.write_to_path(folder / "tls.key")
    pair.cert_chain_pems[0].write_to_path(folder / "tls.crt")
    return ca, {"tls_cert": folder / "tls.crt", "tls_key": folder / "tls.key"}


def photo(seed: int = 0, size: tuple[int, int] = (60, 80), kind: str = "PNG") -> bytes:
    """An image file of (height, width) `size`."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def ask(*methods: pb.MethodSpec, image: bytes | None = None, **fields: Any) -> pb.ExplainRequest:
    return pb.ExplainRequest(image=pb.Image(encoded=photo() if image is None else image), methods=methods, **fields)


async def failure(call: Awaitable[Any]) -> tuple[str, str, str]:
    """(status, text, class name in the trailing metadata) of a call that fails."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        trailing = error.trailing_metadata()
        return error.code().name, error.details() or "", str(trailing.get("camserve-error", "") if trailing else "")
    raise AssertionError("the call succeeded")


def arrays(reply: pb.ExplainReply) -> list[np.ndarray]:
    """The FLOAT32 maps of a reply."""
    return [np.frombuffer(map_.data, "<f4").reshape(map_.shape) for map_ in reply.maps]


async def until(condition: Callable[[], bool], changes: Callable[[], Awaitable[Any]] | None = None) -> None:
    """Returns once the condition holds; the test's own timeout is the bound."""
    while not condition():
        await (changes() if changes else asyncio.sleep(0.001))


def merged(monkeypatch: pytest.MonkeyPatch) -> list[Results]:
    """Returns a list that grows by one entry with each answer whose sums have been merged.

    Sums are merged in threads, so that an answer that a step has brought may still be missing in a partial reply.
    """
    merges: list[Results] = []
    merge = Results.merge

    def noting(self: Results, item: Item, result: ItemResult) -> None:
        merge(self, item, result)
        merges.append(self)

    monkeypatch.setattr(Results, "merge", noting)
    return merges


def jump(seconds: float) -> None:
    """Puts the event loop's clock forward: whatever waits for a time until then goes on at once.

    So a deadline passes at a moment that the test chooses, however slow the machine is. A client's own deadline is not
    the loop's: give it a much longer one than the server has, or none.
    """
    loop = asyncio.get_running_loop()
    time = loop.time
    loop.time = lambda: time() + seconds  # type: ignore[method-assign]


def same(left: pb.ExplainReply, right: pb.ExplainReply) -> bool:
    """Equal but for what it cost, and whose it is."""
    return _answer(left) == _answer(right)


def _answer(reply: pb.ExplainReply) -> Sequence[Any]:
    copy = pb.ExplainReply()
    copy.CopyFrom(reply)
    copy.ClearField("cost")
    copy.ClearField("request_id")
    return copy.SerializeToString(deterministic=True)

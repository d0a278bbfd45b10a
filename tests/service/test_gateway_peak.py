"""The memory of a gateway at its limits, measured from outside: it stays below what docs/operations.md says."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from gateway_harness import ask, photo

from camserve.gateway.requests.memory import PICTURE_BYTES
from camserve.v1 import explain_pb2 as pb

MIB = 2**20
SETTINGS: dict[str, Any] = {
    "max_message_bytes": 8 * MIB,
    "max_image_bytes": 6 * MIB,
    "max_image_pixels": 4_000_000,
    "max_bytes_in_flight": 128 * MIB,
}
BOUND = SETTINGS["max_bytes_in_flight"] + PICTURE_BYTES * SETTINGS["max_image_pixels"]
"""What all calls together may take: see *Memory of a gateway* in docs/operations.md."""

OWN = 24 * MIB
"""What the process takes besides that: threads, buffers of sockets, what is between two collections."""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")


class Served:
    """A gateway in another process."""

    def __init__(self, process: asyncio.subprocess.Process, stub: Any) -> None:
        self._process = process
        self.stub = stub

    async def peak(self) -> int:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(b"\n")
        return int(await self._process.stdout.readline())


@asynccontextmanager
async def served() -> AsyncIterator[Served]:
    program = str(Path(__file__).parent / "gateway_peak.py")
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, program, json.dumps(SETTINGS), stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.DEVNULL
    )
    assert process.stdout
    address = (await process.stdout.readline()).decode().strip()
    try:
        async with grpc.aio.insecure_channel(address, options=[("grpc.max_receive_message_length", -1)]) as channel:
            from camserve.v1 import explain_pb2_grpc

            yield Served(process, explain_pb2_grpc.ExplanationServiceStub(channel))
    finally:
        process.terminate()
        await process.wait()


async def codes(calls: list[Any]) -> Counter[str]:
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    return Counter(each.code().name if isinstance(each, grpc.aio.AioRpcError) else "OK" for each in outcomes)


def pixels() -> pb.ExplainRequest:
    """A request with a tensor of nearly 6 MiB."""
    array = np.random.default_rng(0).integers(0, 256, (1400, 1400, 3), dtype=np.uint8)
    tensor = pb.Tensor(data_type=pb.Tensor.UINT8, shape=array.shape, data=array.tobytes())
    return pb.ExplainRequest(image=pb.Image(tensor=tensor))


async def test_a_hundred_large_messages_at_once_stay_below_the_bound():
    """Uncounted they would take more than a GiB."""
    request = pixels()
    async with served() as server:
        await server.stub.Explain(ask())
        before = await server.peak()
        found = await codes([server.stub.Explain(request) for _ in range(100)])
        assert set(found) == {"OK", "RESOURCE_EXHAUSTED"}
        assert await server.peak() - before < BOUND + OWN
        assert (await server.stub.Explain(ask())).maps


async def test_many_overlays_of_the_photos_own_size_stay_below_the_bound():
    output = pb.Output(size=pb.Output.ORIGINAL, encoding=pb.Output.OVERLAY_JPEG)
    request = ask(image=photo(size=(1900, 2000), kind="JPEG"), output=output)
    async with served() as server:
        await server.stub.Explain(ask(output=pb.Output(encoding=pb.Output.OVERLAY_JPEG)))
        before = await server.peak()
        found = await codes([server.stub.Explain(request) for _ in range(12)])
        assert found["OK"] >= 1
        assert set(found) <= {"OK", "RESOURCE_EXHAUSTED"}
        assert await server.peak() - before < BOUND + OWN

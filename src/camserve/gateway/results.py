"""Replies that were given before, for those who ask the same again. Whoever asks while one is made waits for it."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from typing import Literal

from camserve.gateway.request import Request
from camserve.images import digest
from camserve.v1 import explain_pb2 as pb

Outcome = Literal["hit", "miss", "shared"]
"""The reply was there; it had to be made; somebody else was just making it."""


def key_of(request: Request) -> Hashable:
    """The same for requests whose replies are the same."""
    return (
        request.model.name,
        request.model.version,
        digest(request.image),
        request.parts,
        request.targets,
        request.top_predictions,
        request.precision,
        request.output,
        request.evaluation_steps,
    )


class Results:
    """The most recently used complete replies, bounded in bytes. For one event loop.

    Args:
        size_bytes: bound; 0 keeps nothing, and nobody waits for another.
    """

    def __init__(self, size_bytes: int) -> None:
        self._bound = size_bytes
        self._total = 0
        self._kept: OrderedDict[Hashable, bytes] = OrderedDict()
        self._making: dict[Hashable, asyncio.Future[None]] = {}

    @property
    def keeps(self) -> bool:
        """Anything is kept at all."""
        return self._bound > 0

    async def get(
        self, key: Hashable, make: Callable[[], Awaitable[pb.ExplainReply]]
    ) -> tuple[pb.ExplainReply, Outcome]:
        """The reply of this key, made if it has to be.

        A maker that fails or goes away fails alone: the next one in the line makes the reply. Raises as `make`.
        """
        outcome: Outcome = "hit"
        while key not in self._kept:
            if key not in self._making:
                return await self._made(key, make), "miss"
            outcome = "shared"
            await asyncio.shield(self._making[key])
        self._kept.move_to_end(key)
        return pb.ExplainReply.FromString(self._kept[key]), outcome

    async def _made(self, key: Hashable, make: Callable[[], Awaitable[pb.ExplainReply]]) -> pb.ExplainReply:
        done = self._making[key] = asyncio.get_running_loop().create_future()
        try:
            reply = await make()
            if all(saliency.complete for saliency in reply.maps):
                self._keep(key, reply.SerializeToString())
            return reply
        finally:
            del self._making[key]
            done.set_result(None)

    def _keep(self, key: Hashable, reply: bytes) -> None:
        if len(reply) > self._bound:
            return
        self._kept[key] = reply
        self._total += len(reply)
        while self._total > self._bound:
            self._total -= len(self._kept.popitem(last=False)[1])

"""Has evidence records made of explain calls, and kept before their replies leave."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from camserve.errors import CamserveError, DeadlineExceeded
from camserve.evidence.canonical import canonical, sha256
from camserve.evidence.log import EvidenceLog
from camserve.evidence.record import Asked, Witness
from camserve.gateway.ops.metrics import Metrics
from camserve.gateway.requests.rendering import Encode
from camserve.types import Explanation, SaliencyMap
from camserve.types.request import FittedRequest


class Testimony:
    """Sees how one call is answered, for its record.

    Args:
        asked: the call.
        encode: makes the reply of its door.
        canonical_bytes: returns the bytes that the reply's hash is taken of.
    """

    def __init__(self, asked: Asked, encode: Encode, canonical_bytes: Callable[[Any], bytes]) -> None:
        self._asked, self._encode, self._canonical_bytes = asked, encode, canonical_bytes
        self._witness: Witness | None = None

    def fits(self, fitted: FittedRequest) -> None:
        """Notes the request as it fits its model."""
        self._witness = Witness(self._asked, fitted)

    def encode(self, maps: Iterable[SaliencyMap], finish: Callable[[], Explanation]) -> Any:
        """Makes the reply, and notes what is in it."""
        assert self._witness is not None, "a request is fitted before it is answered"
        reply = self._encode(self._witness.seen(maps), self._witness.finished(finish))
        self._witness.reply = sha256(self._canonical_bytes(reply))
        return reply

    def record(self) -> dict[str, Any]:
        """Returns the record, once the reply is made."""
        assert self._witness is not None, "the reply is made"
        return self._witness.record()


class Evidence:
    """Keeps the records of one gateway.

    Args:
        log: the log that has a record of every answer; None: there is none.
        metrics: counts what is written.
    """

    def __init__(self, log: EvidenceLog | None, metrics: Metrics) -> None:
        self._log, self._metrics = log, metrics

    @property
    def of_all(self) -> bool:
        """Tells whether a record is kept of every answer."""
        return self._log is not None

    async def kept(self, testimony: Testimony, until_s: float) -> str:
        """Returns the record of an answer as one line of JSON, on the disk by then where there is a log.

        Args:
            testimony: what was seen of the answer.
            until_s: time on the event loop's clock until which it may take.

        Raises:
            Unavailable: it cannot be written.
            DeadlineExceeded: it is not written in time.
        """
        if self._log is None:
            return await asyncio.to_thread(lambda: canonical(testimony.record()))
        record = await asyncio.to_thread(testimony.record)
        try:
            async with asyncio.timeout_at(until_s):
                line = await asyncio.wrap_future(self._log.append(record))
        except TimeoutError:
            self._metrics.evidence_failures.inc()
            raise DeadlineExceeded("the deadline passed before the evidence record was written") from None
        except CamserveError:
            self._metrics.evidence_failures.inc()
            raise
        self._metrics.evidence_records.inc()
        return line

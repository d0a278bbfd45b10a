"""Shows a caller one request while its steps come and go, as an asynchronous iterator over what is known."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from camserve.errors import CamserveError
from camserve.finalise.results import Results, Snapshot
from camserve.types import Cost
from camserve.types.request import FittedRequest


@dataclass(frozen=True)
class Origin:
    """The call by which a request came."""

    request_id: str = ""
    span: Any = None
    """Span of the call, as `Tracing.current` returned it."""


NOWHERE = Origin()
"""The origin of a request that came by no call."""


class Run:
    """A request that a planner has taken on. Each `async for` over it yields a `Snapshot` after each change.

    The last snapshot is complete. States that nobody waited for are skipped, so that a slow reader sees the newest one.
    Several callers may follow one run, each at its own pace.

    Args:
        fitted: the request.
        began_s: time of its arrival, on the event loop's clock.
        deadline_s: time from which on nobody waits for it, on the same clock.
        origin: the call by which it came.
    """

    def __init__(self, fitted: FittedRequest, began_s: float, deadline_s: float, origin: Origin = NOWHERE) -> None:
        self.fitted = fitted
        self.origin = origin
        self.deadline_s = deadline_s
        self.results = Results(fitted)
        self.error: CamserveError | None = None
        self.complete = False
        self.merging = 0
        """Number of answers whose sums are being merged."""
        self.followers = 0
        """Number of callers that are inside of `Dispatcher.running` for the run."""
        self._changes: set[asyncio.Event] = set()
        self._began_s = self._ended_s = began_s
        self._sent = False

    async def __aiter__(self) -> AsyncIterator[Snapshot]:
        changed = asyncio.Event()
        changed.set()  # one who joins late learns at once what is known
        self._changes.add(changed)
        try:
            while True:
                await changed.wait()
                changed.clear()
                if self.error is not None:
                    raise self.error
                if self.results.opening is None:
                    continue
                last = self.complete  # it may become complete while the caller looks at this state
                yield self.results.snapshot()
                if last:
                    return
        finally:
            self._changes.discard(changed)

    def waited_s(self, now_s: float) -> float | None:
        """Returns how long the request has waited for its first work to be sent; None from the second time on."""
        first, self._sent = not self._sent, True
        return now_s - self._began_s if first else None

    def wake(self) -> None:
        """Wakes those who iterate, since something has come in."""
        for changed in self._changes:
            changed.set()

    def finish(self, now_s: float) -> None:
        """Notes that everything has come in."""
        self.complete = True
        self._ended_s = now_s
        self.wake()

    def fail(self, error: CamserveError) -> None:
        """Notes that the request will not be answered; the first error counts."""
        self.error = self.error or error
        self.wake()

    def cost(self, render_s: float) -> Cost:
        """Returns the cost of the request, with the seconds that the making of its maps took."""
        return self.results.cost(self._ended_s - self._began_s, render_s)

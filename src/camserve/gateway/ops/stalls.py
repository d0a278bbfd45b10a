"""Measures by how much the event loop is late: while one thing keeps it busy, nobody else is served."""

from __future__ import annotations

import asyncio

from camserve.gateway.ops.metrics import Metrics

_EVERY_S = 0.05


async def measure_stalls(metrics: Metrics) -> None:
    """Sleeps again and again, and records how much later than asked it woke; runs until it is cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        due_s = loop.time() + _EVERY_S
        await asyncio.sleep(_EVERY_S)
        metrics.event_loop_stall_seconds.observe(max(0.0, loop.time() - due_s))

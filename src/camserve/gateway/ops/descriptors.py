"""Says in the log that file descriptors run out: new connections wait then, and nothing else tells."""

from __future__ import annotations

import asyncio
import logging
import os
import resource

_log = logging.getLogger(__name__)

FEW = 1024
"""Limit below which a start says that it is low; it is the usual one."""

_SCARCE, _ENOUGH = 0.9, 0.8
"""Shares of the limit from which on descriptors are scarce, and below which they are so no longer."""


async def watch_descriptors(every_s: float) -> None:
    """Looks for ever, with pauses of `every_s` seconds, whether there are descriptors enough."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return
    if limit < FEW:
        _log.warning(
            "only %d files and connections may be open at a time (ulimit -n); %d or more are usual", limit, FEW
        )
    scarce = False
    while True:
        used = lowest_free(limit)
        if used >= _SCARCE * limit and not scarce:
            scarce = True
            _log.warning(
                "%d of %d file descriptors are in use: new connections wait; raise the limit "
                "(ulimit -n, LimitNOFILE= of systemd) or have clients keep fewer connections",
                *(used, limit),
            )
        elif used < _ENOUGH * limit and scarce:
            scarce = False
            _log.info("there are file descriptors enough again: %d of %d are in use", used, limit)
        await asyncio.sleep(every_s)


def lowest_free(limit: int) -> int:
    """Returns the lowest number that no descriptor has, which is about how many there are; `limit` where none is free.

    It takes the same time however many there are, and works when there are none left.
    """
    try:
        free = os.open(os.devnull, os.O_RDONLY)
    except OSError:
        return limit
    os.close(free)
    return free

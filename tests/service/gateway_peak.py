"""Runs a gateway with its fake upstream in a process of its own, so that its memory is the gateway's alone.

It prints its address once it is ready, and its peak of resident memory in bytes for each line that it reads.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from pathlib import Path

from camserve.gateway.ops.settings import Settings
from camserve.gateway.pool.discovery import fixed
from camserve.gateway.pool.fake import FakeBackend
from camserve.gateway.server import Gateway


def peak() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


async def main() -> None:
    settings = Settings(listen="127.0.0.1:0", metrics_listen="off", poll_s=0.05, **json.loads(sys.argv[1]))
    async with Gateway(settings, fixed({"fake": FakeBackend()})) as gateway:
        await gateway.wait_ready(60)
        print(gateway.address, flush=True)
        while await asyncio.to_thread(sys.stdin.readline):
            print(peak(), flush=True)


if __name__ == "__main__":
    asyncio.run(main())

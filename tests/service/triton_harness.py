"""Runs the unmodified tritonclient, by `triton_program.py` or `triton_http_program.py`, against a server of ours."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

GRPC = Path(__file__).with_name("triton_program.py")
HTTP = Path(__file__).with_name("triton_http_program.py")


async def triton(
    address: str, image: bytes, folder: Path, program: Path = GRPC, **asked: Any
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What tritonclient found, and its arrays."""
    path, out = folder / "photo", folder / "out.npz"
    path.write_bytes(image)
    asked = {"address": address, "model": "fake", "image": str(path), "out": str(out), **asked}
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(program), json.dumps(asked), stdout=asyncio.subprocess.PIPE
    )
    printed, _ = await process.communicate()
    assert process.returncode == 0
    with np.load(out) as loaded:
        return json.loads(printed), dict(loaded)

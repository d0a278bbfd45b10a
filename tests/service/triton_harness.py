"""Runs `triton_program.py`, the unmodified tritonclient, against a server of ours."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

PROGRAM = Path(__file__).with_name("triton_program.py")


async def triton(
    address: str, image: bytes, folder: Path, **asked: Any
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What tritonclient found, and its arrays."""
    path, out = folder / "photo", folder / "out.npz"
    path.write_bytes(image)
    asked = {"address": address, "model": "fake", "image": str(path), "out": str(out), **asked}
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(PROGRAM), json.dumps(asked), stdout=asyncio.subprocess.PIPE
    )
    printed, _ = await process.communicate()
    assert process.returncode == 0
    with np.load(out) as loaded:
        return json.loads(printed), dict(loaded)

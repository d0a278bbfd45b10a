"""Keeps in a file what was measured of a network's runtimes, so that a worker that starts again need not measure again.

It holds for the weights, the layer, the device, the processor, its threads and the versions of the packages that
compute; each combination has a file of its own. A file that cannot be read or written means that it is measured again.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch

from camserve.runtimes import onnx

MEASURES = "passes with masks blended, in one thread where the runtime has its own"
"""Names what the seconds in a file are of; those of others are not read."""
CPU = Path("/proc/cpuinfo")
_CPU_DEVICE = torch.device("cpu")


class Kept:
    """Keeps what was measured of one network on one machine: texts and numbers by name.

    Args:
        folder: where the files are; None: nothing is kept.
        weights: hash of the network's weights; "": nothing is kept.
        layer: address of the layer whose activations come with the outputs.
        threads: threads that share an operation.
        device: device of the network.
    """

    def __init__(
        self, folder: Path | None, weights: str, layer: str, threads: int, device: torch.device = _CPU_DEVICE
    ) -> None:
        self._file: Path | None = None
        if folder is not None and weights:
            name_of_gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
            computes = (device.type, name_of_gpu, processor(), torch.__version__, onnx.version())
            about = (MEASURES, weights, layer, threads, *computes)
            name = hashlib.blake2b(repr(about).encode(), digest_size=16).hexdigest()
            self._file = folder / f"runtime-{name}.json"

    def read(self) -> dict[str, Any]:
        """Returns what is kept; empty where there is nothing, or nothing that can be read."""
        if self._file is None:
            return {}
        try:
            content = json.loads(self._file.read_bytes())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def write(self, **measured: Any) -> None:
        """Keeps what was measured, beside what is kept under other names.

        Where the folder cannot be written, as in some containers, nothing is kept.
        """
        if self._file is None:
            return
        content = self.read() | measured
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            # Renamed when it is whole, because several workers of a model start at once.
            with tempfile.NamedTemporaryFile("w", dir=self._file.parent, suffix=".json", delete=False) as file:
                json.dump(content, file)
            os.replace(file.name, self._file)
        except OSError:
            return


def cache_folder() -> Path | None:
    """Returns the folder of what may be deleted at any time: `CAMSERVE_CACHE`, else in the user's own cache.

    Returns:
        None for a user without a home, as in a container that runs as a number.
    """
    if named := os.environ.get("CAMSERVE_CACHE"):
        return Path(named)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "camserve"
    except RuntimeError:
        return None


def processor() -> str:
    """Returns what tells one kind of processor from another: name, flags, number of cores."""
    lines = CPU.read_text(errors="replace").splitlines() if CPU.exists() else [platform.processor()]
    told = dict.fromkeys(line for line in lines if line.startswith(("model name", "flags", "Features")))
    return repr((platform.machine(), os.cpu_count(), torch.backends.cpu.get_cpu_capability(), list(told)))

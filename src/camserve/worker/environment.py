"""Says what a worker computes with: whatever may change the last bits of a map, beside the request itself."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict
from functools import lru_cache
from importlib import metadata

import torch

from camserve import __version__
from camserve.runtimes.kept import CPU
from camserve.worker.network import Network

_LIBRARIES = ("torch", "numpy", "onnxruntime", "Pillow", "scipy", "scikit-image")


def described(network: Network) -> str:
    """Returns, as JSON: versions, processor and its instructions, device, threads, the number of queries of a
    reproducible pass, and under "preprocessing" how an image becomes the network's input."""
    said = dict(_software())
    said |= {"processor": processor(), "instructions": torch.backends.cpu.get_cpu_capability()}
    said |= {"device": _device(network.device), "threads": str(torch.get_num_threads())}
    said |= {"pass": str(network.reproducible_pass)}
    return json.dumps(said | {"preprocessing": asdict(network.preprocessing)}, sort_keys=True)


@lru_cache
def processor() -> str:
    """Returns the name of the processor, and a short hash of all that it can do."""
    lines = CPU.read_text(errors="replace").splitlines() if CPU.exists() else []
    said = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    abilities = hashlib.blake2b(said.get("flags", said.get("Features", "")).encode(), digest_size=4).hexdigest()
    return f"{said.get('model name') or platform.processor() or platform.machine()} ({abilities})"


@lru_cache
def _software() -> tuple[tuple[str, str], ...]:
    """Returns the versions of camserve, Python and libraries by name; those that are not installed are left out."""
    found = [("camserve", __version__), ("python", platform.python_version())]
    for name in _LIBRARIES:
        try:
            found.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            continue
    return tuple(found)


def _device(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]  # it has no types
    return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}, cuDNN {cudnn}"

"""Does what every benchmark needs: times cases in turns, describes the machine, writes JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch

PACKAGES = ("camserve", "torch", "torchvision", "grad-cam", "torchcam", "numpy")
Result = TypeVar("Result")
VECTORS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "bf16")
"""Flags of instructions that decide how fast a network runs; two machines may differ in nothing else."""
REST_S = 0.1
"""Seconds between two calls: threads of OpenMP, OpenBLAS and ONNX Runtime spin for up to half of that after work."""
BEFORE_EACH_S = 0.05
"""Seconds of untimed calls after which a processor that has slept is as fast as it is. A Grad-CAM of EfficientNet-Lite0
takes 9.8, 7.7, 6.9 and 6.4 ms one after the other, and a plain pass 5.4, 4.5, 4.1 and 4.0 (two cores with AVX-512)."""
ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


def in_turns(
    cases: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    warm: bool = False,
    before_each_s: float = 0.0,
) -> dict[str, list[float]]:
    """Returns the seconds of each case: one untimed call each, then `rounds` calls, the cases taking turns.

    Whatever slows the machine down for a while then slows all cases, and their ratios stay true. Every other round runs
    backwards, so that no case always follows the same one, and before each call the threads of the one before come to
    rest. Cases that are warm have had their untimed call already. Each timed call follows untimed ones of the same case
    for `before_each_s` seconds: a processor that has just slept takes that long to be as fast as it is.
    """
    if not warm:
        for case in cases.values():
            case()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(rounds):
        order = list(cases) if turn % 2 == 0 else list(cases)[::-1]
        for name in order:
            time.sleep(REST_S)
            started = time.perf_counter()
            while time.perf_counter() - started < before_each_s:
                cases[name]()
            seconds[name].append(timed(cases[name], device)[0])
    return seconds


def timed(case: Callable[[], Result], device: torch.device) -> tuple[float, Result]:
    """Returns the seconds of one call, and what it returned."""
    wait_for(device)
    start = time.perf_counter()
    result = case()
    wait_for(device)
    return time.perf_counter() - start, result


def wait_for(device: torch.device) -> None:
    """Returns when a GPU has done what it was given; calls return before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summary(seconds: Mapping[str, Sequence[float]], ours: str) -> dict[str, dict[str, Any]]:
    """Returns median, fastest and slowest call of each case, and how many times as long as `ours` it takes."""
    reference = statistics.median(seconds[ours])
    return {
        name: {
            "median_s": statistics.median(taken),
            "min_s": min(taken),
            "max_s": max(taken),
            "rounds": len(taken),
            f"times_{ours}": statistics.median(taken) / reference,
        }
        for name, taken in seconds.items()
    }


def environment(device: torch.device) -> dict[str, Any]:
    """Returns machine, versions and commit: a figure without them means nothing."""
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "cpu": _processor(),
        "cpu_cores": os.cpu_count(),
        "cpu_flags": _flags(),
        "load_average": os.getloadavg()[0],
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def made_with(environment: Mapping[str, Any]) -> str:
    """Returns versions and commit of an environment, for the line below a table."""
    versions = ", ".join(f"{name} {environment['versions'][name]}" for name in ("camserve", "torch"))
    return f"{versions}; {named(environment['commit'])}"


def named(commit: str) -> str:
    """Returns what tables call a commit, given as the function `commit` returns it."""
    name, changes, _ = commit.partition("+")
    return f"commit {name[:12]}{' with changes' if changes else ''}"


def write(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def embedded(readme: str, name: str, text: str) -> str:
    """Returns the README with the text between `<!-- name: begin -->` and `<!-- name: end -->` made anew."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, rest = readme.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def _processor() -> str:
    """Returns the processor's name: Linux has it in /proc/cpuinfo, others in `platform`."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _flags() -> list[str]:
    return [flag for flag in VECTORS if flag in (_cpuinfo("flags") or _cpuinfo("Features")).split()]


def _cpuinfo(field: str) -> str:
    """Returns what the first processor says of a field; empty where the system has no /proc/cpuinfo."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), "")


def commit() -> str:
    """Returns the commit, with `+changes` when the working tree differs from it; empty outside a repository."""
    try:
        head = _git("rev-parse", "HEAD")
        return head + ("+changes" if _git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""

"""Measures how much memory a call needs at its peak, beyond what the process had before."""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

Result = TypeVar("Result")
_SELF = Path("/proc/self")


@dataclass(frozen=True)
class Peak:
    """Holds the bytes that a call needed at its peak, None where nobody can tell."""

    beyond_start: int | None
    """Beyond what was there before."""
    beyond_floor: int | None
    """Beyond what another call, made just before it, needed at its own peak."""


def peak_of(
    case: Callable[[], Result], device: torch.device, floor: Callable[[], object] = lambda: None
) -> tuple[Peak, Result]:
    """Returns what a call needs at its peak, and what it returns; `floor` is the call made just before it.

    On a GPU the bytes are those of tensors, on Linux those of resident pages. What the process holds but does not use
    is given back to the system first, else a call could fill it unseen; a runtime with an arena of its own keeps that.
    """
    before = _start(device)
    floor()
    lowest = _peak(device)
    result = case()
    now = _peak(device)
    return Peak(_difference(now, before), _difference(now, lowest)), result


def _difference(now: int | None, before: int | None) -> int | None:
    return None if now is None or before is None else max(0, now - before)


def _start(device: torch.device) -> int | None:
    """Begins a new peak, and returns the bytes that are there."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with contextlib.suppress(OSError):
        (_SELF / "clear_refs").write_text("5")
    return _status("VmRSS")


def _peak(device: torch.device) -> int | None:
    """Returns the most bytes that were there since `_start`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(field: str) -> int | None:
    try:
        found = re.search(rf"{field}:\s+(\d+) kB", (_SELF / "status").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None

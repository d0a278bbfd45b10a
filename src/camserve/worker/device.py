"""Tells how much memory the device of a worker has, and how much of it is in use."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from camserve.cgroup import memory_limit
from camserve.types import DeviceMemory

_RESIDENT = Path("/proc/self/statm")


def device_memory(device: torch.device) -> DeviceMemory | None:
    """Returns what all processes use of a GPU, or this process of a CPU's memory; None for devices that do not tell."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        index = torch.cuda.current_device() if device.index is None else device.index
        return DeviceMemory(f"cuda:{index}", total - free, total)
    used = resident_bytes() if device.type == "cpu" else None
    return None if used is None else DeviceMemory("cpu", used, limit_bytes(memory_limit()))


def resident_bytes(statm: Path = _RESIDENT) -> int | None:
    """Returns the memory of this process that is in RAM; None where the system does not say so in /proc."""
    try:
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def limit_bytes(limit: int | None) -> int:
    """Returns the memory of the machine, or of its part that the limit of the container leaves, if it has one."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return machine if limit is None else min(machine, limit)

"""Tells how much memory the device of a worker has and how much of it is in use, and whether the device still works."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import torch

from camserve.cgroup import memory_limit
from camserve.errors import INTERNAL_MESSAGE, Internal
from camserve.runtimes.memory import is_out_of_memory
from camserve.types import DeviceMemory

_RESIDENT = Path("/proc/self/statm")


class BrokenDevice(Internal):
    """The device of the worker answers nothing any more, not even the smallest operation: only a new process helps."""

    def __init__(self) -> None:
        super().__init__(INTERNAL_MESSAGE)


def free_cached(device: torch.device) -> None:
    """Gives memory that PyTorch keeps for later back to a device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def works(device: torch.device) -> bool:
    """Returns whether a device still makes the smallest operation; one without memory to spare does.

    After some errors (an illegal access, a failed assertion in a kernel) every later call of CUDA in the process fails.
    Their texts and types differ from release to release, so that only trying tells.
    """
    try:
        torch.ones(1, device=device).add_(1).item()  # `item` waits for the device
    except Exception as error:
        return is_out_of_memory(error)
    return True


def device_memory(device: torch.device) -> DeviceMemory | None:
    """Returns what all processes use of a GPU, or this process of a CPU's memory; None for devices that do not tell."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        index = torch.cuda.current_device() if device.index is None else device.index
        return DeviceMemory(f"cuda:{index}", total - free, total)
    used = resident_bytes() if device.type == "cpu" else None
    return None if used is None else DeviceMemory("cpu", used, _own_limit_bytes())


@cache
def _own_limit_bytes() -> int:
    """Returns `limit_bytes` of this process, read once: reading it takes nine files, in each step."""
    return limit_bytes(memory_limit())


def resident_bytes(statm: Path = _RESIDENT) -> int | None:
    """Returns the memory of this process that is in RAM; None where the system does not say so in /proc."""
    try:
        file = os.open(statm, os.O_RDONLY)  # without what Python puts around a file it takes a third of the time
        try:
            return int(os.read(file, 256).split()[1]) * os.sysconf("SC_PAGE_SIZE")
        finally:
            os.close(file)
    except (OSError, ValueError, IndexError):
        return None


def limit_bytes(limit: int | None) -> int:
    """Returns the memory of the machine, or of its part that the limit of the container leaves, if it has one."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return machine if limit is None else min(machine, limit)

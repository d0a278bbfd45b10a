"""Has the C library give freed memory back to the system, so that the memory of the process is what is in use."""

from __future__ import annotations

import ctypes
import sys

# From glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_MIB = 2**20


def give_memory_back() -> None:
    """Sets glibc's malloc for large blocks that come and go in many threads; does nothing with other C libraries.

    By default blocks of up to 32 MiB stay with the process once such a block was freed, in up to eight heaps for each
    core: a burst of large messages then counts long after it has gone.
    """
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return
    libc.mallopt(_MMAP_THRESHOLD, _MIB)
    libc.mallopt(_TRIM_THRESHOLD, 16 * _MIB)
    libc.mallopt(_ARENA_MAX, 2)

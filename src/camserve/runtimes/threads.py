"""Bounds the threads that PyTorch divides an operation among, in the calling thread alone.

PyTorch's threads spin for some milliseconds after each operation, on the cores that a runtime with threads of its own
needs next: a pass of EfficientNet-Lite0 by ONNX Runtime takes 5.8 instead of 8.3 ms where the masks before it were
blended in one thread. Small tensors are worked on faster so anyway.

`torch.set_num_threads` is no help: a thread that begins meanwhile keeps its number for good. What is set here are the
numbers that OpenMP and MKL have for each thread.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

_outer = threading.local()


@contextmanager
def one_thread() -> Iterator[None]:
    """Has PyTorch work in the calling thread alone inside, as far as it was built with OpenMP."""
    before = torch.get_num_threads()
    outermost = not hasattr(_outer, "number")
    if outermost:
        _outer.number = before
    _set(1)
    try:
        yield
    finally:
        _set(before)
        if outermost:
            del _outer.number


@contextmanager
def all_threads() -> Iterator[None]:
    """Has PyTorch work in as many threads as before the outermost `one_thread`: inside that, where it runs layers."""
    before = torch.get_num_threads()
    _set(getattr(_outer, "number", before))
    try:
        yield
    finally:
        _set(before)


def _set(number: int) -> None:
    libraries = _libraries()
    if torch.get_num_threads() != number and hasattr(libraries, "omp_set_num_threads"):
        libraries.omp_set_num_threads(number)
        if hasattr(libraries, "MKL_Set_Num_Threads_Local"):
            # 0 is the number of the whole process again, which is PyTorch's own.
            libraries.MKL_Set_Num_Threads_Local(1 if number == 1 else 0)


@cache
def _libraries() -> ctypes.CDLL:
    """Returns what PyTorch has loaded: a name is looked up in all that its extension module depends on."""
    return ctypes.CDLL(torch._C.__file__)

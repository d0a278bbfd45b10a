"""Holds modes of the whole process that several threads need at once, and leaves them as they were found."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class Shared:
    """Holds a state that the first of several threads enters and the last one leaves.

    Args:
        enter: function that brings the state about and returns the function that undoes it.
    """

    def __init__(self, enter: Callable[[], Callable[[], None]]) -> None:
        self._enter = enter
        self._lock, self._inside = threading.Lock(), 0
        self._undo: Callable[[], None] = lambda: None

    def hold(self) -> None:
        """Makes the state hold until the process ends, so that entering it once more costs nothing."""
        with self._lock:
            if self._inside == 0:
                self._enter()
            self._inside += 1

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Makes the state hold inside."""
        with self._lock:
            if self._inside == 0:
                self._undo = self._enter()
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    self._undo()


def _forbid_rounding() -> Callable[[], None]:
    gpus = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)  # type: ignore[attr-defined]  # set at run time
    backends = (*gpus, torch.backends.mkldnn.conv, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"

    def undo() -> None:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision

    return undo


exact_float32 = Shared(_forbid_rounding)
"""Context manager inside which float32 is float32, whatever is set: convolutions and matrix products round nothing to
TF32 on GPUs, nor to bfloat16 on CPUs, as they do after `torch.set_float32_matmul_precision("medium")`."""


def _forbid_chance() -> Callable[[], None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    return lambda: torch.use_deterministic_algorithms(before[0], warn_only=before[1])


deterministic = Shared(_forbid_chance)
"""Context manager inside which a GPU adds up in the same order each time, where PyTorch has a way to."""

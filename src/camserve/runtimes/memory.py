"""Tells whether memory ran out, whichever library says so."""

from __future__ import annotations

import torch

_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "_STATUS_ALLOC_FAILED",
    "Failed to allocate memory",
    "bad allocation",
    "std::bad_alloc",
)
"""Fragments of the texts that say that memory ran out: PyTorch's of CUDA, of the CPU, of cuBLAS and cuDNN; ONNX
Runtime's."""


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an exception says that memory ran out, of the device or of the process."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)

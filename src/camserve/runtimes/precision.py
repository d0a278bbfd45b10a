"""Finds out what precision "auto" is: bfloat16 only where it is seen to be faster and to leave maps as they are."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from camserve.runtimes.kept import CPU
from camserve.types import Precision

CORRELATION = 0.99
"""Least rank correlation of a map with the one of PyTorch in float32."""
FASTER = 0.9
"""Most of the time of float32 that bfloat16 may take to be worth its rounding."""
_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Flags of processors (x86, x86, ARM) that multiply in bfloat16; others are 15 to 50 times slower than in float32."""


def why_no_bfloat16(device: torch.device) -> str:
    """Returns why a device does not compute in bfloat16; "" where it does."""
    if device.type == "cuda":
        return "" if torch.cuda.is_bf16_supported(including_emulation=False) else "the GPU has no bfloat16 instructions"
    if device.type != "cpu":
        return f"nothing is known of bfloat16 on {device.type}"
    lines = CPU.read_text(errors="replace").splitlines() if CPU.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return "" if _FLAGS & set(flags.split()) else f"the processor ({platform.machine()}) has no bfloat16 instructions"


@dataclass(frozen=True)
class Auto:
    """Says what precision "auto" is."""

    precision: Precision
    reason: str = ""
    """Why it is not bfloat16; empty where it is."""


def rank_correlation(expected: np.ndarray, came: np.ndarray) -> float:
    """Returns Spearman's rank correlation of two maps of one shape; 0 where one of them is constant."""
    from scipy.stats import rankdata

    first, second = (rankdata(values.ravel()) for values in (expected, came))
    if not (np.ptp(first) and np.ptp(second)):
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])


def auto_precision(
    seconds: float, seconds_bfloat16: float, maps: Callable[[], Sequence[tuple[np.ndarray, np.ndarray]]]
) -> Auto:
    """Returns what "auto" is where a device computes in bfloat16.

    Args:
        seconds: seconds of a query in float32.
        seconds_bfloat16: the same in bfloat16.
        maps: function that returns maps of calibration images, of PyTorch in float32 and in bfloat16.
    """
    if seconds_bfloat16 > FASTER * seconds:
        return Auto("exact", f"bfloat16 takes {seconds_bfloat16 / seconds:.2f} times as long as float32")
    pairs = maps()
    if not pairs:
        return Auto("exact", "the archive has no calibration images, on which bfloat16 could be compared with float32")
    least = min(rank_correlation(expected, came) for expected, came in pairs)
    if not least >= CORRELATION:
        return Auto(
            "exact", f"a map in bfloat16 has rank correlation {least:.3f} with float32; {CORRELATION} is needed"
        )
    return Auto("bfloat16")

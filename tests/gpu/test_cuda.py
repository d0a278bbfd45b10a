"""The same maps on a CUDA device as on the CPU, and memory that the micro-batch bounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import TINY_LABELS, TINY_SIZE, pixels, tiny_module

from camserve import Engine
from camserve.errors import Unsupported
from camserve.methods import METHODS
from camserve.types import Preprocessing
from camserve.worker.device import device_memory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PREPROCESSING = Preprocessing(resize_px=64, crop_px=TINY_SIZE, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def engine(device: str, micro_batch: int = 16) -> Engine:
    return Engine(
        tiny_module(), preprocessing=PREPROCESSING, labels=TINY_LABELS, device=device, micro_batch=micro_batch
    )


@pytest.mark.parametrize("method", METHODS)
def test_the_map_is_the_cpus(method):
    """float32 on both; sums in another order."""
    asked = {"methods": [(method, {"groups": 6} if method == "group_cam" else {})], "targets": [0, 3]}
    try:
        expected = engine("cpu").explain(pixels(0), **asked)
    except Unsupported:
        pytest.skip(f"{method} cannot explain this network")
    for ours, theirs in zip(engine("cuda").explain(pixels(0), **asked).maps, expected.maps, strict=True):
        np.testing.assert_allclose(ours.array, theirs.array, atol=1e-4)


def test_tf32_of_the_process_does_not_reach_exact_maps():
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        ours = engine("cuda").explain(pixels(1), ["score_cam"]).maps[0].array
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    np.testing.assert_allclose(ours, engine("cpu").explain(pixels(1), ["score_cam"]).maps[0].array, atol=1e-4)


def test_a_worker_says_how_much_of_the_gpu_is_in_use():
    found = device_memory(torch.device("cuda"))
    assert found is not None
    assert found.device == f"cuda:{torch.cuda.current_device()}"
    assert 0 < found.used_bytes < found.limit_bytes


def test_memory_follows_the_micro_batch_and_not_the_number_of_queries():
    def peak(micro_batch: int) -> int:
        explain = engine("cuda", micro_batch)
        explain.explain(pixels(0), ["score_cam"])
        torch.cuda.reset_peak_memory_stats()
        explain.explain(pixels(0), ["score_cam"])
        return torch.cuda.max_memory_allocated()

    assert peak(1) < peak(12)

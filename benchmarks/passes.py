"""Measures plain forward passes in every runtime, and tells what the passes of a row must cost at least."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from typing import Any

import common
import torch
from subjects import Bench
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from camserve.runtimes.modes import exact_float32
from camserve.runtimes.threads import one_thread
from camserve.types import Precision

Forward = Callable[[Tensor], object]
EXACT, AUTO, PYTORCH, ONNX = "camserve exact", "camserve auto", "PyTorch", "ONNX Runtime"
BATCHES = {"cpu": (1, 2, 4, 8, 16, 32), "cuda": (1, 4, 16, 64, 128, 256)}
LONG_S = 2.0
"""Seconds of one call after which no larger batch is tried."""
PRODUCTS = {"cpu": (1024, 2048), "cuda": (4096, 8192)}
"""Sizes of square matrices whose product is timed."""
OF_PIXELS = ("integrated_gradients", "xrai")
"""Rows whose queries are passes with gradients of the pixels."""
OF_TAILS = ("ablation_cam",)
"""Rows whose queries go through the last layers alone; their limit is one pass."""


def plain(bench: Bench) -> dict[str, Forward]:
    """Returns what makes plain forward passes: camserve's network, PyTorch as it comes, ONNX Runtime where it is.

    The last two are set up here and not by camserve, so that a runtime that camserve chose badly is seen.
    """
    found: dict[str, Forward] = {EXACT: partial(scores, bench, "exact")}
    if (precision := bench.engine.info.runtime.precision) != "exact":
        found[AUTO] = partial(scores, bench, precision)
    found[PYTORCH] = partial(_eager, bench.theirs)
    if bench.device.type == "cpu" and find_spec("onnxruntime"):
        found[ONNX] = _onnx(bench)
    return found


def scores(bench: Bench, precision: Precision, x: Tensor) -> Tensor:
    """Returns the outputs of camserve's network, in whichever runtime it has chosen."""
    network = bench.engine.network
    runtime = network.runtime_of(precision)
    threads = one_thread() if runtime.own_threads else nullcontext()
    with network.evaluating(), exact_float32(), threads, torch.inference_mode():
        return network.scores(x.contiguous(memory_format=runtime.memory_format), precision)


@torch.inference_mode()
def _eager(module: nn.Module, x: Tensor) -> Tensor:
    with exact_float32():  # as it comes a GPU would convolve in TF32, which is no float32
        return module(x)


def _onnx(bench: Bench) -> Forward:
    """Returns a forward pass of ONNX Runtime with its own settings, on the threads that PyTorch uses."""
    import onnxruntime

    file, fast = io.BytesIO(), torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # an operator of PyTorch's own, which ONNX does not have
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer's, about shapes that are the same for every image
            axes = {"x": {0: "images"}, "y": {0: "images"}}
            names: dict[str, Any] = {"input_names": ["x"], "output_names": ["y"], "dynamic_axes": axes}
            torch.onnx.export(bench.theirs, (bench.x,), file, dynamo=False, **names)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x.cpu().numpy()})


def described(bench: Bench) -> dict[str, Any]:
    """Returns what is known of a network before its maps are made: its size, its rates, and the machine's."""
    return {
        "runtime": asdict(bench.engine.info.runtime),
        "layer": bench.layer,
        "channels": bench.channels,
        "input_px": list(bench.x.shape[-2:]),
        "micro_batch": bench.engine.network.micro_batch,
        "parameter_bytes": sum(each.nbytes for each in bench.theirs.parameters()),
        "flops": operations(bench, gradient=False),
        "flops_with_gradient": operations(bench, gradient=True),
        "product_flops_per_s": product_rate(bench.device),
        "rates": rates(bench),
    }


def operations(bench: Bench, gradient: bool) -> int:
    """Returns the floating-point operations of one forward pass, or of one with the gradient of its pixels."""
    weights = [weight for weight in bench.theirs.parameters() if weight.requires_grad]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its one operator would not be counted
    for weight in weights:
        weight.requires_grad_(False)
    try:
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(gradient):
            outputs = bench.theirs(bench.x.clone().requires_grad_(gradient))
            if gradient:
                outputs[0, bench.targets[0]].backward()
    finally:
        for weight in weights:
            weight.requires_grad_(True)
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops()


def product_rate(device: torch.device, calls: int = 8) -> float:
    """Returns the floating-point operations per second of the fastest large float32 matrix product."""
    best = 0.0
    with exact_float32(), torch.inference_mode():
        for size in PRODUCTS[device.type]:
            one, other = torch.rand(2, size, size, device=device)
            seconds = common.in_turns({"product": lambda one=one, other=other: one @ other}, calls, device)["product"]
            best = max(best, 2 * size**3 / min(seconds))
    return best


def rates(bench: Bench) -> dict[str, dict[str, float]]:
    """Returns plain forward passes, in images a second, by who makes them and by batch size."""
    ways = plain(bench)
    found: dict[str, dict[str, float]] = {name: {} for name in ways}
    for batch in BATCHES[bench.device.type]:
        x = bench.x.repeat(batch, 1, 1, 1)
        seconds = common.in_turns(
            {name: partial(way, x) for name, way in ways.items()},
            max(2, min(5, 16 // batch)),
            bench.device,
            before_each_s=common.BEFORE_EACH_S,
        )
        for name, taken in seconds.items():
            found[name][str(batch)] = batch / min(taken)
        if max(map(min, seconds.values())) > LONG_S:
            break
    return found


def best_batch(rate: Mapping[str, float]) -> int:
    """Returns the batch size with the most images a second."""
    return int(max(rate, key=rate.__getitem__))


def fastest(rates: Mapping[str, Mapping[str, float]]) -> tuple[str, int]:
    """Returns who makes most plain forward passes a second in float32, and with which batch size."""
    best = {name: best_batch(rate) for name, rate in rates.items() if name != AUTO}
    return max(best.items(), key=lambda one: rates[one[0]][str(one[1])])


def best_rate(network: Mapping[str, Any]) -> float:
    """Returns the most images a second that any float32 runtime makes of plain forward passes."""
    who, batch = fastest(network["rates"])
    return network["rates"][who][str(batch)]


def limits(row: str, queries: int, network: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the passes of a row and what they must take: at the processor's limit, and at the best rate.

    Args:
        row: name of the method.
        queries: what the answer says that it asked, the first forward pass not counted.
        network: what `described` returned.
    """
    asked = 0 if row in OF_TAILS else queries
    once, each = network["flops"], network["flops_with_gradient" if row in OF_PIXELS else "flops"]
    return {
        "queries": queries,
        "passes": 1 + asked,
        "limit_s": (once + asked * each) / network["product_flops_per_s"],
        "best_rate_s": None if row in OF_PIXELS else (1 + asked) / best_rate(network),
    }

"""Chooses the runtime of a network, and how many queries share a pass, by measuring on this machine."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from camserve.errors import InvalidOption, Unsupported
from camserve.runtimes.kept import Kept
from camserve.runtimes.onnx import OnnxRuntime
from camserve.runtimes.runtime import Eager, Runtime
from camserve.saliency.layers import FoundLayer
from camserve.saliency.masks import upsample
from camserve.saliency.opening import Opening
from camserve.wording import shown

log = logging.getLogger(__name__)

RuntimeName = Literal["auto", "eager", "onnx"]
RUNTIMES: tuple[RuntimeName, ...] = get_args(RuntimeName)
"""The names that `CAMSERVE_RUNTIME` may have; "auto" is the fastest one that is right."""

SAME = 1e-3
"""Share of the spread (standard deviation) of PyTorch's numbers by which those of another runtime may differ: rounding
of float32 is a hundredth of it, and another operator is far more."""
BUDGET_S = 20.0
"""Seconds that measuring may take."""
SIZES = (1, 2, 4, 8, 16)
"""Queries of a pass that are measured on CPUs."""
ROUNDS, MOST_ROUNDS = 3, 10
"""Passes of a size that are timed, at least and at most; the fastest counts, since whatever else runs can only add."""
ROUNDS_S = 0.25
"""Seconds after which no more than the least number of passes of a size are timed."""
MASK_PX = 7
"""Sides of the masks that are blended for each pass: those of the last layer of most networks."""
EQUAL = 1.05
"""Times as long that a query may take in a smaller pass that is preferred: a small pass takes less memory and lets
others go first."""


@dataclass(frozen=True)
class Measured:
    """Says how long a query takes in passes of one size."""

    runtime: str
    micro_batch: int
    seconds: float

    @staticmethod
    def read(content: Any) -> Measured | None:
        """Returns what a kept value says; None where it says nothing."""
        try:
            found = Measured(str(content["runtime"]), int(content["micro_batch"]), float(content["seconds"]))
        except (KeyError, TypeError, ValueError):
            return None
        return found if 1 <= found.micro_batch <= 2**16 else None


def measure(
    runtime: Runtime,
    image: Tensor,
    sizes: Sequence[int],
    budget_s: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Measured]:
    """Yields how long a masked query takes in passes of each size, as long as time suffices and larger ones are faster.

    Masks are blended anew for each pass, as they are when queries are asked: PyTorch's threads, which do that, stay on
    the cores for a while, and a runtime with threads of its own is slower there than by itself.

    Args:
        runtime: the runtime.
        image: (1, C, H, W).
        sizes: queries of a pass, ascending; the first is measured whatever it takes.
        budget_s: seconds that all may take.
        clock: function that returns seconds.
    """
    end, last, least = clock() + budget_s, 0.0, float("inf")
    for size in sizes:
        if last * size * (1 + ROUNDS) > end - clock():
            return
        first, *further = _timed(runtime, image, size, end, clock)
        best = min(further, default=first)  # the first pass sets things up
        last = best / size
        yield Measured(runtime.name, size, last)
        if last > least * EQUAL:
            return
        least = min(least, last)


def _timed(runtime: Runtime, image: Tensor, size: int, end: float, clock: Callable[[], float]) -> Iterator[float]:
    masks = torch.linspace(0, 1, size * MASK_PX**2).reshape(size, MASK_PX, MASK_PX).to(image)
    begin = clock()
    for done in itertools.count():
        start = clock()
        late = done > ROUNDS and start > begin + ROUNDS_S
        if done and (start > end or late or done > MOST_ROUNDS):
            return
        with torch.inference_mode():
            runtime.outputs(image * upsample(masks, image.shape[-2:])[:, None])
        yield clock() - start


def fastest(measured: Sequence[Measured]) -> Measured:
    """Returns the one with the least time of a query; of a runtime's sizes the smallest that takes hardly longer."""
    least = min(measured, key=lambda one: one.seconds)
    return min(
        (one for one in measured if one.runtime == least.runtime and one.seconds <= EQUAL * least.seconds),
        key=lambda one: one.micro_batch,
    )


def checked_onnx(module: nn.Module, found: FoundLayer, images: Tensor, threads: int) -> OnnxRuntime:
    """Returns a network's ONNX Runtime, which has been seen to compute what PyTorch does, for several sizes of a pass.

    Args:
        module: in eval mode; nothing is left on it.
        found: what is known of the layer whose activations it returns.
        images: (n, C, H, W) that differ, n at least 3.
        threads: threads that share an operation.

    Raises:
        Unsupported: it does not, or there is none; the text says why.
    """
    onnx = OnnxRuntime(module, found, images[:2], threads)
    eager, fast = Opening(module, found), Opening(module, found, trunk=onnx.trunk)
    for some in (images, images[-1:], images[1:3]):
        try:
            expected, came = eager(some), fast(some)
        except Exception as error:  # whatever it is, the graph does not do what the network does
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise Unsupported(f"ONNX Runtime fails with {len(some)} pictures: {reason}") from error
        for what, ours, theirs in (
            ("outputs", expected.logits, came.logits),
            (f"activations of {found.layer.name}", expected.activations, came.activations),
        ):
            # Not `<=`, so that NaN is a difference; where PyTorch's numbers are all the same, so must be the others.
            if not largest_difference(ours, theirs) <= SAME:
                raise Unsupported(
                    f"ONNX Runtime's {what} differ from PyTorch's by {largest_difference(ours, theirs):.1e} of their "
                    f"spread; {SAME:.0e} is allowed"
                )
    return onnx


def largest_difference(expected: Tensor, came: Tensor) -> float:
    """Returns the largest difference of two tensors, as a share of the spread (standard deviation) of the first."""
    if expected.shape != came.shape:
        return float("inf")
    expected, came = expected.double(), came.double()
    apart, spread = (expected - came).abs().max(), expected.std(correction=0)
    return 0.0 if apart == 0 else float(apart / spread)


def runtime_name(name: str) -> RuntimeName:
    """Returns a name of a runtime; "" is "auto".

    Raises:
        InvalidOption: there is none of this name.
    """
    for each in RUNTIMES:
        if (name or "auto") == each:
            return each
    raise InvalidOption(f"CAMSERVE_RUNTIME must be one of {', '.join(RUNTIMES)}, got {shown(name)}")


@dataclass(frozen=True)
class Choice:
    """Says what runs a network, and why."""

    runtime: Runtime
    micro_batch: int
    """Queries of a pass."""
    seconds: float
    """Seconds of a query in passes of that size."""
    reason: str = ""
    """Why a faster runtime is not there; empty where nothing is missing."""


def choose(
    module: nn.Module,
    found: FoundLayer,
    images: Tensor,
    wanted: RuntimeName,
    threads: int,
    micro_batch: int | None,
    kept: Kept,
    clock: Callable[[], float] = time.perf_counter,
) -> Choice:
    """Returns the runtime of a network on the CPU that asks queries fastest, and the size of its passes.

    Args:
        module: in eval mode; nothing is left on it.
        found: what is known of the default layer, whose activations come with the outputs.
        images: (n, C, H, W) that differ, n at least 3.
        wanted: which runtime; "auto": the fastest.
        threads: threads that share an operation.
        micro_batch: queries of a pass; None: as many as measuring says.
        kept: what was measured before, and is measured again only where something is another.
        clock: function that returns seconds.

    Raises:
        Unsupported: the runtime that is wanted cannot run the network.
    """
    known = Measured.read(kept.read().get("exact"))
    reason = ""
    runtimes: list[Runtime] = [Eager(module)]
    if known is None or known.runtime == OnnxRuntime.name or wanted == OnnxRuntime.name:
        try:
            runtimes.append(checked_onnx(module, found, images, threads))
        except Unsupported as error:
            if wanted == OnnxRuntime.name:
                raise
            reason, known = str(error), None
            log.warning("PyTorch runs the network operation by operation: %s", reason)
    if wanted != "auto":
        runtimes = [one for one in runtimes if one.name == wanted]
    if known is None or known.runtime not in [one.name for one in runtimes]:
        known = fastest(_measured(runtimes, images[:1], (micro_batch,) if micro_batch else SIZES, clock))
        if wanted == "auto" and not micro_batch and not reason:
            kept.write(exact=asdict(known))
    (runtime,) = (one for one in runtimes if one.name == known.runtime)
    return Choice(runtime, micro_batch or known.micro_batch, known.seconds, reason)


def _measured(
    runtimes: Sequence[Runtime], image: Tensor, sizes: Sequence[int], clock: Callable[[], float]
) -> list[Measured]:
    # The reference comes last: where time is short, the one that is likely to be the fastest is measured well.
    share = BUDGET_S / len(runtimes)
    return [one for runtime in reversed(runtimes) for one in measure(runtime, image, sizes, share, clock)]

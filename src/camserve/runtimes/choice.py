"""Chooses the runtime of a network, and how many queries share a pass, by measuring on this machine."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from camserve.errors import InvalidOption, Unsupported
from camserve.runtimes.compiled import Compiled
from camserve.runtimes.cuda_graphs import CudaGraphs
from camserve.runtimes.kept import Kept
from camserve.runtimes.memory import is_out_of_memory
from camserve.runtimes.onnx import OnnxRuntime
from camserve.runtimes.recorded import in_a_line
from camserve.runtimes.runtime import Eager, Runtime, Trunked
from camserve.runtimes.threads import one_thread
from camserve.saliency.layers import FoundLayer
from camserve.saliency.masks import upsample
from camserve.saliency.opening import Opening
from camserve.wording import shown

log = logging.getLogger(__name__)

RuntimeName = Literal["auto", "eager", "onnx", "compiled", "cuda_graphs"]
RUNTIMES: tuple[RuntimeName, ...] = get_args(RuntimeName)
"""The names that `CAMSERVE_RUNTIME` may have; "auto" is the fastest one that is right, and "compiled" the same with
compiled code for bfloat16 on a CPU."""

FAST = {"cpu": OnnxRuntime.name, "cuda": CudaGraphs.name}
"""The runtime by type of device that is measured beside PyTorch."""
TITLES = {OnnxRuntime.name: "ONNX Runtime", Compiled.name: "PyTorch's compiler", CudaGraphs.name: "CUDA graphs"}

SAME = 1e-3
"""Share of the spread (standard deviation) of PyTorch's numbers by which those of another runtime may differ: rounding
of float32 is a hundredth of it, and another operator is far more."""
BUDGET_S = 20.0
"""Seconds that measuring may take."""
SIZES = {"cpu": (1, 2, 4, 8, 16), "cuda": (1, 2, 4, 8, 16, 32, 64, 128, 256)}
"""Queries of a pass that are measured, by type of device."""
FORMAT_SIZES = (1, 32)
"""Queries of a pass by which memory formats are compared; the larger one, where there is memory for it."""
ROUNDS, MOST_ROUNDS = 3, 10
"""Passes of a size that are timed, at least and at most; the fastest counts, since whatever else runs can only add."""
ROUNDS_S = 0.25
"""Seconds after which no more than the least number of passes of a size are timed."""
MASK_PX = 7
"""Sides of the masks that are blended for each pass: those of the last layer of most networks."""
EQUAL = 1.03
"""Times as long that a query may take in a smaller pass that is preferred: a small pass takes less memory and lets
others go first."""
SHORT_S = 0.025
"""Seconds of a pass that is short enough: of those the fastest is taken, since a step has several of them anyway."""
WORSE = 1.05
"""Times as long that a query may take in a larger pass before no larger ones are tried: timings vary by less."""


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
    clock: Callable[[], float] | None = None,
) -> Iterator[Measured]:
    """Yields how long a masked query takes in passes of each size, as long as time and memory suffice and larger ones
    are faster.

    Masks are blended anew for each pass, as they are when queries are asked: PyTorch's threads, which do that, stay on
    the cores for a while, and a runtime with threads of its own is slower there than by itself.

    Args:
        runtime: the runtime.
        image: (1, C, H, W).
        sizes: queries of a pass, ascending; the first is measured whatever it takes.
        budget_s: seconds that all may take.
        clock: function that returns seconds; None: one that waits until the image's device has nothing to do.
    """
    clock = clock or partial(_seconds, image.device)
    end, last, least = clock() + budget_s, 0.0, float("inf")
    for size in sizes:
        if last * size * (1 + ROUNDS) > end - clock():
            return
        try:
            first, *further = _timed(runtime, image, size, end, clock)
        except Exception as error:
            if last and is_out_of_memory(error):  # a pass of fewer has been seen to fit
                return
            raise
        best = min(further, default=first)  # the first pass sets things up
        last = best / size
        yield Measured(runtime.name, size, last)
        if last > least * WORSE:
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
        with torch.inference_mode(), one_thread() if runtime.own_threads else nullcontext():
            runtime.outputs(image * upsample(masks, image.shape[-2:])[:, None])
        yield clock() - start


def _seconds(device: torch.device) -> float:
    """Returns the time when a device has done what it was told: kernels run behind the calls that start them."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def fastest(measured: Sequence[Measured]) -> Measured:
    """Returns the runtime with the least time of a query, and of its sizes that take hardly longer the smallest, or the
    fastest one whose passes are short."""
    least = min(measured, key=lambda one: one.seconds)
    near = [one for one in measured if one.runtime == least.runtime and one.seconds <= EQUAL * least.seconds]
    short = [one for one in near if one.micro_batch * one.seconds <= SHORT_S]
    return min(short, key=lambda one: one.seconds) if short else min(near, key=lambda one: one.micro_batch)


def fast_runtime(module: nn.Module, found: FoundLayer, images: Tensor, threads: int) -> Trunked:
    """Returns a network's fast runtime on its device, which has been seen to compute what PyTorch does.

    Args:
        module: in eval mode; nothing is left on it.
        found: what is known of the layer whose activations it returns.
        images: (n, C, H, W) that differ, n at least 3.
        threads: threads that share an operation.

    Raises:
        Unsupported: it does not, or there is none; the text says why.
    """
    runtime: Trunked
    if FAST[images.device.type] == CudaGraphs.name:
        runtime = _cuda_graphs(module, found, images[:1])
    else:
        runtime = OnnxRuntime(module, found, images[:2], threads)
    check(runtime, module, found, images, (len(images), 1, 2))
    return runtime


def _cuda_graphs(module: nn.Module, found: FoundLayer, image: Tensor) -> CudaGraphs:
    """Returns the CUDA graphs of a network in the memory format that is faster, which differs from network to network.

    On an NVIDIA H200, in float32, channels_last takes 1.15 times as long for a ResNet-50, 0.93 for an EfficientNet-B0.
    """
    both = [CudaGraphs(module, found, image, order) for order in (torch.channels_last, torch.contiguous_format)]
    return min(both, key=lambda one: min(each.seconds for each in measure(one, image, FORMAT_SIZES, BUDGET_S / 4)))


def check(runtime: Trunked, module: nn.Module, found: FoundLayer, images: Tensor, sizes: Sequence[int]) -> None:
    """Raises Unsupported where a runtime does not compute what PyTorch does, in passes of one of these sizes.

    Args:
        runtime: the runtime.
        module: the network, in eval mode; nothing is left on it.
        found: what is known of the layer whose activations the runtime returns.
        images: (n, C, H, W) that differ.
        sizes: numbers of images of the passes, each of which begins with another one.
    """
    title = TITLES[runtime.name]
    eager, fast = Opening(module, found), Opening(module, found, trunk=runtime.trunk)
    for first, size in enumerate(sizes):
        some = (torch.arange(size, device=images.device) + first) % len(images)
        own = some[: len(images)]  # PyTorch need not compute what is repeated
        try:
            expected, came = eager(images[own]), fast(images[some])
        except Exception as error:  # whatever it is, the runtime does not do what the network does
            raise Unsupported(f"{title} fails with {size} pictures: {in_a_line(error)}") from error
        again = torch.arange(size, device=images.device) % len(images)
        for what, ours, theirs in (
            ("outputs", expected.logits, came.logits),
            (f"activations of {found.layer.name}", expected.activations, came.activations),
        ):
            difference = largest_difference(ours[again], theirs)
            # Not `<=`, so that NaN is a difference; where PyTorch's numbers are all the same, so must be the others.
            if not difference <= SAME:
                raise Unsupported(
                    f"{title}: {what} differ from PyTorch's by {difference:.1e} of their spread in a pass of {size}; "
                    f"{SAME:.0e} is allowed"
                )


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
    clock: Callable[[], float] | None = None,
) -> Choice:
    """Returns the runtime of a network, on a CPU or a CUDA device, that asks queries fastest, and the size of a pass.

    Args:
        module: in eval mode; nothing is left on it.
        found: what is known of the default layer, whose activations come with the outputs.
        images: (n, C, H, W) that differ, n at least 3.
        wanted: which runtime; "auto": the fastest.
        threads: threads that share an operation.
        micro_batch: queries of a pass; None: as many as measuring says.
        kept: what was measured before, and is measured again only where something is another.
        clock: function that returns seconds; None: that of `measure`.

    Raises:
        Unsupported: the runtime that is wanted cannot run the network.
    """
    device = images.device.type
    if wanted not in ("auto", Eager.name, FAST[device]):
        raise Unsupported(f"{TITLES[wanted]} cannot run the network, which is on {images.device}")
    known, reason = Measured.read(kept.read().get("exact")), ""
    keep = kept if wanted == "auto" and not micro_batch else None
    if known is None or known.runtime != Eager.name or wanted != "auto":
        try:
            both = (Eager(module), fast_runtime(module, found, images, threads))
            runtimes = [each for each in both if wanted in ("auto", each.name)]
            choice = _best(runtimes, known, images[:1], micro_batch, keep, clock)
            return _prepared(choice, module, found, images)
        except Unsupported as error:
            if wanted != "auto":
                raise
            reason, known, keep = str(error), None, None
            log.warning("PyTorch runs the network operation by operation: %s", reason)
    return replace(_best([Eager(module)], known, images[:1], micro_batch, keep, clock), reason=reason)


def _best(
    runtimes: Sequence[Runtime],
    known: Measured | None,
    image: Tensor,
    micro_batch: int | None,
    keep: Kept | None,
    clock: Callable[[], float] | None,
) -> Choice:
    """Returns the fastest of some runtimes; what is known of one of them is not measured again."""
    if known is None or known.runtime not in [one.name for one in runtimes]:
        sizes = (micro_batch,) if micro_batch else SIZES[image.device.type]
        known = fastest(_measured(runtimes, image, sizes, clock))
        if keep is not None:
            keep.write(exact=asdict(known))
    (runtime,) = (one for one in runtimes if one.name == known.runtime)
    return Choice(runtime, micro_batch or known.micro_batch, known.seconds)


def _prepared(choice: Choice, module: nn.Module, found: FoundLayer, images: Tensor) -> Choice:
    """Returns a choice with all that its passes need set up, and seen to be right; in smaller ones where memory ends.

    Raises:
        Unsupported: there is no memory for it, or it is not right.
    """
    micro_batch = ready(choice.runtime, choice.micro_batch)
    if not isinstance(choice.runtime, CudaGraphs):
        return choice
    sizes = [max(1, size - room) for size in choice.runtime.sizes for room in (0, 1)]
    check(choice.runtime, module, found, images, sizes)
    return replace(choice, micro_batch=micro_batch)


def ready(runtime: Runtime, micro_batch: int) -> int:
    """Sets up all that passes of up to `micro_batch` images need; returns how many images there is memory for.

    Raises:
        Unsupported: there is no memory for a pass of one image.
    """
    return runtime.prepare(micro_batch) if isinstance(runtime, CudaGraphs) else micro_batch


def _measured(
    runtimes: Sequence[Runtime], image: Tensor, sizes: Sequence[int], clock: Callable[[], float] | None
) -> list[Measured]:
    # The reference comes last: where time is short, the one that is likely to be the fastest is measured well.
    share = BUDGET_S / len(runtimes)
    return [one for runtime in reversed(runtimes) for one in measure(runtime, image, sizes, share, clock)]

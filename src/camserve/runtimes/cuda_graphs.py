"""Runs a network by CUDA graphs: all operations of a pass are started at once, not one by one from Python.

A graph repeats operations on tensors that stay where they are in memory. So there is one for each size of a pass, the
powers of two ("buckets"): images are copied into its input, it is replayed, and what it has made is copied out before
anybody else may replay it. A pass of n images is made by the smallest graph that holds them, the rest of whose input is
zeros; images of a pass do not change each other's scores in networks that are run so.

What knows CUDA is `CudaCapture`. All else works with whatever captures a function.

Source: PyTorch's `torch.cuda.graph` (2.9 to 2.12), and "CUDA Graphs" in its notes on CUDA semantics.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from camserve.errors import Unsupported
from camserve.runtimes.memory import is_out_of_memory
from camserve.runtimes.recorded import Recorded, in_a_line, why_not_replayed
from camserve.saliency.layers import FoundLayer

WARM_UP = 2
"""Number of runs of a function before it is captured, in which libraries set themselves up."""


@dataclass(frozen=True)
class Captured:
    """Holds a function of images, ready to be repeated on tensors that stay where they are."""

    images: Tensor
    """Images (size, C, H, W) that the next replay reads."""
    results: Sequence[Tensor]
    """Tensors (size, ...) that the last replay has made."""
    replay: Callable[[], None]


class Capture(Protocol):
    """Makes functions ready to be repeated."""

    def __call__(self, function: Callable[[Tensor], Sequence[Tensor]], images: Tensor) -> Captured:
        """Captures a function of images of this size; what it holds in memory may be shared with earlier ones.

        Raises:
            Exception: the function cannot be captured, or memory ran out.
        """

    def in_turn(self) -> AbstractContextManager[None]:
        """Returns the context in which one is replayed: after all that was done in this context before."""


class CudaGraphs:
    """Runs a network by CUDA graphs.

    Until `prepare` it holds the graph that was used last and no other, so that sizes can be tried one by one.

    Args:
        module: in eval mode, in float32, on the device; its weights must stay as they are.
        found: what is known of the layer whose raw output is wanted beside the outputs.
        image: (1, C, H, W), one that the network takes.
        memory_format: order of the numbers of images and of convolutions' weights. Of weights in another order it has a
            copy of its own.
        bfloat16: whether matrix products and convolutions are made in bfloat16 (autocast).
        capture: function that returns what captures functions on a device; for each set of graphs it is called anew.

    Raises:
        Unsupported: a graph would not do what the network does; the text says why.
    """

    name = "cuda_graphs"
    fixed = ""
    own_threads = False

    def __init__(
        self,
        module: nn.Module,
        found: FoundLayer,
        image: Tensor,
        memory_format: torch.memory_format = torch.channels_last,
        bfloat16: bool = False,
        capture: Callable[[torch.device], Capture] | None = None,
    ) -> None:
        if reason := why_not_replayed(module, image):
            raise Unsupported(reason)
        self._module, self._found = module, found
        self.layer = found.layer.name
        self.largest: int | None = None
        """Most images of a graph; passes of more are cut. None: there is no bound before `prepare`."""
        self.memory_format = memory_format
        self._recorded = Recorded(module, found)
        self._weights = {
            name: _in_order(weight.detach(), memory_format)
            for name, weight in self._recorded.named_parameters()
            if weight.dim() == image.dim()
        }
        self._bfloat16 = bfloat16
        self._image = image
        self._captures = capture or CudaCapture
        self._capture = self._captures(image.device)
        self._graphs: dict[int, Captured] = {}
        self._lock = threading.Lock()

    def in_bfloat16(self) -> CudaGraphs:
        """Returns what runs the same network in bfloat16, in channels_last, for which its convolutions are made."""
        return CudaGraphs(self._module, self._found, self._image, bfloat16=True, capture=self._captures)

    def prepare(self, largest: int) -> int:
        """Captures the graphs of all passes of up to `largest` images, and no others from now on.

        Returns:
            Number of images of the largest graph: less where memory runs out.

        Raises:
            Unsupported: the network cannot be captured; or not even for one image, for want of memory.
        """
        with self._lock:
            if self.largest == bucket(largest):
                return largest
            self._forget()
            size = bucket(largest)
            while size:
                # The largest is the first, since the others then need no memory of their own.
                if not self._has_captured(size) and not self._graphs:
                    self._forget()
                size //= 2
            if not self._graphs:
                raise Unsupported("there is too little memory for a graph of one image")
            self.largest = max(self._graphs)
            return min(largest, self.largest)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of images of the graphs, ascending."""
        return tuple(sorted(self._graphs))

    def outputs(self, x: Tensor) -> Tensor:
        """Returns the outputs (n, numbers)."""
        return self._run(x, 1)[0]

    def trunk(self, x: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """Returns the outputs (n, numbers), and the layer's raw output at each of its calls that count."""
        outputs, *raw = self._run(x, None)
        return outputs, raw

    def _run(self, x: Tensor, results: int | None) -> Sequence[Tensor]:
        """Returns copies of the first `results` of what the graphs make of (n, C, H, W); None: of all."""
        parts = [self._replayed(some, results) for some in torch.split(x, self.largest or max(1, len(x)))]
        return parts[0] if len(parts) == 1 else [torch.cat(each) for each in zip(*parts, strict=True)]

    def _replayed(self, x: Tensor, results: int | None) -> list[Tensor]:
        # No other thread may write into the graph's input before the results are copied.
        with self._lock, torch.no_grad():
            graph = self._graph(bucket(len(x)))
            with self._capture.in_turn():
                graph.images[: len(x)].copy_(x)
                graph.images[len(x) :].zero_()
                graph.replay()
                return [each[: len(x)].clone() for each in graph.results[:results]]

    def _graph(self, size: int) -> Captured:
        if self.largest is None and size not in self._graphs:
            self._forget()
            self._graphs[size] = self._captured(size)
        return self._graphs[min(held for held in self._graphs if held >= size)]

    def _has_captured(self, size: int) -> bool:
        """Captures the graph of a size; returns whether there was memory for it."""
        try:
            self._graphs[size] = self._captured(size)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True

    def _captured(self, size: int) -> Captured:
        # Tensors that are made in inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            images = self._image.expand(size, -1, -1, -1).clone(memory_format=self.memory_format)
            try:
                return self._capture(self._function, images)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                raise Unsupported(f"a pass of {size} images cannot be captured: {in_a_line(error)}") from error

    def _function(self, images: Tensor) -> Sequence[Tensor]:
        enabled = self._bfloat16
        # No cache: it would hold weights of the graph's memory beyond the capture.
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=enabled, cache_enabled=False):
            found: tuple[Tensor, ...] = torch.func.functional_call(self._recorded, self._weights, (images,))
        return found

    def _forget(self) -> None:
        """Gives up all graphs and their memory."""
        self._graphs.clear()
        self._capture = self._captures(self._image.device)
        self.largest = None


def _in_order(weight: Tensor, memory_format: torch.memory_format) -> Tensor:
    """Returns a weight in a memory format, itself where it is in it; cuDNN goes by the strides of 1 x 1 kernels, too,
    which `contiguous` takes for any format."""
    there = torch.empty_like(weight, device="meta", memory_format=memory_format).stride()
    return weight if weight.stride() == there else weight.clone(memory_format=memory_format)


def bucket(images: int) -> int:
    """Returns the size of the smallest graph that holds `images` images: a power of two, at least 1."""
    return 1 << max(0, images - 1).bit_length()


class CudaCapture:
    """Captures functions as CUDA graphs, which share their memory: no two of them may run at the same time.

    Args:
        device: the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # it has no types
            self._pool = torch.cuda.graph_pool_handle()
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]  # likewise

    def __call__(self, function: Callable[[Tensor], Sequence[Tensor]], images: Tensor) -> Captured:
        """Captures a function."""
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        # `torch.cuda.graph` leaves its stream the current one where a capture fails; this one sets it back.
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            self._stream.wait_stream(before)  # which makes the images
            for _ in range(WARM_UP):
                function(images)
            try:
                # Other threads of the process may allocate memory meanwhile, which "global" would forbid them.
                with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                    results = function(images)
            except Exception:
                self._end()
                raise
        return Captured(images, results, graph.replay)

    def _end(self) -> None:
        """Ends what CUDA ended already: PyTorch (2.11) forgets to where a capture fails because the forward waited for
        the device, and then gives no memory of the process back any more."""
        with suppress(RuntimeError):  # it has not forgotten
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Has the caller's stream wait for the last one that was here, and the next one for what is done in it."""
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(self._done)
        try:
            with torch.cuda.device(self._device):
                yield
        finally:
            self._done.record(stream)

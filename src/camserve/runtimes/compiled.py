"""Runs a network in bfloat16 on a CPU by code that PyTorch's compiler makes of it (Inductor, with frozen weights).

The code joins convolutions, normalisations and activations, and keeps the weights as the processor wants them: a query
of a ResNet-50 takes 5 instead of 17 ms (two cores with AMX). To make it takes 20 to 50 seconds at each start, and a C++
compiler: so it is made where somebody asks for it.

The compiler is given the operations of one pass, not the network's Python (`torch.compile`): that would watch the
process's modes and number of threads, and compile again, within a request, where one of them has changed.

Source: PyTorch 2.12, `torch._inductor.compile` with its option `freezing`.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from camserve.errors import Unsupported
from camserve.runtimes.precision import why_no_bfloat16
from camserve.runtimes.recorded import in_a_line, why_not_replayed
from camserve.saliency.run import run

SIZE = 8
"""Number of images of a pass, unless somebody says another: 16 take as long for each on the machines that were seen."""


class Compiled:
    """Runs a network in bfloat16 by compiled code, in passes of one size; what a pass lacks is filled with zeros.

    Args:
        module: in eval mode, in float32 on the CPU; its weights must stay as they are.
        image: (1, C, H, W), one that the network takes.
        size: number of images of a pass.

    Raises:
        Unsupported: the processor has no bfloat16, or the network cannot be compiled; the text says why.
    """

    name = "compiled"
    memory_format = torch.channels_last
    fixed = ""
    own_threads = False

    def __init__(self, module: nn.Module, image: Tensor, size: int = SIZE) -> None:
        if image.device.type != "cpu":
            raise Unsupported(f"compiled code is for CPUs, and the network is on {image.device}")
        if reason := why_no_bfloat16(image.device) or why_not_replayed(module, image):
            raise Unsupported(reason)
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():  # the code would crash, not fail
            raise Unsupported("PyTorch's oneDNN does not compute in bfloat16 here")
        self.size = size
        self._lock = threading.Lock()
        with torch.inference_mode(False):
            self._images = image.expand(size, -1, -1, -1).clone(memory_format=self.memory_format)
            try:
                with torch.no_grad():
                    with torch.autocast("cpu", dtype=torch.bfloat16):
                        graph = make_fx(lambda images: run(module, images).float())(self._images)
                    options = {"freezing": True, "compile_threads": 1}
                    self._code = torch._inductor.compile(graph, [self._images], options=options)
                    self._code(self._images)
            except Exception as error:  # the compiler's own have no common class
                raise Unsupported(f"PyTorch cannot compile the network: {in_a_line(error)}") from error

    def outputs(self, x: Tensor) -> Tensor:
        """Returns the outputs (n, numbers)."""
        parts = [self._part(x[start : start + self.size]) for start in range(0, max(1, len(x)), self.size)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _part(self, x: Tensor) -> Tensor:
        with self._lock:
            self._images[: len(x)].copy_(x)
            self._images[len(x) :].zero_()
            found: Tensor = self._code(self._images)
            return found[: len(x)].clone()  # a network may return a view of its input, which the next pass writes to

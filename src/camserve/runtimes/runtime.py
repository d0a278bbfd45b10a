"""Says what a runtime is, and holds the one that is always there: PyTorch, operation by operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from camserve.saliency.run import run


class Runtime(Protocol):
    """Runs a network; may be called from several threads."""

    @property
    def name(self) -> str:
        """Name of the runtime, as `CAMSERVE_RUNTIME` has it."""

    @property
    def memory_format(self) -> torch.memory_format:
        """Order of the input's numbers in memory that the runtime need not change."""

    @property
    def fixed(self) -> str:
        """Reason why nothing else can run the network, nor in another precision; "" where others may be tried."""

    @property
    def own_threads(self) -> bool:
        """Tells whether it works in threads of its own, beside which PyTorch's should not spin: see `one_thread`."""

    def outputs(self, x: Tensor) -> Tensor:
        """Returns the outputs (n, numbers), in float32 at least, of (n, C, H, W)."""


@runtime_checkable
class Trunked(Runtime, Protocol):
    """Runs a network, and returns what one layer made on the way."""

    @property
    def layer(self) -> str:
        """Address of the layer."""

    def trunk(self, x: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """Returns the outputs of (n, C, H, W), and the layer's raw output at each of its calls that count."""


class Eager:
    """Runs a network by PyTorch, operation by operation: the reference that every other runtime is checked against.

    Args:
        module: in eval mode.
        bfloat16: whether matrix products and convolutions are made in bfloat16 (autocast).
    """

    name = "eager"
    memory_format = torch.channels_last
    """Convolutions are faster so, on CPUs (14 instead of 20 ms a query of EfficientNet-Lite0) and on GPUs."""
    fixed = ""
    own_threads = False

    def __init__(self, module: nn.Module, bfloat16: bool = False) -> None:
        self._module = module
        self._bfloat16 = bfloat16

    def outputs(self, x: Tensor) -> Tensor:
        """Returns the outputs (n, numbers)."""
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=self._bfloat16):
            return run(self._module, x.contiguous(memory_format=self.memory_format))


class Graph(Eager):
    """Runs a network whose forward is itself run by ONNX Runtime: an ONNX graph as it was packed."""

    name = "onnx"
    memory_format = torch.contiguous_format
    fixed = "an ONNX graph is run as it is by ONNX Runtime on the CPU"
    own_threads = True

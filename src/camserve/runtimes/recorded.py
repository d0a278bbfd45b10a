"""Makes of a network what a graph of its operations holds, and tells whether a graph can hold it at all.

A graph repeats the operations of one pass. It holds no decision that Python made in that pass, and no number that came
from elsewhere than the images and the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from camserve.saliency.arrangement import Arrangement
from camserve.saliency.capture import Tap, is_spatial
from camserve.saliency.layers import FoundLayer
from camserve.saliency.run import run


class Recorded(nn.Module):
    """Returns a network's outputs, and the layer's raw output at each of its calls that count.

    Args:
        module: the network, in eval mode; nothing is left on it.
        found: what is known of the layer.
    """

    def __init__(self, module: nn.Module, found: FoundLayer) -> None:
        super().__init__()
        self.module = module
        self._found = found

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Runs the network."""
        record = _Record(self._found.layer.name, self._found.calls, len(images), self._found.arrangement)
        with record.installed(self.module):
            outputs = run(self.module, images)
        return (outputs, *record.raw)


class _Record(Tap):
    """Keeps the layer's raw outputs."""

    def __init__(self, layer: str, calls: Sequence[int], images: int, arrangement: Arrangement) -> None:
        super().__init__(layer, calls, lambda output: is_spatial(output, images, arrangement))
        self.raw: list[Tensor] = []

    def at(self, output: Tensor, index: int) -> None:
        # A copy, because the network may alter its output in place after this.
        self.raw[index:] = [output.clone()]


def why_not_replayed(module: nn.Module, images: Tensor) -> str:
    """Returns why a graph of a network's operations would not do what the network does; "" where nothing speaks
    against it.

    Args:
        module: in eval mode; nothing is left on it.
        images: (n, C, H, W), on which it is run once.
    """
    before = _generators(images.device)
    try:
        with torch.no_grad(), _Watch() as watch:
            run(module, images)
    except Exception as error:  # whatever comes of a forward that is watched; without, it has run before
        return f"the network cannot be watched: {in_a_line(error)}"
    if watch.reading:
        return f"the forward decides by numbers that the picture has a part in ({watch.reading[0]})"
    if watch.moving:
        return f"the forward moves numbers from one device to another ({watch.moving[0]})"
    if not all(map(torch.equal, before, _generators(images.device))):
        return "the forward draws random numbers"
    return ""


def in_a_line(error: Exception) -> str:
    """Returns the name of an error and the beginning of its text, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _generators(device: torch.device) -> list[Tensor]:
    """Returns the states of PyTorch's generators of random numbers, of the CPU and of a device."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the operations that a graph would not repeat: a graph has what they gave when it was made."""

    _READING = frozenset({"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2"})
    """Operations by which Python reads numbers out of tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reading: list[str] = []
        self.moving: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, result = func.overloadpacket.__name__, func(*args, **(kwargs or {}))
        if name in self._READING:
            self.reading.append(name)
        if len(set(_devices(name, (args, kwargs, result)))) > 1:
            self.moving.append(name)
        return result


def _devices(operation: str, values: Any) -> Iterator[str]:
    """Yields the devices whose numbers an operation reads or writes: a single number is no data unless it is copied."""
    copies = operation in ("_to_copy", "copy_")
    for value in tree_leaves(values):
        if isinstance(value, Tensor) and (value.dim() or copies):
            yield value.device.type

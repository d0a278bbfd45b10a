"""Makes a program of torch.export a network as any other: its modules have their own names again.

Where the program takes any number of images, `torch.export.unflatten` gives back the modules that were called, each of
which runs its part of the graph, so that layers are found, changed and derived by as in the network that was exported.
Where it was made for a number of images, it is run for as many at a time, as a whole.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from camserve.archive.untrusted import reading
from camserve.methods.spec import Asset
from camserve.runtimes.exported_program import WHAT, checked
from camserve.scores.returned import Wrapped

_FIXED = (
    "the program was exported for {0} image(s) at a time: export it for any number, "
    'torch.export.export(network, (images,), dynamic_shapes=({{0: torch.export.Dim("n")}},))'
)
_KINDS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_MANY = 2**20
"""Number of images that a program takes at least where it takes any."""


class ExportedNetwork(Wrapped):
    """Runs a program of torch.export on images (n, C, H, W).

    Args:
        program: modules that run the program.
        images: shape and dtype of its input, as the graph has it.
        batch: number of images of a pass; 0: any.
    """

    def __init__(self, program: nn.Module, images: Tensor, batch: int) -> None:
        super().__init__(program)
        channels, height, width = (size if isinstance(size, int) else 0 for size in images.shape[1:])
        self.image: tuple[int, int, int] = (channels, height, width)
        """Channels, height and width of an image; 0: any."""
        self.lacks: Mapping[Asset, str] = {}
        """Why the network does not offer what methods may need, by name."""
        if batch:
            reason = _FIXED.format(batch)
            self.lacks = {"layer": reason, "gradients": reason, "tail": reason, "modules": reason}
        self._batch, self._dtype = batch, images.dtype

    def train(self, mode: bool = True) -> ExportedNetwork:
        """Leaves the program as it was exported: what it does in training and what otherwise is no choice any more."""
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]  # of torch's overloads
        """Returns nothing: its weights are packed in the program."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Takes nothing, likewise."""
        return nn.Module().load_state_dict(state_dict, strict=strict)

    def forward(self, x: Tensor) -> Any:
        """Returns what the program returns."""
        x = x.to(self._dtype)
        if not self._batch or len(x) == self._batch:
            return self._network(x)
        filled = torch.cat([x, x[-1:].expand(-len(x) % self._batch, *x.shape[1:])])
        runs = [self._network(some) for some in torch.split(filled, self._batch)]
        return _joined(runs, len(x))


def exported_network(data: bytes) -> ExportedNetwork:
    """Returns the network that a program is.

    Args:
        data: a program, as `exported_program.read_program` returns it; it need not come from there.

    Raises:
        InvalidInput: it is none, has what cannot be read safely, or does not take one batch of images.
    """
    name = "network.pt2"
    clean = checked(data, name)
    with reading(Path(name), WHAT):
        program = torch.export.load(io.BytesIO(clean))
        images = _input(program)
        modules = torch.export.unflatten(program)
        return ExportedNetwork(cast("nn.Module", modules), images, _batch(program, images))


def _input(program: torch.export.ExportedProgram) -> Tensor:
    """Returns the tensor that stands for the input in a graph; raises ValueError where it is no batch of images."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    inputs = [nodes[name].meta["val"] for name in program.graph_signature.user_inputs if isinstance(name, str)]
    if len(inputs) != 1 or len(program.graph_signature.user_inputs) != 1:
        raise ValueError(f"it must have one input, a batch of images, has {len(program.graph_signature.user_inputs)}")
    (images,) = inputs
    if not isinstance(images, Tensor) or images.dtype not in _KINDS:
        kind = str(images.dtype).removeprefix("torch.") if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"its input must be of float32, float16, bfloat16 or float64, is {kind}")
    if images.dim() != 4:
        raise ValueError(f"its input must be (images, channels, height, width), has {images.dim()} axes")
    if not isinstance(images.shape[1], int):
        raise ValueError("its input must have a fixed number of channels")
    return images


def _batch(program: torch.export.ExportedProgram, images: Tensor) -> int:
    """Returns the number of images of a pass; 0: any. Raises ValueError where one image alone is refused."""
    number: Any = images.shape[0]
    if isinstance(number, int):
        return number
    limits = program.range_constraints.get(number.node.expr)
    if limits is None or not isinstance(number.node.expr, type(next(iter(program.range_constraints)))):
        raise ValueError(f"the number of images is bound to something else: {number}")
    most = int(min(limits.upper, _MANY))
    return 0 if most >= _MANY else most


def _joined(runs: list[Any], number: int) -> Any:
    """Returns what several runs returned as one would."""
    first = runs[0]
    if isinstance(first, Tensor):
        return torch.cat(runs)[:number]
    if isinstance(first, Mapping):
        return {key: _joined([run[key] for run in runs], number) for key in first}
    if isinstance(first, tuple | list):
        return [_joined(list(each), number) for each in zip(*runs, strict=True)]
    return first

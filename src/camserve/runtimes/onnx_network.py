"""Makes an ONNX graph a network as any other: a module whose forward is run by ONNX Runtime, on the CPU.

Where a tensor is named as layer, the graph is cut there. The layer is then a module that hands on what the trunk has
made, and hooks find and replace it as they do in other networks; what they put there goes through the tail. There are
no gradients, and the operations of a graph are no modules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx
import torch
from torch import Tensor, nn

from camserve.errors import InvalidOption, Unsupported
from camserve.methods.spec import Asset
from camserve.runtimes.onnx import session
from camserve.runtimes.onnx_graph import cut, image_input, listed, tensor_outputs
from camserve.saliency.tail import Opaque
from camserve.wording import shown

_NAMED = "a layer of an ONNX graph is a tensor that is named when the graph is packed: --layer TENSOR"
_TYPES = {
    "tensor(float)": onnx.TensorProto.FLOAT,
    "tensor(float16)": onnx.TensorProto.FLOAT16,
    "tensor(double)": onnx.TensorProto.DOUBLE,
    "tensor(int64)": onnx.TensorProto.INT64,
    "tensor(int32)": onnx.TensorProto.INT32,
    "tensor(bool)": onnx.TensorProto.BOOL,
}
"""Types of tensors that a cut may hand over, by ONNX Runtime's names for them."""
_PRECISIONS = {"tensor(float16)": torch.float16, "tensor(double)": torch.float64}


class OnnxNetwork(nn.Module):
    """Runs an ONNX graph.

    Args:
        model: the graph, as `onnx_graph.parsed` returns it.
        layer: name of the tensor that is the layer; None: there is none.
        threads: threads that share an operation.

    Raises:
        InvalidOption: there is no such tensor, or the scores do not depend on it.
        Unsupported: ONNX Runtime cannot run the graph.
    """

    def __init__(self, model: onnx.ModelProto, layer: str | None, threads: int) -> None:
        super().__init__()
        image = image_input(model)
        self._channels_last, self._axis = image.channels_last, image.axis
        self._listed = listed(model) is not None
        self._names = listed(model) or tensor_outputs(model)
        self._layer = layer
        self._handed = 0
        self.lacks: Mapping[Asset, str] = {
            "gradients": "ONNX Runtime computes none",
            "modules": "an ONNX graph has none",
            **({} if layer else {"layer": _NAMED, "tail": _NAMED}),
        }
        """Why the network does not offer what methods may need, by name."""
        if layer is None:
            self.tail = _Part(model, self._names, image.batch, threads)
            return
        if self._listed:
            raise InvalidOption(f"there is no layer {shown(layer)} in a graph that detects what is in one image")
        parts = cut(model, layer)
        handed = [each.name for each in parts.tail.graph.input]
        if image.batch and len(handed) > 1:
            raise InvalidOption(
                f"the graph takes {image.batch} images at once and cannot be cut at {shown(layer)}, which others pass "
                f"by ({', '.join(map(shown, handed[1:4]))}): export it with a dynamic number of images"
            )
        self._names, self._handed = tuple(each.name for each in parts.tail.graph.output), len(handed)
        self.trunk = _Part(parts.trunk, handed, image.batch, threads)
        for given, kind in zip(parts.tail.graph.input, self.trunk.types, strict=True):
            if kind not in _TYPES:
                raise Unsupported(f"the graph cannot be cut at {shown(layer)}: {shown(given.name)} is a {kind}")
            given.type.tensor_type.elem_type = _TYPES[kind]
        self.tail = _Part(parts.tail, self._names, image.batch, threads)
        _nest(self, layer)

    def forward(self, images: Tensor) -> Tensor | dict[str, Tensor] | list[dict[str, Tensor]]:
        """Returns the graph's output, or all of several by name, of images (n, C, H, W).

        A graph that detects what is in one image is run for each, and gives the detections of each.
        """
        x = images.permute(0, 2, 3, 1) if self._channels_last else images
        if self._listed:
            given = (one[None] if self._axis else one for one in x)
            return [dict(zip(("boxes", "labels", "scores"), self.tail.run(one), strict=True)) for one in given]
        if self._layer is None:
            found = self.tail(x)
        else:
            made = self.trunk(x)
            maps = self.get_submodule(self._layer)(made[0])
            found = self.tail(maps, *(made[index] for index in range(1, self._handed)))
        if len(self._names) == 1:
            return found[0]  # type: ignore[no-any-return]
        return {name: found[index] for index, name in enumerate(self._names)}


class _Place(nn.Module):
    """Stands where a graph was cut."""

    def forward(self, maps: Tensor) -> Tensor:
        """Returns what it was given."""
        return maps


class _Part(Opaque):
    """Runs a graph, as many images at a time as it takes.

    Args:
        model: the graph.
        names: names of the outputs that are wanted.
        batch: number of images of a pass; 0: any.
        threads: threads that share an operation.
    """

    def __init__(self, model: onnx.ModelProto, names: Sequence[str], batch: int, threads: int) -> None:
        super().__init__()
        self._names = list(names)
        self._batch = batch
        self._session = session(model.SerializeToString(), threads)
        self._inputs = {each.name: _PRECISIONS.get(each.type) for each in self._session.get_inputs()}
        types = {each.name: each.type for each in self._session.get_outputs()}
        self.types = [types[name] for name in names]
        """ONNX Runtime's names for the types of its outputs."""

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        """Returns the outputs for n images."""
        if self._batch and len(inputs[0]) != self._batch:
            return self._in_runs(inputs[0], self._batch)
        try:
            return self.run(*inputs)
        except RuntimeError:
            # A graph that says that it takes any number of images may have been made for one all the same.
            if self._batch or len(inputs) > 1 or len(inputs[0]) == 1:
                raise
        found = self._in_runs(inputs[0], 1)
        self._batch = 1
        return found

    def _in_runs(self, x: Tensor, batch: int) -> list[Tensor]:
        """Returns the outputs for n images, `batch` of which go at a time, the last ones with repetitions."""
        filled = torch.cat([x, x[-1:].expand(-len(x) % batch, *x.shape[1:])])
        runs = [self.run(some) for some in torch.split(filled, batch)]
        return [torch.cat(each)[: len(x)] for each in zip(*runs, strict=True)]

    def run(self, *inputs: Tensor) -> list[Tensor]:
        """Returns the outputs for as many images as the graph takes at once."""
        given = {
            name: each.detach().to(precision or each.dtype).contiguous().numpy()
            for (name, precision), each in zip(self._inputs.items(), inputs, strict=True)
        }
        try:
            found = self._session.run(self._names, given)
        except Exception as error:  # ONNX Runtime's own have no common class, and say in words that memory ran out
            raise RuntimeError(str(error)) from error
        return [torch.from_numpy(each) for each in found]


def _nest(root: nn.Module, name: str) -> None:
    """Gives a module a place whose address is a name, which may have dots.

    Raises:
        InvalidOption: no module can have that address.
    """
    *outer, last = name.split(".")
    parent = root
    for depth, part in enumerate((*outer, last)):
        if not part or hasattr(parent, part):  # an attribute that each module has
            raise InvalidOption(f"no layer can be called {shown(name)}: give the tensor another name")
        child = _Place() if depth == len(outer) else nn.Module()
        parent.add_module(part, child)
        parent = child

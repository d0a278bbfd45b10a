"""Reads ONNX graphs that others have made, and cuts them at a tensor; nothing here runs one.

A graph names operators of ONNX and of ONNX Runtime, and has numbers: there is no code in it. What could make a runtime
open other files or libraries is refused: numbers that lie in other files, and operators of other domains.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx.inliner

from camserve.archive.untrusted import reading, short
from camserve.errors import InvalidOption
from camserve.wording import close_to, shown

WHAT = "an ONNX network"
MAX_BYTES = 2**31 - 1
"""Bytes of a graph with its numbers: more cannot be one message of protobuf."""

_DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")
"""Domains whose operators are built into ONNX Runtime; those of others come in libraries of their own."""
_OPENS_FILES = ("EPContext",)
"""Operators of these domains that name files which a runtime opens."""
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
_NUMBERS = (*_FLOATS, onnx.TensorProto.INT32, onnx.TensorProto.INT64)
"""Kinds of numbers that a network may return: labels of detections are whole numbers."""


@dataclass(frozen=True)
class Input:
    """Describes the one image input of a graph."""

    name: str
    batch: int
    """Number of images of a pass; 0: any. A graph without an axis of images takes one."""
    height: int
    """0: any."""
    width: int
    """0: any."""
    channels: int
    channels_last: bool
    axis: bool = True
    """Whether it has an axis of images."""


@dataclass(frozen=True)
class Parts:
    """Holds the two parts of a graph that was cut at a tensor."""

    trunk: onnx.ModelProto
    """Graph from the image to the tensor, its first output, and to all else that the tail needs, without types."""
    tail: onnx.ModelProto
    """Graph from those to the scores; its inputs have no types yet."""


def read_graph(path: Path) -> bytes:
    """Returns the content of an ONNX file that needs no other file: numbers beside it are put in.

    Raises:
        InvalidInput: it is no network that can be packed; the text says why.
    """
    with reading(path, WHAT):
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ValueError(f"it may have at most {MAX_BYTES} bytes, has {size}")
        data = path.read_bytes()
        model = onnx.load_model_from_string(data)
        if any(map(_is_outside, _tensors(model))):
            _check_outside(model, path.parent, size)
            onnx.load_external_data_for_model(model, str(path.parent))
            data = model.SerializeToString(deterministic=True)
    parsed(data, path)
    return data


def parsed(data: bytes, path: Path) -> onnx.ModelProto:
    """Returns the graph that some bytes are, which needs nothing beside ONNX Runtime.

    Args:
        data: the bytes.
        path: name of the file, for messages.

    Raises:
        InvalidInput: it is none, needs other files or operators, or has not one image as its input.
    """
    with reading(path, WHAT):
        if len(data) > MAX_BYTES:
            raise ValueError(f"it may have at most {MAX_BYTES} bytes, has {len(data)}")
        model = onnx.load_model_from_string(data)
        _check_operators(model)
        if any(map(_is_outside, _tensors(model))):
            raise ValueError("its numbers lie in other files")
        onnx.checker.check_model(model)
        image_input(model)
        if not tensor_outputs(model, _FLOATS):
            raise ValueError("it returns no tensor of numbers")
    return model


def image_input(model: onnx.ModelProto) -> Input:
    """Returns the input of a graph.

    Raises:
        ValueError: it has several, or none that is a batch of images.
    """
    own = {each.name for each in model.graph.initializer}
    inputs = [each for each in model.graph.input if each.name not in own]
    if len(inputs) != 1:
        names = ", ".join(shown(each.name) for each in inputs[:8])
        raise ValueError(f"it must have one input, a batch of images, has {len(inputs)} ({names})")
    (image,) = inputs
    tensor = image.type.tensor_type
    if tensor.elem_type not in _FLOATS:
        kind = onnx.TensorProto.DataType.Name(tensor.elem_type) if tensor.elem_type else "no tensor"
        raise ValueError(f"its input must be of float32, float16 or float64, is {kind}")
    dims = [_size(dim) for dim in tensor.shape.dim]
    axis = len(dims) == 4 or not listed(model)
    dims = dims if axis else [1, *dims]
    if len(dims) != 4:
        raise ValueError(f"its input must be (images, channels, height, width), has {len(tensor.shape.dim)} axes")
    batch, *sizes = dims
    last = _is_channels_last(sizes)
    channels, height, width = (sizes[2], sizes[0], sizes[1]) if last else sizes
    if not channels:
        raise ValueError("its input must have a fixed number of channels: export it with dynamic axes for images alone")
    return Input(image.name, batch, height, width, channels, last, axis)


def tensor_outputs(model: onnx.ModelProto, kinds: Sequence[int] = _NUMBERS) -> tuple[str, ...]:
    """Returns the names of the outputs that are tensors of numbers of some kinds."""
    outputs = ((each.name, each.type.tensor_type.elem_type) for each in model.graph.output)
    return tuple(name for name, kind in outputs if kind in kinds)


def listed(model: onnx.ModelProto) -> tuple[str, str, str] | None:
    """Returns the names of boxes (M, 4), labels (M,) and scores (M,) of a graph that detects what is in one image.

    So are the detectors of torchvision when they are exported. None: the graph is none of these.
    """
    found: dict[str, list[str]] = {"boxes": [], "labels": [], "scores": []}
    for each in model.graph.output:
        tensor = each.type.tensor_type
        dims = [_size(dim) for dim in tensor.shape.dim] if tensor.HasField("shape") else []
        if tensor.elem_type in _FLOATS and len(dims) == 2 and dims[1] == 4 and dims[0] == 0:
            found["boxes"].append(each.name)
        elif len(dims) == 1 and dims[0] == 0:
            found["scores" if tensor.elem_type in _FLOATS else "labels"].append(each.name)
    if any(len(names) != 1 for names in found.values()):
        return None
    return found["boxes"][0], found["labels"][0], found["scores"][0]


def cut(model: onnx.ModelProto, tensor: str) -> Parts:
    """Returns the parts of a graph before and behind a tensor.

    Args:
        model: as `parsed` returns it.
        tensor: name of a tensor that a node makes.

    Raises:
        InvalidOption: there is no such tensor, or no score depends on it.
    """
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    nodes, image = list(model.graph.node), image_input(model).name
    made = [name for node in nodes for name in node.output if name]
    if tensor not in made:
        near = close_to(tensor, made, cutoff=0.3)
        hint = f"; close to it: {', '.join(near)}" if near else f"; the last ones: {', '.join(made[-5:])}"
        raise InvalidOption(f"the graph makes no tensor {shown(tensor)}{hint}")
    behind: set[str] = {tensor}
    late = []
    for node in nodes:  # in an order in which each comes behind all that it needs
        if tensor not in node.output and behind & set(_needed(node)):
            late.append(node)
            behind.update(node.output)
    outputs = [
        each
        for each in model.graph.output
        if each.name in behind - {tensor} and each.name in tensor_outputs(model, _FLOATS)
    ]
    if not outputs:
        raise InvalidOption(f"no score depends on the tensor {shown(tensor)}")
    late = _used(late, {each.name for each in outputs})
    own = {each.name for each in model.graph.initializer} | {
        each.values.name for each in model.graph.sparse_initializer
    }
    produced = {name for node in late for name in node.output}
    wanted = dict.fromkeys(name for node in late for name in _needed(node) if name not in produced | own | {tensor})
    # What does not depend on the image is made in the tail anew, so that all that is handed over is the image's.
    early = [node for node in nodes if tensor in node.output or not behind & set(node.output)]
    of_image = {image}
    for node in early:
        if of_image & set(_needed(node)):
            of_image.update(node.output)
    handed = [name for name in wanted if name in of_image]
    constant = _used(early, {name for name in wanted if name not in of_image})
    trunk = _used(early, {tensor, *handed})
    inputs = [each for each in model.graph.input if each.name == image]
    return Parts(
        _model(model, trunk, inputs, [onnx.ValueInfoProto(name=name) for name in (tensor, *handed)]),
        _model(model, [*constant, *late], [onnx.ValueInfoProto(name=name) for name in (tensor, *handed)], outputs),
    )


def _model(
    model: onnx.ModelProto,
    nodes: Sequence[onnx.NodeProto],
    inputs: Iterable[onnx.ValueInfoProto],
    outputs: Iterable[onnx.ValueInfoProto],
) -> onnx.ModelProto:
    """Returns a graph of some nodes of another one, with the numbers that they need."""
    needed = {name for node in nodes for name in _needed(node)}
    found = onnx.ModelProto(ir_version=model.ir_version)
    found.opset_import.extend(model.opset_import)
    found.graph.name = "part"
    found.graph.node.extend(nodes)
    found.graph.input.extend(inputs)
    found.graph.output.extend(outputs)
    found.graph.initializer.extend(each for each in model.graph.initializer if each.name in needed)
    found.graph.sparse_initializer.extend(each for each in model.graph.sparse_initializer if each.values.name in needed)
    return found


def _used(nodes: Sequence[onnx.NodeProto], wanted: set[str]) -> list[onnx.NodeProto]:
    """Returns the nodes that some tensors are made by, in their order."""
    kept, wanted = [], set(wanted)
    for node in reversed(nodes):
        if wanted & set(node.output):
            kept.append(node)
            wanted.update(_needed(node))
    return kept[::-1]


def _needed(node: onnx.NodeProto) -> Iterator[str]:
    """Yields the names that a node needs, those that graphs inside of it take from outside among them."""
    yield from (name for name in node.input if name)
    for graph in _inside(node):
        own = {each.name for each in graph.input} | {each.name for each in graph.initializer}
        for inner in graph.node:
            yield from (name for name in _needed(inner) if name not in own)
            own.update(inner.output)
        yield from (each.name for each in graph.output if each.name not in own)


def _inside(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Yields nodes and those of the graphs inside of them."""
    for node in nodes:
        yield node
        for graph in _inside(node):
            yield from _nodes(graph.node)


def _all_nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    yield from _nodes(model.graph.node)
    for function in model.functions:
        yield from _nodes(function.node)


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yields all numbers of a graph, wherever they are."""
    graphs = [model.graph]
    for node in _all_nodes(model):
        graphs.extend(_inside(node))
        for attribute in node.attribute:
            yield from (
                attribute.t,
                *attribute.tensors,
                attribute.sparse_tensor.values,
                attribute.sparse_tensor.indices,
            )
            for sparse in attribute.sparse_tensors:
                yield from (sparse.values, sparse.indices)
    for graph in graphs:
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)


def _is_outside(tensor: onnx.TensorProto) -> bool:
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data)


def _check_outside(model: onnx.ModelProto, folder: Path, size: int) -> None:
    """Raises ValueError where numbers beside a file lie outside of its folder, are not there, or too many."""
    root = folder.resolve()
    for tensor in filter(_is_outside, _tensors(model)):
        said = {entry.key: entry.value for entry in tensor.external_data}
        location = said.get("location", "")
        file = root / location
        if not location or not file.resolve().is_relative_to(root) or Path(location).is_absolute():
            raise ValueError(f"its numbers must lie in its own folder, and {shown(tensor.name)} in {shown(location)}")
        if not file.is_file():
            raise ValueError(f"the file {shown(location)} with its numbers is not there")
        there, start = file.stat().st_size, int(said.get("offset", 0))
        length = int(said.get("length", there - start))
        if not 0 <= start <= start + length <= there:
            raise ValueError(f"the numbers of {shown(tensor.name)} reach beyond the file {shown(location)}")
        size += length
    if size > MAX_BYTES:
        raise ValueError(f"it may have at most {MAX_BYTES} bytes with all of its numbers, has {size}")


def _check_operators(model: onnx.ModelProto) -> None:
    """Raises ValueError where a graph has operators that ONNX Runtime has not by itself."""
    own = {(function.domain, function.name) for function in model.functions}
    nodes = list(_all_nodes(model))
    strange = {
        f"{node.domain}.{node.op_type}".lstrip(".")
        for node in nodes
        if (node.domain, node.op_type) not in own and (node.domain not in _DOMAINS or node.op_type in _OPENS_FILES)
    }
    if strange:
        raise ValueError(
            f"its operators must be those of ONNX and ONNX Runtime, and it has {short(', '.join(sorted(strange)))}: no "
            "library of other operators is loaded"
        )
    known = onnx.defs.onnx_opset_version()
    newest = max((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), default=0)
    if newest > known:
        raise ValueError(
            f"its operators are of opset {newest}, and onnx {onnx.__version__} knows those up to {known}: export it "
            f"with an opset_version of at most {known}"
        )


def _size(dim: Any) -> int:
    """Returns the size of an axis; 0 where it has a name or none."""
    return int(dim.dim_value) if dim.HasField("dim_value") and dim.dim_value > 0 else 0


def _is_channels_last(sizes: Sequence[int]) -> bool:
    return sizes[2] in (1, 3) and sizes[0] not in (1, 3)

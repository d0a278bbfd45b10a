"""Finds the numbers that are explained among what a network returns: a tensor, or something that holds some.

Tuples, lists, dicts, dataclasses and Hugging Face's `ModelOutput` are gone through. A tensor of numbers for each image
is (B,), (B, C) or (B, C, 1, ...), one of maps (B, C, h, w): which of the two is wanted, the kind of outputs says. Which
tensor it is, and its shape, is found out once, with two images and with one, as a network may take away axes of length
1. From then on `Selected` is the network: it returns the numbers of each image in one row.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from camserve.errors import InvalidOption, Unsupported
from camserve.wording import shown

LOGITS = "logits"
"""Name of the field that is taken before others."""

_MOST_SHOWN = 8
"""Number of tensors that a text lists."""

Path = tuple[str | int, ...]
"""Keys, field names and indices that lead to a tensor; empty for what is itself the tensor."""


class Wrapped(nn.Module):
    """Stands for a network of which it makes another one, with its own `forward`.

    Its submodules have the names that they have in the network; its modes and hooks are those of the network.

    Args:
        network: the network.
    """

    _network: nn.Module

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.__dict__["_network"] = network  # no submodule: it would put its name before theirs
        self._modules, self._parameters, self._buffers = network._modules, network._parameters, network._buffers

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """Yields the modules of the network, itself first."""
        return iter(self._network.named_modules(*args, **kwargs))

    def train(self, mode: bool = True) -> Wrapped:
        """Sets the network's mode."""
        self._network.train(mode)
        return self


class Selected(Wrapped):
    """Makes of a network one that returns one of its outputs alone, (B, N); everything else is the network's own.

    Args:
        network: the network.
        path: where the output is in what it returns.
        numbers: N, how many numbers there are for each image.
    """

    def __init__(self, network: nn.Module, path: Path, numbers: int) -> None:
        super().__init__(network)
        self.path, self.numbers = path, numbers

    def forward(self, x: Tensor, *beside: Tensor) -> Tensor:
        """Returns the output, (B, N), of images (B, 3, H, W) and what the network takes beside them."""
        # Not by the number of images: a tail must not depend on the image in another way than through its layer.
        found: Tensor = _at(self._network(x, *beside), self.path)
        return found.reshape(-1, self.numbers)


def select(
    network: nn.Module,
    images: Tensor,
    output: str | None = None,
    wanted: int | None = None,
    axes: int = 1,
    tokens: Tensor | None = None,
) -> Found:
    """Returns the network as one that returns a row of numbers for each image, the network itself where it does.

    Args:
        network: in eval mode.
        images: two that differ, (2, channels, H, W).
        output: names of the fields, or indices, that lead to the output, joined by dots; None: `logits`, or else the
            first tensor of a shape that fits.
        wanted: C where it is known; a tensor with as many numbers, or maps, is taken before others.
        axes: number of axes that the output has for one image: 1 for numbers (C,), 3 for maps (C, h, w).
        tokens: tokens (2, T) that the network takes beside the images; None: it takes none.

    Raises:
        InvalidOption: there is no such output.
        Unsupported: no output has a shape that fits, or the named one has not.
    """
    with torch.no_grad():
        two, one = (network(some, *(() if tokens is None else (tokens[: len(some)],))) for some in (images, images[:1]))
    path = _path(two, output, len(images), wanted, axes)
    found = _at(two, path)
    numbers = found.numel() // len(images)
    selected = network if _is_plain(two) and _is_plain(one) else Selected(network, path, numbers)
    others = [_named(other) for other, tensor in _tensors(two) if other != path and _fits(tensor, len(images), axes)]
    shape = (numbers,) if axes == 1 else tuple(found.shape[1:])
    return Found(selected, found.reshape(-1, numbers), shape, _named(path), tuple(others))


@dataclasses.dataclass(frozen=True)
class Found:
    """Holds a network that returns one output alone, with how that was found."""

    network: nn.Module
    outputs: Tensor
    """Outputs (2, N) of the two images."""
    shape: tuple[int, ...]
    """Shape of the output for one image: (C,), or (C, h, w)."""
    output: str
    """Name of the output; "" for a network that returns nothing else."""
    others: tuple[str, ...]
    """Names of the other outputs that would fit."""


def _is_plain(returned: Any) -> bool:
    return isinstance(returned, Tensor) and returned.dim() == 2


def _path(returned: Any, output: str | None, batch: int, wanted: int | None, axes: int) -> Path:
    tensors = list(_tensors(returned))
    if output is not None:
        return _named_path(tensors, returned, output, batch, axes)
    fitting = [(path, tensor) for path, tensor in tensors if _fits(tensor, batch, axes)]
    if not fitting:
        said = f"{_WANTED[axes]} for {batch} images; it returned {described(returned)}"
        raise Unsupported(said + _hint([tensor for _, tensor in tensors], batch, axes))

    def order(entry: tuple[Path, Tensor]) -> tuple[bool, bool]:
        path, tensor = entry
        return path[-1:] != (LOGITS,), math.prod(tensor.shape[1:2]) != wanted

    return min(fitting, key=order)[0]  # the first of those that are first


def _named_path(tensors: list[tuple[Path, Tensor]], returned: Any, output: str, batch: int, axes: int) -> Path:
    path = next((path for path, _ in tensors if _named(path) == output), None) or _by_position(returned, output)
    tensor = None if path is None else _at(returned, path)
    if path is None or not isinstance(tensor, Tensor):
        raise InvalidOption(f"the network has no output {shown(output)}; it returned {described(returned)}")
    if not _fits(tensor, batch, axes):
        said = f"{_WANTED[axes]} for {batch} images; output {shown(output)} is {_shape(tensor)}"
        raise Unsupported(said + _hint([tensor], batch, axes))
    return path


def _by_position(returned: Any, output: str) -> Path | None:
    """Returns the path of an output that is named by indices, as a list has them; None where there is none."""
    path: Path = ()
    for index in output.split("."):
        items = list(_items(returned))
        if not index.removeprefix("-").isdecimal() or not -len(items) <= int(index) < len(items):
            return None
        key, returned = items[int(index)]
        path = (*path, key)
    return path


_WANTED = {
    1: "a network must return a tensor (images,), (images, numbers) or (images, numbers, 1, 1), or hold one,",
    3: "a network of outputs segmentation must return a tensor (images, classes, height, width), or hold one,",
}
"""Says what is wanted, by the number of axes for one image."""


def _hint(tensors: Sequence[Tensor], batch: int, axes: int) -> str:
    """Returns what to do where numbers are wanted, and the network has maps."""
    if axes != 1 or not any(_fits(tensor, batch, 3) for tensor in tensors):
        return ""
    return "; where these are logits of the classes of each place, say --outputs segmentation, or outputs= in Python"


def _fits(tensor: Tensor, batch: int, axes: int) -> bool:
    """Tells whether a tensor has some numbers, or maps, for each image, and nothing else."""
    shape = tensor.shape
    if not tensor.is_floating_point() or tensor.numel() == 0 or shape[:1] != (batch,):
        return False
    return math.prod(shape[2:]) == 1 if axes == 1 else tensor.dim() == 1 + axes


def _tensors(returned: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Yields the tensors in what a network returned, in order, each with its path."""
    if isinstance(returned, Tensor):
        yield path, returned
    for key, value in _items(returned):
        yield from _tensors(value, (*path, key))


def _items(returned: Any) -> Iterator[tuple[str | int, Any]]:
    if isinstance(returned, Mapping):  # ModelOutput is one, and a dataclass as well
        yield from ((key, value) for key, value in returned.items() if isinstance(key, str | int))
    elif dataclasses.is_dataclass(returned) and not isinstance(returned, type):
        yield from ((field.name, getattr(returned, field.name)) for field in dataclasses.fields(returned))
    elif isinstance(returned, tuple) and hasattr(returned, "_fields"):
        yield from zip(returned._fields, returned, strict=True)
    elif isinstance(returned, tuple | list):
        yield from enumerate(returned)


def _at(returned: Any, path: Path) -> Any:
    for key in path:
        if isinstance(returned, Mapping | tuple | list) and not (isinstance(key, str) and hasattr(returned, "_fields")):
            returned = returned[key]  # type: ignore[index]  # the path was found in it
        else:
            returned = getattr(returned, str(key))
    return returned


def _named(path: Path) -> str:
    return ".".join(map(str, path))


def described(returned: Any) -> str:
    """Returns what people read of it: `dict of 'features' (2, 512) float32, 'scores' (2, 10) float32`."""
    if isinstance(returned, Tensor):
        return f"a tensor {_shape(returned)}"
    tensors = [f"{_named(path)!r} {_shape(tensor)}" for path, tensor in _tensors(returned)]
    more = f" and {len(tensors) - _MOST_SHOWN} more" if len(tensors) > _MOST_SHOWN else ""
    holding = f" of {', '.join(tensors[:_MOST_SHOWN])}{more}" if tensors else ""
    return f"{type(returned).__name__}{holding}"


def _shape(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"

"""Finds the part of a network behind a layer, as a module of its own, through which altered activations are run.

torch.fx writes the forward down as a graph. Its part from the layer's last call to the logits is the tail. What else of
the image it depends on, such as a shortcut around the layer, is made by another part, once for an image; the size of
the image and the number of images may be asked. Weights and submodules are the network's own, not copies.

While it traces, torch.fx replaces `nn.Module.__call__` for the whole process. Here the calls of other threads go
through untouched, and one trace waits for the other.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from camserve.saliency.capture import ACTIVATIONS, Capture, address, with_output
from camserve.saliency.run import dtype_of

log = logging.getLogger(__name__)

SAME = 1e-4
"""Share of the largest logit by which the tail's logits may differ from the network's; rounding is far below it."""

_tracing = threading.Lock()


@dataclass(frozen=True)
class Tail:
    """Holds the part of a network behind a layer."""

    module: nn.Module
    """Module from raw outputs of the layer, and what is carried around it, to logits."""
    before: nn.Module | None
    """Module from images to the layer's raw output and what is carried around it, a tuple; None: nothing is carried."""

    def around(self, image: Tensor) -> tuple[Tensor, ...]:
        """Returns an image's own raw output of the layer and what is carried around it; () where nothing is.

        Args:
            image: (C, H, W), normalised.
        """
        if self.before is None:
            return ()
        with torch.no_grad():
            return tuple(self.before(image[None].to(dtype_of(self.before))))

    def __call__(self, raw: Tensor, around: Sequence[Tensor] = ()) -> Tensor:
        """Returns the logits (n, classes) of n raw outputs of the layer, all of them in place of one image's own.

        Args:
            raw: the outputs.
            around: what `around` returns of the image.
        """
        # Copies, because the tail may work in place.
        carried = (each.expand(len(raw), *each.shape[1:]).clone() for each in around[1:])
        return self.module(raw, *carried)  # type: ignore[no-any-return]


def find_tail(
    module: nn.Module, layer: str, captured: Capture, image: Tensor, calls: Sequence[int] = ()
) -> Tail | None:
    """Returns the tail behind the layer's last spatial call, or None where there is none to be had.

    Args:
        module: in eval mode; nothing is left on it.
        layer: address of the layer, as in `capture`.
        captured: one image's, from which the tail must make the same logits as the network does.
        image: (C, H, W), that image, normalised.
        calls: number of the layer's call that counts, as in `capture`.

    Returns:
        The tail; None where the forward cannot be traced, or where what comes after the layer depends on numbers of
        the image that are no tensors.
    """
    network = module
    # The copy shares everything; tracing may set tensors that it meets as attributes, which must not stay behind.
    module = copy.copy(module)
    try:
        graph = _trace(module, address(layer)[0])
    except Exception as error:
        # Any error may come of a forward that is given proxies in place of tensors.
        log.info("the network cannot be traced, so %s has no tail of its own: %s", layer, error)
        return None
    for call in _calls(graph, module, layer):
        tail = _behind(module, graph, call, image.shape)
        if tail is None or not _makes(tail, captured, image):
            continue
        if tail.before is None or _makes_of_others(tail, network, layer, calls, captured, image):
            return tail
    return None


class Opaque(nn.Module):
    """Is a module that is one operation of a network: what it computes is not written in operations of PyTorch."""


class _Tracer(fx.Tracer):
    """Traces a network, in which it keeps the layer whole and leaves other threads alone."""

    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        self._whole, self._owner = whole, threading.get_ident()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m is self._whole or isinstance(m, Opaque) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._owner:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any:
        if threading.get_ident() != self._owner:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)


def _trace(module: nn.Module, name: str) -> fx.Graph:
    with _tracing:
        return _Tracer(module.get_submodule(name)).trace(module)


def _calls(graph: fx.Graph, module: nn.Module, layer: str) -> Iterator[fx.Node]:
    """Yields the nodes that the address means, last call first; some may not be spatial."""
    name, activation = address(layer)
    whole = module.get_submodule(name)
    for node in reversed(graph.nodes):
        if not activation:
            call: Any = node
        elif ACTIVATIONS.get(_function(node)) == activation and node.args:
            call = node.args[0]
        else:
            continue
        if isinstance(call, fx.Node) and call.op == "call_module" and module.get_submodule(str(call.target)) is whole:
            yield node


def _function(node: fx.Node) -> Any:
    return getattr(Tensor, str(node.target), None) if node.op == "call_method" else node.target


def _behind(module: nn.Module, graph: fx.Graph, call: fx.Node, image: torch.Size) -> Tail | None:
    """Returns what the logits need from `call` on; None where the logits do not depend on it."""
    (logits,) = (node for node in graph.nodes if node.op == "output")
    after, shows = _dependent(graph, lambda node: node is call), _dependent(graph, _shows)
    if logits not in after:
        return None
    needed: set[fx.Node] = set()
    carried: list[fx.Node] = []
    waiting = [logits]
    while waiting:
        node = waiting.pop()
        if node is call or node in needed or node in carried:
            continue
        if node in shows and node not in after:
            carried.append(node)
        else:
            needed.add(node)
            waiting.extend(argument for argument in node.all_input_nodes if argument.op != "placeholder")
    tail = fx.Graph()
    raw = tail.placeholder("raw")
    made = {call: raw} | {node: tail.placeholder(f"carried_{index}") for index, node in enumerate(carried)}
    for node in graph.nodes:
        if node.op == "placeholder" and any(user in needed for user in node.users):
            made[node] = tail.call_function(_as_large, (raw, tuple(image)))
        elif node in needed:
            made[node] = tail.node_copy(node, lambda argument: made[argument])
    before = _up_to(module, graph, [call, *carried]) if carried else None
    return Tail(fx.GraphModule(module, tail), before)


def _dependent(graph: fx.Graph, begins: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """Returns the nodes of which this is true, and all that depend on one of them."""
    found: set[fx.Node] = set()
    for node in graph.nodes:  # what a node depends on comes before it
        if begins(node) or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _shows(node: fx.Node) -> bool:
    """Tells whether a node is made of the image itself, and not of its size alone."""
    return any(argument.op == "placeholder" for argument in node.all_input_nodes) and not _asks_size(node)


def _up_to(module: nn.Module, graph: fx.Graph, wanted: Sequence[fx.Node]) -> nn.Module:
    """Returns what makes these nodes' values of an image, as a tuple."""
    before, twins = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph.nodes:
        twins[node] = before.node_copy(node, lambda argument: twins[argument])
        if all(each in twins for each in wanted):
            break
    before.output(tuple(twins[node] for node in wanted))
    return fx.GraphModule(module, before)


def _asks_size(node: fx.Node) -> bool:
    """Tells whether a node asks how large a tensor is and nothing else, as `x.size(0)`, `x.shape` and `x.dim()` do."""
    if node.op == "call_method":
        return node.target in ("size", "dim")
    return node.op == "call_function" and node.target is getattr and node.args[1:] in (("shape",), ("ndim",))


def _as_large(raw: Tensor, image: tuple[int, ...]) -> Tensor:
    """Returns something of the size of as many images as there are outputs, without memory of its own."""
    return raw.new_zeros(()).expand(len(raw), *image)


def _makes(tail: Tail, captured: Capture, image: Tensor) -> bool:
    """Tells whether the tail makes the logits that the network made."""
    try:
        with torch.no_grad():
            # A copy, because the tail may work in place.
            logits = tail(captured.raw.clone(), tail.around(image))
    except Exception:
        # Another call of the layer may have an output of another shape, for which this tail is not made.
        return False
    return _alike(logits, captured.logits)


def _makes_of_others(
    tail: Tail, module: nn.Module, layer: str, calls: Sequence[int], captured: Capture, image: Tensor
) -> bool:
    """Tells whether the tail makes of other activations what the network makes with them in the layer's place.

    What is carried around the layer may depend on it after all, in a network that runs several times for one image.
    """
    own = captured.activations
    # Something is added, because a layer may be zero everywhere for an image.
    other = own.flip(-1) / 2 + torch.linspace(0, 1, own.numel(), dtype=own.dtype, device=own.device).view_as(own)
    maps = torch.cat([own, other])
    arrangement = captured.arrangement
    try:
        with torch.no_grad():
            logits = tail(arrangement.raw(maps.to(captured.raw.dtype), captured.raw), tail.around(image))
        expected = with_output(module, image.expand(2, -1, -1, -1), layer, calls, arrangement, maps)
    except Exception:
        return False
    return _alike(logits, expected)


def _alike(logits: object, expected: Tensor) -> bool:
    if not isinstance(logits, Tensor) or logits.shape != expected.shape:
        return False
    return bool((logits - expected).abs().max() <= SAME * expected.abs().max())

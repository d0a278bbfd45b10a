"""Finds the part of a network behind a layer, as a module of its own, through which altered activations are run.

torch.fx writes the forward down as a graph. Its part from the layer's last call to the logits is the tail, if it
depends on nothing else that the image has a part in, such as a shortcut around the layer; the size of the image and the
number of images may be asked. Weights and submodules are the network's own, not copies.

While it traces, torch.fx replaces `nn.Module.__call__` for the whole process. Here the calls of other threads go
through untouched, and one trace waits for the other.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from camserve.saliency.capture import ACTIVATIONS, Capture, address

log = logging.getLogger(__name__)

SAME = 1e-4
"""Share of the largest logit by which the tail's logits may differ from the network's; rounding is far below it."""

_tracing = threading.Lock()


def find_tail(module: nn.Module, layer: str, captured: Capture, image: torch.Size) -> nn.Module | None:
    """Returns the tail behind the layer's last spatial call, or None where there is none to be had.

    Args:
        module: in eval mode; nothing is left on it.
        layer: address of the layer, as in `capture`.
        captured: one image's, from which the tail must make the same logits as the network does.
        image: (C, H, W), the size of that image.

    Returns:
        A module from raw outputs of the layer to logits; None where the forward cannot be traced, or where what comes
        after the layer depends on more than the layer.
    """
    # The copy shares everything; tracing may set tensors that it meets as attributes, which must not stay behind.
    module = copy.copy(module)
    try:
        graph = _trace(module, address(layer)[0])
    except Exception as error:
        # Any error may come of a forward that is given proxies in place of tensors.
        log.info("the network cannot be traced, so %s has no tail of its own: %s", layer, error)
        return None
    for call in _calls(graph, module, layer):
        tail = _behind(module, graph, call, image)
        if tail is not None and _makes(tail, captured):
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


def _behind(module: nn.Module, graph: fx.Graph, call: fx.Node, image: torch.Size) -> nn.Module | None:
    """Returns what the logits need from `call` on; None if they also need what the image shows in another way."""
    (logits,) = (node for node in graph.nodes if node.op == "output")
    needed: set[fx.Node] = set()
    waiting = [logits]
    while waiting:
        node = waiting.pop()
        if node is call or node in needed:
            continue
        if any(argument.op == "placeholder" for argument in node.all_input_nodes) and not _asks_size(node):
            return None
        needed.add(node)
        waiting.extend(argument for argument in node.all_input_nodes if argument.op != "placeholder")
    tail = fx.Graph()
    raw = tail.placeholder("raw")
    made = {call: raw}
    for node in graph.nodes:
        if node.op == "placeholder" and any(user in needed for user in node.users):
            made[node] = tail.call_function(_as_large, (raw, tuple(image)))
        elif node in needed:
            made[node] = tail.node_copy(node, lambda argument: made[argument])
    return fx.GraphModule(module, tail)


def _asks_size(node: fx.Node) -> bool:
    """Tells whether a node asks how large a tensor is and nothing else, as `x.size(0)`, `x.shape` and `x.dim()` do."""
    if node.op == "call_method":
        return node.target in ("size", "dim")
    return node.op == "call_function" and node.target is getattr and node.args[1:] in (("shape",), ("ndim",))


def _as_large(raw: Tensor, image: tuple[int, ...]) -> Tensor:
    """Returns something of the size of as many images as there are outputs, without memory of its own."""
    return raw.new_zeros(()).expand(len(raw), *image)


def _makes(tail: nn.Module, captured: Capture) -> bool:
    """Tells whether the tail makes the logits that the network made."""
    try:
        with torch.no_grad():
            # A copy, because the tail may work in place.
            logits = tail(captured.raw.clone())
    except Exception:
        # Another call of the layer may have an output of another shape, for which this tail is not made.
        return False
    if not isinstance(logits, Tensor) or logits.shape != captured.logits.shape:
        return False
    return bool((logits - captured.logits).abs().max() <= SAME * captured.logits.abs().max())

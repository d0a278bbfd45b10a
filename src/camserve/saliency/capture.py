"""Runs one forward pass with its autograd graph starting at the target layer.

Everything before the layer runs without a graph; the layer's output becomes a leaf, so that a backward pass costs only
the tail. No parameter is touched: gradients are asked for the leaf alone. Hooks live inside one `with` and answer only
the thread that set them, so that one module object can serve several threads.

A layer is addressed by its module name, or by `name:relu` for a functional activation applied to the module's output
(DenseNet's last ReLU is no module). A module that runs several times in one forward counts at its last call.

Activations and gradients are handed out as maps (B, C, u, v), however the layer's raw output holds them; the leaf has
the raw shape, so the network runs on as it always does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from camserve.errors import InvalidOption, Unsupported
from camserve.saliency.arrangement import PLANES, Arrangement
from camserve.saliency.head import constant_gradients, is_pooled_linear
from camserve.scores import Targets

ACTIVATIONS: dict[Callable[..., Any], str] = {
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_), "relu"),
    F.relu6: "relu6",
    F.silu: "silu",
    F.gelu: "gelu",
    F.hardswish: "hardswish",
}
"""Functional activations that may follow a layer, each with the name that addresses it."""


@dataclass(frozen=True)
class Capture:
    """Holds what one forward pass of B images left at the layer."""

    activations: Tensor
    """The layer's maps (B, C, u, v), without graph."""
    logits: Tensor
    """Logits (B, classes), without graph."""
    _arrangement: Arrangement
    _leaf: Tensor = field(repr=False)
    """The layer's raw output, at which the graph starts."""
    _output: Tensor = field(repr=False)
    """Logits (B, classes), with graph where they depend on the layer."""
    _classifier: nn.Linear | None = field(default=None, repr=False)
    """The network's last linear layer, if it is known."""

    @property
    def raw(self) -> Tensor:
        """Returns the layer's raw output, without graph."""
        return self._leaf.detach()

    def gradients(self, targets: Targets) -> Tensor:
        """Returns dS/dA for each image's targets, in closed form behind global average pooling and one linear layer.

        Args:
            targets: K targets, the same for all images or K for each; each of them is one backward pass of the tail for
                all images at once, which is exact because images of a batch do not interact in eval mode.

        Returns:
            (B, K, C, u, v).

        Raises:
            InvalidOption: the logits do not depend on the layer.
        """
        if not self._output.requires_grad:
            raise InvalidOption("the logits do not depend on this layer")
        pooled = is_pooled_linear(self._classifier, self.activations, self.logits)
        if self._classifier is None or not targets.score.linear or not pooled.any():
            return self._differentiated(targets)
        closed = constant_gradients(self._classifier, targets, self.activations.shape[-2:])
        if pooled.all():
            return closed.expand(len(self.logits), -1, -1, -1, -1)
        return torch.where(pooled[:, None, None, None, None], closed, self._differentiated(targets))

    def each_gradient(self, targets: Targets) -> Iterator[Tensor]:
        """Yields the columns of `gradients`, (B, C, u, v), so that no more than one need be in memory."""
        for target in targets.columns():
            yield self.gradients(target)[:, 0]

    def _differentiated(self, targets: Targets) -> Tensor:
        columns = [target.value(self._output).sum() for target in targets.columns()]
        found = [torch.autograd.grad(column, self._leaf, retain_graph=True, allow_unused=True)[0] for column in columns]
        if found[0] is None:
            raise InvalidOption("the logits do not depend on this layer")
        return torch.stack([self._arrangement.maps(gradients) for gradients in found], dim=1)


def capture(
    module: nn.Module,
    x: Tensor,
    layer: str,
    calls: int = 1,
    arrangement: Arrangement = PLANES,
    classifier: nn.Linear | None = None,
) -> Capture:
    """Makes one forward pass of `module` on `x`, with activations and graph taken at `layer`.

    Args:
        module: in eval mode; nothing is left on it, also when its forward fails.
        x: (B, 3, H, W) normalised input.
        layer: address of the layer.
        calls: how often the layer runs in one forward, if known: the graph then starts at the last call only.
        arrangement: how the layer's output holds its maps.
        classifier: the last linear layer, if known: behind global average pooling it makes a backward pass needless.

    Raises:
        InvalidOption: no such layer, or it did not run.
        Unsupported: the layer's output is not arranged so, or the network's is not (B, classes).
    """
    start = _GraphStart(layer, calls, lambda output: is_spatial(output, len(x), arrangement))
    with torch.no_grad(), start.installed(module):
        output = module(x)
    if start.leaf is None and start.ran_without_space:
        raise Unsupported(f"layer {layer!r} does not return {_wanted(arrangement)}")
    if start.leaf is None:
        raise InvalidOption(f"layer {layer!r} does not run in the forward pass")
    if not isinstance(output, Tensor) or output.dim() != 2:
        raise Unsupported("the network must return logits of shape (batch, classes)")
    activations = arrangement.maps(start.leaf.detach())
    return Capture(activations, output.detach(), arrangement, start.leaf, output, classifier)


def with_output(module: nn.Module, x: Tensor, layer: str, calls: int, arrangement: Arrangement, maps: Tensor) -> Tensor:
    """Returns the logits (B, classes) of `x` with the layer's last output replaced.

    Args:
        module: in eval mode; nothing is left on it.
        x: (B, 3, H, W) normalised input.
        layer: address of the layer.
        calls: how often the layer runs in one forward.
        arrangement: how the layer's output holds its maps.
        maps: (B, C, u, v), which the output in its place holds.
    """
    replacement = _Replacement(layer, calls, arrangement, maps)
    with torch.no_grad(), replacement.installed(module):
        logits: Tensor = module(x)
    return logits


def is_spatial(output: Any, batch: int, arrangement: Arrangement) -> bool:
    """Tells whether this is a raw output of `batch` images in this arrangement, with more than one cell."""
    return isinstance(output, Tensor) and arrangement.fits(output) and len(output) == batch


def _wanted(arrangement: Arrangement) -> str:
    if arrangement.grid is not None:
        return f"(batch, {arrangement.own_tokens} + {arrangement.grid[0]} x {arrangement.grid[1]} tokens, channels)"
    axes = "height, width, channels" if arrangement.channels_last else "channels, height, width"
    return f"(batch, {axes}) larger than 1 x 1"


class _GraphStart:
    """Turns the layer's output into the leaf of a new graph."""

    def __init__(self, layer: str, calls: int, is_wanted: Callable[[Any], bool]) -> None:
        self.name, _, self.activation = layer.partition(":")
        self.calls_left = calls
        self.is_wanted = is_wanted
        self.leaf: Tensor | None = None
        self.ran_without_space = False
        self._before_activation: Tensor | None = None

    @contextmanager
    def installed(self, module: nn.Module) -> Iterator[None]:
        owner = threading.get_ident()

        def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            return self._at_layer(output) if threading.get_ident() == owner else None

        with ExitStack() as stack:
            handle = _submodule(module, self.name).register_forward_hook(hook)
            stack.callback(handle.remove)
            if self.activation:
                stack.enter_context(_AfterActivation(self))
            yield

    def _at_layer(self, output: Any) -> Any:
        if not self.is_wanted(output):
            # No error yet: one activation module may serve the features and the head.
            self.ran_without_space = True
            return None
        if self.activation:
            self._before_activation = output
            return None
        return self.start_graph(output)

    def start_graph(self, output: Tensor) -> Tensor | None:
        """Makes the output of the last call the leaf; returns a copy to go on with, None where nothing is replaced."""
        self.calls_left -= 1
        if self.calls_left > 0:
            return None
        # A copy, because the network may alter its output in place after this.
        self.leaf = output.detach().clone().requires_grad_()
        # The forward runs inside `no_grad`, which sets the mode back when it ends.
        torch.set_grad_enabled(True)
        # The network goes on with a second copy, because autograd forbids in-place operations on a leaf.
        return self.leaf.clone()

    def follows(self, function: Callable[..., Any], argument: Any) -> bool:
        """Tells whether this call is the addressed activation, on the layer's output."""
        return argument is self._before_activation and ACTIVATIONS.get(function) == self.activation


class _Replacement(_GraphStart):
    """Replaces the layer's output by one that holds other maps."""

    def __init__(self, layer: str, calls: int, arrangement: Arrangement, maps: Tensor) -> None:
        super().__init__(layer, calls, lambda output: is_spatial(output, len(maps), arrangement))
        self._arrangement, self._maps = arrangement, maps

    def start_graph(self, output: Tensor) -> Tensor | None:
        """Returns the output that holds the other maps, once the last call is reached."""
        self.calls_left -= 1
        return None if self.calls_left > 0 else self._arrangement.raw(self._maps, output)


class _AfterActivation(TorchFunctionMode):
    """Watches for the functional activation that follows the layer."""

    def __init__(self, start: _GraphStart) -> None:
        super().__init__()
        self._start = start

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if args and isinstance(args[0], Tensor) and self._start.follows(func, args[0]):
            # With no calls left the graph has started: the same activation once more must not start another.
            return self._start.start_graph(result) if self._start.calls_left else result
        return result


def _submodule(module: nn.Module, name: str) -> nn.Module:
    try:
        return module.get_submodule(name)
    except AttributeError:
        raise InvalidOption(f"unknown layer {name!r}") from None

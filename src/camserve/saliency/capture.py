"""Runs one forward pass with its autograd graph starting at the target layer.

Everything before the layer runs without a graph; the layer's output becomes a leaf, so that a backward pass costs only
the tail. No parameter is touched: gradients are asked for the leaf alone. Hooks live inside one `with` and answer only
the thread that set them, so that one module object can serve several threads.

A layer is addressed by its module name, or by `name:relu` for a functional activation applied to the module's output
(DenseNet's last ReLU is no module). Other names may have a colon, too: tensors of ONNX graphs are called `name:0`.
A module that runs several times in one forward counts at its last call, unless it is told at which. At several calls
its maps are those of all of them, one after the other: as many times the channels.

Activations and gradients are handed out as maps (B, C, u, v), however the layer's raw output holds them; the leaf has
the raw shape, so the network runs on as it always does. Of a network in half precision they come in float32.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from camserve.errors import InvalidOption, Unsupported
from camserve.saliency.arrangement import PLANES, Arrangement
from camserve.saliency.flow import KeptGradients
from camserve.saliency.head import constant_gradients, is_pooled_linear
from camserve.saliency.run import run, single
from camserve.scores import Targets

ACTIVATIONS: dict[Callable[..., Any], str] = {
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_), "relu"),
    F.relu6: "relu6",
    F.silu: "silu",
    F.gelu: "gelu",
    F.hardswish: "hardswish",
}
"""Functional activations that may follow a layer, each with the name that addresses it."""


def address(layer: str) -> tuple[str, str]:
    """Returns the name of the module that a layer's name means, and that of the activation behind it, "" for none."""
    name, _, activation = layer.rpartition(":")
    return (name, activation) if activation in ACTIVATIONS.values() and name else (layer, "")


@dataclass(frozen=True)
class Graph:
    """Holds the autograd graph of the tail, which starts at the layer."""

    leaves: tuple[Tensor, ...]
    """The layer's raw output at each of its calls, at which the graph starts."""
    output: Tensor
    """Logits (B, classes), with graph where gradients flow to the layer."""


@dataclass(frozen=True)
class Capture:
    """Holds what one forward pass of B images left at the layer."""

    activations: Tensor
    """The layer's maps (B, C, u, v), without graph; float32 where the network has half precision."""
    logits: Tensor
    """Logits (B, classes), without graph."""
    raw: Tensor
    """The layer's raw output at its last call, without graph."""
    arrangement: Arrangement
    """Arrangement of the maps in the raw output."""
    graph: Callable[[], Graph] = field(repr=False)
    """Function that returns the graph; the first call may have to make it."""
    _classifier: nn.Linear | None = field(default=None, repr=False)
    """The network's last linear layer, if it is known."""

    def gradients(self, targets: Targets, together: int = 1) -> Tensor:
        """Returns dS/dA for each image's targets, in closed form behind global average pooling and one linear layer.

        Args:
            targets: K targets, the same for all images or K for each; one backward pass of the tail serves all images,
                which is exact because images of a batch do not interact in eval mode, and several targets, by
                vectorising (`is_grads_batched` of `torch.autograd.grad`): weights are read once for all of them.
            together: images times targets of one backward pass at most, so that memory is bounded; or all images, and
                one target.

        Returns:
            (B, K, C, u, v).

        Raises:
            Unsupported: the forward cuts gradients between the layer and the logits, and there is no closed form.
        """
        pooled = is_pooled_linear(self._classifier, self.activations, self.logits)
        if self._classifier is None or not targets.score.linear or not pooled.any():
            return self._differentiated(targets, together)
        closed = constant_gradients(self._classifier, targets, len(self.logits), self.activations.shape[-2:])
        if pooled.all():
            return closed
        return torch.where(pooled[:, None, None, None, None], closed, self._differentiated(targets, together))

    def each_gradient(self, targets: Targets) -> Iterator[Tensor]:
        """Yields the columns of `gradients`, (B, C, u, v), so that no more than one need be in memory."""
        for target in targets.columns():
            yield self.gradients(target)[:, 0]

    def _differentiated(self, targets: Targets, together: int) -> Tensor:
        graph = self.graph()
        if not graph.output.requires_grad:
            raise Unsupported(CUT)
        columns = torch.stack([_of_logits(graph.output, target) for target in targets.columns()])
        parts = torch.split(columns, max(1, together // len(graph.output)))
        found = [maps for some in parts for maps in self._of_leaves(graph, some)]
        return torch.stack(found, dim=1)

    def _of_leaves(self, graph: Graph, columns: Tensor) -> list[Tensor]:
        """Returns dS/dA, (B, C, u, v), for each of dS/dlogits, (K, B, classes)."""
        if len(columns) > 1:
            # Some backward passes cannot be vectorised, such as one that reads a number from its gradients; and where
            # memory is short, one may fit where K do not.
            with suppress(RuntimeError):
                found = _backward(graph, columns, is_grads_batched=True)
                return [maps_of([leaf[row] for leaf in found], self.arrangement) for row in range(len(columns))]
        return [maps_of(_backward(graph, column), self.arrangement) for column in columns]


def _of_logits(logits: Tensor, target: Targets) -> Tensor:
    """Returns dS/dlogits, (B, classes), of one target for each image."""
    logits = logits.detach().requires_grad_()
    with torch.enable_grad():
        torch.autograd.backward(target.value(logits).sum(), inputs=[logits])
    assert logits.grad is not None
    return logits.grad


def _backward(graph: Graph, of_logits: Tensor, is_grads_batched: bool = False) -> Sequence[Tensor]:
    """Returns the gradients of the layer's raw output at each of its calls; batched ones have K rows in front."""
    found = torch.autograd.grad(
        graph.output, graph.leaves, of_logits, retain_graph=True, allow_unused=True, is_grads_batched=is_grads_batched
    )
    if any(gradients is None for gradients in found):
        raise Unsupported(CUT)
    return found


CUT = (
    "no gradient of the scores reaches this layer, because the network's forward cuts it, with `detach` for instance; "
    "the methods that need no gradients work: score_cam, ss_cam, is_cam, ablation_cam, recipro_cam, eigen_cam, rise, "
    "occlusion"
)


SHARED = 1e-4
"""Share of a layer's largest value by which its maps may differ between passes with several texts; rounding is less."""

SEVERAL = (
    "the layer's maps depend on the words before, so that those of several words are no one map: ask for one word at a "
    "time (word:1), or at an earlier layer"
)


def capture(
    module: nn.Module,
    x: Tensor,
    layer: str,
    calls: Sequence[int] = (),
    arrangement: Arrangement = PLANES,
    classifier: nn.Linear | None = None,
    keeps: bool = False,
) -> Capture:
    """Makes one forward pass of `module` on `x`, with activations and graph taken at `layer`.

    Args:
        module: in eval mode; nothing is left on it, also when its forward fails.
        x: (B, 3, H, W) normalised input.
        layer: address of the layer.
        calls: numbers of the calls of the layer that count, from 1, among those with a spatial output, ascending; none:
            its last one, which has not been found out.
        arrangement: how the layer's output holds its maps.
        classifier: the last linear layer, if known: behind global average pooling it makes a backward pass needless.
        keeps: whether the forward is kept from switching gradients off: see `camserve.saliency.flow`.

    Raises:
        InvalidOption: no such layer, or it did not run.
        Unsupported: the layer's output is not arranged so, or the network's is not (B, classes).
    """
    kept = KeptGradients(on=False) if keeps else None
    start = _GraphStart(layer, calls, lambda output: is_spatial(output, len(x), arrangement), kept)
    with torch.no_grad(), kept or nullcontext(), start.installed(module):
        output = run(module, x)
    if not start.leaves and start.ran_without_space:
        raise Unsupported(f"layer {layer!r} does not return {_wanted(arrangement)}")
    if len(start.leaves) < max(1, len(calls)):
        raise InvalidOption(f"layer {layer!r} does not run in the forward pass")
    graph, raw = Graph(tuple(start.leaves), output), [leaf.detach() for leaf in start.leaves]
    return Capture(maps_of(raw, arrangement), output.detach(), raw[-1], arrangement, lambda: graph, classifier)


def with_output(
    module: nn.Module, x: Tensor, layer: str, calls: Sequence[int], arrangement: Arrangement, maps: Tensor
) -> Tensor:
    """Returns the logits (B, classes) of `x` with the layer's output replaced at the calls that count.

    Args:
        module: in eval mode; nothing is left on it.
        x: (B, 3, H, W) normalised input.
        layer: address of the layer.
        calls: numbers of the calls that count, as in `capture`.
        arrangement: how the layer's output holds its maps.
        maps: (B, C, u, v), which the output in its place holds; for several calls those of all of them.
    """
    replacement = _Replacement(layer, calls, arrangement, maps)
    with torch.no_grad(), replacement.installed(module):
        return run(module, x)


def is_spatial(output: Any, batch: int, arrangement: Arrangement) -> bool:
    """Tells whether this is a raw output of `batch` images in this arrangement, with more than one cell."""
    return isinstance(output, Tensor) and arrangement.fits(output) and len(output) == batch


def maps_of(raw: Sequence[Tensor], arrangement: Arrangement) -> Tensor:
    """Returns the maps (B, C, u, v) of a layer's calls, one after the other, in float32 at least."""
    maps = [single(arrangement.maps(each)) for each in raw]
    return maps[0] if len(maps) == 1 else torch.cat(maps, dim=1)


def _wanted(arrangement: Arrangement) -> str:
    if arrangement.grid is not None:
        return f"(batch, {len(arrangement.own)} + {arrangement.grid[0]} x {arrangement.grid[1]} tokens, channels)"
    axes = "height, width, channels" if arrangement.channels_last else "channels, height, width"
    return f"(batch, {axes}) larger than 1 x 1"


class Tap:
    """Calls back with a layer's spatial outputs at the calls that count, and puts what comes back in their place.

    Args:
        layer: address of the layer.
        calls: numbers of the calls that count; none: each, so that the last one is among them.
        is_wanted: function that tells whether an output is spatial.
    """

    def __init__(self, layer: str, calls: Sequence[int], is_wanted: Callable[[Any], bool]) -> None:
        self.name, self.activation = address(layer)
        self.ran_without_space = False
        self._calls = calls
        self._is_wanted = is_wanted
        self._number = 0
        self._inside = 0
        self.passes = 0
        """Number of passes of the network that have begun; one that is asked with several texts runs several times."""
        self._before_activation: Tensor | None = None

    def at(self, output: Tensor, index: int) -> Tensor | None:
        """Returns what stands in for the output of the call of this index among those that count; None: itself."""
        raise NotImplementedError

    @contextmanager
    def installed(self, module: nn.Module) -> Iterator[None]:
        """Watches the layer inside, in this thread alone."""
        owner = threading.get_ident()

        def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            return self._at_layer(output) if threading.get_ident() == owner else None

        def begins(_module: nn.Module, _inputs: Any) -> None:
            if threading.get_ident() == owner:
                self._begin()

        def ends(_module: nn.Module, _inputs: Any, _output: Any) -> None:
            if threading.get_ident() == owner:
                self._inside -= 1

        whole = next(module.modules())
        with ExitStack() as stack:
            handle = _submodule(module, self.name).register_forward_hook(hook)
            stack.callback(handle.remove)
            stack.callback(whole.register_forward_pre_hook(begins).remove)
            stack.callback(whole.register_forward_hook(ends).remove)
            if self.activation:
                stack.enter_context(_AfterActivation(self))
            yield

    def _begin(self) -> None:
        """Counts calls from 1 again in each pass of the network; a network may call itself inside of one."""
        self._inside += 1
        if self._inside == 1:
            self.passes += 1
            self._number = 0

    def _at_layer(self, output: Any) -> Any:
        if not self._is_wanted(output):
            # No error yet: one activation module may serve the features and the head.
            self.ran_without_space = True
            return None
        if self.activation:
            self._before_activation = output
            return None
        return self.called(output)

    def called(self, output: Tensor) -> Tensor | None:
        """Counts a call, and returns what stands in for its output."""
        self._number += 1
        if not self._calls:
            return self.at(output, 0)
        return self.at(output, self._calls.index(self._number)) if self._number in self._calls else None

    def follows(self, function: Callable[..., Any], argument: Any) -> bool:
        """Tells whether this call is the addressed activation, on the layer's output."""
        return argument is self._before_activation and ACTIVATIONS.get(function) == self.activation

    def once(self) -> None:
        """Forgets the output that an activation has followed: the same activation once more is no other call."""
        self._before_activation = None


class _GraphStart(Tap):
    """Turns the layer's outputs into leaves of a new graph."""

    def __init__(
        self, layer: str, calls: Sequence[int], is_wanted: Callable[[Any], bool], kept: KeptGradients | None
    ) -> None:
        super().__init__(layer, calls, is_wanted)
        self.leaves: list[Tensor] = []
        self._kept = kept

    def at(self, output: Tensor, index: int) -> Tensor | None:
        """Makes the output a leaf, in place of an earlier one of this index; returns a copy to go on with.

        In a further pass of the network the leaf of the first one stands in: gradients of all passes meet there.
        """
        if self.passes > 1:
            if not torch.allclose(output, self.leaves[index], rtol=SHARED, atol=SHARED * float(output.abs().max())):
                raise Unsupported(SEVERAL)
            return self.leaves[index].clone()
        # A copy, because the network may alter its output in place after this.
        leaf = output.detach().clone().requires_grad_()
        self.leaves[index:] = [leaf]
        # The forward runs inside `no_grad`, which sets the mode back when it ends.
        if self._kept is None:
            torch.set_grad_enabled(True)
        else:
            self._kept.open()
        # The network goes on with a second copy, because autograd forbids in-place operations on a leaf.
        return leaf.clone()


class _Replacement(Tap):
    """Replaces the layer's outputs by some that hold other maps."""

    def __init__(self, layer: str, calls: Sequence[int], arrangement: Arrangement, maps: Tensor) -> None:
        super().__init__(layer, calls, lambda output: is_spatial(output, len(maps), arrangement))
        self._arrangement = arrangement
        self._maps = maps.chunk(max(1, len(calls)), dim=1)

    def at(self, output: Tensor, index: int) -> Tensor | None:
        """Returns the output that holds the other maps."""
        return self._arrangement.raw(self._maps[index].to(output.dtype), output)


class _AfterActivation(TorchFunctionMode):
    """Watches for the functional activation that follows the layer."""

    def __init__(self, tap: Tap) -> None:
        super().__init__()
        self._tap = tap

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if args and isinstance(args[0], Tensor) and self._tap.follows(func, args[0]):
            self._tap.once()
            other = self._tap.called(result)
            return result if other is None else other
        return result


def _submodule(module: nn.Module, name: str) -> nn.Module:
    try:
        return module.get_submodule(name)
    except AttributeError:
        raise InvalidOption(f"unknown layer {name!r}") from None

"""Watches one forward pass: which layers return maps, in which order, and what the scores depend on.

The rules need shapes and the order of calls alone, no values and no names.

Convolutions, normalisations over planes and poolings return planes; `nn.Linear` and `nn.LayerNorm` return channels
last. Whatever else is 4-D is arranged as the last output of its shape was, or else by which two of its axes have the
input's proportions. What is arranged in none of these ways is no layer: the windows of MaxViT, the heads of an
attention. A 3-D output is a sequence of tokens if its length is that of a grid seen before it and a few more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import dropout, pooling
from torch.overrides import TorchFunctionMode

from camserve.saliency.arrangement import CHANNELS_LAST, PLANES, Arrangement, token_grid
from camserve.saliency.capture import ACTIVATIONS, address
from camserve.saliency.flow import Node, SeenThrough, reached
from camserve.saliency.run import run, single
from camserve.saliency.seen_attention import FUSED_ATTENTION, SOFTMAX

_CONVOLUTION = nn.modules.conv._ConvNd
_HEAD = (nn.Linear, _CONVOLUTION)
_POOLING = tuple(getattr(pooling, name) for name in pooling.__all__)
_NORM = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)
_PLANES = (_CONVOLUTION, nn.modules.batchnorm._BatchNorm, nn.GroupNorm, *_POOLING)
_CHANNELS_LAST = (nn.Linear, nn.LayerNorm)
_NOT_FEATURES = (*_POOLING, dropout._DropoutNd, nn.Identity, nn.Flatten)


MOST_OWN_TOKENS = 16
"""Largest number of class token, distillation token and registers together."""


@dataclass(frozen=True)
class Event:
    """Describes one call of a layer, or of the activation that follows one, that has returned maps."""

    name: str
    """Address of the layer."""
    number: int
    """Number of the call, from 1, among those of the same address that fit the arrangement."""
    output: Tensor
    """The raw output."""
    arrangement: Arrangement
    is_feature: bool
    is_norm: bool
    node: Node | None
    """Node of the output in autograd's graph; None where the image has no part in it."""
    pooled: Tensor | None
    """The maps' means over space (1, C), where the output is no sequence of tokens; None on a device without values."""


@dataclass(frozen=True)
class HeadCall:
    """Describes one call of a linear layer or convolution, any of which may be the head."""

    module: nn.Module
    start: int
    """Number of events before it was called."""
    width: int
    """Number of its output channels."""
    node: Node | None
    is_pointwise: bool
    """Whether it looks at one place at a time."""


@dataclass(frozen=True)
class Attention:
    """Describes one attention: a mean over places, weighted by a softmax."""

    inside: range
    """Events inside the module that holds it, up to it."""
    node: Node | None
    """Node of the mean, or of its weights."""
    source: Node | None
    """Node of what the module that holds it was given."""


class Watch:
    """Watches one forward pass of one image, and keeps what was seen.

    Args:
        example: the image, (1, 3, H, W).
    """

    def __init__(self, example: Tensor) -> None:
        self.example = example
        self.events: list[Event] = []
        """Outputs that hold maps, in order of appearance."""
        self.heads: list[HeadCall] = []
        """Calls of linear layers and convolutions, in order of their end."""
        self.attentions: list[Attention] = []
        self.scores = example
        """The network's scores (1, classes)."""
        self.interfered = False
        """Whether the forward has tried to switch gradients off."""
        self.root: Node | None = None
        """Node of the scores; None where the graph does not reach from them to any layer."""
        self.cuts: set[Node] = set()
        """Nodes at which the network's own gradients end."""
        self._entered: list[tuple[nn.Module, int, Node | None]] = []
        """The modules that are running now, the number of events before each was entered, and the node of its input."""
        self._arrangements = _Arrangements(example)
        self._outputs: dict[str, list[Tensor]] = {}

    def run(self, module: nn.Module, graph: bool = True) -> None:
        """Makes the forward pass, with a graph or without. Nothing is left on the module, whatever happens."""
        with ExitStack() as stack:
            for name, child in module.named_modules():
                stack.callback(child.register_forward_pre_hook(self._enter).remove)
                handle = child.register_forward_hook(lambda m, x, out, name=name: self._leave(name, m, x, out))
                stack.callback(handle.remove)
            flow = SeenThrough(graph)
            stack.enter_context(flow)
            stack.enter_context(_Functions(self))
            x = self.example.detach().clone().requires_grad_(graph)
            self.scores = run(module, x.clone())  # autograd forbids in-place operations on a leaf
        self.interfered, self.cuts = flow.interfered, flow.cuts
        found = reached(self.scores.grad_fn)
        self.root = self.scores.grad_fn if any(event.node in found for event in self.events) else None

    def depended(self, stops: Sequence[Node] = ()) -> set[Node] | None:
        """Returns the nodes that the scores depend on other than through these; None where nothing is known of it."""
        return None if self.root is None else reached(self.root, frozenset(stops))

    def means(self) -> set[Node]:
        """Returns the nodes of the events that see the picture through an attention alone, and not past it."""
        behind = {node for attention in self.attentions for node in (attention.node, attention.source)} - {None}
        found: set[Node] = set()
        others: set[Node] = set()
        for event in self.events:
            if event.node is not None and event.node not in found:
                is_mean = _ends_at(event.node, behind | found, others)
                (found if is_mean else others).add(event.node)
        return found

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        source = inputs[0].grad_fn if inputs and isinstance(inputs[0], Tensor) else None
        self._entered.append((module, len(self.events), source))

    def _leave(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        _, start, _ = self._entered.pop()
        if not isinstance(output, Tensor) or output.shape[:1] != self.example.shape[:1]:
            return
        if isinstance(module, _HEAD):
            width = module.out_features if isinstance(module, nn.Linear) else module.out_channels
            is_pointwise = isinstance(module, nn.Linear) or max(module.kernel_size) == 1
            self.heads.append(HeadCall(module, start, width, output.grad_fn, is_pointwise))
        if name:
            is_feature = not isinstance(module, _NOT_FEATURES) and type(module) is not nn.Sequential
            is_feature = is_feature and not _is_rearranged(inputs, output)
            self._add(name, output, self._arrangements.of(module, output), is_feature, isinstance(module, _NORM))

    def _add(
        self, name: str, output: Tensor, arrangement: Arrangement | None, is_feature: bool, is_norm: bool = False
    ) -> None:
        outputs = self._outputs.setdefault(name, [])
        outputs.append(output)
        if arrangement is None:
            return
        number = sum(arrangement.fits(each) for each in outputs)
        pooled = None
        if arrangement.grid is None and not output.is_meta:
            pooled = single(arrangement.maps(output.detach())).mean(dim=(-2, -1))
        self.events.append(Event(name, number, output, arrangement, is_feature, is_norm, output.grad_fn, pooled))

    def called(self, function: Callable[..., Any], argument: Any, result: Any) -> None:
        """Notes a call of the activation that follows a layer directly, or of an attention."""
        if function in ACTIVATIONS and isinstance(argument, Tensor):
            source = _source(self.events, argument)
            if source is not None:
                self._add(f"{source.name}:{ACTIVATIONS[function]}", result, source.arrangement, is_feature=True)
        if function in FUSED_ATTENTION or (function in SOFTMAX and result.dim() == 4):
            made = result[0] if isinstance(result, tuple) else result
            holders = [entered for entered in self._entered if not isinstance(entered[0], nn.Softmax)]
            _, start, source = holders[-1]
            self.attentions.append(Attention(range(start, len(self.events)), made.grad_fn, source))


class _Arrangements:
    """Tells how outputs are arranged, from what was seen before them."""

    def __init__(self, example: Tensor) -> None:
        self._height, self._width = example.shape[-2:]
        self._seen: dict[torch.Size, Arrangement | None] = {}
        """Arrangements of 4-D outputs by shape, in the order in which each was seen last."""
        self._lengths: set[int] = set()
        """Lengths of the sequences of tokens seen."""

    def of(self, module: nn.Module, output: Tensor) -> Arrangement | None:
        """Returns how an output holds maps; None where it holds none."""
        if output.dim() == 4:
            found = self._four_dimensional(module, output)
            # A dict keeps the order of insertion: taken out first, the shape seen last stands last.
            self._seen.pop(output.shape, None)
            self._seen[output.shape] = found
            return found if found is not None and found.fits(output) else None
        if output.dim() == 3 and not isinstance(module, (*_PLANES, nn.Flatten)):
            found = self._tokens(output.shape[1])
            if found is not None:
                self._lengths.add(output.shape[1])
            return found
        return None

    def _four_dimensional(self, module: nn.Module, output: Tensor) -> Arrangement | None:
        first, second, third = output.shape[1:]
        if isinstance(module, _PLANES):
            return PLANES
        if any(low == high and low in self._lengths for low, high in ((first, second), (second, third))):
            return None  # what each token takes from each other one: an attention's weights
        if type(module) in _CHANNELS_LAST:  # a subclass may be torchvision's LayerNorm2d, which returns planes
            return CHANNELS_LAST if self._has_proportions(first, second) else None
        if output.shape in self._seen:
            return self._seen[output.shape]
        if self._has_proportions(second, third):
            return PLANES
        return CHANNELS_LAST if self._has_proportions(first, second) else None

    def _has_proportions(self, height: int, width: int) -> bool:
        """Tells whether a grid has the input's proportions, to within one cell."""
        return abs(height * self._width - width * self._height) <= max(self._height, self._width)

    def _tokens(self, length: int) -> Arrangement | None:
        for height, width in self._grids(length):
            own = length - height * width
            if 0 <= own <= min(MOST_OWN_TOKENS, height * width - 1) and height * width > 1:
                return token_grid(height, width, own)
        return None

    def _grids(self, length: int) -> Iterator[tuple[int, int]]:
        """Yields the grids seen, last one first; then one of the input's proportions, for patches cut by reshaping."""
        for shape, arrangement in reversed(self._seen.items()):
            if arrangement is not None:
                yield (shape[1], shape[2]) if arrangement.channels_last else (shape[2], shape[3])
        divisor = math.gcd(self._height, self._width)
        height, width = self._height // divisor, self._width // divisor
        times = math.isqrt(length // (height * width))
        yield height * times, width * times


class _Functions(TorchFunctionMode):
    """Tells a watch of the functions that are called."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._watch.called(func, args[0] if args else None, result)
        return result


def _is_rearranged(inputs: Any, output: Tensor) -> bool:
    """Tells whether the output is the input seen in another way, as torchvision's `Permute` returns it."""
    source = inputs[0] if inputs and isinstance(inputs[0], Tensor) else None
    if source is None or output is source or output._base is None:
        return False
    return output._base is source or output._base is source._base


def _source(events: Sequence[Event], tensor: Tensor) -> Event | None:
    """Returns the event of the innermost module whose output this is, when nothing came after it."""
    same = []
    for event in reversed(events):
        if event.output is not tensor:
            break
        same.append(event)
    return next((event for event in reversed(same) if not address(event.name)[1]), None)


def _ends_at(node: Node, stops: Collection[Node], others: Collection[Node]) -> bool:
    """Tells whether the ways from a node meet one of the stops, and none of the others before."""
    met = False
    seen: set[Node] = set()
    waiting = [following for following, _ in node.next_functions]
    while waiting:
        following = waiting.pop()
        if following in stops:
            met = True
        elif following in others:
            return False
        elif following is not None and following not in seen:
            seen.add(following)
            waiting.extend(further for further, _ in following.next_functions)
    return met

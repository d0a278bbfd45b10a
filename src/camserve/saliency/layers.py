"""Finds which layers a network has to explain, and which one to take, by watching one forward pass.

The rules need shapes and the order of calls alone, no values and no names.

Spatial outputs. Convolutions, normalisations over planes and poolings return planes; `nn.Linear` and `nn.LayerNorm`
return channels last. Whatever else is 4-D is arranged as the last output of its shape was, or else by which two of its
axes have the input's proportions. What is arranged in none of these ways is no layer: the windows of MaxViT, the heads
of an attention. A 3-D output is a sequence of tokens if its length is that of a grid seen before it and a few more.

The default layer is the last feature layer after its activation that is made before the classifier (the last linear or
convolution layer). One exception: where a class token stands before the grid, the logits are read off that token, and
after the last attention nothing of the other tokens reaches it: their gradients there are zero, and a map made of them
would be empty. So the default is then what the last attention looks at: the first norm of the last block
(`encoder.layers.encoder_layer_11.ln_1` in torchvision, `blocks.11.norm1` in timm).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import dropout, pooling
from torch.overrides import TorchFunctionMode

from camserve.errors import Unsupported
from camserve.saliency.arrangement import CHANNELS_LAST, PLANES, Arrangement, token_grid
from camserve.saliency.capture import ACTIVATIONS, is_spatial
from camserve.types import Layer

_CONVOLUTION = nn.modules.conv._ConvNd
_CLASSIFIER = (nn.Linear, _CONVOLUTION)
_POOLING = tuple(getattr(pooling, name) for name in pooling.__all__)
_PLANES = (_CONVOLUTION, nn.modules.batchnorm._BatchNorm, nn.GroupNorm, *_POOLING)
_CHANNELS_LAST = (nn.Linear, nn.LayerNorm)
_NOT_FEATURES = (*_POOLING, dropout._DropoutNd, nn.Identity, nn.Flatten)

_SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)
_ATTENTION = (F.scaled_dot_product_attention, F.multi_head_attention_forward)

MOST_OWN_TOKENS = 16
"""Largest number of class token, distillation token and registers together."""


@dataclass(frozen=True)
class FoundLayer:
    """Describes a layer, how often it runs in one forward, and how its output holds its maps."""

    layer: Layer
    calls: int
    arrangement: Arrangement = PLANES


@dataclass(frozen=True)
class _Event:
    name: str
    output: Tensor
    arrangement: Arrangement
    is_feature: bool


def find_layers(module: nn.Module, example: Tensor) -> tuple[tuple[FoundLayer, ...], str]:
    """Returns every layer with a spatial output, in forward order, and the name of the default one.

    Args:
        module: in eval mode.
        example: (1, 3, H, W) of the size that will be used.

    Raises:
        Unsupported: the network has no spatial layer before its classifier.
    """
    watch = _Watch(example)
    watch.run(module)
    features = watch.features(stop=watch.before_classifier)
    if not features:
        raise Unsupported("the network has no layer with a spatial output before its classifier")
    if features[-1].arrangement.own_tokens:
        features = watch.features(stop=watch.attention.start) or features
    found = tuple(_found_layer(event, watch.outputs[event.name]) for event in _last_of_each_name(watch.events))
    return found, features[-1].name


def _last_of_each_name(events: Sequence[_Event]) -> list[_Event]:
    """Returns the last event of each name.

    Functional activations that a module's own name stands for are left out, such as the ReLU inside nn.ReLU.
    """
    last = {event.name: index for index, event in enumerate(events)}
    of_modules = {id(event.output): index for index, event in enumerate(events) if ":" not in event.name}
    return [
        event
        for index, event in enumerate(events)
        if last[event.name] == index and not (":" in event.name and of_modules.get(id(event.output), -1) > index)
    ]


def _found_layer(event: _Event, outputs: Sequence[Tensor]) -> FoundLayer:
    _, channels, height, width = event.arrangement.maps(event.output).shape
    calls = sum(is_spatial(output, len(event.output), event.arrangement) for output in outputs)
    return FoundLayer(Layer(event.name, channels, height, width), calls, event.arrangement)


class _Watch:
    """Watches one forward pass, and keeps what was seen."""

    def __init__(self, example: Tensor) -> None:
        self.example = example
        self.events: list[_Event] = []
        """Spatial outputs in order of appearance."""
        self.outputs: dict[str, list[Tensor]] = {}
        """Outputs of each layer by its name, call by call."""
        self.before_classifier = 0
        """Number of events before the classifier was called last."""
        self.attention = range(0)
        """Events inside the module that holds the last attention, up to that attention."""
        self._entered: list[int] = []
        """Number of events before each of the modules that are running now was entered."""
        self._arrangements = _Arrangements(example)

    def run(self, module: nn.Module) -> None:
        with ExitStack() as stack:
            for name, child in module.named_modules():
                stack.callback(child.register_forward_pre_hook(self._enter).remove)
                handle = child.register_forward_hook(lambda m, x, out, name=name: self._leave(name, m, x, out))
                stack.callback(handle.remove)
            stack.enter_context(torch.no_grad())
            stack.enter_context(_Functions(self))
            module(self.example)

    def features(self, stop: int) -> list[_Event]:
        """Returns the feature layers before this event.

        What an attention makes for itself (queries, keys, values) is none.
        """
        indices = [index for index in range(stop) if index not in self.attention]
        return [self.events[index] for index in indices if self.events[index].is_feature]

    def _enter(self, module: nn.Module, _inputs: Any) -> None:
        self._entered.append(len(self.events))
        if isinstance(module, _CLASSIFIER):
            self.before_classifier = len(self.events)

    def _leave(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        self._entered.pop()
        if name and isinstance(output, Tensor) and len(output) == len(self.example):
            is_feature = not isinstance(module, _NOT_FEATURES) and type(module) is not nn.Sequential
            is_feature = is_feature and not _is_rearranged(inputs, output)
            self._add(name, output, self._arrangements.of(module, output), is_feature)

    def _add(self, name: str, output: Tensor, arrangement: Arrangement | None, is_feature: bool) -> None:
        self.outputs.setdefault(name, []).append(output)
        if arrangement is not None:
            self.events.append(_Event(name, output, arrangement, is_feature))

    def called(self, function: Callable[..., Any], argument: Any, result: Any) -> None:
        """Notes a call of the activation that follows a layer directly, or of an attention."""
        if function in ACTIVATIONS and isinstance(argument, Tensor):
            source = _source(self.events, argument)
            if source is not None:
                self._add(f"{source.name}:{ACTIVATIONS[function]}", result, source.arrangement, is_feature=True)
        if function in _ATTENTION or (function in _SOFTMAX and result.dim() == 4):
            self.attention = range(self._entered[-1], len(self.events))


class _Arrangements:
    """Tells how outputs are arranged, from what was seen before them."""

    def __init__(self, example: Tensor) -> None:
        self._height, self._width = example.shape[-2:]
        self._seen: dict[torch.Size, Arrangement | None] = {}
        """Arrangements of 4-D outputs by shape, in the order in which each was seen last."""

    def of(self, module: nn.Module, output: Tensor) -> Arrangement | None:
        """Returns how an output holds maps; None where it holds none."""
        if output.dim() == 4:
            found = self._four_dimensional(module, output)
            # A dict keeps the order of insertion: taken out first, the shape seen last stands last.
            self._seen.pop(output.shape, None)
            self._seen[output.shape] = found
            return found if found is not None and found.fits(output) else None
        if output.dim() == 3 and not isinstance(module, (*_PLANES, nn.Flatten)):
            return self._tokens(output.shape[1])
        return None

    def _four_dimensional(self, module: nn.Module, output: Tensor) -> Arrangement | None:
        first, second, third = output.shape[1:]
        if isinstance(module, _PLANES):
            return PLANES
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

    def __init__(self, watch: _Watch) -> None:
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


def _source(events: Sequence[_Event], tensor: Tensor) -> _Event | None:
    """Returns the event of the innermost module whose output this is, when nothing came after it."""
    same = []
    for event in reversed(events):
        if event.output is not tensor:
            break
        same.append(event)
    return next((event for event in reversed(same) if ":" not in event.name), None)

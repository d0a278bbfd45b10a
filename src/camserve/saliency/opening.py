"""Makes the forward pass at one layer that every method starts from: activations, logits, and gradients if asked.

Where a faster runtime has the network's trunk, which is all up to the layer, activations and logits come from there and
only the tail, which is all behind the layer, is run by PyTorch, for gradients that have no closed form. Else PyTorch
runs the whole network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from torch import Tensor, nn

from camserve.errors import Unsupported
from camserve.saliency.arrangement import Arrangement
from camserve.saliency.capture import Capture, Graph, capture, maps_of
from camserve.saliency.layers import FoundLayer
from camserve.saliency.pass_size import PassSize
from camserve.saliency.run import dtype_of, run, single
from camserve.saliency.seen_attention import Attentions, find_attentions
from camserve.saliency.tail import Tail, find_tail
from camserve.types.model import NO_LAYER

Trunk = Callable[[Tensor], tuple[Tensor, Sequence[Tensor]]]
"""Function from (n, C, H, W) to the logits (n, classes) and the layer's raw output at each of the calls that count."""


class Opening:
    """Makes forward passes at one layer of a network; may be used from several threads.

    Args:
        module: in eval mode; nothing is left on it.
        found: what is known of the layer.
        classifier: the network's last linear layer, if it has one.
        keeps: whether the forward is kept from switching gradients off.
        trunk: what runs the network up to the logits faster than PyTorch; None: nothing does.
        tokens: how the network's sequences hold places of the picture, whatever the layer; None where it has none.
        tail_size: what finds how many images a pass of the tail should have; None: as many as any other pass.
    """

    def __init__(
        self,
        module: nn.Module,
        found: FoundLayer,
        classifier: nn.Linear | None = None,
        keeps: bool = False,
        trunk: Trunk | None = None,
        tokens: Arrangement | None = None,
        tail_size: PassSize | None = None,
    ) -> None:
        self.module = module
        self.layer = found.layer.name
        self.calls = found.calls
        self.arrangement = found.arrangement
        self.keeps = keeps
        self.tail_size = tail_size
        self._classifier = classifier
        self._trunk = trunk
        self._pooled = found.layer.pooled_head
        self._tail: list[Tail | None] = []
        self._tokens = tokens
        self._attentions: list[Attentions] = []

    def has_trunk(self, x: Tensor, gradients: bool = False) -> bool:
        """Tells whether the pass of (n, C, H, W) comes from a runtime that is faster than PyTorch.

        One for gradients does not where there is no tail, or something of the image goes around the layer: then PyTorch
        has to run the whole network for them, and that is the pass.
        """
        if self._trunk is None:
            return False
        return not gradients or self._pooled or self._tail_of_gradients(x[0]) is not None

    def __call__(self, x: Tensor, gradients: bool = False) -> Capture:
        """Makes one forward pass of (n, C, H, W), of which gradients can be asked.

        Args:
            x: the images.
            gradients: whether gradients are sure to be asked: then nothing is run twice, see `has_trunk`.
        """
        if self._trunk is None or not self.has_trunk(x, gradients):
            return self._captured(x)
        logits, raw = self._trunk(x)
        maps, graph = maps_of(raw, self.arrangement), cache(partial(self._graph, x, raw[-1]))
        return Capture(maps, single(logits), raw[-1], self.arrangement, graph, self._classifier)

    def tail(self, x: Tensor) -> Tail | None:
        """Returns the tail behind the layer, found with an image (3, H, W); None where there is none to be had."""
        if not self._tail:
            # Several calls have several tails, each of which ends where they come together.
            found = self._found_tail(x) if len(self.calls) <= 1 else None
            self._tail.append(found)
        return self._tail[0]

    def attentions(self, x: Tensor) -> Attentions:
        """Returns what the network's attentions are, found with an image (C, H, W).

        Raises:
            Unsupported: they do not follow one another, among all tokens: see `find_attentions`.
        """
        if not self._attentions:
            self._attentions.append(find_attentions(self.module, x, self._tokens))
        return self._attentions[0]

    def _tail_of_gradients(self, x: Tensor) -> nn.Module | None:
        """Returns the tail that gradients go through; None where the whole network has to run for them."""
        tail = None if self.keeps else self.tail(x)
        return None if tail is None or tail.before is not None else tail.module

    def _found_tail(self, x: Tensor) -> Tail | None:
        return find_tail(self.module, self.layer, self._captured(x[None]), x, self.calls)

    def _captured(self, x: Tensor) -> Capture:
        return capture(self.module, x, self.layer, self.calls, self.arrangement, self._classifier, self.keeps)

    def _graph(self, x: Tensor, raw: Tensor) -> Graph:
        tail = self._tail_of_gradients(x[0])
        if tail is None:
            return self._captured(x).graph()
        leaf = raw.to(dtype_of(self.module)).detach().clone().requires_grad_()
        with torch.enable_grad():
            # The tail goes on with a copy, because autograd forbids in-place operations on a leaf.
            return Graph((leaf,), single(tail(leaf.clone())))


class Whole(Opening):
    """Makes forward passes of a network none of whose layers is looked at: its activations are empty.

    Args:
        module: in eval mode; nothing is left on it.
        keeps: whether the forward is kept from switching gradients off.
    """

    def __init__(self, module: nn.Module, keeps: bool = False) -> None:
        super().__init__(module, FoundLayer(NO_LAYER), keeps=keeps)

    def __call__(self, x: Tensor, gradients: bool = False) -> Capture:
        """Makes one forward pass of (n, C, H, W)."""
        with torch.no_grad():
            logits = run(self.module, x)
        empty = logits.new_zeros(len(x), NO_LAYER.channels, NO_LAYER.height, NO_LAYER.width)
        return Capture(empty, logits, empty, self.arrangement, _no_graph)


def _no_graph() -> Graph:
    raise Unsupported("the network has no layer that gradients could be taken at")

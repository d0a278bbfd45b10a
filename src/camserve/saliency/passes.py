"""Further passes of one network, for methods that look at altered images or activations.

No pass is larger than the micro-batch, so that memory is bounded however many images a method wants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from camserve.errors import Unsupported
from camserve.saliency.arrangement import Arrangement
from camserve.saliency.capture import Capture, capture, with_output
from camserve.saliency.tail import find_tail


class Passes:
    """Passes of `module` at `layer`; counts the images that went through.

    Args:
        module: in eval mode; nothing is left on it.
        layer: address of the layer.
        calls: how often the layer runs in one forward.
        arrangement: how the layer's raw output holds its maps.
        micro_batch: images in one pass.
        black: (3, 1, 1), pixel value 0 as the network's input.
        white: (3, 1, 1), pixel value 1 (255 of uint8) as the network's input.
        tails: the network's tails by layer, kept from one request to the next; None where a layer has none.
        classifier: the network's last linear layer, if it has one.
    """

    def __init__(
        self,
        module: nn.Module,
        layer: str,
        calls: int,
        arrangement: Arrangement,
        micro_batch: int,
        black: Tensor,
        white: Tensor,
        tails: dict[str, nn.Module | None],
        classifier: nn.Linear | None = None,
    ) -> None:
        self.module = module
        self.layer = layer
        self.calls = calls
        self.arrangement = arrangement
        self.micro_batch = micro_batch
        self.black = black
        self.white = white
        self._tails = tails
        self._classifier = classifier
        self.made = 0
        """Images that went through so far."""

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Cuts start..stop into runs of the micro-batch."""
        for first in range(start, stop, self.micro_batch):
            yield first, min(stop, first + self.micro_batch)

    def capture(self, x: Tensor) -> Capture:
        """One forward pass of (n, 3, H, W), n at most the micro-batch, with the graph starting at the layer."""
        self.made += len(x)
        return capture(self.module, x, self.layer, self.calls, self.arrangement, self._classifier)

    def input_gradients(self, x: Tensor, classes: Tensor) -> Tensor:
        """dS_c/dx, (n, K, 3, H, W), of (n, 3, H, W) images for (n, K) classes, n at most the micro-batch.

        Raises:
            Unsupported: gradients do not reach the input.
        """
        self.made += len(x)
        x = x.detach().clone().requires_grad_()
        logits = self.module(x.clone())  # autograd forbids in-place operations on a leaf
        if not logits.requires_grad:
            raise Unsupported("gradients of this network do not reach its input")
        columns = [logits.gather(1, column[:, None]).sum() for column in classes.unbind(1)]
        found = [torch.autograd.grad(column, x, retain_graph=True, allow_unused=True)[0] for column in columns]
        if found[0] is None:
            raise Unsupported("gradients of this network do not reach its input")
        return torch.stack(found, dim=1)

    def tail(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """What the network makes of altered activations of an image, (3, H, W).

        Only the tail behind the layer is run. Where the network has none (see `find_tail`), the whole network is run,
        and the layer's output replaced on the way.

        Returns:
            From (n, C, u, v), n at most the micro-batch, to logits (n, classes).
        """
        if self.layer not in self._tails:  # a pass that one request makes for all: no part of its cost
            captured = capture(self.module, x[None], self.layer, self.calls, self.arrangement)
            self._tails[self.layer] = find_tail(self.module, self.layer, captured)
        like = x if self.arrangement.grid is None else self.capture(x[None]).raw  # for the network's own tokens
        tail = self._tails[self.layer]

        def run(maps: Tensor) -> Tensor:
            self.made += len(maps)
            if tail is None:
                images = x.expand(len(maps), -1, -1, -1)
                return with_output(self.module, images, self.layer, self.calls, self.arrangement, maps)
            with torch.no_grad():
                logits: Tensor = tail(self.arrangement.raw(maps, like))
            return logits

        return run

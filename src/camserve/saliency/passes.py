"""Makes further passes of one network, for methods that look at altered images or activations.

No pass is larger than the micro-batch, and gradients come one target after the other, so that memory is bounded however
many images and targets a method wants.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor

from camserve.errors import Unsupported
from camserve.methods.work import Kind
from camserve.saliency.capture import Capture, with_output
from camserve.saliency.flow import KeptGradients
from camserve.saliency.opening import Opening
from camserve.saliency.run import dtype_of, run, single
from camserve.saliency.seen_attention import Attentions
from camserve.scores import Targets

CUT_INPUT = (
    "no gradient of the scores reaches the network's input, because its forward cuts it, with `detach` for instance; "
    "the methods that need no gradients work: score_cam, recipro_cam, eigen_cam, rise, occlusion"
)


class Passes:
    """Makes further passes of a network at a layer; counts the images that went through, and the work that they were.

    Args:
        opening: what makes forward passes at the layer.
        micro_batch: images in one pass.
        black: (3, 1, 1), pixel value 0 as the network's input.
        white: (3, 1, 1), pixel value 1 (255 of uint8) as the network's input.
        work: units by kind, to which those of the passes are added; None: they are not wanted.
    """

    def __init__(
        self, opening: Opening, micro_batch: int, black: Tensor, white: Tensor, work: Counter[Kind] | None = None
    ) -> None:
        self.module = opening.module
        self.layer = opening.layer
        self.micro_batch = micro_batch
        self.black = black
        self.white = white
        self._opening = opening
        self.made = 0
        """Number of images that went through so far."""
        self.work: Counter[Kind] = Counter() if work is None else work

    def count(self, kind: Kind, units: int, images: int = 0) -> None:
        """Adds work that has been done, and the images that went through for it."""
        self.work[kind] += units
        self.made += images

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Cuts start..stop into runs of the micro-batch."""
        for first in range(start, stop, self.micro_batch):
            yield first, min(stop, first + self.micro_batch)

    def capture(self, x: Tensor) -> Capture:
        """Makes one forward pass of (n, 3, H, W), n at most the micro-batch, of which no gradient is wanted."""
        self.count("masked_forward", len(x), images=len(x))
        return self._opening(x)

    def layer_gradients(self, x: Tensor, targets: Targets) -> tuple[Tensor, Iterator[Tensor]]:
        """Makes one forward pass of (n, 3, H, W), n at most the micro-batch, and a backward pass for each target.

        Returns:
            The activations (n, C, u, v), and dS/dA (n, C, u, v) for each of the targets, one after the other.
        """
        self.count("layer_gradient", len(x) * len(targets), images=len(x))
        captured = self._opening(x, gradients=True)
        return captured.activations, captured.each_gradient(targets)

    def input_gradients(self, x: Tensor, targets: Targets) -> Iterator[Tensor]:
        """Yields dS/dx, (n, 3, H, W), of n images, at most the micro-batch, one target after the other.

        All of them together take K times the memory of the images: they should be added up as they come.

        Args:
            x: (n, 3, H, W), the images.
            targets: the targets, the same for each image.

        Raises:
            Unsupported: gradients do not reach the input.
        """
        self.count("pixel_gradient", len(x) * len(targets), images=len(x))
        x = x.detach().clone().requires_grad_()
        # The network gets a copy, because autograd forbids in-place operations on a leaf.
        logits = self.differentiable(x.clone())
        if not logits.requires_grad:
            raise Unsupported(CUT_INPUT)
        for target in targets.columns():
            score = target.value(logits).sum()
            gradients = torch.autograd.grad(score, x, retain_graph=True, allow_unused=True)[0]
            if gradients is None:
                raise Unsupported(CUT_INPUT)
            yield gradients

    def differentiable(self, x: Tensor) -> Tensor:
        """Returns the logits (n, classes) of images (n, 3, H, W), with graph; work is counted by the caller."""
        with KeptGradients(on=True) if self._opening.keeps else nullcontext():
            return run(self.module, x)

    def attentions(self, x: Tensor) -> Attentions:
        """Returns what the network's attentions are, found with an image (C, H, W), once for all.

        Raises:
            Unsupported: they do not follow one another, among all tokens.
        """
        return self._opening.attentions(x)

    def tail(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """Returns a function that runs altered activations of an image (3, H, W) through the network.

        Only the tail behind the layer is run. Where the network has none (see `find_tail`), the whole network is run,
        and the layer's output replaced on the way.

        Returns:
            From (n, C, u, v), n at most the micro-batch, to logits (n, classes).
        """
        # The first request has the tail found for all that follow, so that pass is not counted as work of its own.
        opening, tail = self._opening, self._opening.tail(x)
        # The network's own tokens are no part of the altered maps: they are taken from a pass of the image.
        like = x if opening.arrangement.grid is None else self.capture(x[None]).raw

        def run_tail(maps: Tensor) -> Tensor:
            self.count("tail", len(maps), images=len(maps))
            if tail is None:
                images = x.expand(len(maps), -1, -1, -1)
                return with_output(self.module, images, self.layer, opening.calls, opening.arrangement, maps)
            with torch.no_grad():
                return single(tail(opening.arrangement.raw(maps.to(dtype_of(self.module)), like)))

        return run_tail

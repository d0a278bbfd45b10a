"""Makes further passes of one network, for methods that look at altered images or activations.

No pass is larger than the micro-batch, but for those of a tail where larger ones pay, and gradients come one target
after the other, so that memory is bounded however many images and targets a method wants.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from camserve.errors import Unsupported
from camserve.methods.work import Kind
from camserve.saliency.capture import Capture, with_output
from camserve.saliency.flow import KeptGradients
from camserve.saliency.folded import FoldedProducts
from camserve.saliency.opening import Opening
from camserve.saliency.pass_size import PassSize
from camserve.saliency.run import dtype_of, run, single
from camserve.saliency.seen_attention import Attentions
from camserve.saliency.tail import Tail
from camserve.scores import Targets

if TYPE_CHECKING:
    from camserve.saliency.features import Features

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
        tail_size: what finds how many images a pass of the tail should have; None: the micro-batch.
    """

    def __init__(
        self,
        opening: Opening,
        micro_batch: int,
        black: Tensor,
        white: Tensor,
        work: Counter[Kind] | None = None,
        tail_size: PassSize | None = None,
    ) -> None:
        self.module = opening.module
        self.layer = opening.layer
        self.micro_batch = micro_batch
        self.black = black
        self.white = white
        self._opening = opening
        self._tail_size = tail_size
        self.made = 0
        """Number of images that went through so far."""
        self.work: Counter[Kind] = Counter() if work is None else work

    def shrink(self, micro_batch: int) -> None:
        """Makes no pass larger than this from now on, behind the layer neither: memory has run out."""
        self.micro_batch, self._tail_size = micro_batch, None

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
        with FoldedProducts():
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

    def behind(
        self, features: Features, total: int, altered: Callable[[int, int], Tensor]
    ) -> Iterator[tuple[int, int, Tensor]]:
        """Runs altered activations of an image through what is behind the layer, pass after pass.

        Only the tail behind the layer is run; what is carried around the layer is the image's own. Where the network
        has no tail (see `find_tail`), the whole network is run, and the layer's output replaced on the way.

        Args:
            features: what is known of the image.
            total: number of alterations.
            altered: function that returns the activations (n, C, u, v) of the alterations first..last-1.

        Yields:
            first, last, and the logits (n, classes) of the alterations first..last-1.
        """
        # The first request has the tail found for all that follow, so that pass is not counted as work of its own.
        x, opening, tail = features.input, self._opening, self._opening.tail(features.input)
        around: tuple[Tensor, ...] = ()
        if opening.arrangement.grid is not None or (tail is not None and tail.before is not None):
            around = features.made_once(f"around {self.layer}", lambda: self._around(tail, x))
        like = around[0] if around else x
        size = None if tail is None else self._tail_size
        last = 0
        while last < total:
            first, last = last, min(total, last + (size.size(self.micro_batch) if size else self.micro_batch))
            maps = altered(first, last)
            self.count("tail", len(maps), images=len(maps))
            began_s = time.perf_counter()
            if tail is None:
                images = x.expand(len(maps), -1, -1, -1)
                logits = with_output(self.module, images, self.layer, opening.calls, opening.arrangement, maps)
            else:
                with torch.no_grad():
                    logits = single(tail(opening.arrangement.raw(maps.to(dtype_of(self.module)), like), around))
            if size:
                size.add(len(maps), time.perf_counter() - began_s)
            yield first, last, logits

    def _around(self, tail: Tail | None, x: Tensor) -> tuple[Tensor, ...]:
        """Returns the image's own raw output, which has the network's own tokens, and what is carried around it."""
        if tail is None or tail.before is None:
            return (self.capture(x[None]).raw,)
        self.count("masked_forward", 1, images=1)
        return tail.around(x)

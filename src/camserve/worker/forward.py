"""Decodes images and makes their forward passes; what was made for one step is kept for the next."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from camserve import images
from camserve.errors import ImageMissing, InvalidImage, Unavailable
from camserve.images import ImageContent
from camserve.methods.work import Kind, decoded_units
from camserve.runtimes.threads import all_threads
from camserve.scores import Targets
from camserve.types import InputView, Item
from camserve.worker.memory import Memory, Passed, Seen
from camserve.worker.network import Network

DECODERS = 4
"""Files of a step that are decoded at the same time at most; fewer where PyTorch has fewer threads."""

BESIDE_PIXELS = images.MAX_PIXELS // DECODERS
"""Pixels up to which a file is decoded beside others: all of these take no more memory than one of the largest."""

Decoding = dict[bytes, Future[tuple[np.ndarray, InputView]]]
"""Files that threads decode, by the name of what the network sees of them."""


@dataclass(frozen=True)
class Wanted:
    """Asks for one image's pass at a layer."""

    digest: bytes
    seen: Seen
    targets: Callable[[Tensor], Targets]
    """Function from the outputs (numbers,) to the targets, resolved."""
    gradients: bool
    """Whether the gradients of those targets' scores are needed."""
    alone: bool = False
    """Whether they must be of a pass for these targets and no others, beside whom they may be rounded otherwise."""

    def suffices(self, passed: Passed) -> bool:
        """Returns whether a pass has all that is needed."""
        if not self.gradients:
            return True
        targets = self.targets(passed.logits).each
        return targets == tuple(passed.gradients) if self.alone else set(targets) <= set(passed.gradients)


class Forward:
    """Makes the forward passes of one network.

    Args:
        network: the network; with a memory its weights must not change.
        memory: memory of recent images.
    """

    def __init__(self, network: Network, memory: Memory) -> None:
        self._preprocessing = network.preprocessing
        self._memory = memory
        # It starts a thread where there is a file for one.
        self._decoders = ThreadPoolExecutor(max(1, min(DECODERS, torch.get_num_threads())), "decode")

    def with_memory(self, memory: Memory) -> Forward:
        """Returns the same with another memory."""
        found = copy(self)
        found._memory = memory
        return found

    def decoding(self, items: Sequence[Item]) -> Decoding:
        """Has the files of several items decoded in threads, which Pillow lets run side by side.

        Left to `seen` are large files, which side by side would take much memory, and those that are broken.
        """
        files = {
            _name_seen(item.digest, item.precision == "exact"): (item.image, item.precision == "exact")
            for item in items
            if isinstance(item.image, bytes) and item.digest and item.expires_s > time.monotonic()
        }
        fresh = {name: file for name, file in files.items() if self._memory.get(name, counted=False) is None}
        if len(fresh) < 2:
            return {}
        return {
            name: self._decoders.submit(images.seen, image, self._preprocessing, whole)
            for name, (image, whole) in fresh.items()
            if _is_small(image)
        }

    def seen(
        self,
        name: bytes,
        image: ImageContent | None,
        work: Counter[Kind],
        whole: bool = True,
        decoding: Decoding | None = None,
    ) -> tuple[bytes, Seen]:
        """Returns the name of what the network sees of an image, and that itself; what is decoded is added to `work`.

        Args:
            name: the image's digest; empty where it must be computed.
            image: the image; None where it should be remembered.
            work: units by kind.
            whole: whether a file is decoded in full, see `images.KEPT_REDUCTION`. What is made of it then is kept apart
                from what is made of a reduced one, so that a map does not depend on what was asked before.
            decoding: files that threads decode; the image's is taken out, so that another try decodes it anew.

        Raises:
            InvalidImage: the image is broken.
            ImageMissing: there is no image, and none is remembered.
        """
        if image is not None and self._memory.keeps:
            name = name or images.digest(image)
        name = _name_seen(name, whole)
        seen: Seen | None = self._memory.get(name)
        if seen is None:
            if image is None:
                raise ImageMissing("the image of this digest is not here")
            started = (decoding or {}).pop(name, None)
            decode = partial(images.seen, image, self._preprocessing, whole)
            try:
                pixels, view = decode() if started is None else started.result()
            except Unavailable:
                if started is None:
                    raise
                pixels, view = decode()  # by itself it may have the memory that was not there beside others
            if units := decoded_units(view.original_size):
                work["decode"] += units
            seen = Seen(torch.from_numpy(pixels), view)
            self._memory.put(name, seen)
        return name, seen

    def passed(
        self, network: Network, layer: str, wanted: Sequence[Wanted], work: Counter[Kind], together: int = 1
    ) -> list[Passed]:
        """Returns the passes at a layer, in order; those not remembered are made together, and added to `work`.

        Args:
            network: the network, asked with the text of these items where it takes one.
            layer: name of the layer.
            wanted: the images.
            work: units by kind.
            together: images times targets of a backward pass, at most; or all images, and one target.
        """
        found: list[Passed | None] = [self._remembered(network, layer, one) for one in wanted]
        fresh = [one for one, passed in zip(wanted, found, strict=True) if passed is None]
        made = iter(self._make(network, layer, fresh, work, together) if fresh else ())
        return [next(made) if passed is None else passed for passed in found]

    def _remembered(self, network: Network, layer: str, wanted: Wanted) -> Passed | None:
        passed: Passed | None = self._memory.get((wanted.digest, network.asked, layer))
        return passed if passed is not None and wanted.suffices(passed) else None

    def _make(
        self, network: Network, layer: str, wanted: Sequence[Wanted], work: Counter[Kind], together: int
    ) -> list[Passed]:
        """Makes one forward pass for all, and the backward passes where gradients are needed."""
        inputs = [network.normalise(one.seen.pixels[None]) for one in wanted]
        x = torch.cat(inputs) if len(inputs) > 1 else inputs[0]
        differentiated = any(one.gradients for one in wanted)
        elsewhere = network.has_trunk(x, layer, differentiated)
        with nullcontext() if elsewhere else all_threads():
            captured = network.capture(x, layer, differentiated)
        work["opening"] += len(wanted)
        # An image without gradients gets no targets: their number must not widen the gradients of the others.
        score = network.score
        each = [
            one.targets(outputs) if one.gradients else score.targets((), x.device)
            for one, outputs in zip(wanted, captured.logits, strict=True)
        ]
        gradients: Sequence[Tensor] = ()
        if differentiated:
            targets = Targets.stacked(each)
            formula = elsewhere and network.info.layer(layer).pooled_head  # as a rule: small operations, and no layer
            with nullcontext() if formula else all_threads():
                gradients = list(captured.gradients(targets, together))
            work["layer_gradient"] += len(x) * len(targets)
        made = []
        for row, one in enumerate(wanted):
            own = dict(zip(each[row].each, gradients[row], strict=False)) if gradients else {}
            passed = Passed(x[row], captured.activations[row], captured.logits[row], own)
            # A slice kept in memory would keep the tensors of the whole batch.
            passed = passed.alone() if len(wanted) > 1 and self._memory.keeps else passed
            self._memory.put((one.digest, network.asked, layer), passed)
            made.append(passed)
        return made


def _name_seen(name: bytes, whole: bool) -> bytes:
    """Returns the name of what the network sees of an image."""
    return name if whole else name + b" reduced"


def _is_small(file: bytes) -> bool:
    """Returns whether a file may be decoded beside others."""
    try:
        height, width = images.probe(file)
    except InvalidImage:
        return False
    return height * width <= BESIDE_PIXELS

"""Decodes images and makes their forward passes; what was made for one step is there for the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from camserve import images
from camserve.errors import InvalidImage
from camserve.types import InputView
from camserve.worker.memory import Memory, Passed, Seen
from camserve.worker.network import Network


@dataclass(frozen=True)
class Wanted:
    """One image's pass."""

    digest: bytes
    seen: Seen
    classes: Callable[[Tensor], Sequence[int]]
    """From the logits (classes,) to the classes explained."""
    gradients: bool
    """Whether those classes' gradients are needed."""

    def suffices(self, passed: Passed) -> bool:
        """Whether a pass has all that is needed."""
        return not self.gradients or set(self.classes(passed.logits)) <= set(passed.gradients)


class Forward:
    """Forward passes of one network.

    Args:
        network: with a memory its weights must stay as they are.
        memory: of recent images.
    """

    def __init__(self, network: Network, memory: Memory) -> None:
        self._network = network
        self._memory = memory

    def seen(self, image: bytes | np.ndarray) -> tuple[bytes, Seen]:
        """The image's name, and what the network sees of it. Raises InvalidImage."""
        name = images.digest(image)
        seen: Seen | None = self._memory.get(name)
        if seen is None:
            pixels, view = self._from_array(image) if isinstance(image, np.ndarray) else self._see(images.decode(image))
            seen = Seen(torch.from_numpy(pixels), view)
            self._memory.put(name, seen)
        return name, seen

    def passed(self, layer: str, wanted: Sequence[Wanted]) -> list[Passed]:
        """The passes at a layer, in order; those that are not remembered are made together."""
        found: list[Passed | None] = [self._remembered(layer, one) for one in wanted]
        fresh = [one for one, passed in zip(wanted, found, strict=True) if passed is None]
        made = iter(self._make(layer, fresh) if fresh else ())
        return [next(made) if passed is None else passed for passed in found]

    def _remembered(self, layer: str, wanted: Wanted) -> Passed | None:
        passed: Passed | None = self._memory.get((wanted.digest, layer))
        return passed if passed is not None and wanted.suffices(passed) else None

    def _make(self, layer: str, wanted: Sequence[Wanted]) -> list[Passed]:
        """One forward pass for all, and where gradients are needed one backward for each place of a class."""
        x = torch.cat([self._network.normalise(one.seen.pixels[None]) for one in wanted])
        captured = self._network.capture(x, layer)
        classes = [one.classes(logits) for one, logits in zip(wanted, captured.logits, strict=True)]
        gradients: Sequence[Tensor] = ()
        if any(one.gradients for one in wanted):
            columns = [torch.tensor(some, device=x.device) for some in classes]
            gradients = list(captured.gradients(torch.nn.utils.rnn.pad_sequence(columns, batch_first=True)))
        made = []
        for row, one in enumerate(wanted):
            own = dict(zip(classes[row], gradients[row], strict=False)) if gradients else {}
            passed = Passed(x[row], captured.activations[row], captured.logits[row], own)
            passed = passed.alone() if len(wanted) > 1 and self._memory.keeps else passed
            self._memory.put((one.digest, layer), passed)
            made.append(passed)
        return made

    def _from_array(self, array: np.ndarray) -> tuple[np.ndarray, InputView]:
        size = self._network.preprocessing.crop_px
        if array.dtype == np.float32 and not np.isfinite(array).all():
            raise InvalidImage("a float32 image must be finite, got NaN or infinity")
        if array.shape == (*size, 3) and array.dtype in (np.uint8, np.float32):
            return np.array(array), images.whole_view(size)  # a copy: torch wants writable memory
        if array.dtype == np.float32:
            raise InvalidImage(f"a float32 image must be {size[0]} x {size[1]} x 3, got {list(array.shape)}")
        return self._see(images.from_array(array))

    def _see(self, image: Image.Image) -> tuple[np.ndarray, InputView]:
        seen, view = images.network_view(image, self._network.preprocessing)
        return np.array(seen), view

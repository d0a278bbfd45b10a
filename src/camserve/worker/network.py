"""A classifier with what is needed to explain it: preprocessing, labels, layers, device."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from camserve.archive import load_package
from camserve.errors import InvalidOption
from camserve.saliency.capture import Capture, capture
from camserve.saliency.layers import Site, find_layers
from camserve.saliency.passes import Passes
from camserve.types import ModelInfo, Precision, Preprocessing

DEFAULT_MICRO_BATCH = {"cpu": 4, "cuda": 128}
"""Queries per forward pass. Few on CPUs: glibc gives blocks above 32 MB back to the system after each use, and fetching
them anew costs more than a larger batch gains."""


class Network:
    """One module, never changed for good: modes and hooks are entered in a `with` and gone afterwards.

    Args:
        module: (n, 3, H, W) to logits (n, classes).
        preprocessing: how an image becomes its input.
        labels: name of each class by index; empty means "class 0", "class 1", ...
        name: of the model.
        version: of the model.
        layer: default layer; None means the one that `find_layers` chooses.
        source: where the weights came from.
        licence: of the weights.
        evaluation: overall score of methods by title, if the model was evaluated.
        device: where to run; None leaves the module where it is.
        micro_batch: queries per forward pass; None means `DEFAULT_MICRO_BATCH`.

    Raises:
        InvalidOption: labels that do not fit the outputs, an unknown layer or micro-batch below 1.
        Unsupported: the network has no spatial layer.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        preprocessing: Preprocessing,
        labels: Sequence[str] = (),
        name: str = "model",
        version: str = "1.0",
        layer: str | None = None,
        source: str = "",
        licence: str = "",
        evaluation: Mapping[str, float] | None = None,
        device: str | torch.device | None = None,
        micro_batch: int | None = None,
    ) -> None:
        if micro_batch is not None and micro_batch < 1:
            raise InvalidOption(f"micro_batch must be at least 1, got {micro_batch}")
        self.module = module if device is None else module.to(device)
        weight = next(module.parameters(), torch.zeros(()))
        self.device, self.dtype = weight.device, weight.dtype
        self.preprocessing = preprocessing
        self.micro_batch = micro_batch or DEFAULT_MICRO_BATCH.get(self.device.type, 32)
        self.evaluating = Shared(self._evaluate)
        """Eval mode while inside; afterwards every module is in the mode it was in."""
        with self.evaluating(), exact_float32():
            example = torch.zeros(1, 3, *preprocessing.crop_px, device=self.device, dtype=self.dtype)
            sites, default = find_layers(module, example)
            with torch.no_grad():
                classes = module(example).shape[1]
        if labels and len(labels) != classes:
            raise InvalidOption(f"the network has {classes} classes, got {len(labels)} labels")
        self._tails: dict[str, nn.Module | None] = {}
        self._sites: dict[str, Site] = {site.layer.name: site for site in sites}
        self.info = ModelInfo(
            name=name,
            version=version,
            labels=tuple(labels) or tuple(f"class {index}" for index in range(classes)),
            input_size=preprocessing.crop_px,
            layers=tuple(site.layer for site in sites),
            default_layer=layer or default,
            source=source,
            licence=licence,
            evaluation=evaluation or {},
        )
        self.info.layer("")  # the default layer exists

    @cached_property
    def classifier(self) -> nn.Linear | None:
        """The last linear layer."""
        linear = [child for child in self.module.modules() if isinstance(child, nn.Linear)]
        return linear[-1] if linear else None

    def _evaluate(self) -> Callable[[], None]:
        training = [child for child in self.module.modules() if child.training]
        if training:
            self.module.eval()

        def undo() -> None:
            for child in training:
                child.training = True

        return undo

    def normalise(self, pixels: Tensor) -> Tensor:
        """(B, H, W, 3) pixels, uint8 or float in [0, 1], to the (B, 3, H, W) input on the device."""
        pixels = pixels.to(self.device)
        scaled = pixels.to(self.dtype) / 255 if pixels.dtype == torch.uint8 else pixels.to(self.dtype)
        mean, std = (scaled.new_tensor(values) for values in (self.preprocessing.mean, self.preprocessing.std))
        return ((scaled - mean) / std).permute(0, 3, 1, 2)  # channels_last in memory

    def capture(self, x: Tensor, layer: str) -> Capture:
        """One forward pass with the graph starting at a layer that `info` lists."""
        site = self._sites[layer]
        return capture(self.module, x, layer, site.calls, site.arrangement, self.classifier)

    def passes(self, layer: str) -> Passes:
        """Further passes at a layer that `info` lists."""
        black, white = (self.normalise(torch.full((1, 1, 1, 3), value, dtype=self.dtype))[0] for value in (0.0, 1.0))
        site, size, tails = self._sites[layer], self.micro_batch, self._tails
        return Passes(self.module, layer, site.calls, site.arrangement, size, black, white, tails, self.classifier)

    def scores(self, x: Tensor, precision: Precision) -> Tensor:
        """Logits of masked images, without graph."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            logits: Tensor = self.module(x)
        return logits


def load_network(path: str | Path, device: str | torch.device | None = None, micro_batch: int | None = None) -> Network:
    """The network of an archive or of an unpacked archive directory; device None: CUDA where there is one."""
    module, card = load_package(Path(path))
    return Network(
        module.to(memory_format=torch.channels_last),  # type: ignore[call-overload]  # torch's stub lacks this form
        preprocessing=card.preprocessing,
        labels=card.labels,
        name=card.name,
        version=card.version,
        layer=card.layer,
        source=card.source,
        licence=card.licence,
        evaluation=card.evaluation,
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        micro_batch=micro_batch,
    )


class Shared:
    """A state that the first of several threads enters and the last one leaves.

    Args:
        enter: brings the state about and returns what undoes it.
    """

    def __init__(self, enter: Callable[[], Callable[[], None]]) -> None:
        self._enter = enter
        self._lock, self._inside = threading.Lock(), 0
        self._undo: Callable[[], None] = lambda: None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside, the state holds."""
        with self._lock:
            if self._inside == 0:
                self._undo = self._enter()
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    self._undo()


def _forbid_tf32() -> Callable[[], None]:
    conv = torch.backends.cudnn.conv  # type: ignore[attr-defined]  # set at run time
    backends = (conv, torch.backends.cuda.matmul)
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"

    def undo() -> None:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision

    return undo


exact_float32 = Shared(_forbid_tf32)
"""float32 means float32: no TF32 in convolutions and matrix products while inside, whatever the process has set."""

"""Classifies digit scenes with a compact network: five convolutions, global average pooling, one linear layer."""

from __future__ import annotations

from importlib.resources import as_file, files

import torch
from torch import Tensor, nn

from camserve.engine import Engine
from camserve.evaluation.digits.scenes import SIZE_PX
from camserve.types import Preprocessing

LABELS = tuple(str(digit) for digit in range(10))
PREPROCESSING = Preprocessing(
    resize_px=SIZE_PX,
    crop_px=(SIZE_PX, SIZE_PX),
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
    interpolation="bilinear",
)
MICRO_BATCH = 32
"""Number of scenes in one pass. Scenes are small: a larger number is faster than the engine's default for CPUs."""
WEIGHTS = files("camserve.evaluation.digits") / "weights.safetensors"

_WIDTHS = ((3, 16, 2), (16, 32, 2), (32, 64, 2), (64, 64, 1), (64, 64, 1))
"""Channels in, channels out and stride of each convolution."""


class DigitsNet(nn.Module):
    """Makes logits (n, classes) of scenes (n, 3, 96, 96), from 64 maps of 12 x 12 cells that see 47 x 47 px each."""

    def __init__(self, classes: int = len(LABELS)) -> None:
        super().__init__()
        self.features = nn.Sequential(*(_block(*widths) for widths in _WIDTHS))
        self.head = nn.Linear(_WIDTHS[-1][1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits."""
        logits: Tensor = self.head(self.features(x).mean(dim=(2, 3)))
        return logits


def _block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


def trained() -> DigitsNet:
    """Returns the network with the weights that are shipped, in eval mode, frozen; also a source of archives."""
    from safetensors.torch import load_file

    module = DigitsNet()
    with as_file(WEIGHTS) as path:
        module.load_state_dict(load_file(path))
    return module.eval().requires_grad_(False)


def load_engine(device: str | torch.device | None = None, micro_batch: int | None = None) -> Engine:
    """Returns an engine of the trained network; device None: CUDA where there is one, else the CPU."""
    return Engine(
        trained().to(memory_format=torch.channels_last),  # type: ignore[call-overload]  # torch's stub lacks this form
        preprocessing=PREPROCESSING,
        labels=LABELS,
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        micro_batch=micro_batch or MICRO_BATCH,
    )

"""Small seeded classifiers with the traps of real ones, and images for them.

All take (n, 3, 40, 48): not square, so that rows and columns cannot be mixed up unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from camserve.types import Preprocessing

HEIGHT, WIDTH = 40, 48
CLASSES = 7
CHANNELS = 20
"""Of the last feature layer, whose maps are 10 x 12."""

PREPROCESSING = Preprocessing(
    resize_px=48, crop_px=(HEIGHT, WIDTH), mean=(0.45, 0.5, 0.55), std=(0.25, 0.3, 0.2), interpolation="bilinear"
)


class Features(nn.Sequential):
    """Three convolutions; the ReLUs work in place, and the last one is the layer to explain: `features.8`."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 12, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(12, CHANNELS, 3, padding=1),
            nn.ReLU(inplace=True),
        )


class PooledLinear(nn.Module):
    """Global average pooling and one linear layer: CAM applies."""

    def __init__(self) -> None:
        super().__init__()
        self.features = Features()
        self.head = nn.Linear(CHANNELS, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean(dim=(2, 3)))


class Perceptron(nn.Module):
    """Two linear layers with an in-place ReLU between them: gradients differ from place to place."""

    def __init__(self) -> None:
        super().__init__()
        self.features = Features()
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d((4, 3)),
            nn.Flatten(),
            nn.Linear(12 * CHANNELS, 16),
            nn.ReLU(True),
            nn.Linear(16, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class Reused(nn.Module):
    """One activation module runs three times, as EfficientNet-Lite's `_swish` does; `act` means its last call."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.third = nn.Conv2d(8, CHANNELS, 3, stride=2, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(CHANNELS, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        x = x + self.act(self.second(x))
        x = self.act(self.third(x))
        return self.head(x.mean(dim=(2, 3)))


class Signed(nn.Module):
    """The layer, `features.7`, has negative values; the in-place ReLU after it must not change what was captured."""

    def __init__(self) -> None:
        super().__init__()
        self.features = Features()
        self.body = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.head = nn.Linear(CHANNELS, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.features(x)).tanh().mean(dim=(2, 3)))


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "pooled": (PooledLinear, "features.8"),
    "perceptron": (Perceptron, "features.8"),
    "reused": (Reused, "act"),
    "signed": (Signed, "features.7"),
    "early": (Perceptron, "features.3"),
}
"""Builder and layer to explain, by name."""


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A seeded model in eval mode, with logits far enough apart that masking an image changes its probabilities."""
    torch.manual_seed(seed)
    module = MODELS[name][0]()
    with torch.no_grad():
        for child in module.modules():
            if isinstance(child, nn.BatchNorm2d):
                child.running_mean.normal_(0, 0.3)
                child.running_var.uniform_(0.5, 2)
        last = [child for child in module.modules() if isinstance(child, nn.Linear)][-1]
        last.weight *= 20
    return module.to(dtype).eval()


def silence(module: nn.Module, conv: str, channels: slice, value: float) -> nn.Module:
    """Makes channels of a convolution constant: `value` everywhere, whatever the image."""
    layer = module.get_submodule(conv)
    with torch.no_grad():
        layer.weight[channels] = 0
        layer.bias[channels] = value
    return module


def picture(seed: int = 0, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """uint8 (height, width, 3): coloured blobs and some noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    image = rng.uniform(0, 40, (height, width, 3))
    for _ in range(5):
        centre_y, centre_x, size = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(4, 12)
        blob = np.exp(-((y - centre_y) ** 2 + (x - centre_x) ** 2) / (2 * size**2))
        image += blob[..., None] * rng.uniform(0, 255, 3)
    return image.clip(0, 255).astype(np.uint8)

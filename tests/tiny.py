"""A small seeded network, and images of its input size."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import nn

from camserve.types import Preprocessing
from camserve.worker.network import Network

TINY_LABELS = ("tabby cat", "tiger cat", "coffee-mug", "crane", "crane", "lynx")
TINY_SIZE = (48, 64)


def tiny_module() -> nn.Module:
    """Twelve channels at 6 x 8, a head of two linear layers, in-place ReLUs; six classes."""
    torch.manual_seed(7)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=4, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 12, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(48, 16),
        nn.ReLU(inplace=True),
        nn.Linear(16, 6),
    ).eval()


def tiny_network() -> Network:
    preprocessing = Preprocessing(resize_px=64, crop_px=TINY_SIZE, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    return Network(tiny_module(), preprocessing=preprocessing, labels=TINY_LABELS, name="tiny", micro_batch=5)


def pixels(seed: int, size: tuple[int, int] = TINY_SIZE) -> np.ndarray:
    """A random image with some structure: uint8 (H, W, 3)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((size[1], size[0]), Image.Resampling.BICUBIC))


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()

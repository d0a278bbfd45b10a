"""Detectors for tests: small ones whose detections are known, and that return them in different forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from camserve.types import Preprocessing

SIDE = 32
PREPROCESSING = Preprocessing(SIDE, (SIDE, SIDE), mean=(0.0,) * 3, std=(1.0,) * 3)
LABELS = ("background", "cat", "dog", "bird")
WINDOWS = ((1, (3, 4, 11, 14)), (2, (18, 15, 29, 27)), (3, (20, 2, 27, 9)))
"""The class of each window and its edges (x0, y0, x1, y1)."""
CAT, DOG, BIRD = (edges for _, edges in WINDOWS)


class Windows(nn.Module):
    """Detects a class wherever its window is bright: the score is the mean of the window's red pixels.

    What is darker than 0.05 is not detected. The left edge of a box moves with the red of the window's first column.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones((), dtype=dtype))

    def found(self, image: Tensor) -> dict[str, Tensor]:
        boxes, labels, scores = [], [], []
        for label, (x0, y0, x1, y1) in WINDOWS:
            window = self.gain * image[0, y0:y1, x0:x1]
            score = window.mean().clamp(0, 1)
            if score >= 0.05:
                left = x0 - 2 * window[:, 0].mean()
                boxes.append(torch.stack([left, *(left.new_tensor(edge) for edge in (y0, x1, y1))]))
                labels.append(label)
                scores.append(score)
        return {
            "boxes": torch.stack(boxes) if boxes else image.new_zeros(0, 4),
            "labels": torch.tensor(labels, dtype=torch.long),
            "scores": torch.stack(scores) if scores else image.new_zeros(0),
        }

    def forward(self, x: Tensor) -> Any:
        return [self.found(image) for image in x]


class Listed(Windows):
    """Takes a list of images alone, as some detectors do."""

    def forward(self, x: list[Tensor]) -> Any:
        if not isinstance(x, list):
            raise TypeError("a list of images")
        return super().forward(x)


class AsDict(Windows):
    """Returns a dict of lists."""

    def forward(self, x: Tensor) -> Any:
        each = [self.found(image) for image in x]
        return {name: [one[name] for one in each] for name in ("boxes", "labels", "scores")}


class AsTuple(Windows):
    """Returns boxes, labels and scores as three lists."""

    def forward(self, x: Tensor) -> Any:
        each = [self.found(image) for image in x]
        return tuple([one[name] for one in each] for name in ("boxes", "labels", "scores"))


class AsTensor(Windows):
    """Returns a tensor (n, 5, 6), filled up with zeros."""

    def forward(self, x: Tensor) -> Any:
        rows = x.new_zeros(len(x), 5, 6)
        for row, image in zip(rows, x, strict=True):
            found = self.found(image)
            both = [found["boxes"], found["scores"][:, None], found["labels"][:, None]]
            row[: len(found["labels"])] = torch.cat(both, dim=1)
        return rows


class Doubtful(Windows):
    """Tells the probability of every class instead of a label: three quarters for its own, and shares of the rest."""

    def forward(self, x: Tensor) -> Any:
        return [self.doubted(self.found(image)) for image in x]

    def doubted(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        labels = found.pop("labels")
        rest = torch.tensor([0.1, 0.05, 0.04, 0.06]).to(found["boxes"])
        return found | {"probabilities": 0.75 * nn.functional.one_hot(labels, 4) + rest}


def picture(*bright: tuple[int, int, int, int], seed: int = 0) -> np.ndarray:
    """Returns a dark picture, float32 (SIDE, SIDE, 3), in which some windows are bright."""
    pixels, noise = np.zeros((SIDE, SIDE, 3), np.float32), np.random.default_rng(seed)
    for x0, y0, x1, y1 in bright:
        pixels[y0:y1, x0:x1] = noise.uniform(0.6, 1, (y1 - y0, x1 - x0, 1))
    return pixels

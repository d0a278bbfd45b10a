"""Holds the compact networks of digit scenes: what each is built of, and the weights that are shipped.

Convolutions: five, to 64 maps of 12 x 12 cells that see 47 x 47 px each. What reads them
is a head as people have it: pooling and one linear layer. Vision transformers: torchvision's class, read off its class
token, and timm's, read off the mean of its patches; both have three blocks and 12 x 12 patches.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from camserve.errors import NotFound
from camserve.evaluation.digits.scenes import SIZE_PX

if TYPE_CHECKING:
    from torchvision.models import VisionTransformer as TorchvisionTransformer

CLASSES = 10
_WIDTHS = ((3, 16, 2), (16, 32, 2), (32, 64, 2), (64, 64, 1), (64, 64, 1))
"""Channels in, channels out and stride of each convolution."""
_DETECTOR_WIDTHS = ((3, 16, 2), (16, 24, 2), (24, 32, 2), (32, 36, 1), (36, 40, 1))
"""The same of the detector, whose weights are a fifth as large."""
_EDGE_PX = 16.0
"""Usual distance from the centre of a digit to its edges, with which the numbers that tell it are about 1."""
_MOST_DIGITS = 16
"""Number of digits of a scene that the detector tells at most."""
_LEAST_SCORE = 0.05
"""Least score of a digit that it tells."""
_SEGMENTATION = (12, 20, 44, 32)
"""Channels of the network of places: of 48 x 48, 24 x 24 and 12 x 12 cells, and of what its places are told from."""
_CELLS = 12
"""Cells of the last convolution, and patches of the transformers, in both directions."""
_TOKEN, _BLOCKS, _HEADS = 64, 3, 4
"""Numbers that a token of the transformers has, blocks, and heads of each."""
_STEM = (16, 32, 64)
"""Channels of the convolutions, of stride 2 each, that make the transformers' patches (arXiv:2106.14881)."""
_SCALES = (60.0, 40.0)
"""Scales of the two numbers, with which a cell's share of a sum and a size in pixels are about 1."""
_SHARPNESS = 12.0
"""Sharpness of the smooth maximum: cells that are 1 / 12 of their scale smaller count e times less."""


class DigitsNet(nn.Module):
    """Makes logits (n, classes) of scenes (n, 3, 96, 96), from 64 maps of 12 x 12 cells that see 47 x 47 px each."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.features = _features()
        self.head = nn.Linear(_WIDTHS[-1][1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits."""
        logits: Tensor = self.head(self.features(x).mean(dim=(2, 3)))
        return logits


def seven_net() -> DigitsNet:
    """Returns an untrained `DigitsNet` with one logit, which answers yes or no."""
    return DigitsNet(1)


class ValuesNet(nn.Module):
    """Makes two numbers (n, 2) of scenes (n, 3, 96, 96): the sum of the digits, the size of the largest in pixels.

    Each cell has both numbers: of the first the mean is taken, of the second a smooth maximum.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = _features()
        self.head = nn.Conv2d(_WIDTHS[-1][1], len(_SCALES), 1)

    def cells(self, x: Tensor) -> Tensor:
        """Returns the numbers of each cell, (n, 2, 12, 12)."""
        numbers: Tensor = self.head(self.features(x))
        return numbers

    def pooled(self, cells: Tensor, inside: Tensor) -> Tensor:
        """Returns the numbers (n, 2) of the cells (n, 2, 12, 12) that lie inside, (n, 12, 12) bool."""
        total = (cells[:, 0] * inside).mean(dim=(1, 2))
        sizes = cells[:, 1].masked_fill(~inside, -torch.inf)
        largest = torch.logsumexp(_SHARPNESS * sizes, dim=(1, 2)) / _SHARPNESS
        return torch.stack([_SCALES[0] * total, _SCALES[1] * largest], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the numbers."""
        cells = self.cells(x)
        return self.pooled(cells, torch.ones_like(cells[:, 0], dtype=torch.bool))


class SegmentationNet(nn.Module):
    """Makes logits (n, 11, 48, 48) of scenes (n, 3, 96, 96): what each place is, one of the digits or background.

    What 12 x 12 cells know, which see 47 x 47 px each, is enlarged and added to what finer cells see, twice.
    """

    def __init__(self) -> None:
        super().__init__()
        fine, middle, coarse, last = _SEGMENTATION
        self.fine, self.middle = _block(3, fine, 2), _block(fine, middle, 2)
        self.coarse = nn.Sequential(_block(middle, coarse, 2), _block(coarse, coarse, 1, dilation=2))
        self.known = nn.Conv2d(coarse, last, 1)
        self.seen_by_middle, self.seen_by_fine = (nn.Conv2d(width, last, 3, padding=1) for width in (middle, fine))
        self.first, self.second = (nn.Sequential(nn.BatchNorm2d(last), nn.ReLU()) for _ in range(2))
        self.head = nn.Conv2d(last, 1 + CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits."""
        fine = self.fine(x)
        middle = self.middle(fine)
        known = self.first(_enlarged(self.known(self.coarse(middle))) + self.seen_by_middle(middle))
        known = self.second(_enlarged(known) + self.seen_by_fine(fine))
        logits: Tensor = self.head(known)
        return logits


def _enlarged(cells: Tensor) -> Tensor:
    return nn.functional.interpolate(cells, scale_factor=2.0, mode="bilinear", align_corners=False)


class DetectorNet(nn.Module):
    """Detects the digits of scenes (n, 3, 96, 96) in one pass: where their centres are, and how large they are.

    Each of 12 x 12 cells has a logit for every class, that the centre of such a digit lies in it, and the distances
    from the cell's middle to the four edges. A cell whose best class is less probable than a neighbour's is left out
    (as in CenterNet, https://arxiv.org/abs/1904.07850), so that no digit is found twice.
    """

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.features = nn.Sequential(*(_block(*widths) for widths in _DETECTOR_WIDTHS))
        self.head = nn.Conv2d(_DETECTOR_WIDTHS[-1][1], classes + 4, 1)

    def cells(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the logits (n, classes, 12, 12), and the distances left, up, right, down (n, 4, 12, 12) in pixels."""
        found = self.head(self.features(x))
        return found[:, :-4], _EDGE_PX * nn.functional.softplus(found[:, -4:])

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        """Returns boxes (M, 4), labels (M,) and scores (M,) of each scene, the best first."""
        logits, distances = self.cells(x)
        scores, labels = logits.sigmoid().max(dim=1)
        best = nn.functional.max_pool2d(scores, 3, stride=1, padding=1)
        scores = scores.masked_fill(scores < best, 0).flatten(1)
        middle = (torch.arange(_CELLS, device=x.device) + 0.5) * (SIZE_PX / _CELLS)
        columns, rows = middle.repeat(_CELLS), middle.repeat_interleave(_CELLS)
        signs = distances.new_tensor([-1, -1, 1, 1])[:, None]
        boxes = torch.stack([columns, rows, columns, rows]) + signs * distances.flatten(2)
        boxes = boxes.clamp(0, SIZE_PX).transpose(1, 2)
        order = scores.argsort(dim=1, descending=True, stable=True)[:, :_MOST_DIGITS]
        each = zip(boxes, labels.flatten(1), scores, order, strict=True)
        return [_detected(one[at], some[at], said[at]) for one, some, said, at in each]


def _detected(boxes: Tensor, labels: Tensor, scores: Tensor) -> dict[str, Tensor]:
    kept = scores >= _LEAST_SCORE
    return {"boxes": boxes[kept], "labels": labels[kept], "scores": scores[kept]}


def _features() -> nn.Sequential:
    return nn.Sequential(*(_block(*widths) for widths in _WIDTHS))


def _block(inputs: int, outputs: int, stride: int, dilation: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=dilation, dilation=dilation, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


def torchvision_transformer() -> TorchvisionTransformer:
    """Returns torchvision's vision transformer for scenes, untrained."""
    from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer

    return VisionTransformer(
        image_size=SIZE_PX,
        patch_size=SIZE_PX // _CELLS,
        num_layers=_BLOCKS,
        num_heads=_HEADS,
        hidden_dim=_TOKEN,
        mlp_dim=2 * _TOKEN,
        num_classes=CLASSES,
        conv_stem_configs=[ConvStemConfig(channels, 3, 2) for channels in _STEM],
    )


def timm_transformer() -> nn.Module:
    """Returns timm's vision transformer for scenes, untrained; it has no class token.

    Raises:
        NotFound: timm is missing.
    """
    try:
        from timm.layers.hybrid_embed import HybridEmbed
        from timm.models.vision_transformer import VisionTransformer
    except ImportError as error:
        raise NotFound(f"this network needs more packages ({error}): pip install 'camserve[timm]'") from None
    module: nn.Module = VisionTransformer(
        img_size=SIZE_PX,
        patch_size=1,  # of the stem's cells
        embed_layer=partial(HybridEmbed, backbone=_features()[: len(_STEM)]),
        embed_dim=_TOKEN,
        depth=_BLOCKS,
        num_heads=_HEADS,
        mlp_ratio=2,
        num_classes=CLASSES,
        class_token=False,
        global_pool="avg",
    )
    return module

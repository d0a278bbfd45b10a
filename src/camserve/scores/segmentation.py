"""Scores of networks that tell the class of every place of the image: semantic segmentation.

`value` is the mean logit of a class over a region, `query_value` its mean probability there. The region is the same for
all masked images: where no other is named, it is where the unmasked image is of the class that is explained. So both
are linear in what the places say, and classes are weighted against each other as those of a classifier.

Source: Seg-Grad-CAM, https://arxiv.org/abs/2002.11434, eq. 1, with the mean over the region for the sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from camserve.errors import InvalidOption, Unsupported
from camserve.finalise.regions import shares
from camserve.images import mask_file
from camserve.scores.classes import sum_to_one
from camserve.scores.score import QUERY_SIZE, Predictions, Score
from camserve.scores.targets import Combination
from camserve.types import AnyTarget, InputView, Region
from camserve.types.targets import OfClasses, with_nearest


@dataclass(frozen=True)
class Regions:
    """Asks for sums of the classes' means over regions, each times a weight."""

    combination: Combination
    """Classes and weights of K targets, of B images or of every image."""
    shares: Tensor
    """By how much each place counts, (B or 1, K, places), float64; those of a target sum to 1."""

    def means(self, maps: Tensor) -> Tensor:
        """Returns the means (n, K * C) of maps (n, C, places) over the regions: of all classes for each target."""
        return torch.matmul(maps, self.shares.to(maps).transpose(1, 2)).transpose(1, 2).flatten(1)

    def within(self, classes: int) -> Combination:
        """Returns the combination of means, as `means` returns them."""
        targets = torch.arange(self.shares.shape[1], device=self.shares.device)[:, None]
        return Combination(self.combination.classes + classes * targets, self.combination.weights)

    def sums(self, maps: Tensor) -> Tensor:
        """Returns the weighted sums (n, K) of the means of maps (n, C, places)."""
        return self.within(maps.shape[1]).sums(self.means(maps))

    def column(self, number: int) -> Regions:
        """Returns what one target asks."""
        return Regions(self.combination.column(number), self.shares[:, number : number + 1])

    @classmethod
    def stacked(cls, asked: Sequence[Regions]) -> Regions:
        """Returns what B images ask, filled up with class 0 and no place."""
        filled = torch.nn.utils.rnn.pad_sequence([one.shares[0] for one in asked], batch_first=True)
        return cls(Combination.stacked([one.combination for one in asked]), filled)


class Segmentation(Score):
    """Describes logits (n, C, h, w) of classes of which one is true at each place. One map is the logit of yes or no.

    Args:
        shape: (C, h, w).
    """

    kind = "segmentation"
    axes = 3

    def check(self, outputs: Tensor) -> None:
        """Raises InvalidOption where a softmax over the classes has been taken already."""
        if self.shape[0] > 1 and sum_to_one(self._maps(outputs).transpose(1, 2).flatten(0, 1)):
            raise InvalidOption(
                "outputs segmentation are logits, and this network's outputs sum to 1 at each place: have it return "
                "what its softmax is taken of"
            )

    def classes(self, numbers: int) -> int:
        """Returns the number of classes: one for each map, and 2 for a single one."""
        return max(2, self.shape[0])

    def names(self, numbers: int) -> tuple[str, ...]:
        """Returns "no" and "yes" for a single map."""
        return ("no", "yes") if self.shape[0] == 1 else super().names(numbers)

    def _maps(self, outputs: Tensor) -> Tensor:
        return outputs.reshape(len(outputs), self.shape[0], -1)

    def logits(self, outputs: Tensor) -> Tensor:
        """Returns the logits of all classes at all places: (n, numbers) to (n, C, places)."""
        maps = self._maps(outputs)
        return torch.cat([-maps, maps], dim=1) if self.shape[0] == 1 else maps

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Returns the probabilities of all classes at all places: (n, numbers) to (n, C, places)."""
        logits = self.logits(outputs)
        return logits.sigmoid() if self.shape[0] == 1 else logits.softmax(dim=1)

    def predictions(self, outputs: Tensor) -> Predictions:
        """Returns the share of places of each class, the largest first; of equal ones that of lower index."""
        found = self.logits(outputs[None])[0]
        places = torch.bincount(found.argmax(dim=0), minlength=len(found))
        return Predictions(places, {"share": places / found.shape[1]})

    def value(self, outputs: Tensor, asked: Regions) -> Tensor:
        """Returns the weighted sums of the classes' mean logits over the regions, (n, K)."""
        return asked.sums(self.logits(outputs))

    def query_value(self, outputs: Tensor, asked: Regions) -> Tensor:
        """Returns the weighted sums of the classes' mean probabilities, (n, K); 1 - p for the opposite of a class."""
        found = asked.sums(self.probabilities(outputs))
        return found if asked.combination.weights is None else found + asked.combination.opposite.to(found)

    def through(self, weight: Tensor, asked: Regions) -> Tensor:
        """Returns the derivative of the scores by x, (B or 1, K, n); outputs are weight (numbers, n) times x + b."""
        maps = self.logits(weight.T)
        each = zip(asked.combination.classes, asked.shares, strict=True)
        weights = asked.combination.weights
        rows = []
        for row, (classes, counted) in enumerate(each):
            combination = Combination(classes[None], None if weights is None else weights[row : row + 1])
            rows.append(Regions(combination, counted[None]).sums(maps).T)
        return torch.stack(rows)

    def measured_by(self, outputs: Tensor, asked: Regions) -> Tensor:
        """Returns the signs of the mean logits of classes alone, and 1 for other targets."""
        return torch.where(asked.combination.alone, self.value(outputs, asked).sign(), 1)

    def is_class(self, asked: Regions) -> Tensor:
        """Tells which targets are a class alone, (1, K)."""
        return asked.combination.alone

    def size(self, outputs: Tensor, asked: Regions) -> Tensor:
        """Returns the sums (n, K) of the means of absolute values, each times its weight: places may cancel as well."""
        weights = asked.combination.weights
        positive = Combination(asked.combination.classes, None if weights is None else weights.abs())
        return Regions(positive, asked.shares).sums(self.logits(outputs).abs())

    def query_size(self, asked: Regions) -> Tensor:
        """Returns `QUERY_SIZE` for targets other than a class alone."""
        return torch.where(asked.combination.alone, 0.0, QUERY_SIZE)

    def ask(self, targets: Sequence[AnyTarget], device: torch.device) -> Regions:
        """Returns the combinations of classes that targets stand for, each with its region."""
        regions = [target for target in targets if isinstance(target, Region) and target.shares is not None]
        if len(regions) < len(targets):
            raise Unsupported("outputs segmentation are explained for a class over a region")
        shape = (1, len(regions), math.prod(self.shape[1:]))  # no region has no shape of its own
        counted = np.array([one.shares for one in regions], np.float64).reshape(shape)
        counted /= counted.sum(axis=2, keepdims=True)
        combination = Combination.of([one.of for one in regions], device)
        return Regions(combination, torch.from_numpy(counted).to(device))

    def placed(self, target: AnyTarget, view: InputView) -> AnyTarget:
        """Returns a region's target with its shares; raises as `camserve.finalise.regions.shares`."""
        if not isinstance(target, Region):
            return target
        _, height, width = self.shape
        return replace(target, shares=shares(target, view, (height, width)))

    def resolved(self, target: AnyTarget, outputs: Tensor) -> tuple[AnyTarget, ...]:
        """Returns a target for each class that is meant, over the region, or else over the places of that class.

        Raises:
            InvalidOption: no place is of the class, and no region is named.
            Unsupported: the target names no classes.
        """
        if isinstance(target, OfClasses):
            target = Region(target)
        if not isinstance(target, Region):
            raise Unsupported(f"outputs segmentation tell classes, and have no {type(target).__name__.lower()}")
        logits = self.logits(outputs[None])[0]
        winners = logits.argmax(dim=0)
        if target.shares is not None:
            return tuple(self._over(target, winners, logits))
        return tuple(self._over_its_own(target, winners, logits))

    def _over(self, target: Region, winners: Tensor, logits: Tensor) -> list[AnyTarget]:
        """Returns the targets over a region that is known; its classes are ranked by how much of it is theirs."""
        counted = torch.from_numpy(np.asarray(target.shares)).flatten().to(logits.device, torch.float64)
        owned = torch.bincount(winners, weights=counted, minlength=len(logits))
        ranked = owned.argsort(descending=True, stable=True).tolist()
        return [_with_nearest(one, logits, counted) for one in target.each(ranked)]

    def _over_its_own(self, target: Region, winners: Tensor, logits: Tensor) -> list[AnyTarget]:
        """Returns the targets over the places of their classes; of the largest classes those that have a place."""
        places = torch.bincount(winners, minlength=len(logits))
        order = places.argsort(descending=True, stable=True).tolist()
        found = []
        for one in target.each([index for index in order if places[index]]):
            index = one.classes[0].index
            assert index is not None, "labels and top_k are resolved"
            own = winners == index
            if not own.any():
                said = ", ".join(f"{each} ({places[each] / len(winners):.1%})" for each in order[:5] if places[each])
                raise InvalidOption(
                    f"no place of this image is of class {index}, so that its map needs a region, such as "
                    f"region:x0,y0,x1,y1:{index}; the image is of {said}"
                )
            grid = own.reshape(self.shape[1:]).cpu().numpy()
            placed = replace(one, grid=mask_file(grid), shares=grid.astype(np.float32))
            found.append(_with_nearest(placed, logits, own.double()))
        return found


def _with_nearest(target: Region, logits: Tensor, counted: Tensor) -> AnyTarget:
    """Returns the target; the nearest classes are those of the mean logits over the region, (places,)."""
    means = (logits.double() * counted).sum(dim=1) / counted.sum()
    return with_nearest(target, means.cpu().numpy())

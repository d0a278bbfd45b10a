"""Describes the methods of masked queries, which ask the network about many altered versions of one image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from camserve.errors import InvalidOption
from camserve.methods.spec import MethodSpec, choice, number, tolerance
from camserve.methods.work import Work
from camserve.wording import shown

if TYPE_CHECKING:
    from camserve.types import Layer


class _Baseline(MethodSpec):
    def passes(self, layer: Layer, targets: int, has_zero: bool = True) -> int:
        """Returns the number of queries, and one more for the one from which their scores are measured."""
        return 1 + self.queries(layer, targets)


class _OneQueryPerChannel(MethodSpec):
    def queries(self, layer: Layer, targets: int) -> int:
        """Returns one query for each channel, because the masks do not depend on the target."""
        return layer.channels


@dataclass(frozen=True)
class GroupCam(_Baseline):
    """Masks the image with gradient-weighted channels, in groups."""

    title = "Group-CAM"
    requires = frozenset({"layer", "gradients"})
    paper = "Zhang et al., Group-CAM: Group Score-Weighted Visual Explanations, 2021, https://arxiv.org/abs/2103.13859"

    groups: int = number(32, 1, None, "Number of channel groups, 1..channels of the layer.")
    theta: float = number(
        70.0, 0, 100, "Percentile of each group's map at or below which it is set to 0 (variant paper)."
    )
    variant: str = choice(
        "paper", "reference", description="paper: de-noised, normalised masks; reference: the authors' later code."
    )
    grouping: str = choice(
        "chunk",
        "kmeans",
        "agglomerative",
        description="chunk: channels in order; the others cluster the weighted channels.",
    )

    @property
    def unsigned(self) -> str:
        """Returns the reason for which the variant reference has no negative evidence to show."""
        return "" if self.variant == "paper" else "its variant reference leaves out groups that speak against a class"

    def queries(self, layer: Layer, targets: int) -> int:
        """Returns `groups` for each target, because the masks follow the target's gradients."""
        if self.groups > layer.channels:
            raise InvalidOption(
                f"{self.name}: groups must be 1..{layer.channels} at this layer, got {shown(self.groups)}"
            )
        return self.groups * targets

    def labels(self, layer: Layer, targets: int) -> int:
        """Returns one label, its cluster, for each channel and target; none where channels are taken in order."""
        return 0 if self.grouping == "chunk" else layer.channels * targets

    @property
    def label_values(self) -> int:
        """Returns the number of clusters."""
        return self.groups


@dataclass(frozen=True)
class ScoreCam(_OneQueryPerChannel):
    """Makes every channel a mask, weighted by what the masked image keeps of the class."""

    title = "Score-CAM"
    positive = "its weights are what masked images keep, which is nothing against a class"
    paper = "Wang et al., Score-CAM, 2020, https://arxiv.org/abs/1910.01279"

    variant: str = choice(
        "reference",
        "paper",
        "logit",
        description="Weight of a channel. reference: the probability; paper, logit: softmax over channels of the gain "
        "in probability, in logit.",
    )
    normalise: str = choice(
        "after", "before", description="Masks are scaled to 0..1 after upsampling, or before, as torchcam does."
    )
    tolerance: float = tolerance()

    def is_anchored(self, has_zero: bool) -> bool:
        """Tells whether scores are measured from a query of the baseline; logits are measured from the image's own."""
        return not has_zero and self.variant != "logit"

    def passes(self, layer: Layer, targets: int, has_zero: bool = True) -> int:
        """Returns one query for each channel, and one more where scores are measured from the baseline."""
        return self.queries(layer, targets) + self.is_anchored(has_zero)


class _Sampled(MethodSpec):
    """Describes a relative of Score-CAM that alters each channel's mask `samples` times.

    Query channel * samples + sample alters the mask of one channel in one way.
    """

    samples: int

    def queries(self, layer: Layer, targets: int) -> int:
        """Returns `samples` for each channel, because the masks do not depend on the target."""
        return layer.channels * self.samples

    @property
    def block(self) -> int:
        """Returns how many queries one channel has."""
        return self.samples

    def sums_shape(self, layer: Layer, input_size: tuple[int, int], targets: int) -> tuple[int, ...]:
        """Returns (targets + 1, C): each channel's sum of gains, and in the last row how many gains it has."""
        return targets + 1, layer.channels

    def context_shape(self, layer: Layer) -> tuple[int, ...]:
        """Returns (C, u, v), the shape of the activations."""
        return layer.channels, layer.height, layer.width


@dataclass(frozen=True)
class SsCam(_Sampled):
    """Makes Score-CAM with each channel's logit averaged over noisy masks."""

    title = "SS-CAM"
    positive = "its weights are exponentials, which are positive"
    paper = "Wang et al., SS-CAM: Smoothed Score-CAM, 2020, https://arxiv.org/abs/2006.14255"

    samples: int = number(35, 1, 1000, "Noisy masks for each channel; each is a masked forward pass.")
    std: float = number(2.0, 0, 100, "Standard deviation of the noise added to the normalised mask.")
    seed: int = number(0, 0, 2**31 - 1, "Seed of the noise: the same seed gives the same map.")
    tolerance: float = tolerance()


@dataclass(frozen=True)
class IsCam(_Sampled):
    """Makes Score-CAM with each channel's logit averaged over integrated masks."""

    title = "IS-CAM"
    positive = "its weights are exponentials, which are positive"
    paper = "Naidu et al., IS-CAM: Integrated Score-CAM, 2020, https://arxiv.org/abs/2010.03023"

    samples: int = number(10, 1, 1000, "Integration steps for each channel; each is a masked forward pass.")
    tolerance: float = tolerance()


@dataclass(frozen=True)
class Rise(MethodSpec):
    """Weights random masks by the probability that they keep."""

    title = "RISE"
    positive = ""
    paper = "Petsiuk et al., RISE, 2018, https://arxiv.org/abs/1806.07421"
    resolution = "input"
    uses_layer = False
    requires = frozenset()

    masks: int = number(4000, 1, 100_000, "Number of random masks.")
    grid: int = number(7, 1, 64, "Cells of a mask in each direction.")
    keep_prob: float = number(0.5, 0.001, 1, "Probability that a cell is kept.")
    seed: int = number(0, 0, 2**31 - 1, "Seed of the masks: the same seed gives the same map.")
    tolerance: float = tolerance()

    def queries(self, layer: Layer, targets: int) -> int:
        """Returns the number of masks, each of which is a query that all targets share."""
        return self.masks


@dataclass(frozen=True)
class DRise(Rise):
    """Weights random masks by how much of a detection they keep. On a network of classes it is RISE."""

    title = "D-RISE"
    paper = "Petsiuk et al., Black-box Explanation of Object Detectors via Saliency Maps, 2021, https://arxiv.org/abs/2006.03204"

    masks: int = number(5000, 1, 100_000, "Number of random masks.")
    grid: int = number(16, 1, 64, "Cells of a mask in each direction.")


@dataclass(frozen=True)
class AblationCam(_Baseline, _OneQueryPerChannel):
    """Weights channels by how much of the logit is lost without them. Only the tail after the layer is run."""

    title = "Ablation-CAM"
    positive = ""
    kind = "tail"
    requires = frozenset({"layer", "tail"})
    paper = "Desai and Ramaswamy, Ablation-CAM, 2020, https://doi.org/10.1109/WACV45572.2020.9093360"

    tolerance: float = tolerance()

    def work(self, layer: Layer, targets: int) -> Work:
        """Returns a tail for each channel, or a formula behind global average pooling and one linear layer."""
        return Work("closed_form" if layer.pooled_head else "tail", self.queries(layer, targets))


@dataclass(frozen=True)
class ReciproCam(MethodSpec):
    """Shows the network one place of the layer at a time: its score is the map there. Only the tail is run."""

    title = "Recipro-CAM"
    requires = frozenset({"layer", "tail"})
    positive = "its map is the score of each place alone, and nothing says which score speaks for neither side"
    kind = "tail"
    paper = "Byun and Lee, Recipro-CAM, 2022, https://arxiv.org/abs/2209.14074"

    kernel: str = choice(
        "point",
        "gaussian",
        description="What is shown. point: one place; gaussian: 1/4 of it, 1/8 and 1/16 of its neighbours.",
    )

    def queries(self, layer: Layer, targets: int) -> int:
        """Returns one query for each place of the layer, because what is shown does not depend on the target."""
        return layer.height * layer.width


@dataclass(frozen=True)
class Occlusion(_Baseline):
    """Slides a window of zeros over the image; a pixel counts by the probability lost while it is hidden."""

    title = "Occlusion"
    positive = ""
    paper = "Zeiler and Fergus, Visualizing and Understanding Convolutional Networks, https://arxiv.org/abs/1311.2901"
    resolution = "input"
    uses_layer = False
    requires = frozenset()

    positions: int = number(14, 1, 224, "Positions of the window in each direction: the stride is the size over these.")
    window: int = number(2, 1, 224, "Length of the window's side, in strides.")

    def queries(self, layer: Layer, targets: int) -> int:
        """Returns the number of windows, each of which is a query that all targets share."""
        return self.positions**2

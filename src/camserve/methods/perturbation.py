"""Methods of masked queries: the network is asked about many altered versions of one image."""

from __future__ import annotations

from dataclasses import dataclass

from camserve.errors import InvalidOption
from camserve.methods.spec import MethodSpec, choice, number


class _Baseline(MethodSpec):
    def passes(self, channels: int, targets: int) -> int:
        """The queries, and the one from which their scores are measured."""
        return 1 + self.queries(channels, targets)


class _OneQueryPerChannel(MethodSpec):
    def queries(self, channels: int, targets: int) -> int:
        """One for each channel: the masks do not depend on the target."""
        return channels


@dataclass(frozen=True)
class GroupCam(_Baseline):
    """Gradient-weighted channels, masked in groups."""

    title = "Group-CAM"
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

    def queries(self, channels: int, targets: int) -> int:
        """`groups` for each target: the masks follow the target's gradients."""
        if self.groups > channels:
            raise InvalidOption(f"{self.name}: groups must be 1..{channels} at this layer, got {self.groups}")
        return self.groups * targets


@dataclass(frozen=True)
class ScoreCam(_OneQueryPerChannel):
    """Every channel is a mask, weighted by what the masked image keeps of the class."""

    title = "Score-CAM"
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


@dataclass(frozen=True)
class SsCam(_OneQueryPerChannel):
    """Score-CAM with each channel's logit averaged over noisy masks."""

    title = "SS-CAM"
    paper = "Wang et al., SS-CAM: Smoothed Score-CAM, 2020, https://arxiv.org/abs/2006.14255"

    samples: int = number(35, 1, 1000, "Noisy masks for each channel: so many forward passes a query.")
    std: float = number(2.0, 0, 100, "Standard deviation of the noise added to the normalised mask.")
    seed: int = number(0, 0, 2**31 - 1, "Of the noise: the same seed gives the same map.")

    def passes(self, channels: int, targets: int) -> int:
        """`samples` for each channel."""
        return channels * self.samples


@dataclass(frozen=True)
class IsCam(_OneQueryPerChannel):
    """Score-CAM with each channel's logit averaged over integrated masks."""

    title = "IS-CAM"
    paper = "Naidu et al., IS-CAM: Integrated Score-CAM, 2020, https://arxiv.org/abs/2010.03023"

    samples: int = number(10, 1, 1000, "Integration steps for each channel: so many forward passes a query.")

    def passes(self, channels: int, targets: int) -> int:
        """`samples` for each channel."""
        return channels * self.samples


@dataclass(frozen=True)
class Rise(MethodSpec):
    """Random masks weighted by the probability that they keep."""

    title = "RISE"
    paper = "Petsiuk et al., RISE, 2018, https://arxiv.org/abs/1806.07421"
    resolution = "input"
    uses_layer = False

    masks: int = number(4000, 1, 100_000, "Number of random masks.")
    grid: int = number(7, 1, 64, "Cells of a mask in each direction.")
    keep_prob: float = number(0.5, 0.001, 1, "Probability that a cell is kept.")
    seed: int = number(0, 0, 2**31 - 1, "Of the masks: the same seed gives the same map.")

    def queries(self, channels: int, targets: int) -> int:
        """One for each mask; all targets share it."""
        return self.masks


@dataclass(frozen=True)
class AblationCam(_Baseline, _OneQueryPerChannel):
    """Channels weighted by how much of the logit is lost without them. Only the tail after the layer is run."""

    title = "Ablation-CAM"
    paper = "Desai and Ramaswamy, Ablation-CAM, 2020, https://doi.org/10.1109/WACV45572.2020.9093360"


@dataclass(frozen=True)
class Occlusion(_Baseline):
    """A window of zeros slides over the image; a place counts by the probability lost while it is hidden."""

    title = "Occlusion"
    paper = "Zeiler and Fergus, Visualizing and Understanding Convolutional Networks, https://arxiv.org/abs/1311.2901"
    resolution = "input"
    uses_layer = False

    positions: int = number(14, 1, 224, "Positions of the window in each direction: the stride is the size over these.")
    window: int = number(2, 1, 224, "Length of the window's side, in strides.")

    def queries(self, channels: int, targets: int) -> int:
        """One for each position; all targets share it."""
        return self.positions**2

"""Describes CAM and its relatives, which weight activations by gradients.

A pass takes at most one backward pass of the tail for each target.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from camserve.methods.spec import MethodSpec, choice, number

if TYPE_CHECKING:
    from camserve.types import Layer

PLUS_PLUS_EPSILON = 1e-6
"""Number that Grad-CAM++ adds to the denominator of eq. 19, as grad-cam 1.5.7 does. It is not small beside the squares
of gradients below 1e-3."""


class _OfGradients(MethodSpec):
    kind = "layer_gradient"
    requires = frozenset({"layer", "gradients"})


@dataclass(frozen=True)
class Cam(MethodSpec):
    """Maps class activations of networks whose head is global average pooling and one linear layer."""

    title = "CAM"
    positive = ""
    paper = (
        "Zhou et al., Learning Deep Features for Discriminative Localization, 2016, https://arxiv.org/abs/1512.04150"
    )
    needs = "GAP head"
    requires = frozenset({"layer", "modules"})
    kind = "closed_form"


@dataclass(frozen=True)
class GradCam(_OfGradients):
    """Weights channels by the mean of their gradients."""

    title = "Grad-CAM"
    positive = ""
    paper = "Selvaraju et al., Grad-CAM, 2017, https://arxiv.org/abs/1610.02391"


@dataclass(frozen=True)
class HiresCam(_OfGradients):
    """Multiplies activations with gradients, each cell by itself."""

    title = "HiResCAM"
    positive = ""
    paper = "Draelos and Carin, Use HiResCAM instead of Grad-CAM, 2020, https://arxiv.org/abs/2011.08891"


@dataclass(frozen=True)
class GradCamPlusPlus(_OfGradients):
    """Weights channels by their positive gradients, each cell by its share in the higher derivatives."""

    title = "Grad-CAM++"
    positive = "its weights come of positive gradients alone"
    paper = "Chattopadhyay et al., Grad-CAM++, 2018, https://arxiv.org/abs/1710.11063"

    variant: str = choice(
        "paper",
        "product",
        description="paper: sum(A) g^3 in the denominator, eq. 19; product: sum(A g^3), as torchcam says.",
    )


@dataclass(frozen=True)
class SmoothGradCamPlusPlus(_OfGradients):
    """Makes Grad-CAM++ with derivatives averaged over noisy copies of the image."""

    title = "Smooth Grad-CAM++"
    positive = "its weights come of positive gradients alone"
    paper = "Omeiza et al., Smooth Grad-CAM++, 2019, https://arxiv.org/abs/1908.01224"

    samples: int = number(25, 1, 1000, "Number of noisy copies.")
    sigma: float = number(0.15, 0, 1, "Standard deviation of the noise, relative to the range of the input.")
    seed: int = number(0, 0, 2**31 - 1, "Seed of the noise: the same seed gives the same map.")

    def queries(self, layer: Layer, targets: int) -> int:
        """Returns the number of noisy copies, each of which is a query that all targets share."""
        return self.samples

    def sums_shape(self, layer: Layer, input_size: tuple[int, int], targets: int) -> tuple[int, ...]:
        """Returns (targets, 3, C, u, v): the gradients, their squares and their cubes are added up."""
        return targets, 3, layer.channels, layer.height, layer.width

    def context_shape(self, layer: Layer) -> tuple[int, ...]:
        """Returns (C, u, v), the shape of the activations."""
        return layer.channels, layer.height, layer.width


@dataclass(frozen=True)
class XgradCam(_OfGradients):
    """Weights channels by the sum of gradient times activation, relative to the activation."""

    title = "XGrad-CAM"
    positive = ""
    paper = "Fu et al., Axiom-based Grad-CAM, 2020, https://arxiv.org/abs/2008.02312"


@dataclass(frozen=True)
class LayerCam(_OfGradients):
    """Multiplies activations with their positive gradients, each cell by itself."""

    title = "LayerCAM"
    positive = "it takes positive gradients alone"
    paper = "Jiang et al., LayerCAM, 2021, https://doi.org/10.1109/TIP.2021.3089943"


@dataclass(frozen=True)
class IntegratedGradCam(_OfGradients):
    """Integrates Grad-CAM on the way from a black image to the image."""

    title = "Integrated Grad-CAM"
    paper = "Sattarzadeh et al., Integrated Grad-CAM, 2021, https://arxiv.org/abs/2102.07805"

    steps: int = number(0, 0, 1000, "Images on the way; 0: 20 for the variant paper, 50 for reference.")
    variant: str = choice(
        "paper",
        "reference",
        description="paper: gradients times the activations' difference to black; reference: the authors' notebook.",
    )

    @property
    def unsigned(self) -> str:
        """Returns the reason for which the variant reference has no negative evidence to show."""
        return "" if self.variant == "paper" else "its variant reference adds up positive parts alone"

    @property
    def images(self) -> int:
        """Returns `steps` with its default filled in."""
        return self.steps or {"paper": 20, "reference": 50}[self.variant]

    def queries(self, layer: Layer, targets: int) -> int:
        """Returns the number of images on the way, each of which is a query that all targets share."""
        return self.images

    def passes(self, layer: Layer, targets: int, has_zero: bool = True) -> int:
        """Returns the number of images that are looked at; for the variant paper the black image is one more."""
        return self.images + (self.variant == "paper")


@dataclass(frozen=True)
class EigenCam(MethodSpec):
    """Takes the first principal component of the activations; the map is the same for every class."""

    title = "Eigen-CAM"
    positive = "a principal component speaks neither for nor against anything"
    kind = "closed_form"
    paper = "Muhammad and Yeasin, Eigen-CAM, 2020, https://arxiv.org/abs/2008.00299"

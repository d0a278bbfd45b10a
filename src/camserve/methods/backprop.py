"""Describes the methods that go back to the pixels. Their maps are as large as the network's input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from camserve.methods.spec import MethodSpec, choice, number

if TYPE_CHECKING:
    from camserve.types import Layer


class _OfInput(MethodSpec):
    resolution = "input"
    uses_layer = False
    kind = "pixel_gradient"
    requires = frozenset({"gradients"})


class _OnePass(MethodSpec):
    kind = "pixel_gradient"

    def passes(self, layer: Layer, targets: int, has_zero: bool = True) -> int:
        """Returns 1: the pass with other rules at ReLUs, which all targets share."""
        return 1


class _OfColours(_OfInput):
    """Describes a method whose finish takes the largest value over the three channels of the input."""

    def sums_shape(self, layer: Layer, input_size: tuple[int, int], targets: int) -> tuple[int, ...]:
        """Returns (targets, 3, H, W): the channels are kept apart until the finish."""
        return targets, 3, *input_size


@dataclass(frozen=True)
class GuidedBackprop(_OnePass, _OfInput):
    """Takes the gradient of the input, with only positive gradients through active ReLUs."""

    title = "Guided backpropagation"
    positive = "it takes absolute values"
    requires = frozenset({"gradients", "modules"})
    paper = "Springenberg et al., Striving for Simplicity, 2014, https://arxiv.org/abs/1412.6806"
    needs = "ReLU"


@dataclass(frozen=True)
class Deconvolution(_OnePass, _OfInput):
    """Takes the gradient of the input, with only positive gradients through all ReLUs."""

    title = "Deconvolution"
    positive = "it takes absolute values"
    requires = frozenset({"gradients", "modules"})
    paper = "Zeiler and Fergus, Visualizing and Understanding Convolutional Networks, https://arxiv.org/abs/1311.2901"
    needs = "ReLU"


@dataclass(frozen=True)
class GuidedGradCam(_OnePass):
    """Multiplies guided backpropagation with upsampled Grad-CAM."""

    title = "Guided Grad-CAM"
    positive = "it takes absolute values"
    requires = frozenset({"layer", "gradients", "modules"})
    paper = "Selvaraju et al., Grad-CAM, 2017, https://arxiv.org/abs/1610.02391"
    resolution = "input"
    needs = "ReLU"

    interpolation: str = choice("bilinear", "nearest", description="How Grad-CAM is upsampled; nearest as Captum does.")


@dataclass(frozen=True)
class IntegratedGradients(_OfInput):
    """Integrates gradients on the way from a baseline to the image, times their difference."""

    title = "Integrated Gradients"
    positive = ""
    paper = "Sundararajan et al., Axiomatic Attribution for Deep Networks, 2017, https://arxiv.org/abs/1703.01365"

    steps: int = number(50, 1, 1000, "Points of the Gauss-Legendre quadrature.")
    baseline: str = choice(
        "zero", "black", description="Where the way begins: zero in normalised space, or pixel value 0."
    )

    def queries(self, layer: Layer, targets: int) -> int:
        """Returns the number of points, each of which is a query that all targets share."""
        return self.steps


@dataclass(frozen=True)
class SmoothGrad(_OfColours):
    """Averages the gradient of the input over noisy copies of the image."""

    title = "SmoothGrad"
    positive = "it takes absolute values"
    paper = "Smilkov et al., SmoothGrad, 2017, https://arxiv.org/abs/1706.03825"

    samples: int = number(25, 1, 1000, "Number of noisy copies.")
    sigma: float = number(0.15, 0, 1, "Standard deviation of the noise, relative to the range of the input.")
    seed: int = number(0, 0, 2**31 - 1, "Seed of the noise: the same seed gives the same map.")

    def queries(self, layer: Layer, targets: int) -> int:
        """Returns the number of noisy copies, each of which is a query that all targets share."""
        return self.samples


@dataclass(frozen=True)
class Xrai(_OfColours):
    """Ranks Integrated Gradients over overlapping segments of the image."""

    title = "XRAI"
    positive = "it ranks regions by what speaks for them"
    ranked = True
    paper = "Kapishnikov et al., XRAI: Better Attributions Through Regions, 2019, https://arxiv.org/abs/1906.02825"

    steps: int = number(100, 1, 1000, "Points of Integrated Gradients for each of the two baselines.")

    def queries(self, layer: Layer, targets: int) -> int:
        """Returns the number of points of both baselines, each of which is a query that all targets share.

        The ranking is no query of the method.
        """
        return 2 * self.steps

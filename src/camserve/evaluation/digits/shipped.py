"""Offers the networks of digit scenes as they are shipped: trained, with what their outputs mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import as_file, files
from importlib.resources.abc import Traversable

import torch
from torch import nn

from camserve.engine import Engine
from camserve.evaluation.digits import asked, networks, tasks, towers
from camserve.evaluation.digits.scenes import SIZE_PX
from camserve.evaluation.digits.tasks import Task
from camserve.types import Outputs, Preprocessing

DIGITS = tuple(str(digit) for digit in range(10))
PREPROCESSING = Preprocessing(
    resize_px=SIZE_PX,
    crop_px=(SIZE_PX, SIZE_PX),
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
    interpolation="bilinear",
)
MICRO_BATCH = 32
"""Number of scenes in one pass. Scenes are small: a larger number is faster than the engine's default for CPUs."""


@dataclass(frozen=True)
class Shipped:
    """Describes a network whose weights are shipped."""

    name: str
    build: Callable[[], nn.Module]
    """Returns the network untrained."""
    task: Task
    labels: tuple[str, ...] = DIGITS
    outputs: Outputs = "softmax"
    units: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()

    @property
    def weights(self) -> Traversable:
        """The safetensors file of its state dict."""
        return files("camserve.evaluation.digits") / "weights" / f"{self.name}.safetensors"

    def trained(self) -> nn.Module:
        """Returns the network with the weights that are shipped, in eval mode, frozen."""
        from safetensors.torch import load_file

        module = self.build()
        with as_file(self.weights) as path:
            module.load_state_dict(load_file(path))
        return module.eval().requires_grad_(False)


_ALL = (
    Shipped("digits", networks.DigitsNet, tasks.ONE_DIGIT),
    Shipped("digits-multilabel", networks.DigitsNet, tasks.DIGITS_PRESENT, outputs="sigmoid"),
    Shipped("digits-binary", networks.seven_net, tasks.SEVEN_PRESENT, ("no seven", "seven"), "binary"),
    Shipped(
        "digits-value",
        networks.ValuesNet,
        tasks.SUM_AND_SIZE,
        labels=("sum", "largest"),
        outputs="value",
        units=("", "px"),
    ),
    Shipped(
        "digits-text-image",
        towers.TextImageNet,
        tasks.WHAT_IS_SAID,
        labels=(),
        outputs="text-image",
        prompts=towers.PROMPTS,
    ),
    Shipped("digits-segmentation", networks.SegmentationNet, tasks.PLACES, (*DIGITS, "background"), "segmentation"),
    Shipped("digits-boxes", networks.DetectorNet, tasks.DIGITS_FOUND, outputs="boxes"),
    Shipped("digits-answers", asked.answers_net, tasks.WHAT_IS_ASKED, asked.ANSWERS, "answers"),
    Shipped("digits-tokens", asked.caption_net, tasks.WHAT_IS_WRITTEN, asked.CAPTION, "tokens"),
    Shipped("digits-vit", networks.torchvision_transformer, tasks.ONE_DIGIT),
    Shipped("digits-vit-timm", networks.timm_transformer, tasks.ONE_DIGIT),
)
SHIPPED: Mapping[str, Shipped] = {network.name: network for network in _ALL}
"""The networks by name."""


def load_engine(
    name: str = "digits", device: str | torch.device | None = None, micro_batch: int | None = None
) -> Engine:
    """Returns an engine of a trained network; device None: CUDA where there is one, else the CPU."""
    network = SHIPPED[name]
    return Engine(
        network.trained().to(memory_format=torch.channels_last),  # type: ignore[call-overload]  # torch's stub lacks this form
        preprocessing=PREPROCESSING,
        labels=network.labels,
        outputs=network.outputs,
        units=network.units,
        prompts=network.prompts or None,
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        micro_batch=micro_batch or MICRO_BATCH,
    )

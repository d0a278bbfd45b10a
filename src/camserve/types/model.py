"""Describes a model: its input, its layers, its methods."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal, get_args

from camserve.errors import InvalidOption, Unsupported
from camserve.types.options import Precision
from camserve.wording import close_to, shown

if TYPE_CHECKING:
    from camserve.methods import Parameter
    from camserve.methods.spec import Asset
    from camserve.types.target_forms import TargetForm
    from camserve.types.targets import Edges


Outputs = Literal[
    "softmax",
    "sigmoid",
    "binary",
    "probabilities",
    "value",
    "embedding",
    "text-image",
    "segmentation",
    "boxes",
    "answers",
    "tokens",
]
OUTPUTS: tuple[Outputs, ...] = get_args(Outputs)
"""The kinds of outputs: what the numbers that a network gives are."""

Decoding = Literal["detr", "detr-sigmoid", "yolo", "yolo5"]
DECODINGS: tuple[Decoding, ...] = get_args(Decoding)
"""Forms of answers that detections are made of, where a network leaves its last steps to others."""

OF_VECTORS: tuple[Outputs, ...] = ("embedding", "text-image")
"""The kinds of outputs that are vectors, which are compared to others."""

_SCORES: Mapping[Outputs, Literal["value", "similarity"]] = {
    "value": "value",
    "embedding": "similarity",
    "text-image": "similarity",
}
"""Name of what predictions say by the kind of outputs, where it is no probability."""

_WITHOUT_ZERO = frozenset({*_SCORES, "tokens"})
"""Kinds of outputs whose scores have no zero of their own: a log-probability has none either."""


@dataclass(frozen=True)
class Preprocessing:
    """Says how an image becomes the network's input: resize, crop the centre, scale, normalise.

    Raises:
        InvalidOption: on construction, when mean and std have not one finite number for each channel, a deviation is
            not above 0, or stretched images are smaller than the crop.
    """

    resize_px: int | tuple[int, int]
    """Length of the shorter side after resizing, which keeps proportions; more where an image would not cover the crop
    then. A pair is the (height, width) that every image is stretched to."""
    crop_px: tuple[int, int]
    """(height, width) of the centre crop, which is the network's input size."""
    mean: tuple[float, ...]
    """Mean that is subtracted from pixels in [0, 1], by channel."""
    std: tuple[float, ...]
    """Standard deviation that the difference is divided by, by channel."""
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bicubic"
    channels: int = 0
    """Channels of the network's input: 3 for RGB, 1 for grey; images of any other number come as arrays. 0 becomes the
    number of values of `mean`."""
    crop_start: Literal["even", "down"] = "even"
    """Rounding of the half pixel at which a centre crop starts where an odd number of pixels is cut off: to the even
    one, as torchvision does it, or down, as Hugging Face's processors do it."""

    def __post_init__(self) -> None:
        channels = self.channels or len(self.mean)
        object.__setattr__(self, "channels", channels)
        for what, values in (("mean", self.mean), ("std", self.std)):
            if not len(values) == channels > 0 or not all(map(math.isfinite, values)):
                raise InvalidOption(f"{what} must have a finite number for each of {channels} channels, got {values}")
        if not all(value > 0 for value in self.std):
            raise InvalidOption(f"std must be above 0 in each channel, got {self.std}")
        if isinstance(self.resize_px, tuple) and any(map(operator.lt, self.resize_px, self.crop_px)):
            raise InvalidOption(f"images stretched to {self.resize_px} do not cover the crop of {self.crop_px}")


@dataclass(frozen=True)
class InputView:
    """Tells which part of the sent image the network saw."""

    original_size: tuple[int, int]
    """(height, width) of the sent image in pixels, after EXIF orientation."""
    crop: tuple[float, float, float, float]
    """(left, top, right, bottom) of the part seen, in pixels of the sent image."""
    size: tuple[int, int]
    """(height, width) of the network's input in pixels."""

    def seen(self, box: Sequence[float]) -> Edges:
        """Returns edges (x0, y0, x1, y1) in pixels of the sent image in those of the network's input."""
        left, top, right, bottom = self.crop
        height, width = self.size
        across, down = width / (right - left), height / (bottom - top)
        x0, y0, x1, y1 = box
        return (x0 - left) * across, (y0 - top) * down, (x1 - left) * across, (y1 - top) * down

    def sent(self, box: Sequence[float]) -> Edges:
        """Returns edges in pixels of the network's input in those of the sent image, cut off at what it sees."""
        left, top, right, bottom = self.crop
        height, width = self.size
        x0, x1 = (left + min(max(edge, 0.0), width) * (right - left) / width for edge in (box[0], box[2]))
        y0, y1 = (top + min(max(edge, 0.0), height) * (bottom - top) / height for edge in (box[1], box[3]))
        return x0, y0, x1, y1


@dataclass(frozen=True)
class Layer:
    """Describes a layer that can be explained."""

    name: str
    channels: int
    height: int
    width: int
    pooled_head: bool = False
    """Whether global average pooling and one linear layer follow it, so that Ablation-CAM needs no pass. This was seen
    on one image and only forecasts the work: a worker checks it again for every image."""


NO_LAYER = Layer("", 0, 0, 0)
"""Stand-in for a layer in a network that has none, for methods that do not look at it."""


@dataclass(frozen=True)
class RuntimeInfo:
    """Says what runs a network on the worker that was asked, chosen by measuring when it was loaded."""

    name: str = ""
    """Name of the runtime: "eager" (PyTorch), "onnx" (ONNX Runtime), "cuda_graphs"; "" where a worker does not say."""
    micro_batch: int = 0
    """Number of masked queries of a pass; 0 where a worker does not say."""
    precision: Precision = "exact"
    """Precision that "auto" means there."""
    reason: str = ""
    """Why no faster runtime, or no faster precision, is used; empty where none is missing."""


@dataclass(frozen=True)
class TextInput:
    """Describes the text that a model takes beside the image."""

    what: str
    """Name of what it is: "question", or "caption so far"."""
    example: str
    required: bool
    """Whether a request must have one."""
    most_tokens: int
    """Most tokens that the network takes, of the text and of the words that are asked for behind it."""


@dataclass(frozen=True)
class ModelInfo:
    """Describes a served model."""

    name: str
    version: str
    labels: tuple[str, ...]
    input_size: tuple[int, int]
    """(height, width) in pixels."""
    layers: tuple[Layer, ...]
    """Every layer that can be explained, in the order of the forward pass; none in a network without layers."""
    default_layer: str
    """Name of the layer that is explained where nobody names any; "" in a network without layers."""
    source: str = ""
    licence: str = ""
    evaluation: Mapping[str, float] = field(default_factory=dict)
    """Overall score (insertion - deletion) by title of the method; empty for a model that was not evaluated."""
    weights: str = ""
    """Hash of the weights and of how images are prepared for them; "" for a network that came from no archive."""
    outputs: Outputs = "softmax"
    """Kind of the network's outputs. `labels` names classes, or the numbers of "value", or the packed references of
    "embedding", or the packed prompts of "text-image"."""
    units: tuple[str, ...] = ()
    """Unit of each number of "value"; empty where they have none."""
    dimension: int = 0
    """Length of the vectors of "embedding" and "text-image"; 0 elsewhere."""
    channels: int = 3
    """Channels of the network's input: 3 for RGB, 1 for grey; images of any other number come as arrays."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Why each other layer that returns maps is not offered, by name."""
    lacks: Mapping[Asset, str] = field(default_factory=dict)
    """Why the network does not offer what methods may need, by name: see `camserve.types.offered`."""
    text: TextInput | None = None
    """The text that it takes beside the image; None where it takes none."""

    runtime: RuntimeInfo = field(default_factory=RuntimeInfo, compare=False)
    """Description of the runtime of the worker that was asked; other workers may have another one."""

    @property
    def score(self) -> Literal["probability", "value", "similarity"]:
        """Name of the score of masked images, which predictions say as well, but for shares of an image's places."""
        return _SCORES.get(self.outputs, "probability")

    @property
    def says(self) -> tuple[Literal["probability", "value", "similarity", "share"], ...]:
        """Names of the numbers that its predictions have: a probability beside the similarity to a packed prompt."""
        if self.outputs == "segmentation":
            return ("share",)
        both = self.outputs == "text-image" and self.labels
        return ("probability", "similarity") if both else (self.score,)

    @property
    def most_predictions(self) -> int:
        """Largest number of predictions: there are as many as labels, of detections perhaps more."""
        return sys.maxsize if self.outputs == "boxes" else len(self.labels)

    @property
    def has_zero(self) -> bool:
        """Tells whether scores have a zero of their own, as probabilities have; else methods ask for what they need."""
        return self.outputs not in _WITHOUT_ZERO

    @property
    def sample_text(self) -> str:
        """A text that it takes, for looks at its workers; "" where it takes none."""
        return "" if self.text is None else self.text.example

    def check_text(self, text: str) -> None:
        """Raises InvalidOption where a request has a text that the model does not take, or lacks one that it needs."""
        if self.text is None and text:
            raise InvalidOption(
                f"text: model {self.name} takes an image alone (outputs {self.outputs}), and no text beside it; "
                f"got {shown(text)}"
            )
        if self.text is not None and self.text.required and not text.strip():
            raise InvalidOption(
                f"text: model {self.name} needs a {self.text.what} beside the image, such as {self.text.example!r}; "
                f"got {shown(text) if text else 'none'}"
            )

    @cached_property
    def _layers(self) -> Mapping[str, Layer]:
        return {layer.name: layer for layer in self.layers}

    def layer(self, name: str) -> Layer:
        """Returns the layer of this name; the default layer for "", which is `NO_LAYER` where there are no layers.

        Raises:
            InvalidOption: there is no such layer; the text names the nearest ones.
            Unsupported: a layer is named, and there are none.
        """
        if not self.layers:
            if name:
                raise Unsupported(f"there is no layer {shown(name)}: {self.lacks.get('layer', 'the model has none')}")
            return NO_LAYER
        name = name or self.default_layer
        if found := self._layers.get(name):
            return found
        if name in self.refused:
            raise InvalidOption(
                f"layer {shown(name)} is not offered: {self.refused[name]}; the default is {self.default_layer!r}"
            )
        near = close_to(name, (layer.name for layer in self.layers), cutoff=0.4)
        hint = f"; close to it: {', '.join(near)}" if near else ""
        raise InvalidOption(f"unknown layer {shown(name)}; the default is {self.default_layer!r}{hint}")


@dataclass(frozen=True)
class ModelSummary:
    """Names a model of a server and tells whether it is ready."""

    name: str
    version: str
    ready: bool
    """Whether a worker is ready to answer."""
    failure: str = ""
    """Why the model is not ready although it has workers; empty while it is ready or may just be starting."""


@dataclass(frozen=True)
class MethodInfo:
    """Describes a method as a server offers it."""

    name: str
    title: str
    paper: str
    parameters: tuple[Parameter, ...]
    queries: int
    """Largest number of passes beyond the first forward, for one target at the default layer, default parameters."""
    needs: str = ""
    """Property that a network must have for the method: "GAP head", "ReLU", "ViT"; empty: none."""
    refused: str = ""
    """Why this model has not the method, whatever its network is made of; empty: it works, given what it `needs`."""


@dataclass(frozen=True)
class Model(ModelInfo):
    """Describes a served model with its readiness and the methods that it offers."""

    ready: bool = False
    methods: tuple[MethodInfo, ...] = ()
    targets: tuple[TargetForm, ...] = ()
    """Kinds of targets that it takes, each with an example."""

"""Defines what callers get: predictions, maps, and what these took."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from camserve.types.model import InputView, ModelInfo
from camserve.types.options import Precision
from camserve.types.targets import Edges

if TYPE_CHECKING:
    from PIL import Image

    from camserve.methods import MethodSpec


@dataclass(frozen=True)
class Prediction:
    """Holds what a network says of one class, number or packed reference for the unmasked image."""

    index: int
    label: str
    probability: float | None = None
    """Probability of the class; None where the outputs are no probabilities."""
    value: float | None = None
    """The number, of a network that gives numbers."""
    unit: str = ""
    """Unit of the number; "" where it has none."""
    similarity: float | None = None
    """Cosine to the packed reference, or prompt, of a network that gives vectors; a prompt has a probability too."""
    share: float | None = None
    """Share of the image's places that are of the class, of a network that tells the class of every place."""
    box: Edges | None = None
    """Edges (x0, y0, x1, y1) of what was detected in pixels of the sent image, of a network that gives boxes."""

    def named(self, model: ModelInfo) -> Prediction:
        """Returns the prediction with label and unit filled in."""
        unit = model.units[self.index] if self.index < len(model.units) else ""
        return replace(self, label=model.labels[self.index], unit=unit)

    @property
    def figure(self) -> str:
        """The number as people read it: `88.1%`, `37.25 px`, `similarity 0.71`, `12.5% of the image`."""
        if self.share is not None:
            return f"{self.share:.1%} of the image"
        if self.value is not None:
            return f"{self.value:.4g} {self.unit}".rstrip()
        said = [] if self.similarity is None else [f"similarity {self.similarity:.2f}"]
        if self.probability is not None or not said:
            said.append(f"{self.probability or 0:.1%}")
        return ", ".join(said)


@dataclass(frozen=True)
class Box:
    """Holds the edges of a half-open box in pixels of the sent image."""

    left: float
    top: float
    right: float
    bottom: float
    score: float
    """Mean of the map inside the component that the box encloses."""


@dataclass(frozen=True)
class Cost:
    """Tells what an explanation took."""

    queries: int
    """Number of images that went through the network beyond the first forward pass, those of evaluations included."""
    stage_seconds: Mapping[str, float]
    """Seconds by stage (queue, decode, forward, queries, merge, render), as far as a stage applies."""
    steps: int
    precision: Precision
    """Precision of masked queries: "bfloat16" where any of them was asked in it, else "exact"."""
    worker: str
    evaluation_queries: int = 0
    """Number of masked forward passes of deletion and insertion curves."""
    cached: bool = False
    """Whether the answer was made for an earlier, equal request; the other figures are then those of that one."""
    image_bytes: int = 0
    """Number of image bytes that were sent to workers for this request; 0 where there is no service between."""
    runtime: str = ""
    """Name of what ran the network: "eager", "compiled", "onnx" or "cuda_graphs"; "" where a worker does not say."""
    micro_batch: int = 0
    """Number of masked queries of a pass in the last step; 0 where a worker does not say."""


@dataclass(frozen=True)
class Faithfulness:
    """Tells how the class's probability changes while pixels go, or come, in order of their saliency."""

    protocol: str
    deletion: np.ndarray = field(repr=False)
    """(points,), float64: probabilities from the image to zeros, the most salient pixels first."""
    insertion: np.ndarray = field(repr=False)
    """(points,), float64: probabilities from the blurred image to the image, the most salient pixels first."""

    @property
    def deletion_auc(self) -> float:
        """Area under the deletion curve; small is good."""
        return auc(self.deletion)

    @property
    def insertion_auc(self) -> float:
        """Area under the insertion curve; large is good."""
        return auc(self.insertion)

    @property
    def overall(self) -> float:
        """Area under the insertion curve minus that under the deletion curve; large is good."""
        return self.insertion_auc - self.deletion_auc


def auc(scores: np.ndarray) -> float:
    """Returns the area under a curve of width 1 by the trapezoid rule, as RISE's `evaluation.py` does.

    Args:
        scores: (points,), at least two.
    """
    return float((scores.sum() - scores[0] / 2 - scores[-1] / 2) / (len(scores) - 1))


@dataclass(frozen=True)
class SaliencyMap:
    """Holds the final map of one method and target."""

    method: MethodSpec
    target: Prediction
    """The class explained; or the number, or the vector with its similarity."""
    layers: tuple[str, ...]
    """Names of the layers whose activations the map is made of; the maps of several are fused."""
    array: np.ndarray = field(repr=False)
    """float32 (height, width) in [0, 1]."""
    value_range: tuple[float, float]
    """(minimum, maximum) of the weighted sum, or of the fusion of several layers' maps, before normalisation."""
    degenerate: bool
    """Whether the map is all zeros, because it has no positive evidence or is constant."""
    complete: bool
    """Whether every query of the method was answered, or as many as its tolerance needs."""
    fraction: float = 1.0
    """Share of the method's queries that the map is made of."""
    choice: str = ""
    """Reason for which a server chose this method; "" where the caller chose."""
    boxes: tuple[Box, ...] = ()
    lies_on: Callable[[], Image.Image] | None = field(default=None, repr=False, compare=False)
    """Returns the image that the map lies on; None for a map that lies on none."""
    target_text: str = ""
    """Text form of what the map explains, resolved: `finer` as the contrast that it became."""
    classes: tuple[Prediction, ...] = ()
    """The classes that the target names, or its number, the one explained first; empty for a vector."""
    score: float = 0.0
    """The target's score of the unmasked image, on the scale of masked queries: a probability, a difference of some, a
    number, or a cosine."""
    signed: bool = False
    """Whether the map is in [-1, 1], evidence against the target below 0."""
    faithfulness: Faithfulness | None = None
    """Deletion and insertion of this map; None where nobody asked for them."""
    estimated_difference: float | None = None
    """Largest difference of any pixel to the map of all queries, as it is estimated; 0 where all were answered. Several
    layers have the largest of their own maps. None without a tolerance, and while too few queries were answered."""

    @cached_property
    def image(self) -> Image.Image | None:
        """Image that the map lies on: the network's view, or the sent image for a map of that size.

        A photo's file is decoded when this is asked for first: most callers never look at it.
        """
        return None if self.lies_on is None else self.lies_on()

    @property
    def layer(self) -> str:
        """Name of the layer, or the names of several, joined by " + "."""
        return " + ".join(self.layers)

    def overlay(self, colormap: str = "jet", opacity: float = 0.5) -> Image.Image:
        """Returns the map in colours over the image, with a frame around the detection or box that it is of.

        Raises:
            InvalidOption: unknown colormap, opacity outside 0..1, or a map that lies on no image.
        """
        from camserve.finalise.render import drawn  # Pillow stays out of `import camserve`

        return drawn(self, colormap, opacity)

    def _repr_png_(self) -> bytes:
        """Returns what a notebook shows where it shows no HTML."""
        from camserve.notebook import map_png

        return map_png(self)

    def _repr_html_(self) -> str:
        """Returns what a notebook shows: the overlay with method, target and score."""
        from camserve.notebook import map_html

        return map_html(self)


@dataclass(frozen=True)
class Explanation:
    """Holds the answer to one request."""

    model: str
    version: str
    predictions: tuple[Prediction, ...]
    """The most probable classes, the most probable one first."""
    maps: tuple[SaliencyMap, ...]
    """One map for each target of each method, the methods in the order asked."""
    input: InputView
    cost: Cost
    request_id: str = ""
    """Id under which the server's log has the call; "" without a server."""
    evidence: str = ""
    """Evidence record, one line of JSON; "" where it was not asked for."""
    environments: tuple[str, ...] = field(default=(), repr=False)
    """Environments of the workers that answered, each as JSON, in order; empty on a client's side."""

    def plot(self, colormap: str = "jet", opacity: float = 0.5, cell_inches: float = 3.0) -> Any:
        """Draws the maps with matplotlib and returns the axes: see `camserve.notebook.plot`."""
        from camserve.notebook import plot

        return plot(self, colormap, opacity, cell_inches)

    def _repr_png_(self) -> bytes | None:
        """Returns what a notebook shows where it shows no HTML; None without maps."""
        from camserve.notebook import explanation_png

        return explanation_png(self)

    def _repr_html_(self) -> str:
        """Returns what a notebook shows: predictions, maps side by side, and what they took."""
        from camserve.notebook import explanation_html

        return explanation_html(self)


@dataclass(frozen=True)
class Progress:
    """Tells how far a request has come."""

    done: int
    """Number of masked queries answered."""
    total: int
    predictions: tuple[Prediction, ...]
    maps: tuple[SaliencyMap, ...] = ()
    """The maps as far as they are known; empty when none are due."""

    def _repr_html_(self) -> str:
        """Returns what a notebook shows: a bar, predictions and the maps so far."""
        from camserve.notebook import progress_html

        return progress_html(self)

"""Lists the kinds of networks of transformers that can be packed: what each is called there, and how it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from camserve.archive.untrusted import short
from camserve.errors import InvalidOption
from camserve.types import Outputs


@dataclass(frozen=True)
class Kind:
    """Describes a kind of networks."""

    task: str
    auto: str
    """Name of the class of transformers that makes such a network of a configuration."""
    mapping: str
    """Name of the mapping of transformers from model types to the classes of this kind."""
    example: str
    outputs: Outputs | None
    """Kind of its outputs; None: that the configuration tells."""
    whole: bool
    """Tells whether it is to see all of an image."""

    def classes(self, model_type: object) -> tuple[str, ...]:
        """Returns the names of the classes of a model type."""
        known: Any = self._mapping().get(model_type, ()) if isinstance(model_type, str) else ()
        return (known,) if isinstance(known, str) else tuple(known)

    def has(self, architecture: str) -> bool:
        """Tells whether a class is of this kind."""
        return any(architecture in self.classes(model_type) for model_type in self._mapping())

    def _mapping(self) -> Mapping[str, Any]:
        from transformers.models.auto import modeling_auto

        found: Mapping[str, Any] = getattr(modeling_auto, self.mapping)
        return found


CLASSIFIER = Kind(
    "image classification",
    "AutoModelForImageClassification",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "ViTForImageClassification",
    None,
    whole=False,
)
DETECTOR = Kind(
    "object detection",
    "AutoModelForObjectDetection",
    "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES",
    "DetrForObjectDetection",
    "boxes",
    whole=True,
)
SEGMENTATION = Kind(
    "semantic segmentation",
    "AutoModelForSemanticSegmentation",
    "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES",
    "SegformerForSemanticSegmentation",
    "segmentation",
    whole=True,
)
TOWERS = Kind(
    "images and texts",
    "AutoModelForZeroShotImageClassification",
    "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "CLIPModel",
    "text-image",
    whole=False,
)
KINDS = (CLASSIFIER, DETECTOR, SEGMENTATION, TOWERS)


def kind_of(path: Path, content: Mapping[str, Any]) -> Kind:
    """Returns the kind of network that a configuration describes.

    Raises:
        InvalidOption: it describes another one; the text says which there are.
    """
    model_type, classes = content.get("model_type"), content.get("architectures")
    if model_type == "timm_wrapper":
        raise InvalidOption(f"{short(path)} is a network of timm: pack it as timm:NAME, with this file's weights")
    name = classes[0] if isinstance(classes, list) and classes else None
    for kind in KINDS:
        if name in kind.classes(model_type):
            return kind
    allowed = ", ".join(f"{kind.task}, as {kind.example}" for kind in KINDS)
    raise InvalidOption(
        f"{short(path)} must describe a network for one of: {allowed}; got {short(repr(name or model_type))}"
    )

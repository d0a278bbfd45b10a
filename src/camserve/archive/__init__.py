"""Builds, lists and loads the model archives that TorchServe serves and the embedded engine loads.

Torch is imported only when a model is built or loaded.

An archive is a `.mar`, a zip file in TorchServe's layout:

    MAR-INF/MANIFEST.json   TorchServe's manifest
    saliency_handler.py     the handler
    model-config.yaml       TorchServe's settings for this model
    model.json              the `ModelCard` without its labels
    labels.json             class names, in the order of the network's outputs
    weights.safetensors     the state dict
    config.json             of a network of Hugging Face: what it is built of

The same inputs give the same bytes.
"""

from camserve.archive.card import ModelCard, read_card
from camserve.archive.package import build_archive, load_package
from camserve.archive.store import ListedModel, archives, ensure_archive, listed_models, model_store

__all__ = [
    "ListedModel",
    "ModelCard",
    "archives",
    "build_archive",
    "ensure_archive",
    "listed_models",
    "load_package",
    "model_store",
    "read_card",
]

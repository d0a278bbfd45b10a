"""Fixtures: the default model, its engines, two photos. No conftest.py: a second one would hide the suite's own."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from torch import nn

from camserve import Engine
from camserve.archive import ModelCard, build_archive, load_package
from camserve.images import network_view
from camserve.types import Preprocessing

SMALL_PX = 96


@pytest.fixture(scope="session")
def lite0(tmp_path_factory) -> tuple[nn.Module, ModelCard]:
    """EfficientNet-Lite0 with its ImageNet weights, float32, and its card."""
    store: Path = tmp_path_factory.mktemp("store")
    module, card = load_package(build_archive("efficientnet-lite0", name="lite0", store=store))
    return module.eval(), card


@pytest.fixture(scope="session")
def lite0_float64(lite0) -> nn.Module:
    """A copy in double precision."""
    return copy.deepcopy(lite0[0]).to(torch.float64)


@pytest.fixture(scope="session")
def engines(lite0, lite0_float64) -> dict[str, Engine]:
    """An engine for each precision. An engine looks at all layers of its network first, which takes seconds here."""
    return _engines(lite0, lite0_float64, lite0[1].preprocessing)


@pytest.fixture(scope="session")
def small_engines(lite0, lite0_float64) -> dict[str, Engine]:
    """The same for the small photographs."""
    return _engines(lite0, lite0_float64, _small(lite0[1].preprocessing))


def _engines(lite0, lite0_float64, preprocessing: Preprocessing) -> dict[str, Engine]:
    module, card = lite0
    options = {"preprocessing": preprocessing, "labels": card.labels, "layer": card.layer}
    return {"float32": Engine(module, **options), "float64": Engine(lite0_float64, **options)}


def _small(preprocessing: Preprocessing) -> Preprocessing:
    return replace(preprocessing, resize_px=SMALL_PX, crop_px=(SMALL_PX, SMALL_PX))


@pytest.fixture(scope="session", params=["chelsea", "coffee"])
def photo(request, lite0) -> np.ndarray:
    """A cat or a cup of coffee as the network sees it, uint8 (224, 224, 3)."""
    seen, _ = network_view(Image.fromarray(getattr(data, request.param)()), lite0[1].preprocessing)
    return np.asarray(seen)


@pytest.fixture(scope="session")
def small_photo(photo, lite0) -> tuple[np.ndarray, Preprocessing]:
    """The photograph at 96 x 96, uint8, and the preprocessing that takes it as it is.

    A pass in float64 takes a fifth of the time, and goes through the same layers with the same weights.
    """
    preprocessing = _small(lite0[1].preprocessing)
    seen, _ = network_view(Image.fromarray(photo), preprocessing)
    return np.asarray(seen), preprocessing

"""Fixtures: the default model and two photographs. No conftest.py: a second one would hide the suite's own."""

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
    preprocessing = replace(lite0[1].preprocessing, resize_px=SMALL_PX, crop_px=(SMALL_PX, SMALL_PX))
    seen, _ = network_view(Image.fromarray(photo), preprocessing)
    return np.asarray(seen), preprocessing

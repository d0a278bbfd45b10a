"""The metrics against their twins. float64 on both sides unless said: what remains is the order of summation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import twins_evaluation as twin
from asked import asked
from models import HEIGHT, WIDTH, build, picture
from torch import Tensor

from camserve.evaluation import confidence, localisation, sanity
from camserve.evaluation.curves import PROTOCOLS, faithfulness
from camserve.evaluation.truth import TrueBox

TIGHT = 1e-12


@pytest.fixture(scope="module")
def module():
    return build("perceptron", dtype=torch.float64)


@pytest.fixture(scope="module")
def image() -> Tensor:
    return torch.from_numpy(picture(1) / 128 - 1).permute(2, 0, 1).contiguous()


def saliency(seed: int, ties: bool = False) -> np.ndarray:
    """A smooth map in 0..1; with ties, one of five values and half zeros, as maps after ReLU are."""
    coarse = np.random.default_rng(seed).uniform(0, 1, (5, 6))
    smooth = np.kron(coarse, np.ones((8, 8))) + np.random.default_rng(seed + 1).uniform(0, 0.3, (HEIGHT, WIDTH))
    smooth /= smooth.max()
    return np.where(smooth > 0.5, np.round(smooth * 5) / 5, 0) if ties else smooth


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("name", PROTOCOLS)
def test_deletion_and_insertion(module, image, name, ties):
    protocol = PROTOCOLS[name]
    step_px = -(-HEIGHT * WIDTH // protocol.steps)
    maps = [saliency(seed, ties) for seed in range(2)]
    stacked = torch.from_numpy(np.stack(maps))
    found = faithfulness(module, image, stacked, asked([2, 5]), [protocol], micro_batch=7)
    blurred = {"rise": twin.rise_blur}.get(name, twin.group_cam_blur)(image)
    for one, index, ((result,)) in zip(maps, (2, 5), found, strict=True):
        deleted = twin.curve(module, image, torch.zeros_like(image), one, index, step_px)
        inserted = twin.curve(module, blurred, image, one, index, step_px)
        np.testing.assert_allclose(result.deletion, deleted, rtol=0, atol=TIGHT)
        np.testing.assert_allclose(result.insertion, inserted, rtol=0, atol=TIGHT)
        assert result.deletion_auc == pytest.approx(twin.area(deleted), abs=TIGHT)
        assert result.overall == pytest.approx(twin.area(inserted) - twin.area(deleted), abs=TIGHT)


def test_confidence(module, image):
    maps = np.stack([saliency(seed) for seed in range(3)])
    classes = [1, 4, 4]
    found = confidence.confidence(module, image, torch.from_numpy(maps), asked(classes), micro_batch=2)
    for one, index, result in zip(maps, classes, found, strict=True):
        whole = twin.probability(module, image, index)
        kept = twin.probability(module, image * torch.from_numpy(one), index)
        assert result.drop == pytest.approx(max(0, whole - kept) / whole, abs=TIGHT)
        assert result.increased == (kept > whole)


BOXES = [[(3, 5, 20, 30)], [(3, 5, 20, 30), (30, 10, 48, 40)], [(0, 0, WIDTH, 4)]]


@pytest.mark.parametrize("boxes", BOXES)
@pytest.mark.parametrize("seed", range(4))
def test_localisation(seed, boxes):
    one = saliency(seed)
    true = [TrueBox("x", *box) for box in boxes]
    found = localisation.localise(one, true)
    assert found.pointing == twin.pointing(one, boxes)
    assert found.pointing_15px == twin.pointing(one, boxes, 15)
    assert found.energy == pytest.approx(twin.energy(one, boxes), abs=TIGHT)
    assert found.bbox == pytest.approx(twin.size_adaptive_share(one, boxes), abs=TIGHT)
    assert found.iou == pytest.approx(twin.box_iou(one, boxes), abs=TIGHT)


@pytest.mark.parametrize("ties", [False, True])
def test_rank_correlation(ties):
    a, b = (saliency(seed, ties)[::3, ::3] for seed in (0, 3))
    assert sanity.rank_correlation(a, b) == pytest.approx(twin.spearman(a, b), abs=TIGHT)

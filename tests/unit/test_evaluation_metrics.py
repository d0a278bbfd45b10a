"""The metrics at their edges: published constants, ties, maps of zeros, tolerance, rows and columns, batching."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from asked import asked
from tiny import TINY_LABELS, TINY_SIZE, pixels, tiny_module

from camserve import Engine
from camserve.errors import Unsupported
from camserve.evaluation import confidence, localisation, sanity
from camserve.evaluation.confidence import Confidence
from camserve.evaluation.curves import faithfulness
from camserve.evaluation.truth import TrueBox
from camserve.methods import GradCam, ScoreCam
from camserve.saliency import curves
from camserve.types import MapCurves, Preprocessing, Target, auc

PREPROCESSING = Preprocessing(resize_px=64, crop_px=TINY_SIZE, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


@pytest.fixture
def engine() -> Engine:
    return Engine(tiny_module(), preprocessing=PREPROCESSING, labels=TINY_LABELS, micro_batch=4)


def curve(saliency: torch.Tensor, name: str) -> curves.Curve:
    image = torch.ones(3, *saliency.shape)
    return curves.deletion_and_insertion(image, saliency, asked([0]), curves.PROTOCOLS[name])[0]


@pytest.mark.parametrize(
    ("name", "step_px", "points"), [("rise", 1792, 29), ("group_cam", 448, 113), ("group_cam_paper", 1792, 29)]
)
def test_steps_of_the_published_protocols(name, step_px, points):
    made = curve(torch.rand(224, 224, generator=torch.Generator().manual_seed(0)), name)
    assert (made.step_px, len(made)) == (step_px, points)
    queries = made.blend(0, points)
    gone = (queries == 0).all(dim=1).flatten(1).sum(dim=1)
    assert gone.tolist() == [step_px * point for point in range(points)]


def test_the_rise_kernel_is_folded_and_not_a_truncated_gaussian():
    kernel = curves.gaussian_kernel()
    assert kernel.shape == (11, 11)
    assert (kernel.min().item(), kernel.max().item()) == pytest.approx((0.00774, 0.00883), abs=5e-6)
    assert kernel.sum().item() == pytest.approx(1)


def test_the_rise_blur_has_zeros_beyond_the_border():
    blurred = curves.rise_blur(torch.ones(3, 30, 20, dtype=torch.float64))
    assert blurred[:, 10:20, 8:12].sub(1).abs().max() < 1e-12
    assert (blurred[:, 0, 0] < 0.4).all()


def test_equal_pixels_go_in_reading_order():
    rank = curves.saliency_rank(torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 2.0]]))
    assert rank.tolist() == [[3, 1, 4], [2, 5, 0]]


def test_the_last_step_may_be_shorter():
    made = curve(torch.arange(10.0).reshape(2, 5), "rise")
    assert len(made) == 11  # fewer pixels than steps: one in each
    protocol = curves.Protocol("three", 3, curves.rise_blur)
    both = curves.deletion_and_insertion(torch.ones(3, 2, 5), torch.arange(10.0).reshape(2, 5), asked([0]), protocol)
    made = both[0]
    assert (made.step_px, len(made)) == (4, 4)
    assert made.blend(0, 4)[:, 0].flatten(1).sum(dim=1).tolist() == [10, 6, 2, 0]


@pytest.mark.parametrize("numbers", [list(range(8)), [6, 1, 3, 4, 0]])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_points_are_pixels_of_the_image_and_of_nothing_else_however_passes_are_cut(numbers, size):
    generator = torch.Generator().manual_seed(0)
    image, saliency = (torch.randn(*shape, 12, 16, generator=generator) for shape in ((3,), ()))
    spec = MapCurves(saliency.numpy(), Target(index=0), steps=3)
    features = SimpleNamespace(input=image, targets=asked([0]), logits=torch.zeros(6))
    made = curves.masks(features, spec, torch.tensor(numbers))
    images = torch.cat([made.blend(start, min(len(made), start + size)) for start in range(0, len(made), size)])
    order, blurred, step_px = saliency.flatten().argsort(descending=True), curves.rise_blur(image), 64
    for number, came in zip(numbers, images, strict=True):
        before, after = (image, torch.zeros_like(image)) if number < 4 else (blurred, image)
        expected, changed = before.clone().flatten(1), order[: number % 4 * step_px]
        expected[:, changed] = after.flatten(1)[:, changed]
        assert torch.equal(came, expected.view_as(image))


def test_a_curve_does_not_depend_on_the_micro_batch():
    module, generator = tiny_module(), torch.Generator().manual_seed(1)
    image, saliency = torch.randn(3, *TINY_SIZE, generator=generator), torch.rand(2, *TINY_SIZE, generator=generator)
    protocols = list(curves.PROTOCOLS.values())
    found = [faithfulness(module, image, saliency, asked([1, 2]), protocols, size) for size in (1, 3, 64)]
    assert [result.protocol for result in found[0][1]] == list(curves.PROTOCOLS)
    for other in found[1:]:
        for ours, theirs in zip(sum(found[0], ()), sum(other, ()), strict=True):
            np.testing.assert_allclose(ours.deletion, theirs.deletion, rtol=0, atol=1e-6)  # float32
            np.testing.assert_allclose(ours.insertion, theirs.insertion, rtol=0, atol=1e-6)


def test_group_cams_blur_needs_room():
    with pytest.raises(Unsupported, match="at least 26 px"):
        curves.group_cam_blur(torch.zeros(3, 25, 40))


def test_area_of_a_straight_line_is_a_half():
    assert auc(np.linspace(1, 0, 29)) == pytest.approx(0.5)
    assert auc(np.array([0.2, 1.0])) == pytest.approx(0.6)


def test_drop_and_increase():
    assert confidence.Confidence(0.8, 0.2).drop == pytest.approx(0.75)
    assert not confidence.Confidence(0.8, 0.8).increased
    better = confidence.Confidence(0.2, 0.8)
    assert (better.drop, better.increased) == (0, True)
    assert confidence.Confidence(0.0, 0.0).drop == 0  # a probability may underflow


def point(row: int, column: int, size=(40, 60)) -> np.ndarray:
    saliency = np.zeros(size, np.float32)
    saliency[row, column] = 1
    return saliency


BOX = TrueBox("x", left=20, top=5, right=30, bottom=15)


@pytest.mark.parametrize(
    ("row", "column", "hit", "hit_15"),
    [
        (5, 20, True, True),
        (14, 29, True, True),
        (15, 29, False, True),
        (14, 30, False, True),
        (10, 29 + 15, False, True),
        (10, 29 + 16, False, False),
        (14 + 15, 25, False, True),
        (14 + 11, 29 + 11, False, False),  # 15.6 px from the corner
        (25, 10, False, True),  # rows are y: (x, y) = (10, 25), 14.1 px from the corner
    ],
)
def test_pointing_game(row, column, hit, hit_15):
    found = localisation.localise(point(row, column), [BOX])
    assert (found.pointing, found.pointing_15px) == (hit, hit_15)


def test_rows_are_y():
    saliency = np.zeros((40, 60), np.float32)
    saliency[5:15, 20:30] = 1
    found = localisation.localise(saliency, [BOX])
    assert (found.energy, found.iou, found.bbox) == (1, 1, 1)
    turned = localisation.localise(saliency, [TrueBox("x", left=5, top=20, right=15, bottom=30)])
    assert (turned.pointing, turned.energy, turned.iou, turned.bbox) == (False, 0, 0, 0)


def test_a_pixel_belongs_to_a_box_if_its_centre_does():
    region = localisation.inside([TrueBox("x", 0.4, 0.6, 2.5, 2.6)], (4, 4))
    assert region.nonzero()[0].tolist() == [1, 1, 2, 2]
    assert region.nonzero()[1].tolist() == [0, 1, 0, 1]


def test_a_map_of_zeros_finds_nothing():
    found = localisation.localise(np.zeros((40, 60), np.float32), [TrueBox("x", 0, 0, 60, 40)])
    assert found == localisation.Localisation(False, False, 0.0, 0.0, 0.0)


def test_equal_pixels_count_by_their_share():
    """Of 100 pixels of box 60 are salient; the other 40 come from 2340 equal ones, of which 40 are inside."""
    saliency = np.zeros((40, 60), np.float32)
    saliency[5:11, 20:30] = 1
    region = localisation.inside([BOX], (40, 60))
    assert localisation.size_adaptive_share(saliency, region) == pytest.approx((60 + 40 * 40 / 2340) / 100)


def test_a_class_with_two_boxes():
    second = TrueBox("x", left=40, top=20, right=60, bottom=40)
    saliency = np.zeros((40, 60), np.float32)
    saliency[20:40, 40:60] = 1
    saliency[5:15, 20:30] = 0.5
    found = localisation.localise(saliency, [BOX, second])
    assert (found.pointing, found.energy, found.iou) == (True, 1, 1)


def test_class_contrast_uses_the_boxes_of_the_most_likely_class():
    most, least = np.zeros((40, 60), np.float32), np.zeros((40, 60), np.float32)
    most[5:15, 20:30] = least[20:, 40:] = 1
    contrast = localisation.class_contrast(most, least, [BOX])
    assert (contrast.most_likely.energy, contrast.least_likely.energy) == (1, 0)


def test_rank_correlation_of_constant_maps_is_zero():
    ramp = np.arange(12.0).reshape(3, 4)
    assert sanity.rank_correlation(ramp, np.ones((3, 4))) == 0
    assert sanity.rank_correlation(ramp, ramp**3) == pytest.approx(1)
    assert sanity.rank_correlation(ramp, -ramp) == pytest.approx(-1)


def test_randomisation_goes_from_the_logits_down():
    module, before = tiny_module(), tiny_module().state_dict()
    changed = []
    for name in sanity.randomise(module, stages=4):
        now = module.state_dict()
        changed.append({key.split(".")[0] for key in now if not torch.equal(now[key], before[key])})
        assert name in changed[-1]
    assert changed == [{"9"}, {"9", "7"}, {"9", "7", "3"}, {"9", "7", "3", "0", "1"} - _unchanged_norms(before)]


def _unchanged_norms(state: dict[str, torch.Tensor]) -> set[str]:
    """The norm of the tiny network is as it was made: a reset does not change it."""
    fresh = (state["1.weight"] == 1).all() and (state["1.bias"] == 0).all()
    return {"1"} if fresh else set()


def test_randomisation_in_fewer_stages_does_the_same_in_the_end():
    assert list(sanity.randomise(tiny_module(), stages=2)) == ["7", "0"]
    assert list(sanity.randomise(tiny_module(), stages=99)) == ["9", "7", "3", "0"]


def test_random_weights_are_seeded_and_leave_the_generator_alone():
    state = torch.get_rng_state()
    modules = [tiny_module() for _ in range(3)]
    torch.set_rng_state(state)
    for module, seed in zip(modules, (0, 0, 1), strict=True):
        assert len(list(sanity.randomise(module, stages=2, seed=seed))) == 2
    assert torch.equal(torch.get_rng_state(), state)
    first, second, third = (module.state_dict()["0.weight"] for module in modules)
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_parameters_without_a_reset_keep_mean_and_spread():
    class Tokens(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = torch.nn.Parameter(torch.randn(1, 50, 50) * 3 + 7)
            self.scale = torch.nn.Parameter(torch.tensor(2.0))

    module = Tokens()
    before = module.tokens.detach().clone()
    list(sanity.randomise(module))
    assert not torch.equal(module.tokens, before)
    assert module.tokens.mean().item() == pytest.approx(7, abs=0.5)
    assert module.tokens.std().item() == pytest.approx(3, abs=0.3)


def test_sanity_check_explains_a_copy(engine):
    before = copy.deepcopy(engine.network.module.state_dict())
    found = sanity.cascading_randomisation(engine, [pixels(0), pixels(1)], ["grad_cam", "score_cam"], stages=4)
    assert list(found) == [GradCam(), ScoreCam()]
    for stages_by_image in found.values():
        assert [[stage.down_to for stage in stages] for stages in stages_by_image] == [["9", "7", "3", "0"]] * 2
        assert all(-1 <= stage.correlation <= 1 for stages in stages_by_image for stage in stages)
    assert found[GradCam()][0][-1].correlation < 0.9
    assert all(torch.equal(value, before[key]) for key, value in engine.network.module.state_dict().items())


def test_drops_of_scores_that_may_be_negative():
    assert Confidence(-2.0, -3.0).drop == 0.5
    assert Confidence(-2.0, -1.0).drop == 0
    assert Confidence(0.0, -1.0).drop == 0
    assert [Confidence(-2.0, kept).increased for kept in (-1.0, -2.0, -3.0)] == [True, False, False]

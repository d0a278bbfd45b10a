"""Decisions that rounding could turn are made the same way whatever the last digits are: docs/decisions/0014."""

import numpy as np
import pytest
import torch
from asked import asked
from reference.models import CHANNELS, CLASSES, PREPROCESSING, Features, build, picture
from torch import Tensor, nn

from camserve import Engine
from camserve.evaluation.confidence import Confidence
from camserve.evaluation.localisation import points_into, size_adaptive_share
from camserve.finalise.boxes import find_boxes
from camserve.finalise.maps import normalise
from camserve.images import whole_view
from camserve.methods import GroupCam, XgradCam
from camserve.saliency.group_cam import above_percentile, reduce
from camserve.saliency.masks import live_maps, make_masks
from camserve.types import BoxOptions, Item, ItemResult, Target
from camserve.worker.executor import Executor
from camserve.worker.network import Network

SEEDS = pytest.mark.parametrize("seed", range(6))


def rounded(values: np.ndarray, seed: int, ulp: int = 4) -> np.ndarray:
    """The same in float32, as another order of additions would leave it."""
    noise = np.random.default_rng(seed).uniform(-ulp, ulp, values.shape) * np.finfo(np.float32).eps
    return (values * (1 + noise)).astype(np.float32)


def rounded_tensor(values: Tensor, seed: int) -> Tensor:
    return torch.from_numpy(rounded(values.numpy(), seed))


# Classes


def answer(head: nn.Linear, **options) -> ItemResult:
    module = build("pooled")
    module.head = head
    network = Network(module.eval(), preprocessing=PREPROCESSING)
    (outcome,) = Executor(network).execute([Item(picture(), tasks=(), **options)]).outcomes
    assert isinstance(outcome, ItemResult)
    return outcome


@pytest.mark.parametrize("classes", [7, 1000])
def test_of_equal_classes_the_first_is_predicted_and_explained(classes):
    head = nn.Linear(CHANNELS, classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    found = answer(head, targets=(Target(top_k=3),), top_predictions=5)
    assert [prediction.index for prediction in found.predictions] == [0, 1, 2, 3, 4]
    assert [explained.target.index for explained in found.targets] == [0, 1, 2]


def test_classes_whose_probabilities_are_0_alike_are_ranked_by_their_logits():
    head = nn.Linear(CHANNELS, 1000)
    nn.init.zeros_(head.weight)
    head.bias.data = torch.arange(1000.0) * 200
    found = answer(head, targets=(Target(top_k=4),), top_predictions=4)
    assert [prediction.index for prediction in found.predictions] == [999, 998, 997, 996]
    assert [explained.target.index for explained in found.targets] == [999, 998, 997, 996]


# Weights and masks


class Normalised(nn.Module):
    """Behind an instance norm the sum of each channel is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.features = Features()
        self.norm = nn.InstanceNorm2d(CHANNELS)
        self.head = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d((4, 3)), nn.Flatten(), nn.Linear(240, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.features(x)))


def test_xgrad_cam_divides_by_no_sum_of_which_rounding_alone_is_left():
    torch.manual_seed(0)
    module, maps = Normalised().eval(), []
    for dtype in (torch.float32, torch.float64):
        engine = Engine(module.to(dtype), preprocessing=PREPROCESSING, layer="norm")
        maps.append(engine.explain(picture(2), methods=[XgradCam()], targets=[3]).maps[0].array)
    assert maps[0].any()
    np.testing.assert_allclose(maps[0], maps[1], rtol=0, atol=1e-4)


@SEEDS
@pytest.mark.parametrize("value", [0.7, -3.0, 1e4])
def test_a_map_that_is_constant_but_for_rounding_is_no_mask(value, seed):
    values = torch.stack([torch.full((5, 6), value), torch.linspace(0, 1e-4, 30).view(5, 6) + 1])
    live, _, _ = live_maps(rounded_tensor(values, seed), (40, 48))
    assert live.tolist() == [1]


@SEEDS
def test_a_plateau_is_above_a_percentile_as_a_whole_or_not_at_all(seed):
    """70 % of 30 places end within the plateau of 20."""
    values = torch.cat([torch.linspace(0.0, 0.4, 6), torch.full((20,), 0.5), torch.linspace(0.6, 1.0, 4)])
    found = above_percentile(rounded_tensor(values.view(1, 5, 6), seed), 70)
    assert int((found > 0).sum()) == 4


@pytest.mark.parametrize("variant", ["paper", "reference"])
def test_group_cam_makes_no_map_of_scores_that_are_equal_but_for_rounding(variant):
    masks = make_masks(torch.rand(3, 40, 48), torch.rand(6, 5, 6), asked([3])).with_anchor()
    scores = rounded_tensor(torch.full((7, 1), 0.3), seed=1)
    assert len(scores.unique()) > 1
    assert not reduce(scores, masks, GroupCam(groups=6, variant=variant)).any()


# Maps


@SEEDS
def test_a_map_that_is_constant_but_for_rounding_is_degenerate(seed):
    found, degenerate = normalise(rounded(np.full((5, 6), 0.003), seed, ulp=20))
    assert degenerate
    assert not found.any()


class Homogeneous(nn.Sequential):
    """All places are alike to this network."""

    def __init__(self) -> None:
        convolution = {"kernel_size": 3, "padding": 1, "padding_mode": "circular"}
        super().__init__(
            *(nn.Conv2d(3, 8, **convolution), nn.ReLU(), nn.Conv2d(8, CHANNELS, **convolution), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, CLASSES)),
        )


@pytest.mark.parametrize("value", [0, 255])
@pytest.mark.parametrize("seed", [5, 6, 7])
def test_fifty_steps_over_a_constant_image_add_up_to_no_map(seed, value):
    torch.manual_seed(seed)
    module = Homogeneous()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    engine = Engine(module.eval(), preprocessing=PREPROCESSING)
    blank = np.full((40, 48, 3), value, np.uint8)
    maps = engine.explain(blank, methods=["integrated_gradients"], targets=[1, 3]).maps
    assert all(one.degenerate for one in maps)


@SEEDS
def test_boxes_of_equal_maxima_are_all_found_and_in_reading_order(seed):
    array = np.zeros((8, 10))
    array[1:3, 6:9] = array[5:7, 1:4] = 1.0
    options = BoxOptions(threshold=1.0, all_components=True)
    boxes = find_boxes(rounded(array, seed), whole_view((8, 10)), options)
    assert [(box.left, box.top, box.right, box.bottom) for box in boxes] == [(6, 1, 9, 3), (1, 5, 4, 7)]


# Metrics


@SEEDS
def test_of_equal_maxima_the_first_points(seed):
    saliency, region = np.zeros((6, 6)), np.zeros((6, 6), bool)
    saliency[1:5, 1:5], region[1, 1] = 1.0, True
    assert points_into(rounded(saliency, seed), region)


@SEEDS
def test_equally_salient_pixels_count_by_their_share_whatever_their_last_digits(seed):
    saliency, region = np.zeros((6, 6)), np.zeros((6, 6), bool)
    saliency[1:5, 1:5], region[1:3, 1:3] = 1.0, True
    assert size_adaptive_share(rounded(saliency, seed), region) == pytest.approx(4 / 16)


@pytest.mark.parametrize(
    ("whole", "kept", "increased"), [(0.9999998, 1.0, False), (0.5, 0.5, False), (0.5, 0.51, True)]
)
def test_what_is_certain_but_for_rounding_does_not_increase(whole, kept, increased):
    assert Confidence(whole, kept).increased == increased

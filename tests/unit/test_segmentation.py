"""Networks that tell the class of every place: what is found, explained and refused, alone and beside others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from camserve import Engine
from camserve.errors import InvalidOption, Unsupported
from camserve.images import mask_file, read_mask, seen
from camserve.methods import Cam, GradCam, Rise, ScoreCam
from camserve.scores import make_score
from camserve.types import Against, Contrast, Finer, Item, Preprocessing, Region, Target, Task, Value
from camserve.worker.executor import Executor
from camserve.worker.network import Network

PREPROCESSING = Preprocessing(40, (32, 48), (0.5,) * 3, (0.25,) * 3)
METHODS = ("grad_cam", "score_cam", "ablation_cam", ("rise", {"masks": 30}))
CLASSES, PLACES = 5, (16, 24)


class Net(nn.Module):
    """Five classes at half of the size, in a dict as torchvision's networks return them."""

    def __init__(self, seed: int = 3) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.features = nn.Sequential(nn.Conv2d(3, 12, 5, 2, 2), nn.ReLU(), nn.Conv2d(12, 16, 3, 1, 1), nn.ReLU())
        self.head = nn.Conv2d(16, CLASSES, 1)
        with torch.no_grad():  # all but the last class are somewhere
            pixels = torch.from_numpy(seen(picture(), PREPROCESSING)[0]).permute(2, 0, 1)[None]
            logits = self.head(self.features((pixels / 255 - 0.5) / 0.25))
            self.head.bias -= logits.mean(dim=(0, 2, 3)) + torch.tensor([0, 0, 0, 0, 9])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.features(x)
        return {"out": 4 * self.head(features), "aux": self.head(-features)}


def picture(seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (10, 15, 3), dtype=np.uint8)
    return np.kron(coarse, np.ones((6, 6, 1), np.uint8))


def engine(**options) -> Engine:
    return Engine(Net().eval(), preprocessing=PREPROCESSING, outputs="segmentation", **options)


def outputs(image: np.ndarray) -> Tensor:
    """Logits (5, 16, 24), of the network itself."""
    network = engine().network
    pixels = torch.from_numpy(seen(image, PREPROCESSING)[0])[None]
    with torch.no_grad():
        return Net().eval()(network.normalise(pixels))["out"][0]


def test_predictions_are_the_shares_of_places_by_class():
    winners = outputs(picture()).argmax(dim=0).flatten().tolist()
    found = engine().explain(picture(), []).predictions
    assert {one.index: one.share for one in found} == pytest.approx(
        {index: winners.count(index) / len(winners) for index in range(CLASSES)}
    )
    assert [one.share for one in found] == sorted((one.share for one in found), reverse=True)
    assert len(set(winners)) >= 3, "the picture is of several classes"
    assert found[0].figure == f"{found[0].share:.1%} of the image"


def test_the_output_of_maps_is_found_and_another_may_be_named():
    network = engine().network
    assert (network.output, network.other_outputs) == ("out", ("aux",))
    assert network.info.default_layer == "features.3", "the layer before the convolution that makes the classes"
    other = Engine(Net().eval(), preprocessing=PREPROCESSING, outputs="segmentation", output="aux")
    assert other.explain(picture(), []).predictions != engine().explain(picture(), []).predictions


def test_a_class_is_explained_over_its_own_places():
    owned = outputs(picture()).argmax(dim=0).numpy()
    for index in np.unique(owned).tolist():
        grid = Region(Target(index=index), grid=owned == index)
        alone, named = (engine().explain(picture(), METHODS, [target], evaluate=True) for target in (index, grid))
        for one, other in zip(alone.maps, named.maps, strict=True):
            np.testing.assert_array_equal(one.array, other.array)
            assert (one.score, one.target_text) == (other.score, f"class {index}")
            np.testing.assert_array_equal(one.faithfulness.deletion, other.faithfulness.deletion)


def test_the_score_and_its_curves_are_means_of_probabilities_over_the_region():
    logits = outputs(picture())
    mask = np.zeros(PLACES, np.uint8)
    mask[3:9, 4:20], mask[9, 4:20] = 200, 50
    counted = torch.from_numpy(mask / mask.sum())
    expected = float((logits.softmax(dim=0)[1] * counted).sum())
    (found,) = engine().explain(picture(), "grad_cam", Region(Target(index=1), grid=mask), evaluate=True).maps
    assert found.score == pytest.approx(expected, abs=1e-6)  # float32
    assert found.faithfulness.deletion[0] == pytest.approx(expected, abs=1e-6)


def test_a_class_that_has_no_place_is_refused_with_those_that_have_some():
    with pytest.raises(
        InvalidOption, match=r"no place of this image is of class 4, .* region:x0,y0,x1,y1:4; .* of \d \(\d"
    ):
        engine().explain(picture(), targets=4)
    (found,) = engine().explain(picture(), targets="region:10,10,50,40:4").maps
    assert found.score < 0.01


def test_the_largest_classes_are_as_many_as_have_a_place():
    said = engine().explain(picture(), "grad_cam", "top5")
    having = [one.index for one in said.predictions if one.share]
    assert [one.target.index for one in said.maps] == having
    assert len(having) == CLASSES - 1


def test_without_a_class_a_region_is_of_what_most_of_it_is():
    owned = outputs(picture()).argmax(dim=0).numpy()
    rows, columns = np.nonzero(owned == np.bincount(owned.ravel()).argsort()[1])
    mask = np.zeros(PLACES, bool)
    mask[rows, columns] = True
    mask[(rows[0] + 1) % PLACES[0], columns[0]] = True
    (found,) = engine().explain(picture(), "grad_cam", Region(grid=mask)).maps
    assert found.target.index == owned[rows[0], columns[0]]
    assert len(engine().explain(picture(), "grad_cam", Region(Target(top_k=3), grid=mask)).maps) == 3


def test_finer_holds_a_class_against_those_whose_means_are_nearest():
    logits = outputs(picture()).double().flatten(1)
    mask = np.zeros(PLACES, bool)
    mask[2:7, 3:9] = True
    means = logits[:, torch.from_numpy(mask.ravel())].mean(dim=1)
    nearest = sorted(sorted(range(CLASSES), key=lambda c: abs(means[c] - means[2]))[1:4])
    (found,) = engine().explain(picture(), "grad_cam", Region(Target(index=2), grid=mask)).maps
    (finer,) = engine().explain(picture(), "grad_cam", [Region(Finer(Target(index=2)), grid=mask)]).maps
    assert [one.index for one in finer.classes] == [2, *nearest]
    assert finer.score != found.score


def test_a_single_map_is_the_logit_of_yes_or_no():
    class One(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)["out"][:, 1:2] + 0.5

    single = Engine(One().eval(), preprocessing=PREPROCESSING, outputs="segmentation")
    assert single.info.labels == ("no", "yes")
    z = outputs(picture())[1] + 0.5
    shares = {one.label: one.share for one in single.explain(picture(), []).predictions}
    assert shares == pytest.approx({"yes": float((z > 0).float().mean()), "no": float((z <= 0).float().mean())})
    yes, no = single.explain(picture(), "grad_cam", ["yes", "no"]).maps
    assert yes.score == pytest.approx(float(z[z > 0].sigmoid().mean()), abs=1e-6)
    assert no.score == pytest.approx(float((-z[z <= 0]).sigmoid().mean()), abs=1e-6)


def test_what_is_no_logit_of_places_is_refused():
    class Softmaxed(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)["out"].softmax(dim=1)

    with pytest.raises(InvalidOption, match="sum to 1 at each place: have it return what its softmax is taken of"):
        Engine(Softmaxed().eval(), preprocessing=PREPROCESSING, outputs="segmentation")
    with pytest.raises(Unsupported, match=r"\(images, numbers\).*; where these are .* say --outputs segmentation"):
        Engine(Net().eval(), preprocessing=PREPROCESSING)
    with pytest.raises(Unsupported, match=r"\(images, classes, height, width\)"):
        Engine(nn.Sequential(Net().features, nn.Flatten()).eval(), preprocessing=PREPROCESSING, outputs="segmentation")


def test_a_classifier_of_one_place_is_a_classifier_unless_it_is_said_to_be_none():
    class Pooled(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)["out"].mean(dim=(2, 3), keepdim=True)

    assert Engine(Pooled().eval(), preprocessing=PREPROCESSING).info.outputs == "softmax"
    places = Engine(Pooled().eval(), preprocessing=PREPROCESSING, outputs="segmentation")
    assert places.network.score.shape == (CLASSES, 1, 1)


class Decoded(nn.Module):
    """Maps that one linear layer makes of the means of 16 channels, so that gradients have a closed form."""

    def __init__(self) -> None:
        super().__init__()
        net = Net()
        self.features, self.linear = net.features, nn.Linear(16, CLASSES * 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.features(x).mean(dim=(2, 3))).reshape(-1, CLASSES, 2, 3)


TARGETS = [
    Region(Target(index=1), grid=np.array([[9, 0, 100], [40, 255, 3]], np.uint8)),
    Region(Contrast(Target(index=0), (Target(index=2), Target(index=3)), 0.6), grid=np.eye(2, 3, dtype=bool)),
    Region(Against(Target(index=3)), grid=np.ones((2, 3), bool)),
]


def test_gradients_in_closed_form_are_those_of_autograd():
    torch.manual_seed(0)
    module = Decoded().double().eval()
    network = Network(module, preprocessing=PREPROCESSING, outputs="segmentation")
    view = Executor(network).answer(Item(picture(), tuple(TARGETS), (Task(0, GradCam(), 0, 0),)))[1].view
    score = network.score
    x = network.normalise(torch.from_numpy(seen(picture(), PREPROCESSING)[0])[None])
    captured = network.capture(x, "features.3")
    targets = score.targets([score.placed(target, view) for target in TARGETS])
    closed = captured.gradients(targets)
    graph = captured.graph()
    for column, target in enumerate(targets.columns()):
        (expected,) = torch.autograd.grad(target.value(graph.output).sum(), graph.leaves, retain_graph=True)
        torch.testing.assert_close(closed[:, column], expected, rtol=1e-9, atol=1e-12)
    assert closed.stride()[-2:] == (0, 0), "it was the closed form"
    stacked = type(targets).stacked([score.targets(targets.each[:1]), targets])
    two = network.capture(x.expand(2, -1, -1, -1), "features.3").gradients(stacked)
    torch.testing.assert_close(two[1], closed[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(two[0, 0], closed[0, 0], rtol=1e-9, atol=1e-12)
    (cam,) = (
        Engine(module, preprocessing=PREPROCESSING, outputs="segmentation").explain(picture(), Cam(), TARGETS[0]).maps
    )
    grad = Engine(module, preprocessing=PREPROCESSING, outputs="segmentation").explain(picture(), GradCam(), TARGETS[0])
    np.testing.assert_allclose(cam.array, grad.maps[0].array, atol=1e-6)


def test_a_map_does_not_depend_on_micro_batch_shards_or_order():
    targets = (Region(Target(index=1)), Region(Target(index=0), box=(20, 10, 60, 50)))
    whole = Executor(Network(Net().double().eval(), preprocessing=PREPROCESSING, outputs="segmentation", micro_batch=7))
    for spec, total in ((Rise(masks=24, grid=4), 24), (ScoreCam(), 16)):
        _, once = whole.answer(Item(picture(), targets, (Task(0, spec, 0, total),)))
        pinned = tuple(one.target for one in once.targets)
        parts = []
        for start, stop, size in ((9, total, 3), (0, 5, 1), (5, 9, 64)):
            module = Net().double().eval()
            other = Executor(Network(module, preprocessing=PREPROCESSING, outputs="segmentation", micro_batch=size))
            parts.append(other.answer(Item(picture(), pinned, (Task(0, spec, start, stop),)))[1].partials[0])
        merged = parts[0].merge(parts[1]).merge(parts[2])
        expected = once.partials[0].sums
        np.testing.assert_allclose(merged.sums, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


def test_the_places_of_a_class_are_pinned():
    executor = Executor(Network(Net().eval(), preprocessing=PREPROCESSING, outputs="segmentation"))
    _, found = executor.answer(Item(picture(), (Region(Target(index=1)),), (Task(0, GradCam(), 0, 0),)))
    (pinned,) = (one.target for one in found.targets)
    owned = outputs(picture()).argmax(dim=0).numpy()
    np.testing.assert_array_equal(read_mask(pinned.grid) > 0, owned == 1)
    _, again = executor.answer(Item(picture(5), (pinned,), (Task(0, GradCam(), 0, 0),)))
    assert again.targets[0].target == pinned, "of another picture, too"


class BrokenOnBlack(Net):
    """Answers NaN at one place of a picture whose corner is black."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = super().forward(x)["out"].clone()
        black = x[:, :, :2, :2].amax(dim=(1, 2, 3)) < -1.9
        found[:, 0, 5, 5] = torch.where(black, torch.nan, found[:, 0, 5, 5])
        return {"out": found}


def test_neighbours_in_a_step_are_unharmed():
    network = Network(BrokenOnBlack().eval(), preprocessing=PREPROCESSING, outputs="segmentation")
    black = picture()
    black[:16, :16] = 0
    box = Region(Target(index=1), box=(20, 10, 60, 50))
    mask = mask_file(np.ones((60, 90), bool))
    tasks = (Task(0, GradCam(), 0, 0), Task(1, Rise(masks=8), 0, 8))
    bad = {
        "outside": (
            picture(),
            Region(Target(index=1), box=(-9, -9, -1, -1)),
            InvalidOption,
            "lies in what the network",
        ),
        "no place": (picture(), Target(index=4), InvalidOption, "no place of this image"),
        "another size": (picture()[:50], Region(Target(index=1), mask=mask), InvalidOption, "size of the sent image"),
        "outputs": (black, box, Unsupported, "outputs are not finite"),
    }
    good = Item(picture(1), (box, Target(top_k=2)), tasks)
    alone = Executor(network).execute([good]).outcomes[0]
    items = [Item(image, (target,), tasks) for image, target, _, _ in bad.values()]
    *errors, found = Executor(network).execute([*items, good]).outcomes
    for error, (_, _, kind, message) in zip(errors, bad.values(), strict=True):
        assert isinstance(error, kind)
        assert message in str(error)
    assert [one.target for one in found.targets] == [one.target for one in alone.targets]
    for one, other in zip(found.partials, alone.partials, strict=True):
        np.testing.assert_allclose(one.sums, other.sums, rtol=1e-4, atol=1e-5)  # float32, in passes of other sizes


def test_images_of_a_step_have_regions_of_their_own():
    executor = Executor(Network(Net().eval(), preprocessing=PREPROCESSING, outputs="segmentation", micro_batch=8))
    tasks = (Task(0, GradCam(), 0, 0), Task(1, ScoreCam(), 0, 16))
    targets = [
        (Region(Target(index=1), box=(20, 10, 60, 50)),),
        (Target(top_k=3), Region(Contrast(Target(index=0), (Target(index=2),)), box=(10, 10, 30, 50))),
    ]
    items = [Item(picture(seed), some, tasks) for seed, some in enumerate(targets)]
    together = executor.execute(items).outcomes
    for item, found in zip(items, together, strict=True):
        alone = executor.execute([item]).outcomes[0]
        assert [one.score for one in found.targets] == pytest.approx([one.score for one in alone.targets], abs=1e-6)
        for one, other in zip(found.partials, alone.partials, strict=True):
            np.testing.assert_allclose(one.sums, other.sums, rtol=1e-4, atol=1e-5)


def test_a_region_without_shares_is_not_asked():
    score = make_score("segmentation", shape=(CLASSES, *PLACES))
    with pytest.raises(Unsupported, match="a class over a region"):
        score.targets([Region(Target(index=1))])
    with pytest.raises(Unsupported, match="have no value"):
        score.resolved(Value(Target(index=0)), torch.zeros(CLASSES * PLACES[0] * PLACES[1]))

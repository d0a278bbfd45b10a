"""Variants for fine-tuning against a slow twin in float64, and what becomes of a folder of images."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from asked import asked
from PIL import Image
from tiny import TINY_LABELS, TINY_SIZE, pixels, png, tiny_module
from torch.nn import functional as F

from camserve import Engine
from camserve.errors import InvalidInput, InvalidOption, NotFound, Unsupported
from camserve.evaluation import variants
from camserve.evaluation.augment import Recipe, binary_masks, blurred, variant, wanted_target
from camserve.evaluation.digits.scenes import benchmark_scenes
from camserve.evaluation.digits.shipped import load_engine
from camserve.evaluation.variants import JOURNAL, VariantPlan, augment, check
from camserve.scores import Targets, make_score
from camserve.types import Preprocessing, Target

LAYER = 3
"""Of the tiny module: twelve channels before a ReLU, so that groups have negative sums."""
PREPROCESSING = Preprocessing(resize_px=64, crop_px=TINY_SIZE, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
RECIPES = [Recipe(4), Recipe(5, denoise=70), Recipe(12, theta=70), Recipe(1, denoise=30, theta=0)]


@pytest.fixture(scope="module")
def module():
    return tiny_module().double()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.from_numpy(np.stack([pixels(seed) for seed in range(3)])).double().permute(0, 3, 1, 2) / 128 - 1


@pytest.fixture(scope="module")
def blurry(images) -> list[torch.Tensor]:
    return [torch.from_numpy(twin_blur(image.numpy())) for image in images]


def twin_mask(module, image, blurry, index, recipe):
    """Straight from the definition, one group and one query at a time."""
    activations = module[: LAYER + 1](image[None])[0].numpy()
    size = math.ceil(len(activations) / recipe.groups)
    total = np.zeros(TINY_SIZE)
    for first in range(0, len(activations), size):
        group = np.maximum(activations[first : first + size].sum(axis=0), 0)
        if recipe.denoise:
            group = np.where(group > np.percentile(group, recipe.denoise), group, 0)
        mask = F.interpolate(torch.from_numpy(group)[None, None], TINY_SIZE, mode="bilinear", align_corners=False)[0]
        if mask.min() == mask.max():
            continue
        mask = (mask - mask.min()) / (mask.max() - mask.min())
        gain = twin_probability(module, image * mask + blurry * (1 - mask), index)
        total += (gain - twin_probability(module, blurry, index)) * mask[0].numpy()
    saliency = np.maximum(total, 0)
    if saliency.max() == saliency.min():
        return None
    saliency = (saliency - saliency.min()) / (saliency.max() - saliency.min())
    return saliency > (saliency.mean() if recipe.theta is None else np.percentile(saliency, recipe.theta))


def one_each(classes) -> list[Targets]:
    return [asked([index]) for index in classes]


def twin_probability(module, image, index) -> float:
    return float(module(image[None]).softmax(dim=1)[0, index])


def twin_blur(planes: np.ndarray) -> np.ndarray:
    """(3, H, W): 51 x 51 Gaussian of sigma 50, reflected at the border."""
    taps = np.exp(-0.5 * (np.arange(-25, 26) / 50) ** 2)
    kernel = np.outer(taps, taps) / taps.sum() ** 2
    padded = np.pad(planes, ((0, 0), (25, 25), (25, 25)), mode="reflect")
    result = np.empty_like(planes)
    for row in range(planes.shape[1]):
        for column in range(planes.shape[2]):
            result[:, row, column] = (padded[:, row : row + 51, column : column + 51] * kernel).sum(axis=(1, 2))
    return result


@pytest.mark.parametrize("recipe", RECIPES)
@torch.no_grad()
def test_masks_are_those_of_the_definition(module, images, blurry, recipe):
    found = binary_masks(module, images, module[: LAYER + 1](images), one_each([0, 3, 5]), recipe, micro_batch=7)
    for image, around, index, mask in zip(images, blurry, [0, 3, 5], found, strict=True):
        expected = twin_mask(module, image, around, index, recipe)
        assert (mask is None) == (expected is None)
        if expected is not None:  # maps end in float32: a pixel may change sides
            assert (mask != expected).sum() <= 2
    assert any(mask is not None and 0 < mask.mean() < 1 for mask in found)


@torch.no_grad()
def test_neighbours_and_micro_batches_do_not_matter(module, images):
    activations, targets = module[: LAYER + 1](images), one_each([0, 3, 5])
    together = binary_masks(module, images, activations, targets, RECIPES[0], micro_batch=64)
    for place, mask in enumerate(together):
        part = slice(place, place + 1)
        (alone,) = binary_masks(module, images[part], activations[part], targets[part], RECIPES[0], micro_batch=1)
        np.testing.assert_array_equal(alone, mask)


def test_a_variant_is_sharp_inside_the_mask_and_blurred_outside():
    picture, mask = pixels(0), np.zeros(TINY_SIZE, bool)
    mask[10:20, 5:40] = True
    made = variant(picture, mask)
    np.testing.assert_array_equal(made[mask], picture[mask])
    around = twin_blur(picture.astype(np.float64).transpose(2, 0, 1)).transpose(1, 2, 0)
    assert np.abs(made[~mask] - around[~mask]).max() <= 0.5 + 1e-9  # rounded to whole levels
    np.testing.assert_array_equal(variant(picture, np.ones(TINY_SIZE, bool)), picture)


def test_the_blur_commutes_with_normalisation(images, blurry):
    np.testing.assert_allclose(blurred(images[0] * 3 - 1), blurry[0] * 3 - 1, rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_map_without_positive_evidence_has_no_mask(images):
    module = lambda x: torch.zeros(len(x), 6, dtype=x.dtype)  # noqa: E731  # answers all queries alike
    activations = torch.rand(3, 12, 6, 8, dtype=torch.float64)
    assert binary_masks(module, images, activations, one_each([0, 1, 2]), Recipe(4), 8) == [None] * 3


def test_classes_that_are_wanted_else_the_most_probable():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    found = [wanted_target(make_score("softmax"), *each) for each in zip(logits, (None, 2), strict=True)]
    assert [one.each for one in found] == [(Target(index=1),), (Target(index=2),)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 0}, "groups must be at least 1, got 0"),
        ({"denoise": 101}, r"denoise must be a percentile 0\.\.100, got 101"),
        ({"theta": 100}, "theta must be the mean, or a percentile of at least 0 and below 100, got 100"),
        ({"theta": -1}, "got -1"),
    ],
)
def test_bad_recipes(options, message):
    with pytest.raises(InvalidOption, match=message):
        Recipe(**options)


@torch.no_grad()
def test_more_groups_than_channels(module, images):
    with pytest.raises(InvalidOption, match=r"groups must be 1\.\.12 at this layer, got 13"):
        binary_masks(module, images, module[: LAYER + 1](images), one_each([0, 0, 0]), Recipe(13), 4)


# Folders.

PLAN = VariantPlan(Recipe(4))


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(tiny_module(), preprocessing=PREPROCESSING, labels=TINY_LABELS, micro_batch=3)


@pytest.fixture
def folder(tmp_path):
    """Five images in two folders, one of them broken."""
    root = tmp_path / "images"
    for name, content in {
        "lynx/a.png": png(pixels(0, (60, 90))),
        "lynx/b.PNG": png(pixels(1)),
        "lynx/notes.txt": b"no image",
        "tiger_cat/a.png": png(pixels(2)),
        "tiger_cat/broken.png": png(pixels(3))[:200],
        "tiger_cat/deeper/c.png": png(pixels(4)),
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


GOOD = ["lynx/a.png", "lynx/b.PNG", "tiger_cat/a.png", "tiger_cat/deeper/c.png"]


def test_every_image_has_its_variant_in_the_same_folder(engine, folder, tmp_path):
    out, progress = tmp_path / "out", []
    outcome = augment(engine, folder, PLAN, out, lambda *seen: progress.append(seen))
    assert sorted(outcome.written + outcome.empty) == GOOD
    assert len(outcome.written) >= 2
    assert {path.relative_to(out).as_posix() for path in out.rglob("*.png")} == {f"{n}.png" for n in outcome.written}
    assert list(outcome.failed) == ["tiger_cat/broken.png"]
    assert progress == [(0, 5, "lynx/a.png"), (3, 5, "tiger_cat/broken.png"), (5, 5, "")]
    with pytest.raises(InvalidInput, match=r"without variant: 1 \(tiger_cat/broken\.png: the PNG file is broken"):
        check(outcome)


def test_variants_are_those_of_the_pure_functions(engine, folder, tmp_path):
    outcome = augment(engine, folder, PLAN, tmp_path / "out")
    name = outcome.written[0]
    answer = engine.explain(folder / name, ["grad_cam"])
    seen = np.array(answer.maps[0].image)
    x = engine.network.normalise(torch.from_numpy(seen)[None])
    with torch.no_grad():
        activations = engine.network.module[:5](x)  # up to the default layer
        top = one_each([answer.predictions[0].index])
        (mask,) = binary_masks(engine.network.module, x, activations, top, PLAN.recipe, 4)
    with Image.open(tmp_path / "out" / f"{name}.png") as made:
        found = np.asarray(made)
    differing = (found != variant(seen, mask)).any(axis=2).mean()
    assert differing < 0.01  # float32 passes of other sizes: a pixel beside the threshold may change sides
    record = json.loads((tmp_path / "out" / JOURNAL).read_text().splitlines()[1 + GOOD.index(name)])
    assert (record["image"], record["class"]) == (name, answer.predictions[0].index)
    assert record["sharp"] == pytest.approx(mask.mean(), abs=0.01)


def test_a_second_run_makes_what_is_missing(engine, folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    first = augment(engine, folder, PLAN, out)
    lost, changed = first.written[:2]
    (out / f"{lost}.png").unlink()
    (folder / changed).write_bytes(png(pixels(9)))
    made = []
    make = variants.make_variants
    monkeypatch.setattr(
        variants, "make_variants", lambda e, batch, *rest: made.extend(s.name for s in batch) or make(e, batch, *rest)
    )
    second = augment(engine, folder, PLAN, out)
    assert sorted(made) == sorted([lost, changed])
    assert sorted(second.there) == sorted(set(first.written) - {lost, changed})
    assert not list(out.rglob("*.part"))


def test_classes_from_folders(engine, folder, tmp_path):
    for name in ("tiger_cat/broken.png", "tiger_cat/deeper/c.png"):
        (folder / name).unlink()
    augment(engine, folder, VariantPlan(Recipe(4), classes="folder"), tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / JOURNAL).read_text().splitlines()[1:]]
    assert {line["image"]: TINY_LABELS[line["class"]] for line in lines} == {
        "lynx/a.png": "lynx",
        "lynx/b.PNG": "lynx",
        "tiger_cat/a.png": "tiger cat",
    }


def test_folders_that_are_no_classes(engine, folder, tmp_path):
    with pytest.raises(InvalidOption, match="1 folders are no classes of the network: unknown label 'deeper'"):
        augment(engine, folder, VariantPlan(classes="folder"), tmp_path / "out")


def test_settings_are_not_mixed(engine, folder, tmp_path):
    augment(engine, folder, PLAN, tmp_path / "out")
    with pytest.raises(InvalidOption, match="begun with groups 4, got 3"):
        augment(engine, folder, VariantPlan(Recipe(3)), tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("digits-answers", "takes a question beside the image, and here are images alone"),
        ("digits-tokens", "takes a caption so far beside the image, and here are images alone"),
        (
            "digits-boxes",
            "variants are made of the activations of a layer: which boxes a detector keeps depends on all",
        ),
    ],
)
def test_a_network_without_maps_of_images_alone_is_refused_with_the_reason(name, said, folder, tmp_path):
    with pytest.raises(Unsupported, match=said):
        augment(load_engine(name, device="cpu"), folder, PLAN, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_network_of_vectors_without_references_is_refused(folder, tmp_path):
    engine = Engine(tiny_module(), preprocessing=PREPROCESSING, outputs="embedding")
    with pytest.raises(Unsupported, match="has no predictions"):
        augment(engine, folder, PLAN, tmp_path / "out")


def test_an_image_without_a_place_of_its_folders_class_fails_alone(tmp_path):
    engine, (scene, other) = load_engine("digits-segmentation", device="cpu"), benchmark_scenes(2)
    there = scene.boxes[0].label
    absent = next(str(digit) for digit in range(10) if all(str(digit) != box.label for box in other.boxes))
    for label, pixels_ in ((there, scene.pixels), (absent, other.pixels)):
        (tmp_path / "images" / label).mkdir(parents=True)
        (tmp_path / "images" / label / "one.png").write_bytes(png(pixels_))
    outcome = augment(engine, tmp_path / "images", VariantPlan(Recipe(4), classes="folder"), tmp_path / "out")
    assert outcome.written == [f"{there}/one.png"]
    assert list(outcome.failed) == [f"{absent}/one.png"]
    with pytest.raises(InvalidInput, match=f"images without variant: 1 .*no place of this image is of class {absent}"):
        check(outcome)
    second = augment(engine, tmp_path / "images", VariantPlan(Recipe(4), classes="folder"), tmp_path / "out")
    assert (second.there, list(second.failed)) == (outcome.written, list(outcome.failed))


def test_folders_that_do_not_do(engine, folder, tmp_path):
    with pytest.raises(InvalidOption, match="outside the folder of the images"):
        augment(engine, folder, PLAN, folder / "out")
    with pytest.raises(NotFound, match="no folder"):
        augment(engine, tmp_path / "nowhere", PLAN, tmp_path / "out")
    (tmp_path / "bare").mkdir()
    with pytest.raises(NotFound, match="no image"):
        augment(engine, tmp_path / "bare", PLAN, tmp_path / "out")

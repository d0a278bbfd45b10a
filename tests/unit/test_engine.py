"""The embedded engine: images of every kind, targets of every kind, sizes, precision, progress."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import TINY_LABELS, TINY_SIZE, pixels, png, tiny_module
from PIL import Image

from camserve import Engine
from camserve.errors import InvalidImage, InvalidOption, Unsupported
from camserve.images import network_view
from camserve.types import BoxOptions, Preprocessing, Target

PREPROCESSING = Preprocessing(resize_px=64, crop_px=TINY_SIZE, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(tiny_module(), preprocessing=PREPROCESSING, labels=TINY_LABELS, micro_batch=4)


def test_path_bytes_pil_and_array_are_the_same_image(engine, tmp_path):
    array = pixels(0, (90, 70))
    path = tmp_path / "image.png"
    path.write_bytes(png(array))
    sent = [path, str(path), path.read_bytes(), Image.fromarray(array), array]
    first, *others = [engine.explain(image).maps[0].array for image in sent]
    for other in others:
        np.testing.assert_array_equal(other, first)


def test_an_array_of_the_input_size_is_taken_as_it_is(engine):
    large = pixels(0, (96, 128))
    seen, _ = network_view(Image.fromarray(large), PREPROCESSING)
    resized, taken = engine.explain(large), engine.explain(np.asarray(seen))
    np.testing.assert_array_equal(resized.maps[0].array, taken.maps[0].array)
    assert taken.input.crop == (0, 0, 64, 48)


def test_maps_come_by_method_then_target_and_targets_are_resolved_once(engine):
    answer = engine.explain(pixels(0), ["grad_cam", ("group_cam", {"groups": 3})], [5, "tabby_cat", "LYNX"])
    assert [(saliency.method.name, saliency.target.label) for saliency in answer.maps] == [
        ("grad_cam", "lynx"),
        ("grad_cam", "tabby cat"),
        ("group_cam", "lynx"),
        ("group_cam", "tabby cat"),
    ]
    assert answer.cost.queries <= 2 * 3 + 1


def test_top_k_targets_are_the_first_predictions(engine):
    answer = engine.explain(pixels(0), targets=[Target(top_k=3)])
    assert [saliency.target for saliency in answer.maps] == list(answer.predictions[:3])
    assert sum(prediction.probability for prediction in engine.explain(pixels(0), top_predictions=6).predictions) == (
        pytest.approx(1)
    )


@pytest.mark.parametrize("size", ["input", "layer", "original"])
def test_a_map_has_the_size_asked_for(engine, size):
    answer = engine.explain(pixels(0, (90, 100)), ["score_cam"], size=size)
    expected = {"input": TINY_SIZE, "layer": (6, 8), "original": (90, 100)}[size]
    assert answer.maps[0].array.shape == expected
    if size == "layer":
        with pytest.raises(InvalidOption, match="no image"):
            answer.maps[0].overlay()
    else:
        assert answer.maps[0].overlay("viridis").size == expected[::-1]


def test_boxes_are_in_pixels_of_the_sent_image(engine):
    answer = engine.explain(pixels(0, (96, 128)), ["grad_cam"], boxes=BoxOptions())
    for box in answer.maps[0].boxes:
        assert 0 <= box.left < box.right <= 128
        assert 0 <= box.top < box.bottom <= 96


def test_progress_counts_the_queries_that_are_asked(engine):
    seen = []
    answer = engine.explain(pixels(0), ["score_cam"], on_progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (answer.cost.queries, answer.cost.queries)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_bfloat16_queries_keep_the_ranking_of_the_map(engine):
    """Spearman's rank correlation; bfloat16 has 8 bits of mantissa, so small weights lose their order first."""
    from scipy.stats import spearmanr

    exact = engine.explain(pixels(0), ["score_cam"]).maps[0].array
    answer = engine.explain(pixels(0), ["score_cam"], precision="bfloat16")
    assert answer.cost.precision == "bfloat16"
    assert spearmanr(exact, answer.maps[0].array, axis=None).statistic > 0.99


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"image": "/nowhere.png"}, InvalidImage, "cannot read /nowhere.png"),
        ({"image": np.zeros((8, 8), np.uint8)}, InvalidImage, r"uint8 \(height, width, 3\)"),
        ({"image": np.zeros((8, 8, 3), np.float32)}, InvalidImage, "48 x 64 x 3"),
        ({"methods": ["cam"]}, Unsupported, "global average pooling"),
        ({"methods": [("group_cam", {"groups": 0})]}, InvalidOption, "groups must be at least 1, got 0"),
        ({"methods": [("score_cam", {"variant": "fancy"})]}, InvalidOption, "variant must be one of"),
        ({"targets": [-1]}, InvalidOption, "class index must be 0..5, got -1"),
        ({"targets": ["tiger cart"]}, InvalidOption, "close to it: 'tiger cat'"),
        ({"targets": [Target(top_k=7)]}, InvalidOption, "top_k must be 1..6, got 7"),
        ({"layer": "9"}, InvalidOption, "unknown layer '9'"),
        ({"precision": "double"}, InvalidOption, "precision must be one of exact, bfloat16"),
        ({"size": "huge"}, InvalidOption, "size must be one of"),
    ],
)
def test_a_bad_argument_is_told_what_is_allowed(engine, arguments, error, message):
    with pytest.raises(error, match=message):
        engine.explain(**{"image": pixels(0)} | arguments)


def test_labels_that_do_not_fit_the_network_are_refused():
    with pytest.raises(InvalidOption, match="6 classes, got 2 labels"):
        Engine(tiny_module(), preprocessing=PREPROCESSING, labels=["one", "two"])

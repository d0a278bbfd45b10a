"""The embedded engine: images of every kind, targets of every kind, sizes, precision, progress."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from asked import asked
from PIL import Image
from tiny import TINY_LABELS, TINY_SIZE, pixels, png, tiny_module

from camserve import Engine, images
from camserve.errors import InvalidImage, InvalidOption, NotFound, Unsupported
from camserve.evaluation.curves import PROTOCOLS, faithfulness
from camserve.images import network_view
from camserve.types import BoxOptions, Preprocessing, Target
from camserve.worker.network import Network

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


def test_a_float_array_of_the_input_size_is_taken_as_it_is(engine):
    array = pixels(0).astype(np.float32) / 255
    exact, rounded = engine.explain(array), engine.explain(pixels(0))
    np.testing.assert_allclose(exact.maps[0].array, rounded.maps[0].array, atol=1e-5)
    assert exact.maps[0].overlay().size == (64, 48)


def test_pictures_are_not_written_to_files_on_the_way(engine, monkeypatch):
    """In one process a picture is taken as it is, whatever its file would weigh: noise of 17 MB, for instance."""
    noise = np.random.default_rng(0).integers(0, 256, (1930, 3000, 3), dtype=np.uint8)
    monkeypatch.setattr(Image.Image, "save", None)
    from_picture, from_array = engine.explain(Image.fromarray(noise)), engine.explain(noise)
    np.testing.assert_array_equal(from_picture.maps[0].array, from_array.maps[0].array)
    assert from_picture.input.original_size == (1930, 3000)


def test_a_file_is_decoded_for_its_maps_to_lie_on_only_when_somebody_looks(engine, monkeypatch):
    decoded, decode = [], images.decode
    monkeypatch.setattr(images, "decode", lambda *given: decoded.append(1) or decode(*given))
    array = pixels(0, (90, 70))
    one, other = engine.explain(png(array), targets=[0, 1]).maps
    assert decoded == []
    assert one.overlay(opacity=0).tobytes() == other.image.tobytes()
    assert one.image.tobytes() == engine.explain(array).maps[0].image.tobytes()
    assert decoded == [1]


@pytest.mark.parametrize("kind", [np.asarray, Image.fromarray])
def test_what_a_map_lies_on_is_what_was_explained_though_the_caller_draws_into_it_afterwards(engine, kind):
    array = pixels(0, (90, 70)).copy()
    sent, expected = kind(array), engine.explain(array.copy()).maps[0].image.tobytes()
    answer = engine.explain(sent)
    sent.paste("red", (0, 0, 70, 90)) if isinstance(sent, Image.Image) else sent.fill(7)
    assert answer.maps[0].image.tobytes() == expected


def test_an_image_above_the_bounds_of_a_server_is_explained_in_one_process(engine):
    file = io.BytesIO()
    Image.new("1", (8000, 8100)).save(file, "PNG")  # 64.8 megapixels
    assert engine.explain(file.getvalue(), size="layer").input.original_size == (8100, 8000)


def test_a_picture_is_seen_upright_and_on_white(engine):
    turned = Image.fromarray(pixels(0, (90, 70)))
    turned.getexif()[0x0112] = 6  # a quarter turn clockwise
    upright = engine.explain(Image.fromarray(np.rot90(pixels(0, (90, 70)), -1)))
    np.testing.assert_array_equal(engine.explain(turned).maps[0].array, upright.maps[0].array)
    clear = engine.explain(Image.new("RGBA", (64, 48), (255, 0, 0, 0)))
    assert clear.predictions == engine.explain(Image.new("RGB", (64, 48), "white")).predictions


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


def test_progress_of_a_map_that_may_stop_early_ends_where_it_stops(engine):
    seen = []
    answer = engine.explain(
        pixels(0),
        [("rise", {"masks": 400, "tolerance": 1.0})],
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert answer.maps[0].fraction < 1
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert all(total == 400 for _, total in seen)
    assert seen[-1][0] == answer.cost.queries == round(400 * answer.maps[0].fraction)


def test_the_steps_of_a_request_share_one_look_at_its_image(engine, monkeypatch):
    looked = []
    seen, capture = images.seen, Network.capture
    monkeypatch.setattr(images, "seen", lambda *image: looked.append("decoded") or seen(*image))
    monkeypatch.setattr(Network, "capture", lambda *asked: looked.append("passed") or capture(*asked))
    methods = [("rise", {"masks": 400, "tolerance": 0.2}), "grad_cam"]
    answer = engine.explain(png(pixels(0, (90, 70))), methods, evaluate=True, evaluation_steps=4)
    assert answer.cost.steps > 3
    assert looked == ["decoded", "passed"]


@pytest.mark.parametrize("several_steps", [False, True])
def test_a_request_knows_nothing_of_the_one_before(several_steps):
    """Not the image, nor what the network made of it: a caller may be training it."""
    module = tiny_module()
    changed = Engine(module, preprocessing=PREPROCESSING, labels=TINY_LABELS)
    options = {"targets": [0], "evaluate": several_steps, "evaluation_steps": 4}
    first, other = (changed.explain(pixels(seed), **options) for seed in (0, 1))
    assert first.predictions != other.predictions
    with torch.no_grad():
        for weights in module.parameters():
            weights.copy_(weights.flip(0))
    after = changed.explain(pixels(1), **options)
    fresh = Engine(module, preprocessing=PREPROCESSING, labels=TINY_LABELS).explain(pixels(1), **options)
    assert other.predictions != after.predictions == fresh.predictions
    np.testing.assert_array_equal(after.maps[0].array, fresh.maps[0].array)


def test_bfloat16_queries_keep_the_ranking_of_the_map(engine, monkeypatch):
    """Spearman's rank correlation; bfloat16 has 8 bits of mantissa, so small weights lose their order first."""
    monkeypatch.setattr("camserve.worker.network.why_no_bfloat16", lambda device: "")  # without instructions it is slow
    from scipy.stats import spearmanr

    exact = engine.explain(pixels(0), ["score_cam"]).maps[0].array
    answer = engine.explain(pixels(0), ["score_cam"], precision="bfloat16")
    assert answer.cost.precision == "bfloat16"
    assert spearmanr(exact, answer.maps[0].array, axis=None).statistic > 0.99


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"image": "/nowhere.png"}, InvalidImage, "cannot read /nowhere.png"),
        (
            {"image": np.zeros((8, 8, 2), np.uint8)},
            InvalidImage,
            r"float32 \(height, width, 3\) or, grey, \(height, width\), got uint8 \[8, 8, 2\]",
        ),
        ({"image": np.zeros((8, 8, 3), np.float32)}, InvalidImage, r"input size \[48, 64\], got \[8, 8\]"),
        ({"methods": ["auto"]}, InvalidOption, "auto: a server chooses"),
        ({"version": "2.0"}, NotFound, "is served in version"),
        ({"methods": ["cam"]}, Unsupported, "global average pooling"),
        ({"methods": [("group_cam", {"groups": 0})]}, InvalidOption, "groups must be at least 1, got 0"),
        ({"methods": [("score_cam", {"variant": "fancy"})]}, InvalidOption, "variant must be one of"),
        ({"targets": [-1]}, InvalidOption, "class index must be 0..5, got -1"),
        ({"targets": ["tiger cart"]}, InvalidOption, "close to it: 'tiger cat'"),
        ({"targets": [Target(top_k=7)]}, InvalidOption, "top_k must be 1..6, got 7"),
        ({"layer": "9"}, InvalidOption, "unknown layer '9'"),
        ({"precision": "double"}, InvalidOption, "precision must be one of auto, exact, bfloat16"),
        ({"size": "huge"}, InvalidOption, "size must be one of"),
    ],
)
def test_a_bad_argument_is_told_what_is_allowed(engine, arguments, error, message):
    with pytest.raises(error, match=message):
        engine.explain(**{"image": pixels(0)} | arguments)


def test_labels_that_do_not_fit_the_network_are_refused():
    with pytest.raises(InvalidOption, match="6 classes, got 2 labels"):
        Engine(tiny_module(), preprocessing=PREPROCESSING, labels=["one", "two"])


# Several layers


@pytest.mark.parametrize(("fusion", "fuse"), [("mean", np.mean), ("max", np.max)])
def test_the_maps_of_several_layers_are_fused(engine, fusion, fuse):
    layers = [layer.name for layer in engine.info.layers][-3:]
    asked = {"methods": ["layer_cam", ("group_cam", {"groups": 3})], "targets": [5]}
    alone = [engine.explain(pixels(0), layer=layer, **asked).maps for layer in layers]
    together = engine.explain(pixels(0), layer=layers, fusion=fusion, **asked)
    for row, saliency in enumerate(together.maps):
        raw = fuse([maps[row].array.astype(np.float64) for maps in alone], axis=0)
        expected = (raw - raw.min()) / (raw.max() - raw.min())
        np.testing.assert_allclose(saliency.array, expected, rtol=0, atol=1e-6)  # float32 maps, scaled once more
        assert saliency.layers == tuple(layers)
        assert saliency.layer == " + ".join(layers)
        assert saliency.value_range == pytest.approx((raw.min(), raw.max()), abs=1e-6)


def test_a_method_without_layer_is_made_once(engine):
    layers = [layer.name for layer in engine.info.layers][-2:]
    answer = engine.explain(pixels(0), ["integrated_gradients"], [5], layer=layers)
    alone = engine.explain(pixels(0), ["integrated_gradients"], [5])
    np.testing.assert_array_equal(answer.maps[0].array, alone.maps[0].array)
    assert answer.cost.queries == alone.cost.queries


# Deletion and insertion of the map that is returned


@pytest.mark.parametrize("steps", [1, 5, 28])
def test_the_curves_are_those_of_the_very_map_that_is_returned(engine, steps):
    plain = engine.explain(pixels(0), ["grad_cam", ("group_cam", {"groups": 3})], [5, 1])
    answer = engine.explain(
        pixels(0), ["grad_cam", ("group_cam", {"groups": 3})], [5, 1], evaluate=True, evaluation_steps=steps
    )
    network = engine.network
    protocol = replace(PROTOCOLS["rise"], steps=steps)
    with network.evaluating():
        expected = faithfulness(
            lambda x: network.scores(x, "exact"),
            network.normalise(torch.from_numpy(np.array(pixels(0)))[None])[0],
            torch.from_numpy(np.stack([saliency.array for saliency in answer.maps])),
            asked(saliency.target.index for saliency in answer.maps),
            [protocol],
            micro_batch=4,
        )
    points = 0
    for saliency, (one,), same in zip(answer.maps, expected, plain.maps, strict=True):
        found = saliency.faithfulness
        np.testing.assert_array_equal(saliency.array, same.array)
        np.testing.assert_allclose(found.deletion, one.deletion, rtol=0, atol=1e-6)  # float32 probabilities
        np.testing.assert_allclose(found.insertion, one.insertion, rtol=0, atol=1e-6)
        assert found.overall == pytest.approx(found.insertion_auc - found.deletion_auc)
        assert found.deletion[0] == pytest.approx(saliency.target.probability, abs=1e-6)
        points += len(found.deletion) + len(found.insertion)
    assert answer.cost.evaluation_queries == points
    assert answer.cost.queries == plain.cost.queries + points
    assert plain.maps[0].faithfulness is None
    assert plain.cost.evaluation_queries == 0


@pytest.mark.parametrize("size", ["layer", "original"])
def test_the_curves_do_not_depend_on_the_size_of_the_reply(engine, size):
    image = pixels(0, (90, 70))
    one, other = (engine.explain(image, size=each, evaluate=True).maps[0].faithfulness for each in ("input", size))
    np.testing.assert_array_equal(one.deletion, other.deletion)
    np.testing.assert_array_equal(one.insertion, other.insertion)

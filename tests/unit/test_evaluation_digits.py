"""The digits benchmark: the same scenes everywhere, boxes that hold their digits, a network that reads them."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from camserve import Engine
from camserve.archive import build_archive
from camserve.evaluation.digits import network, scenes

TRAIN = Path(__file__).parents[2] / "benchmarks" / "digits" / "train.py"


def test_a_scene_does_not_depend_on_the_others():
    alone = scenes.make_scene(2, 5, 3, "test")
    assert alone.boxes == scenes.benchmark_scenes(6)[5].boxes
    np.testing.assert_array_equal(alone.pixels, scenes.benchmark_scenes(6)[5].pixels)
    assert (scenes.make_scene(2, 4, 3, "test").pixels != alone.pixels).any()


def test_the_benchmark_is_the_same_everywhere():
    content = b"".join(scene.pixels.tobytes() for scene in scenes.benchmark_scenes(6))
    assert hashlib.sha256(content).hexdigest() == "c3a24c29f8705b0210a66c8fa53c3e1c0bf494425c6e3979f91f108d88f83492"


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("digits", [1, 2, 3])
def test_digits_of_different_classes_lie_apart(split, digits):
    for index in range(10):
        scene = scenes.make_scene(0, index, digits, split)
        assert scene.pixels.shape == (scenes.SIZE_PX, scenes.SIZE_PX, 3)
        assert len({box.label for box in scene.boxes}) == len(scene.boxes) == digits
        for number, box in enumerate(scene.boxes):
            assert 0 <= box.left < box.right <= scenes.SIZE_PX
            assert 0 <= box.top < box.bottom <= scenes.SIZE_PX
            for other in scene.boxes[:number]:
                beside = box.right <= other.left or other.right <= box.left
                assert beside or box.bottom <= other.top or other.bottom <= box.top


def test_boxes_hold_what_is_bright():
    scene = scenes.make_scene(0, 0, 1, "train")
    bright = scene.pixels.min(axis=2) > 170  # the background is at most 0.8 times a texture that is rarely white
    (box,) = scene.boxes
    inside = bright[int(box.top) : int(box.bottom), int(box.left) : int(box.right)]
    assert inside.sum() > 0.9 * bright.sum() > 10


def test_no_digit_is_in_both_splits():
    train, test = ({image.tobytes() for image in scenes.handwriting(split)[0]} for split in ("train", "test"))
    assert len(train) + len(test) > 1790  # of 1797, some of which may be equal
    assert not train & test


def test_the_shipped_network_reads_held_out_digits():
    """The program that trained it asks 2048 scenes; these are others."""
    engine = network.load_engine()
    right = 0
    for index in range(60):
        scene = scenes.make_scene(77, index, 1, "test")
        right += engine.explain(scene.pixels, [], top_predictions=1).predictions[0].label == scene.boxes[0].label
    assert right >= 57


def test_the_network_suits_every_method_for_convolutions():
    module = network.trained()
    assert not module.training
    layer = network.load_engine().info.layer("")
    assert (layer.channels, layer.height, layer.width) == (64, 12, 12)
    assert sum(isinstance(child, torch.nn.ReLU) for child in module.modules()) == 5
    assert sum(value.numel() for value in module.state_dict().values()) * 4 < 2 * 2**20
    assert network.DigitsNet(3)(torch.zeros(2, 3, 96, 96)).shape == (2, 3)


def test_the_network_can_be_packed_as_an_archive(tmp_path):
    source = "camserve.evaluation.digits.network:trained"
    path = build_archive(source, name="digits", store=tmp_path, preprocessing=network.PREPROCESSING)
    pixels = scenes.make_scene(2, 0, 2, "test").pixels
    packed, direct = Engine.load("digits", path.parent), network.load_engine()
    first, second = (engine.explain(pixels, ["grad_cam"], [3]).maps[0].array for engine in (packed, direct))
    np.testing.assert_allclose(first, second, rtol=0, atol=1e-5)  # float32, other micro-batches


def test_the_training_program_runs(tmp_path):
    """Too few scenes to learn anything, which it says."""
    out = tmp_path / "weights.safetensors"
    command = [sys.executable, TRAIN, "--scenes", "192", "--held-out", "64", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert "accuracy on 64 held-out scenes" in done.stdout, done.stderr
    assert done.returncode == 1
    assert "must be at least 95%" in done.stderr
    assert out.stat().st_size == Path(str(network.WEIGHTS)).stat().st_size

"""What a worker keeps of recent images: many steps of one request decode and forward it once."""

import math
import time

import numpy as np
import pytest
import torch
from reference.models import CHANNELS, PREPROCESSING, build, picture

from camserve.errors import DeadlineExceeded
from camserve.images import digest
from camserve.methods import GradCam, GroupCam, MethodSpec, ScoreCam
from camserve.saliency import group_cam
from camserve.saliency.masks import gaussian_blur
from camserve.types import InputView, Item, Target, Task, Vector
from camserve.worker.executor import Executor
from camserve.worker.memory import Memory, Passed, Seen
from camserve.worker.network import Network

VIEW = InputView((4, 4), (0, 0, 4, 4), (4, 4))


def seen(values: int) -> Seen:
    return Seen(torch.zeros(values, dtype=torch.uint8), VIEW)


def test_the_least_recently_used_is_forgotten_first():
    memory = Memory(100)
    for name in "abc":
        memory.put(name, seen(40))  # the third does not fit beside both others
    assert [memory.get(name) is not None for name in "abc"] == [False, True, True]
    memory.get("b")
    memory.put("d", seen(40))
    assert [memory.get(name) is not None for name in "bcd"] == [True, False, True]
    assert (memory.hits, memory.misses) == (5, 2)


def test_the_bound_counts_bytes_and_a_replaced_value_once():
    memory = Memory(100)
    for _ in range(5):
        memory.put("a", seen(60))
    memory.put("b", seen(40))
    assert memory.get("a") is not None
    memory.put("huge", seen(101))
    assert memory.get("huge") is None


def test_without_room_nothing_is_kept():
    memory = Memory(0)
    memory.put("a", seen(1))
    assert memory.get("a") is None


def test_an_expanded_gradient_counts_as_what_it_holds():
    one = torch.zeros(3, 2, 2)
    whole = Passed(one, one, one, {0: torch.zeros(3, 1, 1).expand(3, 50, 50)})
    assert whole.size_bytes == 3 * 48 + 12


def test_images_have_the_same_name_if_they_are_the_same():
    image = picture(0)
    assert digest(image) == digest(image.copy())
    others = [image.astype(np.float32), image.transpose(1, 0, 2), image + 1, image.tobytes()]
    assert len({digest(other) for other in [image, *others]}) == 5


class Counted(Executor):
    """Counts the images of its forward passes with a graph."""

    def __init__(self, memory_bytes: int = 2**24, name: str = "perceptron") -> None:
        super().__init__(
            Network(build(name, 2, torch.float64), preprocessing=PREPROCESSING, micro_batch=8), memory_bytes
        )
        self.forwards = 0
        capture = self.network.capture

        def counting(x, layer, gradients=False):
            self.forwards += len(x)
            return capture(x, layer, gradients)

        self.network.capture = counting

    def sums(self, spec: MethodSpec, start=0, stop=10_000, targets=(5,), layer="", image=None) -> np.ndarray:
        image = picture(2) if image is None else image
        item = Item(image, tuple(map(Target, targets)), (Task(0, spec, start, stop, layer),))
        (outcome,) = self.execute([item]).outcomes
        return outcome.partials[0].sums


def test_many_steps_of_one_request_are_one_forward_pass_and_the_same_map():
    executor = Counted()
    parts = [executor.sums(ScoreCam(), start, start + 5) for start in range(0, CHANNELS, 5)]
    assert executor.forwards == 1
    np.testing.assert_allclose(sum(parts), Counted(0).sums(ScoreCam()), rtol=1e-9, atol=1e-12)  # float64 sums


def test_another_image_or_layer_has_a_pass_of_its_own():
    executor = Counted()
    executor.sums(ScoreCam())
    executor.sums(ScoreCam(), image=picture(3))
    executor.sums(ScoreCam(), layer="features.5")
    assert executor.forwards == 3


@pytest.mark.parametrize("name", ["perceptron", "pooled"])
def test_gradients_are_made_when_they_are_needed_and_for_the_classes_needed(name):
    executor, fresh = Counted(name=name), Counted(0, name)
    layer = "features.8"
    executor.sums(ScoreCam(), layer=layer)
    for targets, forwards in (((5,), 2), ((5,), 2), ((5, 1), 3), ((1,), 3)):
        for spec in (GradCam(), GroupCam(groups=4)):
            found = executor.sums(spec, targets=targets, layer=layer)
            np.testing.assert_allclose(found, fresh.sums(spec, targets=targets, layer=layer), rtol=1e-9, atol=1e-12)
        assert executor.forwards == forwards


def test_neighbours_that_are_remembered_and_new_ones_do_not_mix():
    executor, fresh = Counted(), Counted(0)
    executor.sums(GradCam(), image=picture(1))
    items = [Item(picture(seed), (Target(5),), (Task(0, GradCam(), 0, 0),)) for seed in range(4)]
    found, expected = (one.execute(items).outcomes for one in (executor, fresh))
    assert executor.forwards == 4
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.partials[0].sums, other.partials[0].sums, rtol=1e-9, atol=1e-12)
        assert [each.index for each in one.predictions] == [each.index for each in other.predictions]


def test_a_reference_image_is_decoded_and_embedded_once():
    network = Network(build("pooled", 2, torch.float64), preprocessing=PREPROCESSING, outputs="embedding")
    target, method = Vector(image=np.zeros((1100, 1000, 3), np.uint8)), Task(0, ScoreCam(), 0, 4)
    step = [Item(picture(2), (target,), (method,))]
    for executor, openings in ((Executor(network, 2**26), 0), (Executor(network), 2)):
        first, second = (executor.execute(step) for _ in range(2))
        assert first.made["opening"] == 2
        assert first.made["decode"] == 1
        assert second.made.get("opening", 0) == openings
        np.testing.assert_array_equal(*(step.outcomes[0].partials[0].sums for step in (first, second)))


def test_a_step_says_how_many_megapixels_it_has_decoded():
    executor = Counted(2**26)
    large = Item(np.zeros((2000, 3000, 3), np.uint8), (Target(5),), (Task(0, GradCam(), 0, 0),))
    small = Item(np.zeros((200, 300, 3), np.uint8), (Target(5),), (Task(0, GradCam(), 0, 0),))
    assert executor.execute([large, small]).made["decode"] == 5
    assert "decode" not in executor.execute([large, small]).made


def test_a_step_says_what_was_still_there():
    executor = Counted()
    item = Item(picture(0), (Target(5),), (Task(0, GradCam(), 0, 0),))
    counts = [(step.memory_hits, step.memory_misses) for step in (executor.execute([item]) for _ in range(2))]
    assert counts == [(0, 2), (2, 0)]


def test_what_nobody_waits_for_is_not_done():
    executor = Counted()
    late, never, later = (
        Item(picture(0), (), (Task(0, GradCam(), 0, 0),), expires_s=expires_s)
        for expires_s in (time.monotonic() - 1, math.inf, time.monotonic() + 60)
    )
    first, *others = executor.execute([late, never, later]).outcomes
    assert isinstance(first, DeadlineExceeded)
    assert all(outcome.partials for outcome in others)


def test_the_blurred_image_of_group_cam_is_made_once_for_all_steps_of_an_image(monkeypatch):
    made = []

    def noted(image, *how):
        made.append(image)
        return gaussian_blur(image, *how)

    monkeypatch.setattr(group_cam, "gaussian_blur", noted)
    asked = [
        Item(picture(seed), (Target(1),), (Task(0, GroupCam(groups=8), start, start + 2),))
        for seed in (0, 1)
        for start in (0, 2, 4, 6)
    ]
    kept, forgetful = (
        Executor(Network(build("perceptron", 2), preprocessing=PREPROCESSING), size) for size in (2**24, 0)
    )
    sums = [kept.answer(item)[1].partials[0].sums for item in asked]
    assert len(made) == 2
    expected = [forgetful.answer(item)[1].partials[0].sums for item in asked]
    assert len(made) == 2 + 8
    np.testing.assert_array_equal(sums, expected)
    hits = kept.memory.hits + kept.memory.misses
    assert hits == 2 * 8  # the image and its pass, of each item: the counters tell of nothing else

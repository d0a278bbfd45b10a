"""The files of a step are decoded side by side; each still has its own outcome, and its own map."""

import threading
import time
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from reference.models import PREPROCESSING, build

from camserve import images
from camserve.errors import DeadlineExceeded, InvalidImage, Unavailable
from camserve.images import digest
from camserve.methods import GradCam
from camserve.types import Item, Target, Task
from camserve.worker import forward
from camserve.worker.executor import Executor
from camserve.worker.network import Network

PATIENCE_S = 30
decode = images.seen


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def decoded(monkeypatch):
    """Notes the threads in which files are decoded, by the file; `meet` is called in each."""
    found = {}

    def seen(content, *given):
        found[content] = threading.current_thread()
        decoded.meet()
        return decode(content, *given)

    def decoded():
        return found

    decoded.meet = lambda: None
    monkeypatch.setattr(images, "seen", seen)
    return decoded


def photo(seed: int, size: int = 90) -> bytes:
    file = BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size + 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def item(file: bytes, **other) -> Item:
    return Item(file, (Target(index=1),), (Task(0, GradCam(), 0, 0),), digest=digest(file), **other)


def executor(memory_bytes: int = 2**26) -> Executor:
    return Executor(Network(build("perceptron", 2), preprocessing=PREPROCESSING), memory_bytes)


def test_files_of_a_step_are_decoded_at_the_same_time_and_make_the_maps_of_one_alone(decoded):
    files = [photo(seed) for seed in range(3)]
    alone = [executor().execute([item(file)]).outcomes[0].partials[0].sums for file in files]
    both = threading.Barrier(3)
    decoded.meet = lambda: both.wait(PATIENCE_S)  # broken, and an error, unless all three are being decoded
    for memory_bytes in (2**26, 0):
        step = executor(memory_bytes).execute([item(file) for file in files])
        for expected, outcome in zip(alone, step.outcomes, strict=True):
            np.testing.assert_allclose(outcome.partials[0].sums, expected, rtol=1e-5, atol=1e-7)  # passes of 3 and of 1


def test_a_single_file_and_a_file_that_is_remembered_need_no_thread(decoded):
    one, first, second = executor(), photo(0), photo(1)
    one.execute([item(first)])
    one.execute([item(first), item(second)])
    assert set(decoded().values()) == {threading.current_thread()}


def test_a_broken_file_is_its_own_failure(decoded):
    good, cut = photo(0), photo(1)[:-400]
    for broken in (cut, b"none", photo(2)[:30]):
        step = executor().execute([item(photo(3)), item(broken), item(good)])
        assert isinstance(step.outcomes[1], InvalidImage)
        assert all(outcome.partials for outcome in (step.outcomes[0], step.outcomes[2]))
        assert decoded()[good] is not threading.current_thread()


def test_a_file_that_is_large_is_decoded_by_itself(decoded, monkeypatch):
    monkeypatch.setattr(forward, "BESIDE_PIXELS", 100 * 107)
    small, other, large = photo(0), photo(1, 100), photo(2, 101)
    step = executor().execute([item(small), item(large), item(other)])
    assert all(outcome.partials for outcome in step.outcomes)
    assert decoded()[large] is threading.current_thread()
    assert threading.current_thread() not in (decoded()[small], decoded()[other])


def test_a_file_whose_deadline_has_passed_is_not_decoded(decoded):
    late = photo(2)
    step = executor().execute([item(photo(0)), item(late, expires_s=time.monotonic() - 1), item(photo(1))])
    assert isinstance(step.outcomes[1], DeadlineExceeded)
    assert late not in decoded()


def test_the_same_file_of_several_requests_is_decoded_once(monkeypatch):
    files = []
    monkeypatch.setattr(images, "seen", lambda content, *given: (files.append(content), decode(content, *given))[1])
    first, second = photo(0), photo(1)
    executor().execute([item(first), item(second), item(first)])
    assert sorted(files) == sorted([first, second])


def test_a_thread_that_lacks_memory_is_not_the_last_word(decoded, monkeypatch):
    """The image is decoded again, by itself, once there is room."""
    failed = []

    def scarce():
        if not failed and threading.current_thread().name.startswith("decode"):
            failed.append(True)
            raise Unavailable("there is not enough memory for the image's pixels") from MemoryError()

    decoded.meet = scarce
    step = executor().execute([item(photo(0)), item(photo(1))])
    assert failed
    assert all(outcome.partials for outcome in step.outcomes)


def test_a_file_for_which_there_is_no_memory_at_all_is_unavailable(decoded):
    def scarce():
        raise Unavailable("there is not enough memory for the image's pixels")

    decoded.meet = scarce
    step = executor().execute([item(photo(0)), item(photo(1))])
    assert all(isinstance(outcome, Unavailable) for outcome in step.outcomes)

"""What a worker does when memory runs out, or when its device no longer works."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from tiny import TINY_LABELS, TINY_SIZE, pixels, png, tiny_module
from torch import Tensor, nn

from camserve.codecs import step as codec
from camserve.errors import INTERNAL_MESSAGE, ImageMissing, Internal, Unavailable
from camserve.images import digest
from camserve.methods import (
    AblationCam,
    GradCam,
    GroupCam,
    IntegratedGradients,
    MethodSpec,
    Occlusion,
    Rise,
    ScoreCam,
    SmoothGrad,
    SmoothGradCamPlusPlus,
)
from camserve.runtimes.memory import is_out_of_memory
from camserve.types import Item, ItemResult, Layer, Preprocessing, StepResult, Target, Task
from camserve.worker.device import BrokenDevice, works
from camserve.worker.executor import MEMORY_BYTES, Executor
from camserve.worker.micro_batch import CALM_STEPS, MicroBatch
from camserve.worker.network import Network
from camserve.worker.service import BROKEN_DEVICE, WorkerService

WANTS: dict[str, Callable[[], Exception]] = {
    "CUDA": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "CPU": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory"),
    "cuBLAS": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "process": lambda: MemoryError(),
}
BROKEN = RuntimeError("CUDA error: device-side assert triggered")
METHODS: tuple[MethodSpec, ...] = (
    ScoreCam(),
    GroupCam(groups=6),
    Rise(masks=9, grid=4),
    Occlusion(positions=4),
    AblationCam(),
    IntegratedGradients(steps=9),
    SmoothGrad(samples=7),
    SmoothGradCamPlusPlus(samples=7),
)


class Hungry(nn.Module):
    """Runs out of memory over more images than `most`, or while `fails` says so."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_module()
        self.most = math.inf
        self.fails: Callable[[Tensor], bool] = lambda x: False
        self.want = WANTS["CUDA"]
        self.passes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.passes.append(len(x))
        if len(x) > self.most or self.fails(x):
            raise self.want()
        return self.inner(x)


def executor(memory_bytes: int = 0, **options: Callable[[torch.device], bool]) -> tuple[Executor, Hungry]:
    module = Hungry()
    preprocessing = Preprocessing(resize_px=64, crop_px=TINY_SIZE, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    network = Network(module, preprocessing=preprocessing, labels=TINY_LABELS, micro_batch=8)
    module.passes.clear()
    return Executor(network, memory_bytes, **options), module


def item(method: MethodSpec, seed: int = 0) -> Item:
    image = pixels(seed)
    tasks = (Task(0, method, 0, method.queries(Layer("layer", 12, 7, 7), 2)),)
    return Item(image, (Target(index=1), Target(index=4)), tasks, digest=digest(image))


def sums(result: StepResult) -> np.ndarray:
    (outcome,) = result.outcomes
    assert isinstance(outcome, ItemResult), outcome
    return outcome.partials[0].sums


@pytest.mark.parametrize("most", [1, 3])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_where_memory_runs_out_passes_get_smaller_and_the_sums_are_the_same(method: MethodSpec, most: int):
    whole, _ = executor()
    expected = sums(whole.execute([item(method)]))
    small, module = executor()
    module.most = most
    np.testing.assert_allclose(sums(small.execute([item(method)])), expected, rtol=1e-4, atol=1e-5)
    assert small.micro_batch.size <= most or method.kind == "tail", "it is remembered"
    module.passes.clear()
    small.execute([item(method)])
    assert max(module.passes) <= most, "and nothing is tried in vain the next time"


@pytest.mark.parametrize("want", WANTS)
def test_a_want_of_memory_is_known_by_type_or_text(want: str):
    small, module = executor()
    module.most, module.want = 2, WANTS[want]
    assert len(sums(small.execute([item(ScoreCam())])))
    assert is_out_of_memory(WANTS[want]())
    assert not is_out_of_memory(BROKEN)
    assert not is_out_of_memory(ValueError("out of memory"))


def test_what_was_asked_before_memory_ran_out_is_not_asked_again():
    small, module = executor()
    module.fails = lambda x: len(module.passes) > 2 and len(x) > 2
    result = small.execute([item(ScoreCam())])
    assert module.passes == [1, 8, 4, 2, 2]  # the opening, the channels, and in vain the last four of them at once
    assert result.made["masked_forward"] == 12


def test_an_opening_that_needs_more_memory_gets_what_was_kept_of_others():
    small, module = executor(MEMORY_BYTES)
    small.execute([item(GradCam(), 1)])
    known = Item(None, (Target(index=1),), (Task(0, GradCam(), 0, 0),), digest=item(GradCam(), 1).digest)
    assert isinstance(small.execute([known]).outcomes[0], ItemResult)
    tries = iter([True])
    module.fails = lambda x: next(tries, False)
    assert len(sums(small.execute([item(GradCam(), 2)])))
    assert small.micro_batch.size == 8, "smaller passes would not have helped"
    assert isinstance(small.execute([known]).outcomes[0], ImageMissing)


def test_what_never_fits_is_unavailable_and_its_neighbours_are_answered():
    small, module = executor()
    white = np.full((*TINY_SIZE, 3), 255, np.uint8)
    module.fails = lambda x: bool((x == 2.0).all(dim=(1, 2, 3)).any())
    items = [item(GradCam(), 1), Item(white, (), (Task(0, GradCam(), 0, 0),)), item(GradCam(), 2)]
    first, middle, last = small.execute(items).outcomes
    assert isinstance(first, ItemResult)
    assert isinstance(last, ItemResult)
    assert isinstance(middle, Unavailable)
    assert str(middle) == "a worker has too little memory for this request"
    assert len(module.passes) < 12, "bounded"


def test_after_a_while_larger_passes_are_tried_again():
    size = MicroBatch(8)
    assert [size.halve(), size.halve(), size.halve(), size.halve()] == [True, True, True, False]
    sizes = []
    for _ in range(4):
        for _ in range(CALM_STEPS):
            size.answered()
        sizes.append(size.size)
    assert sizes == [2, 4, 8, 8]
    size.halve(3)
    assert size.size == 1


# Devices that no longer work


def ends(service_works: bool, fault: Callable[[Hungry], None]) -> tuple[list[int], Callable[[], list[object]]]:
    small, module = executor(works=lambda device: service_works)
    fault(module)
    statuses: list[int] = []
    service = WorkerService(small, end=statuses.append)
    return statuses, lambda: service.answer([{"camserve": codec.request_to_bytes([item(GradCam())])}])


def broken(module: Hungry) -> None:
    module.fails, module.want = (lambda x: True), lambda: BROKEN


def test_a_worker_whose_device_no_longer_works_ends():
    statuses, answer = ends(False, broken)
    with pytest.raises(BrokenDevice):
        answer()
    assert statuses == [BROKEN_DEVICE]


def test_a_worker_whose_device_works_answers_an_error_instead():
    statuses, answer = ends(True, broken)
    (found,) = answer()
    (outcome,) = codec.result_from_bytes(found.body).outcomes
    assert (type(outcome), str(outcome)) == (Internal, INTERNAL_MESSAGE)
    assert statuses == []


def test_a_device_is_not_doubted_where_nothing_unforeseen_happens():
    statuses, answer = ends(False, lambda module: None)
    assert len(answer()) == 1
    assert statuses == []


def test_an_error_that_shows_behind_the_step_ends_the_worker_as_well(monkeypatch: pytest.MonkeyPatch):
    """As at a synchronisation: kernels run behind the calls that start them."""

    def late(device: torch.device) -> None:
        raise BROKEN

    monkeypatch.setattr("camserve.worker.executor.device_memory", late)
    statuses, answer = ends(False, lambda module: None)
    with pytest.raises(BrokenDevice):
        answer()
    assert statuses == [BROKEN_DEVICE]


def test_a_plain_client_does_not_keep_a_broken_worker_alive():
    """The curves of a plain request are asked while its answer is written, each failure of which is an answer."""
    small, module = executor(works=lambda device: False)
    statuses: list[int] = []
    service = WorkerService(small, end=statuses.append)
    module.fails, module.want = (lambda x: len(x) > 1), lambda: BROKEN  # everything before the curves has one image
    with pytest.raises(BrokenDevice):
        service.answer([{"body": png(pixels(0)), "evaluate": b"true"}])
    assert statuses == [BROKEN_DEVICE]


def test_the_device_of_this_machine_works():
    assert works(torch.device("cpu"))
    assert not works(torch.device("cuda:99"))


def test_the_process_really_ends():
    program = """
from tiny import pixels, png, tiny_network
from camserve.worker.executor import Executor
from camserve.worker.service import WorkerService
network = tiny_network()
network.module.register_forward_pre_hook(lambda module, inputs: 1 / 0)
WorkerService(Executor(network, works=lambda device: False)).answer([{"body": png(pixels(0))}])
print("still here")
"""
    found = subprocess.run([sys.executable, "-c", program], cwd="tests", capture_output=True, text=True, timeout=300)
    assert found.returncode == BROKEN_DEVICE, found.stderr
    assert found.stdout == ""

"""Where PyTorch has only small tensors to work on, a worker gives it one thread; a map is the same for any number."""

import numpy as np
import pytest
import torch
from torch import nn

from camserve.methods import GradCam, GroupCam
from camserve.types import Item, Preprocessing, Target, Task
from camserve.worker.executor import Executor
from camserve.worker.modes import one_thread
from camserve.worker.network import Network
from camserve.worker.tuning import tune

PREPROCESSING = Preprocessing(32, (32, 32), (0.5,) * 3, (0.5,) * 3)
THREADS = 3


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


class Pooled(nn.Module):
    """Convolutions, global average pooling, perhaps a hidden layer, and a linear one."""

    def __init__(self, hidden: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.hidden = nn.Sequential(nn.Linear(16, 64), nn.ReLU()) if hidden else nn.Identity()
        self.head = nn.Linear(64 if hidden else 16, 5)

    def forward(self, x):
        return self.head(self.hidden(self.pool(self.features(x)).flatten(1)))


def network(runtime: str, module: nn.Module | None = None) -> Network:
    made = Network((module or Pooled()).eval(), preprocessing=PREPROCESSING)
    tune(made, runtime, 4, None)
    return made


def executed(made: Network, own_process: bool, method=None):
    """Returns the sums of a method, and the numbers of threads that PyTorch had in the opening and in its queries."""
    seen = {"opening": [], "queries": []}
    capture, scores = made.capture, made.scores
    made.capture = lambda *given: (seen["opening"].append(torch.get_num_threads()), capture(*given))[1]
    made.scores = lambda *given: (seen["queries"].append(torch.get_num_threads()), scores(*given))[1]
    method = method or GradCam()
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    item = Item(pixels, (Target(index=1),), (Task(0, method, 0, method.queries(made.info.layer(""), 1)),))
    _, outcome = Executor(made, own_process=own_process).answer(item)
    made.capture, made.scores = capture, scores
    return outcome.partials[0].sums, {what: set(numbers) for what, numbers in seen.items()}


@pytest.mark.parametrize("method", [GradCam(), GroupCam(groups=4)])
def test_a_map_is_the_same_for_any_number_of_threads(method):
    made = network("onnx")
    alone, shared = executed(made, True, method)[0], executed(made, False, method)[0]
    # Sums in another order: some units in the last place of float32.
    np.testing.assert_allclose(alone, shared, rtol=0, atol=1e-5 * np.abs(shared).max())


def test_the_opening_of_a_network_that_another_runtime_makes_has_one_thread_and_its_queries_have_all():
    assert executed(network("onnx"), True, GroupCam(groups=4))[1] == {"opening": {1}, "queries": {THREADS}}
    assert torch.get_num_threads() == THREADS


@pytest.mark.parametrize(
    ("made", "own_process"),
    [
        (lambda: network("onnx"), False),
        (lambda: network("eager"), True),
        (lambda: network("onnx", Pooled(hidden=True)), True),
    ],
    ids=["others use PyTorch", "PyTorch makes the pass", "more than one layer follows"],
)
def test_else_there_are_as_many_as_before(made, own_process):
    assert executed(made(), own_process)[1]["opening"] == {THREADS}
    assert torch.get_num_threads() == THREADS


def test_there_are_as_many_as_before_after_a_failure():
    with pytest.raises(ZeroDivisionError), one_thread():
        1 / (torch.get_num_threads() - 1)  # one thread is what makes it fail
    assert torch.get_num_threads() == THREADS

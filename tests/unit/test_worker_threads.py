"""PyTorch has one thread beside a runtime with threads of its own, and all of its own where it runs layers itself."""

import threading

import numpy as np
import pytest
import torch
from torch import nn

from camserve.methods import (
    AblationCam,
    EigenCam,
    GradCam,
    GroupCam,
    IntegratedGradCam,
    IntegratedGradients,
    Rise,
    ScoreCam,
)
from camserve.runtimes.onnx import OnnxRuntime
from camserve.runtimes.threads import all_threads, one_thread
from camserve.saliency.masks import Masks
from camserve.types import Item, Preprocessing, Target, Task
from camserve.worker.executor import Executor
from camserve.worker.network import Network
from camserve.worker.tuning import tune

PREPROCESSING = Preprocessing(32, (32, 32), (0.5,) * 3, (0.5,) * 3)
THREADS = 3
ALONE, ALL = {1}, {THREADS}


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    assert torch.get_num_threads() == THREADS
    torch.set_num_threads(before)


@pytest.fixture
def seen(monkeypatch):
    """The numbers of threads that PyTorch had where each of these was called."""
    found = {}

    def watched(name, function):
        def call(*given):
            found.setdefault(name, set()).add(torch.get_num_threads())
            return function(*given)

        return call

    for name, owner, method in (
        ("trunk", OnnxRuntime, "trunk"),
        ("queries", OnnxRuntime, "outputs"),
        ("masks", Masks, "blend"),
        ("layers", nn.Conv2d, "forward"),
        ("layers", nn.Linear, "forward"),
    ):
        monkeypatch.setattr(owner, method, watched(name, getattr(owner, method)))
    return found


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


def executor(runtime: str, module: nn.Module | None = None) -> Executor:
    made = Network((module or Pooled()).eval(), preprocessing=PREPROCESSING)
    tune(made, runtime, 4, None)
    return Executor(made)


def sums(made: Executor, method, layer: str = "", **options) -> np.ndarray:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    task = Task(0, method, 0, method.queries(made.network.info.layer(layer), 1), layer=layer)
    _, outcome = made.answer(Item(pixels, (Target(index=1),), (task,), **options))
    return outcome.partials[0].sums


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (GradCam(), {"trunk": ALONE}),
        (EigenCam(), {"trunk": ALONE}),
        (GroupCam(groups=4), {"trunk": ALONE, "masks": ALONE, "queries": ALONE}),
        (ScoreCam(), {"trunk": ALONE, "masks": ALONE, "queries": ALONE}),
        (Rise(masks=8), {"trunk": ALONE, "queries": ALONE}),
        (IntegratedGradients(steps=2), {"trunk": ALONE, "layers": ALL}),
    ],
    ids=lambda one: getattr(one, "name", ""),
)
def test_of_a_network_that_another_runtime_runs(seen, method, expected):
    made = executor("onnx")
    seen.clear()
    sums(made, method)
    assert seen == expected


def test_the_layers_behind_the_one_explained_are_run_in_all(seen):
    made = executor("onnx", Pooled(hidden=True))
    sums(made, GradCam())  # finds the tail
    seen.clear()
    sums(made, GradCam())
    assert seen == {"trunk": ALONE, "layers": ALL}


class Around(Pooled):
    """A shortcut leads around a normalisation, whose maps are those that are explained, as in a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(16)

    def forward(self, x):
        x = self.features(x)
        return self.head(self.pool((x + self.norm(x)).relu()).flatten(1))


def test_one_pass_in_all_gives_maps_and_gradients_where_a_shortcut_leads_around_the_layer(seen):
    """Its tail would need more than the layer, so that PyTorch has to run everything: another pass would be wasted."""
    made = executor("onnx", Around())
    assert made.network.info.default_layer == "norm"
    expected = sums(executor("eager", Around()), GradCam())
    assert np.abs(expected).max() > 0
    sums(made, GradCam())  # finds that there is no tail
    seen.clear()
    np.testing.assert_allclose(sums(made, GradCam()), expected, atol=1e-6 * np.abs(expected).max())
    assert seen == {"layers": ALL}
    seen.clear()
    sums(made, IntegratedGradCam(steps=2))
    assert seen["layers"] == ALL
    seen.clear()
    sums(made, EigenCam())
    assert seen == {"trunk": ALONE}


def test_so_are_those_of_a_method_that_runs_them_again(seen):
    made = executor("onnx", Pooled(hidden=True))
    sums(made, AblationCam())
    seen.clear()
    sums(made, AblationCam())
    assert seen == {"trunk": ALONE, "layers": ALL}


def test_a_network_that_pytorch_runs_has_all_for_everything(seen):
    made = executor("eager")
    seen.clear()
    sums(made, ScoreCam())
    assert seen == {"masks": ALL, "layers": ALL}


@pytest.mark.parametrize("method", [GradCam(), ScoreCam()])
def test_so_has_one_that_pytorch_runs_because_it_is_asked_to(seen, method):
    """A reproducible item is asked of PyTorch, whatever is faster."""
    made = executor("onnx")
    seen.clear()
    sums(made, method, reproducible=True)
    assert seen["layers"] == ALL
    assert not seen.keys() & {"trunk", "queries"}


@pytest.mark.parametrize("method", [GradCam(), GroupCam(groups=4), EigenCam()])
def test_a_map_is_the_same_for_any_number_of_threads(method):
    several = sums(executor("onnx"), method)
    torch.set_num_threads(1)
    alone = sums(executor("onnx"), method)
    torch.set_num_threads(THREADS)
    # Sums in another order: some units in the last place of float32.
    np.testing.assert_allclose(alone, several, rtol=0, atol=1e-5 * np.abs(several).max())


def test_a_thread_that_begins_meanwhile_has_all():
    """`torch.set_num_threads` would leave it with one for good."""
    found = []
    with one_thread():
        other = threading.Thread(target=lambda: found.append((torch.ones(2) + 1, torch.get_num_threads())[1]))
        other.start()
        other.join()
        assert torch.get_num_threads() == 1
    assert found == [THREADS]


def test_all_are_those_before_the_outermost():
    with one_thread(), one_thread():
        with all_threads():
            assert torch.get_num_threads() == THREADS
            with one_thread():
                assert torch.get_num_threads() == 1
            assert torch.get_num_threads() == THREADS
        assert torch.get_num_threads() == 1


def test_by_themselves_they_change_nothing():
    with all_threads():
        assert torch.get_num_threads() == THREADS


def test_there_are_as_many_as_before_after_a_failure():
    with pytest.raises(ZeroDivisionError), one_thread():
        1 / (torch.get_num_threads() - 1)  # one thread is what makes it fail
    assert torch.get_num_threads() == THREADS
    with pytest.raises(ZeroDivisionError), one_thread(), all_threads():
        1 / (torch.get_num_threads() - THREADS)
    assert torch.get_num_threads() == THREADS

"""Runtimes: ONNX Runtime computes what PyTorch does or is not used, and what is used was measured."""

import json
import logging
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from asked import asked
from reference.test_attention_against_twins import PREPROCESSING as SQUARE
from reference.test_attention_against_twins import transformer
from torch import nn
from torch.nn import functional as F

from camserve import Engine
from camserve.errors import InvalidInput, InvalidOption, NotFound, Unsupported
from camserve.methods import (
    METHODS,
    DRise,
    IntegratedGradients,
    IsCam,
    Rise,
    SmoothGrad,
    SmoothGradCamPlusPlus,
    SsCam,
    Xrai,
)
from camserve.runtimes import precision
from camserve.runtimes.choice import (
    EQUAL,
    RUNTIMES,
    SAME,
    SHORT_S,
    WORSE,
    Measured,
    choose,
    fast_runtime,
    fastest,
    largest_difference,
    measure,
    runtime_name,
)
from camserve.runtimes.kept import Kept, cache_folder
from camserve.runtimes.onnx import OnnxRuntime, exported
from camserve.runtimes.precision import Auto, auto_precision, rank_correlation
from camserve.saliency.layers import survey
from camserve.saliency.locality import pictures
from camserve.types import Item, Preprocessing, Target, Task
from camserve.worker.executor import Executor
from camserve.worker.network import Network
from camserve.worker.tuning import tune

PREPROCESSING = Preprocessing(resize_px=64, crop_px=tiny.TINY_SIZE, mean=(0.5,) * 3, std=(0.25,) * 3)
QUICK = {  # fewer queries than the default of methods that would take long
    "rise": Rise(masks=20, grid=4),
    "d_rise": DRise(masks=20, grid=4),
    "ss_cam": SsCam(samples=3),
    "is_cam": IsCam(samples=3),
    "smooth_grad": SmoothGrad(samples=3),
    "smooth_grad_cam_plus_plus": SmoothGradCamPlusPlus(samples=3),
    "integrated_gradients": IntegratedGradients(steps=4),
    "xrai": Xrai(steps=4),
    "group_cam": ("group_cam", {"groups": 4}),
}


class Convs(nn.Module):
    """Two convolutions, a shortcut, a functional ReLU; global average pooling and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Conv2d(3, 8, 3, stride=4, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 6)

    def forward(self, x):
        x = self.first(x)
        x = F.relu(x + self.norm(self.second(x)))
        return self.head(x.mean(dim=(2, 3)))


class TwoViews(nn.Module):
    """One layer that runs on two views of the picture."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.features = nn.Sequential(nn.Conv2d(3, 6, 3, stride=4, padding=1), nn.ReLU())
        self.head = nn.Linear(6, 6)

    def forward(self, x):
        return self.head(self.features(x).mean(dim=(2, 3)) + self.features(x * 0.5).mean(dim=(2, 3)))


NETWORKS = {
    "tiny": (tiny.tiny_module, PREPROCESSING),
    "convolutions": (Convs, PREPROCESSING),
    "two views": (TwoViews, PREPROCESSING),
    "transformer": (lambda: transformer().float(), SQUARE),
}


def tuned(name: str) -> tuple[Engine, Engine]:
    """The same network, run by PyTorch and by ONNX Runtime."""
    build, preprocessing = NETWORKS[name]
    return tuple(Engine(build().eval(), preprocessing=preprocessing, runtime=runtime) for runtime in ("eager", "onnx"))


def site_and_pictures(module: nn.Module):
    found = survey(module, torch.zeros(1, 3, *tiny.TINY_SIZE))
    (site,) = (each for each in found.layers if each.layer.name == found.default)
    return site, pictures(torch.zeros(1, 3, *tiny.TINY_SIZE))


def maps_or_refusal(engine: Engine, image: np.ndarray, method) -> list[np.ndarray] | str:
    try:
        return [each.array for each in engine.explain(image, [method], [2]).maps]
    except Unsupported as refused:
        return str(refused)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_method_has_the_same_map_in_either_runtime(name):
    """Rounding of float32 in another order: 1e-4 of maps in [0, 1], as shards and micro-batches may differ."""
    eager, onnx = tuned(name)
    assert (eager.info.runtime.name, onnx.info.runtime.name) == ("eager", "onnx")
    height, width = eager.info.input_size
    image = tiny.pixels(1, (height, width))
    served = 0
    for method in METHODS:
        ours, theirs = (maps_or_refusal(engine, image, QUICK.get(method, method)) for engine in (eager, onnx))
        if isinstance(ours, str):
            assert theirs == ours
            continue
        for expected, found in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-4, err_msg=method)
        served += 1
    assert served >= 15


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("images", [1, 2, 5])
def test_what_a_pass_leaves_is_the_same_for_any_number_of_images(name, images):
    """Activations, logits, and the gradients of the tail that PyTorch runs behind them."""
    eager, onnx = (engine.network for engine in tuned(name))
    x = torch.randn(images, 3, *eager.info.input_size, generator=torch.Generator().manual_seed(images))
    for layer in (each.name for each in eager.info.layers):  # those that are not the default one as well
        with eager.evaluating(), onnx.evaluating():
            expected, found = eager.capture(x, layer), onnx.capture(x, layer)
            ours, theirs = expected.gradients(asked([1, 4])), found.gradients(asked([1, 4]))
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.activations, expected.activations, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-5 * float(ours.abs().max()))


def test_a_network_is_left_as_it_was_found():
    module = tiny.tiny_module()
    module[1].train()  # as somebody may have left it
    modes = [child.training for child in module.modules()]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    Engine(module, preprocessing=PREPROCESSING, runtime="onnx")
    assert [child.training for child in module.modules()] == modes
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())
    assert all(weight.requires_grad for weight in module.parameters())
    assert torch.backends.mha.get_fastpath_enabled() == fast_path


class Decides(Convs):
    def forward(self, x):
        out = super().forward(x)
        return out if x.mean() > -100 else -out


class Counts(Convs):
    """The number of pictures that it was traced with would be in the graph."""

    def forward(self, x):
        return super().forward(x) * torch.ones(int(x.shape[0]), 6)


class OtherwiseInTracing(Convs):
    def forward(self, x):
        return super().forward(x) * (1.01 if torch.jit.is_tracing() else 1.0)


class OtherActivationsInTracing(Convs):
    def forward(self, x):
        x = self.first(x)
        x = F.relu(x + self.norm(self.second(x))) + (0.1 if torch.jit.is_tracing() else 0.0)
        return self.head(x.mean(dim=(2, 3)) - (0.1 if torch.jit.is_tracing() else 0.0))


class NoOperator(Convs):
    def forward(self, x):
        return super().forward(x) + torch.special.bessel_j0(x).mean(dim=(1, 2, 3))[:, None]


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (Decides, "decides by numbers"),
        (Counts, "ONNX Runtime"),
        (OtherwiseInTracing, "outputs differ"),
        (NoOperator, "no ONNX graph"),
        (lambda: Convs().double(), "float64"),
    ],
    ids=["decides", "counts", "otherwise", "no operator", "float64"],
)
def test_a_network_whose_graph_is_another_one_stays_with_pytorch_and_says_so(build, reason, caplog):
    with caplog.at_level(logging.WARNING):
        engine = Engine(build().eval(), preprocessing=PREPROCESSING, runtime="auto")
    assert engine.info.runtime.name == "eager"
    assert reason in engine.info.runtime.reason
    assert engine.explain(tiny.pixels(1), ["score_cam"]).cost.runtime == "eager"
    with pytest.raises(Unsupported, match=reason):
        Engine(build().eval(), preprocessing=PREPROCESSING, runtime="onnx")


def test_activations_are_checked_beside_the_outputs():
    """Outputs alone would not tell: what the layer makes is another thing while the graph is made."""

    def shift():
        return 0.2 if torch.jit.is_tracing() else 0.0

    class Last(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) + shift()

    class Shifted(Convs):
        def __init__(self) -> None:
            super().__init__()
            self.last = Last(8, 8, 1)

        def forward(self, x):
            x = F.relu(self.norm(self.second(self.first(x))))
            return self.head((self.last(x) - shift()).mean(dim=(2, 3)))

    module = Shifted().eval()
    site, images = site_and_pictures(module)
    assert site.layer.name == "last"
    with torch.no_grad(), pytest.raises(Unsupported, match="activations of last differ"):
        fast_runtime(module, site, images, 1)


def test_pictures_that_change_each_others_scores_are_left_to_pytorch():
    class Together(Convs):
        def forward(self, x):
            return super().forward(x - x.mean(dim=0, keepdim=True))

    engine = Engine(Together().eval(), preprocessing=PREPROCESSING, runtime="auto")
    assert (engine.info.runtime.name, engine.info.runtime.micro_batch) == ("eager", 1)
    assert "change each other" in engine.info.runtime.reason


def test_a_graph_has_any_number_of_images_and_no_path_of_this_machine():
    module = Convs().eval()
    site, images = site_and_pictures(module)
    graph = exported(module, site, images)
    assert b"/site-packages/" not in graph
    assert str(__file__).encode() not in graph


def test_where_memory_runs_out_passes_get_smaller(monkeypatch):
    import onnxruntime

    class Small(onnxruntime.InferenceSession):
        def run(self, names, given, *rest):
            if len(given["images"]) > 2:
                raise onnxruntime.capi.onnxruntime_pybind11_state.RuntimeException(
                    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory for requested buffer"
                )
            return super().run(names, given, *rest)

    expected = Engine(Convs().eval(), preprocessing=PREPROCESSING).explain(tiny.pixels(2), ["score_cam"])
    engine = Engine(Convs().eval(), preprocessing=PREPROCESSING, runtime="onnx", micro_batch=8)
    session = Small(exported(*_exportable()), providers=["CPUExecutionProvider"])
    monkeypatch.setattr(engine.network.runtime, "_session", session)
    found = engine.explain(tiny.pixels(2), ["score_cam"])
    np.testing.assert_allclose(found.maps[0].array, expected.maps[0].array, atol=1e-4)
    assert found.cost.micro_batch == 2


class Counting(Convs):
    """Keeps how many images each of its passes had, and has no memory for more than some of them."""

    def __init__(self) -> None:
        super().__init__()
        self.passes, self.most = [], 100

    def forward(self, x):
        self.passes.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError("no more memory")
        return super().forward(x)


STEPS = ("integrated_gradients", {"steps": 9})


def onnx_of(module: nn.Module, micro_batch: int) -> Engine:
    """An engine whose measurements have told it to ask so many masked queries in a pass of ONNX Runtime."""
    engine = Engine(module.eval(), preprocessing=PREPROCESSING, runtime="onnx")
    network = engine.network
    network.adopt(network.runtime, replace(network.info.runtime, micro_batch=micro_batch))
    engine._executor = Executor(network)
    module.passes.clear()
    return engine


def test_what_pytorch_runs_has_passes_of_pytorchs_size():
    module = Counting()
    onnx_of(module, micro_batch=1).explain(tiny.pixels(2), [STEPS])
    assert module.passes == [4, 4, 1]


def test_a_micro_batch_that_is_named_holds_for_what_pytorch_runs():
    module = Counting().eval()
    engine = Engine(module, preprocessing=PREPROCESSING, runtime="onnx", micro_batch=3)
    module.passes.clear()
    engine.explain(tiny.pixels(2), [STEPS])
    assert module.passes == [3, 3, 3]


def test_passes_of_a_certain_size_are_those_of_the_device_whatever_the_runtime():
    module = Counting()
    engine = onnx_of(module, micro_batch=2)
    item = Item(tiny.pixels(2), (Target(2),), (Task(0, IntegratedGradients(steps=9), 0, 9),), reproducible=True)
    engine._executor.answer(item)
    assert max(module.passes) == engine.network.reproducible_pass == 4


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_where_memory_runs_out_pytorchs_passes_get_smaller_too(micro_batch):
    module = Counting()
    engine = onnx_of(module, micro_batch)
    expected = engine.explain(tiny.pixels(2), [STEPS])
    module.passes.clear()
    module.most = 1
    found = engine.explain(tiny.pixels(2), [STEPS])
    assert module.passes == [4] + [1] * 9
    np.testing.assert_allclose(found.maps[0].array, expected.maps[0].array, atol=1e-4)


def _exportable():
    module = Convs().eval()
    return module, *site_and_pictures(module)


# Choosing: a clock that runs as runtimes say, which the chooser does not know.


class Timed:
    """A runtime that takes what it is told, on a clock of its own."""

    memory_format = torch.contiguous_format
    own_threads = False

    def __init__(self, name: str, world: SimpleNamespace, seconds, first: float = 0.0) -> None:
        self.name, self._world, self._seconds, self._first, self.asked = name, world, seconds, first, []

    def outputs(self, x):
        self._world.now += self._seconds(len(x)) + (0 if self.asked else self._first)
        self.asked.append(len(x))
        return torch.zeros(len(x), 2)


def world():
    found = SimpleNamespace(now=100.0)
    found.clock = lambda: found.now
    return found


IMAGE = torch.zeros(1, 3, 8, 8)


def test_a_first_pass_that_sets_things_up_does_not_count():
    on = world()
    runtime = Timed("slow to start", on, lambda size: 0.01 * size, first=5.0)
    (only,) = measure(runtime, IMAGE, (4,), 60, on.clock)
    assert only == Measured("slow to start", 4, pytest.approx(0.01))


def test_the_masks_of_each_pass_are_blended_within_its_time():
    """A runtime whose own threads wait for PyTorch's is judged by what it does beside them."""
    on, seen = world(), []

    class Watching(Timed):
        def outputs(self, x):
            seen.append(x)
            return super().outputs(x)

    (only,) = measure(Watching("r", on, lambda size: 0.01), torch.ones(1, 3, 8, 8), (4,), 60, on.clock)
    assert only.seconds == pytest.approx(0.01 / 4)
    assert len({x.data_ptr() for x in seen}) == len(seen) >= 4
    assert all(x.shape == (4, 3, 8, 8) and len(x.flatten(1).unique(dim=0)) == 4 for x in seen)


@pytest.mark.parametrize(("own_threads", "expected"), [(True, 1), (False, 3)])
def test_pytorch_has_the_threads_that_it_has_when_queries_are_asked(own_threads, expected):
    on, seen = world(), set()

    class Watching(Timed):
        def outputs(self, x):
            seen.add(torch.get_num_threads())
            return super().outputs(x)

    runtime = Watching("r", on, lambda size: 0.01)
    runtime.own_threads, before = own_threads, torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        list(measure(runtime, IMAGE, (1, 2), 60, on.clock))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert seen == {expected}


def test_larger_passes_are_tried_as_long_as_they_pay():
    on = world()
    per_query = {1: 0.010, 2: 0.010 * (EQUAL + WORSE) / 2, 4: 0.006, 8: 0.006 * WORSE * 1.01, 16: 0.001}
    runtime = Timed("r", on, lambda size: per_query[size] * size)
    assert [one.micro_batch for one in measure(runtime, IMAGE, (1, 2, 4, 8, 16), 60, on.clock)] == [1, 2, 4, 8]
    assert fastest([Measured("r", size, seconds) for size, seconds in per_query.items() if size < 16]).micro_batch == 4


def test_of_sizes_that_are_about_as_fast_the_smallest_is_taken_but_not_another_runtime():
    measured = [
        Measured("fast", 2, 0.0100 * EQUAL),
        Measured("fast", 8, 0.0100),
        Measured("fast", 1, 0.0120),
        Measured("slow", 1, 0.0101),
    ]
    assert fastest(measured) == measured[0]


@pytest.mark.parametrize(("pass_s", "size"), [(SHORT_S, 4), (1.9 * SHORT_S, 2), (2.5 * SHORT_S, 2)])
def test_of_sizes_whose_passes_are_short_the_fastest_is_taken(pass_s, size):
    """Given how long a pass of 4 takes: short, not short beside one of 2 that is, and none is short."""
    query_s = pass_s / 4
    measured = [Measured("r", each, query_s * slower) for each, slower in {2: EQUAL, 4: 1.0, 8: 1.0, 1: 1.1}.items()]
    assert fastest(measured).micro_batch == size


@pytest.mark.parametrize("seconds", [0.001, 0.4, 3.0, 30.0])
def test_measuring_ends_in_its_time_or_with_the_first_pass(seconds):
    on = world()
    runtime = Timed("r", on, lambda size: seconds * size)
    found = list(measure(runtime, IMAGE, (1, 2, 4, 8, 16), 10, on.clock))
    assert found
    assert on.now - 100 <= max(10 + 16 * seconds, seconds)
    if seconds >= 3:
        assert runtime.asked == [1] * len(runtime.asked)


def choice(tmp_path, wanted="auto", micro_batch=None, weights="w", module=None, threads=1):
    module = module or Convs().eval()
    site, images = site_and_pictures(module)
    kept = Kept(tmp_path, weights, site.layer.name, threads)
    with torch.no_grad():
        return choose(module, site, images, wanted, threads, micro_batch, kept), kept


def test_what_was_measured_is_not_measured_again(tmp_path, monkeypatch):
    first, _ = choice(tmp_path)
    assert list(tmp_path.iterdir())
    monkeypatch.setattr("camserve.runtimes.choice.measure", lambda *_: pytest.fail("measured again"))
    again, _ = choice(tmp_path)
    assert (again.runtime.name, again.micro_batch, again.seconds) == (
        first.runtime.name,
        first.micro_batch,
        first.seconds,
    )


@pytest.mark.parametrize("other", [{"weights": "v"}, {"threads": 2}])
def test_other_weights_and_threads_are_measured_for_themselves(tmp_path, monkeypatch, other):
    choice(tmp_path)
    asked_sizes = []

    def noted(runtime, image, sizes, *rest):
        asked_sizes.append(sizes)
        return measure(runtime, image, sizes, *rest)

    monkeypatch.setattr("camserve.runtimes.choice.measure", noted)
    choice(tmp_path, **other)
    assert asked_sizes


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b'{"exact": 3}', b'{"exact": {"runtime": "onnx", "micro_batch": 0, "seconds": 1}}', b"\xff{"],
)
def test_a_broken_file_of_measurements_is_measured_anew(tmp_path, content):
    choice(tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(content)
    found, kept = choice(tmp_path)
    assert found.micro_batch >= 1
    assert Measured.read(kept.read()["exact"]) is not None


def test_a_runtime_that_is_kept_but_is_there_no_more_is_chosen_anew(tmp_path):
    _, kept = choice(tmp_path)
    kept.write(exact={"runtime": "openvino", "micro_batch": 4, "seconds": 0.001})
    found, _ = choice(tmp_path)
    assert found.runtime.name in ("eager", "onnx")


def test_a_folder_that_cannot_be_written_keeps_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    found, kept = choice(tmp_path / "file" / "folder")
    assert found.micro_batch >= 1
    assert kept.read() == {}


def test_a_micro_batch_that_is_named_is_kept_to(tmp_path):
    found, _ = choice(tmp_path, micro_batch=3)
    assert found.micro_batch == 3
    assert not list(tmp_path.iterdir())  # measured at that size alone: nobody else's measurement


def test_the_environment_says_which_runtime(monkeypatch, tmp_path):
    assert [runtime_name(name) for name in ("", *RUNTIMES)] == ["auto", *RUNTIMES]
    with pytest.raises(InvalidOption, match="one of auto, eager, onnx, compiled, cuda_graphs, got 'onxx'"):
        runtime_name("onxx")
    monkeypatch.setenv("CAMSERVE_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path


def test_a_user_without_a_home_keeps_nothing(monkeypatch):
    for name in ("CAMSERVE_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 2**31 - 7)  # a number that the list of users does not have
    assert cache_folder() is None


def test_differences_are_measured_by_the_spread():
    expected = torch.tensor([[1000.0, 1001.0], [1002.0, 1003.0]])
    assert largest_difference(expected, expected + 0.01) > SAME
    assert largest_difference(expected * 1e-3, expected * 1e-3 + 1e-8) < SAME
    assert largest_difference(torch.ones(2, 2), torch.ones(2, 2)) == 0
    assert largest_difference(torch.ones(2, 2), torch.ones(2, 2) + 1e-3) == float("inf")
    assert not largest_difference(expected, expected * float("nan")) <= SAME
    assert largest_difference(expected, expected[:1]) == float("inf")


# Precision.


def test_auto_is_bfloat16_only_where_it_is_faster_and_ranks_places_alike():
    rng = np.random.default_rng(0)
    exact = rng.random((7, 7))
    near, far = exact + 1e-3 * rng.random((7, 7)), exact + 0.5 * rng.random((7, 7))
    assert auto_precision(1.0, 0.5, lambda: [(exact, near)]) == Auto("bfloat16")
    assert auto_precision(1.0, 0.95, lambda: pytest.fail("not faster")).precision == "exact"
    slower = auto_precision(1.0, 20.0, lambda: pytest.fail("slower"))
    assert (slower.precision, slower.reason) == ("exact", "bfloat16 takes 20.00 times as long as float32")
    assert "rank correlation 0." in auto_precision(1.0, 0.5, lambda: [(exact, near), (exact, far)]).reason
    assert "no calibration images" in auto_precision(1.0, 0.5, list).reason
    assert auto_precision(1.0, 0.5, lambda: [(exact, np.full((7, 7), np.nan))]).precision == "exact"


def test_rank_correlation_is_spearmans():
    from scipy.stats import spearmanr

    rng = np.random.default_rng(1)
    first, second = rng.integers(0, 5, (6, 6)), rng.integers(0, 5, (6, 6))
    assert rank_correlation(first, second) == pytest.approx(spearmanr(first.ravel(), second.ravel()).statistic)
    assert rank_correlation(first, np.zeros((6, 6))) == 0


def test_bfloat16_is_refused_where_there_are_no_instructions(monkeypatch, tmp_path):
    """As on a processor with AVX2 and nothing newer."""
    (tmp_path / "cpuinfo").write_text("model name\t: AMD EPYC\nflags\t\t: fpu sse2 avx2 fma\n")
    monkeypatch.setattr(precision, "CPU", tmp_path / "cpuinfo")
    engine = Engine(Convs().eval(), preprocessing=PREPROCESSING, runtime="onnx")
    with pytest.raises(Unsupported, match=r"bfloat16 is not served: the processor .* no bfloat16 instructions; exact"):
        engine.explain(tiny.pixels(1), ["score_cam"], precision="bfloat16")
    found = engine.explain(tiny.pixels(1), ["score_cam"], precision="auto")
    assert (found.cost.precision, found.cost.runtime) == ("exact", "onnx")
    assert "no bfloat16 instructions" in engine.info.runtime.reason


@pytest.mark.parametrize(("flags", "has"), [("avx512f avx512_bf16", True), ("avx512f avx512bw", False), ("", False)])
def test_instructions_are_those_of_the_processor(monkeypatch, tmp_path, flags, has):
    (tmp_path / "cpuinfo").write_text(f"flags\t\t: fpu {flags}\n")
    monkeypatch.setattr(precision, "CPU", tmp_path / "cpuinfo")
    assert (precision.why_no_bfloat16(torch.device("cpu")) == "") is has


def test_calibration_maps_of_bfloat16_are_compared_with_those_of_float32(monkeypatch, tmp_path):
    """A network whose maps bfloat16 ruins is asked in float32, another one in bfloat16, where that is faster."""
    (tmp_path / "cpuinfo").write_text("flags\t\t: avx512_bf16\n")
    monkeypatch.setattr(precision, "CPU", tmp_path / "cpuinfo")
    monkeypatch.setattr("camserve.worker.tuning.fastest", lambda measured: Measured("eager", 2, 1e-12))

    class Fragile(Convs):
        """What tells one query from another is lost in bfloat16."""

        def forward(self, x):
            out = super().forward(x)
            return (
                out + 1000 * torch.ones(8, 6).T.mean() + 0 * out
                if not torch.is_autocast_enabled("cpu")
                else out.round()
            )

    images = [tiny.pixels(seed) for seed in range(2)]
    for build, expected in ((Convs, "bfloat16"), (Fragile, "exact")):
        network = Network(build().eval(), preprocessing=PREPROCESSING)
        tune(network, "auto", calibration=images)
        assert network.info.runtime.precision == expected, network.info.runtime


def test_what_calibration_images_told_is_kept_for_these_images_alone(monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text("flags\t\t: avx512_bf16\n")
    monkeypatch.setattr(precision, "CPU", tmp_path / "cpuinfo")
    monkeypatch.setattr("camserve.worker.tuning.fastest", lambda measured: Measured("eager", 2, 1e-12))
    asked = []

    def noted(*given):
        asked.append(given)
        return auto_precision(*given)

    monkeypatch.setattr("camserve.worker.tuning.auto_precision", noted)
    images = [tiny.pixels(seed) for seed in range(3)]
    for calibration, times in ((images[:2], 1), (images[:2], 1), (images[1:], 2), (images[1:], 2)):
        network = Network(Convs().eval(), preprocessing=PREPROCESSING, weights="w")
        tune(network, "auto", folder=tmp_path / "kept", calibration=calibration)
        assert (len(asked), network.info.runtime.precision) == (times, "bfloat16")


def test_calibration_ends_in_its_time_but_looks_at_one_image(monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text("flags\t\t: avx512_bf16\n")
    monkeypatch.setattr(precision, "CPU", tmp_path / "cpuinfo")
    monkeypatch.setattr("camserve.worker.tuning.fastest", lambda measured: Measured("eager", 2, 1e-12))
    monkeypatch.setattr("camserve.worker.tuning.BUDGET_S", -1.0)
    told = []
    monkeypatch.setattr(
        "camserve.worker.tuning.auto_precision", lambda _s, _b, maps: told.extend(maps()) or Auto("exact", "")
    )
    network = Network(Convs().eval(), preprocessing=PREPROCESSING)
    tune(network, "auto", calibration=[tiny.pixels(seed) for seed in range(3)])
    assert len(told) == 2  # a Group-CAM and a Score-CAM of the first image


def test_devices_are_measured_for_themselves(tmp_path):
    on_cpu = Kept(tmp_path, "w", "layer", 1)
    on_cpu.write(auto=1)
    assert Kept(tmp_path, "w", "layer", 1, torch.device("meta")).read() == {}


def test_a_forward_that_cannot_be_watched_is_left_to_pytorch():
    class Unwatched(Convs):
        def forward(self, x):
            if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
                raise RuntimeError("not under a mode")
            return super().forward(x)

    engine = Engine(Unwatched().eval(), preprocessing=PREPROCESSING, runtime="auto")
    assert engine.info.runtime.name == "eager"
    assert "cannot be watched: RuntimeError: not under a mode" in engine.info.runtime.reason


def test_answers_say_what_computed_them():
    _, onnx = tuned("convolutions")
    cost = onnx.explain(tiny.pixels(1), ["score_cam"]).cost
    assert (cost.runtime, cost.precision, cost.micro_batch) == ("onnx", "exact", onnx.info.runtime.micro_batch)


def test_kept_values_of_both_kinds_live_in_one_file(tmp_path):
    kept = Kept(tmp_path, "w", "layer", 1)
    kept.write(exact=1)
    kept.write(auto=2)
    assert kept.read() == {"exact": 1, "auto": 2}
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text()) == {"exact": 1, "auto": 2}
    assert Kept(tmp_path, "", "layer", 1).read() == {}
    assert Kept(None, "w", "layer", 1).read() == {}
    assert OnnxRuntime.name in file.name or file.name.startswith("runtime-")


def test_calibration_images_travel_in_the_archive_as_the_network_sees_them(tmp_path):
    from PIL import Image

    from camserve.archive import build_archive
    from camserve.archive.calibration import read_calibration

    (tmp_path / "photos").mkdir()
    for seed in range(2):
        Image.fromarray(tiny.pixels(seed, (120, 160))).save(tmp_path / "photos" / f"{seed}.png")
    path = build_archive("digits", store=tmp_path, calibration=tmp_path / "photos")
    found = read_calibration(path)
    assert [image.shape for image in found] == [(96, 96, 3)] * 2
    assert not np.array_equal(*found)
    assert read_calibration(build_archive("digits", name="plain", store=tmp_path)) == []


def test_calibration_images_that_are_none_are_refused(tmp_path):
    from camserve.archive.calibration import calibration_images

    with pytest.raises(NotFound, match="no calibration images"):
        calibration_images(tmp_path / "nowhere", PREPROCESSING)
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(InvalidInput):
        calibration_images(tmp_path, PREPROCESSING)
    for index in range(17):
        (tmp_path / f"{index}.png").write_bytes(tiny.png(tiny.pixels(index)))
    with pytest.raises(InvalidOption, match="at most 16 calibration images"):
        calibration_images(tmp_path, PREPROCESSING)

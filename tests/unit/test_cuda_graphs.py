"""CUDA graphs, all but CUDA: a twin on the CPU keeps its tensors where they are, as graphs do, and runs anew."""

from __future__ import annotations

import gc
import logging
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import tiny
import torch
from test_runtimes import NETWORKS, PREPROCESSING, QUICK, Convs, Timed, maps_or_refusal, site_and_pictures, world
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from camserve import Engine
from camserve.errors import Unsupported
from camserve.methods import METHODS
from camserve.queries.pack import ask
from camserve.runtimes import choice, cuda_graphs, precision
from camserve.runtimes.choice import Measured, choose, measure
from camserve.runtimes.cuda_graphs import Captured, CudaGraphs, bucket
from camserve.runtimes.kept import Kept
from camserve.runtimes.precision import Auto
from camserve.saliency.capture import maps_of
from camserve.worker import executor
from camserve.worker.network import Network
from camserve.worker.tuning import tune


class Twin:
    """Captures as CUDA does: results stay where they are, and graphs of one memory spoil those of one another."""

    def __init__(self, device: torch.device) -> None:
        self.made: list[weakref.ref[Captured]] = []
        self.replayed: list[int] = []
        self.inside = 0
        self.memory = 2**30
        """Most images of a graph for which there is memory."""

    def __call__(self, function, images):
        if len(images) > self.memory:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        results = [each.clone() for each in function(images)]

        def replay():
            assert self.inside == 1, "replayed out of turn"
            self.replayed.append(len(images))
            for other in self.held():
                for each in other.results:
                    each.fill_(float("nan"))
            for kept, made in zip(results, function(images), strict=True):
                kept.copy_(made)

        captured = Captured(images, results, replay)
        self.made.append(weakref.ref(captured))
        return captured

    def held(self) -> list[Captured]:
        return [found for each in self.made if (found := each()) is not None]

    @contextmanager
    def in_turn(self):
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1


class Twins:
    """Makes twins, and remembers them."""

    def __init__(self, make=Twin) -> None:
        self.made: list[Twin] = []
        self._make = make

    def __call__(self, device):
        self.made.append(self._make(device))
        return self.made[-1]

    @property
    def sizes(self) -> list[int]:
        """Sizes of the graphs that are held anywhere."""
        gc.collect()  # a twin's replay refers to the runtime, which refers to it
        return [len(graph.images) for twin in self.made for graph in twin.held()]

    @property
    def replayed(self) -> list[int]:
        return [size for twin in self.made for size in twin.replayed]


def graphs_of(module: nn.Module, twins: Twins | None = None, **options) -> CudaGraphs:
    site, images = site_and_pictures(module)
    return CudaGraphs(module, site, images[:1], capture=twins or Twins(), **options)


def batch(images: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(images, 3, *tiny.TINY_SIZE, generator=torch.Generator().manual_seed(100 * seed + images))


@pytest.fixture
def on_cpu(monkeypatch) -> Twins:
    """CUDA graphs are what is fast on the CPU."""
    twins = Twins()
    monkeypatch.setitem(choice.FAST, "cpu", CudaGraphs.name)
    monkeypatch.setattr(cuda_graphs, "CudaCapture", twins)
    monkeypatch.setitem(choice.SIZES, "cpu", (1, 2, 4, 8))
    monkeypatch.setattr(Kept, "read", lambda self: {})
    return twins


def test_buckets_are_the_powers_of_two_that_hold_the_images():
    assert [bucket(size) for size in (0, 1, 2, 3, 4, 5, 8, 9, 128, 129, 256)] == [
        1, 1, 2, 4, 4, 8, 8, 16, 128, 256, 256,
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["convolutions", "two views"])
@pytest.mark.parametrize("prepared", [None, 1, 4])
def test_passes_of_any_size_are_pytorchs_and_stay_so_after_others(name, prepared):
    """What a graph made is another tensor than the one that the next replay overwrites."""
    module = NETWORKS[name][0]().eval()
    graphs = graphs_of(module)
    if prepared:
        assert graphs.prepare(prepared) == prepared
    asked = [batch(size, seed) for seed, size in enumerate((3, 1, 4, 2, 9, 3, 0, 5))]
    with torch.no_grad():
        outputs, trunks = [graphs.outputs(x) for x in asked], [graphs.trunk(x) for x in asked]
        for x, ours, (theirs, raw) in zip(asked, outputs, trunks, strict=True):
            expected = module(x)
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)  # rounding of other sizes of a pass
            torch.testing.assert_close(theirs, expected, rtol=1e-4, atol=1e-5)
            assert {len(each) for each in raw} == {len(x)}


def test_a_pass_is_made_by_the_smallest_graph_that_holds_it():
    twins = Twins()
    graphs = graphs_of(Convs().eval(), twins)
    graphs.prepare(8)
    twins.made[-1].replayed.clear()
    for size in (1, 2, 3, 5, 8, 11):
        graphs.outputs(batch(size))
    assert twins.made[-1].replayed == [1, 2, 4, 8, 8, 8, 4]
    assert graphs.sizes == (1, 2, 4, 8)


def test_what_fills_a_pass_is_zeros_and_not_what_was_there_before():
    class Together(Convs):
        def forward(self, x):
            return super().forward(x) + x.sum()

    module = Together().eval()
    graphs = graphs_of(module)
    graphs.prepare(4)
    with torch.no_grad():
        graphs.outputs(batch(4) + 100)
        torch.testing.assert_close(graphs.outputs(batch(3)), module(batch(3)), rtol=1e-3, atol=1e-2)


def test_the_image_that_it_was_made_with_stays_as_it_is():
    module = Convs().eval()
    site, images = site_and_pictures(module)
    image = images[:1].contiguous(memory_format=torch.channels_last)
    before = image.clone()
    graphs = CudaGraphs(module, site, image, capture=Twins())
    graphs.outputs(batch(1))
    torch.testing.assert_close(image, before, rtol=0, atol=0)


@pytest.mark.parametrize("captured_in_inference_mode", [True, False])
def test_it_runs_in_and_out_of_inference_mode_and_leaves_no_graph_of_gradients(captured_in_inference_mode):
    module = Convs().eval()
    graphs = graphs_of(module)
    with torch.inference_mode(captured_in_inference_mode):
        graphs.prepare(2)
        graphs.outputs(batch(2))
    x = batch(2).requires_grad_()
    outputs, raw = graphs.trunk(x)
    assert not outputs.requires_grad
    assert not outputs.is_inference()
    assert not raw[0].requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(graphs.outputs(x), outputs, rtol=0, atol=0)


def test_threads_do_not_meet_in_a_graph():
    class Slow(Twin):
        def __call__(self, function, images):
            captured = super().__call__(function, images)

            def replay():
                captured.replay()
                time.sleep(0.01)  # long enough for another thread to write into the input

            return Captured(captured.images, captured.results, replay)

        def held(self):
            return []

    module = Convs().eval()
    graphs = graphs_of(module, Twins(Slow))
    graphs.prepare(4)
    asked, start = [batch(1 + seed % 4, seed) for seed in range(16)], threading.Barrier(8)

    def work(x):
        start.wait()
        return graphs.outputs(x)

    with torch.no_grad(), ThreadPoolExecutor(8) as pool:
        for x, found in zip(asked, pool.map(work, asked), strict=True):
            torch.testing.assert_close(found, module(x), rtol=1e-4, atol=1e-5)


def test_until_it_is_prepared_one_graph_is_held_and_then_all():
    twins = Twins()
    graphs = graphs_of(Convs().eval(), twins)
    for size in (1, 2, 4, 4, 16):
        graphs.outputs(batch(size))
        assert twins.sizes == [size]
    graphs.prepare(6)
    assert twins.sizes == [8, 4, 2, 1]  # the largest first, whose memory the others can use
    captured = len(twins.made)
    assert graphs.prepare(5) == 5  # the same graphs
    assert len(twins.made) == captured


@pytest.mark.parametrize(("memory", "largest"), [(8, 8), (3, 2), (1, 1)])
def test_memory_that_ends_while_capturing_ends_the_graphs_there(memory, largest):
    class Tight(Twin):
        def __init__(self, device):
            super().__init__(device)
            self.memory = memory

    module, twins = Convs().eval(), Twins(Tight)
    graphs = graphs_of(module, twins)
    assert graphs.prepare(64) == largest
    assert max(twins.sizes) == largest
    with torch.no_grad():
        torch.testing.assert_close(graphs.outputs(batch(11)), module(batch(11)), rtol=1e-4, atol=1e-5)


def test_without_memory_for_one_image_there_is_no_such_runtime():
    class Full(Twin):
        def __init__(self, device):
            super().__init__(device)
            self.memory = 0

    with pytest.raises(Unsupported, match="too little memory for a graph of one image"):
        graphs_of(Convs().eval(), Twins(Full)).prepare(4)


class Draws(Convs):
    def forward(self, x):
        return super().forward(x) + 0 * torch.rand(6)


class Decides(Convs):
    def forward(self, x):
        out = super().forward(x)
        return out if x.mean() > -100 else -out


class Moves(Convs):
    """Numbers that come from another device: while a graph is made, nobody may wait for them."""

    def forward(self, x):
        torch.zeros(3).to("meta")
        return super().forward(x)


@pytest.mark.parametrize(
    ("build", "reason"),
    [(Draws, "draws random numbers"), (Decides, "decides by numbers"), (Moves, "moves numbers from one device")],
)
def test_what_a_graph_would_not_repeat_is_left_to_pytorch(build, reason, on_cpu, caplog):
    with caplog.at_level(logging.WARNING):
        engine = Engine(build().eval(), preprocessing=PREPROCESSING, runtime="auto")
    assert engine.info.runtime.name == "eager"
    assert reason in engine.info.runtime.reason
    assert reason in caplog.text
    assert engine.explain(tiny.pixels(1), ["score_cam"]).cost.runtime == "eager"
    with pytest.raises(Unsupported, match=reason):
        Engine(build().eval(), preprocessing=PREPROCESSING, runtime="cuda_graphs")


def test_a_constant_of_one_number_on_the_cpu_is_no_move():
    class Scales(Convs):
        def forward(self, x):
            return super().forward(x) * torch.ones(())

    assert graphs_of(Scales().eval()).prepare(1) == 1


# Choosing.


@pytest.mark.parametrize("name", ["two views", "transformer"])  # several calls of a layer; tokens
def test_every_method_has_the_same_map_as_in_pytorch(name, on_cpu):
    """Rounding of float32 in another order: 1e-4 of maps in [0, 1], as shards and micro-batches may differ."""
    build, preprocessing = NETWORKS[name]
    eager, graphs = (
        Engine(build().eval(), preprocessing=preprocessing, runtime=runtime) for runtime in ("eager", "cuda_graphs")
    )
    assert graphs.info.runtime.name == "cuda_graphs"
    image = tiny.pixels(1, eager.info.input_size)
    served = 0
    for method in METHODS:
        ours, theirs = (maps_or_refusal(engine, image, QUICK.get(method, method)) for engine in (eager, graphs))
        if isinstance(ours, str):
            assert theirs == ours
            continue
        for expected, found in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-4, err_msg=method)
        served += 1
    assert served >= 15
    assert graphs.explain(image, ["score_cam"]).cost.runtime == "cuda_graphs"


@pytest.mark.parametrize(("build", "replayed"), [(tiny.tiny_module, [1]), (Convs, [])])
def test_a_map_of_gradients_starts_from_a_graph_where_the_layer_has_a_tail(on_cpu, build, replayed):
    """A shortcut leads around the layer of the second network: PyTorch has to run all of it for gradients."""
    engine = Engine(build().eval(), preprocessing=PREPROCESSING, runtime="cuda_graphs")
    before = len(on_cpu.replayed)
    engine.explain(tiny.pixels(1), ["grad_cam"])
    assert on_cpu.replayed[before:] == replayed


def test_graphs_of_the_size_that_measuring_found_are_there_when_it_is_chosen(on_cpu, monkeypatch):
    seconds = {1: 4.0, 2: 3.0, 4: 1.0, 8: 2.0}
    monkeypatch.setattr(
        choice,
        "measure",
        lambda runtime, image, sizes, *_: [
            Measured(runtime.name, size, seconds.get(size, 9.0) / (1 + (runtime.name == "cuda_graphs")))
            for size in sizes
        ],
    )
    engine = Engine(Convs().eval(), preprocessing=PREPROCESSING, runtime="auto")
    runtime = engine.info.runtime
    assert (runtime.name, runtime.micro_batch, on_cpu.sizes) == ("cuda_graphs", 4, [4, 2, 1])


def chosen(tmp_path, module: nn.Module, monkeypatch=None, **options):
    site, images = site_and_pictures(module)
    with torch.no_grad():
        return choose(module, site, images, "auto", 1, options.get("micro_batch"), Kept(tmp_path, "w", "layer", 1))


def test_what_is_kept_is_prepared_and_not_measured(tmp_path, monkeypatch, on_cpu):
    monkeypatch.undo()
    twins = Twins()
    monkeypatch.setitem(choice.FAST, "cpu", CudaGraphs.name)
    monkeypatch.setattr(cuda_graphs, "CudaCapture", twins)
    Kept(tmp_path, "w", "layer", 1).write(exact={"runtime": "cuda_graphs", "micro_batch": 8, "seconds": 0.1})
    measured = []
    monkeypatch.setattr(choice, "measure", lambda *given: measured.append(given[2]) or measure(*given))
    found = chosen(tmp_path, Convs().eval())
    assert (found.runtime.name, found.micro_batch, twins.sizes) == ("cuda_graphs", 8, [8, 4, 2, 1])
    assert measured == [choice.FORMAT_SIZES] * 2  # the memory format, which is not kept


class Wrong(Twin):
    """A graph of one size that computes something else, as one that had lost an operation would."""

    wrong_size, by = 8, 0.01

    def __call__(self, function, images):
        captured = super().__call__(function, images)

        def replay():
            captured.replay()
            if len(images) == self.wrong_size:
                captured.results[-1].add_(self.by)

        return Captured(images, captured.results, replay)


@pytest.mark.parametrize("wrong_size", [1, 2, 8])
def test_a_graph_of_any_size_that_computes_something_else_is_not_used(wrong_size, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(choice.FAST, "cpu", CudaGraphs.name)
    monkeypatch.setattr(cuda_graphs, "CudaCapture", Wrong)
    monkeypatch.setattr(Wrong, "wrong_size", wrong_size)
    Kept(tmp_path, "w", "layer", 1).write(exact={"runtime": "cuda_graphs", "micro_batch": 8, "seconds": 0.1})
    with caplog.at_level(logging.WARNING):
        found = chosen(tmp_path, Convs().eval())
    assert found.runtime.name == "eager"
    assert found.reason.startswith("CUDA graphs: activations of")
    assert "differ from PyTorch's" in caplog.text


@pytest.mark.parametrize("from_size", [1, 4])
def test_a_capture_that_fails_leaves_the_network_to_pytorch(from_size, on_cpu, monkeypatch):
    class Fails(Twin):
        def __call__(self, function, images):
            if len(images) >= from_size:
                raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
            return super().__call__(function, images)

    monkeypatch.setattr(cuda_graphs, "CudaCapture", Fails)
    engine = Engine(Convs().eval(), preprocessing=PREPROCESSING, runtime="auto")
    assert engine.info.runtime.name == "eager"
    assert "operation not permitted when stream is capturing" in engine.info.runtime.reason
    with pytest.raises(Unsupported, match="operation not permitted"):
        Engine(Convs().eval(), preprocessing=PREPROCESSING, runtime="cuda_graphs")


def test_on_a_cpu_there_are_none():
    with pytest.raises(Unsupported, match="CUDA graphs cannot run the network, which is on cpu"):
        Engine(Convs().eval(), preprocessing=PREPROCESSING, runtime="cuda_graphs")


def test_memory_that_ends_while_measuring_ends_the_sizes_there():
    on = world()

    class Tight(Timed):
        def outputs(self, x):
            if len(x) > most:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().outputs(x)

    most = 4
    runtime = Tight("r", on, lambda size: 0.01)
    assert [one.micro_batch for one in measure(runtime, batch(1), (1, 2, 4, 8, 16), 60, on.clock)] == [1, 2, 4]
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        list(measure(runtime, batch(1), (1, 2), 60, on.clock))


def test_where_memory_runs_out_later_passes_get_smaller(on_cpu, monkeypatch):
    expected = Engine(Convs().eval(), preprocessing=PREPROCESSING).explain(tiny.pixels(2), ["score_cam"])
    engine = Engine(Convs().eval(), preprocessing=PREPROCESSING, runtime="cuda_graphs", micro_batch=8)
    outputs = engine.network.runtime.outputs

    def tight(x):
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return outputs(x)

    monkeypatch.setattr(engine.network.runtime, "outputs", tight)
    found = engine.explain(tiny.pixels(2), ["score_cam"])
    np.testing.assert_allclose(found.maps[0].array, expected.maps[0].array, atol=1e-4)
    assert found.cost.micro_batch == 2


# Precision.


def bfloat16_network(monkeypatch, tmp_path, auto: str, **options) -> Network:
    (tmp_path / "cpuinfo").write_text("flags\t\t: avx512_bf16\n")
    monkeypatch.setattr(precision, "CPU", tmp_path / "cpuinfo")
    monkeypatch.setattr(
        "camserve.worker.tuning.auto_precision",
        lambda _seconds, _half, maps: Auto(auto, "" if maps() and auto == "bfloat16" else "not alike"),
    )
    monkeypatch.setattr("camserve.worker.tuning.fastest", lambda measured: Measured("cuda_graphs", 4, 1e-12))
    network = Network(Convs().eval(), preprocessing=PREPROCESSING, weights="w")
    tune(network, "cuda_graphs", calibration=[tiny.pixels(1)], **options)
    return network


def test_auto_asks_in_bfloat16_by_graphs_where_that_is_faster_and_alike(on_cpu, monkeypatch, tmp_path):
    network = bfloat16_network(monkeypatch, tmp_path, "bfloat16")
    half = network.runtime_of("bfloat16")
    assert (network.info.runtime.precision, half.name, half.sizes) == ("bfloat16", "cuda_graphs", (1, 2, 4))
    assert network.info.runtime.micro_batch == max(network.runtime.largest, 4)  # each cuts what is too large for it
    x = batch(3)
    with network.evaluating(), torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            expected = network.module(x).float()
        torch.testing.assert_close(half.outputs(x), expected, rtol=1e-2, atol=1e-2)  # bfloat16 has 8 bits
        assert not torch.allclose(half.outputs(x), network.scores(x, "exact"), rtol=1e-5, atol=1e-6)


def test_where_it_is_not_no_graphs_of_bfloat16_are_held(on_cpu, monkeypatch, tmp_path):
    network = bfloat16_network(monkeypatch, tmp_path, "exact")
    assert network.runtime_of("bfloat16").name == "eager"
    assert sorted(on_cpu.sizes) == sorted(network.runtime.sizes)


def test_graphs_of_bfloat16_that_fail_leave_exact_as_it_is(on_cpu, monkeypatch, tmp_path):
    monkeypatch.setattr(CudaGraphs, "in_bfloat16", lambda self: (_ for _ in ()).throw(Unsupported("no such graph")))
    network = bfloat16_network(monkeypatch, tmp_path, "bfloat16")
    assert (network.info.runtime.name, network.info.runtime.precision) == ("cuda_graphs", "exact")
    assert "no such graph" in network.info.runtime.reason
    assert network.runtime_of("bfloat16").name == "eager"


def test_activations_are_the_layers_own():
    module = Convs().eval()
    site, images = site_and_pictures(module)
    engine = Engine(module, preprocessing=PREPROCESSING)
    _, raw = graphs_of(module).trunk(images)
    with engine.network.evaluating():
        expected = engine.network.capture(images, site.layer.name).activations
    torch.testing.assert_close(maps_of(raw, site.arrangement), expected, rtol=1e-4, atol=1e-5)


class Reading(TorchDispatchMode):
    """Notes the operations that wait for a device: numbers that Python reads, and those that it brings."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "equal", "lift_fresh", "masked_select"):
            self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", METHODS)
def test_no_pass_of_masked_queries_reads_or_brings_numbers(method, monkeypatch):
    """A GPU would do all of its work before it did."""
    engine = Engine(tiny.tiny_module(), preprocessing=PREPROCESSING, labels=tiny.TINY_LABELS, micro_batch=2)
    seen = []

    def watched(*given):
        with Reading() as reading:
            found = ask(*given)
        seen.append((len(given[1]), reading.seen))
        return found

    monkeypatch.setattr(executor, "ask", watched)
    try:
        engine.explain(tiny.pixels(1), [QUICK.get(method, method)], [0, 3])
    except Unsupported:
        pytest.skip(f"{method} cannot explain this network")
    assert all(not reading for _, reading in seen), seen


@pytest.mark.parametrize("faster", [torch.channels_last, torch.contiguous_format])
def test_the_memory_format_that_is_faster_is_taken(faster, on_cpu, monkeypatch):
    monkeypatch.setattr(
        choice,
        "measure",
        lambda runtime, image, sizes, *_: [
            Measured(runtime.name, size, 1.0 + (runtime.memory_format != faster)) for size in sizes
        ],
    )
    engine = Engine(Convs().eval(), preprocessing=PREPROCESSING, runtime="cuda_graphs")
    runtime = engine.network.runtime
    assert runtime.memory_format == faster
    assert engine.network.normalise(torch.zeros(2, *tiny.TINY_SIZE, 3)).is_contiguous(memory_format=faster)


def test_weights_are_in_the_memory_format_one_by_one_kernels_too():
    """`contiguous` takes a 1 x 1 kernel for either format, and cuDNN goes by its strides."""
    seen = []

    class Watched(nn.Conv2d):
        def forward(self, x):
            seen.append((self.weight.stride(), x.stride()))
            return super().forward(x)

    for order, strides in ((torch.contiguous_format, (8, 1, 1, 1)), (torch.channels_last, (8, 1, 8, 8))):
        module = nn.Sequential(
            nn.Conv2d(3, 8, 3), Watched(8, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
        )
        module = module.eval().to(memory_format=torch.channels_last)
        before = [weight.stride() for weight in module.parameters()]
        graphs = graphs_of(module, memory_format=order)
        seen.clear()
        graphs.outputs(batch(2))
        assert {weight for weight, _ in seen} == {strides}
        assert [weight.stride() for weight in module.parameters()] == before

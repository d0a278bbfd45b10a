"""Compiled code for bfloat16: the numbers of PyTorch's own bfloat16, made once, whoever asks; refused with a reason."""

import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from camserve import Engine
from camserve.errors import Unsupported
from camserve.runtimes import compiled
from camserve.runtimes.compiled import Compiled
from camserve.runtimes.modes import exact_float32
from camserve.runtimes.precision import why_no_bfloat16
from camserve.runtimes.runtime import Eager
from camserve.runtimes.threads import one_thread
from camserve.types import Preprocessing

PREPROCESSING = Preprocessing(32, (32, 32), (0.5,) * 3, (0.25,) * 3)
CPU = torch.device("cpu")
needs_a_compiler = pytest.mark.skipif(
    bool(why_no_bfloat16(CPU))
    or not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    or not (shutil.which("g++") or shutil.which("clang++")),
    reason="needs a processor with bfloat16 and a C++ compiler",
)


class Convs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1)
        )
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        return self.head(self.features(x).relu().mean(dim=(2, 3)))


class Corner(nn.Module):
    def forward(self, x):
        return x[:, :, 0, 0]


class Deciding(Convs):
    def forward(self, x):
        return super().forward(x if x.mean() > 0 else -x)


def images(number: int) -> torch.Tensor:
    return torch.randn(number, 3, 32, 32, generator=torch.Generator().manual_seed(number))


@pytest.fixture(scope="module")
def made():
    module = Convs().eval()
    return module, Compiled(module, images(1), size=4)


@needs_a_compiler
@pytest.mark.parametrize("number", [1, 3, 4, 9])
def test_the_outputs_are_those_of_pytorch_in_bfloat16(made, number):
    module, code = made
    x = images(number)
    with torch.no_grad():
        exact, half, came = module(x), Eager(module, bfloat16=True).outputs(x), code.outputs(x)
    assert came.dtype == torch.float32
    assert came.shape == exact.shape
    # bfloat16 has 8 bits: both are about as far from float32, and what a pass lacks is nobody's answer.
    rounding = (half - exact).abs().max()
    assert 0 < (came - exact).abs().max() <= 4 * rounding + 2**-8 * exact.abs().max()


@needs_a_compiler
def test_an_answer_is_not_overwritten_by_the_next(made):
    _, code = made
    first = code.outputs(images(2))
    before = first.clone()
    code.outputs(images(4))
    assert torch.equal(first, before)


@needs_a_compiler
def test_an_answer_that_is_a_view_of_the_images_is_not_overwritten_either():
    code = Compiled(Corner().eval(), images(1), size=2)
    first = code.outputs(images(2))
    assert torch.equal(first, images(2)[:, :, 0, 0])
    code.outputs(torch.zeros(2, 3, 32, 32))
    assert torch.equal(first, images(2)[:, :, 0, 0])


@contextmanager
def process_wide(set_to, was, changed):
    set_to(changed)
    try:
        yield
    finally:
        set_to(was)


@needs_a_compiler
@pytest.mark.parametrize(
    "mode",
    [
        nullcontext,
        torch.inference_mode,
        torch.enable_grad,
        lambda: torch.autocast("cpu", dtype=torch.float16),
        exact_float32,  # as in a worker's step
        one_thread,
        lambda: process_wide(torch.set_num_threads, torch.get_num_threads(), torch.get_num_threads() + 1),
        lambda: process_wide(torch.set_default_dtype, torch.float32, torch.float64),
        lambda: process_wide(torch.use_deterministic_algorithms, False, True),
        lambda: process_wide(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision(), "medium"),
    ],
)
@pytest.mark.parametrize("elsewhere", [False, True])
def test_nothing_has_it_compiled_again(made, monkeypatch, mode, elsewhere):
    # In a request that would take half a minute.
    def again(*given, **named):
        raise AssertionError("compiles again")

    _, code = made
    x = images(3)
    expected = code.outputs(x)
    before = dict(counters["stats"])
    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx_inner", again)
    with ThreadPoolExecutor(1) as pool, mode():
        came = pool.submit(code.outputs, x).result() if elsewhere else code.outputs(x)
    assert torch.equal(came, expected)
    assert came.dtype == torch.float32
    assert not came.requires_grad
    assert dict(counters["stats"]) == before


@needs_a_compiler
def test_networks_of_one_class_have_each_their_own_code():
    modules = []
    for seed in range(2):
        module = Convs().eval()
        nn.init.normal_(module.head.weight, generator=torch.Generator().manual_seed(seed))
        modules.append(module)
    codes = [Compiled(module, images(1), size=2) for module in modules]
    for module, code in zip(modules, codes, strict=True):
        assert code.outputs(images(2)) == pytest.approx(module(images(2)).detach(), abs=0.05)


@needs_a_compiler
def test_an_engine_asks_bfloat16_of_it_and_all_else_of_the_fastest():
    engine = Engine(Convs().eval(), preprocessing=PREPROCESSING, runtime="compiled", micro_batch=4)
    photo = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    told = {each: engine.explain(photo, ["score_cam"], precision=each) for each in ("exact", "bfloat16")}
    assert told["bfloat16"].cost.runtime == "compiled"
    assert told["exact"].cost.runtime == engine.info.runtime.name in ("eager", "onnx")
    assert told["bfloat16"].maps[0].array == pytest.approx(told["exact"].maps[0].array, abs=0.1)


@needs_a_compiler
def test_where_pytorch_is_faster_the_code_is_left_alone_and_the_reason_said(monkeypatch, caplog):
    made = Compiled.outputs
    monkeypatch.setattr(Compiled, "outputs", lambda self, x: time.sleep(0.5) or made(self, x))
    engine = Engine(Convs().eval(), preprocessing=PREPROCESSING, runtime="compiled", micro_batch=4)
    photo = np.zeros((32, 32, 3), dtype=np.uint8)
    assert engine.explain(photo, ["score_cam"], precision="bfloat16").cost.runtime == "eager"
    assert re.search(r"PyTorch's own bfloat16 takes \S+ ms a query, compiled code 1\d\d", engine.info.runtime.reason)
    assert "compiled code is not used" in caplog.text


def test_on_another_device_it_is_refused():
    with pytest.raises(Unsupported, match="for CPUs, and the network is on meta"):
        Compiled(Convs().eval(), torch.zeros(1, 3, 32, 32, device="meta"))


def test_without_the_instructions_it_is_refused(monkeypatch):
    monkeypatch.setattr(compiled, "why_no_bfloat16", lambda device: "the processor has no bfloat16 instructions")
    with pytest.raises(Unsupported, match="no bfloat16 instructions"):
        Engine(Convs().eval(), preprocessing=PREPROCESSING, runtime="compiled")


def test_where_onednn_has_no_bfloat16_it_is_refused(monkeypatch):
    monkeypatch.setattr(compiled, "why_no_bfloat16", lambda device: "")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    with pytest.raises(Unsupported, match="oneDNN does not compute in bfloat16 here"):
        Compiled(Convs().eval(), images(1))


@pytest.mark.parametrize(
    ("module", "reason"), [(Deciding, "decides by numbers"), (Convs, "cannot compile the network")]
)
def test_what_cannot_be_compiled_is_refused_with_the_reason(monkeypatch, module, reason):
    monkeypatch.setattr(compiled, "why_no_bfloat16", lambda device: "")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)

    def fails(*given, **named):
        raise RuntimeError("no C++ compiler here")

    monkeypatch.setattr(torch._inductor, "compile", fails)
    with pytest.raises(Unsupported, match=reason):
        Compiled(module().eval(), images(1))

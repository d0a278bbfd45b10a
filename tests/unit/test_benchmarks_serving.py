"""What the service's benchmark sends are photos of the sizes it names, and its goals are judged in its tables."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import threading
from contextlib import asynccontextmanager
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from camserve.types import Cost


@pytest.fixture
def serving(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("serving")


def test_photos_are_of_the_size_they_are_called_and_no_two_are_equal(serving):
    camera = serving.CAMERAS[serving.SMALL]
    one, other = camera.photos(2)
    assert one != other
    for photo in (one, other):
        assert abs(len(photo) - 150_000) < 10_000
        assert Image.open(BytesIO(photo)).size == camera.size_px
    grain = np.asarray(Image.open(BytesIO(one)), int) - np.asarray(Image.open(BytesIO(other)), int)
    assert 0 < np.abs(grain).mean() < 10  # the same scene
    assert serving.CAMERAS["5 MB"].file_bytes == 5_000_000


@pytest.mark.parametrize(("added_s", "met"), [(0.009, True), (0.011, False)])
def test_what_the_way_through_the_service_adds_is_judged(serving, monkeypatch, added_s, met):
    """The clock is the test's: each call of the engine takes 20 ms, each over gRPC `added_s` more."""
    now_s = [0.0]

    async def explain(photo, *_, **__):
        now_s[0] += 0.020 + added_s
        cost = Cost(0, {"queue": 0.001, "forward": 0.015}, 1, "exact", "", image_bytes=len(photo))
        return SimpleNamespace(cost=cost)

    def locally(photo):
        now_s[0] += 0.020

    @asynccontextmanager
    async def service(store):
        yield SimpleNamespace(client=SimpleNamespace(explain=explain))

    monkeypatch.setattr(serving, "serving", service)
    monkeypatch.setattr(serving, "CAMERAS", {serving.SMALL: serving.Camera(9_000, (128, 96), 3.0)})
    monkeypatch.setattr(serving.Engine, "load", lambda *_, **__: SimpleNamespace(explain=locally))
    monkeypatch.setattr(serving.time, "perf_counter", lambda: now_s[0])
    found = asyncio.run(serving.overhead(Path(), 4))
    row = found["photos"][serving.SMALL]
    assert (row["engine"]["p50_s"], row["engine"]["requests"]) == (pytest.approx(0.020), 4)
    assert (row["gRPC"]["p99_s"], row["added_p50_s"]) == (pytest.approx(0.020 + added_s), pytest.approx(added_s))
    assert row["mean_stage_s"] == {"queue": pytest.approx(0.001), "forward": pytest.approx(0.015)}
    assert (found["goal"]["added_p50_s"], found["goal"]["met"]) == (pytest.approx(added_s), met)
    environment = {"cpu": "a processor", "cpu_cores": 2, "commit": "0" * 40}
    page = serving.report({"environment": environment, "results": {"overhead": found}})
    assert f"| photo of 150 KB | {20 + 1000 * added_s:.1f} ms | 20.0 ms | {1000 * added_s:.1f} ms |" in page
    assert f"| overhead: added p50 s | {added_s:.3f} | 0.010 | {'yes' if met else '**no**'} |" in page


def test_a_photo_is_decoded_before_passes_or_beside_them(serving, monkeypatch, tmp_path):
    """Each pass takes 50 ms on the test's clock, and decoding 20 ms where the passes wait for it."""
    now_s, here, decoded = [0.0], threading.get_ident(), []

    class Network:
        preprocessing = SimpleNamespace(crop_px=(8, 8), channels=3)
        micro_batch = 4
        runtime = SimpleNamespace(own_threads=True)
        evaluating = staticmethod(contextlib.nullcontext)
        normalise = staticmethod(lambda pixels: pixels)

        def scores(self, x, precision):
            assert (len(x), precision) == (4, "exact")
            now_s[0] += 0.050

    def seen(photo, preprocessing, whole):
        decoded.append(threading.get_ident() == here)
        now_s[0] += 0.020 * decoded[-1]

    monkeypatch.setattr(serving, "seen", seen)
    monkeypatch.setattr(serving, "CAMERAS", {serving.SMALL: serving.Camera(9_000, (128, 96), 3.0)})
    monkeypatch.setattr(serving.Engine, "load", lambda *_, **__: SimpleNamespace(network=Network()))
    monkeypatch.setattr(serving.time, "perf_counter", lambda: now_s[0])
    found = asyncio.run(serving.decoding(tmp_path, 2))
    assert found["files"]["150 KB, 4"] == {"before": pytest.approx(0.220), "beside": pytest.approx(0.200)}
    assert found["files"]["150 KB, 16"] == {"before": pytest.approx(0.820), "beside": pytest.approx(0.800)}
    assert decoded.count(True) == decoded.count(False) == 2 * 3
    environment = {"cpu": "a processor", "cpu_cores": 2, "commit": "0" * 40}
    page = serving.report({"environment": environment, "results": {"decoding": found}})
    assert "| 150 KB, 4 | 220 ms | 200 ms |" in page


def test_photos_of_a_step_are_counted_each(serving, monkeypatch, tmp_path):
    """The clock is the test's: a step takes 10 ms and 20 ms for each of its photos, of which none comes twice."""
    now_s, seen = [0.0], []

    class Slow:
        def __init__(self, *_, **__):
            pass

        def execute(self, items):
            seen.extend(item.image for item in items)
            now_s[0] += 0.010 + 0.020 * len(items)

    monkeypatch.setattr(serving, "Executor", Slow)
    monkeypatch.setattr(serving, "CAMERAS", {serving.SMALL: serving.Camera(9_000, (128, 96), 3.0)})
    monkeypatch.setattr(serving.Engine, "load", lambda *_, **__: SimpleNamespace(network=None))
    monkeypatch.setattr(serving.time, "perf_counter", lambda: now_s[0])
    found = asyncio.run(serving.steps(tmp_path, 2))
    assert found["photos"][serving.SMALL] == {"1": pytest.approx(0.030), "4": pytest.approx(0.0225)}
    assert len(set(seen)) == len(seen) == 3 * (1 + 4)
    environment = {"cpu": "a processor", "cpu_cores": 2, "commit": "0" * 40}
    assert "| 150 KB | 30.0 ms | 22.5 ms |" in serving.report({"environment": environment, "results": {"steps": found}})

"""The program that measures orders and tolerances: what it plays through, and what it has found."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from camserve.evaluation.digits.scenes import benchmark_scenes
from camserve.evaluation.digits.shipped import load_engine
from camserve.finalise import convergence
from camserve.methods import ScoreCam, SsCam
from camserve.worker.executor import MEMORY_BYTES, Executor

ROOT = Path(__file__).parents[2]


@pytest.fixture
def program(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import tolerance

    return tolerance


@pytest.fixture
def committed() -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / "tolerance.json").read_text())


def test_the_page_has_the_tables_of_the_committed_figures(program, committed):
    page = program.PAGE.read_text()
    assert page == program.rendered(page, committed), "run `python benchmarks/tolerance.py render`"


def test_the_estimate_has_the_numbers_that_were_measured_and_they_hold(program, committed):
    assert committed["numbers"] == {name: getattr(convergence, name) for name in program.NUMBERS}
    assert committed["covered"]["fitted"] >= program.COVERED
    assert committed["covered"]["others"] >= program.COVERED
    assert max(committed["least_factor"].values()) <= convergence.FACTOR
    assert sum(found["images"] for found in committed["orders"].values()) >= 3 * 20


def test_energy_is_the_best_order_that_takes_no_gradient_on_a_network_of_real_size(committed):
    rows = committed["orders"]["lite0 / Score-CAM"]["orders"]
    ours = rows.pop("energy: mean of abs(A)")["25%"]["difference_median"]
    assert ours <= 0.02
    assert ours < rows["Grad-CAM: abs(w) times norm of A"]["25%"]["difference_median"] / 2
    assert ours < rows["random"]["25%"]["difference_median"] / 5


@pytest.mark.parametrize("spec", [ScoreCam(), SsCam(samples=2)], ids=lambda spec: spec.name)
def test_what_each_query_adds_makes_the_map_of_all(program, spec, tmp_path):
    """The engine asks all at once; the program adds up channel by channel, in another order."""
    engine, scene = load_engine(), benchmark_scenes(1)[0].pixels
    path = tmp_path / "kept.npz"
    np.savez(path, **program.added(Executor(engine.network, MEMORY_BYTES), spec, scene))
    one = program.Asked.read(path, spec.name)
    order = np.random.default_rng(0).permutation(64)
    want = engine.explain(scene, [spec]).maps[0].array
    np.testing.assert_allclose(one.map_of(one.after(order)[-1]), want, atol=1e-4)  # float32 passes of other sizes


def test_a_map_stops_at_the_first_look_that_is_within_the_tolerance(program):
    looks = [program.Seen(0.1, 0.2, 0.3, 0.1), program.Seen(0.2, 0.4, 0.04, 0.05), program.Seen(0.3, 0.6, 0.01, 0.005)]
    (end,) = program.stops([looks], 0.05)
    assert (end.share, end.passes, end.true) == (0.2, 0.4, 0.05)
    assert program.stops([looks], 0.05, times=2)[0].share == 0.3
    assert program.stops([looks], 0.001)[0] == program.Seen(1.0, 1.0, 0.0, 0.0)
    assert program.covered([looks]) == 0.25, "of four tolerances, three stop at a look whose estimate is too small"


def test_the_least_factor_covers_what_has_to_be_covered(program):
    """The true difference is twice the estimate everywhere."""
    rows = [[program.Seen(0.05 * step, 0.1, 0.4 / step, 0.8 / step) for step in range(1, 20)] for _ in range(10)]
    assert program.least_factor(rows) == pytest.approx(2 * convergence.FACTOR, abs=0.06)

"""The planner in a simulated cluster: a few virtual seconds, so that no assertion depends on the machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from camserve.planning import Counts

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def sim(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import planner_sim

    return planner_sim


def adds_up(counts: Counts) -> bool:
    return counts.asked == counts.waiting + counts.in_flight + counts.done + counts.cancelled


@pytest.mark.parametrize("workers", [1, 8, 24])
def test_workers_are_busy_while_work_waits(sim, workers):
    scene = sim.Scene(workers, "full", requests=20 * workers, seconds=3.0, warm_s=1.5)
    result = sim.measure(scene)
    assert result["utilisation"] >= 0.97
    assert result["efficiency"] >= 0.85  # little is learnt in 1.5 s; openings fill many steps
    assert 0.6 < result["mean_step_s"] / scene.device.target_s < 1.2
    assert adds_up(Counts(**result["counts"]))


@pytest.mark.parametrize("arrivals", ["poisson", "bursty"])
@pytest.mark.parametrize("workers", [2, 12])
def test_every_query_is_accounted_for_when_workers_die(sim, arrivals, workers):
    world = sim.World(sim.Scene(workers, arrivals, seconds=3.0, warm_s=0.0, death_s=2.0, load=0.6, seed=1))
    world.run()
    assert adds_up(world.planner.counts())
    world.drain()
    counts, tally = world.planner.counts(), world.tally
    assert counts == Counts(asked=counts.asked, done=counts.done, cancelled=counts.cancelled)
    assert counts.done > 0.8 * counts.asked
    assert sum(map(len, tally.complete_s.values())) + tally.late + tally.failed == len(world._asked)
    assert not [step for queue in world._queues.values() for step in queue]


def test_too_much_work_is_refused_and_what_is_taken_on_is_in_time(sim):
    result = sim.measure(sim.Scene(4, load=6.0, patience=0.05, seconds=12.0, warm_s=1.0))
    answered = {name: waits["requests"] for name, waits in result["first_answer"].items()}
    assert result["refused"] > 0
    assert result["late"] < 0.05 * sum(answered.values())
    assert answered["interactive"] > answered["batch"] > 0


def test_the_program_writes_figures_and_a_table(tmp_path):
    out = tmp_path / "planner-sim.json"
    command = [sys.executable, BENCHMARKS / "planner_sim.py", "--quick", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "| workers | arrivals |" in done.stdout
    found = json.loads(out.read_text())
    assert set(found["results"]) == {"full", "open", "overload", "growth"}
    assert found["environment"]["cpu"]
    assert all(result["decisions_per_s"] > 0 for several in found["results"].values() for result in several)

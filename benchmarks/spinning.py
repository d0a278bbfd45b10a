"""Measures how long a worker's threads should spin at the end of a parallel region, alone and beside a busy process.

    python benchmarks/spinning.py           # results/spinning-cpu.json, and a table
    python benchmarks/spinning.py --quick   # one round: does it run?

PyTorch's wheels for Linux divide each operation among the threads of GNU OpenMP (libgomp). A thread that is done spins
until all are; where another process holds one of the cores, the others spin for as long as the scheduler lets that one
run. A thread that sleeps at once has to be woken for the next operation. `GOMP_SPINCOUNT` bounds the spinning.

Each setting has a process of its own, which makes Group-CAMs of the default model with a thread for each core. The
processes take turns.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import common
import torch

from camserve.supervisor.config import SPIN_COUNT

OURS = f"GOMP_SPINCOUNT={SPIN_COUNT}"
SETTINGS = {
    "default": {},
    "GOMP_SPINCOUNT=30000": {"GOMP_SPINCOUNT": "30000"},
    OURS: {"GOMP_SPINCOUNT": str(SPIN_COUNT)},
    "GOMP_SPINCOUNT=3000": {"GOMP_SPINCOUNT": "3000"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
}
WORKER = """
import sys, numpy as np
from camserve import Engine
engine = Engine.load("lite0")
photo = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
for _ in sys.stdin:
    engine.explain(photo, ["group_cam"])
    print("done", flush=True)
"""


class Worker:
    """A process that makes a Group-CAM for each call."""

    def __init__(self, settings: Mapping[str, str]) -> None:
        own = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            env=own | settings,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def __call__(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("again\n")
        if self._process.stdout.readline() != "done\n":
            raise RuntimeError("a worker has died")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Has some processes use a core each while the block runs."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def measure(rounds: int) -> dict[str, Any]:
    """Returns the seconds of a Group-CAM for each setting, alone and beside one busy process."""
    with ExitStack() as stack:
        workers = {name: Worker(settings) for name, settings in SETTINGS.items()}
        for worker in workers.values():
            stack.callback(worker.close)
        results = {}
        for name, processes in (("alone", 0), ("beside a busy process", 1)):
            with busy(processes):
                seconds = common.in_turns(workers, rounds, torch.device("cpu"))
            results[name] = common.summary(seconds, "default")
    return results


def table(content: Mapping[str, Any]) -> str:
    """Returns the figures as Markdown."""
    lines = ["| setting | alone | beside a busy process |", "| --- | ---: | ---: |"]
    alone, beside = content["results"].values()
    for name in alone:
        shown = (
            f"{1000 * each[name]['median_s']:.0f} ms, {each[name]['times_default']:.2f} x" for each in (alone, beside)
        )
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round: does it run?")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "spinning-cpu.json")
    given = parser.parse_args()
    results = measure(1 if given.quick else 15)
    content = {"environment": common.environment(torch.device("cpu")), "quick": given.quick, "results": results}
    common.write(given.out, content)
    print(table(content))


if __name__ == "__main__":
    main()

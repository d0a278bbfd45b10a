"""Tells within two minutes whether camserve has become slower: ratios of now against those that are committed.

    python benchmarks/regress.py                  # against results/ratios-cpu.json; exit status 1: something is slower
    python benchmarks/regress.py --device cuda    # against results/ratios-cuda.json
    python benchmarks/engine.py --only lite0/ratios --out benchmarks/results/ratios-cpu.json    # new ones to commit

A ratio is what a map takes, over its passes as plain forward passes at the best rate, all in turns in one process: no
seconds are compared, so neither the machine nor its load is. What has lost more than 25 % is measured a second time,
and the better one counts. Machines with other vector instructions have other ratios; where they differ it is said.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import common
import engine
import torch
from subjects import SUBJECTS, prepare

LOSS = 0.25
"""Share by which a ratio may be larger than the committed one."""


def lost(now: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    """Returns the ratios that have grown by more than `LOSS`, with their growth: 2 is twice as slow."""
    grown = {name: now[name] / before[name] for name in before if name in now}
    return {name: growth for name, growth in grown.items() if growth > 1 + LOSS}


def table(now: Mapping[str, float], before: Mapping[str, float]) -> str:
    """Returns a table for people."""
    lines = [f"{'over plain passes at the best rate':44} {'committed':>9} {'now':>9} {'now / committed':>15}"]
    for name in dict.fromkeys((*before, *now)):
        one, other = before.get(name), now.get(name)
        growth = f"{other / one:15.2f}" if one and other else f"{'-':>15}"
        cells = ["        -" if each is None else f"{each:9.3f}" for each in (one, other)]
        lines.append(f"{name:44} {' '.join(cells)} {growth}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--network", choices=SUBJECTS, default=engine.RATIO_NETWORK)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", type=Path, help="default: results/ratios-<device>.json beside this file")
    given = parser.parse_args()
    device = torch.device(given.device)
    results = Path(__file__).parent / "results" / f"ratios-{device.type}.json"
    against = given.against or results
    committed = json.loads(against.read_text()) if against.exists() else {"ratios": {}}
    before, around = committed["ratios"], common.environment(device)
    if not before:
        parser.error("there are no committed ratios to compare with: see the top of this file")
    bench = prepare(given.network, device)
    now = engine.ratios(bench, given.rounds)
    if lost(now, before):
        again = engine.ratios(bench, given.rounds)
        now = {name: min(figure, again.get(name, figure)) for name, figure in now.items()}
    print(table(now, before))
    for name in ("device", "cpu_flags", "torch_threads"):
        if around[name] != committed["environment"][name]:
            print(f"measured on another machine: {name} {committed['environment'][name]!r}, here {around[name]!r}")
    slower, missing = lost(now, before), before.keys() - now.keys()
    for name in sorted(missing):
        print(f"MISSING: {name} was committed, and is not made any more")
    for name, growth in slower.items():
        print(f"SLOWER: {name} takes {growth:.2f} times as long as committed, at most {1 + LOSS} is allowed")
    return 1 if slower or missing else 0


if __name__ == "__main__":
    raise SystemExit(main())

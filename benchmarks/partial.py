"""Measures what an early map is worth: its rank correlation with the final map after 10, 25 and 50 % of the queries.

    python benchmarks/partial.py           # results/partial-cpu.json, and the table as Markdown
    python benchmarks/partial.py --quick   # one scene: does it run?

Queries are asked in the order in which a request asks them (those that matter most first), and in the order of their
numbers, on scenes of the digits benchmark and on two photos with EfficientNet-Lite0.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from scipy.stats import spearmanr
from skimage.data import chelsea, coffee

from camserve import Engine
from camserve.evaluation.digits.shipped import load_engine
from camserve.evaluation.examples import digits_examples
from camserve.finalise.maps import normalise, upsample
from camserve.methods import GroupCam, MethodSpec, ScoreCam, method_text
from camserve.types import Item, ItemResult, Partial, Target, Task
from camserve.worker.executor import MEMORY_BYTES, Executor

SHARES = (0.1, 0.25, 0.5)
METHODS: tuple[MethodSpec, ...] = (ScoreCam(), GroupCam())


def subjects(scenes: int, photos: int) -> Iterator[tuple[str, Executor, Any]]:
    digits, lite0 = Executor(load_engine().network, MEMORY_BYTES), Executor(Engine.load("lite0").network, MEMORY_BYTES)
    for example in digits_examples(scenes):
        yield "digits", digits, example.read()
    for photo in (chelsea(), coffee())[:photos]:
        yield "photos, lite0", lite0, photo


def growing(executor: Executor, image: Any, spec: MethodSpec, ordered: bool) -> list[np.ndarray]:
    """Returns the maps of the most probable class after each share of the queries, and the final one."""
    total = spec.queries(executor.network.info.layer(""), 1)
    cuts = [0, *(max(1, round(share * total)) for share in SHARES), total]
    order: tuple[int, ...] = ()
    merged: Partial | None = None
    maps = []
    for start, stop in itertools.pairwise(cuts):
        task = Task(0, spec, start, stop, numbers=order[start:stop], ordered=ordered and start == 0)
        (outcome,) = executor.execute([Item(image, (Target(top_k=1),), (task,))]).outcomes
        if not isinstance(outcome, ItemResult):
            raise outcome
        partial = outcome.partials[0]
        order = order or partial.order
        merged = partial if merged is None else merged.merge(partial)
        maps.append(normalise(upsample(merged.sums[0], outcome.view.size))[0])
    return maps


def correlations(maps: list[np.ndarray]) -> list[float]:
    """Returns the correlation of each early map with the final one; 0 where one of them is constant."""
    *early, final = (one.ravel() for one in maps)
    return [float(spearmanr(one, final).statistic) if one.any() and final.any() else 0.0 for one in early]


def measure(scenes: int, photos: int) -> dict[str, Any]:
    found: defaultdict[tuple[str, str, str], list[list[float]]] = defaultdict(list)
    for where, executor, image in subjects(scenes, photos):
        for spec in METHODS:
            for ordered in (True, False):
                maps = growing(executor, image, spec, ordered)
                found[where, method_text(spec), "ordered" if ordered else "by number"].append(correlations(maps))
    return {
        " / ".join(key): {
            f"{share:.0%}": statistics.mean(column)
            for share, column in zip(SHARES, zip(*rows, strict=True), strict=True)
        }
        for key, rows in found.items()
    }


def report(results: Mapping[str, Mapping[str, float]]) -> str:
    """Returns the figures as Markdown."""
    lines = [
        f"| images / method / order | {' | '.join(f'{share:.0%}' for share in SHARES)} |",
        "| --- | ---: | ---: | ---: |",
    ]
    lines += [f"| {name} | {' | '.join(f'{value:.3f}' for value in row.values())} |" for name, row in results.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one scene, no photo")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "partial-cpu.json")
    given = parser.parse_args()
    scenes, photos = (1, 0) if given.quick else (20, 2)
    results = measure(scenes, photos)
    sizes = {"scenes": scenes, "photos": photos}
    common.write(given.out, {"environment": common.environment(torch.device("cpu")), **sizes, "results": results})
    print(report(results))
    print(f"written to {given.out}")


if __name__ == "__main__":
    main()

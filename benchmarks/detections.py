"""Measures what D-RISE costs beyond the detector's own passes: 5000 masks, over as many images at the best rate.

    OMP_NUM_THREADS=1 python benchmarks/detections.py            # results/detections-cpu.json; a minute
    python benchmarks/detections.py --masks 200 --rounds 1 --out /tmp/detections.json

Both take turns in one process. The best forward rate is that of the fastest size of a pass, of images that are there
already: nothing is masked, scored or added up. Also told is that all detections of the image take no longer than one.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch

from camserve import Engine
from camserve.evaluation.digits.scenes import make_scene
from camserve.evaluation.digits.shipped import load_engine

SIZES = (1, 4, 8, 16, 32, 64)
GOAL = 1.2
SCENE = make_scene(4, 2, 3, "test")
"""A scene of three digits, on which no choice was made."""


def forward_s(engine: Engine, images: int, size: int) -> float:
    """Returns the seconds that a number of images takes in passes of a size."""
    network = engine.network
    x = network.normalise(torch.from_numpy(SCENE.pixels)[None]).expand(size, -1, -1, -1).contiguous()
    with network.evaluating(), torch.inference_mode():
        return (
            _timed(lambda: [network.scores(x, "exact") for _ in range(-(-images // size))])
            * images
            / (-(-images // size) * size)
        )


def d_rise_s(engine: Engine, masks: int, target: str) -> float:
    return _timed(lambda: engine.explain(SCENE.pixels, [("d_rise", {"masks": masks})], [target]))


def _timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measured(masks: int, rounds: int) -> dict[str, Any]:
    """Returns the seconds of each, the least of the rounds, and their ratios."""
    engine = load_engine("digits-boxes", micro_batch=32)
    forward = {size: forward_s(engine, 512, size) / 512 for size in SIZES}  # the first round warms up as well
    best = min(forward, key=forward.__getitem__)
    one, all_of_them, passes = [], [], []
    for _ in range(rounds):
        passes.append(forward_s(engine, masks, best))
        one.append(d_rise_s(engine, masks, "detection:0"))
        all_of_them.append(d_rise_s(engine, masks, "top3"))
    return {
        "masks": masks,
        "best_size": best,
        "forward_s": min(passes),
        "d_rise_s": min(one),
        "d_rise_of_all_s": min(all_of_them),
        "ratio": min(one) / min(passes),
        "ratio_of_all": min(all_of_them) / min(passes),
        "goal": GOAL,
    }


def results(device: torch.device) -> Path:
    return Path(__file__).parent / "results" / f"detections-{device.type}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--masks", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="default: results/detections-<device>.json beside this file")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = measured(given.masks, given.rounds)
    out = given.out or results(device)
    common.write(out, {"environment": common.environment(device), "d_rise": found})
    print(
        f"{found['masks']} masks {found['d_rise_s']:.2f} s, passes {found['forward_s']:.2f} s: "
        f"{found['ratio']:.2f}, goal {GOAL}; all detections {found['ratio_of_all']:.2f}"
    )


if __name__ == "__main__":
    main()

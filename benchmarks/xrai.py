"""Times XRAI's ranking beside that of PyPI `saliency`, on the attributions of two photos and the same segments.

    python benchmarks/xrai.py           # results/xrai-cpu.json
    python benchmarks/xrai.py --quick   # one small photo, one round, a tiny random network: does it run?

The ranking is the greedy part of XRAI: it takes segments one by one, always the one whose new pixels have the largest
mean attribution. It runs on the CPU, here on one thread. Before anything is timed the two maps are compared: they must
be equal in every pixel, the segments of both as well.
"""

from __future__ import annotations

import argparse
from importlib.metadata import version
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from PIL import Image
from saliency.core import xrai as library
from skimage import data
from torch import nn

from camserve import Engine
from camserve.finalise.finish import finished
from camserve.images import network_view
from camserve.methods import Xrai
from camserve.saliency import xrai
from camserve.saliency.features import Features
from camserve.types import Partial, Preprocessing, Target

OURS = "camserve"
PHOTOS = ("chelsea", "coffee")


def tiny() -> Engine:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AvgPool2d(8), nn.Flatten(), nn.LazyLinear(5))
    size = Preprocessing(112, (112, 112), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    module(torch.zeros(1, 3, *size.crop_px))
    return Engine(module, preprocessing=size)


def attribution(engine: Engine, pixels: np.ndarray, steps: int) -> np.ndarray:
    """Returns what XRAI ranks for the most probable class of uint8 (H, W, 3) pixels: (H, W), float64."""
    network, layer, spec = engine.network, engine.info.default_layer, Xrai(steps=steps)
    x = network.normalise(torch.from_numpy(pixels)[None])
    with network.evaluating():
        captured = network.capture(x, layer)
        (target,) = network.score.resolved(Target(top_k=1), captured.logits[0])
        top = network.score.targets([target], network.device)
        passes = network.passes(layer)
        features = Features(x[0], captured.activations[0], captured.logits[0], top, None, network.classifier, passes)
        sums = xrai.attributions(features, spec, torch.arange(2 * spec.steps))
        return finished(spec, Partial(0, 2 * spec.steps, sums.numpy()))[0]


def compare(engine: Engine, photo: str, steps: int, rounds: int) -> dict[str, Any]:
    """Returns whether both rankings of one photo are equal, and their times."""
    seen, _ = network_view(Image.fromarray(getattr(data, photo)()), engine.network.preprocessing)
    pixels = np.array(seen)
    ranked = attribution(engine, pixels, steps)
    masks, theirs = xrai.find_masks(pixels / 255), library._get_segments_felzenszwalb(pixels / 255)
    ours, others = xrai.rank(ranked, masks), library.XRAI._xrai(ranked, theirs)[0]
    cases = {OURS: lambda: xrai.rank(ranked, masks), "saliency": lambda: library.XRAI._xrai(ranked, theirs)}
    return {
        "size_px": list(pixels.shape[:2]),
        "segments": len(masks),
        "same_segments": all(np.array_equal(a, np.flatnonzero(b)) for a, b in zip(masks, theirs, strict=True)),
        "same_map": bool(np.array_equal(ours, others)),
        "largest_difference": float(np.abs(ours - others).max()),
        "times": common.summary(common.in_turns(cases, rounds, torch.device("cpu")), OURS),
    }


def environment() -> dict[str, Any]:
    found = common.environment(torch.device("cpu"))
    found["versions"] |= {name: version(name) for name in ("saliency", "scikit-image", "scipy")}
    return found


def report(results: dict[str, dict[str, Any]]) -> str:
    """Returns a table for people."""
    lines = [f"{'photo':10} {'segments':>8} {'same map':>8} {'by':10} {'median s':>9} {'times ours':>10}"]
    for photo, result in results.items():
        for who, figures in result["times"].items():
            equal = "yes" if result["same_segments"] and result["same_map"] else "NO"
            ratio = figures[f"times_{OURS}"]
            lines.append(
                f"{photo:10} {result['segments']:8} {equal:>8} {who:10} {figures['median_s']:9.4f} {ratio:10.2f}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="of Integrated Gradients, for each of two baselines")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one small photo, one round, a tiny random network")
    parser.add_argument("--store", type=Path, help="of model archives")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "xrai-cpu.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    engine = tiny() if given.quick else Engine.load("lite0", given.store, device="cpu")
    steps, rounds, photos = (1, 1, PHOTOS[:1]) if given.quick else (given.steps, given.rounds, PHOTOS)
    results = {photo: compare(engine, photo, steps, rounds) for photo in photos}
    common.write(given.out, {"environment": environment(), "quick": given.quick, "steps": steps, "photos": results})
    print(report(results))
    print(f"written to {given.out}")


if __name__ == "__main__":
    main()

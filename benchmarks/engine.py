"""Times the engine's methods beside grad-cam, torchcam and a loop over single masked images.

    python benchmarks/engine.py                 # results/engine-cpu.json
    python benchmarks/engine.py --device cuda   # results/engine-cuda.json
    python benchmarks/engine.py --quick         # one round, small layers: does it run?
    python benchmarks/engine.py --render        # the README's table from results/engine-cpu.json, at once

All run in one process, in turns, on the same image, class and layer. The engine is timed with everything that a call
of `explain` does (normalising the pixels, predictions, the final map in numpy); the others are given the normalised
tensor. torchcam returns its map at the layer's resolution, the others at the input's. The Score-CAMs are different
variants with the same number of queries: their times compare, their maps do not.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import common
import naive
import numpy as np
import torch
import torchcam.methods
from PIL import Image
from pytorch_grad_cam import GradCAM, ScoreCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from skimage.data import chelsea
from torch import Tensor, nn
from torchvision.models import resnet18

from camserve import Engine
from camserve.archive import build_archive, load_package
from camserve.images import network_view
from camserve.types import Precision, Preprocessing

OURS = "camserve"
Case = Callable[[], object]


@dataclass(frozen=True)
class Subject:
    """Holds a network to explain."""

    module: nn.Module
    preprocessing: Preprocessing
    layer: str
    quick_layer: str
    """A layer with few channels, for `--quick`."""


def lite0() -> Subject:
    with tempfile.TemporaryDirectory() as store:
        module, card = load_package(build_archive("efficientnet-lite0", name="lite0", store=Path(store)))
    return Subject(module, card.preprocessing, layer="_bn1", quick_layer="_blocks.3")


def random_resnet18() -> Subject:
    torch.manual_seed(0)
    preprocessing = Preprocessing(256, (224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear")
    return Subject(resnet18(), preprocessing, layer="layer4.1", quick_layer="layer1.1")


def tiny() -> Subject:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 5)
    )
    with torch.no_grad():  # else masking hardly changes the scores, and rounding would be most of what is compared
        module[-1].weight *= 20
    preprocessing = Preprocessing(64, (64, 64), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return Subject(module, preprocessing, layer="1", quick_layer="1")


SUBJECTS: dict[str, Callable[[], Subject]] = {"lite0": lite0, "resnet18": random_resnet18, "tiny": tiny}


@dataclass(frozen=True)
class Bench:
    """Holds one network with one image, for us and for the others."""

    engine: Engine
    theirs: nn.Module
    pixels: np.ndarray
    x: Tensor
    layer: str
    target: int

    def ours(self, method: str, precision: Precision = "exact") -> np.ndarray:
        answer = self.engine.explain(
            self.pixels, methods=[method], targets=[self.target], layer=self.layer, precision=precision
        )
        return answer.maps[0].array

    def grad_cam(self, method: Callable[..., Any]) -> np.ndarray:
        with method(self.theirs, [self.theirs.get_submodule(self.layer)]) as extractor:
            return extractor(self.x, [ClassifierOutputTarget(self.target)])[0]

    def torchcam(self, method: Callable[..., Any]) -> np.ndarray:
        with method(self.theirs, self.layer) as extractor:
            return extractor(self.target, self.theirs(self.x))[0][0].detach().cpu().numpy()

    def naive(self) -> np.ndarray:
        return naive.group_cam(self.theirs, self.x, self.layer, self.target).cpu().numpy()


def prepare(subject: Subject, device: torch.device, layer: str) -> Bench:
    module = subject.module.eval().to(device)
    theirs = copy.deepcopy(module)  # parameters that want gradients, as in a network just loaded
    theirs.requires_grad_(True)
    engine = Engine(module.to(memory_format=torch.channels_last), preprocessing=subject.preprocessing)
    seen, _ = network_view(Image.fromarray(chelsea()), subject.preprocessing)
    pixels = np.asarray(seen)
    mean, std = np.array(subject.preprocessing.mean), np.array(subject.preprocessing.std)
    x = torch.from_numpy(((pixels / 255 - mean) / std).transpose(2, 0, 1)[None]).float().to(device)
    target = engine.explain(pixels, top_predictions=1).predictions[0].index
    return Bench(engine, theirs, pixels, x, layer, target)


def cases(bench: Bench, device: torch.device) -> dict[str, dict[str, Case]]:
    """Returns what is timed, by method and by who does it."""
    found: dict[str, dict[str, Case]] = {
        "grad_cam": {
            "grad-cam": lambda: bench.grad_cam(GradCAM),
            "torchcam": lambda: bench.torchcam(torchcam.methods.GradCAM),
        },
        "group_cam": {"one by one": bench.naive},
        "score_cam": {
            "grad-cam": lambda: bench.grad_cam(ScoreCAM),
            "torchcam": lambda: bench.torchcam(torchcam.methods.ScoreCAM),
        },
    }
    for method, others in found.items():
        mine: dict[str, Case] = {OURS: partial(bench.ours, method)}
        if device.type == "cuda" and method != "grad_cam":
            mine[f"{OURS} bfloat16"] = partial(bench.ours, method, "bfloat16")
        found[method] = mine | others
    return found


def agreement(bench: Bench) -> dict[str, float]:
    """Returns the largest difference to another's map of the same definition, which shows that the same is timed."""
    pairs = {"grad_cam: grad-cam": bench.grad_cam(GradCAM), "group_cam: one by one": bench.naive()}
    return {name: float(np.abs(bench.ours(name.split(":")[0]) - theirs).max()) for name, theirs in pairs.items()}


def measure(name: str, device: torch.device, rounds: int, quick: bool) -> dict[str, Any]:
    subject = SUBJECTS[name]()
    bench = prepare(subject, device, subject.quick_layer if quick else subject.layer)
    return {
        "layer": bench.layer,
        "channels": bench.engine.info.layer(bench.layer).channels,
        "micro_batch": bench.engine._executor.network.micro_batch,
        "largest_difference": agreement(bench),
        "methods": {
            method: common.summary(common.in_turns(by_whom, rounds, device), OURS)
            for method, by_whom in cases(bench, device).items()
        },
    }


def report(results: dict[str, dict[str, Any]]) -> str:
    """Returns a table for people."""
    lines = [f"{'model':10} {'method':10} {'by':18} {'median s':>9} {'times ours':>10}"]
    for model, result in results.items():
        for method, by_whom in result["methods"].items():
            for who, figures in by_whom.items():
                ratio = figures[f"times_{OURS}"]
                lines.append(f"{model:10} {method:10} {who:18} {figures['median_s']:9.4f} {ratio:10.2f}")
    return "\n".join(lines)


TITLES = {"grad_cam": "Grad-CAM", "group_cam": "Group-CAM", "score_cam": "Score-CAM"}


def table(content: Mapping[str, Any]) -> str:
    """Returns the README's table: our times, and the others' in multiples of ours."""
    lines = ["| map of one photo | camserve | others |", "| --- | ---: | --- |"]
    for model, result in content["models"].items():
        for method, by_whom in result["methods"].items():
            others = [f"{who} {figures[f'times_{OURS}']:.1f} times" for who, figures in by_whom.items() if who != OURS]
            ours = by_whom[OURS]["median_s"]
            shown = f"{1000 * ours:.0f} ms" if ours < 1 else f"{ours:.1f} s"
            lines.append(f"| {TITLES[method]}, `{model}` | {shown} | {', '.join(others)} |")
    machine = content["environment"]
    versions = ", ".join(f"{name} {machine['versions'][name]}" for name in ("grad-cam", "torchcam", "torch"))
    layers = ", ".join(f"{result['channels']} channels in `{name}`" for name, result in content["models"].items())
    caption = (
        f"Score-CAM: one query for each channel ({layers}). {machine['device']}, {machine['torch_threads']} threads"
    )
    return "\n".join([*lines, "", f"{caption}; {versions}; commit {machine['commit'][:12]}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", nargs="+", choices=SUBJECTS, default=["lite0", "resnet18"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round at a layer with few channels")
    parser.add_argument("--out", type=Path, help="default: results/engine-<device>.json beside this file")
    parser.add_argument("--render", action="store_true", help="only write the README's table from the results")
    given = parser.parse_args()
    if given.render:
        content = json.loads((Path(__file__).parent / "results" / "engine-cpu.json").read_text())
        common.README.write_text(common.embedded(common.README.read_text(), "speed", table(content)))
        return
    device = torch.device(given.device)
    rounds = 1 if given.quick else given.rounds
    results = {name: measure(name, device, rounds, given.quick) for name in given.models}
    out = given.out or Path(__file__).parent / "results" / f"engine-{device.type}.json"
    common.write(out, {"environment": common.environment(device), "quick": given.quick, "models": results})
    print(report(results))
    print(f"written to {out}")


if __name__ == "__main__":
    main()

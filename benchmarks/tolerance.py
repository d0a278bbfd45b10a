"""Measures in which order queries are best asked, and how well the estimate of what is missing holds.

    python benchmarks/tolerance.py ask --keep DIR       # asks every query once and keeps what each adds: half an hour
    python benchmarks/tolerance.py measure --keep DIR   # results/tolerance.json, from what is kept: a minute
    python benchmarks/tolerance.py ladder               # adds how faithful the rungs of `auto` are: some minutes
    python benchmarks/tolerance.py render               # the tables of docs/performance.md, at once
    python benchmarks/tolerance.py ask --keep DIR --images 2 --networks digits

All queries of a map are asked once. Every order, and every rule of stopping, is then played from what each query adds.
Images of even number are those that FACTOR and FEW of `camserve.finalise.convergence` are fitted on; the figures that
count are those of the others.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from scipy.stats import spearmanr

from camserve import Engine
from camserve.evaluation.digits.scenes import benchmark_scenes
from camserve.evaluation.digits.shipped import load_engine
from camserve.finalise import convergence
from camserve.finalise.convergence import Convergence, looks
from camserve.finalise.finish import finished
from camserve.finalise.maps import normalise, upsample
from camserve.methods import IsCam, MethodSpec, Rise, SsCam, method_text, parse_method_text
from camserve.types import Item, ItemResult, Partial, Target, Task
from camserve.worker.executor import MEMORY_BYTES, Executor
from camserve.worker.forward import Forward, Wanted
from camserve.worker.memory import Memory

RESULTS = Path(__file__).parent / "results" / "tolerance.json"
PAGE = common.ROOT / "docs" / "performance.md"
SHARES = (0.1, 0.25, 0.5)
TOLERANCES = (0.02, 0.05, 0.1, 0.2)
COVERED = 0.95
NUMBERS = ("FACTOR", "FEW", "POWER", "POWER_OF_MEANS", "LEAST_BLOCKS", "LEAST_SHARE", "MOST_SHARE")
ASKED: Mapping[str, Mapping[str, int]] = {
    "lite0": {
        "score_cam": 20,
        "ablation_cam": 20,
        "is_cam:samples=2": 5,
        "ss_cam:samples=2": 5,
        "rise:masks=1200": 4,
    },
    "digits": {"score_cam": 24, "ablation_cam": 24, "rise:masks=4000": 12, "ss_cam:samples=8": 12, "is_cam": 12},
    "digits-vit": {"score_cam": 24, "ablation_cam": 24, "rise:masks=2000": 12, "ss_cam:samples=8": 12, "is_cam": 12},
    "digits-vit-timm": {"score_cam": 24, "ablation_cam": 24},
}
"""Number of images by network and method."""
TOGETHER = 20
"""Number of RISE's masks that are asked as one: what each adds is a map of the input's size."""


def photos() -> Iterator[np.ndarray]:
    """Yields what the environment has: scikit-image's and scikit-learn's photos, and cut-outs of four of them."""
    from skimage import data
    from sklearn.datasets import load_sample_image

    motorcycle, china, astronaut = data.stereo_motorcycle()[0], load_sample_image("china.jpg"), data.astronaut()
    flower, coffee = load_sample_image("flower.jpg"), data.coffee()
    yield from (astronaut, data.chelsea(), coffee, data.rocket(), motorcycle, china, flower)
    yield from (data.camera(), data.coins(), data.retina(), data.hubble_deep_field(), data.immunohistochemistry())
    yield from (data.clock(), data.colorwheel(), astronaut[230:512, 150:512], china[100:330, 150:450])
    yield from (motorcycle[200:500, 400:700], coffee[50:350, 150:480], data.moon(), data.page())


def images(network: str) -> list[np.ndarray]:
    if network != "lite0":
        return [scene.pixels for scene in benchmark_scenes(24)]
    return [
        np.repeat(one[..., None], 3, 2) if one.ndim == 2 else np.ascontiguousarray(one[..., :3]) for one in photos()
    ]


def path_of(keep: Path, network: str, text: str, image: int) -> Path:
    return keep / f"{network}__{text.replace(':', '_').replace('=', '')}__{image}.npz"


def ask(keep: Path, networks: Sequence[str], most: int) -> None:
    """Keeps what each query adds to the map of the most probable class; what is kept already is not asked again."""
    keep.mkdir(parents=True, exist_ok=True)
    for name in networks:
        engine = Engine.load("lite0") if name == "lite0" else load_engine(name)
        executor = Executor(engine.network, MEMORY_BYTES)
        for text, number in ASKED[name].items():
            for at, image in enumerate(images(name)[: min(number, most)]):
                path = path_of(keep, name, text, at)
                if not path.exists():
                    np.savez(path, **added(executor, parse_method_text(text), image))
                    print(path.name, flush=True)


def added(executor: Executor, spec: MethodSpec, image: np.ndarray) -> dict[str, Any]:
    """Returns what each block of queries adds to the sums, with the activations, the gradients and the input's size."""
    layer = executor.network.info.layer("")
    total = spec.queries(layer, 1)
    each = TOGETHER if isinstance(spec, Rise) else spec.block
    numbers = [tuple(range(start, min(total, start + each))) for start in range(0, total, each)]
    sums: list[np.ndarray] = []
    for start in range(0, len(numbers), 64 if isinstance(spec, Rise) else len(numbers)):
        some = numbers[start : start + (64 if isinstance(spec, Rise) else len(numbers))]
        tasks = tuple(Task(at, spec, one[0], one[-1] + 1, numbers=one) for at, one in enumerate(some))
        (outcome,) = executor.execute([Item(image, (Target(top_k=1),), tasks)]).outcomes
        if not isinstance(outcome, ItemResult):
            raise outcome
        if isinstance(spec, (SsCam, IsCam)):  # of a channel's queries: their gains, and how many they are
            sums += [partial.sums[:, one[0] // each] for one, partial in zip(some, outcome.partials, strict=True)]
        elif isinstance(spec, Rise):
            sums += [partial.sums[:, ::2, ::2] for partial in outcome.partials]
        else:
            sums += [partial.sums for partial in outcome.partials]
    network, forward = executor.network, Forward(executor.network, Memory(0))
    targets = network.score.targets([explained.target for explained in outcome.targets])
    with network.evaluating():
        digest, seen = forward.seen(b"", image, Counter())
        (passed,) = forward.passed(network, layer.name, [Wanted(digest, seen, lambda _: targets, True)], Counter())
    return {
        "sums": np.stack(sums),
        "activations": passed.activations.detach().numpy(),
        "gradients": next(iter(passed.gradients.values())).detach().numpy(),
        "view": outcome.view.size,
    }


@dataclass(frozen=True)
class Asked:
    """Holds what each block of queries of one map has added."""

    spec: MethodSpec
    sums: np.ndarray
    activations: np.ndarray
    gradients: np.ndarray
    size: tuple[int, int]

    @classmethod
    def read(cls, path: Path, text: str) -> Asked:
        with np.load(path) as kept:
            height, width = (int(side) for side in kept["view"])
            values = (kept[name].astype(np.float64) for name in ("sums", "activations", "gradients"))
            return cls(parse_method_text(text), *values, (height, width))

    @cached_property
    def energies(self) -> np.ndarray:
        """Energies of the blocks as they are numbered; those of RISE are all the same."""
        if isinstance(self.spec, Rise):
            return np.ones(len(self.sums))
        return np.asarray(np.abs(self.activations).mean(axis=(1, 2)))

    @cached_property
    def asked(self) -> np.ndarray:
        """Whether a block was asked at all: constant channels are not."""
        return np.asarray(np.abs(self.sums).reshape(len(self.sums), -1).max(axis=1) > 0)

    def after(self, order: np.ndarray) -> np.ndarray:
        """Returns the merged sums after 1, 2, ... blocks in an order."""
        if isinstance(self.spec, (SsCam, IsCam)):
            channels = np.zeros((len(order), *self.sums.shape[1:], len(order)))
            channels[np.arange(len(order)), :, order] = self.sums[order]
            return np.asarray(channels.cumsum(axis=0))
        return np.asarray(self.sums[order].cumsum(axis=0))

    def partial(self, sums: np.ndarray, blocks: int) -> Partial:
        return Partial(0, blocks * self.spec.block, sums, context=self.activations)

    def map_of(self, sums: np.ndarray) -> np.ndarray:
        """Returns the final map of merged sums, at the input's size; RISE's at half of it, as what it adds is kept."""
        found = finished(self.spec, self.partial(sums, 1))[0]
        return normalise(found if isinstance(self.spec, Rise) else upsample(found, self.size))[0]


def orders(one: Asked) -> dict[str, np.ndarray]:
    """Returns the order of the blocks by each rule."""
    flat = one.activations.reshape(len(one.activations), -1)
    weights, norm = one.gradients.mean(axis=(1, 2)), np.linalg.norm(flat, axis=1)
    keys = {
        "energy: mean of abs(A)": one.energies,
        "mean of A": flat.mean(axis=1),
        "deviation of A over space": flat.std(axis=1),
        "largest A": flat.max(axis=1),
        "Grad-CAM: abs(w) times norm of A": np.abs(weights) * norm,
        "positive w times norm of A": weights.clip(0) * norm,
        "random": np.random.default_rng(0).random(len(flat)),
    }
    return {name: np.argsort(-key, kind="stable") for name, key in keys.items()}


def compared(all_: Sequence[Asked]) -> dict[str, Any]:
    """Returns for each order, after each share, the mean rank correlation, and two quantiles of the difference."""
    found: defaultdict[str, list[list[tuple[float, float]]]] = defaultdict(list)
    for one in all_:
        for name, order in orders(one).items():
            merged = one.after(order)
            final = one.map_of(merged[-1])
            if final.any():
                early = [one.map_of(merged[max(1, round(share * len(order))) - 1]) for share in SHARES]
                found[name].append([(_correlation(each, final), float(np.abs(each - final).max())) for each in early])
    return {
        name: {
            f"{share:.0%}": {
                "rank_correlation": statistics.mean(row[at][0] for row in rows),
                "difference_median": float(np.median([row[at][1] for row in rows])),
                "difference_90": float(np.quantile([row[at][1] for row in rows], 0.9)),
            }
            for at, share in enumerate(SHARES)
        }
        for name, rows in found.items()
    }


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    return float(spearmanr(one.ravel()[::7], other.ravel()[::7]).statistic) if one.any() and other.any() else 0.0


@dataclass(frozen=True)
class Seen:
    """Holds what one look at a map tells, and what is true."""

    share: float
    """Share of the queries answered."""
    passes: float
    """Share of the passes made: constant channels are numbered, but not asked."""
    estimate: float
    true: float


def followed(one: Asked) -> Iterator[list[Seen]]:
    """Yields for each rhythm of answers all looks at which a map might be taken to be good enough.

    The rhythms are steps of three sizes, as a gateway sends them, and that of a worker which asks alone.
    """
    order = np.argsort(-one.energies, kind="stable")
    merged, blocks, each = one.after(order), len(order), TOGETHER if isinstance(one.spec, Rise) else 1
    final = one.map_of(merged[-1])
    if not final.any():
        return
    made = one.asked[order].cumsum() / one.asked.sum()
    sizes = [blocks // 64, blocks // 32, blocks // 16]
    alone = sorted({max(1, round(at / each)) for at in looks(blocks * each)})
    for rhythm in (*(list(range(size, blocks, size)) for size in sizes if size), alone):
        energies = () if isinstance(one.spec, Rise) else tuple(one.energies[order].tolist())
        state = Convergence(one.spec, blocks * each * one.spec.block, energies, signed=False)
        seen = []
        for at in rhythm:
            if at >= blocks:
                break
            state.note(one.partial(merged[at - 1], at), at * each * one.spec.block)
            if state.estimates is not None and state.may_be_enough:
                true = float(np.abs(one.map_of(merged[at - 1]) - final).max())
                seen.append(Seen(at / blocks, float(made[at - 1]), state.estimates[0], true))
        yield seen


def stops(rows: Sequence[list[Seen]], tolerance: float, times: float = 1.0) -> list[Seen]:
    """Returns where each would have stopped, if estimates were `times` as large; all queries where it would not."""
    never = Seen(1.0, 1.0, 0.0, 0.0)
    found = [next((one for one in row if times * one.estimate <= tolerance), never) for row in rows]
    return [Seen(one.share, one.passes, times * one.estimate, one.true) for one in found]


def judged(rows: Sequence[list[Seen]]) -> dict[str, Any]:
    """Returns for each tolerance what is asked, and how often the true difference is below the estimate."""
    found = {}
    for tolerance in TOLERANCES:
        ends = stops(rows, tolerance)
        early = [one for one in ends if one.share < 1]
        found[f"{tolerance:g}"] = {
            "maps": len(ends),
            "stopped": len(early),
            "share": statistics.mean(one.share for one in ends),
            "share_90": float(np.quantile([one.share for one in ends], 0.9)),
            "passes": statistics.mean(one.passes for one in ends),
            "covered_of_stopped": statistics.mean(one.true <= one.estimate for one in early) if early else None,
            "within": statistics.mean(one.true <= tolerance for one in ends),
            "true_median": float(np.median([one.true for one in ends])),
            "true_largest": max(one.true for one in ends),
        }
    return found


def covered(rows: Sequence[list[Seen]], times: float = 1.0) -> float:
    """Returns how often the true difference is below the estimate, among the maps that stop early."""
    early = [one for tolerance in TOLERANCES for one in stops(rows, tolerance, times) if one.share < 1]
    return statistics.mean(one.true <= one.estimate for one in early) if early else 1.0


def least_factor(rows: Sequence[list[Seen]]) -> float:
    """Returns the smallest FACTOR, in steps of 0.05, from which on `COVERED` of the maps that stop are covered."""
    factors = [0.05 * step for step in range(10, 121)]
    good = [covered(rows, factor / convergence.FACTOR) >= COVERED for factor in factors]
    return next(factor for at, factor in enumerate(factors) if all(good[at:]))


def measure(keep: Path) -> dict[str, Any]:
    halves: dict[int, dict[str, list[list[Seen]]]] = {0: defaultdict(list), 1: defaultdict(list)}
    order: dict[str, Any] = {}
    for network, methods in ASKED.items():
        for text, number in methods.items():
            paths = [path_of(keep, network, text, at) for at in range(number)]
            found = [Asked.read(path, text) for path in paths if path.exists()]
            key = f"{network} / {method_text(parse_method_text(text))}"
            print(key, len(found), flush=True)
            if text in ("score_cam", "ablation_cam"):
                order[key] = {"images": len(found), "orders": compared(found)}
            for at, one in enumerate(found):
                halves[at % 2][key] += followed(one)
    fitted, others = ([row for rows in halves[half].values() for row in rows] for half in (0, 1))
    return {
        "orders": order,
        "numbers": {name: getattr(convergence, name) for name in NUMBERS},
        "least_factor": {"fitted": least_factor(fitted), "others": least_factor(others)},
        "covered": {"fitted": covered(fitted), "others": covered(others)},
        "fitted": {key: judged(rows) for key, rows in halves[0].items()},
        "others": {key: judged(rows) for key, rows in halves[1].items()},
    }


LADDER = (
    "grad_cam",
    "group_cam:groups=8",
    "group_cam:groups=32",
    "score_cam:tolerance=0.2",
    "score_cam:tolerance=0.1",
    "score_cam:tolerance=0.05",
    "score_cam",
)


def ladder(network: str, number: int) -> dict[str, dict[str, float]]:
    """Returns for each rung the mean of insertion minus deletion, of the passes, and of the difference to Score-CAM."""
    engine = Engine.load("lite0") if network == "lite0" else load_engine(network)
    found: defaultdict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for image in images(network)[:number]:
        answers = {text: engine.explain(image, [parse_method_text(text)], evaluate=True) for text in LADDER}
        for text, answer in answers.items():
            (one,) = answer.maps
            assert one.faithfulness is not None, "curves were asked"
            passes = answer.cost.queries - answer.cost.evaluation_queries
            apart = float(np.abs(one.array - answers["score_cam"].maps[0].array).max())
            found[text].append((one.faithfulness.overall, passes, apart))
    names = ("overall", "passes", "difference")
    return {
        text: dict(zip(names, map(statistics.mean, zip(*rows, strict=True)), strict=True))
        for text, rows in found.items()
    }


def tables(content: Mapping[str, Any]) -> tuple[str, str, str]:
    """Returns the tables of orders, of tolerances and of the rungs of `auto` as Markdown."""
    names = list(next(iter(content["orders"].values()))["orders"])
    lines = [f"| network / method, images | {' | '.join(names)} |", f"| --- |{' ---: |' * len(names)}"]
    for key, found in content["orders"].items():
        quarter = (found["orders"][name]["25%"] for name in names)
        cells = (f"{one['rank_correlation']:.3f} / {one['difference_median']:.3f}" for one in quarter)
        lines.append(f"| {key}, {found['images']} | {' | '.join(cells)} |")
    rows = [
        "| network / method | within | stopped early | queries | passes | covered | true difference: median, largest |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for key, of_key in content["others"].items():
        for tolerance in ("0.05", "0.1"):
            one = of_key[tolerance]
            part = one["covered_of_stopped"]
            rows.append(
                f"| {key} | {tolerance} | {one['stopped']} of {one['maps']} | {one['share']:.0%} | {one['passes']:.0%} "
                f"| {'-' if part is None else f'{part:.0%}'} | {one['true_median']:.3f}, {one['true_largest']:.3f} |"
            )
    rows += ["", f"Made with {common.made_with(content['environment'])}."]
    rungs = ["| rung | " + " | ".join(f"{name}: insertion - deletion, passes" for name in content["ladder"]) + " |"]
    rungs.append("| --- |" + " ---: |" * len(content["ladder"]))
    for text in LADDER:
        cells = (f"{found[text]['overall']:.3f}, {found[text]['passes']:.0f}" for found in content["ladder"].values())
        rungs.append(f"| `{text}` | {' | '.join(cells)} |")
    return "\n".join(lines), "\n".join(rows), "\n".join(rungs)


def rendered(page: str, content: Mapping[str, Any]) -> str:
    """Returns the page with the tables made anew."""
    for name, text in zip(("orders", "tolerances", "ladder"), tables(content), strict=True):
        page = common.embedded(page, name, text)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ask", "measure", "ladder", "render"))
    parser.add_argument("--keep", type=Path, help="folder of what the queries add")
    parser.add_argument("--networks", nargs="+", choices=list(ASKED), default=list(ASKED))
    parser.add_argument("--images", type=int, default=1000, help="at most so many of each network")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    if given.what == "render":
        PAGE.write_text(rendered(PAGE.read_text(), json.loads(RESULTS.read_text())))
    elif given.what == "ladder":
        found = {name: ladder(name, number) for name, number in (("lite0", 8), ("digits", 12))}
        common.write(given.out, json.loads(given.out.read_text()) | {"ladder": found})
    elif given.what == "ask":
        ask(given.keep, given.networks, given.images)
    else:
        content = {"environment": common.environment(torch.device("cpu")), **measure(given.keep)}
        common.write(given.out, content)
        print(f"covered: {content['covered']}; least factor: {content['least_factor']}; written to {given.out}")


if __name__ == "__main__":
    main()

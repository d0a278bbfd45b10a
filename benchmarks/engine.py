"""Times the engine's methods beside grad-cam, torchcam, Captum and PAIR's saliency, and beside what is possible.

    python benchmarks/engine.py                            # results/engine-cpu.json; about two hours on two cores
    python benchmarks/engine.py --device cuda              # results/engine-cuda.json
    python benchmarks/engine.py --out benchmarks/results/engine-cpu-avx2.json  # on a processor without AVX-512
    python benchmarks/engine.py --only 'lite0/*' '*/xrai'  # these rows; the others are as they were measured before
    python benchmarks/engine.py --quick                    # a tiny network, one call of each: does it run?
    python benchmarks/engine.py --render                   # the tables from the results, at once

A row is a method on a network. All who can make its map take turns in one process, on the same network, image, class,
layer and threads. camserve is timed with everything that a call of `explain` does (normalising the pixels, predictions,
the final map in numpy); the others are given the normalised tensor, once with their own batch sizes and once with the
one at which the network is fastest. The Score-CAMs are different variants with the same number of queries: their times
compare, their maps do not.

Beside each row is its limit, the floating-point operations of its passes at the best rate of a large float32 matrix
product, and the best rate of plain forward passes of any batch size in any runtime. No row can be faster than the first
unless precision is given up, and a row of masked queries is done well where it is close to the second.

A first call longer than SLOW_S is the only one. The others' calls are stopped after `--bound` seconds, and what the
whole would have taken is told from the passes until then: "share" in the results is that of their images.

A row is on disk as soon as it is measured, in build/engine/<commit>; the next run goes on from there. Delete that
folder to start anew, also after changes that are not committed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import common
import engine_report as report
import memory
import numpy as np
import passes
import peers
import torch
from scipy.stats import spearmanr
from subjects import SUBJECTS, Bench, prepare

from camserve.errors import CamserveError, InvalidInput, NotFound
from camserve.journal import Journal
from camserve.types import Explanation

Case = Callable[[], object]
Content = dict[str, Any]
EXACT, AUTO, WITHIN = report.EXACT, report.AUTO, report.WITHIN
SLOW_S = 8.0
"""Seconds of a call from which it is the only one."""
QUICK_S, MORE = 1.0, 3
"""Seconds of a call up to which there are more rounds, and how many times as many: a short call varies most."""
NETWORKS = ("lite0", "lite2", "resnet18", "resnet50", "vgg16", "vit_b_16")
PACKAGES = ("captum", "saliency", "onnxruntime")
SAME = {"grad_cam": "grad-cam", "group_cam": "one by one"}
"""Whose map of the same definition ours is compared with, by row: it shows that the same is timed."""


@dataclass(frozen=True)
class Configuration:
    """Says how camserve is asked."""

    precision: str
    tolerance: float | None = None
    """Difference of the normalised map that is accepted for fewer queries."""


CONFIGURATIONS = {EXACT: Configuration("exact"), AUTO: Configuration("auto"), WITHIN: Configuration("auto", 0.05)}


@dataclass(frozen=True)
class Asked:
    """Says what a row asks of camserve."""

    method: str
    targets: int = 1
    evaluate: bool = False
    tolerant: bool = False
    """Whether the method can stop when its map is within a tolerance."""


METHODS = {
    "grad_cam": Asked("grad_cam"),
    "five_targets": Asked("grad_cam", targets=5),
    "eigen_cam": Asked("eigen_cam"),
    "group_cam": Asked("group_cam"),
    "score_cam": Asked("score_cam", tolerant=True),
    "ablation_cam": Asked("ablation_cam", tolerant=True),
    "rise": Asked("rise", tolerant=True),
    "integrated_gradients": Asked("integrated_gradients"),
    "xrai": Asked("xrai"),
    "curves": Asked("grad_cam", evaluate=True),
}


def ours(bench: Bench, asked: Asked, configuration: Configuration, layer: str = "") -> Explanation:
    """Returns camserve's answer.

    Raises:
        InvalidInput: this version does not know the precision, or the tolerance of the method.
    """
    parameters: dict[str, Any] = {"masks": bench.subject.rise_masks} if asked.method == "rise" else {}
    if configuration.tolerance is not None:
        parameters["tolerance"] = configuration.tolerance
    options = {"precision": configuration.precision, "layer": layer or bench.layer, "evaluate": asked.evaluate}
    targets = bench.targets[: asked.targets]
    return bench.engine.explain(bench.pixels, [(asked.method, parameters)], targets, **options)


RATIO_ROWS = ("grad_cam", "five_targets", "eigen_cam", "group_cam", "score_cam", "integrated_gradients", "curves")
RATIOS, RATIO_NETWORK = "ratios", "lite0"


def ratios(bench: Bench, rounds: int) -> dict[str, float]:
    """Returns how long rows take, over their passes as plain forward passes at the best rate, all in turns.

    These are what `regress.py` measures again: a Score-CAM is one at a layer of few channels, and nobody else takes
    part. The fastest of all rounds counts, which a machine that is busy for a while changes least.
    """
    name, batch = passes.fastest(passes.rates(bench))
    found: dict[str, Case] = {"plain": partial(passes.plain(bench)[name], bench.x.repeat(batch, 1, 1, 1))}
    for row in RATIO_ROWS:
        layer = bench.subject.small_layer if row == "score_cam" else ""
        for configuration in (EXACT, AUTO):
            found[f"{row}, {configuration}"] = partial(ours, bench, METHODS[row], CONFIGURATIONS[configuration], layer)
    first, _ = first_calls(bench, found)
    seconds = common.in_turns({each: found[each] for each in first}, rounds, bench.device, warm=True)
    pass_s = min(seconds.pop("plain")) / batch
    asked = {each: first[each].result for each in seconds}
    return {each: min(taken) / pass_s / (1 + asked[each].cost.queries) for each, taken in seconds.items()}


@dataclass(frozen=True)
class First:
    """Holds what the first call of a case told."""

    seconds: float
    peak: memory.Peak
    result: object


def cases(bench: Bench, row: str, bound_s: float) -> tuple[dict[str, Case], dict[str, str]]:
    """Returns what is timed by its name in the tables, and the reasons for what is not."""
    asked = METHODS[row]
    found: dict[str, Case] = {
        name: partial(ours, bench, asked, configuration)
        for name, configuration in CONFIGURATIONS.items()
        if asked.tolerant or configuration.tolerance is None
    }
    if row == "grad_cam":
        found |= {f"plain forward, {who}": partial(call, bench.x) for who, call in passes.plain(bench).items()}
    if row == "five_targets":
        found[report.ONE_TARGET] = partial(ours, bench, METHODS["grad_cam"], CONFIGURATIONS[EXACT])
    left_out: dict[str, str] = {}
    for name, peer in peers.offered(bench, row).items():
        if isinstance(peer, str):
            left_out[name] = peer
        else:
            found[name] = partial(peers.at_most, bound_s, peer, bench.theirs)
    return found, left_out


def first_calls(bench: Bench, found: Mapping[str, Case]) -> tuple[dict[str, First], dict[str, str]]:
    """Calls each case once; returns what that told, and the reasons why some cannot be called.

    A failure of camserve's own that is not a refusal is raised: a figure that is missing would look like none.
    """
    first, refused = {}, {}
    for name, case in found.items():
        floor = partial(micro_batch, bench) if name in CONFIGURATIONS else lambda: None
        try:
            peak, (seconds, result) = memory.peak_of(partial(common.timed, case, bench.device), bench.device, floor)
        except InvalidInput as error:
            refused[name] = f"not in this version: {error}"
        except CamserveError as error:
            refused[name] = str(error)
        except Exception as error:
            if report.is_ours(name):
                raise
            refused[name] = f"{type(error).__name__}: {error}"[:200]
        else:
            first[name] = First(seconds, peak, result)
    return first, refused


def measure_row(bench: Bench, row: str, network: Content, rounds: int, bound_s: float) -> Content:
    """Returns the figures of one method on one network, and its limits."""
    gc.collect()  # what earlier rows left behind would be freed while a case's memory is looked at
    found, left_out = cases(bench, row, bound_s)
    first, refused = first_calls(bench, found)
    answer = first[EXACT].result
    assert isinstance(answer, Explanation)
    if all(saliency.degenerate for saliency in answer.maps):
        raise ValueError(f"{bench.name}/{row}: the map is constant, and the time of such a map says nothing")
    fast = {
        name: found[name]
        for name, one in first.items()
        if one.seconds < SLOW_S and not isinstance(one.result, peers.Stopped)
    }
    # A second call tells how short a case is: the first one may have had something to set up.
    quick = all(
        first[each].seconds < SLOW_S / 4 and common.timed(fast[each], bench.device)[0] < QUICK_S for each in fast
    )
    more, before_each_s = (MORE, common.BEFORE_EACH_S) if quick else (1, 0.0)
    seconds = common.in_turns(fast, rounds * more, bench.device, warm=True, before_each_s=before_each_s)
    return {
        **passes.limits(row, answer.cost.queries, network),
        "cases": {
            name: timing(one, seconds.get(name, [])) | compared(answer, one.result, name == SAME.get(row))
            for name, one in first.items()
        },
        "left_out": left_out | refused,
    }


def timing(first: First, seconds: Sequence[float]) -> Content:
    """Returns the seconds of a case: of its only call where it is slow, and of the whole one where it was stopped."""
    stopped = first.result if isinstance(first.result, peers.Stopped) else None
    taken = [stopped.whole_s] if stopped else list(seconds) or [first.seconds]
    figures: Content = {
        "median_s": float(np.median(taken)),
        "min_s": min(taken),
        "max_s": max(taken),
        "rounds": len(taken),
        "share": stopped.share if stopped else 1.0,
        "peak_bytes": first.peak.beyond_start,
    }
    if isinstance(first.result, Explanation):
        cost = dataclasses.asdict(first.result.cost)
        told = ("queries", "runtime", "precision", "micro_batch", "tolerance", "share")
        figures["beyond_micro_batch_bytes"] = first.peak.beyond_floor
        figures["cost"] = {name: cost[name] for name in told if name in cost}
    return figures


def compared(exact: Explanation, result: object, same: bool) -> Content:
    """Returns how far a map is from that of camserve's EXACT, where it is camserve's own or of the same definition."""
    one = result.maps[0].array if isinstance(result, Explanation) else result
    if result is exact or not (same or isinstance(result, Explanation)) or not isinstance(one, np.ndarray):
        return {}
    reference, one = exact.maps[0].array, np.asarray(one).reshape(exact.maps[0].array.shape)
    flat = not reference.any() or not one.any()
    correlation = None if flat else float(spearmanr(reference.ravel(), one.ravel()).statistic)
    return {"largest_difference": float(np.abs(reference - one).max()), "rank_correlation": correlation}


def micro_batch(bench: Bench) -> None:
    """Makes one forward pass of as many images as camserve asks at once: memory beyond that is what a map costs."""
    passes.scores(bench, "exact", bench.x.repeat(bench.engine.network.micro_batch, 1, 1, 1))


def rows_of(networks: Sequence[str], only: Sequence[str]) -> dict[str, list[str]]:
    """Returns the methods to measure by network, of the rows `network/method` that fit one of the patterns."""
    all_rows = {name: [*METHODS, *([RATIOS] if name == RATIO_NETWORK else [])] for name in networks}
    found = {
        name: [row for row in rows if any(fnmatch(f"{name}/{row}", each) for each in only)]
        for name, rows in all_rows.items()
    }
    return {name: rows for name, rows in found.items() if rows}


@dataclass(frozen=True)
class Run:
    """Measures rows and keeps them in a journal."""

    journal: Journal
    device: torch.device
    rounds: int
    bound_s: float

    def measure(self, rows: Mapping[str, Sequence[str]]) -> Iterator[str]:
        """Measures what the journal does not have; yields a line for people after each part."""
        for name, methods in rows.items():
            if all(self.find("row", f"{name}/{row}") for row in methods):
                continue
            try:
                bench = prepare(name, self.device)
            except (ImportError, NotFound) as error:  # weights, or the package of the network
                self._add("left out", name, {"left_out": str(error)})
                yield f"{name}: left out, {error}"
                continue
            yield from self._network(bench, methods)
            del bench
            gc.collect()

    def _network(self, bench: Bench, methods: Sequence[str]) -> Iterator[str]:
        network = self.find("network", bench.name)
        if network is None:
            network = {**passes.described(bench), "commit": common.commit()}
            self._add("network", bench.name, network)
            yield f"{bench.name}: {passes.best_rate(network):.1f} images/s at best"
        bench = dataclasses.replace(bench, batch=passes.best_batch(network["rates"][passes.PYTORCH]))
        for row in methods:
            key = f"{bench.name}/{row}"
            if self.find("row", key) is None:
                seconds, figures = common.timed(partial(self._row, bench, row, network), self.device)
                self._add("row", key, {**figures, "measuring_s": seconds})
                yield report.line(key, figures)

    def _row(self, bench: Bench, row: str, network: Content) -> Content:
        if row == RATIOS:
            return {RATIOS: ratios(bench, self.rounds)}
        return measure_row(bench, row, network, self.rounds, self.bound_s)

    def begun(self, now: Content) -> Content:
        """Returns what was around when the first row was measured, which is now where none has been."""
        if self.find("environment", "first") is None:
            self._add("environment", "first", now)
        return self.find("environment", "first") or now

    def find(self, kind: str, name: str) -> Content | None:
        """Returns what the journal has, of a network or a row."""
        record = self.journal.find({"kind": kind, "method": name})
        return None if record is None else record["figures"]

    def _add(self, kind: str, name: str, figures: Content) -> None:
        self.journal.add({"kind": kind, "method": name, "figures": figures})

    def results(self) -> Content:
        """Returns all that was measured, in the order of the tables."""
        networks = {name: self.find("network", name) or self.find("left out", name) for name in SUBJECTS}
        keys = [f"{name}/{row}" for name in networks for row in METHODS]
        return {
            "networks": {name: network for name, network in networks.items() if network},
            "rows": {key: found for key in keys if (found := self.find("row", key))},
            RATIOS: (self.find("row", f"{RATIO_NETWORK}/{RATIOS}") or {}).get(RATIOS, {}),
        }


def environment(device: torch.device) -> Content:
    found = common.environment(device)
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found["versions"][name] = version(name)
    return found


def measured(
    rows: Mapping[str, Sequence[str]], device: torch.device, rounds: int, bound_s: float, work: Path
) -> Content:
    """Returns the content of the results file."""
    now = environment(device)
    settings = {"device": now["device"], "threads": now["torch_threads"], "rounds": rounds, "bound_s": bound_s}
    run = Run(Journal(work / f"{device.type}.jsonl", settings), device, rounds, bound_s)
    around = run.begun(now)
    for line in run.measure(rows):
        print(line, flush=True)
    content = {"environment": around, "settings": settings, **run.results()}
    return {**content, "goals": report.goals(content)}


def results_file(device: torch.device) -> Path:
    return report.RESULTS / f"engine-{device.type}.json"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--networks", nargs="+", choices=SUBJECTS, default=list(NETWORKS))
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of rows: lite0/grad_cam, '*/xrai'")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of cases that are not slow")
    parser.add_argument("--bound", type=float, default=60.0, help="seconds after which a call of the others is stopped")
    parser.add_argument("--quick", action="store_true", help="a tiny network, one call each, a journal beside --out")
    parser.add_argument("--work", type=Path, help="for the journal; default: build/engine/<commit>")
    parser.add_argument("--out", type=Path, help="default: results/engine-<device>.json beside this file")
    parser.add_argument("--render", action="store_true", help="only write the tables, from the results")
    return parser


def main() -> None:
    given = _parser().parse_args()
    device = torch.device(given.device)
    if given.render:
        report.render()
        return
    out = given.out or results_file(device)
    if given.quick:
        given.networks, given.rounds, given.work = ["tiny"], 0, given.work or out.parent / f"{out.stem}-journal"
    commit = environment(device)["commit"].partition("+")[0]
    work = given.work or common.ROOT / "build" / "engine" / (commit or "no-commit")
    content = measured(rows_of(given.networks, given.only), device, given.rounds, given.bound, work)
    common.write(out, {"quick": given.quick, **content})
    print(report.pages(content))
    print(f"\nwritten to {out}")


if __name__ == "__main__":
    main()

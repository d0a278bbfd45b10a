"""Turns results of `engine.py` into goals that are met or missed, and into tables for the README and the docs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import common
from passes import AUTO, EXACT, ONNX, PYTORCH

Content = Mapping[str, Any]
Figure = Callable[[Content], float | None]
WITHIN = "camserve auto, within 0.05"
OURS = (EXACT, AUTO, WITHIN)
ONE_TARGET = f"{EXACT}, one target"
PAGE = common.ROOT / "docs" / "performance.md"
RESULTS = Path(__file__).parent / "results"
TABLES = (
    (common.README, "speed", "engine-cpu"),
    (PAGE, "engine", "engine-cpu"),
    (PAGE, "engine-avx2", "engine-cpu-avx2"),
    (PAGE, "engine-cuda", "engine-cuda"),
)
"""Page, name of the part that is written, and name of its results."""
TITLES = {
    "grad_cam": "Grad-CAM",
    "five_targets": "Grad-CAM, 5 targets",
    "eigen_cam": "Eigen-CAM",
    "group_cam": "Group-CAM",
    "score_cam": "Score-CAM",
    "ablation_cam": "Ablation-CAM",
    "rise": "RISE",
    "integrated_gradients": "Integrated Gradients",
    "xrai": "XRAI",
    "curves": "Grad-CAM with insertion and deletion",
}
MIB = 2**20
NOTHING = "This version has not been measured yet."


@dataclass(frozen=True)
class Goal:
    """Describes a ratio of one run and what it is to be."""

    what: str
    figure: Figure
    bound: float
    at_least: bool = False

    def judged(self, content: Content) -> dict[str, Any]:
        """Returns figure, bound and whether it is met; both are None where the rows were not measured."""
        figure = self.figure(content)
        met = None if figure is None else (figure >= self.bound if self.at_least else figure <= self.bound)
        return {
            "what": self.what,
            "figure": figure,
            "goal": self.bound,
            "at_least": self.at_least,
            "met": met,
        }


# Figures: each takes the content of the results and returns a ratio, or None where a part of it is missing


def _case(content: Content, row: str, name: str) -> Mapping[str, Any] | None:
    found: Mapping[str, Any] | None = content["rows"].get(row, {}).get("cases", {}).get(name)
    return found


def _median(content: Content, row: str, name: str) -> float | None:
    case = _case(content, row, name)
    return None if case is None else case["median_s"]


def ratio(one: float | None, other: float | None) -> float | None:
    """Returns one over the other, None where one of them is missing."""
    return None if one is None or not other else one / other


def over_plain(row: str, content: Content) -> float | None:
    """Returns predictions and map over the fastest plain forward pass of one image."""
    plain = [_median(content, row, f"plain forward, {who}") for who in (EXACT, PYTORCH, ONNX)]
    return ratio(_median(content, row, EXACT), min((each for each in plain if each), default=None))


def over(row: str, name: str, other: str, content: Content) -> float | None:
    """Returns the time of one case over that of another in the same row."""
    return ratio(_median(content, row, name), _median(content, row, other))


def fastest_peer(row: Content, among: str = "") -> str | None:
    """Returns the case of others that took the least time, of those whose name begins so."""
    found = {name: case["median_s"] for name, case in row["cases"].items() if _is_peer(name)}
    named = {name: seconds for name, seconds in found.items() if name.startswith(among)}
    return min(named, key=named.__getitem__) if named else None


def is_ours(name: str) -> bool:
    """Tells whether a case is camserve's."""
    return "camserve" in name


def _is_peer(name: str) -> bool:
    return not is_ours(name) and not name.startswith("plain forward")


def faster(row: str, name: str, peer: str, content: Content) -> float | None:
    """Returns how many times as long the fastest of a library's cases takes; "" stands for all libraries."""
    other = fastest_peer(content["rows"][row], peer) if row in content["rows"] else None
    return None if other is None else over(row, other, name, content)


def over_bound(row: str, bound: str, content: Content) -> float | None:
    """Returns EXACT over the row's `limit_s` or `best_rate_s`."""
    return ratio(_median(content, row, EXACT), content["rows"].get(row, {}).get(bound))


def within(row: str, content: Content) -> float | None:
    """Returns the true largest difference of the map within 0.05 from that of all queries."""
    case = _case(content, row, WITHIN)
    return None if case is None else case["largest_difference"]


def auto_correlation(content: Content) -> float | None:
    """Returns the least rank correlation of a map of AUTO with that of EXACT; networks of random weights count too."""
    found = [row["cases"].get(AUTO, {}).get("rank_correlation") for row in content["rows"].values()]
    return min((each for each in found if each is not None), default=None)


def beyond_micro_batch(row: str, content: Content) -> float | None:
    """Returns MiB beyond the model and one micro-batch."""
    case = _case(content, row, EXACT)
    found = None if case is None else case["beyond_micro_batch_bytes"]
    return None if found is None else found / MIB


def _each(
    what: str, figure: Callable[..., float | None], row: str, networks: str, bound: float, *given: Any
) -> Iterator[Goal]:
    for network in networks.split():
        yield Goal(f"{what}, {network}", partial(figure, f"{network}/{row}", *given), bound)


def _wins(what: str, row: str, name: str, peer: str, bounds: Mapping[str, float]) -> Iterator[Goal]:
    for network, bound in bounds.items():
        yield Goal(f"{what}, {network}", partial(faster, f"{network}/{row}", name, peer), bound, at_least=True)


CNNS = "lite0 resnet18 resnet50"
GOALS = (
    *_each("predictions and Grad-CAM over one plain forward pass", over_plain, "grad_cam", CNNS, 1.25),
    *_wins("Grad-CAM: torchcam over camserve", "grad_cam", EXACT, "torchcam", {"lite0": 3, "resnet50": 1.5}),
    *_wins("Grad-CAM: Captum over camserve", "grad_cam", EXACT, "Captum", {"lite0": 3}),
    *_wins("Grad-CAM: grad-cam over camserve", "grad_cam", EXACT, "grad-cam", {"lite0": 8}),
    *_each("five targets over one", over, "five_targets", CNNS, 1.3, EXACT, ONE_TARGET),
    *_wins(
        "Score-CAM: the fastest other over camserve exact",
        "score_cam",
        EXACT,
        "",
        {"lite0": 4, "resnet18": 1.6, "resnet50": 1.6},
    ),
    *_each("Score-CAM over the processor's limit", over_bound, "score_cam", "resnet18 resnet50", 1.3, "limit_s"),
    *_wins(
        "Score-CAM: the fastest other over camserve within 0.05", "score_cam", WITHIN, "", {"lite0": 12, "resnet18": 5}
    ),
    *_each("Score-CAM within 0.05: the true difference", within, "score_cam", CNNS, 0.05),
    *_each("Group-CAM over its forward passes at the best rate", over_bound, "group_cam", CNNS, 1.2, "best_rate_s"),
    *_each("RISE over its forward passes at the best rate", over_bound, "rise", CNNS, 1.15, "best_rate_s"),
    *_wins("Ablation-CAM: grad-cam over camserve", "ablation_cam", EXACT, "grad-cam", {"lite0": 500, "resnet50": 500}),
    *_wins("Eigen-CAM: grad-cam over camserve", "eigen_cam", EXACT, "grad-cam", {"lite0": 20, "resnet50": 20}),
    *_each("insertion and deletion over their passes at the best rate", over_bound, "curves", CNNS, 1.2, "best_rate_s"),
    *_each("Score-CAM: MiB beyond the model and one micro-batch", beyond_micro_batch, "score_cam", CNNS, 64),
    Goal("AUTO: least rank correlation with EXACT of any row", auto_correlation, 0.99, at_least=True),
)
ON_GPUS = (
    Goal(
        "RISE: masked queries a second over the best plain rate, resnet50",
        lambda content: ratio(1, over_bound("resnet50/rise", "best_rate_s", content)),
        0.9,
        at_least=True,
    ),
    *_wins("Score-CAM: torchcam over camserve", "score_cam", EXACT, "torchcam", {"resnet50": 10}),
)


def goals(content: Content) -> list[dict[str, Any]]:
    """Returns every goal that this program can show, with its figure; those of GPUs where one was measured."""
    gpu = content["settings"]["device"] != content["environment"]["cpu"]
    return [goal.judged(content) for goal in (*GOALS, *(ON_GPUS if gpu else ()))]


# Tables


def line(key: str, row: Content) -> str:
    """Returns what people see while rows are measured."""
    if "cases" not in row:
        return f"{key}: measured"
    figures = ", ".join(f"{name} {_seconds(case['median_s'])}" for name, case in row["cases"].items())
    left_out = "".join(f"; {name}: {why}" for name, why in row["left_out"].items())
    return f"{key}: {figures}; limit {_seconds(row['limit_s'])}{left_out}"


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{1000 * seconds:.{0 if seconds >= 0.02 else 1}f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.{1 if ratio < 100 else 0}f}"


def _share(case: Content) -> str:
    return "" if case["share"] == 1 else " \\*"


def rows_table(content: Content) -> str:
    """Returns the table of all rows: our times, the others in multiples of EXACT, what is possible."""
    lines = [
        "| map of one photo | exact | auto | within 0.05 | others | limit | best rate | peak, fastest other |",
        "| --- | ---: | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    for key, row in content["rows"].items():
        network, _, method = key.partition("/")
        cells = [f"{TITLES[method]}, `{network}`", *(_seconds(_median(content, key, name)) for name in OURS)]
        cells += [_others(content, key, row), _over_bound(content, key, "limit_s")]
        cells += [_over_bound(content, key, "best_rate_s"), _peaks(row)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _others(content: Content, key: str, row: Content) -> str:
    found = [
        f"{name} {_times(over(key, name, EXACT, content))}{_share(case)}"
        for name, case in row["cases"].items()
        if _is_peer(name)
    ]
    return ", ".join(found) or "-"


def _over_bound(content: Content, key: str, bound: str) -> str:
    figure = over_bound(key, bound, content)
    return "-" if figure is None else f"{_seconds(content['rows'][key][bound])}, {figure:.2f} x"


def _peaks(row: Content) -> str:
    names = [EXACT, fastest_peer(row)]
    peaks = [row["cases"][name]["peak_bytes"] for name in names if name]
    return ", ".join("-" if peak is None else f"{peak / MIB:.0f} MiB" for peak in peaks)


def networks_table(content: Content) -> str:
    """Returns the table of plain forward passes."""
    lines = ["| network | GFLOP a pass | images a second, by batch size |", "| --- | ---: | --- |"]
    for name, network in content["networks"].items():
        if "left_out" in network:
            lines.append(f"| `{name}` | - | left out: {network['left_out']} |")
            continue
        rates = [
            f"{who} {', '.join(f'{batch}: {rate:.1f}' for batch, rate in rate.items())}"
            for who, rate in network["rates"].items()
        ]
        lines.append(f"| `{name}` | {network['flops'] / 1e9:.2f} | {'; '.join(rates)} |")
    return "\n".join(lines)


def goals_table(content: Content) -> str:
    """Returns the table of goals."""
    lines = ["| goal | figure | wanted | met |", "| --- | ---: | ---: | --- |"]
    for goal in content["goals"]:
        figure = "not measured" if goal["figure"] is None else f"{goal['figure']:.3g}"
        wanted = f"{'at least' if goal['at_least'] else 'at most'} {goal['goal']:g}"
        met = {True: "yes", False: "**no**", None: "-"}[goal["met"]]
        lines.append(f"| {goal['what']} | {figure} | {wanted} | {met} |")
    return "\n".join(lines)


def readme_table(content: Content) -> str:
    """Returns the README's table: what most people ask for, and the fastest other."""
    if not content["rows"]:
        return NOTHING
    lines = [
        "| map of one photo | camserve | within 0.05 | fastest other | processor's limit |",
        "| --- | ---: | ---: | --- | ---: |",
    ]
    for key in (f"{network}/{row}" for network in CNNS.split() for row in ("grad_cam", "group_cam", "score_cam")):
        if (row := content["rows"].get(key)) is None:
            continue
        network, _, method = key.partition("/")
        other = fastest_peer(row)
        theirs = "-" if other is None else f"{other}: {_times(over(key, other, EXACT, content))} times"
        cells = [f"{TITLES[method]}, `{network}`", *(_seconds(_median(content, key, name)) for name in (EXACT, WITHIN))]
        lines.append("| " + " | ".join([*cells, theirs, _seconds(row["limit_s"])]) + " |")
    return "\n".join([*lines, "", caption(content)])


def caption(content: Content) -> str:
    """Returns what the figures were measured with."""
    machine = content["environment"]
    versions = [f"{name} {machine['versions'][name]}" for name in VERSIONS if machine["versions"].get(name)]
    flags = f", {machine['cpu_flags'][-1]}" if machine["cpu_flags"] else ""
    busy = f" The machine was busy: load {machine['load_average']:.1f}." if machine["load_average"] >= BUSY else ""
    return (
        f"{machine['device']}{flags}, {machine['torch_threads']} threads; {', '.join(versions)}; "
        f"{common.made_with(machine)}{_later(content)}.{busy}"
    )


def _later(content: Content) -> str:
    """Returns which networks were measured at another commit than the first one, "" if none was."""
    first = content["environment"]["commit"]
    found = {name: network.get("commit", first) for name, network in content["networks"].items()}
    return "".join(f"; `{name}` at {common.named(at)}" for name, at in found.items() if at != first)


BUSY = 0.7
"""Load at the start of a run from which its figures are said to be those of a busy machine."""
VERSIONS = ("grad-cam", "torchcam", "captum", "saliency", "onnxruntime")


def pages(content: Content) -> str:
    """Returns the text of docs/performance.md between its markers."""
    if not content["rows"] and not content["networks"]:
        return f"{NOTHING}\n\n{goals_table(content)}"
    met = [goal["met"] for goal in content["goals"]]
    counts = f"{met.count(True)} met, {met.count(False)} missed, {met.count(None)} not measured"
    share = "\\* stopped before its end, and told from the passes until then." * any(
        case["share"] != 1 for row in content["rows"].values() for case in row["cases"].values()
    )
    left_out = sorted({f"{name}: {why}" for row in content["rows"].values() for name, why in row["left_out"].items()})
    remarks = [caption(content), share, f"Left out: {'; '.join(left_out)}." if left_out else ""]
    parts = [f"Goals: {counts}.", goals_table(content), rows_table(content), *remarks, networks_table(content)]
    return "\n\n".join(part for part in parts if part)


def rendered(text: str, name: str, content: Content) -> str:
    """Returns a page with the tables of a part made anew: of the README's "speed", or of docs/performance.md."""
    return common.embedded(text, name, readme_table(content) if name == "speed" else pages(content))


def tables() -> Iterator[tuple[Path, str, Content]]:
    """Yields the page, the name of the part and the results of each table in the README and docs/performance.md."""
    for path, name, results in TABLES:
        yield path, name, json.loads((RESULTS / f"{results}.json").read_text())


def render() -> None:
    """Writes the tables of all results into the README and docs/performance.md."""
    for path, name, content in tables():
        path.write_text(rendered(path.read_text(), name, content))

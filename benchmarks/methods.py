"""Makes the README's table of methods: which one finds the object, which one is faithful, what each costs.

    OMP_NUM_THREADS=2 python benchmarks/methods.py measure    # results/methods-cpu.json; some ten minutes on two cores
    python benchmarks/methods.py render                       # the README's table from that file, at once
    python benchmarks/methods.py measure --scenes 2 --photos coffee --methods "cam group_cam" --out /tmp/methods.json

Measuring is `camserve evaluate` on the digits benchmark and on photos of scikit-image with lite0, every method with its
default parameters. (On these networks of classes D-RISE is RISE with a finer grid.) It keeps its journals in
build/methods/<commit> and goes on from there when it was stopped; delete that folder to start anew, also after changes
that are not committed.

Times are taken apart from that, one map of the first photo at a time, the methods taking turns. The time of a method of
more than SLOW_QUERIES queries is that of its maps in the evaluation.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
from PIL import Image
from rich.console import Console
from skimage import data

from camserve import Engine
from camserve.cli.terminal import duration
from camserve.evaluation import command
from camserve.methods import METHODS, MethodSpec, parse_method_text

Content = dict[str, Any]
MODEL = "lite0"
PROTOCOL = "rise"
SLOW_QUERIES = 2000
TABLE = "methods table"
"""Name of the README's markers around the table."""
ON_DIGITS = (
    "images",
    "maps",
    "degenerate",
    "pointing",
    "pointing_15px",
    "energy",
    "iou",
    "bbox",
    "least_likely_energy",
)
ON_PHOTOS = ("images", "maps", "degenerate", "rise_insertion", "rise_deletion", "rise_overall", "queries")


def measure(methods: Sequence[MethodSpec], scenes: int, photos: Sequence[str], rounds: int, work: Path) -> Content:
    """Returns figures of every method, and what they were measured with; continues what `work` has."""
    images = work / f"images-{'-'.join(photos)}"
    paths = [_photo(name, images) for name in photos]
    where = {"model": MODEL, "images": None, "boxes": None, "benchmark": None, "limit": None}
    digits = evaluated(methods, work / "digits", {**where, "model": None, "benchmark": command.DIGITS, "limit": scenes})
    faithful = evaluated(methods, work / f"photos-{'-'.join(photos)}", {**where, "images": images})
    return {
        "digits": {"settings": digits["settings"], "methods": kept(digits["methods"], ON_DIGITS)},
        "photos": {
            "settings": faithful["settings"],
            "names": list(photos),
            "methods": kept(faithful["methods"], ON_PHOTOS),
        },
        "times": _times(methods, faithful["methods"], paths[0], rounds),
    }


def _photo(name: str, folder: Path) -> Path:
    path = folder / f"{name}.png"
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(getattr(data, name)()).save(path)
    return path


def evaluated(methods: Sequence[MethodSpec], out: Path, what: Mapping[str, Any]) -> Content:
    """Returns the report of `camserve evaluate`."""
    report, *_ = command.run(
        **what,
        methods=methods,
        protocols=[PROTOCOL],
        layer="",
        precision="exact",
        sanity_images=0,
        out=out,
        store=None,
        console=Console(stderr=True),
    )
    content: Content = json.loads(report.read_text())
    return content


def kept(rows: Iterable[Content], names: Sequence[str]) -> dict[str, Content]:
    """Returns the figures of each method that the table, or a reader of the file, may want."""
    return {row["method"]: {name: row[name] for name in ("title", "unsupported", *names)} for row in rows}


def _times(methods: Sequence[MethodSpec], rows: Iterable[Content], photo: Path, rounds: int) -> dict[str, Content]:
    """Returns the median seconds of one map of each method that the model serves."""
    served = {row["method"]: row for row in rows if not row["unsupported"]}
    slow = {name for name, row in served.items() if row["queries"] > SLOW_QUERIES}
    engine, image = Engine.load(MODEL), photo.read_bytes()
    cases = {
        spec.name: partial(engine.explain, image, [spec])
        for spec in methods
        if spec.name in served and spec.name not in slow
    }
    taken = common.in_turns(cases, rounds, engine.network.device) if cases else {}
    fast = common.summary(taken, ours=next(iter(cases))) if cases else {}
    times = {name: {"median_s": figures["median_s"], "calls": figures["rounds"]} for name, figures in fast.items()}
    return times | {name: {"median_s": served[name]["median_s"], "calls": served[name]["images"]} for name in slow}


def table(content: Content) -> str:
    """Returns the README's text between the markers: the table and what it was measured with."""
    digits, photos, times = content["digits"]["methods"], content["photos"]["methods"], content["times"]
    headings = ["method", "pointing", "energy", "IoU", "insertion", "deletion", "overall", "queries", "time"]
    lines = ["| " + " | ".join(headings) + " |", "| --- |" + " ---: |" * (len(headings) - 1)]
    for name, row in digits.items():
        where = [cell(row, "pointing", ".0%"), cell(row, "energy", ".0%"), cell(row, "iou", ".2f")]
        curves = [cell(photos[name], f"{PROTOCOL}_{what}", ".3f") for what in ("insertion", "deletion", "overall")]
        cost = [cell(photos[name], "queries", ".0f"), duration(times[name]["median_s"]) if name in times else "-"]
        lines.append("| " + " | ".join([row["title"], *where, *curves, *cost]) + " |")
    remarks = [_caption(content), *_unserved(digits, photos), *_empty("digits", digits), *_empty("photos", photos)]
    return "\n".join([*lines, *(f"\n{remark}" for remark in remarks)])


def cell(row: Content, name: str, form: str) -> str:
    return "-" if row[name] is None else format(row[name], form)


def _caption(content: Content) -> str:
    digits, photos, environment = content["digits"], content["photos"], content["environment"]
    shown = next((row for row in digits["methods"].values() if row["images"]), {"images": 0, "maps": 0})
    protocol = photos["settings"]["protocols"][PROTOCOL]
    return (
        f"Pointing game (no tolerance), energy and box IoU: {shown['images']} scenes of the digits benchmark, "
        f"{shown['maps']} maps, layer `{digits['settings']['layer']}`. Insertion, deletion and overall: RISE protocol "
        f"({protocol['steps']} steps of {protocol['step_px']} px), the most probable class, photos "
        f"{', '.join(photos['names'])} of scikit-image, `{photos['settings']['model']}`, "
        f"layer `{photos['settings']['layer']}`: too few photos to rank methods that are close. Queries: passes of the "
        f"network, or of its tail, beyond the one that all methods share; constant masks are not asked. Time: one map "
        f"of a photo, median, {environment['device']}, threads: {environment['torch_threads']}. Default parameters, "
        f"precision exact; {common.made_with(environment)}."
    )


def _unserved(digits: Mapping[str, Content], photos: Mapping[str, Content]) -> list[str]:
    """Returns remarks on the methods that the networks cannot serve, one for each reason."""
    reasons: dict[str, list[str]] = {}
    for name, row in digits.items():
        for where, why in (("digits", row["unsupported"]), ("photos", photos[name]["unsupported"])):
            both = row["unsupported"] == photos[name]["unsupported"]
            if why and not (both and where == "photos"):
                reasons.setdefault(f"{'both' if both else where}: {why}", []).append(row["title"])
    return [f"{', '.join(titles)}: not served, on {why}." for why, titles in reasons.items()]


def _empty(where: str, rows: Mapping[str, Content]) -> list[str]:
    """Returns the remark on maps without positive evidence, if there were any."""
    empty = [f"{row['title']} {row['degenerate']} of {row['maps']}" for row in rows.values() if row["degenerate"]]
    return [f"Empty maps on {where}: {', '.join(empty)}."] if empty else []


def rendered(readme: str, content: Content) -> str:
    """Returns the README with its table made anew."""
    return common.embedded(readme, TABLE, table(content))


def results(device: torch.device) -> Path:
    return Path(__file__).parent / "results" / f"methods-{device.type}.json"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("--methods", default=" ".join(METHODS), help="separated by spaces; default: all")
    measuring.add_argument("--scenes", type=int, default=20, help="of the digits benchmark")
    measuring.add_argument("--photos", nargs="+", default=["chelsea", "coffee"], help="of skimage.data")
    measuring.add_argument("--rounds", type=int, default=3, help="timed calls of each method that is not slow")
    measuring.add_argument("--work", type=Path, help="for journals; default: build/methods/<commit>")
    measuring.add_argument("--out", type=Path, help="default: results/methods-<device>.json beside this file")
    rendering = commands.add_parser("render")
    rendering.add_argument("--results", type=Path, default=results(torch.device("cpu")))
    return parser


def main() -> None:
    given = _parser().parse_args()
    if given.command == "render":
        common.README.write_text(rendered(common.README.read_text(), json.loads(given.results.read_text())))
        print(f"written to {common.README}")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    environment = common.environment(device)
    work = given.work or common.ROOT / "build" / "methods" / (environment["commit"] or "no-commit")
    methods = [parse_method_text(text) for text in given.methods.split()]
    content = {"environment": environment, **measure(methods, given.scenes, given.photos, given.rounds, work)}
    out = given.out or results(device)
    common.write(out, content)
    print(table(content))
    print(f"\nwritten to {out}")


if __name__ == "__main__":
    main()

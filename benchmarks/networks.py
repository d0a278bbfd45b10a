"""Makes the README's table of the same methods on a CNN and on vision transformers, all on the digits benchmark.

    OMP_NUM_THREADS=2 python benchmarks/networks.py measure   # results/networks-cpu.json; a quarter of an hour
    python benchmarks/networks.py render                      # the README's table from that file, at once
    python benchmarks/networks.py measure --scenes 1 --methods "cam group_cam" --out /tmp/networks.json

Measuring is `camserve evaluate --benchmark digits` with each network, every method with its default parameters at the
network's default layer. It goes on from its journals when it was stopped, as `methods.py` does.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import common
import torch
from methods import PROTOCOL, Content, cell, evaluated, kept

from camserve.evaluation import command
from camserve.methods import METHODS, MethodSpec, parse_method_text

NETWORKS = {
    "digits": "CNN",
    "digits-vit": "ViT",
    "digits-vit-timm": "timm's ViT",
}
"""Networks of digit scenes by name, with what the table calls them."""
SLOW = ("xrai", "ss_cam", "is_cam", "rise", "d_rise")
"""Methods of so many queries that they are measured on fewer scenes."""
TABLE = "networks table"
FIGURES = {"pointing": ".0%", "energy": ".0%", f"{PROTOCOL}_overall": ".2f"}
"""Figures of each network, with their format."""
KEPT = ("images", "maps", "degenerate", "iou", f"{PROTOCOL}_insertion", f"{PROTOCOL}_deletion", "queries", *FIGURES)


def measure(methods: Sequence[MethodSpec], scenes: int, slow_scenes: int, work: Path) -> Content:
    """Returns the figures of every network and method; continues what `work` has."""
    return {name: _measured(name, methods, scenes, slow_scenes, work / name) for name in NETWORKS}


def _measured(name: str, methods: Sequence[MethodSpec], scenes: int, slow_scenes: int, work: Path) -> Content:
    what = {"model": name, "images": None, "boxes": None, "benchmark": command.DIGITS}
    fast = [spec for spec in methods if spec.name not in SLOW]
    slow = [spec for spec in methods if spec.name in SLOW]
    reports = [
        evaluated(some, work, {**what, "limit": limit}) for some, limit in ((fast, scenes), (slow, slow_scenes)) if some
    ]
    rows = {key: row for report in reports for key, row in kept(report["methods"], KEPT).items()}
    return {"settings": reports[0]["settings"], "methods": {spec.name: rows[spec.name] for spec in methods}}


def table(content: Content) -> str:
    """Returns the README's text between the markers: the table and what it was measured with."""
    networks = content["networks"]
    titles = [f"{NETWORKS[name]}: {figure}" for name in networks for figure in ("pointing", "energy", "overall")]
    lines = ["| " + " | ".join(["method", *titles]) + " |", "| --- |" + " ---: |" * len(titles)]
    for name, row in next(iter(networks.values()))["methods"].items():
        cells = [cell(one["methods"][name], *figure) for one in networks.values() for figure in FIGURES.items()]
        lines.append("| " + " | ".join([row["title"], *cells]) + " |")
    remarks = [_caption(content), *_unserved(networks), *_empty(networks)]
    return "\n".join([*lines, *(f"\n{remark}" for remark in remarks)])


def _caption(content: Content) -> str:
    networks = content["networks"]
    first = next(iter(networks.values()))["methods"]
    fast, slow = (
        [row for name, row in first.items() if (name in SLOW) is few and row["images"]] for few in (False, True)
    )
    fewer = f" ({', '.join(row['title'] for row in slow)}: {slow[0]['images']} scenes)" if slow else ""
    layers = ", ".join(f"`{name}` at `{one['settings']['layer']}`" for name, one in networks.items())
    return (
        f"{fast[0]['images']} scenes of the digits benchmark, {fast[0]['maps']} maps{fewer}: pointing game (no "
        f"tolerance), energy in the boxes, and insertion minus deletion (RISE protocol). The networks are {layers}; "
        f"the ViTs learn from scenes like the CNN's, torchvision's reads its class token, timm's the mean of its "
        f"patches. Default parameters, precision exact; {common.made_with(content['environment'])}."
    )


def _unserved(networks: Mapping[str, Content]) -> list[str]:
    """Returns remarks on the methods that a network cannot serve, one for each network and reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for network, one in networks.items():
        for row in one["methods"].values():
            if row["unsupported"]:
                reasons.setdefault((network, row["unsupported"]), []).append(row["title"])
    return [f"{', '.join(titles)}: not served by `{network}`: {why}." for (network, why), titles in reasons.items()]


def _empty(networks: Mapping[str, Content]) -> list[str]:
    """Returns the remark on maps without positive evidence, if there were any."""
    empty = [
        f"{row['title']} {row['degenerate']} of {row['maps']} on `{network}`"
        for network, one in networks.items()
        for row in one["methods"].values()
        if row["degenerate"]
    ]
    return [f"Empty maps: {', '.join(empty)}."] if empty else []


def rendered(readme: str, content: Content) -> str:
    """Returns the README with its table made anew."""
    return common.embedded(readme, TABLE, table(content))


def results(device: torch.device) -> Path:
    return Path(__file__).parent / "results" / f"networks-{device.type}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("--methods", default=" ".join(METHODS), help="separated by spaces; default: all")
    measuring.add_argument("--scenes", type=int, default=20, help="of the digits benchmark")
    measuring.add_argument("--slow-scenes", type=int, default=2, help=f"for {', '.join(SLOW)}")
    measuring.add_argument("--work", type=Path, help="for journals; default: build/networks/<commit>")
    measuring.add_argument("--out", type=Path, help="default: results/networks-<device>.json beside this file")
    rendering = commands.add_parser("render")
    rendering.add_argument("--results", type=Path, default=results(torch.device("cpu")))
    given = parser.parse_args()
    if given.command == "render":
        common.README.write_text(rendered(common.README.read_text(), json.loads(given.results.read_text())))
        print(f"written to {common.README}")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    environment = common.environment(device)
    work = given.work or common.ROOT / "build" / "networks" / (environment["commit"] or "no-commit")
    methods = [parse_method_text(text) for text in given.methods.split()]
    content = {"environment": environment, "networks": measure(methods, given.scenes, given.slow_scenes, work)}
    out = given.out or results(device)
    common.write(out, content)
    print(table(content))
    print(f"\nwritten to {out}")


if __name__ == "__main__":
    main()

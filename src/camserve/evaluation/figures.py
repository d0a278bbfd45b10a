"""Draws the pictures of a report: mean curves (matplotlib), and a contact sheet of the maps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from camserve.evaluation.report import of_method
from camserve.finalise.render import Row, sheet
from camserve.journal import Record
from camserve.methods import MethodSpec, method_text

CELL_PX = 160


def write_figures(settings: Record, records: Sequence[Record], methods: Sequence[MethodSpec], out: Path) -> list[Path]:
    """Writes `curves-<protocol>.png` for each protocol, and `sheet.png` of the images that have overlays."""
    measured = [record for record in records if record["kind"] == "image" and "unsupported" not in record]
    by_method = {method_text(spec): found for spec in methods if (found := of_method(measured, spec))}
    if not by_method:
        return []
    paths = [out / f"curves-{protocol}.png" for protocol in settings["protocols"]]
    for protocol, path in zip(settings["protocols"], paths, strict=True):
        _draw_curves(by_method, protocol, settings["score"], path)
    rows = list(_sheet_rows(by_method, out))
    if rows:
        paths.append(out / "sheet.png")
        sheet(["Image", *by_method], rows, cell_px=CELL_PX).save(paths[-1])
    return paths


def _draw_curves(by_method: dict[str, list[Record]], protocol: str, score: str, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, what in zip(figure.subplots(1, 2, sharey=True), ("deletion", "insertion"), strict=True):
        for number, (name, records) in enumerate(by_method.items()):
            curves = [one["curves"][protocol][what] for record in records for one in record["maps"]]
            mean = np.mean(curves, axis=0)
            style = ("-", "--", ":")[number // 10 % 3]  # the colours repeat after ten
            axes.plot(np.linspace(0, 1, len(mean)), mean, style, label=name)
        axes.set(title=f"{what}, {protocol}", xlabel="share of pixels changed")
        if score == "probability":  # other scores have no bounds that all of them reach
            axes.set_ylim(0, 1)
    figure.axes[0].set_ylabel(f"{score} of what is explained, mean of maps")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=100)


def _sheet_rows(by_method: dict[str, list[Record]], out: Path) -> Iterator[Row]:
    """Yields a row for each image and class that has an overlay by some method; white where another has none."""
    pictures: dict[tuple[str, str, str], dict[str, str]] = {}
    for name, records in by_method.items():
        for record in records:
            labels = {str(one["class"]): one["label"] for one in record["maps"]}
            for index, path in record["pictures"].items():
                key = (record["image"], labels[index], record["seen"])
                pictures.setdefault(key, {})[name] = path
    for (image, label, seen), overlays in pictures.items():
        cells = [_opened(out / overlays[name]) if name in overlays else _BLANK for name in by_method]
        yield Row(f"{image}: {label}", (_opened(out / seen), *cells))


_BLANK = Image.new("RGB", (1, 1), "white")


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")

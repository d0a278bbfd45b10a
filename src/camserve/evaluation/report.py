"""Makes the report of an evaluation: one row a method, as JSON, CSV and Markdown. No torch.

Means are over maps, not over images: an image of which three classes are explained counts three times. Cost and time
are those of a request that explains all of an image's classes at once.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from camserve.cli.terminal import duration
from camserve.journal import Record
from camserve.methods import MethodSpec, method_text

Row = Mapping[str, Any]
"""Figures of one method by name; those that were not measured are None."""

LOCALISATION = ("pointing", "pointing_15px", "energy", "iou", "bbox")


@dataclass(frozen=True)
class Report:
    """Holds what was measured, and what it was measured with."""

    settings: Record
    rows: tuple[Row, ...]

    def as_json(self) -> str:
        """Returns settings and rows as JSON."""
        return json.dumps({"settings": self.settings, "methods": self.rows}, indent=2) + "\n"

    def as_csv(self) -> str:
        """Returns a line for each method as CSV; lists are left out."""
        names = [name for name, value in (self.rows or [{}])[0].items() if not isinstance(value, (list, dict))]
        file = io.StringIO()
        writer = csv.DictWriter(file, names, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return file.getvalue()

    def as_markdown(self) -> str:
        """Returns the settings in a sentence, and a table, as Markdown."""
        columns = [column for column in _columns(self.settings) if any(_has(row, column.name) for row in self.rows)]
        images = max((row["images"] for row in self.rows), default=0)
        lines = [_caption(self.settings, images), ""]
        lines.append("| " + " | ".join(["method", *(column.heading for column in columns)]) + " |")
        lines.append("| --- |" + " ---: |" * len(columns))
        for row in self.rows:
            cells = [column.show(row[column.name]) if _has(row, column.name) else "" for column in columns]
            lines.append("| " + " | ".join([row["title"], *cells]) + " |")
        lines += [f"\n{row['title']}: not served by this network. {row['unsupported']}." for row in _refused(self.rows)]
        lines += [
            f"\n{row['title']}: {number} of {row['images'] + sum(row['left_out'].values())} images left out. {reason}."
            for row in self.rows
            for reason, number in row["left_out"].items()
        ]
        return "\n".join(lines) + "\n"

    def write(self, out: Path) -> list[Path]:
        """Writes `report.json`, `report.csv` and `report.md`."""
        texts = {"report.json": self.as_json(), "report.csv": self.as_csv(), "report.md": self.as_markdown()}
        for name, text in texts.items():
            (out / name).write_text(text, encoding="utf-8")
        return [out / name for name in texts]


def make_report(settings: Record, records: Iterable[Record], methods: Sequence[MethodSpec]) -> Report:
    """Makes the report with the rows of these methods, in their order."""
    records = list(records)
    return Report(settings, tuple(_row(spec, of_method(records, spec), settings) for spec in methods))


def of_method(records: Iterable[Record], spec: MethodSpec) -> list[Record]:
    """Returns the records of one method with just these parameters."""
    return [record for record in records if (record["method"], record["parameters"]) == (spec.name, asdict(spec))]


def _row(spec: MethodSpec, records: Sequence[Record], settings: Record) -> Row:
    images = [record for record in records if record["kind"] == "image"]
    served = [record for record in images if "unsupported" not in record]
    maps = [one for record in served for one in record["maps"]]
    located = [one["localisation"] for one in maps if one["localisation"]]
    return {
        "method": spec.name,
        "title": method_text(spec),
        "images": len(served),
        "maps": len(maps),
        "degenerate": sum(one["degenerate"] for one in maps),
        **_curve_figures(maps, settings),
        "average_drop": _mean(one["drop"] for one in maps),
        "increase": _mean(one["increased"] for one in maps),
        **{name: _mean(one[name] for one in located) for name in LOCALISATION},
        **_contrast_figures(served),
        **_sanity_figures(records),
        "queries": _mean(record["queries"] for record in served),
        "median_s": median(seconds) if (seconds := [record["seconds"] for record in served]) else None,
        **_refusals(images, bool(served)),
    }


def _refusals(images: Sequence[Record], is_served: bool) -> Row:
    """Returns why the network cannot serve the method, or of images left out how many there are for each reason."""
    reasons = Counter(record["unsupported"] for record in images if "unsupported" in record)
    return {
        "unsupported": None if is_served else next(iter(reasons), None),
        "left_out": dict(reasons) if is_served else {},
    }


def _curve_figures(maps: Sequence[Record], settings: Record) -> Row:
    figures: dict[str, Any] = {}
    for name in settings["protocols"]:
        deletion = _mean(one["curves"][name]["deletion_auc"] for one in maps)
        insertion = _mean(one["curves"][name]["insertion_auc"] for one in maps)
        figures[f"{name}_deletion"] = deletion
        figures[f"{name}_insertion"] = insertion
        figures[f"{name}_overall"] = None if deletion is None or insertion is None else insertion - deletion
    return figures


def _contrast_figures(served: Sequence[Record]) -> Row:
    """Returns localisation of the most likely class's object by the maps of the least likely class, and of its own."""
    found = [record["contrast"] for record in served if record["contrast"]]
    return {
        f"{which}_{name}": _mean(contrast[which][name] for contrast in found)
        for which in ("most_likely", "least_likely")
        for name in LOCALISATION
    }


def _sanity_figures(records: Sequence[Record]) -> Row:
    """Returns rank correlation by stage, and when the whole network is random; means over images."""
    runs = [stages for record in records if record["kind"] == "sanity" for stages in record.get("stages", ())]
    stages = [
        {"down_to": same[0]["down_to"], "correlation": fmean(stage["correlation"] for stage in same)}
        for same in zip(*runs, strict=True)
    ]
    return {"sanity_stages": stages, "sanity_end": stages[-1]["correlation"] if stages else None}


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return fmean(found) if found else None


@dataclass(frozen=True)
class _Column:
    name: str
    heading: str
    show: Callable[[Any], str]


def _columns(settings: Record) -> list[_Column]:
    curves = [
        _Column(f"{protocol}_{what}", f"{what} ({protocol})", "{:.3f}".format)
        for protocol in settings["protocols"]
        for what in ("insertion", "deletion", "overall")
    ]
    return [
        _Column("pointing", "pointing", "{:.1%}".format),
        _Column("pointing_15px", "pointing 15 px", "{:.1%}".format),
        _Column("energy", "energy", "{:.1%}".format),
        _Column("iou", "IoU", "{:.3f}".format),
        _Column("bbox", "bbox", "{:.1%}".format),
        _Column("least_likely_energy", "energy, least likely class", "{:.1%}".format),
        *curves,
        _Column("average_drop", "average drop", "{:.1%}".format),
        _Column("increase", "increase", "{:.1%}".format),
        _Column("sanity_end", "sanity", "{:.2f}".format),
        _Column("degenerate", "empty maps", str),
        _Column("queries", "queries", "{:.0f}".format),
        _Column("median_s", "time", duration),
    ]


def _has(row: Row, name: str) -> bool:
    """Tells whether the figure was measured; that no map was empty is not worth a cell."""
    return row[name] is not None and row["maps"] > 0 and (name != "degenerate" or row[name] > 0)


def _refused(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row["unsupported"]]


def _caption(settings: Record, images: int) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in settings["versions"].items())
    protocols = ", ".join(
        f"{name} ({protocol['steps']} steps of {protocol['step_px']} px)"
        for name, protocol in settings["protocols"].items()
    )
    height, width = settings["input_px"]
    layer = f"layer {settings['layer']}, " if settings["layer"] else ""
    return (
        f"{settings['dataset']}, {images} images; model {settings['model']} {settings['version']}, "
        f"{layer}input {width} x {height} px, precision {settings['precision']}; "
        f"score: {settings['score']}; "
        f"protocols: {protocols}; {versions}; "
        f"{settings['machine']}."
    )

"""The README's table of methods: measured by a program, and exactly what the committed figures render to."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "benchmarks" / "methods.py"


@pytest.fixture
def program(monkeypatch):
    monkeypatch.syspath_prepend(str(PROGRAM.parent))
    import methods

    return methods


@pytest.fixture
def committed() -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / "methods-cpu.json").read_text())


def test_the_readme_has_the_table_of_the_committed_figures(program, committed):
    readme = (ROOT / "README.md").read_text()
    assert readme == program.rendered(readme, committed), "run `python benchmarks/methods.py render`"


def test_every_method_is_in_the_committed_figures(program, committed):
    for part in ("digits", "photos"):
        assert set(program.METHODS) == set(committed[part]["methods"])
    served = {name for name, row in committed["photos"]["methods"].items() if not row["unsupported"]}
    assert served <= set(committed["times"])
    environment = committed["environment"]
    assert all(environment[name] for name in ("when", "commit", "cpu", "torch_threads", "python"))


def row(title: str, **figures) -> dict:
    names = ("images", "maps", "degenerate", "pointing", "energy", "iou", "queries", "unsupported")
    curves = ("rise_insertion", "rise_deletion", "rise_overall")
    return {"title": title, **dict.fromkeys((*names, *curves)), "degenerate": 0, "images": 0, **figures}


CONTENT = {
    "environment": {"commit": "0123456789abcdef+changes", "device": "a CPU", "torch_threads": 2, "versions": {}},
    "digits": {
        "settings": {"layer": "last"},
        "methods": {
            "cam": row("CAM", images=3, maps=7, pointing=0.956, energy=0.5, iou=0.254, degenerate=1),
            "rise": row("RISE", images=3, maps=7, pointing=1.0, energy=0.25, iou=0.2),
            "xrai": row("XRAI", unsupported="too small"),
        },
    },
    "photos": {
        "settings": {"model": "net", "layer": "l", "protocols": {"rise": {"steps": 28, "step_px": 1792}}},
        "names": ["coffee"],
        "methods": {
            "cam": row("CAM", unsupported="no head"),
            "rise": row("RISE", rise_insertion=0.75, rise_deletion=0.125, rise_overall=0.625, queries=3999.6),
            "xrai": row("XRAI", unsupported="too small"),
        },
    },
    "times": {"rise": {"median_s": 0.1234, "calls": 3}},
}
CONTENT["environment"]["versions"] = {"camserve": "1", "torch": "2"}


def test_what_the_table_says(program):
    begin, end = "<!-- methods table: begin -->", "<!-- methods table: end -->"
    text = program.rendered(f"before {begin} old {end} after", CONTENT)
    assert text.startswith(f"before {begin}\n\n| method | pointing |")
    assert text.endswith(f"\n\n{end} after")
    assert "| CAM | 96% | 50% | 0.25 | - | - | - | - | - |" in text
    assert "| RISE | 100% | 25% | 0.20 | 0.750 | 0.125 | 0.625 | 4000 | 123 ms |" in text
    assert "3 scenes of the digits benchmark, 7 maps, layer `last`" in text
    assert "28 steps of 1792 px" in text
    assert "commit 0123456789ab with changes" in text
    assert "\nCAM: not served, on photos: no head.\n" in text
    assert "\nXRAI: not served, on both: too small.\n" in text
    assert "\nEmpty maps on digits: CAM 1 of 7.\n" in text
    assert program.rendered(text, CONTENT) == text


def test_measuring_goes_on_where_it_stopped(program, tmp_path, monkeypatch):
    """One scene, one photo; the second run measures the methods that are new."""
    arguments = ["measure", "--scenes", "1", "--photos", "coffee", "--rounds", "1", "--work", str(tmp_path / "work")]
    arguments += ["--out", str(tmp_path / "methods.json"), "--methods"]
    results = []
    for methods in ("cam", "eigen_cam cam attention_rollout recipro_cam d_rise:masks=10"):
        monkeypatch.setattr(sys, "argv", ["methods.py", *arguments, methods])
        program.main()
        results.append(json.loads((tmp_path / "methods.json").read_text()))
    first, second = results
    new = ["eigen_cam", "attention_rollout", "recipro_cam", "d_rise"]
    assert list(second["digits"]["methods"]) == [new[0], "cam", *new[1:]]
    for part in ("digits", "photos"):
        assert second[part]["methods"]["cam"] == first[part]["methods"]["cam"]
        journal = next(tmp_path.glob(f"work/{part}*/journal.jsonl")).read_text().splitlines()
        assert [json.loads(line).get("method") for line in journal] == [None, "cam", *new]
        assert "no attention was seen" in second[part]["methods"]["attention_rollout"]["unsupported"]
    assert second["photos"]["methods"]["cam"]["rise_insertion"] > 0
    assert set(second["times"]) == {"cam", "eigen_cam", "recipro_cam", "d_rise"}
    assert second["times"]["cam"]["calls"] == 1


@pytest.mark.parametrize(
    ("name", "program", "table", "results"),
    [("latency", "serving", "latencies", "serving-latency"), ("speed", "engine_report", "readme_table", "engine")],
)
def test_the_readme_has_the_times_of_the_committed_figures(
    monkeypatch, name: str, program: str, table: str, results: str
):
    monkeypatch.syspath_prepend(str(PROGRAM.parent))
    import common

    content = json.loads((ROOT / "benchmarks" / "results" / f"{results}-cpu.json").read_text())
    made = getattr(importlib.import_module(program), table)(content)
    readme = (ROOT / "README.md").read_text()
    assert readme == common.embedded(readme, name, made), f"run benchmarks/{program}.py --render"

"""The program that measures what D-RISE costs beyond the detector's own passes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "detections-cpu.json"


def test_the_committed_figures_are_of_5000_masks_and_reach_their_goal():
    found = json.loads(RESULTS.read_text())["d_rise"]
    assert found["masks"] == 5000
    assert found["ratio"] <= found["goal"] == 1.2
    assert found["ratio_of_all"] <= found["goal"]


def test_few_masks_are_measured_and_written(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import detections

    out = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["detections.py", "--masks", "20", "--rounds", "1", "--out", str(out)])
    detections.main()
    found = json.loads(out.read_text())["d_rise"]
    assert found["ratio"] == found["d_rise_s"] / found["forward_s"] > 0
    assert found["masks"] == 20

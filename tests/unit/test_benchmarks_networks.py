"""The README's table of a CNN beside vision transformers: exactly what the committed figures render to."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from camserve.methods import METHODS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def program(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import networks

    return networks


def test_the_readme_has_the_table_of_the_committed_figures(program):
    committed = json.loads((ROOT / "benchmarks" / "results" / "networks-cpu.json").read_text())
    readme = (ROOT / "README.md").read_text()
    assert readme == program.rendered(readme, committed), "run `python benchmarks/networks.py render`"
    assert list(committed["networks"]) == list(program.NETWORKS)
    for one in committed["networks"].values():
        assert set(one["methods"]) >= set(METHODS) - set(program.SLOW)


def test_networks_are_measured_and_rendered(program, tmp_path, monkeypatch):
    out = tmp_path / "networks.json"
    arguments = ["networks.py", "measure", "--scenes", "1", "--methods", "cam grad_cam attention_rollout"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--work", str(tmp_path / "work"), "--out", str(out)])
    program.main()
    content = json.loads(out.read_text())
    cnn, vit, _ = content["networks"].values()
    assert cnn["methods"]["attention_rollout"]["unsupported"]
    assert vit["methods"]["attention_rollout"]["pointing"] in (0, 0.5, 1)
    assert cnn["settings"]["layer"] != vit["settings"]["layer"]
    cnn["methods"]["grad_cam"] |= {"pointing": 0.956, "energy": 0.25, "rise_overall": 0.375, "degenerate": 1, "maps": 7}
    text = program.rendered("a <!-- networks table: begin --> old <!-- networks table: end --> b", content)
    assert "| method | CNN: pointing | CNN: energy | CNN: overall | ViT: pointing |" in text
    assert "| Grad-CAM | 96% | 25% | 0.38 |" in text
    assert "| Attention rollout | - | - | - |" in text
    assert "\nAttention rollout: not served by `digits`: " in text
    assert "Grad-CAM 1 of 7 on `digits`" in text

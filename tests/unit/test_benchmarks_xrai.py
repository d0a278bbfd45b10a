"""The benchmark of XRAI's ranking runs, and what it times are the same maps."""

import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def program(monkeypatch):
    """The module, and the number of threads put back afterwards."""
    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import xrai

    yield xrai
    torch.set_num_threads(threads)


def test_it_compares_before_it_times_and_says_where(program, monkeypatch, tmp_path, capsys):
    out = tmp_path / "xrai.json"
    monkeypatch.setattr(sys, "argv", ["xrai.py", "--quick", "--out", str(out)])
    program.main()
    assert "chelsea" in capsys.readouterr().out
    written = json.loads(out.read_text())
    (photo,) = written["photos"].values()
    assert photo["same_segments"]
    assert photo["same_map"]
    assert photo["segments"] > 20
    assert set(photo["times"]) == {"camserve", "saliency"}
    assert written["environment"]["versions"]["saliency"]
    assert written["environment"]["torch_threads"] == 1

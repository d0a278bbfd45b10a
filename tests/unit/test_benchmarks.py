"""The benchmark programs run and write what they say; how fast anything is, is not asked here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_cases_take_turns(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import common
    import torch

    calls: list[str] = []
    cases = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = common.in_turns(cases, rounds=2, device=torch.device("cpu"))
    assert "".join(calls) == "abc" + "abc" + "cba"
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 2, "b": 2, "c": 2}
    calls.clear()
    common.in_turns(cases, rounds=1, device=torch.device("cpu"), warm=True)
    assert "".join(calls) == "abc"


def test_short_calls_are_timed_behind_others_of_the_same_case(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import common
    import torch

    clock, calls = [0.0], []

    def call(name):
        calls.append(name)
        clock[0] += 1.0

    monkeypatch.setattr(common.time, "perf_counter", lambda: clock[0])
    cases = {name: lambda name=name: call(name) for name in "ab"}
    seconds = common.in_turns(cases, rounds=1, device=torch.device("cpu"), warm=True, before_each_s=2.5)
    assert "".join(calls) == "aaaa" + "bbbb"  # three that are not timed, and one that is
    assert seconds == {"a": [1.0], "b": [1.0]}


def test_an_early_map_is_compared_with_the_final_one(tmp_path):
    out = tmp_path / "partial.json"
    command = [sys.executable, BENCHMARKS / "partial.py", "--quick", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())["results"]
    assert len(results) == 4
    assert all(-1 <= value <= 1 for row in results.values() for value in row.values())


def test_an_attack_is_measured_beside_another_client(tmp_path):
    """It is one that costs nothing; what the others notice of the other ones is in docs/security.md."""
    out, name = tmp_path / "hostile.json", "control characters"
    command = [sys.executable, BENCHMARKS / "hostile.py", "--quick", "--only", name, "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(out.read_text())["results"]["gateway"]["attacks"].values()
    assert set(found["codes"]) == {"INVALID_ARGUMENT", "NOT_FOUND"}
    assert found["alive"]
    assert not found["failures"]
    assert found["longest_stall_s"] > 0
    assert found["peak_mb"] > 50


@pytest.fixture
def fuzz(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import fuzz

    return fuzz


def test_every_target_is_fuzzed_and_counted(tmp_path, fuzz):
    """Without atheris too, which is why it is hidden here."""
    (tmp_path / "atheris.py").write_text("raise ImportError")
    out = tmp_path / "fuzz.json"
    command = [sys.executable, BENCHMARKS / "fuzz.py", "image", "archive", "--inputs", "20", "--out", out]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": _path(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["total"] == {"inputs": 40, "foreign": 0, "hangs": 0}
    assert found["guided"] is False
    assert set(found["targets"]) == {"image", "archive"}
    assert all(found["environment"]["versions"].values())
    assert set(fuzz.TARGETS) == set(fuzz.targets(tmp_path))


def _path(first):
    return os.pathsep.join([str(first), *filter(None, [os.environ.get("PYTHONPATH")])])


def test_a_foreign_exception_and_a_slow_input_are_findings(tmp_path, fuzz, monkeypatch, capsys):
    def read(data):
        if data == b"foreign":
            raise ZeroDivisionError
        if data == b"slow":
            now_s[0] += 3
        if data == b"allowed":
            raise KeyError

    now_s = [0.0]
    monkeypatch.setattr(fuzz.time, "thread_time", lambda: now_s[0])
    monkeypatch.setattr(fuzz.os, "_exit", lambda code: None)
    one = fuzz.Round("image", read, (KeyError,), 60, 5, tmp_path / "report.json", tmp_path)
    for data in (b"good", b"foreign", b"allowed", b"slow", b"foreign"):
        one(data)
    found = json.loads((tmp_path / "report.json").read_text())
    (kind,) = found["foreign"]
    assert kind.startswith("builtins.ZeroDivisionError at unit/test_benchmarks.py")
    assert (found["inputs"], found["foreign"][kind], found["hangs"], found["refused"]) == (5, 2, 1, 1)
    assert sorted(path.read_bytes() for path in tmp_path.glob("image-*")) == [b"foreign", b"slow"]
    assert "3.0 s of processor time" in capsys.readouterr().err


def test_every_seed_is_accepted(tmp_path, fuzz):
    """Otherwise what lies behind a door is never reached."""
    for target, (read, _) in fuzz.targets(tmp_path).items():
        seeds = sorted((fuzz.CORPUS / target).iterdir())
        assert seeds
        for seed in seeds:
            read(seed.read_bytes())


def test_the_page_on_security_has_the_figures_of_the_results(fuzz):
    import common
    import hostile

    page, content = hostile.SECURITY.read_text(), json.loads(hostile.RESULTS.read_text())
    assert common.embedded(page, "summary", hostile.summary(content)) == page
    assert common.embedded(page, "attacks", hostile.table(content)) == page
    assert common.embedded(page, "fuzz", fuzz.summary(json.loads(fuzz.RESULTS.read_text()))) == page


def test_the_page_of_networks_is_made_from_the_results(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import common
    import families

    results, page = json.loads(families.RESULTS.read_text()), families.PAGE.read_text()
    assert page == common.embedded(page, "families", families.page(results))
    assert set(results["families"]["torchvision"]) == set(families.TORCHVISION)
    assert set(results["families"]["timm"]) == set(families.TIMM)
    works = [
        one for one in results["families"]["timm"].values() if set(one.get("methods", {})) and not one.get("error")
    ]
    assert len(works) >= 60
    assert all(one["default_layer"] and one["offered"] > 0 for one in works)
    assert all(one.get("error") or one["methods"] for one in results["families"]["timm"].values())


def test_a_family_is_explained(tmp_path):
    out = tmp_path / "families.json"
    command = [sys.executable, BENCHMARKS / "families.py", "--only", "test_vit", "resnet18", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())["families"]
    assert found["timm"]["test_vit"]["default_layer"] == "blocks.5.norm1"
    assert found["torchvision"]["resnet18"]["maps"] == [512, 7, 7]

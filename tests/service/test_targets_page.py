"""What docs/targets.md shows works: its commands run, its Python and JSON are read, its tables name all there is."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from torch import nn

from camserve import Engine, cli
from camserve.codecs import texts
from camserve.evaluation.digits.scenes import SIZE_PX, Content, make_scene
from camserve.evaluation.digits.shipped import SHIPPED, load_engine
from camserve.images import mask_file
from camserve.types import OUTPUTS, Preprocessing, SaliencyMap
from camserve.types.references import References
from camserve.types.request import UNBOUNDED
from camserve.types.target_forms import target_forms

PAGE = (Path(__file__).parents[2] / "docs" / "targets.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def rows(heading: str) -> list[list[str]]:
    lines = PAGE.partition(f"| {heading} |")[2].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]


def engine(name: str, *_: object) -> Engine:
    """Returns an engine of a network of the page: those of digits as they are shipped, and one that gives vectors."""
    if name in SHIPPED:
        return load_engine(name, device="cpu")
    assert name == "faces"
    preprocessing = Preprocessing(resize_px=64, crop_px=tiny.TINY_SIZE, mean=(0.5,) * 3, std=(0.25,) * 3)
    held = References(("ann", "bob"), np.array([[1, 2, 0], [0, -1, 3]], np.float32))
    return Engine(build(), preprocessing=preprocessing, outputs="embedding", references=held)


def build() -> nn.Module:
    """The page's `mypackage:build`."""
    module = tiny.tiny_module()
    module[-1] = nn.Linear(16, 3)
    return module


def places() -> nn.Module:
    """The page's `mypackage:places`."""
    return tiny.tiny_module()[:5]


COMMANDS = [line for block in blocks("sh") for line in block.splitlines()]


@pytest.fixture
def at_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("scene.png").write_bytes(tiny.png(make_scene(2, 2, 3, "test", Content(present=7)).pixels))
    Path("other.png").write_bytes(tiny.png(tiny.pixels(9)))
    Path("prompts.json").write_text('{"seven": ["a seven"], "even": ["a two", "a four"]}')
    np.save("face.npy", np.array([0.5, -1.0, 2.0]))
    Path("mask.png").write_bytes(mask_file(np.eye(SIZE_PX, dtype=bool)))
    for name in ("people/ann.png", "people/bob/1.png", "people/bob/2.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(tiny.png(tiny.pixels(len(name))))
    monkeypatch.setitem(sys.modules, "mypackage", sys.modules[__name__])
    monkeypatch.setattr("camserve.engine.Engine.load", engine)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.usefixtures("at_work")
def test_each_command_runs_and_writes_a_picture_for_each_target(command, capsys):
    program, *arguments = shlex.split(command)
    assert program == "camserve"
    assert cli.run(arguments) == 0
    written = [line for line in capsys.readouterr().out.splitlines() if line.endswith(".png")]
    targets = [arguments[place + 1] for place, argument in enumerate(arguments) if argument == "--target"]
    assert len(set(written)) == sum(2 if target == "top2" else 1 for target in targets)
    assert all(Path(line).exists() for line in written)


def test_there_is_a_command_for_each_kind_of_target():
    given = [target for command in COMMANDS for target in re.findall(r"--target '?([^' ]+)", command)]
    kinds = {target.partition(":")[0] for target in given if ":" in target}
    assert kinds == {
        "contrast",
        "finer",
        "against",
        "up",
        "down",
        "vector",
        "reference",
        "region",
        "text",
        "word",
        "box",
        "detection",
    }
    assert {"7", "top2"} <= set(given)


def test_the_python_example_makes_targets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = blocks("python")
    names: dict[str, list[object]] = {}
    exec(example, names)  # the page's own text
    counts = {"targets": 7, "ages": 2, "faces": 2, "texts": 2, "words": 3, "regions": 3, "boxes": 3}
    assert {name: len(names[name]) for name in counts} == counts


def test_the_json_example_is_read():
    (example,) = blocks("json")
    found = texts.request(b"", {"targets": "targets"}, {"targets": json.loads(example)}, UNBOUNDED).targets
    assert len(found) == 17
    assert found == texts.request(b"", {"targets": "targets"}, {"targets": example}, UNBOUNDED).targets


def test_every_kind_of_outputs_has_its_row_with_the_targets_that_it_takes():
    described = {outputs: set(re.findall(r"\w+", targets)) for outputs, _, _, targets in rows("outputs")}
    assert list(described) == list(OUTPUTS)
    for name in (
        "digits",
        "digits-multilabel",
        "digits-binary",
        "digits-value",
        "digits-segmentation",
        "digits-boxes",
        "faces",
        "digits-text-image",
        "digits-answers",
        "digits-tokens",
    ):
        info = engine(name).info
        assert {form.name for form in target_forms(info)} <= described[info.outputs]


def test_every_target_has_its_row():
    named = [name for name, *_ in rows("target")]
    assert named == [
        "class",
        "contrast",
        "finer",
        "against",
        "value",
        "vector",
        "reference",
        "text",
        "region",
        "detection",
        "box",
        "word",
    ]


def test_every_field_that_a_map_says_is_one():
    assert {name for name, _ in rows("field")} <= set(SaliencyMap.__dataclass_fields__)

"""The program that measures whether maps lie on what their target is about: what it counts, and what it renders."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from camserve.evaluation.digits.scenes import BACKGROUND, SIZE_PX, Scene
from camserve.evaluation.digits.tasks import size_px
from camserve.evaluation.truth import TrueBox

ROOT = Path(__file__).parents[2]
LEFT, RIGHT = TrueBox("3", 8, 8, 24, 40), TrueBox("5", 56, 56, 88, 80)
OWNERS = np.full((SIZE_PX, SIZE_PX), BACKGROUND, np.uint8)
SCENE = Scene(np.zeros((SIZE_PX, SIZE_PX, 3), np.uint8), (LEFT, RIGHT), OWNERS)


@pytest.fixture
def program(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import targets

    return targets


@pytest.fixture
def committed() -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / "targets-cpu.json").read_text())


def on(*boxes: TrueBox, value: float = 1.0) -> np.ndarray:
    found = np.zeros((SIZE_PX, SIZE_PX), np.float32)
    for box in boxes:
        found[int(box.top) : int(box.bottom), int(box.left) : int(box.right)] = value
    return found


def test_the_page_has_the_table_of_the_committed_figures(program, committed):
    page = program.PAGE.read_text()
    assert page == program.rendered(page, committed), "run `python benchmarks/targets.py render`"
    assert list(committed["rows"]) == list(program.ROWS)
    assert min(row["scenes"] for row in committed["rows"].values()) >= 50


def test_a_map_must_point_at_the_digit_that_is_asked_about(program):
    left, right = program.each_digit(SCENE)
    assert (left.targets, right.targets) == (("3",), ("5",))
    assert left.holds([on(LEFT)])
    assert not left.holds([on(RIGHT)])
    assert right.holds([on(RIGHT) + on(LEFT, value=0.5)])
    assert not right.holds([on()])


def test_the_largest_digit_is_that_with_the_longest_side(program):
    (ask,) = program.the_largest(SCENE)
    assert size_px(LEFT) == size_px(RIGHT) == 32
    larger = TrueBox("5", 56, 56, 90, 80)
    (ask,) = program.the_largest(Scene(SCENE.pixels, (LEFT, larger), OWNERS))
    assert ask.targets == ("up:largest",)
    assert ask.holds([on(larger)])
    assert not ask.holds([on(LEFT)])


def test_a_sum_is_of_every_digit(program):
    (ask,) = program.any_digit(SCENE)
    assert ask.holds([on(LEFT)])
    assert ask.holds([on(RIGHT)])
    assert not ask.holds([on(TrueBox("", 30, 80, 40, 90))])


def test_a_contrast_holds_where_both_ways_do(program):
    (ask,) = program.one_over_the_other(SCENE)
    assert ask.targets == ("contrast:3>5", "contrast:5>3")
    assert ask.holds([on(LEFT), on(RIGHT)])
    for wrong in ([on(LEFT), on(LEFT)], [on(RIGHT), on(RIGHT)], [on(RIGHT), on(LEFT)], [on(), on(RIGHT)]):
        assert not ask.holds(wrong)


def test_what_speaks_against_a_digit_lies_elsewhere(program):
    left, _ = program.against_each(SCENE)
    assert left.targets == ("3", "against:3")
    assert left.holds([on(LEFT), on(RIGHT)])
    assert left.holds([on(LEFT), on()])
    assert not left.holds([on(LEFT), on(LEFT)])
    assert not left.holds([on(LEFT, RIGHT), on(LEFT, RIGHT)])
    assert not left.holds([on(), on()])  # where nothing speaks for it, half of that is nothing


def test_a_text_of_one_digit_must_point_at_it(program):
    left, right = program.each_text(SCENE)
    assert (left.targets, right.targets) == (("text:a three",), ("text:a five",))
    assert left.holds([on(LEFT)])
    assert not left.holds([on(RIGHT)])


def test_a_text_of_two_digits_is_true_and_must_point_at_one_of_them(program):
    third = TrueBox("9", 60, 4, 80, 30)
    scenes = [Scene(SCENE.pixels.copy(), (LEFT, RIGHT, third), OWNERS) for _ in range(12)]
    for value, scene in enumerate(scenes):
        scene.pixels[0, 0, 0] = value
    asks = [next(program.text_of_two(scene)) for scene in scenes]
    true = {"three left of a five", "five right of a three", "three left of a nine", "nine right of a three"}
    true |= {"three above a five", "five below a three", "nine above a five", "five below a nine"}
    assert {target for ask in asks for target in ask.targets} == {f"text:a {text}" for text in true}
    for ask in asks:
        boxes = {"three": LEFT, "five": RIGHT, "nine": third}
        for name, box in boxes.items():
            assert ask.holds([on(box)]) == (name in ask.targets[0])


def test_each_question_has_the_digit_at_its_side(program):
    third = TrueBox("9", 60, 4, 80, 30)
    asks = {ask.text: ask for ask in program.each_side(Scene(SCENE.pixels, (LEFT, RIGHT, third), OWNERS))}
    found = {text: ask.targets for text, ask in asks.items()}
    assert found == {  # the right and the top ones are nearly as far out as another
        "which digit is left?": ("text:three",),
        "which digit is bottom?": ("text:five",),
    }
    assert asks["which digit is left?"].holds([on(LEFT)])
    assert not asks["which digit is left?"].holds([on(RIGHT)])
    assert asks["which digit is bottom?"].holds([on(RIGHT)])


def test_the_number_of_sevens_is_of_any_of_them(program):
    sevens = (TrueBox("7", 8, 8, 24, 40), TrueBox("7", 56, 56, 88, 80))
    (ask,) = program.number_of_sevens(Scene(SCENE.pixels, (*sevens, TrueBox("9", 60, 4, 80, 30)), OWNERS))
    assert (ask.targets, ask.text) == (("text:two",), "how many sevens?")
    assert [ask.holds([on(box)]) for box in (*sevens, TrueBox("9", 60, 4, 80, 30))] == [True, True, False]


def test_each_word_is_of_the_digit_at_its_place(program):
    first, second = program.each_word(Scene(SCENE.pixels, (RIGHT, LEFT), OWNERS))
    assert (first.targets, second.targets) == (("word:1:three five",), ("word:2:three five",))
    assert first.holds([on(LEFT)])
    assert not first.holds([on(RIGHT)])
    assert second.holds([on(RIGHT)])


def test_each_question_is_asked_with_its_own_targets(program, monkeypatch):
    given = []

    class Blind:
        def explain(self, pixels, methods, targets, text):
            given.append((text, tuple(targets)))
            return SimpleNamespace(maps=[SimpleNamespace(array=on()) for _ in targets])

    monkeypatch.setattr(program, "load_engine", lambda name: Blind())
    found = program.measure(["answers"], 2, program.common.environment(torch.device("cpu")))["answers"]
    asks = [ask for index in range(2) for ask in program.each_side(program.ROWS["answers"].scene(index))]
    assert given == [(ask.text, ask.targets) for ask in asks] * 3
    assert {**found["methods"]["grad_cam"]} == {"held": 0, "share": 0, "empty_maps": len(asks)}


def test_every_row_asks_of_scenes_that_have_an_answer(program):
    for row in program.ROWS.values():
        for index in range(4):
            asks = list(row.asks(row.scene(index)))
            assert asks
            assert all(isinstance(target, str) for ask in asks for target in ask.targets)


def test_figures_are_counted_and_rendered(program, tmp_path, monkeypatch):
    out = tmp_path / "targets.json"
    arguments = ["targets.py", "measure", "--scenes", "2", "--rows", "value", "contrast", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    program.main()
    content = json.loads(out.read_text())
    assert content["environment"]["commit"]
    assert list(content["rows"]) == ["value", "contrast"]
    for row in content["rows"].values():
        for figures in row["methods"].values():
            assert figures["share"] == figures["held"] / row["asked"]
    content["rows"]["value"]["methods"]["grad_cam"] |= {"share": 0.5, "empty_maps": 3}
    text = program.rendered("a <!-- targets: begin --> old <!-- targets: end --> b", content)
    assert "| `digits-value` | the size of the largest digit going up points at it | 2 | 80% | 50% (missed) |" in text
    assert "Empty maps, which count as they fall: Grad-CAM 3 (`digits-value`" in text
    assert "2 scenes for each row" in text
    monkeypatch.setattr(sys, "argv", [*arguments[:4], "--rows", "binary", "--out", str(out)])
    program.main()
    again = json.loads(out.read_text())["rows"]
    assert list(again) == ["binary", "value", "contrast"], "the others are kept, in the order of the table"
    assert again["contrast"] == content["rows"]["contrast"]


def test_the_sheet_has_a_row_for_each_question(program):
    made = program.picture()
    assert made.width > 3 * 144
    assert made.height > len(program.QUESTIONS) * 144
    kinds = {question.target(SCENE).partition(":")[0] for question in program.QUESTIONS}
    assert {"up", "contrast", "finer", "against"} <= kinds
    assert (ROOT / "docs" / "images" / "targets.png").stat().st_size < 600_000

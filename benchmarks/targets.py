"""Measures whether the map of an answer lies on what the answer is about, on scenes whose digits have boxes.

    OMP_NUM_THREADS=2 python benchmarks/targets.py measure    # results/targets-cpu.json; minutes on two cores
    python benchmarks/targets.py render                       # the table of docs/evaluation.md from that file, at once
    python benchmarks/targets.py sheet                        # docs/images/targets.png: a row for each kind of target
    python benchmarks/targets.py measure --scenes 2 --rows binary value --out /tmp/targets.json

The networks are those of digit scenes that are shipped. Their scenes are made of handwriting that no network was
trained on. A row asks the same of every scene, and counts how often the maps are as they must be. Rows that are not
measured keep the figures that they have.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from PIL import Image

from camserve import Engine
from camserve.evaluation.digits import asked
from camserve.evaluation.digits.scenes import Content, Scene, make_scene
from camserve.evaluation.digits.shipped import load_engine
from camserve.evaluation.digits.tasks import NUMBERS, SEVEN, side_by_side, size_px
from camserve.evaluation.digits.towers import NAMES, PROMPTS, TEXTS, digits_in, truths
from camserve.evaluation.localisation import energy_inside, inside, points_into
from camserve.evaluation.truth import TrueBox
from camserve.finalise.render import Row as SheetRow
from camserve.finalise.render import overlay, sheet
from camserve.methods import METHODS

METHOD_NAMES = ("grad_cam", "group_cam")
WITH_SCORE_CAM = (*METHOD_NAMES, "score_cam")
SEED = 3
"""Seed of the scenes; the networks were trained on those of 0 and their answers measured on those of 1, and variants of
some networks were compared on those of 2."""
NEXT_SEED = 5
"""Seed of the scenes of networks whose earlier versions were seen on those of 3 or 4."""
PAGE, TABLE = common.ROOT / "docs" / "evaluation.md", "targets"
PICTURE = common.ROOT / "docs" / "images" / "targets.png"


@dataclass(frozen=True)
class Ask:
    """Holds the targets of one question about a scene, and tells whether their maps are as they must be."""

    targets: tuple[str, ...]
    """Text forms."""
    holds: Callable[[Sequence[np.ndarray]], bool]
    """Takes the maps (96, 96) of the targets."""
    text: str = ""
    """Text beside the scene."""


@dataclass(frozen=True)
class Row:
    """Describes one row of the table."""

    what: str
    """What must hold, for people."""
    network: str
    asks: Callable[[Scene], Iterator[Ask]]
    goal: float | None
    """Share of the questions, from 0 to 1; None: reported without one."""
    content: Content = field(default_factory=Content)
    digits: Callable[[int], int] = lambda index: 3 if index % 3 == 2 else 2
    """Returns how many digits scene `index` has: as in the benchmark, or always as many."""
    methods: tuple[str, ...] = METHOD_NAMES
    seed: int = SEED
    make: Callable[[int, int, int, Content], Scene] = lambda seed, index, digits, content: make_scene(
        seed, index, digits, "test", content
    )
    """Returns the scene of a seed, an index, how many digits and what else."""

    def scene(self, index: int) -> Scene:
        """Returns scene `index` of those that the row asks about."""
        return self.make(self.seed, index, self.digits(index), self.content)


def each_digit(scene: Scene) -> Iterator[Ask]:
    """Asks for each digit of the scene: does the map point at it?"""
    for box in scene.boxes:
        yield pointing(box.label, box)


def each_box(scene: Scene) -> Iterator[Ask]:
    """Asks for each digit of the scene what a detection of it, at its box, is made of: does the map point at it?"""
    for box in scene.boxes:
        yield pointing(f"box:{box.left:g},{box.top:g},{box.right:g},{box.bottom:g}:{box.label}", box)


def the_seven(scene: Scene) -> Iterator[Ask]:
    (box,) = (box for box in scene.boxes if box.label == str(SEVEN))
    yield pointing("seven", box)


def the_largest(scene: Scene) -> Iterator[Ask]:
    yield pointing("up:largest", max(scene.boxes, key=size_px))


def any_digit(scene: Scene) -> Iterator[Ask]:
    yield Ask(("up:sum",), lambda maps: points_into(maps[0], region(*scene.boxes)))


def each_text(scene: Scene) -> Iterator[Ask]:
    """Asks for each digit of the scene by a text: does the map point at it?"""
    for box in scene.boxes:
        yield pointing(f"text:{PROMPTS[int(box.label)]}", box)


def text_of_two(scene: Scene) -> Iterator[Ask]:
    """Asks for a true text of two digits: does the map point at one of the two?"""
    said = a_true_text(scene)
    named = region(*(box for box in scene.boxes if int(box.label) in digits_in(said)))
    yield Ask((f"text:{said}",), lambda maps: points_into(maps[0], named))


def a_true_text(scene: Scene) -> str:
    """Returns a text of two digits that is true of a scene, another one for another scene."""
    true = [text for text, found in zip(TEXTS, truths(scene.boxes), strict=True) if found == 1]
    of_two = true[len(scene.boxes) :]
    return of_two[int(scene.pixels.sum()) % len(of_two)]


def each_side(scene: Scene) -> Iterator[Ask]:
    """Asks which digit is at each side of the scene, where one clearly is: does the map of the answer point at it?"""
    for question in asked.QUESTIONS[: len(asked.SIDES)]:
        found, boxes = asked.answer(question, scene.boxes)
        if found is not None:
            yield replace(pointing(f"text:{NAMES[found]}", *boxes), text=question)


def number_of_sevens(scene: Scene) -> Iterator[Ask]:
    """Asks how many sevens there are: does the map of their number point at one?"""
    question = asked.QUESTIONS[-1]
    found, boxes = asked.answer(question, scene.boxes)
    assert found
    yield replace(pointing(f"text:{NAMES[found]}", *boxes), text=question)


def each_word(scene: Scene) -> Iterator[Ask]:
    """Asks for each word of the caption, given those before it: does the map point at its digit?"""
    boxes = asked.in_order(scene.boxes)
    caption = " ".join(NAMES[int(box.label)] for box in boxes)
    for at, box in enumerate(boxes, start=1):
        yield pointing(f"word:{at}:{caption}", box)


def each_digit_of_places(scene: Scene) -> Iterator[Ask]:
    """Asks for each digit of the scene, where the network finds it: does the map point at a pixel of it?"""
    for box in scene.boxes:
        yield Ask((box.label,), lambda maps, own=scene.owners == int(box.label): points_into(maps[0], own))


def each_digit_in_its_box(scene: Scene) -> Iterator[Ask]:
    """Asks for each digit of the scene in its box, whatever the network finds there: is it found on the digit?"""
    for box in scene.boxes:
        edges = ",".join(f"{edge:g}" for edge in (box.left, box.top, box.right, box.bottom))
        own = scene.owners == int(box.label)
        yield Ask((f"region:{edges}:{box.label}",), lambda maps, own=own: points_into(maps[0], own))


def pointing(target: str, *boxes: TrueBox) -> Ask:
    return Ask((target,), lambda maps: points_into(maps[0], region(*boxes)))


def one_over_the_other(scene: Scene) -> Iterator[Ask]:
    """Asks of two digits why each and not the other: more energy lies on the one asked about, both times."""
    first, second = scene.boxes
    targets = (f"contrast:{first.label}>{second.label}", f"contrast:{second.label}>{first.label}")

    def holds(maps: Sequence[np.ndarray]) -> bool:
        on_first, on_second = ([float(one[region(box)].sum()) for one in maps] for box in (first, second))
        return on_first[0] > on_second[0] and on_second[1] > on_first[1]

    yield Ask(targets, holds)


def against_each(scene: Scene) -> Iterator[Ask]:
    """Asks for each digit what speaks against it: at most half as much of the map lies on it as of the map for it."""
    for box in scene.boxes:
        yield Ask((box.label, f"against:{box.label}"), lambda maps, box=box: _at_most_half(maps, region(box)))


def _at_most_half(maps: Sequence[np.ndarray], on: np.ndarray) -> bool:
    forth, back = (energy_inside(one, on) for one in maps)
    return back <= forth / 2 and forth > 0


def region(*boxes: TrueBox) -> np.ndarray:
    return inside(boxes, (96, 96))


def _two(index: int) -> int:
    return 2


def _three(index: int) -> int:
    return 3


_POINTS = "the map of a digit points at it"
_CONTRAST = "of two digits, A over B lies on A more than on B, and B over A on B"
_AGAINST = "against a digit, at most half as much of the map lies on it as of the map for it"

ROWS = {
    "multilabel": Row(_POINTS, "digits-multilabel", each_digit, 0.9),
    "binary": Row("the map of seven points at it", "digits-binary", the_seven, 0.9, Content(present=SEVEN)),
    "value": Row("the size of the largest digit going up points at it", "digits-value", the_largest, 0.8, NUMBERS),
    "sum": Row("the sum of the digits going up points at one", "digits-value", any_digit, None, NUMBERS),
    "boxes": Row("the map of a digit's box points at it", "digits-boxes", each_box, 0.9, methods=("d_rise",)),
    "segmentation": Row(
        "the map of a digit's places points at a pixel of it",
        "digits-segmentation",
        each_digit_of_places,
        0.8,
        methods=WITH_SCORE_CAM,
    ),
    "segmentation-box": Row(
        "the map of a digit in its box points at a pixel of it",
        "digits-segmentation",
        each_digit_in_its_box,
        0.8,
        methods=WITH_SCORE_CAM,
    ),
    "contrast": Row(_CONTRAST, "digits-multilabel", one_over_the_other, 0.95, digits=_two),
    "contrast-softmax": Row(_CONTRAST, "digits", one_over_the_other, 0.95, digits=_two),
    "contrast-vit": Row(_CONTRAST, "digits-vit", one_over_the_other, None, digits=_two),
    "against": Row(_AGAINST, "digits-multilabel", against_each, 0.9),
    "against-softmax": Row(_AGAINST, "digits", against_each, 0.9),
    "against-vit": Row(_AGAINST, "digits-vit", against_each, None),
    "text-image": Row(
        "the map of “a three” points at the three",
        "digits-text-image",
        each_text,
        0.9,
        methods=WITH_SCORE_CAM,
        seed=NEXT_SEED,
    ),
    "text-image-two": Row(
        "of three digits, the map of “a seven left of a two” points at one of the two",
        "digits-text-image",
        text_of_two,
        0.9,
        digits=_three,
        methods=WITH_SCORE_CAM,
        seed=NEXT_SEED,
    ),
    "answers": Row(
        "the map of the answer to “which digit is left?” (right, top, bottom) points at that digit",
        "digits-answers",
        each_side,
        0.9,
        methods=WITH_SCORE_CAM,
        seed=NEXT_SEED,
    ),
    "answers-number": Row(
        "the map of the answer to “how many sevens?” points at the seven",
        "digits-answers",
        number_of_sevens,
        0.9,
        Content(present=SEVEN),
        methods=WITH_SCORE_CAM,
        seed=NEXT_SEED,
    ),
    "tokens": Row(
        "the map of each word of the caption points at its digit",
        "digits-tokens",
        each_word,
        0.8,
        methods=WITH_SCORE_CAM,
        seed=NEXT_SEED,
        make=lambda seed, index, digits, _: side_by_side(seed, index, "test", digits),
    ),
}


def measure(rows: Sequence[str], scenes: int, environment: dict[str, Any]) -> dict[str, Any]:
    """Returns how often the maps of each row and method are as they must be."""
    how = f"{environment['device']}, threads: {environment['torch_threads']}; {common.made_with(environment)}"
    return {name: _measured(ROWS[name], scenes) | {"measured": how} for name in rows}


def merged(path: Path, rows: dict[str, Any]) -> dict[str, Any]:
    """Returns rows with those that a file has beside them, in the order of the table."""
    kept = json.loads(path.read_text())["rows"] if path.exists() else {}
    return {name: (kept | rows)[name] for name in ROWS if name in kept | rows}


def _measured(row: Row, scenes: int) -> dict[str, Any]:
    engine = load_engine(row.network)
    asked_of = [(scene, list(row.asks(scene))) for scene in map(row.scene, range(scenes))]
    number = sum(len(asks) for _, asks in asked_of)
    found = {"what": row.what, "network": row.network, "goal": row.goal, "scenes": scenes, "asked": number}
    return found | {"methods": {method: _counted(engine, method, asked_of) for method in row.methods}}


def _counted(engine: Engine, method: str, asked_of: Sequence[tuple[Scene, Sequence[Ask]]]) -> dict[str, Any]:
    held = empty = 0
    for scene, asks in asked_of:
        for text, some in groupby(asks, key=lambda ask: ask.text):
            beside = list(some)
            targets = list(dict.fromkeys(target for ask in beside for target in ask.targets))
            answer = engine.explain(scene.pixels, [method], targets, text=text)  # masked queries serve all of them
            maps = {target: one.array for target, one in zip(targets, answer.maps, strict=True)}
            for ask in beside:
                held += ask.holds([maps[target] for target in ask.targets])
                empty += sum(not maps[target].any() for target in ask.targets)
    return {"held": held, "share": held / sum(len(asks) for _, asks in asked_of), "empty_maps": empty}


def table(content: dict[str, Any]) -> str:
    """Returns the page's text between the markers: the table and what it was measured with."""
    columns = list(dict.fromkeys(method for row in content["rows"].values() for method in row["methods"]))
    titles = [METHODS[method].title for method in columns]
    lines = ["| network | what must hold | asked | goal | " + " | ".join(titles) + " |"]
    lines.append("| --- | --- | ---: | ---: |" + " ---: |" * len(titles))
    for row in content["rows"].values():
        goal = "-" if row["goal"] is None else f"{row['goal']:.0%}"
        shares = [_share(row["methods"].get(method), row["goal"]) for method in columns]
        lines.append(f"| `{row['network']}` | {row['what']} | {row['asked']} | {goal} | {' | '.join(shares)} |")
    scenes = sorted({row["scenes"] for row in content["rows"].values()})
    measured = dict.fromkeys(row["measured"] for row in content["rows"].values())
    lines.append(
        f"\n{' or '.join(map(str, scenes))} scenes for each row, default parameters and layers. {'. '.join(measured)}."
    )
    empty = _empty(content["rows"])
    return "\n".join([*lines, *([f"\nEmpty maps, which count as they fall: {empty}."] if empty else [])])


def _share(figures: dict[str, Any] | None, goal: float | None) -> str:
    if figures is None:
        return "-"
    missed = goal is not None and figures["share"] < goal
    return f"{figures['share']:.0%}" + (" (missed)" if missed else "")


def _empty(rows: dict[str, Any]) -> str:
    return ", ".join(
        f"{METHODS[method].title} {figures['empty_maps']} (`{row['network']}`: {row['what']})"
        for row in rows.values()
        for method, figures in row["methods"].items()
        if figures["empty_maps"]
    )


def rendered(page: str, content: dict[str, Any]) -> str:
    """Returns the page with its table made anew."""
    return common.embedded(page, TABLE, table(content))


@dataclass(frozen=True)
class Question:
    """Describes one row of the picture sheet."""

    text: str
    network: str
    target: Callable[[Scene], str]
    content: Content = field(default_factory=Content)
    index: int = 0
    methods: tuple[str, ...] = METHOD_NAMES
    beside: str = ""
    """Text beside the scene."""


def first(scene: Scene) -> str:
    return scene.boxes[0].label


QUESTIONS = (
    Question("softmax: why the {0}?", "digits", first, index=3),
    Question("softmax, vision transformer: why the {0}?", "digits-vit", first, index=3),
    Question("multi-label: why is the {0} there?", "digits-multilabel", first, index=1),
    Question("binary: why is there a seven?", "digits-binary", lambda scene: "seven", Content(present=SEVEN), 5),
    Question(
        "boxes: what is the detection of the {0} made of?",
        "digits-boxes",
        first,
        index=3,
        methods=("d_rise", "occlusion"),
    ),
    Question("value: what makes the largest large?", "digits-value", lambda scene: "up:largest", NUMBERS, 6),
    Question("value: what does the sum come from?", "digits-value", lambda scene: "up:sum", NUMBERS, 7),
    Question(
        "contrast: why the {0}, not the {1}?",
        "digits-multilabel",
        lambda scene: f"contrast:{scene.boxes[0].label}>{scene.boxes[1].label}",
        index=9,
    ),
    Question(
        "contrast: why the {1}, not the {0}?",
        "digits-multilabel",
        lambda scene: f"contrast:{scene.boxes[1].label}>{scene.boxes[0].label}",
        index=9,
    ),
    Question(
        "text-image: where is the {0}?", "digits-text-image", lambda scene: next(each_text(scene)).targets[0], index=3
    ),
    Question("text-image: where is what is said?", "digits-text-image", lambda s: f"text:{a_true_text(s)}", index=14),
    Question(
        "answers: which digit is left?",
        "digits-answers",
        lambda scene: f"text:{NAMES[int(asked.in_order(scene.boxes)[0].label)]}",
        index=9,
        beside=asked.QUESTIONS[0],
    ),
    Question(
        "answers: which digit is right?",
        "digits-answers",
        lambda scene: f"text:{NAMES[int(asked.in_order(scene.boxes)[-1].label)]}",
        index=9,
        beside=asked.QUESTIONS[1],
    ),
    Question(
        "answers: how many sevens?",
        "digits-answers",
        lambda scene: "text:one",
        Content(present=SEVEN),
        index=5,
        beside=asked.QUESTIONS[-1],
    ),
    Question(
        "tokens: why the second word?",
        "digits-tokens",
        lambda scene: [ask.targets[0] for ask in each_word(scene)][1],
        index=9,
    ),
    Question("segmentation: why are places of the {0}?", "digits-segmentation", first, index=9),
    Question(
        "segmentation: what in the box of the {1} is of it?",
        "digits-segmentation",
        lambda scene: list(each_digit_in_its_box(scene))[1].targets[0],
        index=9,
    ),
    Question("finer: the {0}, not what is nearest?", "digits", lambda scene: f"finer:{first(scene)}", index=12),
    Question("against: what speaks against the {0}?", "digits", lambda scene: f"against:{first(scene)}", index=12),
)


def picture() -> Image.Image:
    """Returns the sheet: a row for each question, with the scene and its map by each method."""
    rows = []
    for question in QUESTIONS:
        scene = make_scene(SEED, question.index, 2, "test", question.content)
        engine, target = load_engine(question.network), question.target(scene)
        seen = Image.fromarray(scene.pixels)
        maps = [
            engine.explain(scene.pixels, [method], [target], text=question.beside).maps[0].array
            for method in question.methods
        ]
        titles = " and ".join(METHODS[method].title for method in question.methods)
        by = "" if question.methods == METHOD_NAMES else f"; {titles}"
        caption = question.text.format(*(box.label for box in scene.boxes)) + f" ({target}{by})"
        rows.append(SheetRow(caption, (seen, *(overlay(seen, one) for one in maps))))
    return sheet(["Scene", *(METHODS[method].title for method in METHOD_NAMES)], rows, cell_px=144)


def results(device: torch.device) -> Path:
    return Path(__file__).parent / "results" / f"targets-{device.type}.json"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("--scenes", type=int, default=50, help="for each row")
    measuring.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    measuring.add_argument("--out", type=Path, help="default: results/targets-<device>.json beside this file")
    rendering = commands.add_parser("render")
    rendering.add_argument("--results", type=Path, default=results(torch.device("cpu")))
    drawing = commands.add_parser("sheet")
    drawing.add_argument("--out", type=Path, default=PICTURE)
    return parser


def main() -> None:
    given = _parser().parse_args()
    if given.command == "render":
        PAGE.write_text(rendered(PAGE.read_text(), json.loads(given.results.read_text())))
        print(f"written to {PAGE}")
        return
    if given.command == "sheet":
        picture().quantize(256).save(given.out, optimize=True)
        print(f"written to {given.out}")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    environment = common.environment(device)
    out = given.out or results(device)
    rows = measure(given.rows, given.scenes, environment)
    content = {"environment": environment, "rows": merged(out, rows)}
    common.write(out, content)
    print(table(content))
    print(f"\nwritten to {out}")


if __name__ == "__main__":
    main()

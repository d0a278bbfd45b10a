"""Does what `camserve evaluate` and `camserve augment` ask for, between the command line and the files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from camserve.engine import Engine
from camserve.errors import InvalidOption
from camserve.evaluation.augment import Recipe
from camserve.evaluation.curves import PROTOCOLS
from camserve.evaluation.examples import Example, digits_examples, folder_examples, unknown_labels
from camserve.evaluation.figures import write_figures
from camserve.evaluation.report import make_report
from camserve.evaluation.run import Plan, evaluate
from camserve.evaluation.truth import read_boxes
from camserve.evaluation.variants import Classes, Outcome, VariantPlan, augment
from camserve.methods import METHODS, MethodSpec
from camserve.types import Precision

DEFAULT_MODEL = "lite0"
DIGITS = "digits"
DIGITS_SCENES = 30


def run(
    *,
    model: str | None,
    images: Path | None,
    boxes: Path | None,
    benchmark: str | None,
    methods: Sequence[MethodSpec],
    protocols: Sequence[str],
    layer: str,
    precision: Precision,
    limit: int | None,
    sanity_images: int,
    out: Path,
    store: Path | None,
    console: Console,
) -> list[Path]:
    """Evaluates and writes the report; continues what a run with the same settings has begun.

    Args:
        model: of the store; None: `lite0`, or the benchmark's own.
        images: folder of images; None with a benchmark.
        boxes: COCO JSON file, Pascal VOC XML file or folder of such.
        benchmark: "digits", or None.
        methods: empty means all.
        protocols: names of `PROTOCOLS`.
        layer: name; empty means the model's default.
        precision: of masked queries.
        limit: how many images at most; None: all of the folder, `DIGITS_SCENES` scenes.
        sanity_images: how many of them go through the sanity check.
        out: folder of the report.
        store: directory of model archives.
        console: where the progress bar goes.

    Returns:
        The paths of the report.

    Raises:
        CamserveError: as `evaluate`.
    """
    engine, examples, dataset = _subject(model, images, boxes, benchmark, limit, store)
    plan = Plan(
        methods=tuple(methods) or tuple(spec() for spec in METHODS.values()),
        protocols=tuple(PROTOCOLS[name] for name in protocols),
        layer=layer,
        precision=precision,
        sanity_images=sanity_images,
        dataset=dataset,
    )
    with _bar(console) as on_progress:
        records = evaluate(engine, examples, plan, out, on_progress)
    settings = plan.settings(engine) | {"labels_without_class": unknown_labels(examples, engine.info.labels)}
    report = make_report(settings, records, plan.methods)
    return report.write(out) + write_figures(settings, records, plan.methods, out)


def _subject(
    model: str | None,
    images: Path | None,
    boxes: Path | None,
    benchmark: str | None,
    limit: int | None,
    store: Path | None,
) -> tuple[Engine, list[Example], str]:
    """Returns what explains, what is explained, and what that is called."""
    if (images is None) == (benchmark is None):
        raise InvalidOption("give a folder of images or a benchmark: exactly one of --images and --benchmark")
    if images is None and boxes is not None:
        raise InvalidOption("--boxes belong to --images; a benchmark has its own")
    if images is None:  # scikit-learn is needed for the benchmark alone
        from camserve.evaluation.digits.shipped import MICRO_BATCH, load_engine

        engine = load_engine() if model is None else Engine.load(model, store, micro_batch=MICRO_BATCH)
        of_places = "share" in engine.info.says
        examples = digits_examples(limit or DIGITS_SCENES, of_places, engine.info.labels)
        return engine, examples, "the digits benchmark"
    examples = folder_examples(images, None if boxes is None else read_boxes(boxes))[:limit]
    known = f", boxes of {boxes.name}" if boxes is not None else ""
    return Engine.load(model or DEFAULT_MODEL, store), examples, f"folder {images.resolve().name}{known}"


def run_augment(
    images: Path,
    *,
    model: str,
    recipe: Recipe,
    classes: Classes,
    layer: str,
    precision: Precision,
    out: Path,
    store: Path | None,
    console: Console,
) -> Outcome:
    """Writes a variant of every image; continues what a run with the same settings has begun.

    Raises:
        CamserveError: as `camserve.evaluation.variants.augment`.
    """
    plan = VariantPlan(recipe, classes, layer, precision)
    with _bar(console) as on_progress:
        return augment(Engine.load(model, store), images, plan, out, on_progress)


@contextmanager
def _bar(console: Console) -> Iterator[Callable[[int, int, str], None]]:
    """Yields a function that shows progress on a bar; nothing is shown where the console is no terminal."""
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)
        yield lambda done, total, what: progress.update(task, completed=done, total=total, description=escape(what))

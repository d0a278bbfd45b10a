"""Does what `camserve augment` asks for: a variant of every image of a folder, for fine-tuning.

Images go through in batches: one forward pass for their classes and activations, one run of masked queries for all of
them. Every variant that is finished is a file and a line in the journal; a second run goes on from there.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image

from camserve.engine import Engine
from camserve.errors import InvalidImage, InvalidInput, InvalidOption, Unsupported
from camserve.evaluation.augment import Recipe, binary_masks, variant, wanted_target
from camserve.evaluation.examples import check_images_alone
from camserve.evaluation.run import asking
from camserve.folders import image_names
from camserve.images import as_picture, pixels, read_image, sent_view
from camserve.journal import Journal, Record
from camserve.labels import resolve_label
from camserve.types import Precision
from camserve.types.target_forms import check_predicts

JOURNAL = "augment.jsonl"
Classes = Literal["predicted", "folder"]
CLASSES: tuple[Classes, ...] = get_args(Classes)


@dataclass(frozen=True)
class VariantPlan:
    """Says what is made of a folder."""

    recipe: Recipe = field(default_factory=Recipe)
    classes: Classes = "predicted"
    """Choice of the class that is explained. predicted: the network's most probable class. folder: the class that the
    image's folder is named after, as the authors of Group-CAM take the true class."""
    layer: str = ""
    """Name of the layer; empty: the model's default layer."""
    precision: Precision = "exact"
    """Precision of masked queries."""

    def settings(self, engine: Engine) -> Record:
        """Returns what all variants of one folder have in common."""
        info = engine.info
        model = {"model": info.name, "version": info.version, "weights": info.source}
        layer = {"layer": info.layer(self.layer).name, "input_px": list(info.input_size)}
        return {**model, **layer, "precision": self.precision, "classes": self.classes, **asdict(self.recipe)}


@dataclass
class Outcome:
    """Sorts the images by what came of them, as paths in the folder."""

    written: list[str] = field(default_factory=list)
    there: list[str] = field(default_factory=list)
    """Images whose variants were written by an earlier run."""
    empty: list[str] = field(default_factory=list)
    """Images without variant, because their maps have no positive evidence."""
    failed: dict[str, str] = field(default_factory=dict)
    """Images without variant because they are broken, or not of the class that is wanted, and why."""


@dataclass(frozen=True)
class _Source:
    """Describes one image that has no variant yet."""

    head: Record
    """Beginning of the image's record in the journal."""
    pixels: np.ndarray
    """Pixels that the network sees, (H, W, C), uint8, or of 16-bit grey float32 in [0, 1]."""
    wanted: int | None
    """Class index that is wanted; None: the most probable one."""

    @property
    def name(self) -> str:
        return str(self.head["image"])


def augment(
    engine: Engine,
    folder: Path,
    plan: VariantPlan,
    out: Path,
    on_progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Outcome:
    """Writes `out/<path in the folder>.png`, as large as the network's input, for what is not there yet.

    Args:
        engine: whose maps decide what stays sharp.
        folder: of images, in subfolders or not.
        plan: how variants are made.
        out: made when missing.
        on_progress: called with (done, total, what is next) before each batch and at the end.

    Raises:
        NotFound: no such folder, or no image in it.
        InvalidOption: `out` lies in the folder, or has variants that were made with other settings; folders that are
            no classes of the network, where they should be.
        Unsupported: a network that Group-CAM cannot serve, or one that takes a text beside the image.
    """
    check_images_alone(engine.info)
    check_predicts(engine.info)
    if "layer" in engine.info.lacks:
        raise Unsupported(f"variants are made of the activations of a layer: {engine.info.lacks['layer']}")
    names = image_names(folder, out)
    wanted = _wanted_classes(folder, names, engine.info.labels) if plan.classes == "folder" else {}
    journal, outcome = Journal(out / JOURNAL, plan.settings(engine)), Outcome()
    size = engine.network.micro_batch
    for start in range(0, len(names), size):
        on_progress(start, len(names), names[start])
        found = (
            _source(folder, out, name, wanted.get(name), engine, journal, outcome) for name in names[start:][:size]
        )
        if batch := [source for source in found if source is not None]:
            make_variants(engine, batch, plan, out, journal, outcome)
    on_progress(len(names), len(names), "")
    return outcome


def _wanted_classes(folder: Path, names: Sequence[str], labels: Sequence[str]) -> Mapping[str, int]:
    parents = {name: (folder / name).parent.resolve().name for name in names}
    known: dict[str, int] = {}
    unknown: list[str] = []
    for parent in sorted(set(parents.values())):
        try:
            known[parent] = resolve_label(parent, labels)
        except InvalidOption as error:
            unknown.append(str(error))
    if unknown:
        raise InvalidOption(f"{len(unknown)} folders are no classes of the network: {'; '.join(unknown[:5])}")
    return {name: known[parent] for name, parent in parents.items()}


def _source(
    folder: Path, out: Path, name: str, wanted: int | None, engine: Engine, journal: Journal, outcome: Outcome
) -> _Source | None:
    """Returns the image, unless it is done or broken: then the outcome says so."""
    try:
        content = read_image(folder / name)
        assert isinstance(content, bytes)
        head = {"kind": "variant", "image": name, "sha256": hashlib.sha256(content).hexdigest()}
        done = journal.find(head)
        if done is not None and (done["empty"] or _path(out, name).exists()):
            (outcome.empty if done["empty"] else outcome.there).append(name)
            return None
        seen, _ = sent_view(content, engine.network.preprocessing)
    except InvalidImage as error:
        outcome.failed[name] = str(error)
        return None
    return _Source(head, pixels(seen), wanted)


def make_variants(
    engine: Engine, batch: Sequence[_Source], plan: VariantPlan, out: Path, journal: Journal, outcome: Outcome
) -> None:
    """Writes the variants of a batch of sources, and a line of the journal for each source."""
    network = engine.network
    with asking(network) as micro_batch:
        x = torch.cat([network.normalise(torch.from_numpy(source.pixels[None])) for source in batch])
        captured = network.capture(x, engine.info.layer(plan.layer).name)
        targets = {}
        for number, source in enumerate(batch):
            try:
                targets[number] = wanted_target(network.score, captured.logits[number], source.wanted)
            except InvalidOption as error:  # of a network of places, no place is of the class
                outcome.failed[source.name] = str(error)
        if not targets:
            return
        scores, kept = partial(network.scores, precision=plan.precision), list(targets)
        asked = x[kept], captured.activations[kept], list(targets.values())
        masks = binary_masks(scores, *asked, plan.recipe, micro_batch)
    for (number, target), mask in zip(targets.items(), masks, strict=True):
        source = batch[number]
        if mask is not None:
            _save(as_picture(variant(source.pixels, mask)), _path(out, source.name))
        (outcome.empty if mask is None else outcome.written).append(source.name)
        sharp = 0.0 if mask is None else float(mask.mean())
        index = target.each[0].classes[0].index
        journal.add(source.head | {"class": index, "sharp": sharp, "empty": mask is None})


def _path(out: Path, name: str) -> Path:
    """Returns the variant's path, with the whole name kept: `cat.jpg` and `cat.png` may lie in one folder."""
    return out / f"{name}.png"


def _save(image: Image.Image, path: Path) -> None:
    """Writes all of the file, or none of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    image.save(unfinished, "PNG")
    os.replace(unfinished, path)


def check(outcome: Outcome) -> None:
    """Raises InvalidInput where images failed; the text names the first of them.

    Raises:
        InvalidInput: some images failed.
    """
    if outcome.failed:
        some = "; ".join(f"{name}: {why}" for name, why in list(outcome.failed.items())[:5])
        raise InvalidInput(f"images without variant: {len(outcome.failed)} ({some})")

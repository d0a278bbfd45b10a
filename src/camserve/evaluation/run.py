"""Evaluates methods on examples: every finished (image, method) goes into the journal at once.

The class explained is every class that has boxes in the image, else the most probable one. Maps are made by
`camserve.Engine`; curves and drops are masked queries about the same input, in the same precision. Localisation is
measured in pixels of the image, on the part of it that the network saw.
"""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import camserve
from camserve.engine import Engine
from camserve.errors import InvalidImage, InvalidOption, Unsupported
from camserve.evaluation.confidence import confidence
from camserve.evaluation.curves import PROTOCOLS, Faithfulness, Protocol, faithfulness
from camserve.evaluation.examples import Example, check_images_alone, classes_of, seen_boxes, unknown_labels
from camserve.evaluation.localisation import class_contrast, localise
from camserve.evaluation.sanity import cascading_randomisation
from camserve.evaluation.truth import TrueBox
from camserve.finalise.maps import into_original
from camserve.images import pixels, sent_view
from camserve.journal import Journal, Record
from camserve.methods import MethodSpec
from camserve.runtimes.modes import exact_float32
from camserve.saliency.registry import REGISTRY, Perturbation
from camserve.scores import Targets
from camserve.types import Explanation, InputView, Precision, Prediction, SaliencyMap, Target
from camserve.types.target_forms import check_predicts
from camserve.worker.network import Network

JOURNAL = "journal.jsonl"
OVERLAYS = "overlays"


@dataclass(frozen=True)
class Plan:
    """Says what is measured."""

    methods: tuple[MethodSpec, ...]
    protocols: tuple[Protocol, ...] = (PROTOCOLS["rise"], PROTOCOLS["group_cam_paper"])
    layer: str = ""
    precision: Precision = "exact"
    sanity_images: int = 1
    """Number of examples that go through the sanity check, which explains each several times."""
    pictures: int = 8
    """Number of examples that have overlays, for the contact sheet."""
    dataset: str = ""
    """Name of the examples, for people."""

    def settings(self, engine: Engine) -> Record:
        """Returns what figures must have in common to be compared, and what a reader must know of them."""
        info = engine.info
        return {
            "dataset": self.dataset,
            "model": info.name,
            "version": info.version,
            "weights": info.source,
            "layer": info.layer(self.layer).name,
            "score": info.score,
            "input_px": list(info.input_size),
            "precision": self.precision,
            "protocols": {
                protocol.name: {
                    "steps": protocol.steps,
                    "step_px": protocol.step_px(info.input_size[0] * info.input_size[1]),
                }
                for protocol in self.protocols
            },
            "versions": {"camserve": camserve.__version__, "torch": torch.__version__, "numpy": np.__version__},
            "machine": _machine(engine.network),
        }


def _machine(network: Network) -> str:
    if network.device.type == "cuda":
        return torch.cuda.get_device_name(network.device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def evaluate(
    engine: Engine,
    examples: Sequence[Example],
    plan: Plan,
    out: Path,
    on_progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> list[Record]:
    """Measures what the journal in `out` does not have yet.

    Args:
        engine: what explains.
        examples: images, with boxes or without.
        plan: methods, protocols and so on.
        out: folder of the report; made when missing.
        on_progress: called with (done, total, what is next) before each image and method, and at the end.

    Returns:
        The records of these examples and methods, for `camserve.evaluation.report`.

    Raises:
        InvalidOption: the folder has a journal with other settings.
        Unsupported: the model takes a text beside the image, which examples do not have, or has no predictions.
        InvalidInput: a broken image, which the text names; boxes of which no label is a class of the network.
    """
    check_images_alone(engine.info)
    check_predicts(engine.info)
    unknown_labels(examples, engine.info.labels)
    ledger = _Ledger(Journal(out / JOURNAL, plan.settings(engine)), plan.methods, on_progress)
    ledger.total = len(plan.methods) * (len(examples) + bool(plan.sanity_images))
    for number, example in enumerate(examples):
        pictures = out / OVERLAYS if number < plan.pictures else None
        _measure(engine, example, plan, pictures, ledger)
    if plan.sanity_images:
        _check_sanity(engine, examples[: plan.sanity_images], plan, ledger)
    on_progress(ledger.total, ledger.total, "")
    return ledger.records


class _Ledger:
    """Knows which records of this run there are, in the journal of all runs."""

    def __init__(
        self, journal: Journal, methods: Sequence[MethodSpec], on_progress: Callable[[int, int, str], None]
    ) -> None:
        self._journal, self._methods, self._on_progress = journal, methods, on_progress
        self.total = 0
        self.records: list[Record] = []

    def unfinished(self, kind: str, image: str, sha256: str) -> Iterator[tuple[MethodSpec, Record]]:
        """Yields methods that have no record of this image, each with the beginning of the record to be added."""
        for spec in self._methods:
            head = {"kind": kind, "image": image, "sha256": sha256, "method": spec.name, "parameters": asdict(spec)}
            old = self._journal.find(head)
            if old is None:
                self._on_progress(len(self.records), self.total, f"{image}: {spec.title}")
                yield spec, head
            else:
                self.records.append(old)

    def add(self, record: Record) -> None:
        """Adds a record, which is on disk when this returns."""
        self._journal.add(record)
        self.records.append(record)


@dataclass(frozen=True)
class _Subject:
    """Describes one example as the network sees it."""

    engine: Engine
    example: Example
    plan: Plan
    content: bytes
    input: Tensor
    """The normalised input (3, H, W)."""
    predictions: tuple[Prediction, ...]
    """Predictions of all classes, first the most probable; of a detector its detections, of which there may be none; of
    places those of the classes that have some."""
    boxes: Mapping[int, tuple[TrueBox, ...]]
    """Boxes by class, those that the network saw something of; of a detector those of classes that it detects, and of
    places those of classes that have some."""
    masks: Mapping[int, np.ndarray]
    """Pixels (height, width) of the image by class, for the classes of which they are known."""
    pictures: Path | None
    """Folder for overlays; None: none are made."""

    def explain(self, spec: MethodSpec, classes: Sequence[int]) -> Explanation:
        return self.engine.explain(
            self.content, [spec], classes, layer=self.plan.layer, precision=self.plan.precision, top_predictions=0
        )

    @property
    def classes(self) -> list[int]:
        """Returns the classes that are explained."""
        return list(self.boxes) or [self.predictions[0].index]

    @property
    def contrasted(self) -> int | None:
        """Returns the least likely class, where the most likely one has boxes to be contrasted on.

        A detector says nothing of classes that it does not detect.
        """
        if self.predictions[0].box is not None:
            return None
        return self.predictions[-1].index if self.predictions[0].index in self.boxes else None


def _measure(engine: Engine, example: Example, plan: Plan, pictures: Path | None, ledger: _Ledger) -> None:
    content, subject = example.read(), None
    for spec, head in ledger.unfinished("image", example.name, example.digest(content)):
        try:
            subject = subject or subject_of(engine, example, content, plan, pictures)
        except InvalidImage as error:
            raise InvalidImage(f"{example.name}: {error}") from None
        ledger.add(head | measured(subject, spec))


def subject_of(engine: Engine, example: Example, content: bytes, plan: Plan, pictures: Path | None) -> _Subject:
    """Returns an example with what all methods share: its input, its predictions and its boxes."""
    network = engine.network
    answer = engine.explain(content, [], layer=plan.layer, top_predictions=engine.info.most_predictions)
    picture, view = sent_view(content, network.preprocessing)
    predictions = tuple(one for one in answer.predictions if one.share != 0)
    said = {one.index for one in predictions}
    finds = not said or predictions[0].box is not None or predictions[0].share is not None
    boxes = {
        index: seen
        for index, some in classes_of(example.boxes, engine.info.labels).items()
        if (seen := seen_boxes(some, view)) and (index in said or not finds)
    }
    masks = {index: example.masks[some[0].label] for index, some in boxes.items() if some[0].label in example.masks}
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
        picture.save(pictures / f"{_slug(example.name)}.png")
    x = network.normalise(torch.from_numpy(pixels(picture))[None])[0]
    return _Subject(engine, example, plan, content, x, predictions, boxes, masks, pictures)


def measured(subject: _Subject, spec: MethodSpec) -> Record:
    """Returns all about one image and method; {"unsupported": why} where the network or layer cannot serve it."""
    if not subject.predictions:
        return {"unsupported": "nothing is detected"}
    start = time.perf_counter()
    try:
        answer = subject.explain(spec, _explained(subject, spec))
    except (InvalidOption, Unsupported) as error:
        return {"unsupported": str(error)}
    seconds = time.perf_counter() - start
    found = {one.target.index: one for one in answer.maps}
    maps = [found[index] for index in subject.classes]
    return {
        "queries": answer.cost.queries,
        "seconds": seconds,
        "maps": _maps(subject, maps, answer.input),
        "contrast": _contrast(subject, spec, found, answer.input),
        "pictures": _pictures(subject, maps),
        "seen": f"{OVERLAYS}/{_slug(subject.example.name)}.png",
    }


def _explained(subject: _Subject, spec: MethodSpec) -> list[int]:
    """Returns the classes that one request explains.

    The contrasted one is with them where masked queries serve all classes alike, so that it costs nothing more.
    """
    layer = subject.engine.info.layer(subject.plan.layer)
    masked = isinstance(REGISTRY[type(spec)], Perturbation)
    shared = masked and spec.queries(layer, 1) == spec.queries(layer, 2)
    return [*subject.classes, subject.contrasted] if shared and subject.contrasted is not None else subject.classes


def _maps(subject: _Subject, maps: Sequence[SaliencyMap], view: InputView) -> list[Record]:
    network, plan = subject.engine.network, subject.plan
    saliency = torch.from_numpy(np.stack([one.array for one in maps])).to(subject.input)
    with asking(network) as micro_batch:
        scores = partial(network.scores, precision=plan.precision)
        targets = _targets_of(network, subject.input, [one.target.index for one in maps])
        curves = faithfulness(scores, subject.input, saliency, targets, plan.protocols, micro_batch)
        kept = confidence(scores, subject.input, saliency, targets, micro_batch)
    return [
        {
            "class": one.target.index,
            "label": one.target.label,
            "degenerate": one.degenerate,
            "curves": {result.protocol: _curves(result) for result in results},
            "score": confident.whole,
            "drop": confident.drop,
            "increased": confident.increased,
            "localisation": _localisation(subject, one, view),
        }
        for one, results, confident in zip(maps, curves, kept, strict=True)
    ]


def _targets_of(network: Network, image: Tensor, indices: Sequence[int]) -> Targets:
    """Returns the targets that maps of these classes, numbers or references explain."""
    outputs = network.scores(image[None], "exact")[0].detach()
    found = [target for index in indices for target in network.score.resolved(Target(index=index), outputs)]
    return network.score.targets(found, network.device)


@contextmanager
def asking(network: Network) -> Iterator[int]:
    """Enters the state in which the engine asks its own masked queries; yields the micro-batch."""
    with network.evaluating(), exact_float32(), torch.autocast(network.device.type, enabled=False):
        yield network.micro_batch


def _curves(result: Faithfulness) -> Record:
    return {
        "deletion": [round(float(score), 6) for score in result.deletion],
        "insertion": [round(float(score), 6) for score in result.insertion],
        "deletion_auc": result.deletion_auc,
        "insertion_auc": result.insertion_auc,
    }


def _localisation(subject: _Subject, saliency: SaliencyMap, view: InputView) -> Record | None:
    index = saliency.target.index
    boxes, mask = subject.boxes.get(index), subject.masks.get(index)
    return asdict(localise(into_original(saliency.array, view), boxes, mask)) if boxes else None


def _contrast(subject: _Subject, spec: MethodSpec, found: Mapping[int, SaliencyMap], view: InputView) -> Record | None:
    """Returns the class contrast, where the most probable class has boxes."""
    most, least = subject.predictions[0].index, subject.contrasted
    if least is None:
        return None
    unlikely = found[least] if least in found else subject.explain(spec, [least]).maps[0]
    first, last = (into_original(one.array, view) for one in (found[most], unlikely))
    return asdict(class_contrast(first, last, subject.boxes[most], subject.masks.get(most)))


def _pictures(subject: _Subject, maps: Sequence[SaliencyMap]) -> Record:
    """Writes overlays, and returns them by class as paths in the report's folder."""
    written: dict[str, str] = {}
    for one in maps if subject.pictures is not None else ():
        parameters = "-".join(str(value) for value in asdict(one.method).values())
        name = _slug(f"{subject.example.name}-{one.method.name}-{parameters}-{one.target.index}")
        assert subject.pictures is not None
        one.overlay().save(subject.pictures / f"{name}.png")
        written[str(one.target.index)] = f"{OVERLAYS}/{name}.png"
    return written


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "-", text).strip("-")


def _check_sanity(engine: Engine, examples: Sequence[Example], plan: Plan, ledger: _Ledger) -> None:
    contents = [example.read() for example in examples]
    digests = [example.digest(content) for example, content in zip(examples, contents, strict=True)]
    for spec, head in ledger.unfinished("sanity", "sanity check", " ".join(digests)):
        try:
            found = cascading_randomisation(engine, contents, [spec], layer=plan.layer)
            outcome: Record = {"stages": [[asdict(stage) for stage in stages] for stages in found[spec]]}
        except (InvalidOption, Unsupported) as error:
            outcome = {"unsupported": str(error)}
        ledger.add(head | outcome)

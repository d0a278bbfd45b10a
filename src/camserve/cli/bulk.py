"""Explains many images for `camserve explain FOLDER`: writes pictures, a journal to go on from, and a table.

A picture that is finished is a file, and its image a line of the journal. The table is made of the journal at the end,
also of a run that was stopped.
"""

from __future__ import annotations

import csv
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from camserve.errors import (
    CamserveError,
    DeadlineExceeded,
    Internal,
    InvalidImage,
    InvalidInput,
    Overloaded,
    Unauthenticated,
    Unavailable,
    Unsupported,
)
from camserve.folders import LIST_SUFFIX, image_names, listed_images
from camserve.images import read_image
from camserve.journal import Journal, Record
from camserve.many import Answered
from camserve.methods import method_text
from camserve.types import Explanation, Prediction, SaliencyMap

JOURNAL = "explanations.jsonl"
TABLE = "explanations.csv"

_BOX = ("left", "top", "right", "bottom", "box_score")
COLUMNS = (
    *("image", "error", "model", "version", "method", "target", "score", "predicted", "figure", "predictions"),
    *(*_BOX, "degenerate", "complete", "queries", "seconds", "picture", "evidence"),
)
"""Columns of the table: one row for each map, and one for each image that failed, by `error`."""

_OF_ONE_IMAGE = (InvalidImage, DeadlineExceeded, Overloaded, Internal)
"""Errors that the next image need not have."""

_OF_ALL_IMAGES = (Unauthenticated, Unavailable)
"""Errors that each further image would have: the server is gone, or will not have us."""

AskMany = Callable[[Iterable[bytes]], Iterator[Answered[bytes]]]
WritePictures = Callable[[Iterable[SaliencyMap], str, Path], list[Path]]
Keep = Callable[[str], int]


def is_many(path: Path) -> bool:
    """Returns whether a path names many images: a folder, or a list."""
    return path.is_dir() or path.suffix.lower() == LIST_SUFFIX


def explain_many(
    source: Path,
    out: Path,
    settings: Record,
    ask: AskMany,
    write: WritePictures,
    evidence: Path | None,
    console: Console,
) -> None:
    """Explains what is not explained yet, and writes the table of all.

    Args:
        source: a folder, with its subfolders, or a list of paths.
        out: folder for pictures, journal and table; made when missing.
        settings: what must be the same in every run that writes there.
        ask: yields answers for the contents of image files.
        write: writes the pictures of maps under a name into a folder, and returns their paths.
        evidence: log to which the answers' evidence records are appended; None where none are asked.
        console: for the bar.

    Raises:
        NotFound: there is no image.
        InvalidOption: `out` lies in the folder, or has what was made with other settings; the log cannot be written, or
            is none.
        InvalidInput: some images failed; the text names the first of them, and the table all.
        CamserveError: what would fail every image, such as an unknown model or a server that is gone.
    """
    folder, names = listed_images(source) if source.is_file() else (source, image_names(source, out))
    journal = Journal(out / JOURNAL, settings)
    with _evidence_log(evidence) as keep:
        _explain_all(_Run(folder, names, out, journal, write, keep), ask, console)


def _explain_all(run: _Run, ask: AskMany, console: Console) -> None:
    try:
        with _bar(console, len(run.names)) as show:
            show(run)
            for answer in ask(run.contents()):
                run.take(answer)
                show(run)
    finally:
        run.write_table()
    if run.failed:
        some = "; ".join(f"{name}: {why}" for name, why in list(run.failed.items())[:5])
        raise InvalidInput(f"{len(run.failed)} of {len(run.names)} images failed, see {run.out / TABLE} ({some})")


@contextmanager
def _evidence_log(path: Path | None) -> Iterator[Keep | None]:
    """Yields a function that appends the record of an answer to a log, and returns its number there.

    The record has the log's place in a chain; the one that a server gave it is kept as `received`, so that the line
    that came can be made again.
    """
    if path is None:
        yield None
        return
    from camserve.evidence.log import EvidenceLog

    log = EvidenceLog(path, sys.maxsize)

    def keep(line: str) -> int:
        if not line:
            raise Unsupported("this server answers without evidence records")
        record = json.loads(line)
        if place := {name: record.pop(name) for name in ("number", "previous") if name in record}:
            record["received"] = place
        try:
            return int(json.loads(log.append(record).result())["number"])
        except Unavailable:
            raise InvalidInput(f"evidence log {path} cannot be written") from None

    try:
        yield keep
    finally:
        log.close()


class _Run:
    """Knows which images are done, failed, or being asked."""

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        out: Path,
        journal: Journal,
        write: WritePictures,
        keep: Keep | None,
    ) -> None:
        self.names, self.out = names, out
        self.failed: dict[str, str] = {}
        """Images that failed, and why."""
        self.explained = 0
        """Number of images that this run explained."""
        self._folder, self._journal, self._write, self._keep = folder, journal, write, keep
        self._records: dict[str, Record] = {}
        self._asked: list[Record] = []

    @property
    def done(self) -> int:
        """Number of images that nothing is left to do for."""
        return len(self._records) + len(self.failed)

    def contents(self) -> Iterator[bytes]:
        """Yields the files that are to be asked, each read when its turn comes."""
        for name in self.names:
            try:
                content = read_image(self._folder / name)
                assert isinstance(content, bytes)
            except InvalidImage as error:
                self.failed[name] = str(error)
                continue
            head = {"kind": "explanation", "image": name, "sha256": hashlib.sha256(content).hexdigest()}
            known = self._journal.find(head)
            if known is not None and all((self.out / row["picture"]).exists() for row in known["maps"]):
                self._records[name] = known
                continue
            self._asked.append(head)
            yield content

    def take(self, answer: Answered[bytes]) -> None:
        """Writes what an answer has; raises the error that further images would have as well."""
        head = self._asked[answer.index]
        if answer.explanation is None:
            assert answer.error is not None, "an answer has one of the two"
            self._fail(head["image"], answer.error)
            return
        found, name = answer.explanation, Path(head["image"])
        paths = self._write(found.maps, name.name, self.out / name.parent)  # with the suffix: cat.jpg is not cat.png
        record = head | _record(found, [path.relative_to(self.out).as_posix() for path in paths])
        record |= {} if self._keep is None else {"evidence": self._keep(found.evidence)}
        self._journal.add(record)
        self._records[head["image"]] = record
        self.explained += 1

    def _fail(self, name: str, error: CamserveError) -> None:
        of_all = isinstance(error, _OF_ALL_IMAGES) or not (self.explained or isinstance(error, _OF_ONE_IMAGE))
        if of_all:
            raise error
        self.failed[name] = str(error)

    def write_table(self) -> None:
        """Writes a row for each map of the images that are done, and for each that failed, in the images' order."""
        with (self.out / TABLE).open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, COLUMNS, restval="")
            table.writeheader()
            for name in self.names:
                if name in self._records:
                    table.writerows(_rows(self._records[name]))
                elif name in self.failed:
                    table.writerow({"image": name, "error": self.failed[name]})


def _record(found: Explanation, pictures: Sequence[str]) -> Record:
    """Returns what the journal keeps of an explanation."""
    return {
        "model": found.model,
        "version": found.version,
        "predictions": [_prediction(each) for each in found.predictions],
        "queries": found.cost.queries,
        "seconds": round(sum(found.cost.stage_seconds.values()), 4),
        "maps": [_map(saliency, picture) for saliency, picture in zip(found.maps, pictures, strict=True)],
    }


def _prediction(each: Prediction) -> dict[str, Any]:
    return {"label": each.label, "figure": each.figure}


def _map(saliency: SaliencyMap, picture: str) -> dict[str, Any]:
    target = saliency.target_text or saliency.target.label
    boxes = [[box.left, box.top, box.right, box.bottom, box.score] for box in saliency.boxes]
    return {
        "method": method_text(saliency.method),
        "target": target,
        "score": saliency.score,
        "boxes": boxes,
        "degenerate": saliency.degenerate,
        "complete": saliency.complete,
        "picture": picture,
    }


def _rows(record: Record) -> Iterator[dict[str, Any]]:
    """Yields the rows of an image, one for each map; the box is the first one, where there are some."""
    first = record["predictions"][0] if record["predictions"] else {"label": "", "figure": ""}
    shared = {name: record[name] for name in ("image", "model", "version", "queries", "seconds")}
    shared |= {"evidence": record.get("evidence", "")}
    shared |= {"predicted": first["label"], "figure": first["figure"], "predictions": json.dumps(record["predictions"])}
    for each in record["maps"]:
        told = {name: each[name] for name in ("method", "target", "score", "degenerate", "complete", "picture")}
        box = zip(
            ("left", "top", "right", "bottom", "box_score"), each["boxes"][0] if each["boxes"] else (), strict=False
        )
        yield shared | told | dict(box)


@contextmanager
def _bar(console: Console, total: int) -> Iterator[Callable[[_Run], None]]:
    """Yields a function that shows how far a run is: images, rate, time left, failures.

    Nothing is shown where the console is no terminal.
    """
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    began_s = time.monotonic()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)

        def show(run: _Run) -> None:
            rate = run.explained / max(time.monotonic() - began_s, 1e-9)
            text = f"{rate:.1f} images/s" + (f", {len(run.failed)} failed" if run.failed else "")
            progress.update(task, completed=run.done, description=escape(text))

        yield show

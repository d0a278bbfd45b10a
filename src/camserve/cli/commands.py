"""Defines the command `camserve`; heavy imports are left to the command that needs them: `--help` is instant."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from camserve import __version__, environment
from camserve.errors import CamserveError, Internal, InvalidInput, InvalidOption, NotFound, Unauthenticated, Unsupported
from camserve.methods import METHODS, MethodSpec, method_text, parse_method_text
from camserve.types import (
    OUTPUTS,
    PRECISIONS,
    AnyTarget,
    BoxOptions,
    Explanation,
    Preprocessing,
    Region,
    Target,
    Vector,
)
from camserve.types.model import DECODINGS
from camserve.types.targets import OfClasses, parse_target
from camserve.wording import shown

try:
    import click
except ImportError:
    sys.exit("the command camserve needs click and rich: pip install 'camserve[cli]'")

from camserve.cli import serving
from camserve.cli.connection_options import Connection, connection_options, token
from camserve.cli.evidence import evidence
from camserve.cli.extras import needs_extra
from camserve.cli.serving import STORE_HELP

if TYPE_CHECKING:
    from PIL import Image
    from rich.console import Console

    from camserve.types import ModelInfo, Progress, SaliencyMap

_CALLERS_FAULT = (InvalidInput, NotFound, Unauthenticated, Unsupported)


_COMPLAINT_S = 2.0
"""Seconds that a last word on stderr may take: the other end of a pipe may not read."""


def main() -> None:
    """Runs the command line and exits, also where the standard streams are closed or nobody reads them."""
    open_standard_streams()
    environment.complete(os.environ)
    sys.exit(run(sys.argv[1:]))


def open_standard_streams() -> None:
    """Opens on the null device what is closed of stdin, stdout and stderr.

    Else the next socket gets the number of stderr, and whatever a library writes there goes to a client.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest free number: this one
    # Python has no stream for a descriptor that was closed when it started.
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8", closefd=False)


def run(arguments: Sequence[str]) -> int:
    """Runs one command.

    Returns:
        The exit status: 0, 2 for what the caller can mend, 130 after Ctrl-C, 1 for anything else.
    """
    try:
        return camserve.main(args=list(arguments), prog_name="camserve", standalone_mode=False) or 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except CamserveError as error:
        _complain(error)
        return 2 if isinstance(error, _CALLERS_FAULT) else 1
    except OSError as error:  # a folder that cannot be written, for instance
        _complain(error)
        return 1


def _complain(error: Exception) -> None:
    """Writes an error to stderr; goes on after some seconds where nobody reads that."""
    thread = threading.Thread(target=_write_error, args=(str(error),), daemon=True)
    thread.start()
    thread.join(_COMPLAINT_S)


def _write_error(text: str) -> None:
    with suppress(OSError, ValueError):  # a closed pipe, a closed stream
        click.echo(f"camserve: {text}", err=True)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="camserve")
def camserve() -> None:
    """Predictions of an image classifier together with the saliency maps behind them."""


@camserve.command()
@click.option("--out", type=click.Path(path_type=Path), default="demo-output", show_default=True, help="For pictures.")
@click.option("--store", type=click.Path(path_type=Path), help=STORE_HELP)
@click.option("--web", is_flag=True, help="Serve the page as well, and leave it running until Ctrl-C.")
def demo(out: Path, store: Path | None, web: bool) -> None:
    """Explain two photos over gRPC and write pictures.

    Serves the default model on free ports of this machine, and stops it again.
    """
    with needs_extra("demo"):
        from camserve.cli.demo import run_demo

        run_demo(out, store, web=web)


for _command in (*serving.COMMANDS, token, evidence):
    camserve.add_command(_command)


@camserve.command()
@click.argument("image", type=click.Path(path_type=Path), metavar="IMAGE|FOLDER|LIST.txt")
@click.option(
    "--method",
    "methods",
    multiple=True,
    metavar="NAME[:KEY=VALUE,...]",
    help="A method with parameters, as `camserve methods` lists them; may be repeated.  [default: grad_cam]",
)
@click.option(
    "--target",
    "targets",
    multiple=True,
    metavar="TARGET",
    help="A class by index or label, the K most probable ones (top3), contrast:A>B,C, finer:A, against:A, up:VALUE, "
    "down:VALUE, vector:FILE.npy, reference:IMAGE or text:WORDS, as `camserve models MODEL` lists them; may be "
    "repeated.  [default: top1]",
)
@click.option("--text", default="", help="For a model that takes one: a question, or the caption so far.")
@click.option("--model", default="", help="May be left out when the server has exactly one.  [with --local: lite0]")
@click.option(
    "--layer",
    "layers",
    multiple=True,
    metavar="NAME",
    help="May be repeated: the maps of several layers are fused.  [default: the model's]",
)
@click.option(
    "--fusion", type=click.Choice(["mean", "max"]), default="mean", show_default=True, help="Of several layers."
)
@click.option("--evaluate", is_flag=True, help="Also measure deletion and insertion (RISE protocol) of each map.")
@click.option("--size", type=click.Choice(["input", "layer", "original"]), default="input", show_default=True)
@click.option("--signed", is_flag=True, help="Also show what speaks against the target, in diverging colours.")
@click.option("--precision", type=click.Choice(PRECISIONS), default="auto", show_default=True)
@click.option("--boxes", is_flag=True, help="Also print a bounding box for each map, in pixels of IMAGE.")
@click.option(
    "--evidence",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also write the evidence record to this file, for `camserve evidence replay`; with --precision exact the maps "
    "can be made again, bit by bit. Of many images it is a log of all records, for `camserve evidence verify`.",
)
@click.option("--out", type=click.Path(path_type=Path), default=".", show_default=True, help="For pictures.")
@connection_options
@click.option("--timeout", "timeout_s", type=click.FloatRange(0, min_open=True), help="Deadline in seconds.")
@click.option("--allow-partial", is_flag=True, help="At the deadline, take the maps as far as they are.")
@click.option(
    "--priority",
    type=click.Choice(["interactive", "normal", "batch"]),
    help="Of a server.  [default: normal; batch for many images]",
)
@click.option("--at-once", type=click.IntRange(1), default=8, show_default=True, help="Of many images, by a server.")
@click.option("--watch", is_flag=True, help="Show predictions at once, and rewrite the pictures while they sharpen.")
@click.option("--local", is_flag=True, help="Explain in this process, without a server.")
@click.option("--store", type=click.Path(path_type=Path), help=f"With --local. {STORE_HELP}")
def explain(image: Path, methods: tuple[str, ...], targets: tuple[str, ...], out: Path, **options: Any) -> None:
    """Explain an image, or many, with or without a server.

    Prints predictions and costs, writes one picture for each method and target.

    Of a FOLDER with its subfolders, or of a LIST of paths, one in each line, it writes the pictures and a table of all,
    explanations.csv. A run that was stopped is continued by the same command. Images that fail do not stop it; they are
    named in the table and at the end, and the exit status is then 2.
    """
    specs = [parse_method_text(text) for text in methods or ("grad_cam",)]
    wanted = [read_target(text) for text in targets]
    watch, at_once = out if options.pop("watch") else None, options.pop("at_once")
    record: Path | None = options.pop("evidence")
    options |= {} if record is None else {"evidence": True}
    with needs_extra("worker" if options["local"] else "cli"):
        from rich.console import Console

        from camserve.cli.bulk import is_many

        if is_many(image):
            if watch is not None:
                raise InvalidOption("--watch shows one image, and does not go with many")
            _explain_many(image, specs, wanted, targets, out, record, at_once, Console(stderr=True), **options)
            return
        answer, seconds = _timed_explanation(image, specs, wanted, Console(stderr=True), watch, **options)
        _show(Console(), image, specs, answer, seconds)
        for path in write_pictures(answer.maps, image.stem, out):
            click.echo(path)
        if record is not None:
            record.write_text(f"{answer.evidence}\n", encoding="utf-8")
            click.echo(record)


def _explain_many(
    source: Path,
    methods: list[MethodSpec],
    targets: list[AnyTarget],
    texts: tuple[str, ...],
    out: Path,
    record: Path | None,
    at_once: int,
    console: Console,
    **options: Any,
) -> None:
    from functools import partial

    from camserve.cli.bulk import TABLE, explain_many
    from camserve.many import answers

    asked = ("model", "layers", "fusion", "size", "signed", "precision", "boxes", "evaluate", "text", "local")
    settings = {name: options[name] for name in asked}
    settings |= {"methods": [method_text(method) for method in methods], "targets": list(texts)}
    settings |= {"evidence": None if record is None else str(record)}
    local = options["local"]
    with _explainer(many=not local, **options) as ask:
        if local:
            ask_many = partial(answers, ask=lambda content: ask(content, methods, targets), at_once=1)
        else:
            ask_many = partial(ask, methods=methods, targets=targets, at_once=at_once)
        explain_many(source, out, settings, ask_many, write_pictures, record, console)
        click.echo(out / TABLE)


def read_target(text: str) -> AnyTarget:
    """Returns the target of an argument; the command line alone reads the file of a vector, a reference or a mask.

    Raises:
        InvalidOption: there is no such target, or the file of a vector is none.
        InvalidImage: the file of a reference or a mask cannot be read.
    """
    kind, _, path = text.partition(":")
    if kind == "region":
        return _read_region(path)
    if not path or kind not in ("vector", "reference"):
        return parse_target(text)
    from camserve.images import read_image

    if kind == "reference":
        return Vector(image=read_image(path))
    import numpy as np

    try:
        return Vector(np.load(path, allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise InvalidOption(f"cannot read a vector from {path}: {error}") from None


def _read_region(rest: str) -> AnyTarget:
    """Returns the target of `x0,y0,x1,y1:CLASS`, or of `FILE:CLASS` with the mask of a file."""
    where, _, of = rest.partition(":")
    if not Path(where).suffix or where.count(",") == 3:
        return parse_target(f"region:{rest}")
    from camserve.images import mask_file

    inside = parse_target(of) if of.strip() else Target(top_k=1)
    return Region(cast("OfClasses", inside), mask=mask_file(where))  # which refuses others


def _timed_explanation(
    image: Path,
    methods: list[MethodSpec],
    targets: list[AnyTarget],
    console: Console,
    watch: Path | None,
    **options: Any,
) -> tuple[Explanation, float]:
    import time

    from camserve.cli.terminal import query_bar

    with _explainer(stream=watch is not None, **options) as ask:
        start = time.perf_counter()
        if watch is not None:
            answer = _watched(ask(image, methods, targets), image, console, watch)
        else:
            with query_bar(console, image.name) as on_progress:
                answer = ask(image, methods, targets, on_progress=on_progress)
        return answer, time.perf_counter() - start


@contextmanager
def _explainer(
    *,
    local: bool,
    stream: bool = False,
    many: bool = False,
    store: Path | None,
    connection: Connection,
    timeout_s: float | None,
    model: str,
    layers: tuple[str, ...],
    boxes: bool,
    priority: str | None,
    allow_partial: bool,
    **options: Any,
) -> Iterator[Callable[..., Any]]:
    """Yields the engine's `explain`, or a client's `explain`, `stream` or `explain_many`, with options filled in."""
    from functools import partial

    options |= {"boxes": BoxOptions() if boxes else None, "layer": layers}
    if local:
        if stream or priority or allow_partial:
            raise InvalidOption("--watch, --priority and --allow-partial need a server: they do not go with --local")
        from camserve.engine import Engine

        yield partial(Engine.load(model or "lite0", store).explain, **options)
    else:
        options |= {"priority": priority or ("batch" if many else "normal"), "allow_partial": allow_partial}
        with connection.client(timeout_s) as client:
            call = client.explain_many if many else client.stream if stream else client.explain
            yield partial(call, model=model, **options)


def _watched(updates: Iterable[Progress | Explanation], image: Path, console: Console, out: Path) -> Explanation:
    """Shows what comes in, writes the maps as far as they are known, and returns the final answer."""
    from camserve.cli.terminal import live_view

    with live_view(console, image.name) as show:
        for update in updates:
            if isinstance(update, Explanation):
                return update
            show(update.predictions, update.done, update.total)
            write_pictures(update.maps, image.stem, out)
    raise Internal("the stream ended without a reply")


def _show(console: Console, image: Path, methods: list[MethodSpec], answer: Explanation, seconds: float) -> None:
    from camserve.cli.terminal import costs_table, predictions_table

    console.print(predictions_table(f"{image.name} ({answer.model} {answer.version})", answer.predictions))
    console.print(costs_table([(", ".join(map(method_text, methods)), seconds, answer.cost)]))
    for saliency in answer.maps:
        for note in _notes(saliency):
            click.echo(f"{method_text(saliency.method)}, {saliency.target_text or saliency.target.label}: {note}")


def _notes(saliency: SaliencyMap) -> Iterator[str]:
    if saliency.degenerate:
        yield "no positive evidence, the map is empty"
    if (apart := saliency.estimated_difference) is not None:
        yield f"of {saliency.fraction:.0%} of the queries; all of them would change it by {apart:.3f} at most"
    if (found := saliency.faithfulness) is not None:
        yield f"insertion {found.insertion_auc:.3f}, deletion {found.deletion_auc:.3f}, overall {found.overall:.3f}"
    for box in saliency.boxes:
        yield f"x {box.left:.0f}..{box.right:.0f}, y {box.top:.0f}..{box.bottom:.0f}, score {box.score:.2f}"


def write_pictures(maps: Iterable[SaliencyMap], stem: str, folder: Path) -> list[Path]:
    """Writes `<stem>-<method>-<label>.png` for each map, and returns the paths.

    The name gets -2, -3, ... where a method comes several times.
    """
    from camserve.finalise.render import file_stem

    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for saliency in maps:
        name = file_stem(stem, saliency)
        candidates = (folder / f"{name}{suffix}.png" for suffix in ("", *(f"-{i}" for i in range(2, 10_000))))
        paths.append(next(path for path in candidates if path not in paths))
        _picture(saliency).save(paths[-1])
    return paths


def _picture(saliency: SaliencyMap) -> Image.Image:
    """Returns the overlay, or the map in grey where it lies on nothing."""
    if saliency.image is not None:
        return saliency.overlay()
    from PIL import Image

    from camserve.finalise.render import grey_levels

    return Image.fromarray(grey_levels(saliency.array))


@camserve.command()
@click.option("--model", help="Of the model store.  [default: lite0, or the benchmark's own]")
@click.option("--images", type=click.Path(path_type=Path), help="Folder of JPEG, PNG or WebP images.")
@click.option("--boxes", type=click.Path(path_type=Path), help="COCO JSON, Pascal VOC XML, or a folder of XML files.")
@click.option("--benchmark", type=click.Choice(["digits"]), help="Scenes, boxes and a model that are shipped.")
@click.option(
    "--methods",
    multiple=True,
    metavar="NAME[:KEY=VALUE,...]",
    help="One or several, separated by spaces; may be repeated.  [default: all]",
)
@click.option(
    "--protocol",
    "protocols",
    type=click.Choice(["rise", "group_cam", "group_cam_paper"]),
    multiple=True,
    default=["rise", "group_cam_paper"],
    show_default=True,
    help="Of deletion and insertion; may be repeated.",
)
@click.option("--layer", default="", help="Name of the layer.  [default: the model's]")
@click.option("--precision", type=click.Choice(["exact", "bfloat16"]), default="exact", show_default=True)
@click.option("--limit", type=click.IntRange(1), help="Images at most.  [default: all; 30 scenes of a benchmark]")
@click.option("--sanity-images", type=click.IntRange(0), default=1, show_default=True, help="For the sanity check.")
@click.option("--out", type=click.Path(path_type=Path), default="report", show_default=True, help="For the report.")
@click.option("--store", type=click.Path(path_type=Path), help=STORE_HELP)
def evaluate(methods: tuple[str, ...], **options: Any) -> None:
    """Measure how far the maps of a model can be trusted.

    Explains the images of a folder, or of a benchmark, and writes report.json, report.csv, report.md, curves and a
    contact sheet. A run that was stopped is continued by the same command.
    """
    specs = [parse_method_text(text) for some in methods for text in some.split()]
    with needs_extra("evaluation"):
        from rich.console import Console

        from camserve.evaluation.command import run as run_evaluation

        for path in run_evaluation(methods=specs, console=Console(stderr=True), **options):
            click.echo(path)


@camserve.command()
@click.argument("images", type=click.Path(path_type=Path), metavar="IMAGES_DIR")
@click.option("--model", default="lite0", show_default=True, help="Of the model store.")
@click.option("--groups", type=int, default=32, show_default=True, help="Of channels.")
@click.option(
    "--denoise",
    type=float,
    default=0,
    show_default=True,
    metavar="PERCENTILE",
    help="Of each group's map, at or below which it is set to 0; 0: not at all.",
)
@click.option(
    "--theta",
    default="mean",
    show_default=True,
    metavar="mean|PERCENTILE",
    help="Of the map: where it is above, the image stays sharp.",
)
@click.option(
    "--classes",
    type=click.Choice(["predicted", "folder"]),
    default="predicted",
    show_default=True,
    help="Whose maps: the most probable class, or the label that the image's folder is named after.",
)
@click.option("--layer", default="", help="Name of the layer.  [default: the model's]")
@click.option("--precision", type=click.Choice(["exact", "bfloat16"]), default="exact", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default="augmented", show_default=True, help="For variants.")
@click.option("--store", type=click.Path(path_type=Path), help=STORE_HELP)
def augment(images: Path, groups: int, denoise: float, theta: str, out: Path, **options: Any) -> None:
    """Write Group-CAM variants of images, for fine-tuning.

    Each image of IMAGES_DIR and its subfolders stays sharp where its gradient-free Group-CAM map is high, and is
    blurred elsewhere. A run that was stopped is continued by the same command. Broken images do not stop it; they are
    named at the end, and the exit status is then 2.
    """
    with needs_extra("evaluation"):
        from rich.console import Console

        from camserve.evaluation.augment import Recipe
        from camserve.evaluation.command import run_augment
        from camserve.evaluation.variants import check

        recipe = Recipe(groups, denoise, parse_theta(theta))
        outcome = run_augment(images, recipe=recipe, out=out, console=Console(stderr=True), **options)
        for name in outcome.empty:
            click.echo(f"{name}: no positive evidence, no variant")
        click.echo(f"{len(outcome.written)} variants written to {out}, {len(outcome.there)} were there")
        check(outcome)


def parse_theta(text: str) -> float | None:
    """Returns the percentile in a text; None for `mean`.

    Raises:
        InvalidOption: the text is neither `mean` nor a number.
    """
    if text == "mean":
        return None
    try:
        return float(text)
    except ValueError:
        raise InvalidOption(f"--theta must be `mean` or a percentile, got {text!r}") from None


class _ManyNumbers(click.Command):
    """A command whose options `--mean` and `--std` take all numbers that follow them, as `0.5` or as `0.5 0.5 0.5`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        joined: list[str] = []
        for arg in args:
            after = joined[-2:-1] in (["--mean"], ["--std"]) and _is_number(joined[-1].split()[-1])
            if after and _is_number(arg):
                joined[-1] += f" {arg}"
            else:
                joined.append(arg)
        return super().parse_args(ctx, joined)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@camserve.command(cls=_ManyNumbers)
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--store", type=click.Path(path_type=Path), help=STORE_HELP)
@click.option("--name", help="Of the served model; for one SOURCE only.  [default: that of the source]")
@click.option("--version", default="1.0", show_default=True, help="Of the served model.")
@click.option("--weights", help="DEFAULT, a name of torchvision's weights, or a file (safetensors or a state dict).")
@click.option("--labels", type=click.Path(path_type=Path), help="File of class names.")
@click.option(
    "--outputs",
    type=click.Choice(OUTPUTS),
    help="What the network's numbers are.  [default: probabilities where they sum to 1, else softmax]",
)
@click.option("--output", metavar="NAME|INDEX", help="Which of the tensors that the network returns is explained.")
@click.option("--units", metavar="UNIT,...", help="Of the numbers of --outputs value; one is that of all.")
@click.option(
    "--detections",
    type=click.Choice(DECODINGS),
    help="What those of --outputs boxes are made of, where the network leaves that to others: logits and boxes of DETR "
    "(softmax) or of its kind with sigmoids, the tensor of YOLOv8 and newer, or that of YOLOv5.",
)
@click.option(
    "--references",
    type=click.Path(path_type=Path),
    metavar="DIRECTORY|FILE",
    help="For --outputs embedding: pictures named after what they show, or in directories named so; or an .npz of "
    "vectors by name, or an .npy of them with --labels.",
)
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="For --outputs text-image: texts that images are compared to, one in each line, or JSON from names to one or "
    "several.",
)
@click.option(
    "--layer",
    help="Explained by default; the tensor that an ONNX graph is cut at.  [default: the last spatial feature layer]",
)
@click.option("--licence", help="Of the weights.  [default: what is known of them]")
@click.option(
    "--evaluation",
    type=click.Path(path_type=Path),
    help="report.json of `camserve evaluate` on this model: a server's auto method goes by it.",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="Folder of up to 16 images, on which workers find out whether bfloat16 leaves maps as they are.",
)
@click.option(
    "--resize",
    metavar="PX|HxW",
    help="Shorter side of the image before the crop; or height x width that every image is stretched to.",
)
@click.option("--crop", metavar="PX|HxW", help="Side, or height x width, of the centre crop, the network's input.")
@click.option("--mean", metavar="R G B", help="Subtracted from pixels in 0..1; one number for each channel.")
@click.option("--std", metavar="R G B", help="What they are then divided by, likewise.")
@click.option("--interpolation", type=click.Choice(["nearest", "bilinear", "bicubic"]), default="bicubic")
def archive(
    sources: tuple[str, ...],
    store: Path | None,
    name: str | None,
    resize: str | None,
    crop: str | None,
    mean: str | None,
    std: str | None,
    interpolation: Any,
    units: str | None,
    **options: Any,
) -> None:
    """Pack models for serving.

    SOURCE is `efficientnet-lite0`, `torchvision:NAME`, `timm:NAME`, `hf:DIRECTORY` for a network that Hugging Face's
    save_pretrained wrote (image classifier, detector, semantic segmentation, CLIP and its like), `onnx:FILE` for an
    ONNX graph from one batch of images to scores or detections, `export:FILE` for a program that torch.export.save
    wrote, or `package.module:function` for a function of your own, called without arguments, that returns the module;
    its package must be importable also where it is served.

    An ONNX graph has no gradients. It has the methods that need activations, such as Score-CAM, at a tensor that
    --layer names; without, those that mask pictures, such as RISE.

    --resize, --crop, --mean and --std come together; without them the preprocessing is that of the weights. With one
    number for --mean and --std the network takes grey images, with three RGB, with any other number float32 tensors.

    --outputs says what the numbers are: softmax (logits of classes of which one is true), sigmoid (of which several may
    be), binary (one logit of yes or no), probabilities, value (any numbers), embedding (a vector) or text-image (a
    vector, beside a text encoder). A network of one output must say it.

    --references are packed as vectors, those of pictures made by the network: predictions are then the nearest ones,
    and each is a target by its name. So are --prompts, vectors of which its text encoder makes.
    """
    if name is not None and len(sources) > 1:
        raise InvalidOption(f"--name is for one source, got {len(sources)}")
    options["preprocessing"] = _preprocessing(resize, crop, mean, std, interpolation)
    options["units"] = tuple(unit.strip() for unit in units.split(",")) if units else ()
    with needs_extra("worker"):
        from camserve.archive import build_archive, model_store

        for source in sources:
            click.echo(build_archive(source, name=name, store=model_store(store), **options))


def _preprocessing(
    resize: str | None,
    crop: str | None,
    mean: str | None,
    std: str | None,
    interpolation: Any,
) -> Preprocessing | None:
    if resize is None and crop is None and mean is None and std is None:
        return None
    if resize is None or crop is None or mean is None or std is None:
        raise InvalidOption("--resize, --crop, --mean and --std come together")
    side, wide = _sides("--crop", crop)
    shorter, stretched = _sides("--resize", resize)
    goal = (shorter, stretched) if stretched else shorter
    return Preprocessing(goal, (side, wide or side), _numbers("--mean", mean), _numbers("--std", std), interpolation)


def _sides(option: str, text: str) -> tuple[int, int | None]:
    """Returns a side, or height and width."""
    sides = re.fullmatch(r"([1-9]\d{0,6})(?:x([1-9]\d{0,6}))?", text, re.ASCII)
    if not sides:
        raise InvalidOption(f"{option} must be pixels, as 224, or height x width, as 128x64; got {shown(text)}")
    return int(sides[1]), int(sides[2]) if sides[2] else None


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.replace(",", " ").split())
    except ValueError:
        raise InvalidOption(f"{option} must be numbers, one for each channel, got {shown(text)}") from None


@camserve.command()
@click.argument("model", required=False)
@connection_options
@click.option("--store", type=click.Path(path_type=Path), help="List the archives of this directory instead.")
def models(model: str | None, connection: Connection, store: Path | None) -> None:
    """List the models of a server, or those of a model store; of one MODEL, what it gives and what it can explain."""
    with needs_extra("cli"):
        from rich.console import Console
        from rich.table import Table

        if model is not None:
            for line in _described(model, connection, store):
                click.echo(line)
            return
        header, rows = _served(connection) if store is None else _stored(store)
        table = Table(*header)
        for row in rows:
            table.add_row(*row)
        Console().print(table)


def _described(name: str, connection: Connection, store: Path | None) -> Iterator[str]:
    """Yields lines about a model of a server or of a store: outputs, targets with an example each, layers, runtime."""
    if store is None:
        with connection.client(10) as client:
            found: ModelInfo = client.model(name)
    else:
        found = _info(name, store)
    from camserve.types.offered import offered
    from camserve.types.target_forms import target_forms

    yield f"model {found.name} {found.version}"
    names = ", ".join(shown_label(found, index) for index in range(min(len(found.labels), 10)))
    held = "prompts" if found.outputs == "text-image" else "references"
    what = f" of {found.dimension} numbers, {len(found.labels) or 'no'} {held}" if found.dimension else ""
    more = ", ..." if len(found.labels) > 10 else ""
    yield f"outputs {found.outputs}{what}" + (f": {names}{more}" if names else "")
    for form in target_forms(found):
        yield f"  --target '{form.example}'".ljust(40) + f"  {form.description}"
    if found.text is not None:
        needed = "needed" if found.text.required else "may be left out"
        yield f"  --text '{found.text.example}'".ljust(40) + f"  The {found.text.what} beside the image; {needed}."
    if found.layers:
        yield f"layers: {', '.join(layer.name for layer in found.layers)}; default {found.default_layer}"
    for asset, reason in found.lacks.items():
        yield f"no {asset}: {reason}"
    if found.lacks:
        yield f"methods: {', '.join(offered(found))}"
    if store is None and (runtime := found.runtime).name:
        reason = f" ({runtime.reason})" if runtime.reason else ""
        yield f"runtime {runtime.name}, {runtime.micro_batch} queries a pass; auto is {runtime.precision}{reason}"


def shown_label(model: ModelInfo, index: int) -> str:
    """Returns the label of a class, of a number with its unit in brackets."""
    unit = model.units[index] if index < len(model.units) else ""
    return f"{model.labels[index]} ({unit})" if unit else model.labels[index]


def _served(connection: Connection) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    with connection.client(10) as client:
        served = client.models()
    return ("model", "version", "ready"), [
        (model.name, model.version, model.failure or _yes(model.ready)) for model in served
    ]


def _stored(store: Path) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    from camserve.archive import archives, listed_models, read_card

    rows: list[tuple[str, ...]] = []
    for name in archives(store):
        try:
            card = read_card(store / f"{name}.mar")
            rows.append((name, card.version, card.architecture, "packed"))
        except CamserveError as error:  # one broken file does not hide the others
            rows.append((name, "", "", f"unusable: {error}"))
    for name, listed in listed_models(store).items():
        if name not in archives(store):
            rows.append((name, listed.version, listed.source, "packed on first use"))
    return ("model", "version", "source", "archive"), rows


def _yes(value: bool) -> str:
    return "yes" if value else "no"


@camserve.command()
@click.option("--json", "as_json", is_flag=True, help="Everything that is known of them, for programs.")
@click.option("--model", help="With --json: the cost of each method at this model's default layer.")
@click.option("--store", type=click.Path(path_type=Path), help=STORE_HELP)
def methods(as_json: bool, model: str | None, store: Path | None) -> None:
    """List the methods with their parameters."""
    if as_json:
        import json

        info = None if model is None else _info(model, store)
        click.echo(json.dumps([describe_method(name, info) for name in METHODS], indent=2))
        return
    for name, spec in METHODS.items():
        click.echo(f"{name}: {spec.title}. {spec.paper}")
        for parameter in spec.parameters():
            click.echo(f"    {parameter.name}={parameter.default}  {parameter.description}")


def _info(model: str, store: Path | None) -> ModelInfo:
    """Returns the description of a model of a store."""
    with needs_extra("worker"):
        from camserve.engine import Engine

        return Engine.load(model, store).info


def describe_method(name: str, model: ModelInfo | None = None) -> dict[str, Any]:
    """Describes a method for JSON: name, title, paper, needs, cost, refused, variants (the default first), parameters.

    The cost is for one target with default parameters at the model's default layer: images that go through the network
    beyond the first forward pass, at most; null where no model is named or the defaults do not fit. `refused` says why
    the model has not the method; it is empty where it works, given what it needs.

    Each parameter has name, type, default, minimum, maximum, choices and description; a bound that is null does not
    exist, or depends on the layer.
    """
    from dataclasses import asdict

    from camserve.types.offered import why_not

    spec = METHODS[name]
    parameters = [asdict(parameter) for parameter in spec.parameters()]
    variants = next((parameter["choices"] for parameter in parameters if parameter["name"] == "variant"), ())
    return {
        "name": name,
        "title": spec.title,
        "paper": spec.paper,
        "needs": spec.needs,
        "cost": None if model is None else spec.default_passes(model.layer(""), model.has_zero),
        "refused": "" if model is None else why_not(spec, model),
        "variants": variants,
        "parameters": parameters,
    }

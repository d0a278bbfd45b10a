"""Runs the demo: serves the default model, explains two photos through the Python client, writes pictures, and stops;
or leaves the page running until Ctrl-C.

Each method has a request of its own, so that the printed times are those of the method; a Score-CAM answers every class
of a photo from the same masked queries.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image
from rich.console import Console

from camserve.archive import ensure_archive, model_store
from camserve.cli.terminal import costs_table, duration, predictions_table, query_bar
from camserve.client import AsyncClient
from camserve.finalise.render import Row, file_stem, overlay, sheet
from camserve.gateway.ops.settings import Settings
from camserve.gateway.ops.shutdown import before, caught_signals
from camserve.gateway.pool.discovery import torchserves
from camserve.gateway.server import Gateway
from camserve.images import seen_part
from camserve.methods import METHODS
from camserve.supervisor import TorchServe, WorkerSettings
from camserve.types import Explanation, SaliencyMap, Target

MODEL = "lite0"
METHOD_NAMES = ("grad_cam", "group_cam", "score_cam")

_PHOTOS = {"chelsea": 2, "coffee": 1}
"""Photos of scikit-image, with the number of their most probable classes that are explained."""

_ANY_PORT = "127.0.0.1:0"
READY_S = 120.0
_PICTURE_PX = 448


@dataclass(frozen=True)
class Explained:
    """Holds a photo with the answers to its requests, one for each method."""

    path: Path
    answers: tuple[Explanation, ...]
    seconds: tuple[float, ...]
    """Seconds that each request took for the client."""


def run_demo(out: Path, store: Path | None = None, console: Console | None = None, web: bool = False) -> None:
    """Runs the demo and leaves its pictures in a folder.

    Args:
        out: folder for the photos, one overlay for each method and class, and `sheet.png`; made when missing.
        store: directory of model archives, as `camserve.archive.model_store` takes it.
        console: where tables go; None: standard output.
        web: whether the page is served too, until Ctrl-C or SIGTERM; then it must be called in the main thread.

    Raises:
        CamserveError: what failed; TorchServe's last lines are printed before, if it ran.
    """
    demo = _until_stopped if web else _demo
    asyncio.run(demo(out, model_store(store), console or Console()))


async def _until_stopped(out: Path, store: Path, console: Console) -> None:
    with caught_signals() as signals:
        await before(signals.stop, _demo(out, store, console, web=True))


async def _demo(out: Path, store: Path, console: Console, web: bool = False) -> None:
    start = time.perf_counter()
    photos = _save_photos(out)
    async with served(store, console, web) as (client, page):
        explained = [await _explain(client, path, classes, console) for path, classes in photos.items()]
        paths = _write_pictures(explained, out)
        console.print(f"\ndone in {duration(time.perf_counter() - start)}; the pictures:")
        for path in paths:
            console.print(str(path), markup=False, highlight=False, soft_wrap=True)
        if page:
            console.print(f"\nthe page: {page}\ndrop a photo on it; Ctrl-C ends it", highlight=False, soft_wrap=True)
            await asyncio.Event().wait()


def _save_photos(out: Path) -> dict[Path, int]:
    """Saves the photos, and returns their paths with the number of classes of each."""
    from skimage import data

    out.mkdir(parents=True, exist_ok=True)
    photos = {out / f"{name}.png": classes for name, classes in _PHOTOS.items()}
    for path in photos:
        Image.fromarray(getattr(data, path.stem)()).save(path)
    return photos


@asynccontextmanager
async def served(store: Path, console: Console, web: bool) -> AsyncIterator[tuple[AsyncClient, str]]:
    """Yields a client of a gateway with TorchServe behind it, on free loopback ports, and the page's address.

    The address is empty where no page is wanted. All is stopped in the end.
    """
    with console.status(f"building {store / MODEL}.mar if it is missing"):
        await asyncio.to_thread(ensure_archive, MODEL, store)
    torchserve = TorchServe(WorkerSettings.load(store=store, models=(MODEL,)).on_free_ports())
    with console.status("starting TorchServe"):
        await torchserve.start()
    try:
        settings = Settings.load(listen=_ANY_PORT, metrics_listen=_ANY_PORT, web_listen=_ANY_PORT if web else "off")
        backends = torchserves([torchserve.backend])
        async with Gateway(settings, backends) as gateway, AsyncClient(gateway.address) as client:
            with console.status("waiting until a model answers through the gateway"):
                await gateway.wait_ready(READY_S)
            console.print(f"serving {MODEL} on {gateway.address}, TorchServe behind it on {torchserve.grpc_address}")
            yield client, f"http://{gateway.web_address}/" if web else ""
    except Exception:
        console.print(f"the last lines of TorchServe's log:\n{torchserve.log_tail}", markup=False, highlight=False)
        raise
    finally:
        await torchserve.stop()


async def _explain(client: AsyncClient, path: Path, classes: int, console: Console) -> Explained:
    answers, seconds = [], []
    for method in METHOD_NAMES:
        start = time.perf_counter()
        with query_bar(console, f"{path.name}: {METHODS[method].title}") as on_progress:
            answers.append(await client.explain(path, [method], [Target(top_k=classes)], on_progress=on_progress))
        seconds.append(time.perf_counter() - start)
    explained = Explained(path, tuple(answers), tuple(seconds))
    _print_tables(explained, console)
    return explained


def _print_tables(explained: Explained, console: Console) -> None:
    console.print()
    console.print(predictions_table(explained.path.name, explained.answers[0].predictions))
    titles = [METHODS[method].title for method in METHOD_NAMES]
    costs = [answer.cost for answer in explained.answers]
    console.print(costs_table(zip(titles, explained.seconds, costs, strict=True)))


def _write_pictures(explained: Sequence[Explained], out: Path) -> list[Path]:
    """Writes one overlay for each method and class, and the sheet; returns the paths, that of the sheet last."""
    paths, rows = [], []
    for photo in explained:
        seen = _seen(photo)
        for maps in zip(*(answer.maps for answer in photo.answers), strict=True):
            overlays = [overlay(seen, saliency.array) for saliency in maps]
            rows.append(Row(_caption(photo.path, maps[0]), (seen, *overlays)))
            for saliency, picture in zip(maps, overlays, strict=True):
                paths.append(out / f"{file_stem(photo.path.stem, saliency)}.png")
                picture.save(paths[-1])
    paths.append(out / "sheet.png")
    sheet(["Photo", *(METHODS[method].title for method in METHOD_NAMES)], rows).save(paths[-1])
    return paths


def _seen(photo: Explained) -> Image.Image:
    """Returns what the network saw of a photo, at a resolution for people."""
    view = replace(photo.answers[0].input, size=(_PICTURE_PX, _PICTURE_PX))
    with Image.open(photo.path) as image:
        return seen_part(image, view)


def _caption(path: Path, saliency: SaliencyMap) -> str:
    return f"{path.stem}: {saliency.target.label}, {saliency.target.probability or 0:.0%}"

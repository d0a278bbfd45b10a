"""Takes the pictures of the page in docs/images: serves three models by TorchServe, and looks at them in Chromium.

    python docs/screenshots.py

Needs the extra `dev` and chromium on the PATH. What a picture shows stands in its address, as it is sent to somebody.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from camserve.archive import ensure_archive, model_store
from camserve.gateway.ops.settings import Settings
from camserve.gateway.pool.discovery import torchserves
from camserve.gateway.server import Gateway
from camserve.supervisor import TorchServe, WorkerSettings

IMAGES = Path(__file__).parent / "images"
MOST_BYTES = 300_000
"""Largest file: pictures are loaded by everybody who reads."""

_ANY_PORT = "127.0.0.1:0"
_READY_S = 300.0
_DONE = re.compile("^Done in")


@dataclass(frozen=True)
class Picture:
    """Says what a picture of the page shows."""

    name: str
    photo: str
    """Name of a photo of `_photos`."""
    address: str
    width_px: int
    height_px: int
    dark: bool = False


_THREE = "methods=grad_cam&methods=group_cam&methods=score_cam&evaluate=1"
_RATHER = "question=contrast&target=285&than=281&signed=1"
_REGION = "target=3&box=4,40,62,96&methods=grad_cam&methods=hires_cam&methods=group_cam&colormap=inferno"
_FOUND = "question=detection&methods=occlusion&boxes=1"

PICTURES = (
    Picture("page", "chelsea", f"model=lite0&{_THREE}", 1400, 900),
    Picture("page-phone", "chelsea", f"model=lite0&{_RATHER}", 400, 1500, dark=True),
    Picture("page-box", "scene", f"model=digits-segmentation&{_REGION}", 1400, 800, dark=True),
    Picture("page-detections", "scene", f"model=digits-boxes&{_FOUND}", 1400, 800),
)


@asynccontextmanager
async def _served() -> AsyncIterator[str]:
    """Yields the address of the page of all the pictures' models."""
    store = model_store(None)
    models = tuple(sorted({re.search("model=([^&]+)", picture.address)[1] for picture in PICTURES}))  # type: ignore[index]
    for model in models:
        ensure_archive(model, store)
    torchserve = TorchServe(WorkerSettings.load(store=store, models=models).on_free_ports())
    await torchserve.start()
    try:
        settings = Settings.load(listen=_ANY_PORT, metrics_listen="off", web_listen=_ANY_PORT)
        async with Gateway(settings, torchserves([torchserve.backend])) as gateway:
            await gateway.wait_ready(_READY_S)
            yield f"http://{gateway.web_address}/"
    finally:
        await torchserve.stop()


def _photos(folder: Path) -> dict[str, Path]:
    """Returns the files of the photos by their names."""
    from skimage import data

    from camserve.evaluation.digits.scenes import make_scene

    pictures = {"chelsea": data.chelsea(), "scene": make_scene(2, 3, 3, "test").pixels}
    paths = {name: folder / f"{name}.png" for name in pictures}
    for name, path in paths.items():
        Image.fromarray(pictures[name]).save(path)
    return paths


async def _take(browser: Any, url: str, picture: Picture, photo: Path) -> None:
    from playwright.async_api import expect

    size = {"width": picture.width_px, "height": picture.height_px}
    page = await browser.new_page(viewport=size, color_scheme="dark" if picture.dark else "light")
    page.set_default_timeout(120_000)
    await page.goto(f"{url}#{picture.address}")
    await expect(page.locator("#methods input").first).to_be_attached(timeout=60_000)
    await page.set_input_files("#file", photo)
    await expect(page.locator("#status")).to_have_text(_DONE, timeout=120_000)
    shot = Path(photo.parent) / f"{picture.name}.png"
    await page.screenshot(path=shot)
    await page.close()
    out = IMAGES / f"{picture.name}.jpg"
    with Image.open(shot) as image:
        image.convert("RGB").save(out, quality=85, optimize=True)
    assert out.stat().st_size <= MOST_BYTES, (
        f"{out} has {out.stat().st_size} bytes, and at most {MOST_BYTES} are wanted"
    )


async def _main() -> None:
    from playwright.async_api import async_playwright

    with tempfile.TemporaryDirectory() as folder:
        photos = _photos(Path(folder))
        async with _served() as url, async_playwright() as playwright:
            browser = await playwright.chromium.launch(
                executable_path=shutil.which("chromium"),
                args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
            )
            for picture in PICTURES:
                await _take(browser, url, picture, photos[picture.photo])
            await browser.close()


if __name__ == "__main__":
    asyncio.run(_main())

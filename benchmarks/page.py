"""Measures how long after a photo is dropped on the page its first prediction is on the screen.

    python benchmarks/page.py            # on a machine that does nothing else: camserve with TorchServe, and Chromium

A real `drop` event carries the photo, and the clock stops at the frame that shows the predictions. The model's own
time, the first pass on the worker as the answer tells it, is taken off: what is left is decoding, the way there and
back, and drawing. Needs playwright (extra `dev`) and chromium on the PATH.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import ROOT, environment, write
from PIL import Image, ImageEnhance

OUT = ROOT / "benchmarks" / "results" / "page-cpu.json"
SIZES = {"a photo of 600 x 400": (600, 400), "a photo of 4000 x 3000": (4000, 3000)}
"""(width, height) of the photos; the larger one is what a phone takes."""
PAUSE_S = 0.5
"""Seconds between two drops, in which everything comes to rest."""

DROP = """
async ([encoded, name]) => {
  const bytes = Uint8Array.from(atob(encoded), (character) => character.charCodeAt(0));
  const dropped = new DataTransfer();
  dropped.items.add(new File([bytes], name, { type: "image/jpeg" }));
  const list = document.getElementById("predictions");
  const seen = new Promise((resolve) => {
    new MutationObserver((_, observer) => {
      if (!list.children.length) return;
      observer.disconnect();
      requestAnimationFrame(() => setTimeout(() => resolve(performance.now())));  // behind the frame that shows it
    }).observe(list, { childList: true });
  });
  const began = performance.now();
  document.dispatchEvent(new DragEvent("drop", { dataTransfer: dropped, bubbles: true }));
  return ((await seen) - began) / 1000;
}
"""


LISTEN = """
window.answers = [];
const fetched = window.fetch;
window.fetch = async (...asked) => {
  const response = await fetched(...asked);
  if (String(asked[0]).endsWith("explain:stream")) response.clone().text().then((text) => window.answers.push(text));
  return response;
};
"""
"""Keeps what the server answers beside the page's own reading of it."""


def photos(size: tuple[int, int], count: int) -> list[bytes]:
    """Returns JPEG files of one photo in different brightness: no worker, and no cache, has seen any of them."""
    from skimage import data

    image = Image.fromarray(data.coffee()).resize(size)
    return [_jpeg(ImageEnhance.Brightness(image).enhance(0.8 + 0.4 * number / count)) for number in range(count)]


def _jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


async def measured(url: str, files: Sequence[bytes]) -> tuple[list[dict[str, float]], str]:
    """Returns the seconds of each drop, `until_seen` and of these the `model`'s own, and the browser's version.

    The first drop is not counted: it compiles the page's code, and warms the worker.
    """
    from playwright.async_api import async_playwright

    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        try:
            page = await browser.new_page()
            await page.add_init_script(LISTEN)
            await page.goto(url)
            await page.locator("#methods input").first.wait_for(state="attached")
            rows = [await _dropped(page, file) for file in files]
            return rows[1:], browser.version
        finally:
            await browser.close()


async def _dropped(page: Any, file: bytes) -> dict[str, float]:
    await asyncio.sleep(PAUSE_S)
    until_seen = await page.evaluate(DROP, [base64.b64encode(file).decode(), "photo.jpg"])
    text = await (await page.wait_for_function("() => window.answers.shift()")).json_value()
    reply = json.loads(text.strip().rpartition("event: reply\ndata: ")[2])
    return {"until_seen": until_seen, "model": reply["cost"]["stageSeconds"]["forward"]}


def summary(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Returns median and longest seconds until a prediction was seen, the model's, and what is beyond the model's."""
    beyond = [row["until_seen"] - row["model"] for row in rows]
    seen = [row["until_seen"] for row in rows]
    return {
        "drops": len(rows),
        "until_seen_median_s": statistics.median(seen),
        "until_seen_max_s": max(seen),
        "model_median_s": statistics.median(row["model"] for row in rows),
        "beyond_model_median_s": statistics.median(beyond),
        "beyond_model_max_s": max(beyond),
    }


async def _run(drops: int) -> dict[str, Any]:
    from rich.console import Console

    from camserve.archive import model_store
    from camserve.cli.demo import MODEL, served

    results, browser = {}, ""
    async with served(model_store(None), Console(stderr=True), web=True) as (_, url):
        for name, size in SIZES.items():
            rows, browser = await measured(url, photos(size, drops + 1))
            results[name] = summary(rows)
    return {"environment": environment(torch.device("cpu")), "browser": browser, "model": MODEL, "results": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drops", type=int, default=15, help="counted drops of each photo")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    found = asyncio.run(_run(options.drops))
    write(options.out, found)
    for name, row in found["results"].items():
        median_s, most_s = row["beyond_model_median_s"], row["beyond_model_max_s"]
        print(f"{name}: {median_s:.3f} s beyond the model's own time, at most {most_s:.3f} s")


if __name__ == "__main__":
    main()

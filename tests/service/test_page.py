"""The page in a real Chromium, over the shipped fake: a photo becomes maps, and nothing is loaded from elsewhere."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from contextlib import asynccontextmanager
from urllib.parse import urlparse

import numpy as np
import pytest
from gateway_harness import photo, serving

from camserve.gateway.api.access import new_token
from camserve.gateway.pool.fake import FakeBackend
from camserve.gateway.web.app import page_file
from camserve.methods import SIGNED

playwright = pytest.importorskip(
    "playwright.async_api", reason="the page is not looked at: playwright is not installed"
)
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="the page is not looked at: there is no chromium on PATH"),
    pytest.mark.timeout(300),
]
expect = playwright.expect
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
)
DONE = re.compile("^Done in")


@asynccontextmanager
async def opened(upstream: FakeBackend | None = None, address: str = "", **settings):
    """A gateway and its page in a browser; what the browser complains of fails the test at the end."""
    complaints, elsewhere = [], []
    async with serving(upstream, web_listen="127.0.0.1:0", **settings) as server, playwright.async_playwright() as run:
        browser = await run.chromium.launch(executable_path=CHROMIUM, args=[*QUIET])
        try:
            page = await browser.new_page(accept_downloads=True)
            page.set_default_timeout(60_000)
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
            page.on("request", lambda asked: elsewhere.append(asked.url))
            await page.goto(f"http://{server.gateway.web_address}/{address}")
            yield server, page, complaints
        finally:
            await browser.close()
    hosts = {urlparse(url).netloc for url in elsewhere if not url.startswith("blob:")}
    assert hosts == {server.gateway.web_address}
    assert not complaints


async def give(page, kind: str = "PNG") -> None:
    await expect(page.locator("#methods input").first).to_be_attached()
    await page.set_input_files("#file", {"name": "cat", "mimeType": "image/png", "buffer": photo(kind=kind)})


async def done(page) -> None:
    await expect(page.locator("#status")).to_have_text(DONE, timeout=60_000)


async def test_a_photo_becomes_predictions_and_maps_and_a_class_can_be_chosen():
    async with opened() as (server, page, _):
        await give(page)
        await done(page)
        assert await page.locator("#predictions li").count() == 5
        assert await page.locator("figure").count() == 2
        assert "Grad-CAM: " in await page.locator("figcaption .title").first.inner_text()
        await page.locator("#predictions button.name").nth(1).click()
        await done(page)
        chosen = await page.locator("#predictions button.name").nth(1).inner_text()
        await expect(page.locator("figcaption .title").first).to_have_text(f"Grad-CAM: {chosen}")
        await page.locator("#predictions li").nth(2).get_by_role("button", name="rather than").click()
        await expect(page.locator("figcaption .title").first).to_contain_text(re.compile("contrast:.+>"))
        await done(page)
        targets = [target.text() for step in server.upstream.steps for item in step for target in item.targets]
        assert targets[-1].startswith("contrast:")


async def test_the_look_costs_no_query_and_stands_in_the_address():
    async with opened() as (server, page, _):
        await give(page)
        await done(page)
        canvas = page.locator("figure canvas").first
        before, steps = await canvas.screenshot(), len(server.upstream.steps)
        await page.locator("#colormap").select_option("magma")
        await page.locator("#opacity").fill("0.9")
        assert await canvas.screenshot() != before
        assert len(server.upstream.steps) == steps
        assert "colormap=magma" in page.url
        address = page.url.partition("#")[2]
    async with opened(address=f"#{address}") as (_, page, _):
        await expect(page.locator("#colormap")).to_have_value("magma")
        assert await page.locator("#opacity").input_value() == "0.9"


async def test_a_download_has_the_maps_values(tmp_path):
    async with opened() as (_, page, _):
        await give(page)
        await done(page)
        async with page.expect_download() as download:
            await page.get_by_role("button", name="NPY").first.click()
        await (await download.value).save_as(tmp_path / "map.npy")
        async with page.expect_download() as download:
            await page.get_by_role("button", name="JSON").first.click()
        await (await download.value).save_as(tmp_path / "map.json")
    array, told = np.load(tmp_path / "map.npy"), json.loads((tmp_path / "map.json").read_text())
    assert array.dtype == np.float32
    assert list(array.shape) == told["shape"]
    assert 0 <= array.min() <= array.max() <= 1


async def test_faithfulness_is_drawn_and_told():
    async with opened(address="#evaluate=1&methods=grad_cam") as (_, page, _):
        await give(page)
        await done(page)
        await expect(page.get_by_role("img", name=re.compile("insertion 0.*deletion"))).to_be_visible()


async def test_what_is_wrong_is_said_in_words():
    async with opened() as (server, page, complaints):
        await give(page)
        await done(page)
        await expect(page.locator("#problem")).to_be_hidden()
        await page.set_input_files("#file", {"name": "a", "mimeType": "image/png", "buffer": b"no image"})
        await expect(page.get_by_role("alert")).to_contain_text("cannot read that file")
        await server.gateway.stop(0)
        await give(page)
        await expect(page.get_by_role("alert")).to_contain_text("cannot be reached")
        complaints.clear()  # the browser's own word on a server that is gone


async def test_a_token_is_asked_for_and_kept_in_memory_alone(tmp_path):
    secret, entry = new_token("reader")
    (tmp_path / "tokens.toml").write_text(entry)
    async with opened(tokens=tmp_path / "tokens.toml") as (_, page, complaints):
        await expect(page.get_by_role("alert")).to_contain_text("wants a token")
        complaints.clear()  # the browser tells every status 401
        await page.locator("#token").fill(secret)
        await page.locator("#token").press("Enter")
        await give(page)
        await done(page)
        assert secret not in page.url
        kept = await page.context.storage_state()
        assert secret not in json.dumps(kept)
        assert not await page.context.cookies()


async def test_the_page_works_by_keyboard_and_tells_names_of_everything():
    async with opened() as (_, page, _):
        await give(page)
        await done(page)
        unnamed = await page.locator("button, input, select, canvas").evaluate_all(
            """all => all.filter(each => !each.hidden && !(each.labels?.length || each.textContent.trim()
               || each.getAttribute('aria-label'))).map(each => each.outerHTML)"""
        )
        assert not unnamed
        await page.locator("#predictions button.name").nth(2).focus()
        await page.keyboard.press("Enter")
        await done(page)
        await expect(page.locator("#predictions button.name").nth(2)).to_have_attribute("aria-pressed", "true")


def test_the_page_knows_the_methods_with_signed_maps():
    script = page_file("app.js").decode()
    named = re.search(r"const SIGNED = new Set\(\[(.*?)\]\)", script, re.DOTALL)[1]
    assert set(re.findall(r'"(\w+)"', named)) == set(SIGNED)


async def test_the_page_forbids_what_it_does_not_need():
    async with serving(web_listen="127.0.0.1:0", ready=False) as server:
        host, port = server.gateway.web_address.split(":")
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(b"GET / HTTP/1.0\r\n\r\n")
        head = (await reader.read()).decode().partition("\r\n\r\n")[0].lower()
        writer.close()
    assert "content-security-policy: default-src 'none'; script-src 'self'" in head
    assert "frame-ancestors 'none'" in head

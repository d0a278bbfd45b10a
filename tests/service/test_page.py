"""The page in a real Chromium, over the shipped fake: a photo becomes maps, and nothing is loaded from elsewhere."""

from __future__ import annotations

import asyncio
import io
import json
import re
import shutil
import subprocess
from contextlib import asynccontextmanager
from dataclasses import replace
from importlib import resources
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import pytest
import pytest_asyncio
from gateway_harness import GRAD, arrays, ask, photo, serving
from PIL import Image

from camserve.gateway.api.access import new_token
from camserve.gateway.pool.fake import MODEL, FakeBackend
from camserve.gateway.web.app import page_file
from camserve.methods import SIGNED
from camserve.types import Against, BoxTarget, Contrast, Detection, Finer, Region, Target, Text, Value, Vector, Word
from camserve.types.model import TextInput
from camserve.types.target_forms import target_forms
from camserve.v1 import explain_pb2 as pb

playwright = pytest.importorskip(
    "playwright.async_api", reason="the page is not looked at: playwright is not installed"
)
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="the page is not looked at: there is no chromium on PATH"),
    pytest.mark.timeout(300),
    pytest.mark.asyncio(loop_scope="module"),
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


BROWSER: dict[str, playwright.Browser] = {}
"""The one browser of these tests; each test has a profile of its own."""


@pytest_asyncio.fixture(scope="module", loop_scope="module", autouse=True)
async def browser(tmp_path_factory):
    line = [CHROMIUM, "--headless=new", "--remote-debugging-port=0", *QUIET]
    line += [f"--user-data-dir={tmp_path_factory.mktemp('chromium')}", "about:blank"]
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True) as process:
        try:
            address = next(said.split()[-1] for said in process.stderr if "listening on ws://" in said)
            async with playwright.async_playwright() as run:
                BROWSER["only"] = await run.chromium.connect_over_cdp(address)
                yield
        finally:
            process.terminate()


@asynccontextmanager
async def opened(upstream: FakeBackend | None = None, address: str = "", ready: bool = True, **settings):
    """A gateway and its page in a browser; what the browser complains of fails the test at the end."""
    complaints, elsewhere = [], []
    web = "127.0.0.1:0"
    async with serving(upstream, ready, web_listen=web, **settings) as server:
        context = await BROWSER["only"].new_context(accept_downloads=True)
        try:
            page = await context.new_page()
            page.set_default_timeout(60_000)
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
            page.on("request", lambda asked: elsewhere.append(asked.url))
            await page.goto(f"http://{server.gateway.web_address}/{address}")
            yield server, page, complaints
        finally:
            await context.close()
    hosts = {urlparse(url).netloc for url in elsewhere if not url.startswith("blob:")}
    assert hosts == {server.gateway.web_address}
    assert not complaints


async def give(page, kind: str = "PNG", early: bool = False) -> None:
    if not early:
        await expect(page.locator("#methods input").first).to_be_attached()
    await page.set_input_files("#file", {"name": "cat", "mimeType": "image/png", "buffer": photo(kind=kind)})


async def done(page) -> None:
    await expect(page.locator("#status")).to_have_text(DONE, timeout=60_000)


async def until(holds) -> None:
    async with asyncio.timeout(60):
        while not holds():
            await asyncio.sleep(0.01)


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
        canvas, steps = page.locator("figure canvas").first, len(server.upstream.steps)
        looks = [await canvas.screenshot()]
        for change in (
            lambda: page.locator("#colormap").select_option("magma"),
            lambda: page.locator("#opacity").fill("0.9"),
            lambda: page.locator("#hide").check(),
            lambda: page.locator("#threshold").fill("0.6"),
            lambda: page.locator("#boxes").check(),
        ):
            await change()
            looks.append(await canvas.screenshot())
        assert len(set(looks)) == len(looks), "each of them shows"
        assert len(server.upstream.steps) == steps
        address = page.url.partition("#")[2]
    async with opened(address=f"#{address}") as (_, page, _):
        await expect(page.locator("#colormap")).to_have_value("magma")
        await expect(page.locator("#opacity")).to_have_value("0.9")
        await expect(page.locator("#threshold")).to_have_value("0.6")
        await expect(page.locator("#boxes")).to_be_checked()


async def test_a_box_of_the_browser_is_that_of_the_server(tmp_path):
    async with opened(address="#boxes=1&threshold=0.4&methods=occlusion") as (server, page, _):
        await give(page)
        await done(page)
        told = await page.locator("figcaption .box-told").inner_text()
        options = pb.Output(boxes=pb.BoxOptions(threshold=0.4))
        reply = await server.stub.Explain(ask(pb.MethodSpec(occlusion={}), output=options))
    (box,) = reply.maps[0].boxes
    assert told == "Box " + ", ".join(str(round(edge)) for edge in (box.left, box.top, box.right, box.bottom))


async def test_values_are_read_at_one_place_of_all_maps_by_pointer_and_by_keys(tmp_path):
    async with opened() as (_, page, _):
        await give(page)
        await done(page)
        canvas, read = page.locator("figure canvas").first, page.locator("figcaption .under")
        array, view = await downloaded(page, tmp_path)
        await canvas.scroll_into_view_if_needed()
        where = await canvas.bounding_box()
        await page.mouse.move(where["x"] + 0.25 * where["width"] + 1, where["y"] + 0.75 * where["height"] + 1)
        row, column = array.shape[0] * 3 // 4, array.shape[1] // 4
        x, y = (
            view[low] + share * (view[high] - view[low])
            for low, share, high in (("left", 0.25, "right"), ("top", 0.75, "bottom"))
        )
        for each in (0, 1):
            value, place = re.fullmatch(r"(\S+) at (\d+, \d+)", await read.nth(each).inner_text()).groups()
            assert abs(int(place.split(", ")[0]) - x) <= 1
            assert abs(int(place.split(", ")[1]) - y) <= 1
            assert each or float(value) == pytest.approx(array[row, column], abs=6e-4)
        await page.mouse.move(0, 0)
        await expect(read.first).to_have_text("")
        await canvas.focus()
        await page.keyboard.press("ArrowRight")
        await expect(read.nth(1)).to_contain_text(" at ")


async def downloaded(page, folder) -> tuple[np.ndarray, dict]:
    """The first map as the page saves it, and the part of the photo that it lies on."""
    async with page.expect_download() as download:
        await page.get_by_role("button", name="NPY").first.click()
    await (await download.value).save_as(folder / "map.npy")
    async with page.expect_download() as download:
        await page.get_by_role("button", name="Answer as JSON").click()
    await (await download.value).save_as(folder / "answer.json")
    return np.load(folder / "map.npy"), json.loads((folder / "answer.json").read_text())["input"]


async def test_downloads_have_the_maps_values(tmp_path):
    async with opened(address="#methods=occlusion&hide=1") as (server, page, _):
        await give(page)
        await done(page)
        for name in ("PNG", "NPY", "JSON", "Answer as JSON"):
            async with page.expect_download() as download:
                await page.get_by_role("button", name=name, exact=True).click()
            assert (await download.value).suggested_filename.startswith("cat")
            await (await download.value).save_as(tmp_path / name)
        reply = await server.stub.Explain(ask(pb.MethodSpec(occlusion={})))
    array = np.load(tmp_path / "NPY")
    told, answer = (json.loads((tmp_path / name).read_text()) for name in ("JSON", "Answer as JSON"))
    assert array.dtype == np.float32
    assert (array == arrays(reply)[0]).all()
    assert array.shape == tuple(told["shape"])
    assert answer["maps"] == [told]
    with Image.open(tmp_path / "PNG") as picture:
        assert picture.width / picture.height == pytest.approx(array.shape[1] / array.shape[0])


async def test_a_record_is_saved_as_it_came(tmp_path):
    async with opened(address="#methods=grad_cam") as (_, page, _):
        await give(page)
        await done(page)
        assert await page.get_by_role("button", name="Evidence").count() == 0
        await page.locator("#evidence").check()
        for name in ("Evidence", "Answer as JSON"):
            async with page.expect_download() as download:
                await page.get_by_role("button", name=name, exact=True).click()
            await (await download.value).save_as(tmp_path / name)
    record = (tmp_path / "Evidence").read_text()
    assert record == json.loads((tmp_path / "Answer as JSON").read_text())["evidence"] + "\n"
    assert json.loads(record)["precision"]["asked"] == "exact"


async def test_curves_are_drawn_on_one_scale_and_the_best_is_told():
    async with opened(address="#evaluate=1") as (_, page, _):
        await give(page)
        await done(page)
        await expect(page.locator(".areas").first).to_contain_text(re.compile("insertion 0.*deletion 0.*overall"))
        assert await page.locator(".plot polyline").count() == 4
        assert len(set(await page.locator(".plot .high").all_inner_texts())) == 1


async def test_signed_maps_have_colours_of_their_own(tmp_path):
    async with opened(address="#methods=occlusion") as (_, page, _):
        await give(page)
        await done(page)
        await page.locator("#signed").check()
        await expect(page.locator("#low")).to_have_text("\N{MINUS SIGN}1")
        await done(page)
        array, _ = await downloaded(page, tmp_path)
        assert abs(array).max() == 1
        await page.locator("#methods input[value=score_cam]").check()
        await expect(page.locator("#signed-note")).to_contain_text("Score-CAM")
        await done(page)
        await expect(page.locator("#low")).to_have_text("0")


FEW = replace(MODEL, labels=("a three", "a five", "an eight"))
OFFERING = [
    replace(FEW, name="classes"),
    replace(FEW, name="numbers", outputs="value", units=("years", "px", "")),
    replace(FEW, name="vectors", outputs="embedding", labels=(), dimension=3),
    replace(FEW, name="texts", outputs="text-image", dimension=3),
    replace(FEW, name="places", outputs="segmentation"),
    replace(FEW, name="found", outputs="boxes"),
    replace(FEW, name="answers", outputs="answers", text=TextInput("question", "is it a cat?", True, 8)),
    replace(FEW, name="captions", outputs="tokens", text=TextInput("caption so far", "a cat", False, 8)),
]
TYPES = {"contrast": Contrast, "finer": Finer, "against": Against, "value": Value, "word": Word}
TYPES |= {"vector": Vector, "reference": Vector, "box": BoxTarget}
VECTOR = io.BytesIO()
np.save(VECTOR, np.array([1.0, 2.0, 3.0]))


async def drag(page, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Drags from one place of the photo to another, in shares of it."""
    await page.locator("#frame").scroll_into_view_if_needed()
    where = await page.locator("#frame").bounding_box()
    points = [(where["x"] + x * where["width"], where["y"] + y * where["height"]) for x, y in (start, end)]
    await page.mouse.move(*points[0])
    await page.mouse.down()
    await page.mouse.move(*points[1], steps=4)
    await page.mouse.up()


async def answer_what_it_asks(page, question: str) -> None:
    """Does what a question needs beside being chosen."""
    if question == "contrast":
        first = await page.locator("#predictions button.name").first.inner_text()
        await page.locator("#than").fill(next(label for label in FEW.labels if label != first))
        await page.locator("#than").press("Enter")
    elif question == "text":
        await page.locator("#words").fill("a five")
        await page.locator("#words").press("Enter")
    elif question in ("word", "detection"):
        await page.locator("#at").fill("2")
        await page.locator("#at").press("Enter")
    elif question == "box":
        await drag(page, (0.1, 0.1), (0.6, 0.6))
    elif question == "vector":
        file = {"name": "a.npy", "mimeType": "application/octet-stream", "buffer": VECTOR.getvalue()}
        await page.set_input_files("#given", file)
    elif question == "reference":
        await page.set_input_files("#given", {"name": "b.png", "mimeType": "image/png", "buffer": photo(1)})


async def test_every_question_that_a_model_offers_can_be_asked_and_no_other():
    async with opened(FakeBackend(OFFERING), "#methods=occlusion") as (server, page, _):
        await give(page)
        for model in OFFERING:
            await page.locator("#model").select_option(model.name)
            offered = {form.name for form in target_forms(model)}
            options = page.locator("#question option")
            await expect(options).to_have_count(len(offered - {"region"}))
            names = await options.evaluate_all("all => all.map(each => each.value)")
            assert set(names) == offered - {"region"}
            if model.text and model.text.required:
                await expect(page.locator("#status")).to_have_text("Enter a question.")
                await page.locator("#text").fill("is it a dog?")
                await page.locator("#text").press("Enter")
            for name in names:
                if len(names) > 1:
                    await page.locator("#question").select_option(name)
                await answer_what_it_asks(page, name)
                await until(lambda kind=name: is_asked(server, kind))
                await done(page)
                await expect(page.locator("#problem")).to_be_hidden()
    assert {item.text for step in server.upstream.steps for item in step} == {"", "is it a dog?"}


def last_target(server):
    targets = server.upstream.steps[-1][0].targets if server.upstream.steps else ()
    return targets[0] if targets else None  # none where predictions alone are asked


def is_asked(server, question: str) -> bool:
    """Whether the last step has a target of this kind; those of classes of places are inside regions."""
    target = last_target(server)
    inside = target.of if isinstance(target, Region) else target
    if question == "text":
        return inside in [Text("a five"), Target(index=1)]  # the latter where it is an answer of the model's
    if question == "detection":
        return inside == Detection(2) or inside in [BoxTarget((2, 2, 10, 8), Target(index=index)) for index in range(3)]
    return isinstance(inside, TYPES.get(question, Target | Detection | BoxTarget))


async def test_a_box_is_drawn_moved_by_keys_and_taken_away():
    places = replace(FEW, name="fake", outputs="segmentation")
    async with opened(FakeBackend([places]), "#methods=occlusion") as (server, page, _):
        await give(page)
        await done(page)
        await drag(page, (0.25, 0.25), (0.75, 0.75))
        await until(lambda: isinstance(last_target(server), Region) and last_target(server).box is not None)
        edges = np.array(last_target(server).box)
        assert abs(edges - (20, 15, 60, 45)).max() <= 1, "in pixels of a photo of 80 x 60"
        assert [await page.locator(f"#box-{name}").input_value() for name in ("x0", "y0", "x1", "y1")] == [
            f"{edge:g}" for edge in edges
        ]
        await done(page)
        await page.locator("#frame").focus()
        await page.keyboard.press("ArrowRight")
        await page.keyboard.press("Shift+ArrowDown")
        moved = np.array([2, 0, 2, 1])  # a 50th of the photo, in whole pixels
        await until(lambda: last_target(server).box == (*(edges + moved),))
        await done(page)
        await page.locator("#predictions button.name").nth(1).click()
        await until(lambda: last_target(server).of.index is not None and last_target(server).box is not None)
        await done(page)
        address = page.url.partition("#")[2]
        await page.get_by_role("button", name="rather than").nth(2).click()
        await until(lambda: isinstance(last_target(server).of, Contrast) and last_target(server).box is not None)
        await done(page)
        await page.locator("#frame").focus()
        await page.keyboard.press("Delete")
        await until(lambda: last_target(server).box is None)
        before, steps = edges + moved, len(server.upstream.steps)
        await page.evaluate("address => { location.hash = address; }", address)
        await until(lambda: len(server.upstream.steps) > steps and last_target(server).box == tuple(before))


async def test_a_detection_is_clicked_in_the_photo():
    found = replace(FEW, name="fake", outputs="boxes")
    async with opened(FakeBackend([found]), "#methods=occlusion") as (server, page, _):
        await give(page)
        await done(page)
        assert await page.locator("#marks .found").count() == 3
        await drag(page, (0.12, 0.127), (0.12, 0.127))  # 9.6, 7.6: inside of the third detection alone
        await until(lambda: is_asked(server, "detection"))
        await expect(page.locator("#predictions button.name").nth(2)).to_have_attribute("aria-pressed", "true")


async def test_a_class_that_is_no_prediction_is_asked_by_name_and_an_unknown_one_is_told_of():
    async with opened(address="#methods=grad_cam") as (server, page, complaints):
        await give(page)
        await done(page)
        await page.locator("#target").fill("EGYPTIAN_CAT")
        await page.locator("#target").press("Enter")
        await until(lambda: last_target(server) == Target(index=2))
        await done(page)
        await page.locator("#target").fill("unicorn")
        await page.locator("#target").press("Enter")
        await expect(page.get_by_role("alert")).to_contain_text("unicorn")
        complaints.clear()  # the browser tells every status 400


async def test_maps_sharpen_and_can_be_stopped():
    async with opened(address="#methods=score_cam", step_queries=16) as (server, page, _):
        server.upstream.hold()
        server.upstream.release(2)
        await give(page)
        await expect(page.locator("#status")).to_have_text(re.compile(r"^\d+ of \d+ masked queries"))
        await expect(page.locator("#predictions li")).to_have_count(5)
        await expect(page.locator("figcaption .cost")).to_contain_text("% of the queries")
        await page.get_by_role("button", name="Stop").click()
        await expect(page.locator("#status")).to_contain_text("Stopped after")
        await until(lambda: server.gateway.calls.active == 0)
        assert await page.locator("figure").count() == 1
        server.upstream.release()


async def test_what_is_wrong_is_said_in_words():
    async with opened(max_image_bytes=2**16, max_calls=1) as (server, page, complaints):
        alert = page.get_by_role("alert")
        await give(page)
        await done(page)
        await expect(page.locator("#problem")).to_be_hidden()
        await page.set_input_files("#file", {"name": "a", "mimeType": "image/png", "buffer": b"no image"})
        await expect(alert).to_contain_text("cannot read that file")
        big = {"name": "big", "mimeType": "image/png", "buffer": photo(size=(400, 400))}
        await page.set_input_files("#file", big)
        await expect(alert).to_contain_text(re.compile("at most 65536 bytes.*make it smaller", re.DOTALL))
        await give(page)
        await done(page)
        server.upstream.hold()
        held = asyncio.ensure_future(server.stub.Explain(ask(GRAD)))
        await until(lambda: server.gateway.calls.active == 1)
        await page.locator("#evaluate").check()
        await expect(alert).to_contain_text(re.compile(r"too much to do.*Try again in \d+ s", re.DOTALL))
        held.cancel()
        server.upstream.release()
        await until(lambda: server.gateway.calls.active == 0)
        await page.get_by_role("button", name="Try again").click()
        await done(page)
        await expect(page.locator("#problem")).to_be_hidden()
        server.upstream.up = False
        server.upstream.workers = 0
        await page.locator("#evaluate").uncheck()
        await expect(alert).to_contain_text("worker has been lost")
        await server.gateway.stop(0)
        await give(page)
        await expect(alert).to_contain_text("cannot be reached")
        complaints.clear()  # the browser's own words on statuses, and on a server that is gone


async def test_a_deadline_is_told_with_what_to_do():
    async with opened(default_deadline_s=0.5) as (server, page, complaints):
        server.upstream.hold()
        await give(page)
        await expect(page.get_by_role("alert")).to_contain_text("Choose fewer methods")
        complaints.clear()


async def test_a_model_that_starts_is_waited_for():
    upstream = FakeBackend()
    upstream.workers = 0
    async with opened(upstream, ready=False) as (_, page, complaints):
        await expect(page.locator("#status")).to_contain_text("this page looks again")
        await give(page, early=True)
        upstream.workers = 1
        await done(page)
        complaints.clear()  # the browser tells every status 503


async def test_a_token_is_asked_for_and_kept_in_memory_alone(tmp_path):
    secret, entry = new_token("reader")
    (tmp_path / "tokens.toml").write_text(entry)
    async with opened(tokens=tmp_path / "tokens.toml") as (_, page, complaints):
        await expect(page.get_by_role("alert")).to_contain_text("wants a token")
        complaints.clear()  # the browser tells every status 401
        await page.locator("#token").fill("wrong")
        await page.locator("#token").press("Enter")
        await expect(page.get_by_role("alert")).to_contain_text("does not know this token")
        complaints.clear()
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


async def test_axe_finds_nothing_that_stands_in_anybodys_way():
    """All its rules: names, roles, contrast, order, on a wide screen and a phone's, light and dark."""
    package = pytest.importorskip("axe_playwright_python", reason="axe-playwright-python is not installed")
    (script,) = resources.files(package).glob("axe*.js")
    places = replace(FEW, name="fake", outputs="segmentation")
    async with opened(FakeBackend([places]), "#question=contrast&evaluate=1&box=10,10,40,40") as (_, page, _):
        await give(page)
        await page.get_by_role("button", name="rather than").nth(1).click()
        await done(page)
        await page.evaluate(script.read_text())
        for scheme in ("light", "dark"):
            for width in (1280, 400):
                await page.emulate_media(color_scheme=scheme)
                await page.set_viewport_size({"width": width, "height": 900})
                found = await page.evaluate(
                    "async () => (await axe.run()).violations.map(each => [each.id, each.nodes.map(one => one.html)])"
                )
                assert not found, f"{scheme}, {width} px"


async def test_the_benchmark_takes_the_models_time_off_that_of_a_drop(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import page as benchmark

    async with serving(web_listen="127.0.0.1:0") as server:
        files = benchmark.photos((60, 40), 2)
        rows, _ = await benchmark.measured(f"http://{server.gateway.web_address}/", files)
    (row,) = rows
    assert row["until_seen"] > row["model"] > 0
    told = benchmark.summary([row, {"until_seen": 3.0, "model": 1.0}, {"until_seen": 9.0, "model": 1.0}])
    assert (told["drops"], told["beyond_model_max_s"], told["until_seen_median_s"]) == (3, 8.0, 3.0)


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

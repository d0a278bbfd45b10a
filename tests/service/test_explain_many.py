"""Many images through a whole gateway, over the shipped fake: clients, and `camserve explain FOLDER`."""

from __future__ import annotations

import asyncio
import csv
import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest
from gateway_harness import photo, serving

from camserve import cli
from camserve.cli.bulk import COLUMNS, JOURNAL, TABLE
from camserve.client import AsyncClient, Client
from camserve.errors import InvalidImage
from camserve.evidence.canonical import canonical, sha256
from camserve.evidence.replay import Outcome
from camserve.evidence.verify import parsed, verify
from camserve.gateway.pool.fake import MODEL, FakeBackend
from camserve.types.model import TextInput


def rows(out: Path) -> list[dict[str, str]]:
    with (out / TABLE).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three images, one of them in a subfolder, and a file that is none."""
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b.png", "sub/a.png")):
        (images / name).write_bytes(photo(number))
    (images / "notes.doc").write_text("no image")
    return images


async def run(*arguments: object) -> int:
    return await asyncio.to_thread(cli.commands.run, [*map(str, arguments)])


async def test_clients_answer_many_images_and_keep_a_broken_one_apart():
    images = [photo(0), b"no image", photo(2)]
    async with serving() as server, AsyncClient(server.gateway.address) as client:
        found = [answer async for answer in client.explain_many(images, "grad_cam", ["tabby"])]
        classes = await server.metrics()

        def in_threads():
            with Client(server.gateway.address) as plain:
                return list(plain.explain_many(images, "grad_cam", ["tabby"], at_once=2, priority="normal"))

        plain = await asyncio.to_thread(in_threads)
    for answers in (found, plain):
        by_index = {answer.index: answer for answer in answers}
        assert isinstance(by_index[1].error, InvalidImage)
        assert [by_index[index].explanation.maps[0].target_text for index in (0, 2)] == ["tabby", "tabby"]
    assert 'class="batch"' in classes, "many images wait behind those of people"


async def test_each_image_is_asked_with_the_text(folder, tmp_path):
    asked = FakeBackend(
        [replace(MODEL, outputs="answers", text=TextInput("question", "is it a cat?", required=True, most_tokens=8))]
    )
    images = [photo(0), photo(1)]
    async with serving(asked) as server, AsyncClient(server.gateway.address) as client:
        many = client.explain_many(images, "grad_cam", ["tabby"], text="is it a dog?")
        assert [answer.error async for answer in many] == [None, None]

        def in_threads():
            with Client(server.gateway.address) as plain:
                return [answer.error for answer in plain.explain_many(images, targets=["cup"], text="is it a cup?")]

        assert await asyncio.to_thread(in_threads) == [None, None]
        arguments = ["--address", server.gateway.address, "--text", "is it a boat?", "--out", tmp_path / "out"]
        assert await run("explain", folder, *arguments) == 0
    texts = [item.text for step in asked.steps for item in step]
    assert texts == ["is it a dog?"] * 2 + ["is it a cup?"] * 2 + ["is it a boat?"] * 3


async def test_a_folder_becomes_pictures_and_a_table(folder, tmp_path, capsys):
    out = tmp_path / "out"
    async with serving() as server:
        address = server.gateway.address
        assert await run("explain", folder, "--address", address, "--target", "top2", "--boxes", "--out", out) == 0
        assert str(out / TABLE) in capsys.readouterr().out
        found = rows(out)
        assert [row["image"] for row in found] == ["a.png", "a.png", "b.png", "b.png", "sub/a.png", "sub/a.png"]
        assert tuple(found[0]) == COLUMNS
        for row in found:
            assert (out / row["picture"]).is_file()
            assert (row["method"], row["model"], row["error"]) == ("Grad-CAM", "fake", "")
            assert float(row["left"]) < float(row["right"])
        assert len({row["picture"] for row in found}) == 6
        steps = len(server.upstream.steps)
        before = (out / JOURNAL).read_bytes()
        (out / found[-1]["picture"]).unlink()
        assert await run("explain", folder, "--address", address, "--target", "top2", "--boxes", "--out", out) == 0
        assert rows(out)[:4] == found[:4]
        assert (out / found[-1]["picture"]).is_file(), "what is missing is made again"
        assert len(server.upstream.steps) <= steps + 2, "what is there is not asked again"
        assert (out / JOURNAL).read_bytes().startswith(before)
        assert await run("explain", folder, "--address", address, "--target", "top1", "--out", out) == 2
        assert "was begun with" in capsys.readouterr().err


async def test_images_that_fail_are_named_and_stop_nothing(folder, tmp_path, capsys):
    (folder / "broken.jpg").write_bytes(b"no image")
    out = tmp_path / "out"
    async with serving() as server:
        assert await run("explain", folder, "--address", server.gateway.address, "--out", out) == 2
        said = capsys.readouterr().err
        assert "1 of 4 images failed" in said
        assert "broken.jpg" in said
        failed = {row["image"]: row["error"] for row in rows(out) if row["error"]}
        assert list(failed) == ["broken.jpg"]
        assert len(rows(out)) == 4
        (folder / "broken.jpg").write_bytes(photo(9, kind="JPEG"))
        assert await run("explain", folder, "--address", server.gateway.address, "--out", out) == 0
        assert not any(row["error"] for row in rows(out)), "a later run mends what has been mended"


async def test_a_list_names_images_in_several_folders(folder, tmp_path):
    listed = tmp_path / "some.txt"
    listed.write_text(f"images/sub/a.png\n\n{folder / 'b.png'}\nimages/sub/a.png\n")
    out = tmp_path / "out"
    async with serving() as server:
        assert await run("explain", listed, "--address", server.gateway.address, "--out", out) == 0
    assert [row["image"] for row in rows(out)] == ["sub/a.png", "b.png"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--target", "nonsense"], "nonsense"),
        (["--model", "other"], "other"),
        (["--watch"], "--watch shows one image"),
    ],
)
async def test_what_would_fail_every_image_ends_the_run(folder, tmp_path, capsys, arguments, said):
    for number in range(20):
        (folder / f"c{number}.png").write_bytes(photo(number + 10))
    async with serving() as server:
        out = tmp_path / "out"
        assert await run("explain", folder, "--address", server.gateway.address, "--out", out, *arguments) == 2
        assert said in capsys.readouterr().err
        assert "of 23 images failed" not in said


@pytest.mark.parametrize("logged", [True, False])
async def test_a_folder_leaves_a_log_of_evidence(folder, tmp_path, capsys, logged):
    out, log, theirs = tmp_path / "out", tmp_path / "kept" / "log.jsonl", tmp_path / "server.jsonl"
    settings = {"evidence_log": theirs} if logged else {}
    async with serving(**settings) as server:
        command = ["explain", folder, "--address", server.gateway.address, "--target", "top2", "--out", out]
        assert await run(*command, "--evidence", log) == 0
        assert verify([log]).records == 3
        assert await run(*command, "--evidence", log) == 0
        assert verify([log]).records == 3, "what is there is not asked again"
        assert await run("evidence", "verify", log) == 0
        assert "records 1 to 3 hold" in capsys.readouterr().out
        (folder / "c.png").write_bytes(photo(7))
        assert await run(*command, "--evidence", log) == 0
        for row in rows(out):
            replay = ["evidence", "replay", log, folder / row["image"], "--number", row["evidence"]]
            # The fake's maps are not of the image.
            assert await run(*replay, "--address", server.gateway.address) in (Outcome.EQUAL, Outcome.NOT_EXPECTED)
            assert await run(*replay[:3], tmp_path / "out" / row["picture"], *replay[4:]) == Outcome.OTHER_INPUT
        assert await run(*command) == 2
        assert "was begun with evidence" in capsys.readouterr().err
    found = [parsed(line) for line in log.read_bytes().splitlines()]
    images = {row["image"]: int(row["evidence"]) for row in rows(out)}
    assert verify([log]).records == 4
    for name, number in images.items():
        assert found[number - 1]["image"]["sha256"] == sha256((folder / name).read_bytes()), name
    came = [canonical(one | one.pop("received")) for one in found if "received" in one]
    if logged:
        assert set(came) <= set(theirs.read_text().splitlines())
    assert len(came) == (4 if logged else 0)


async def test_a_server_without_evidence_ends_a_run_that_asks_for_it(folder, tmp_path, capsys, monkeypatch):
    explain = Client.explain_many

    def without(self, *given, **more):
        for answer in explain(self, *given, **more):
            yield replace(answer, explanation=replace(answer.explanation, evidence=""))

    monkeypatch.setattr(Client, "explain_many", without)
    async with serving() as server:
        arguments = ["--address", server.gateway.address, "--out", tmp_path / "out", "--evidence", tmp_path / "log"]
        assert await run("explain", folder, *arguments) == 2
    assert "answers without evidence records" in capsys.readouterr().err


async def test_a_log_of_evidence_that_cannot_be_written_ends_the_run(folder, tmp_path, capsys, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "fdatasync", full)
    async with serving() as server:
        arguments = ["--address", server.gateway.address, "--out", tmp_path / "out", "--evidence", tmp_path / "log"]
        assert await run("explain", folder, *arguments) == 2
    assert f"evidence log {tmp_path / 'log'} cannot be written" in capsys.readouterr().err


async def test_results_do_not_go_among_the_images(folder, capsys):
    assert await run("explain", folder, "--out", folder / "out") == 2
    assert "must go outside the folder" in capsys.readouterr().err

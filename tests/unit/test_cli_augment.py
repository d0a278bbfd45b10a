"""`camserve augment` on the command line."""

from __future__ import annotations

import pytest
from tiny import TINY_LABELS, TINY_SIZE, pixels, png, tiny_module

from camserve import Engine, cli
from camserve.types import Preprocessing

PREPROCESSING = Preprocessing(resize_px=64, crop_px=TINY_SIZE, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


@pytest.fixture(autouse=True)
def loaded(monkeypatch):
    engine = Engine(tiny_module(), preprocessing=PREPROCESSING, labels=TINY_LABELS)
    monkeypatch.setattr(Engine, "load", lambda name, store=None: engine)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images" / "lynx"
    root.mkdir(parents=True)
    for seed in range(3):
        (root / f"{seed}.png").write_bytes(png(pixels(seed)))
    return root.parent


def test_variants_are_written_once(folder, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["augment", str(folder), "--out", str(out), "--groups", "4", "--theta", "70", "--classes", "folder"]
    assert cli.run(arguments) == 0
    written = len(list(out.rglob("*.png")))
    said = capsys.readouterr().out
    assert written > 0
    assert f"{written} variants written to {out}, 0 were there" in said
    assert said.count("no positive evidence") == 3 - written
    assert cli.run(arguments) == 0
    assert f"0 variants written to {out}, {written} were there" in capsys.readouterr().out


def test_broken_images_are_named_and_the_others_made(folder, tmp_path, capsys):
    (folder / "lynx" / "0.png").write_bytes(b"no image")
    assert cli.run(["augment", str(folder), "--out", str(tmp_path / "out"), "--groups", "4"]) == 2
    streams = capsys.readouterr()
    assert "variants written" in streams.out
    assert "lynx/0.png: not a JPEG, PNG, WEBP image" in streams.err
    assert list((tmp_path / "out").rglob("*.png"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "there is no folder nowhere"),
        ([".", "--theta", "most"], "--theta must be `mean` or a percentile, got 'most'"),
        ([".", "--theta", "nan"], "theta must be the mean"),
        ([".", "--denoise", "-1"], "denoise must be a percentile 0..100, got -1"),
        ([".", "--groups", "0"], "groups must be at least 1, got 0"),
    ],
)
def test_misuse(arguments, message, tmp_path, capsys):
    assert cli.run(["augment", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err

"""The demo with a stand-in for the server: what it asks, prints, writes, and leaves behind when something fails."""

import asyncio
import io
import os
import signal
from contextlib import asynccontextmanager

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from camserve import cli
from camserve.cli import demo
from camserve.errors import Unavailable
from camserve.methods import parse_method
from camserve.types import Cost, Explanation, InputView, Prediction, SaliencyMap

VIEW = InputView(original_size=(300, 451), crop=(94.25, 18.75, 356.75, 281.25), size=(224, 224))
CLASSES = (Prediction(282, "tiger cat", 0.4), Prediction(285, "Egyptian cat", 0.35), Prediction(281, "tabby", 0.17))


class Client:
    """Explains everything as a cat."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, list[str], int]] = []

    async def explain(self, path, methods, targets, *, on_progress):
        with Image.open(path) as image:
            image.load()
        (target,) = targets
        self.asked.append((path.name, methods, target.top_k))
        on_progress(1, 2)
        maps = [self._map(method, wanted) for method in methods for wanted in CLASSES[: target.top_k]]
        cost = Cost(42, {"queries": 1.5, "decode": 0.01}, 1, "exact", "here")
        return Explanation("lite0", "1.0", CLASSES, tuple(maps), VIEW, cost)

    def _map(self, method: str, target: Prediction) -> SaliencyMap:
        array = np.zeros((224, 224), np.float32)
        array[80:120, 60:160] = 1
        return SaliencyMap(parse_method(method), target, ("l",), array, (0.0, 1.0), False, True)


@pytest.fixture
def client(monkeypatch):
    stand_in = Client()

    @asynccontextmanager
    async def served(store, console, web):
        yield stand_in, "http://127.0.0.1:1234/" if web else ""

    monkeypatch.setattr(demo, "served", served)
    return stand_in


def test_one_request_for_each_photo_and_method(client, tmp_path):
    demo.run_demo(tmp_path)
    assert client.asked == [
        (f"{photo}.png", [method], classes)
        for photo, classes in (("chelsea", 2), ("coffee", 1))
        for method in ("grad_cam", "group_cam", "score_cam")
    ]


def test_pictures(client, tmp_path, capsys):
    assert cli.run(["demo", "--out", str(tmp_path / "pictures")]) == 0
    paths = {path.name for path in (tmp_path / "pictures").iterdir()}
    overlays = {
        f"{name}.png"
        for method in ("grad_cam", "group_cam", "score_cam")
        for name in (f"chelsea-{method}-tiger-cat", f"chelsea-{method}-egyptian-cat", f"coffee-{method}-tiger-cat")
    }
    assert paths == overlays | {"sheet.png", "chelsea.png", "coffee.png"}
    printed = capsys.readouterr().out
    assert all(str(tmp_path / "pictures" / name) in printed for name in overlays | {"sheet.png"})


def test_tables(client, tmp_path):
    written = io.StringIO()
    demo.run_demo(tmp_path, console=Console(width=80, file=written))
    text = " ".join(written.getvalue().split())
    assert "chelsea.png" in text
    assert "282 tiger cat 40.0%" in text
    assert "42 10 ms 1.5 s" in text
    for title in ("Grad-CAM", "Group-CAM", "Score-CAM"):
        assert title in text


class Terminal(io.StringIO):
    """Presses Ctrl-C some time after it is told that this ends the demo, which has to be there still."""

    pressed = False

    def write(self, text: str) -> int:
        if "Ctrl-C" in text:
            asyncio.get_running_loop().call_later(0.1, self.press)
        return super().write(text)

    def press(self) -> None:
        self.pressed = True
        os.kill(os.getpid(), signal.SIGINT)


def test_the_page_stays_until_ctrl_c(client, tmp_path):
    terminal = Terminal()
    demo.run_demo(tmp_path, console=Console(width=80, file=terminal), web=True)
    assert terminal.pressed
    *_, pictures, page = terminal.getvalue().split("\n\n")
    assert str(tmp_path / "sheet.png") in pictures
    assert page.startswith("the page: http://127.0.0.1:1234/\n")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_stops_everything_before_the_page_is_there_too(monkeypatch, tmp_path):
    torchserve = type("TorchServe", (TorchServe,), {"start": lambda self: waiting()})

    async def waiting() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.Event().wait()

    monkeypatch.setattr(demo, "TorchServe", torchserve)
    monkeypatch.setattr(demo, "ensure_archive", lambda name, store: store)
    demo.run_demo(tmp_path, console=Console(file=io.StringIO()), web=True)


def test_overlays_show_the_map_where_it_belongs(client, tmp_path):
    demo.run_demo(tmp_path)
    with Image.open(tmp_path / "chelsea-grad_cam-tiger-cat.png") as image:
        pixels = np.asarray(image).astype(int)
    assert pixels.shape == (448, 448, 3)
    red, blue = pixels[..., 0], pixels[..., 2]
    assert (red - blue)[165:235, 125:315].min() > 0  # the marked part, twice as large as in the map
    assert (red - blue)[:150].max() < 80


class TorchServe:
    """Starts, but nothing answers."""

    grpc_address, backend = "127.0.0.1:1", "127.0.0.1:1:2"
    log_tail = "the worker wrote this"
    stopped = False

    def __init__(self, options) -> None:
        pass

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        type(self).stopped = True


def test_failure_shows_the_log_and_stops_everything(monkeypatch, tmp_path, capsys):
    torchserve = type("TorchServe", (TorchServe,), {})
    monkeypatch.setattr(demo, "TorchServe", torchserve)
    monkeypatch.setattr(demo, "ensure_archive", lambda name, store: store)
    monkeypatch.setattr(demo, "READY_S", 0.1)
    assert cli.run(["demo", "--out", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "the worker wrote this" in captured.out
    assert captured.err.startswith("camserve: no model became ready within 0.1 s")
    assert torchserve.stopped


def test_failure_to_start_is_reported(monkeypatch, tmp_path, capsys):
    async def start(self) -> None:
        raise Unavailable("no such luck")

    monkeypatch.setattr(demo, "TorchServe", type("TorchServe", (TorchServe,), {"start": start}))
    monkeypatch.setattr(demo, "ensure_archive", lambda name, store: store)
    assert cli.run(["demo", "--out", str(tmp_path)]) == 1
    assert "camserve: no such luck" in capsys.readouterr().err

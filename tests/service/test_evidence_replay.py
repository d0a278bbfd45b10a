"""The map of a record again, bit by bit: alone or beside others, on one worker or on several, after a crash, locally.

The networks here answer an image otherwise in each batch size and at each place of a batch, by a few units in the last
place, as the kernels of some processors do: so nothing hangs on the processor that the tests run on.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from gateway_harness import QUICK
from reference.models import PREPROCESSING, build, picture
from reference.test_attention_against_twins import PREPROCESSING as SQUARE
from reference.test_attention_against_twins import SIDE, transformer
from restless import Restless
from tiny import png
from torch import nn
from worker_backend import WorkerBackend

from camserve import Engine
from camserve.archive import build_archive
from camserve.cli.commands import camserve
from camserve.client import AsyncClient
from camserve.errors import InvalidOption, WorkerLost
from camserve.evaluation.digits.shipped import PREPROCESSING as DIGITS
from camserve.evidence.replay import Outcome, compare, request_options
from camserve.evidence.verify import parsed
from camserve.gateway.ops.settings import Settings
from camserve.gateway.pool.discovery import fixed
from camserve.gateway.server import Gateway
from camserve.methods import METHODS, MethodLike
from camserve.saliency import xrai
from camserve.types import Item, Region, StepResult, Target
from camserve.worker.network import Network
from camserve.worker.tuning import tune

SMALL: dict[str, dict[str, Any]] = {
    "group_cam": {"groups": 18},
    "smooth_grad_cam_plus_plus": {"samples": 17, "seed": 5},
    "integrated_grad_cam": {"steps": 17},
    "integrated_gradients": {"steps": 17},
    "smooth_grad": {"samples": 17, "seed": 5},
    "xrai": {"steps": 10},
    "ss_cam": {"samples": 2, "seed": 5},
    "is_cam": {"samples": 2},
    "rise": {"masks": 40, "grid": 4, "seed": 5},
    "d_rise": {"masks": 40, "grid": 5, "seed": 5},
    "occlusion": {"positions": 6},
}
"""Parameters by which methods have some pieces of queries, and not many."""
HOMES = {"": "perceptron", "ReLU": "perceptron", "GAP head": "pooled", "ViT": "transformer"}
TARGETS = ("top2", "contrast:3>1")
EXACT: dict[str, Any] = {"precision": "exact", "evidence": True}


def module(home: str, seed: int = 2) -> nn.Module:
    found = transformer(seed, dtype=torch.float32) if home == "transformer" else build(home, seed)
    return nn.Sequential(Restless(), found, Restless()).eval()


def network(home: str, micro_batch: int, seed: int = 2) -> Network:
    preprocessing = SQUARE if home == "transformer" else PREPROCESSING
    return Network(module(home, seed), preprocessing=preprocessing, micro_batch=micro_batch, weights=f"{home}-{seed}")


def photo(home: str, seed: int = 1) -> bytes:
    """Of the network's input size, so that nobody resizes it."""
    return png(picture(seed, SIDE, SIDE) if home == "transformer" else picture(seed))


def methods(home: str) -> list[MethodLike]:
    named = [name for name, spec in METHODS.items() if HOMES[spec.needs] == home and name != "auto"]
    tolerant = [("rise", {"masks": 100, "grid": 4, "tolerance": 0.3}), ("score_cam", {"tolerance": 0.5})]
    return [*((name, SMALL.get(name, {})) for name in named), *(tolerant if home == "perceptron" else [])]


class Crashing(WorkerBackend):
    """A worker that is lost at some of its steps, after it has worked on them."""

    def __init__(self, network: Network, *lost: int) -> None:
        super().__init__(network)
        self._lost = lost

    async def step(self, model: str, items: Sequence[Item], timeout_s: float) -> StepResult:
        result = await super().step(model, items, timeout_s)
        if self.steps in self._lost:
            raise WorkerLost("the worker died")
        return result


@asynccontextmanager
async def client(*workers: WorkerBackend, **settings: Any) -> AsyncIterator[AsyncClient]:
    pool = fixed({f"worker{number}": worker for number, worker in enumerate(workers)})
    async with Gateway(Settings(**(QUICK | {"max_methods": 40} | settings)), pool) as gateway:
        await gateway.wait_ready(30)
        async with AsyncClient(gateway.address) as made:
            yield made


def record(answer: Any) -> dict[str, Any]:
    return dict(json.loads(answer.evidence))


def digests(answer: Any) -> list[str]:
    """Of each map, and of its curves where there are some."""
    return [f"{one['sha256']} {one.get('faithfulness')}" for one in record(answer)["maps"]]


@pytest.fixture(autouse=True)
def one_segmentation(monkeypatch):
    """XRAI's six take longer than all the other methods together."""
    monkeypatch.setattr(xrai, "SCALES", (250,))


@pytest.mark.parametrize("home", ["perceptron", "pooled", "transformer"])
async def test_every_method_makes_its_map_again(home: str):
    image = photo(home)
    asked = {"methods": methods(home), "targets": TARGETS, "evaluate": home == "pooled", **EXACT}
    async with client(WorkerBackend(network(home, 5))) as alone:
        first = await alone.explain(image, **asked)
    expected = digests(first)
    assert len(set(expected)) > 0.7 * len(expected)  # some methods are the same for all classes
    preprocessing = SQUARE if home == "transformer" else PREPROCESSING
    engine = Engine(module(home), preprocessing=preprocessing, micro_batch=3)
    assert digests(engine.explain(image, **asked)) == expected
    async with client(WorkerBackend(network(home, 7)), step_queries=40, step_target_s=0.02) as busy:
        beside = ["eigen_cam"] if home == "transformer" else ["score_cam", "grad_cam"]
        others = [busy.explain(photo(home, 10 + seed), methods=beside) for seed in range(9)]
        others.append(busy.explain(image, methods=beside))
        *_, amid = await asyncio.gather(*others, busy.explain(image, **asked))
        assert digests(amid) == expected
        assert record(amid)["piece"] == 16
    workers = [Crashing(network(home, 3), 3), WorkerBackend(network(home, 4))]
    async with client(*workers, step_queries=20) as shards:
        sharded = await shards.explain(image, **asked)
    assert digests(sharded) == expected
    if home != "transformer":  # whose methods ask no queries
        assert all(worker.steps > 2 for worker in workers)  # of which one is a canary
    assert compare(record(first), record(sharded)).outcome is Outcome.EQUAL


async def test_without_evidence_maps_depend_on_the_batches():
    """Else the test above would show nothing."""
    home, found = "perceptron", []
    asked = {"methods": methods(home), "targets": TARGETS, "precision": "exact"}
    for micro_batch in (3, 7):
        async with client(WorkerBackend(network(home, micro_batch))) as server:
            answer = await server.explain(photo(home), **asked)
        assert not answer.evidence
        found.append(answer.maps)
    same = [np.array_equal(one.array, other.array) for one, other in zip(*found, strict=True)]
    assert sum(same) < len(same) / 2


async def test_what_was_asked_before_of_the_same_image_changes_nothing():
    """A worker remembers its passes, those beside others and those for other targets too."""
    home, image = "perceptron", photo("perceptron")
    asked = {"methods": ["grad_cam", ("group_cam", SMALL["group_cam"]), "layer_cam"], "targets": [3], **EXACT}
    async with client(WorkerBackend(network(home, 5))) as server:
        expected = digests(await server.explain(image, **asked))
    async with client(WorkerBackend(network(home, 5)), step_items=8) as server:
        await asyncio.gather(
            *(server.explain(one, ["grad_cam"], [3, 1]) for one in (photo(home, 2), image, photo(home, 3)))
        )
        await server.explain(image, **(asked | {"targets": [1, 3]}))
        assert digests(await server.explain(image, **asked)) == expected


async def test_a_worker_that_has_found_a_faster_runtime_makes_the_same_map():
    """It asks by PyTorch what others ask by ONNX Runtime, whose last bits are others."""
    pytest.importorskip("onnxruntime")
    image, found = png(picture(1)), []
    for runtime in ("eager", "onnx"):
        made = Network(build("pooled", 2), preprocessing=PREPROCESSING)
        tune(made, runtime)
        async with client(WorkerBackend(made)) as server:
            answer = await server.explain(image, ["grad_cam", "score_cam", "cam"], [3, 1], **EXACT)
            assert (await server.explain(image, precision="exact")).cost.runtime == runtime
        assert answer.cost.runtime == "eager"
        found.append(digests(answer))
    assert found[0] == found[1]


async def test_whatever_else_is_asked_is_another_map():
    home = "perceptron"
    rise = ("rise", {"masks": 40, "grid": 4, "seed": 5})
    async with client(WorkerBackend(network(home, 5))) as server:
        answer = await server.explain(photo(home), [rise], [3], **EXACT)
        again = await server.explain(photo(home), [rise], [3], **EXACT)
        assert digests(again) == digests(answer)
        other = [
            await server.explain(photo(home), [("rise", rise[1] | {"seed": 6})], [3], **EXACT),
            await server.explain(photo(home), [rise], [1], **EXACT),
            await server.explain(photo(home), ["score_cam"], [3], **EXACT),
            await server.explain(photo(home, 2), [rise], [3], **EXACT),
            await server.explain(photo(home), [rise], [3], layer="1.features.3", size="original", signed=True, **EXACT),
        ]
    async with client(WorkerBackend(network(home, 5, seed=3))) as server:
        other.append(await server.explain(photo(home), [rise], [3], **EXACT))
    assert not [one for one in other if digests(one) == digests(answer)]
    outcomes = [compare(record(answer), record(one)).outcome for one in other]
    assert outcomes == [Outcome.DIFFERENT] * 5 + [Outcome.OTHER_INPUT]


async def test_a_map_within_its_tolerance_is_made_of_the_same_queries():
    """However many were on their way when it was."""
    home = "perceptron"
    asked = {"methods": [("rise", {"masks": 800, "grid": 4, "tolerance": 0.6})], "targets": [3], **EXACT}
    fractions, found = set(), set()
    for settings in ({"step_queries": 16}, {"step_queries": 100, "steps_per_worker": 3}):
        async with client(WorkerBackend(network(home, 5)), **settings) as server:
            answer = await server.explain(photo(home), **asked)
        found.update(digests(answer))
        fractions.add(answer.maps[0].fraction)
    engine = Engine(module(home), preprocessing=PREPROCESSING)
    answer = engine.explain(photo(home), **asked)
    assert len(found | set(digests(answer))) == 1
    assert {round(fraction, 6) for fraction in fractions} == {round(answer.maps[0].fraction, 6)}  # float32 on the wire
    assert 0 < answer.maps[0].fraction < 1
    assert answer.maps[0].complete


async def test_targets_are_made_again_from_the_record_and_what_is_hidden_is_asked_for():
    home = "perceptron"
    engine = Engine(module(home), preprocessing=PREPROCESSING)
    targets = [Target(top_k=2), "finer:3", "against:1"]
    first = record(engine.explain(photo(home), ["grad_cam", "score_cam"], targets, **EXACT))
    again = record(engine.explain(photo(home), **request_options(first)))
    assert compare(first, again).outcome is Outcome.EQUAL
    with pytest.raises(InvalidOption, match="not the targets of the record"):
        request_options(first, [Target(index=2)])
    with pytest.raises(InvalidOption, match="without a text"):
        request_options(first, text="where?")
    places = nn.Sequential(module(home)[1].features, nn.Conv2d(20, 5, 1)).eval()
    segments = Engine(places, preprocessing=PREPROCESSING, outputs="segmentation")
    masked = Region(Target(index=2), mask=picture(3)[..., 0])
    first = record(segments.explain(photo(home), ["score_cam"], [masked], **EXACT))
    assert first["targets"][0]["region"]["mask"].keys() == {"sha256", "bytes"}
    with pytest.raises(InvalidOption, match="give all targets"):
        request_options(first)
    again = record(segments.explain(photo(home), **request_options(first, [masked])))
    assert compare(first, again).outcome is Outcome.EQUAL


def changed(found: dict[str, Any], **values: Any) -> dict[str, Any]:
    return {**found, **values}


def test_what_need_not_be_equal_says_why():
    engine = Engine(module("perceptron"), preprocessing=PREPROCESSING)
    found = record(engine.explain(photo("perceptron"), ["grad_cam"], [3], **EXACT))
    (saliency,) = found["maps"]
    other = changed(found, maps=[saliency | {"sha256": "0" * 64}])
    assert compare(found, other).outcome is Outcome.DIFFERENT
    assert compare(found, other).lines == ("map 0 (grad_cam, class 3) is another one",)
    assert compare(found, changed(found, maps=[])).outcome is Outcome.DIFFERENT
    assert compare(found, changed(found, maps=[saliency, saliency])).outcome is Outcome.DIFFERENT
    for before, said in (
        (changed(found, piece=0, precision={"asked": "auto", "used": "exact"}), "precision auto was asked"),
        (changed(found, maps=[saliency | {"complete": False}]), "some of the queries"),
        (changed(found, workers=[found["workers"][0] | {"torch": "1.0"}]), "workers had torch 1.0"),
        (changed(found, gateway=found["gateway"] | {"numpy": "1.0"}), "gateway had numpy 1.0"),
    ):
        compared = compare(before, other)
        assert compared.outcome is Outcome.NOT_EXPECTED
        assert said in compared.lines[-1]
        assert compare(before, changed(found, maps=before["maps"])).outcome is Outcome.EQUAL  # it may be, all the same


def test_the_command_replays_without_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CAMSERVE_RUNTIME", "eager")
    source = "camserve.evaluation.digits.networks:DigitsNet"
    build_archive(source, name="digits", store=tmp_path, preprocessing=DIGITS)
    image, written = tmp_path / "scene.png", tmp_path / "record.json"
    image.write_bytes(png(picture(1, 64, 64)))
    local = ("--local", "--store", str(tmp_path))
    asked = ("--method", "rise:masks=20", "--precision", "exact", "--model", "digits", "--evidence", str(written))
    found = CliRunner().invoke(camserve, ["explain", str(image), *asked, *local, "--out", str(tmp_path)])
    assert found.exit_code == 0, found.output
    assert parsed(written.read_bytes().strip())["methods"][0]["parameters"]["masks"] == 20
    found = CliRunner().invoke(camserve, ["evidence", "replay", str(written), str(image), *local])
    assert (found.exit_code, found.output) == (0, "1 maps are equal to those of the record, bit by bit\n")
    (tmp_path / "several").mkdir()
    image.rename(tmp_path / "several" / "scene.png")
    asked = (*asked[:-1], str(tmp_path / "log.jsonl"), *local, "--out", str(tmp_path / "maps"))
    found = CliRunner().invoke(camserve, ["explain", str(tmp_path / "several"), *asked])
    assert found.exit_code == 0, found.output
    again = [str(tmp_path / "log.jsonl"), str(tmp_path / "several" / "scene.png"), "--number", "1"]
    found = CliRunner().invoke(camserve, ["evidence", "replay", *again, *local])
    assert (found.exit_code, found.output) == (0, "1 maps are equal to those of the record, bit by bit\n")


async def test_the_command_replays_against_a_server(tmp_path: Path):
    home = "perceptron"
    (tmp_path / "cat.png").write_bytes(photo(home))
    (tmp_path / "dog.png").write_bytes(photo(home, 2))
    written = tmp_path / "record.json"
    pool = fixed({"here": WorkerBackend(network(home, 5))})
    others = fixed({"there": WorkerBackend(network(home, 5, seed=3))})
    async with Gateway(Settings(**QUICK), pool) as gateway, Gateway(Settings(**QUICK), others) as other:
        await gateway.wait_ready(30)
        await other.wait_ready(30)

        async def run(*arguments: str, address: str = gateway.address) -> tuple[int, str]:
            words = [*arguments, "--address", address]
            found = await asyncio.to_thread(CliRunner().invoke, camserve, words)
            return found.exit_code, found.output

        image = str(tmp_path / "cat.png")
        asked = ("--method", "score_cam", "--target", "3", "--precision", "exact", "--evidence", str(written))
        code, _ = await run("explain", image, *asked, "--out", str(tmp_path))
        assert code == 0
        replay = ("evidence", "replay", str(written))
        assert await run(*replay, image) == (0, "1 maps are equal to those of the record, bit by bit\n")
        code, text = await run(*replay, str(tmp_path / "dog.png"))
        assert (code, "another image" in text) == (3, True)
        code, text = await run(*replay, image, address=other.address)
        assert (code, "other weights" in text) == (3, True)
        found = json.loads(written.read_text())
        found["maps"][0]["sha256"] = "0" * 64
        written.write_text(json.dumps(found))
        assert await run(*replay, image) == (1, "map 0 (score_cam, class 3) is another one\n")
        found["workers"][0]["processor"] = "another"
        written.write_text(json.dumps(found))
        code, text = await run(*replay, image)
        assert (code, "workers had processor another" in text) == (4, True)

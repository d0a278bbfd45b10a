"""Measures the whole service on this machine: TorchServe, the gateway and clients over gRPC on loopback.

    python benchmarks/serving.py           # results/serving-cpu.json, and the tables as Markdown
    python benchmarks/serving.py --quick   # few requests: does it run?
    python benchmarks/serving.py --only latency --out benchmarks/results/serving-latency-cpu.json
    python benchmarks/serving.py --render  # the README's table of latencies from the latter file, at once

overhead    Grad-CAM of photos of 150 KB and of 5 MB over gRPC, and in the engine without a service, in turns, nothing
            else running: what the way through gateway and TorchServe adds, by stage.
latency     Grad-CAM alone, beside a steady Score-CAM load, and beside the same load with sharing switched off: each
            request then goes out whole, in one step.
throughput  Group-CAMs of 8 clients at once, one after another, and in the engine without a service.
deadline    when a partial answer, and when the server's DEADLINE_EXCEEDED arrives, against the deadline, while
            Score-CAMs run.
cancel      masked queries sent for a Score-CAM after its client has gone, in steps' worth.
workers     one Score-CAM on one worker of one thread, and on two.
mix         how long steps take against their target while methods of unlike cost run side by side, after the first ten
            steps of each kind of work; and a SS-CAM of 1000 samples, which has to end, in many steps.
beside      Grad-CAM beside each of these methods.
image       bytes of a 5 MB photo that travel to the worker for one Score-CAM.
steps       a Grad-CAM in steps of one photo and of four, without a service: files of a step are decoded side by side.
decoding    a photo decoded before passes of masked queries, as it is, and beside them, without a service.

The photos are scikit-image's, enlarged and with a grain like a camera's, as JPEGs of 150 KB (1.2 megapixels) and 5 MB
(12 megapixels). Each has another grain, so that nothing is remembered.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import contextlib
import json
import math
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from PIL import Image
from skimage.data import chelsea, coffee

from camserve import Engine
from camserve.archive import build_archive
from camserve.client import AsyncClient
from camserve.errors import DeadlineExceeded
from camserve.gateway.ops.settings import CPU_STEP_S, Settings
from camserve.gateway.pool.discovery import fixed
from camserve.gateway.pool.torchserve import TorchServeBackend
from camserve.gateway.server import Gateway
from camserve.images import digest, seen, size_bytes
from camserve.methods import GradCam
from camserve.runtimes.modes import exact_float32
from camserve.runtimes.threads import one_thread
from camserve.supervisor import TorchServe, WorkerSettings
from camserve.types import Item, StepResult, Task
from camserve.worker.executor import MEMORY_BYTES, Executor

MODEL = "lite0"
SCORE_LAYER = "_blocks.10"
"""Layer of 112 channels: a Score-CAM of about one second."""
WHOLE_S = 10.0
"""Target time of a step that is longer than any request of this program, so that each goes out whole."""
TARGET_S = CPU_STEP_S
LATENCY_S = 0.25
"""Seconds that the p99 of a Grad-CAM beside Score-CAMs may be at most, whatever it is alone."""
SMALL = "150 KB"


def jpeg(array: np.ndarray, quality: int = 90) -> bytes:
    file = BytesIO()
    Image.fromarray(array).save(file, "JPEG", quality=quality)
    return file.getvalue()


CAT, COFFEE = jpeg(chelsea()), jpeg(coffee())


@dataclass(frozen=True)
class Camera:
    """Makes photos of about one size of file."""

    file_bytes: int
    size_px: tuple[int, int]
    """(width, height)."""
    grain: float
    """Standard deviation of the noise, of 255."""

    def photos(self, number: int) -> list[bytes]:
        """Returns JPEGs of the same scene, each with a grain of its own."""
        chance, scene = np.random.default_rng(0), np.asarray(Image.fromarray(coffee()).resize(self.size_px), np.float32)

        def grainy() -> np.ndarray:
            return (scene + self.grain * chance.standard_normal(scene.shape, np.float32)).clip(0, 255).astype(np.uint8)

        first = grainy()
        quality = bisect.bisect_left(range(1, 96), self.file_bytes, key=lambda quality: len(jpeg(first, quality)))
        return [jpeg(grainy(), quality) for _ in range(number)]


CAMERAS = {"150 KB": Camera(150_000, (1280, 960), 3.0), "5 MB": Camera(5_000_000, (4000, 3000), 8.0)}


MIX: Mapping[str, dict[str, Any]] = {
    "SS-CAM (35 samples)": {"methods": [("ss_cam", {"samples": 35})], "layer": SCORE_LAYER},
    "IS-CAM": {"methods": ["is_cam"], "layer": SCORE_LAYER},
    "SmoothGrad (50 samples)": {"methods": [("smooth_grad", {"samples": 50})]},
    "Ablation-CAM": {"methods": ["ablation_cam"], "layer": SCORE_LAYER},
    "Score-CAM": {"methods": ["score_cam"], "layer": SCORE_LAYER},
    "curves": {"methods": ["grad_cam"], "evaluate": True},
}
"""Methods of unlike cost, by what they are called in the tables."""
LEARNING = 10
"""Steps of each kind of work that do not count: its cost is being learnt."""


class Recorder:
    """A TorchServe whose steps are written down: kinds of work, images sent, seconds that the worker was busy."""

    def __init__(self, torchserve: TorchServeBackend) -> None:
        self._torchserve = torchserve
        self.steps: list[tuple[Sequence[str], float]] = []
        self.image_bytes = 0

    async def step(self, model: str, items: Sequence[Item], timeout_s: float) -> StepResult:
        result = await self._torchserve.step(model, items, timeout_s)
        self.steps.append((tuple(result.made), sum(result.stage_seconds.values())))
        self.image_bytes += sum(size_bytes(item.image) for item in items if item.image is not None)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._torchserve, name)


@dataclass(frozen=True)
class Service:
    gateway: Gateway
    client: AsyncClient
    recorder: Recorder

    def planned(self) -> Any:
        return self.gateway.registry.get(MODEL).dispatcher.planner.counts()


@asynccontextmanager
async def serving(store: Path, workers: int = 1, threads: int | None = None, **settings: Any) -> AsyncIterator[Service]:
    """Yields the service with warm workers, whose step cost is learnt."""
    torchserve = TorchServe(
        WorkerSettings(store=store, models=(MODEL,), workers=workers, threads=threads).on_free_ports()
    )
    await torchserve.start()
    try:
        host, grpc_port, management_port = torchserve.backend.rsplit(":", 2)
        recorder = Recorder(TorchServeBackend(f"{host}:{grpc_port}", f"http://{host}:{management_port}"))
        options = {"listen": "127.0.0.1:0", "metrics_listen": "127.0.0.1:0", "step_target_s": TARGET_S, **settings}
        async with (
            Gateway(Settings(**options), fixed({"torchserve": recorder})) as gateway,
            AsyncClient(gateway.address) as client,
        ):
            await gateway.wait_ready(120)
            service = Service(gateway, client, recorder)
            for _ in range(3):
                await asyncio.gather(*(score_cam(service) for _ in range(workers)))
                await service.client.explain(CAT)
            yield service
    finally:
        await torchserve.stop()


async def score_cam(service: Service, **options: Any) -> Any:
    return await service.client.explain(COFFEE, ["score_cam"], layer=SCORE_LAYER, timeout_s=60.0, **options)


@asynccontextmanager
async def load(service: Service, **asked: Any) -> AsyncIterator[None]:
    """Runs two clients that ask the same (a Score-CAM) one after another, so that there is always work."""

    async def forever() -> None:
        while True:
            await service.client.explain(COFFEE, timeout_s=600.0, **(asked or MIX["Score-CAM"]))

    tasks = [asyncio.create_task(forever()) for _ in range(2)]
    await asyncio.sleep(1.0)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def grad_cams(service: Service, number: int) -> list[float]:
    """Returns the seconds of Grad-CAMs, asked one after another at irregular times."""
    chance, seconds = np.random.default_rng(0), []
    for _ in range(number):
        await asyncio.sleep(chance.uniform(0.0, 0.2))
        began_s = time.perf_counter()
        await service.client.explain(CAT)
        seconds.append(time.perf_counter() - began_s)
    return seconds


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "p50_s": statistics.median(ordered),
        "p99_s": ordered[math.ceil(0.99 * len(ordered)) - 1],
        "max_s": ordered[-1],
        "requests": len(ordered),
    }


async def overhead(store: Path, number: int) -> dict[str, Any]:
    """Measures Grad-CAMs of photos that nobody has seen, over gRPC and in the engine, which take turns."""
    engine = Engine.load(MODEL, store, device="cpu")
    found: dict[str, Any] = {}
    async with serving(store) as service:
        for name, camera in CAMERAS.items():
            photos = camera.photos(3 + (number if name == SMALL else max(1, number // 5)))
            seconds: dict[str, list[float]] = {"gRPC": [], "engine": []}
            stages: Counter[str] = Counter()
            for turn, photo in enumerate(photos):
                began_s = time.perf_counter()
                answer = await service.client.explain(photo)
                answered_s = time.perf_counter()
                engine.explain(photo)
                if turn >= 3:  # the first ones warm up
                    seconds["gRPC"].append(answered_s - began_s)
                    seconds["engine"].append(time.perf_counter() - answered_s)
                    stages.update(answer.cost.stage_seconds)
            found[name] = {
                "photo_bytes": statistics.mean(map(len, photos)),
                "sent_bytes": answer.cost.image_bytes,
                **{way: quantiles(taken) for way, taken in seconds.items()},
                "mean_stage_s": {stage: total / len(seconds["gRPC"]) for stage, total in stages.items()},
                "added_p50_s": statistics.median(seconds["gRPC"]) - statistics.median(seconds["engine"]),
            }
    added_s = found[SMALL]["added_p50_s"]
    return {"photos": found, "goal": {"added_p50_s": added_s, "wanted": 0.01, "met": added_s <= 0.01}}


async def latency(store: Path, number: int) -> dict[str, Any]:
    found = {}
    async with serving(store) as service:
        found["alone"] = quantiles(await grad_cams(service, number))
        async with load(service):
            found["beside Score-CAMs"] = quantiles(await grad_cams(service, number))
    whole = {"step_target_s": WHOLE_S, "step_queries": 100_000, "step_share": 1.0, "steps_per_worker": 1}
    async with serving(store, **whole) as service, load(service):
        found["beside Score-CAMs, sharing off"] = quantiles(await grad_cams(service, max(5, number // 3)))
    allowed_s = min(found["alone"]["p99_s"] + 2 * TARGET_S, LATENCY_S)
    p99_s = found["beside Score-CAMs"]["p99_s"]
    return {"cases": found, "goal": {"p99_s": p99_s, "wanted": allowed_s, "met": p99_s <= allowed_s}}


async def throughput(store: Path, rounds: int) -> dict[str, Any]:
    """Measures masked queries per second of the same requests; the ways take turns."""
    images = CAMERAS[SMALL].photos(8)
    engine = Engine.load(MODEL, store, device="cpu")
    found: dict[str, list[float]] = {"8 clients at once": [], "one after another": [], "engine alone": []}
    async with serving(store) as service:

        async def at_once() -> int:
            answers = await asyncio.gather(*(service.client.explain(image, ["group_cam"]) for image in images))
            return sum(answer.cost.queries for answer in answers)

        async def in_turn() -> int:
            return sum([(await service.client.explain(image, ["group_cam"])).cost.queries for image in images])

        async def alone() -> int:
            return sum(engine.explain(image, ["group_cam"]).cost.queries for image in images)

        ways = dict(zip(found, (at_once, in_turn, alone), strict=True))
        for turn in range(rounds + 1):
            for name, way in ways.items():
                began_s = time.perf_counter()
                await way()
                if turn:  # the first one warms up
                    found[name].append(len(images) * 32 / (time.perf_counter() - began_s))
    rates = {name: statistics.median(some) for name, some in found.items()}
    ratio = rates["8 clients at once"] / rates["engine alone"]
    return {
        "queries_per_s": rates,
        "rounds": rounds,
        "goal": {"of_the_engine": ratio, "wanted": 0.95, "met": ratio >= 0.95},
    }


async def deadline(store: Path, number: int) -> dict[str, Any]:
    """Measures how long before the deadline (negative: after) a partial answer, or the server's refusal, arrives."""
    partial_s, exceeded_s = [], []
    allowed_s = 1.0
    urgent: dict[str, Any] = {"methods": ["score_cam"], "priority": "interactive"}
    async with serving(store) as service, load(service):
        for _ in range(number):
            began_s = time.perf_counter()
            with contextlib.suppress(Exception):
                answer = await service.client.explain(CAT, allow_partial=True, timeout_s=allowed_s, **urgent)
                assert not answer.maps[0].complete
                partial_s.append(allowed_s - (time.perf_counter() - began_s))
    # The server's own deadline: a client's would end the call in the client.
    async with serving(store, default_deadline_s=allowed_s) as service, load(service):
        for _ in range(number):
            began_s = time.perf_counter()
            with contextlib.suppress(DeadlineExceeded):
                await service.client.explain(CAT, **urgent)
                raise AssertionError("it was to take longer")
            exceeded_s.append(allowed_s - (time.perf_counter() - began_s))
    answers = {"partial answer": partial_s, "DEADLINE_EXCEEDED": exceeded_s}
    worst_s = max(abs(second) for seconds in answers.values() for second in seconds)
    all_answered = len(partial_s) == len(exceeded_s) == number
    return {
        "asked_of_each": number,
        "before_deadline_s": {
            name: {"median": statistics.median(early), "least": min(early), "most": max(early), "answers": len(early)}
            for name, early in answers.items()
        },
        "goal": {
            "within_s": worst_s,
            "wanted": 0.025,
            "met": all_answered and worst_s <= 0.025,
        },
    }


async def cancel(store: Path, rounds: int) -> dict[str, Any]:
    """Cancels one of three Score-CAMs, and counts the queries sent for it after that, in steps' worth."""
    spent = []
    async with serving(store) as service:
        for _ in range(rounds):
            calls = [asyncio.create_task(score_cam(service)) for _ in range(3)]
            await asyncio.sleep(0.5)
            before = service.planned()
            calls[1].cancel()
            others = await asyncio.gather(calls[0], calls[2])
            assert all(answer.maps[0].complete for answer in others)
            after = service.planned()
            spent.append({"in_flight": before.in_flight, "cancelled": after.cancelled - before.cancelled})
        (found,) = service.gateway.metrics.step_queries.collect()
        total = {
            sample.name.rpartition("_")[2]: sample.value for sample in found.samples if not sample.labels.get("le")
        }
        steps = total["sum"] / max(1, total["count"])
    return {"rounds": spent, "queries_of_a_step": steps}


async def workers(store: Path, rounds: int) -> dict[str, Any]:
    """Measures the seconds of one Score-CAM on one worker and on two."""
    found = {}
    for number in (1, 2):
        async with serving(store, workers=number, threads=1) as service:
            seconds = []
            for _ in range(rounds):
                began_s = time.perf_counter()
                await score_cam(service)
                seconds.append(time.perf_counter() - began_s)
            found[f"{number} workers"] = statistics.median(seconds)
    ratio = found["2 workers"] / found["1 workers"]
    return {"median_s": found, "rounds": rounds, "goal": {"ratio": ratio, "wanted": 0.55, "met": ratio <= 0.55}}


async def mix(store: Path, rounds: int) -> dict[str, Any]:
    """Seconds of steps in proportion to their target, while all methods of the mix run side by side."""
    async with serving(store) as service:
        first = len(service.recorder.steps)

        async def again(asked: Mapping[str, Any]) -> None:
            for _ in range(rounds):
                await service.client.explain(COFFEE, timeout_s=3600.0, **asked)

        await asyncio.gather(*map(again, MIX.values()))
        seen, ratios = Counter[str](), []
        for kinds, seconds in service.recorder.steps[first:]:
            if all(seen[kind] >= LEARNING for kind in kinds):
                ratios.append(seconds / TARGET_S)
            seen.update(kinds)
        first = len(service.recorder.steps)
        long = await service.client.explain(
            CAT, [("ss_cam", {"samples": 1000 if rounds > 1 else 20})], layer="_blocks.0", timeout_s=3600.0
        )
        longest = {"queries": long.cost.queries, "steps": long.cost.steps}
        longest["worst_step_s"] = max(seconds for _, seconds in service.recorder.steps[first:])
    within = sum(ratio <= 2.0 for ratio in ratios) / len(ratios)
    ordered = sorted(ratios)
    return {
        "steps": len(ratios),
        "of_target": {name: ordered[min(len(ordered) - 1, int(part * len(ordered)))] for name, part in QUANTILES},
        "kinds": dict(seen),
        "ss_cam_of_1000_samples": longest,
        "goal": {"within_two_targets": within, "wanted": 0.95, "met": within >= 0.95},
    }


QUANTILES = (("p50", 0.5), ("p95", 0.95), ("p99", 0.99), ("max", 1.0))


async def beside(store: Path, number: int) -> dict[str, Any]:
    """Grad-CAM beside each method of the mix, against Grad-CAM alone in the same run."""
    async with serving(store) as service:
        alone = quantiles(await grad_cams(service, number))
        cases = {}
        for name, asked in MIX.items():
            async with load(service, **asked):
                cases[name] = quantiles(await grad_cams(service, number))
    worst_s = max(case["p99_s"] for case in cases.values())
    allowed_s = alone["p99_s"] + 2 * TARGET_S
    goal = {"worst_p99_s": worst_s, "wanted": allowed_s, "met": worst_s <= allowed_s}
    return {"alone": alone, "cases": cases, "goal": goal}


async def image(store: Path, rounds: int) -> dict[str, Any]:
    """Bytes of a photo's file that travel to the only worker for one Score-CAM, in proportion to its size."""
    (photo,) = CAMERAS["5 MB"].photos(1)
    async with serving(store) as service:
        before = service.recorder.image_bytes
        answer = await service.client.explain(photo, ["score_cam"], layer=SCORE_LAYER, timeout_s=600.0)
        sent = service.recorder.image_bytes - before
    ratio = sent / len(photo)
    goal = {"of_its_size": ratio, "wanted": 1.1, "met": ratio <= 1.1}
    return {"photo_bytes": len(photo), "sent_bytes": sent, "steps": answer.cost.steps, "goal": goal}


async def steps(store: Path, rounds: int) -> dict[str, Any]:
    """Measures the seconds of a Grad-CAM in a step of one photo that is not remembered, and in one of four."""
    executor = Executor(Engine.load(MODEL, store).network, MEMORY_BYTES)
    found = {}
    for name, camera in CAMERAS.items():
        photos = iter(camera.photos((1 + rounds) * sum(STEPS)))

        def step(size: int, photos: Iterator[bytes] = photos) -> None:
            some = [next(photos) for _ in range(size)]
            executor.execute([Item(photo, (), (Task(0, GradCam(), 0, 0),), digest=digest(photo)) for photo in some])

        seconds = common.in_turns({str(size): partial(step, size) for size in STEPS}, rounds, torch.device("cpu"))
        found[name] = {size: statistics.median(taken) / int(size) for size, taken in seconds.items()}
    return {"photos": found}


STEPS = (1, 4)
"""Photos of a step."""


async def decoding(store: Path, rounds: int) -> dict[str, Any]:
    """Measures the seconds of decoding a photo and of some passes, one after the other and at the same time."""
    network = Engine.load(MODEL, store).network
    preprocessing, size = network.preprocessing, network.micro_batch
    x = network.normalise(torch.rand(size, *preprocessing.crop_px, preprocessing.channels))
    threads = one_thread() if network.runtime.own_threads else contextlib.nullcontext()
    found: dict[str, Any] = {}
    with ThreadPoolExecutor(1) as pool, network.evaluating(), exact_float32(), threads, torch.inference_mode():

        def ask(passes: int) -> None:
            for _ in range(passes):
                network.scores(x, "exact")

        def before(photo: bytes, passes: int) -> None:
            seen(photo, preprocessing, False)
            ask(passes)

        def beside(photo: bytes, passes: int) -> None:
            decoded = pool.submit(seen, photo, preprocessing, False)
            ask(passes)
            decoded.result()

        for name, camera in CAMERAS.items():
            (photo,) = camera.photos(1)
            for passes in PASSES:
                cases = {each.__name__: partial(each, photo, passes) for each in (before, beside)}
                seconds = common.in_turns(cases, rounds, torch.device("cpu"))
                found[f"{name}, {passes}"] = {each: statistics.median(taken) for each, taken in seconds.items()}
    return {"queries_of_a_pass": size, "files": found}


PASSES = (4, 16)
"""Passes of masked queries, before or beside which a file is decoded."""


WAYS = {
    "overhead": (overhead, 100, 2),
    "latency": (latency, 150, 5),
    "throughput": (throughput, 5, 1),
    "deadline": (deadline, 20, 2),
    "cancel": (cancel, 5, 1),
    "workers": (workers, 5, 1),
    "mix": (mix, 2, 1),
    "beside": (beside, 100, 3),
    "image": (image, 1, 1),
    "steps": (steps, 5, 1),
    "decoding": (decoding, 10, 1),
}
"""What is measured, how often, and how often for a quick look."""


README_RESULTS = Path(__file__).parent / "results" / "serving-latency-cpu.json"
"""Figures of the README's table, made by `--only latency --out` of this file: a machine is easier to keep quiet for the
four minutes that latencies take than for the twenty of all."""


async def measure(store: Path, quick: bool, only: Sequence[str]) -> dict[str, Any]:
    return {name: await way(store, few if quick else many) for name, (way, many, few) in WAYS.items() if name in only}


def latencies(content: Mapping[str, Any]) -> str:
    """Returns the README's table."""
    lines = ["| Grad-CAM | p50 | p99 |", "| --- | ---: | ---: |"]
    for name, case in content["results"]["latency"]["cases"].items():
        lines.append(f"| {name} | {1000 * case['p50_s']:.0f} ms | {1000 * case['p99_s']:.0f} ms |")
    machine = content["environment"]
    caption = f"{machine['cpu']}, {machine['cpu_cores']} cores, `{MODEL}`, steps of {content['step_target_s']} s"
    commit, changes, _ = machine["commit"].partition("+")
    return "\n".join([*lines, "", f"{caption}; commit {commit[:12]}{' with changes' if changes else ''}."])


def report(content: Mapping[str, Any]) -> str:
    """Returns the figures as Markdown."""
    results = content["results"]
    lines = [latencies(content)] if "latency" in results else []
    if "throughput" in results:
        lines += ["", "| Group-CAM, 8 requests | masked queries per second |", "| --- | ---: |"]
        lines += [f"| {name} | {rate:.1f} |" for name, rate in results["throughput"]["queries_per_s"].items()]
    if "overhead" in results:
        lines += ["", overheads(results["overhead"])]
    if "steps" in results:
        lines += ["", "| Grad-CAM of a photo | in a step of 1 | in a step of 4 |", "| --- | ---: | ---: |"]
        for name, row in results["steps"]["photos"].items():
            lines.append(f"| {name} | " + " | ".join(f"{1000 * row[str(size)]:.1f} ms" for size in STEPS) + " |")
    if "decoding" in results:
        lines += ["", "| file, passes | decoded before | decoded beside |", "| --- | ---: | ---: |"]
        for name, row in results["decoding"]["files"].items():
            lines.append(f"| {name} | {1000 * row['before']:.0f} ms | {1000 * row['beside']:.0f} ms |")
    lines += ["", "| goal | figure | wanted | met |", "| --- | ---: | ---: | --- |"]
    for name, result in results.items():
        if (goal := result.get("goal")) is None:
            continue
        what, figure = next(iter(goal.items()))
        lines.append(
            f"| {name}: {what.replace('_', ' ')} | {figure:.3f} | {goal['wanted']:.3f} | "
            f"{'yes' if goal['met'] else '**no**'} |"
        )
    return "\n".join(lines)


def overheads(result: Mapping[str, Any]) -> str:
    """Returns the table of the way through the service."""
    lines = ["| Grad-CAM, idle | gRPC p50 | engine p50 | added | stages, mean |", "| --- | ---: | ---: | ---: | --- |"]
    for name, row in result["photos"].items():
        seconds = (row["gRPC"]["p50_s"], row["engine"]["p50_s"], row["added_p50_s"])
        stages = ", ".join(f"{stage} {1000 * each:.1f}" for stage, each in row["mean_stage_s"].items())
        cells = [f"photo of {name}", *(f"{1000 * each:.1f} ms" for each in seconds), f"{stages} ms"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few requests: does it run?")
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS), help="measure these; give an --out then")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "serving-cpu.json")
    parser.add_argument(
        "--render", action="store_true", help="only write the README's table, from results/serving-latency-cpu.json"
    )
    given = parser.parse_args()
    if given.render:
        content = json.loads(README_RESULTS.read_text())
        common.README.write_text(common.embedded(common.README.read_text(), "latency", latencies(content)))
        return
    with tempfile.TemporaryDirectory() as folder:
        build_archive("efficientnet-lite0", name=MODEL, store=Path(folder))
        results = asyncio.run(measure(Path(folder), given.quick, given.only))
    content = {
        "environment": common.environment(torch.device("cpu")),
        "quick": given.quick,
        "step_target_s": TARGET_S,
        "results": results,
    }
    common.write(given.out, content)
    print(report(content))
    print(f"written to {given.out}")


if __name__ == "__main__":
    main()

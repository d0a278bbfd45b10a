"""Attacks a real gateway and a real `camserve serve` on loopback, and measures what others notice of it.

    python benchmarks/hostile.py                     # results/hostile-cpu.json, and the table of docs/security.md
    python benchmarks/hostile.py --server serve      # one kind of server alone, in place of its former figures
    python benchmarks/hostile.py --only "16 MiB"     # the attacks whose names have this in them; writes no file
    python benchmarks/hostile.py --quick --only NAME # short pauses: does it run?
    python benchmarks/hostile.py --render            # the table from the JSON, at once

For each attack of `hostile_attacks.py` it tells what the attacker sent and got, the longest wait of a health check that
was asked every 20 ms, the server's peak memory, and what became of a second client, who asks for a Grad-CAM every
200 ms and for a Score-CAM (of a real worker a small Group-CAM) every second. Attacker and clients are processes of
their own. The gateway stands in front of `fake_torchserve.py`, whose steps take the time of real ones; where a worker
is attacked, everything is real.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import grpc
import numpy as np
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hostile_attacks import ARCHIVES, ATTACKS, EXPLAIN, SCORE, Target, ask

from camserve.archive import load_package
from camserve.errors import CamserveError
from camserve.gateway.api.access import new_token
from camserve.gateway.ops.settings import CPU_STEP_S
from camserve.v1 import explain_pb2 as pb

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "hostile-cpu.json"
SECURITY = common.ROOT / "docs" / "security.md"
KINDS = ("gateway", "broken", "serve")
"""Kinds of servers; see `serving`."""
HEALTH_S, GRAD_S, SCORE_S = 0.02, 0.2, 1.0
"""Seconds between two health checks, Grad-CAMs and Score-CAMs."""
QUIET_S = 10.0
"""Seconds for which the clients are watched before anything is attacked."""
AFTER_S = 2.0
"""Seconds after an attack that still count to it: its end may cost as well."""
QUICK = 0.1
"""Part of these seconds where it is only tried whether the program runs."""
LONGEST_S = 90.0
"""Seconds after which an attack is given up."""
TOLERATED_S = 0.1
"""Seconds that a health check may wait, and a Grad-CAM take beyond what it takes alone and two steps."""
MASKED = "masked"
"""What the second client's maps of masked queries are called: Score-CAMs, or Group-CAMs of a real worker."""
SMALL_GROUP = pb.MethodSpec(group_cam={"groups": 8})
SLOW = 20.0
"""Times the seconds of the fake's table: a masked query then takes 2 ms."""


# The processes


@dataclass
class Server:
    """A server that is attacked."""

    process: subprocess.Popen[str]
    address: str
    metrics_address: str
    kind: str

    def peak_mb(self) -> float:
        """Returns the peaks of the resident memory of the server's processes since `forget_peak`, added up."""
        return sum(_peak_kb(pid) for pid in self._pids()) / 1000

    def forget_peak(self) -> None:
        """Begins to look for the peak anew."""
        for pid in self._pids():
            with contextlib.suppress(OSError):
                Path(f"/proc/{pid}/clear_refs").write_text("5")

    def _pids(self) -> list[int]:
        """Returns the process of the server and those below it."""
        found = [self.process.pid]
        for pid in found:
            for children in Path(f"/proc/{pid}/task").glob("*/children"):  # each thread has its own
                with contextlib.suppress(OSError):
                    found += map(int, children.read_text().split())
        return found


def _peak_kb(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) if "VmHWM" in status else 0


@contextmanager
def running(command: Sequence[str | Path], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Runs a process as long as the block runs."""
    process = subprocess.Popen(list(map(str, command)), text=True, **options)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def serving(kind: str, folder: Path) -> Iterator[Server]:
    """Runs what is attacked.

    That is the gateway in front of a fake TorchServe ("gateway"), or of three of which one fails each step ("broken"),
    or everything ("serve").
    """
    tokens = folder / "tokens.toml"
    settings = {
        "CAMSERVE_TOKENS": str(tokens),
        "CAMSERVE_LISTEN": "127.0.0.1:0",
        "CAMSERVE_METRICS_LISTEN": "127.0.0.1:0",
        "CAMSERVE_LOG_FORMAT": "json",
    }
    camserve = Path(sys.executable).parent / "camserve"
    with contextlib.ExitStack() as stack:
        if kind != "serve":
            backends = [_fake()] if kind == "gateway" else [_fake(), _fake(), _fake("--broken")]
            settings["CAMSERVE_UPSTREAMS"] = ",".join(_address(stack.enter_context(each)) for each in backends)
            command: list[str | Path] = [camserve, "gateway"]
        else:
            command = [camserve, "serve"]
        log = stack.enter_context((folder / f"{kind}.log").open("w"))
        process = stack.enter_context(running(command, stderr=log, env=os.environ | settings))
        addresses = _addresses(process, folder / f"{kind}.log")
        yield Server(process, *addresses, kind)


def _fake(*options: str) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
    command = [sys.executable, HERE / "fake_torchserve.py", "--slow", str(SLOW), *options]
    return running(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def _address(fake: subprocess.Popen[str]) -> str:
    assert fake.stdout is not None
    return fake.stdout.readline().strip()


def _addresses(process: subprocess.Popen[str], log: Path) -> tuple[str, str]:
    """Returns where a server serves calls and metrics, as its log tells."""
    until_s = time.monotonic() + 180
    while time.monotonic() < until_s:
        if process.poll() is not None:
            raise RuntimeError(log.read_text()[-2000:])
        if found := re.search(r"gRPC on ([\w.:]+) .*?metrics on ([\w.:]+)", log.read_text()):
            return found[1], found[2]
        time.sleep(0.1)
    raise RuntimeError(f"no server after 180 s: {log.read_text()[-2000:]}")


# The second client


@dataclass(frozen=True)
class Seen:
    """An answer that the second client got: what it asked, when, how long it took, and the status."""

    what: str
    at_s: float
    took_s: float
    code: str


async def observe(address: str, token: str, kind: str) -> None:
    """Asks for ever; prints one line of JSON for each answer.

    A real worker of two cores cannot make a Score-CAM every second: it is asked for small Group-CAMs.
    """
    channel = grpc.aio.insecure_channel(address)
    health = health_pb2_grpc.HealthStub(channel)
    photo = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    image = _png(photo)
    explain = channel.unary_unary(EXPLAIN, None, None)
    masked = SMALL_GROUP if kind == "serve" else SCORE
    metadata = [("authorization", f"Bearer {token}")]
    calls = {
        "health": (HEALTH_S, lambda: health.Check(health_pb2.HealthCheckRequest(), timeout=60)),
        "Grad-CAM": (GRAD_S, lambda: explain(ask(image=image), timeout=60, metadata=metadata)),
        MASKED: (SCORE_S, lambda: explain(ask(masked, image=image), timeout=60, metadata=metadata)),
    }

    async def one(what: str, call: Any) -> None:
        at_s, began_s, code = time.time(), time.perf_counter(), "OK"
        try:
            await call()
        except grpc.aio.AioRpcError as error:
            code = f"{error.code().name}: {error.details()}"[:200]
        print(json.dumps([what, at_s, time.perf_counter() - began_s, code]), flush=True)

    async def regularly(what: str, every_s: float, call: Any) -> None:
        tasks: set[asyncio.Task[None]] = set()
        next_s = time.perf_counter()
        while True:
            task = asyncio.create_task(one(what, call))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            next_s = max(next_s + every_s, time.perf_counter() - every_s)
            await asyncio.sleep(max(0.0, next_s - time.perf_counter()))

    await asyncio.gather(*(regularly(what, every_s, call) for what, (every_s, call) in calls.items()))


def _png(pixels: np.ndarray) -> bytes:
    from io import BytesIO

    from PIL import Image

    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


class Observer:
    """The second client, in a process of its own."""

    def __init__(self, server: Server, token: str, log: Path) -> None:
        self._log = log
        self._file = log.open("w")
        command = [sys.executable, __file__, "--observe", server.address, token, server.kind]
        self._process = subprocess.Popen(command, stdout=self._file)

    def seen(self, since_s: float, until_s: float) -> list[Seen]:
        """Returns the answers to what was asked in a time."""
        lines = self._log.read_text().splitlines()
        found = [Seen(*json.loads(line)) for line in lines if line.endswith("]")]
        return [each for each in found if since_s <= each.at_s < until_s]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._file.close()


# The attacker


async def attack(name: str, address: str, metrics_address: str, token: str, slow_token: str) -> None:
    """Prepares an attack, says so, attacks when told to, and prints what it sent and got."""

    async def began() -> None:
        if not target.sent_bytes and not target.codes:
            print("prepared", flush=True)
            await asyncio.to_thread(sys.stdin.readline)

    target = Target(address, metrics_address, token, slow_token, began)
    await ATTACKS[name][1](target)
    print(json.dumps({"bytes": target.sent_bytes, "codes": target.codes}), flush=True)


def attacked(name: str, server: Server, observer: Observer, tokens: Sequence[str], part: float) -> dict[str, Any]:
    """Returns the figures of one attack; `part` is that of `AFTER_S` that is waited."""
    command = [sys.executable, __file__, "--attack", name, server.address, server.metrics_address, *tokens]
    with running(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        server.forget_peak()
        began_s = time.time()
        process.stdin.write("go\n")
        process.stdin.flush()
        try:
            told, _ = process.communicate(timeout=LONGEST_S)
            sent = json.loads(told.splitlines()[-1])
        except (subprocess.TimeoutExpired, IndexError, ValueError):
            process.kill()
            sent = {"bytes": 0, "codes": {"the attacker did not end": 1}}
        took_s = time.time() - began_s
        time.sleep(part * AFTER_S)
        ended_s, peak_mb = time.time(), server.peak_mb()
    time.sleep(1.0)  # answers that are late have come
    alive = server.process.poll() is None
    return {**sent, "seconds": took_s, "peak_mb": peak_mb, "alive": alive} | noticed(observer.seen(began_s, ended_s))


def loaded(name: str) -> None:
    """Loads one of the archives, as a worker does; prints what it is told, and what that took."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bad.mar"
        path.write_bytes(ARCHIVES[name]())
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        before_kb, began_s, told = _peak_kb(os.getpid()), time.perf_counter(), "OK"
        try:
            load_package(path)
        except CamserveError as error:
            told = type(error).__name__
        except BaseException as error:
            told = f"FOREIGN {type(error).__name__}"
        found = {"bytes": path.stat().st_size, "codes": {told: 1}, "seconds": time.perf_counter() - began_s}
        print(json.dumps(found | {"peak_mb": (_peak_kb(os.getpid()) - before_kb) / 1000}))


def archives(only: str) -> dict[str, Any]:
    """Returns the figures of the archives whose names have `only` in them; memory is what loading added."""
    attacks = {}
    for name in ARCHIVES:
        if only in name:
            command = [sys.executable, __file__, "--archive", name]
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
            attacks[name] = json.loads(done.stdout.splitlines()[-1])
            print(row(name, attacks[name]), flush=True)
    return {"attacks": attacks}


def noticed(seen: Sequence[Seen]) -> dict[str, Any]:
    """Returns what the second client noticed."""
    explains = [each for each in seen if each.what != "health"]
    failures = Counter(f"{each.what}: {each.code}" for each in explains if each.code != "OK")
    failures.update(f"health: {each.code}" for each in seen if each.what == "health" and each.code != "OK")
    return {
        "longest_stall_s": max((each.took_s for each in seen if each.what == "health"), default=None),
        "grad_cam_s": sorted(each.took_s for each in explains if each.what == "Grad-CAM"),
        "masked_s": sorted(each.took_s for each in explains if each.what == MASKED),
        "others": len(explains),
        "failures": failures,
    }


def measured(kind: str, names: Sequence[str], folder: Path, part: float = 1.0) -> dict[str, Any]:
    """Returns the figures of all attacks on one kind of server; `part` is that of the pauses that are kept."""
    secret, entry = new_token("ordinary")
    slow, slow_entry = new_token("slow", requests_per_s=1.0, burst=1)
    other, other_entry = new_token("other")
    (folder / "tokens.toml").write_text(entry + slow_entry + other_entry)
    with serving(kind, folder) as server:
        observer = Observer(server, other, folder / f"{kind}.seen")
        try:
            _wait_for_answers(observer)
            server.forget_peak()
            began_s = time.time()
            time.sleep(part * QUIET_S)
            alone = noticed(observer.seen(began_s, time.time())) | {"peak_mb": server.peak_mb()}
            attacks = {}
            for name in names:
                attacks[name] = attacked(name, server, observer, [secret, slow], part)
                print(row(name, attacks[name]), flush=True)
        finally:
            observer.close()
    times_s = sorted(took_s for each in attacks.values() for took_s in each["grad_cam_s"])
    grad_cam = {
        "step_s": CPU_STEP_S,
        "alone_p99_s": _p99(alone["grad_cam_s"]),
        "attacked_p99_s": _p99(times_s),
        "asked": len(times_s),
        "failures": sum(
            number for each in attacks.values() for what, number in each["failures"].items() if "Grad-CAM" in what
        ),
    }
    for each in (alone, *attacks.values()):
        for key in ("grad_cam_s", "masked_s"):
            taken = each.pop(key)
            each[key.replace("_s", "_longest_s")] = taken[-1] if taken else None
    return {"alone": alone, "grad_cam": grad_cam, "attacks": attacks}


def _wait_for_answers(observer: Observer) -> None:
    """Returns once both kinds of maps have been answered some times in a row."""
    until_s = time.monotonic() + 180
    while time.monotonic() < until_s:
        last = [each for each in observer.seen(time.time() - 5, time.time()) if each.what != "health"][-8:]
        if len(last) == 8 and all(each.code == "OK" for each in last) and {each.what for each in last} >= {MASKED}:
            return
        time.sleep(0.5)
    raise RuntimeError("the server did not become ready")


def _p99(taken: Sequence[float]) -> float | None:
    return float(np.percentile(taken, 99)) if taken else None


# The table


def row(name: str, found: Mapping[str, Any]) -> str:
    """Returns one attack as a row of the table."""
    codes = ", ".join(f"{number} {code}" for code, number in sorted(found["codes"].items()))
    stall = failed = ""
    if "failures" in found:  # there were others
        stall = "no answer" if found["longest_stall_s"] is None else f"{1000 * found['longest_stall_s']:.0f} ms"
        failed = f"{sum(found['failures'].values())} of {found['others']}"
    return f"| {name} | {_bytes(found['bytes'])} | {codes} | {stall} | {found['peak_mb']:.0f} MB | {failed} |"


def _bytes(number: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number} B"


def table(content: Mapping[str, Any]) -> str:
    """Returns the figures as Markdown."""
    lines = [
        "| attack | sent | answers | longest stall | peak memory | others failed |",
        "| --- | ---: | --- | ---: | ---: | ---: |",
    ]
    for found in content["results"].values():
        if "alone" in found:
            lines.append(row("(none)", {"bytes": 0, "codes": {}, **found["alone"]}))
        lines += [row(name, each) for name, each in found["attacks"].items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="attacks whose names have this in them; writes no file")
    parser.add_argument("--server", choices=KINDS, help="attack only this kind of server")
    parser.add_argument("--quick", action="store_true", help="short pauses: does it run?")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--render", action="store_true", help="the table of docs/security.md from the JSON, at once")
    parser.add_argument("--observe", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--attack", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--archive", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.observe:
        asyncio.run(observe(*given.observe))
    elif given.attack:
        asyncio.run(attack(*given.attack))
    elif given.archive:
        loaded(given.archive)
    elif given.render:
        render(json.loads((given.out or RESULTS).read_text()))
    else:
        found = results(given.only, given.server, QUICK if given.quick else 1.0)
        content = {"environment": common.environment(torch.device("cpu")), "quick": given.quick, "results": found}
        if given.out:
            common.write(given.out, content)
        elif not (given.only or given.quick):
            if given.server:
                content["results"] = json.loads(RESULTS.read_text())["results"] | found
            common.write(RESULTS, content)
            render(content)
        for kind, figures in found.items():
            print(kind, json.dumps(figures.get("grad_cam", {})))


def results(only: str, server: str | None, part: float) -> dict[str, Any]:
    """Returns the figures of the attacks whose names have `only` in them, by the kind of server."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            names = [name for name, (needed, _) in ATTACKS.items() if needed == kind and only in name]
            if names and server in (None, kind):
                found[kind] = measured(kind, names, Path(folder), part)
    if server is None and (hurt := archives(only))["attacks"]:
        found["archives"] = hurt
    return found


def summary(content: Mapping[str, Any]) -> str:
    """Returns what the figures say as a whole, as Markdown."""
    kinds = [found for found in content["results"].values() if "alone" in found]
    attacks = [(name, each) for found in kinds for name, each in found["attacks"].items()]
    failed = sum(sum(each["failures"].values()) for _, each in attacks)
    late = {
        name: each["grad_cam_longest_s"]
        for found in kinds
        for name, each in found["attacks"].items()
        if each["grad_cam_longest_s"] > found["grad_cam"]["alone_p99_s"] + 2 * found["grad_cam"]["step_s"] + TOLERATED_S
    }
    stalls = {name: each["longest_stall_s"] for name, each in attacks if each["longest_stall_s"] > TOLERATED_S}
    lines = [
        f"Of the second client's {sum(each['others'] for _, each in attacks):,} maps {failed} failed. "
        f"Beside {len(attacks) - len(late)} of {len(attacks)} attacks on servers none of its Grad-CAMs took longer "
        f"than alone (p99) plus two steps and {TOLERATED_S:g} s, and beside {len(attacks) - len(stalls)} no health "
        f"check waited for more than {TOLERATED_S:g} s. The others:",
        "",
        "| attack | longest Grad-CAM | longest stall |",
        "| --- | ---: | ---: |",
    ]
    for name in (name for name, _ in attacks if name in late or name in stalls):
        cells = (f"{1000 * seconds[name]:.0f} ms" if name in seconds else "" for seconds in (late, stalls))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def render(content: Mapping[str, Any]) -> None:
    """Writes what the figures say, and the table, into docs/security.md."""
    for name, text in (("summary", summary(content)), ("attacks", table(content))):
        SECURITY.write_text(common.embedded(SECURITY.read_text(), name, text))


if __name__ == "__main__":
    main()

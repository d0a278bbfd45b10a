"""A whole service in a process of its own, a real Prometheus that scrapes it, and a small load on it."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import random
import re
import socket
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import monitoring
import numpy as np
import psutil
import trustme
import yaml
from PIL import Image

from camserve.client import AsyncClient, Tls
from camserve.errors import CamserveError

SPED_UP = 60
"""The rules are those of deploy/prometheus, but all their durations are so many times shorter: 5m is 5s."""

_UNITS_S = {"m": 60, "h": 3600, "d": 86400}
_WORKER = "model_service_worker.py"


def sped_up(name: str) -> dict[str, Any]:
    """A file of rules with shorter durations; thresholds, names and labels as they are."""
    rules = yaml.safe_load((monitoring.PROMETHEUS / name).read_text())
    for group in rules["groups"]:
        for rule in group["rules"]:
            rule["expr"] = re.sub(r"\[(\w+)\]", lambda range_: f"[{_shorter(range_[1])}]", rule["expr"])
            if "for" in rule:
                rule["for"] = _shorter(rule["for"])
    return dict(rules)


def _shorter(duration: str) -> str:
    return f"{int(duration[:-1]) * _UNITS_S[duration[-1]] // SPED_UP}s"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass
class Service:
    """`camserve serve` with TLS."""

    process: subprocess.Popen[bytes]
    address: str
    metrics_address: str
    ca: Path
    log: Path

    def client(self) -> AsyncClient:
        return AsyncClient(self.address, tls=Tls(ca=self.ca))

    def workers(self) -> list[psutil.Process]:
        """TorchServe's worker processes."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                found += [process] if any(_WORKER in part for part in process.cmdline()) else []
        return found

    def stop(self) -> None:
        """In peace; what is left after that, by force."""
        family = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=20)
        for process in [*family, self.process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(timeout=20)


def serve(folder: Path, store: Path) -> Service:
    """Starts the service with the model `small` of the store; does not wait for it."""
    authority = trustme.CA()
    pair = authority.issue_cert("localhost", "127.0.0.1")
    pair.cert_chain_pems[0].write_to_path(folder / "tls.crt")
    pair.private_key_pem.write_to_path(folder / "tls.key")
    authority.cert_pem.write_to_path(folder / "ca.crt")
    port, metrics_port = free_port(), free_port()
    lines = [
        "[gateway]",
        f'tls_cert = "{folder}/tls.crt"',
        f'tls_key = "{folder}/tls.key"',
        f"result_cache_bytes = {2**24}",
        "poll_s = 0.2",
        "drain_s = 0",
        "[worker]",
        f'store = "{store}"',
        'models = ["small"]',
        'device = "cpu"',
    ]
    (folder / "camserve.toml").write_text("\n".join(lines))
    main = "from camserve.cli import main; main()"
    command = [sys.executable, "-c", main, "serve", "--config", str(folder / "camserve.toml")]
    command += ["--port", str(port), "--metrics-port", str(metrics_port)]
    log = folder / "service.log"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CAMSERVE_")}
    environment |= {"CAMSERVE_CACHE": os.environ["CAMSERVE_CACHE"]}  # the tests' own
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    return Service(process, f"127.0.0.1:{port}", f"127.0.0.1:{metrics_port}", folder / "ca.crt", log)


@dataclass
class Prometheus:
    """A running Prometheus, asked over its HTTP interface."""

    process: subprocess.Popen[bytes]
    url: str
    _http: Any = field(default_factory=lambda: urllib.request.build_opener(urllib.request.ProxyHandler({})))

    def ask(self, path: str, **parameters: Any) -> Any:
        with self._http.open(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}", timeout=20) as reply:
            return json.load(reply)["data"]

    def series(self, expr: str, start_s: float, end_s: float) -> list[dict[str, Any]]:
        """The series of an expression, second by second."""
        return list(self.ask("query_range", query=expr, start=start_s, end=end_s, step=1)["result"])

    def states(self, alert: str) -> set[str]:
        """How the alerts of this name stand: pending or firing."""
        return {one["state"] for one in self.ask("alerts")["alerts"] if one["labels"]["alertname"] == alert}

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(timeout=20)


def prometheus(folder: Path, target: str) -> Prometheus:
    """Starts a Prometheus that scrapes the target and evaluates the sped-up rules, both each second."""
    for name in ("recording.yml", "alerts.yml"):
        (folder / name).write_text(yaml.safe_dump(sped_up(name)))
    config = yaml.safe_load((monitoring.PROMETHEUS / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    command += [f"--web.listen-address={address}", "--enable-feature=exemplar-storage", "--log.level=warn"]
    with (folder / "prometheus.log").open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    return Prometheus(process, f"http://{address}")


@contextlib.asynccontextmanager
async def load(service: Service) -> AsyncIterator[None]:
    """While this is open, clients ask for a bit of everything, and go on when something fails."""
    async with service.client() as client:
        asking = [asyncio.create_task(_ask(client, **asked)) for asked in MIX]
        try:
            yield
        finally:
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)


SCORE_CAM: dict[str, Any] = {"methods": ["score_cam"], "priority": "batch"}
MIX: list[dict[str, Any]] = [
    {"methods": ["grad_cam"], "priority": "interactive"},
    {"methods": [("group_cam", {"groups": 8})]},
    {"methods": [("group_cam", {"groups": 8})], "fixed": True},
    {"methods": ["auto"], "timeout_s": 2.0},
    {**SCORE_CAM, "timeout_s": 0.3},
    {**SCORE_CAM, "timeout_s": 0.8, "allow_partial": True},
]
"""What is asked again and again: also the same image, what cannot be in time, and what is answered in part."""


async def _ask(client: AsyncClient, fixed: bool = False, **asked: Any) -> None:
    while True:
        with contextlib.suppress(CamserveError):
            await client.explain(photo(0 if fixed else random.getrandbits(32)), **{"timeout_s": 10.0, **asked})
        await asyncio.sleep(0.3)


def photo(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


async def until(condition: Callable[[], Awaitable[bool]], what: str, timeout_s: float) -> None:
    """Returns once the condition holds. Raises AssertionError when it does not in time."""
    try:
        async with asyncio.timeout(timeout_s):
            while not await condition():
                await asyncio.sleep(0.25)
    except TimeoutError:
        raise AssertionError(f"not within {timeout_s:g} s: {what}") from None

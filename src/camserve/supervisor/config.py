"""How TorchServe is set up: every property of its `config.properties`, the JVM's command line and its environment.

TorchServe is reachable from this machine only, loads the named models and nothing else, and takes no settings from the
environment.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from camserve.archive import read_card
from camserve.errors import InvalidOption, NotFound

HOST = "127.0.0.1"
MAX_MESSAGE_BYTES = 128 * 2**20
"""Above the gateway's largest step: TorchServe drops a larger request, and a larger reply kills the worker."""

_LONGEST_STEP_S = 300
_SECRETS = ".*(KEY|SECRET|TOKEN|PASSWORD|CREDENTIAL).*"


@dataclass(frozen=True)
class ServeOptions:
    """What can be chosen of TorchServe.

    Raises:
        InvalidOption: a value out of range.
    """

    store: Path
    """Directory of the archives."""
    models: tuple[str, ...] = ("lite0",)
    """Names of the archives to load."""
    workers: int = 1
    """Processes of each model; with several GPUs they are spread over them."""
    threads: int | None = None
    """CPU threads of each worker; None: the cores divided by the workers, or OMP_NUM_THREADS if that is set."""
    device: Literal["auto", "cpu"] = "auto"
    """auto: GPUs if there are any."""
    batch_size: int = 1
    """Calls that TorchServe hands to a worker at once. For plain clients; the gateway's steps are batches already."""
    batch_delay_ms: int = 1
    """How long a worker waits for its batch to fill. It waits the whole time, also when idle."""
    inference_port: int = 0
    """REST, for plain clients. For every port: 0 is chosen by the OS."""
    management_port: int = 0
    metrics_port: int = 0
    grpc_port: int = 0
    heap_mb: int = 1024
    """Largest heap of the JVM, in MiB."""
    start_timeout_s: float = 300.0
    """Seconds until every worker has to be ready."""
    stop_timeout_s: float = 10.0
    """Seconds to stop in peace; then the processes are killed."""

    def __post_init__(self) -> None:
        if not self.models:
            raise InvalidOption("at least one model is needed, got none")
        for name in ("workers", "heap_mb", "batch_size", "batch_delay_ms"):
            if getattr(self, name) < 1:
                raise InvalidOption(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.threads is not None and self.threads < 1:
            raise InvalidOption(f"threads must be at least 1, got {self.threads}")


@dataclass(frozen=True)
class Ports:
    """Of TorchServe's five listeners, all on loopback."""

    inference: int
    management: int
    metrics: int
    grpc_inference: int
    grpc_management: int


def properties(options: ServeOptions, ports: Ports) -> dict[str, str]:
    """The content of config.properties."""
    store = options.store.resolve()
    chosen = {
        "inference_address": f"http://{HOST}:{ports.inference}",
        "management_address": f"http://{HOST}:{ports.management}",
        "metrics_address": f"http://{HOST}:{ports.metrics}",
        "grpc_inference_address": HOST,
        "grpc_inference_port": str(ports.grpc_inference),
        "grpc_management_address": HOST,
        "grpc_management_port": str(ports.grpc_management),
        "model_store": str(store),
        "load_models": ",".join(f"{name}={name}.mar" for name in options.models),
        "allowed_urls": f"file://{re.escape(str(store)).replace(',', '.')}/.*",  # expressions, separated by commas
        "default_workers_per_model": str(options.workers),
    }
    if options.batch_size > 1:
        chosen["models"] = json.dumps({name: _batching(options, name) for name in options.models})
    if options.device == "cpu":
        chosen["number_of_gpu"] = "0"
    return chosen | _FIXED


def _batching(options: ServeOptions, name: str) -> dict[str, dict[str, int]]:
    version = read_card(options.store / f"{name}.mar").version
    return {version: {"batchSize": options.batch_size, "maxBatchDelay": options.batch_delay_ms}}


_FIXED = {
    # Its own tokens expire each hour and cannot be supplied; loopback is the fence.
    "disable_token_authorization": "true",
    "enable_model_api": "false",
    "use_env_allowed_urls": "false",
    "enable_envvars_config": "false",
    "install_py_dep_per_model": "false",
    "blacklist_env_vars": _SECRETS,
    "max_request_size": str(MAX_MESSAGE_BYTES),
    "max_response_size": str(MAX_MESSAGE_BYTES),
    "default_response_timeout": str(_LONGEST_STEP_S),
    "default_startup_timeout": str(_LONGEST_STEP_S),
    "metrics_mode": "prometheus",
    "disable_system_metrics": "true",  # they would run nvidia-smi each minute
    "async_logging": "true",
}


def render(values: Mapping[str, str]) -> str:
    """A Java properties file, in ASCII."""
    return "".join(f"{key}={_escaped(value)}\n" for key, value in values.items())


def _escaped(value: str) -> str:
    units = memoryview(value.encode("utf-16-le")).cast("H")  # Java escapes UTF-16 units
    ascii_only = (chr(unit) if 32 <= unit < 127 else f"\\u{unit:04x}" for unit in units)
    return "".join("\\\\" if character == "\\" else character for character in ascii_only)


def command(java: Path, directory: Path, options: ServeOptions) -> list[str]:
    """The JVM's command line, as `ts/model_server.py` builds it, for a config.properties in the directory."""
    home = torchserve_home()
    return [
        str(java),
        f"-Dmodel_server_home={home}",
        f"-Djava.io.tmpdir={directory}",
        f"-Dlog4j.configurationFile={Path(__file__).with_name('log4j2.xml').as_uri()}",
        f"-Xmx{options.heap_mb}m",
        "-XX:+ExitOnOutOfMemoryError",
        "-XX:-UsePerfData",  # or it leaves /tmp/hsperfdata_*
        "-cp",
        str(home / "ts" / "frontend" / "model-server.jar"),
        "org.pytorch.serve.ModelServer",
        "--python",
        sys.executable,
        "-f",
        str(directory / "config.properties"),
        "-s",
        str(options.store.resolve()),
        "-ncs",  # no snapshots of the configuration
    ]


def environment(directory: Path, options: ServeOptions) -> dict[str, str]:
    """The JVM's environment, which its workers inherit."""
    threads = str(options.threads or max(1, cores() // (options.workers * len(options.models))))
    own = {"TMPDIR": str(directory), "LOG_LOCATION": str(directory), "METRICS_LOCATION": str(directory)}
    if options.threads is not None or "OMP_NUM_THREADS" not in os.environ:
        own["OMP_NUM_THREADS"] = threads
    return {**os.environ, **own}


def cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """How many CPU cores this process may use: its affinity, and the container's limit (`cpu.max` of cgroup v2)."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        limit, period = quota.read_text().split()
        return max(1, min(available, int(limit) // int(period)))
    except (OSError, ValueError):  # no such file, or "max"
        return available


def torchserve_home() -> Path:
    """The directory that holds the package `ts`, which is not imported.

    Raises:
        NotFound: TorchServe is not installed.
    """
    spec = importlib.util.find_spec("ts")
    if spec is None or spec.origin is None:
        raise NotFound("TorchServe is not installed: pip install 'camserve[server]'")
    return Path(spec.origin).parents[1]

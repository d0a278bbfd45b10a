"""Sets TorchServe up: every property of its `config.properties`, the JVM's command line and its environment.

TorchServe loads the named models and nothing else, takes no settings from the environment, and is reachable from this
machine only, unless `WorkerSettings` says otherwise.
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

from camserve.archive import read_card
from camserve.cgroup import cpu_limit
from camserve.environment import complete
from camserve.errors import NotFound
from camserve.supervisor.settings import WorkerSettings

HOST = "127.0.0.1"
MAX_MESSAGE_BYTES = 128 * 2**20
"""Largest message, above the gateway's largest step: TorchServe drops a larger request, and a larger reply kills the
worker."""

SPIN_COUNT = 10_000
"""Number of looks at the other threads after which one of a worker's sleeps: `GOMP_SPINCOUNT` of GNU OpenMP.

Its own 300,000 make a worker several times slower beside one busy process, such as the gateway on the same machine.
"""

ALLOCATOR = {
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TOP_PAD_": str(64 * 2**20),
}
"""Settings of glibc's allocator: it keeps blocks that are given back, since the next pass needs the same.

By itself it gives large ones back to the system, and fetching them anew took a sixth of a Group-CAM's time in PyTorch.
"""

_LONGEST_STEP_S = 300
_SECRETS = ".*(KEY|SECRET|TOKEN|PASSWORD|CREDENTIAL).*"


@dataclass(frozen=True)
class Addresses:
    """Holds the host:port of each of TorchServe's five listeners."""

    inference: str
    management: str
    metrics: str
    grpc_inference: str
    grpc_management: str
    """Address that nobody needs, always on loopback."""


def properties(options: WorkerSettings, addresses: Addresses) -> dict[str, str]:
    """Returns the content of config.properties."""
    # As the JVM understands it, see `environment`, whatever encoding of paths this process goes by.
    store = os.fsencode(options.store.resolve()).decode("utf-8", "replace")
    grpc_host, _, grpc_port = addresses.grpc_inference.rpartition(":")
    grpc_management_host, _, grpc_management_port = addresses.grpc_management.rpartition(":")
    chosen = {
        "inference_address": f"http://{addresses.inference}",
        "management_address": f"http://{addresses.management}",
        "metrics_address": f"http://{addresses.metrics}",
        "grpc_inference_address": grpc_host,
        "grpc_inference_port": grpc_port,
        "grpc_management_address": grpc_management_host,
        "grpc_management_port": grpc_management_port,
        "model_store": store,
        "load_models": ",".join(f"{name}={name}.mar" for name in options.models),
        "allowed_urls": f"file://{re.escape(store).replace(',', '.')}/.*",  # expressions, separated by commas
        "default_workers_per_model": str(options.workers),
    }
    if options.batch_size > 1:
        chosen["models"] = json.dumps({name: _batching(options, name) for name in options.models})
    if options.device == "cpu":
        chosen["number_of_gpu"] = "0"
    return chosen | _FIXED


def _batching(options: WorkerSettings, name: str) -> dict[str, dict[str, int]]:
    version = read_card(options.store / f"{name}.mar").version
    return {version: {"batchSize": options.batch_size, "maxBatchDelay": options.batch_delay_ms}}


_FIXED = {
    # Its own tokens expire each hour and cannot be supplied; loopback, or a network policy, is the fence.
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
    """Returns a Java properties file, in ASCII."""
    return "".join(f"{key}={_escaped(value)}\n" for key, value in values.items())


def _escaped(value: str) -> str:
    units = memoryview(value.encode("utf-16-le")).cast("H")  # Java escapes UTF-16 units
    ascii_only = (chr(unit) if 32 <= unit < 127 else f"\\u{unit:04x}" for unit in units)
    return "".join("\\\\" if character == "\\" else character for character in ascii_only)


def command(java: Path, directory: Path, options: WorkerSettings) -> list[str]:
    """Returns the JVM's command line, as `ts/model_server.py` builds it, for a config.properties in the directory."""
    home = torchserve_home()
    return [
        str(java),
        f"-Dmodel_server_home={home}",
        f"-Djava.io.tmpdir={directory}",
        f"-Dlog4j.configurationFile={Path(__file__).with_name('log4j2.xml').as_uri()}",
        f"-Xmx{options.heap_mb}m",
        # It only hands messages on, beside workers that need the cores: no threads for collecting garbage and none for
        # optimising code, which take a fifth of a step's way on two cores. What a message passes is compiled early:
        # interpreted, as for the first hundreds of steps by default, a step's way takes 4.8 ms instead of 2.9.
        "-XX:+UseSerialGC",
        "-XX:TieredStopAtLevel=1",
        "-XX:CompileThresholdScaling=0.05",
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


def environment(directory: Path, options: WorkerSettings) -> dict[str, str]:
    """Returns the JVM's environment, which its workers inherit.

    The JVM reads paths in the encoding of its locale, which may be ASCII or not be installed: it gets one that is UTF-8
    everywhere, and speaks English.
    """
    threads = str(options.threads or max(1, cores(cpu_limit()) // (options.workers * len(options.models))))
    own = {"TMPDIR": str(directory), "LOG_LOCATION": str(directory), "METRICS_LOCATION": str(directory)}
    if options.threads is not None or "OMP_NUM_THREADS" not in os.environ:
        own["OMP_NUM_THREADS"] = threads
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        own["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
    own |= {name: value for name, value in ALLOCATOR.items() if name not in os.environ}
    found = {**os.environ, "LC_ALL": "C.UTF-8", **own}
    complete(found)
    return found


def cores(limit: float | None) -> int:
    """Returns the CPU cores that this process may use, by affinity and by the limit of its container, if it has one."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return available if limit is None else max(1, min(available, int(limit)))


def torchserve_home() -> Path:
    """Returns the directory that holds the package `ts`, which is not imported.

    Raises:
        NotFound: TorchServe is not installed.
    """
    spec = importlib.util.find_spec("ts")
    if spec is None or spec.origin is None:
        raise NotFound("TorchServe is not installed: pip install 'camserve[server]'")
    return Path(spec.origin).parents[1]

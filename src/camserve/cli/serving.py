"""Defines the commands that run camserve as a service, and those that look after it: serve, gateway, worker, config,
probe, top."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from camserve.cli.extras import needs_extra

if TYPE_CHECKING:
    from camserve.gateway.ops.settings import Settings

STORE_HELP = "Directory of model archives.  [default: $CAMSERVE_MODEL_STORE, else ./model_store]"

_PORT = click.IntRange(0, 65535)
_config = click.option(
    "--config",
    "file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="TOML file of settings, tables [gateway] and [worker].  [default: $CAMSERVE_CONFIG]",
)
_port = click.option("--port", type=_PORT, help="Of the gRPC server; 0: any free one.  [default: 8500]")
_metrics_port = click.option("--metrics-port", type=_PORT, help="Of /metrics; 0: any free one.  [default: 8501]")
_web_port = click.option("--web-port", type=_PORT, help="Of the HTTP door; 0: any free one.  [default: none]")
_store = click.option("--store", type=click.Path(path_type=Path), help=STORE_HELP)
_models = click.option("--models", help="Names of models, separated by commas.  [default: lite0]")
_workers = click.option("--workers", type=click.IntRange(1), help="Processes of each model.  [default: 1]")
_device = click.option("--device", type=click.Choice(["auto", "cpu"]), help="auto: GPUs first.  [default: auto]")


@click.command()
@_config
@_store
@_models
@_port
@_metrics_port
@_web_port
@_workers
@click.option("--inference-port", type=_PORT, help="Of TorchServe's REST, for plain clients.  [default: any free one]")
@click.option("--batch-size", type=click.IntRange(1), help="Of TorchServe's batching, for plain clients.  [default: 1]")
@click.option(
    "--batch-delay-ms", type=click.IntRange(1), help="How long a worker waits for a batch to fill.  [default: 1]"
)
@_device
def serve(
    file: Path | None,
    port: int | None,
    metrics_port: int | None,
    web_port: int | None,
    inference_port: int | None,
    **options: Any,
) -> None:
    """Serve models until Ctrl-C or SIGTERM.

    Runs TorchServe and the gateway in front of it. `camserve config` lists everything that can be set, by flags,
    environment variables and a file; a flag wins over a variable, and a variable over the file.
    """
    with needs_extra("server"):
        _silence_grpc()
        import asyncio

        from camserve import supervisor

        settings = _gateway_settings(file, port, metrics_port, web_port)
        known = supervisor.WorkerSettings.load(file)
        inference = _with_port(known.inference_listen, inference_port)
        served = supervisor.WorkerSettings.load(file, inference_listen=inference, **options)
        _log_as(settings)
        asyncio.run(supervisor.serve(settings, served))


@click.command()
@_config
@_port
@_metrics_port
@_web_port
@click.option(
    "--upstreams",
    metavar="HOST:GRPC_PORT:MANAGEMENT_PORT,...",
    help="TorchServes; a name stands for all its addresses.  [default: 127.0.0.1:7070:8081]",
)
def gateway(
    file: Path | None, port: int | None, metrics_port: int | None, web_port: int | None, upstreams: str | None
) -> None:
    """Run the gateway alone until Ctrl-C or SIGTERM, in front of TorchServes that run elsewhere.

    `camserve config` lists everything that can be set.
    """
    with needs_extra("gateway"):
        _silence_grpc()
        import asyncio

        from camserve.gateway.ops.shutdown import serve_alone

        settings = _gateway_settings(file, port, metrics_port, web_port, upstreams=upstreams)
        _log_as(settings)
        asyncio.run(serve_alone(settings))


@click.command()
@_config
@_store
@_models
@_workers
@_device
def worker(file: Path | None, **options: Any) -> None:
    """Run TorchServe alone until Ctrl-C or SIGTERM, for gateways that run elsewhere.

    `camserve config` lists everything that can be set.
    """
    with needs_extra("server"):
        import asyncio

        from camserve import supervisor
        from camserve.gateway.ops.settings import Settings

        served = supervisor.WorkerSettings.load(file, **options)
        _log_as(Settings.load(file, listen="127.0.0.1:0"))  # its log is set as a gateway's that is not run
        asyncio.run(supervisor.serve_worker(served))


@click.command()
@_config
def config(file: Path | None) -> None:
    """Print the settings as they are in effect, and where each comes from.

    The output is a file for --config; secrets are hidden in it.
    """
    with needs_extra("gateway"):
        from camserve.gateway.ops.settings import Settings
        from camserve.supervisor import WorkerSettings

        tables = [[*settings.load(file).lines(file)] for settings in (Settings, WorkerSettings)]
        click.echo("\n\n".join("\n".join(table) for table in tables))


@click.command()
@_config
@click.argument("service", type=click.Choice(["gateway", "worker"]))
@click.option("--live", is_flag=True, help="Of the gateway: only that the process answers, not that a model is ready.")
@click.option("--timeout", "timeout_s", type=click.FloatRange(0, min_open=True), default=5, show_default=True)
def probe(file: Path | None, service: str, live: bool, timeout_s: float) -> None:
    """Look whether a gateway or TorchServe of this machine is well.

    It is looked for where the settings say that it listens. The exit status is 0 if it is well, else 1.
    """
    if live and service == "worker":
        raise click.UsageError("--live is for the gateway")
    with needs_extra("gateway"):
        from camserve.gateway.ops.settings import Settings
        from camserve.supervisor import WorkerSettings, probe

        if service == "gateway":
            probe.probe_gateway(Settings.load(file), live=live, timeout_s=timeout_s)
        else:
            probe.probe_worker(WorkerSettings.load(file), timeout_s=timeout_s)


@click.command()
@click.option("--url", default="http://127.0.0.1:8501/metrics", show_default=True, help="Of the gateway's metrics.")
@click.option(
    "--interval",
    "interval_s",
    type=click.FloatRange(0, min_open=True),
    default=1,
    show_default=True,
    metavar="SECONDS",
    help="Between two looks; the figures are of the time between them.",
)
@click.option("--once", is_flag=True, help="Print the figures since the gateway's start, and exit.")
def top(url: str, interval_s: float, once: bool) -> None:
    """Show what a gateway does right now: traffic, latency, queue, steps, workers.

    Reads its metrics and nothing else; ends with Ctrl-C.
    """
    with needs_extra("gateway"):
        from rich.console import Console

        from camserve.cli.top import show

        show(url, interval_s, once, Console())


COMMANDS = (serve, gateway, worker, config, probe, top)


def _gateway_settings(
    file: Path | None, port: int | None, metrics_port: int | None, web_port: int | None, **flags: Any
) -> Settings:
    """Returns the settings with the ports that were given; their hosts stay what file and environment say."""
    from camserve.gateway.ops.settings import Settings

    known = Settings.load(file)
    listen, metrics_listen = _with_port(known.listen, port), _with_port(known.metrics_listen, metrics_port)
    web_listen = _with_port(known.web_listen, web_port)
    return Settings.load(file, listen=listen, metrics_listen=metrics_listen, web_listen=web_listen, **flags)


def _with_port(address: str, port: int | None) -> str | None:
    """Returns "host:port" with another port; None where none was given."""
    host = address.rpartition(":")[0] or "127.0.0.1"  # "off" has no host
    return None if port is None else f"{host}:{port}"


def _log_as(settings: Settings) -> None:
    from camserve import logs

    logs.set_up(settings.log_format, settings.log_level)


def _silence_grpc() -> None:
    """Has gRPC's core write nothing to stderr, unless the environment says otherwise; to be called before its import.

    It writes there itself, from the threads that serve, and would wait for ever for somebody to read it.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")

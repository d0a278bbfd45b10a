"""Checks whether a gateway, or a TorchServe, of this machine is well, for Docker's and Kubernetes' health checks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from camserve.addresses import reached
from camserve.errors import InvalidOption, Unavailable
from camserve.gateway.ops.settings import Settings
from camserve.gateway.server import SERVICE
from camserve.supervisor.settings import WorkerSettings
from camserve.supervisor.state import worker_states

_NO_PROXY = ("grpc.enable_http_proxy", 0)
_SERVER_NAME = "grpc.ssl_target_name_override"


def probe_gateway(settings: Settings, *, live: bool = False, timeout_s: float = 5.0) -> None:
    """Asks the gateway for its health.

    Args:
        settings: the settings that the gateway was started with.
        live: whether it is enough that the process answers, though no model is ready.
        timeout_s: seconds that the answer may take.

    Raises:
        Unavailable: the gateway does not serve, or does not answer.
        InvalidOption: a file of TLS cannot be read.
    """
    request = health_pb2.HealthCheckRequest(service="" if live else SERVICE)
    with _channel(settings) as channel:
        try:
            reply = health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise Unavailable(f"the gateway on {settings.listen} does not answer: {error.details()}") from None
    if reply.status != health_pb2.HealthCheckResponse.SERVING:
        name = health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)
        raise Unavailable(f"the gateway on {settings.listen} says {name}")


def probe_worker(settings: WorkerSettings, *, timeout_s: float = 5.0) -> None:
    """Looks whether every model has a worker that is READY.

    Raises:
        Unavailable: a model has none, or TorchServe does not answer.
    """
    url = f"http://{reached(settings.management_listen)}"
    for model in settings.models:
        try:
            states = worker_states(url, model, timeout_s)
        except (OSError, ValueError) as error:
            raise Unavailable(f"TorchServe on {settings.management_listen} does not tell of {model}: {error}") from None
        if "READY" not in states:
            raise Unavailable(f"{model} has no worker that is READY: {', '.join(states) or 'none at all'}")


@contextmanager
def _channel(settings: Settings) -> Iterator[grpc.Channel]:
    address = reached(settings.listen)
    if settings.tls_cert is None:
        with grpc.insecure_channel(address, options=[_NO_PROXY]) as channel:
            yield channel
    else:
        chain, name = _pem(settings.tls_cert), _server_name(settings.tls_cert)
        options = [_NO_PROXY, *([(_SERVER_NAME, name)] if name else [])]
        with grpc.secure_channel(address, _credentials(settings, chain), options=options) as channel:
            yield channel


def _credentials(settings: Settings, chain: bytes) -> grpc.ChannelCredentials:
    """Returns credentials that trust the gateway's own certificate and, with mutual TLS, show it as a client's too."""
    if settings.tls_client_ca is None or settings.tls_key is None:
        return grpc.ssl_channel_credentials(chain)
    return grpc.ssl_channel_credentials(chain, _pem(settings.tls_key), chain)


def _server_name(path: Path) -> str:
    """Returns a name that the certificate is for; "" where it names nobody."""
    from cryptography import x509

    try:
        found = x509.load_pem_x509_certificate(_pem(path))
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except ValueError as error:
        raise InvalidOption(f"{path} is no certificate: {error}") from None
    except x509.ExtensionNotFound:
        return ""
    hosts = names.get_values_for_type(x509.DNSName) or map(str, names.get_values_for_type(x509.IPAddress))
    return next((host.replace("*", "probe", 1) for host in hosts), "")


def _pem(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidOption(f"cannot read {path}: {error.strerror}") from None

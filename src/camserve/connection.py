"""Secures a client's way to a server: plain text on this machine, TLS or mutual TLS elsewhere, perhaps a token."""

from __future__ import annotations

import ipaddress
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import grpc

from camserve.errors import InvalidOption

Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Tls:
    """Names the PEM files of a client's TLS.

    Raises:
        InvalidOption: on construction, when only one of `cert` and `key` is given.
    """

    ca: str | Path | None = None
    """Authorities that the server's certificate has to be from; None: the public ones that gRPC knows."""
    cert: str | Path | None = None
    """Certificate chain that the client shows, for a server with mutual TLS."""
    key: str | Path | None = None
    """Private key of `cert`."""

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise InvalidOption("the certificate and the key of a client belong together: give both or none")

    def credentials(self) -> grpc.ChannelCredentials:
        """Returns the credentials of a channel; raises InvalidOption when a file cannot be read."""
        return grpc.ssl_channel_credentials(_content(self.ca), _content(self.key), _content(self.cert))


def credentials(address: str, tls: Tls | None, token: str | None) -> grpc.ChannelCredentials | None:
    """Returns the credentials of a channel; None: plain text.

    Raises:
        InvalidOption: a token would leave this machine in plain text, or a file cannot be read.
    """
    if tls is not None:
        return tls.credentials()
    if token is not None and not is_local(address):
        raise InvalidOption(
            f"a token goes over TLS, or in plain text to this machine only; got {address!r} without TLS"
        )
    return None


def metadata(token: str | None) -> Metadata:
    """Returns the metadata that every call sends along.

    Raises:
        InvalidOption: the token is not printable ASCII without spaces.
    """
    if token is None:
        return ()
    if not re.fullmatch(r"[!-~]+", token):
        raise InvalidOption("a token must be printable ASCII without spaces")
    return (("authorization", f"Bearer {token}"),)


def traced() -> Metadata:
    """Returns the W3C trace context of the current span, if the program uses OpenTelemetry."""
    if "opentelemetry.trace" not in sys.modules:
        return ()
    from opentelemetry import propagate

    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return tuple((key.lower(), value) for key, value in carrier.items())  # as gRPC wants them


def read_token(path: Path) -> str:
    """Returns the token in a file, without the line's end; raises InvalidOption when it cannot be read."""
    return _bytes(path).decode("ascii", "replace").strip()


def is_local(address: str) -> bool:
    """Returns whether a target as gRPC takes it is on this machine, so that nobody reads along."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    host = re.sub(r"^(dns:(///)?|ipv4:|ipv6:)", "", address)
    host = re.sub(r":\d+$", "", host) if host.count(":") == 1 or "]" in host else host
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _content(path: str | Path | None) -> bytes | None:
    return None if path is None else _bytes(Path(path))


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidOption(f"cannot read {path}: {error.strerror}") from None

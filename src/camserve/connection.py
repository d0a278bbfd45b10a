"""How a client reaches a server: plain text on this machine, TLS or mutual TLS elsewhere, with or without a token."""

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
    """TLS as a client uses it; the files are PEM."""

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
        """For a channel. Raises InvalidOption when a file cannot be read."""
        return grpc.ssl_channel_credentials(_content(self.ca), _content(self.key), _content(self.cert))


def credentials(address: str, tls: Tls | None, token: str | None) -> grpc.ChannelCredentials | None:
    """What a channel is secured with; None: plain text.

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
    """What every call sends along.

    Raises:
        InvalidOption: the token is not printable ASCII without spaces.
    """
    if token is None:
        return ()
    if not re.fullmatch(r"[!-~]+", token):
        raise InvalidOption("a token must be printable ASCII without spaces")
    return (("authorization", f"Bearer {token}"),)


def traced() -> Metadata:
    """The W3C trace context of the span that this runs in, if the program uses OpenTelemetry."""
    if "opentelemetry.trace" not in sys.modules:
        return ()
    from opentelemetry import propagate

    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return tuple((key.lower(), value) for key, value in carrier.items())  # as gRPC wants them


def read_token(path: Path) -> str:
    """The token in a file, without the line's end. Raises InvalidOption when it cannot be read."""
    return _bytes(path).decode("ascii", "replace").strip()


def is_local(address: str) -> bool:
    """A target as gRPC takes it is on this machine, so that nobody reads along."""
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

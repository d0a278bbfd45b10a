"""Reads the TLS files of the gateway, checks them, and serves rotated ones to new connections at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from camserve.errors import InvalidOption
from camserve.gateway.ops.settings import Settings
from camserve.gateway.ops.watched_files import Reloaded


@dataclass(frozen=True)
class Certificates:
    """The certificates of a TLS server and of the clients that it lets in; bytes are PEM."""

    chain: bytes
    key: bytes
    client_ca: bytes | None
    """Authorities of which a client must show a certificate; None: no client must show any."""
    expires_unix_s: float
    """Time at which the server's own certificate ends."""


def certificates(settings: Settings, every_s: float = 1.0) -> Reloaded[Certificates] | None:
    """Returns what the files say that the settings name; None without TLS.

    Raises:
        InvalidOption: a file cannot be read, is not what it should be, or the key is of another certificate.
    """
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    paths = [path for path in (settings.tls_cert, settings.tls_key, settings.tls_client_ca) if path is not None]
    return Reloaded("certificates", paths, partial(_parsed, paths), every_s)


def server_credentials(files: Reloaded[Certificates]) -> grpc.ServerCredentials:
    """Returns credentials that follow the files: a new connection gets the newest pair, old connections live on."""
    served = files.get()

    def newest() -> grpc.ServerCertificateConfiguration | None:
        nonlocal served
        found = files.get()
        if found is served:
            return None
        served = found
        return _configuration(found)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(served),
        newest,  # type: ignore[arg-type]  # None is "no change", which the stubs forget
        served.client_ca is not None,
    )


def _configuration(found: Certificates) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(found.key, found.chain)], found.client_ca)


def _parsed(paths: Sequence[Path], contents: Sequence[bytes]) -> Certificates:
    """Returns what the files say, checked.

    Files that are read one after the other may be of two generations; then the key does not fit the certificate.
    """
    chain = _certificates("TLS_CERT", paths[0], contents[0])
    if _public_half(paths[1], contents[1]) != _encoded(chain[0].public_key()):
        raise InvalidOption(
            f"CAMSERVE_TLS_KEY={paths[1]} is not the key of the first certificate in CAMSERVE_TLS_CERT={paths[0]}"
        )
    client_ca = contents[2] if len(contents) > 2 else None
    if client_ca is not None:
        _certificates("TLS_CLIENT_CA", paths[2], client_ca)
    return Certificates(contents[0], contents[1], client_ca, chain[0].not_valid_after_utc.timestamp())


def _certificates(setting: str, path: Path, content: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(content)
    except ValueError:
        raise InvalidOption(
            f"CAMSERVE_{setting}={path} must hold certificates in PEM (-----BEGIN CERTIFICATE-----), "
            f"got {len(content)} bytes of something else"
        ) from None


def _public_half(path: Path, content: bytes) -> bytes:
    """Returns the public half of a private key, in DER."""
    try:
        return _encoded(load_pem_private_key(content, password=None).public_key())
    except TypeError:
        text = f"CAMSERVE_TLS_KEY={path} must be a key without a passphrase, got an encrypted one"
        raise InvalidOption(text) from None
    except (ValueError, UnsupportedAlgorithm):
        raise InvalidOption(
            f"CAMSERVE_TLS_KEY={path} must hold a private key in PEM (-----BEGIN PRIVATE KEY-----), "
            f"got {len(content)} bytes of something else"
        ) from None


def _encoded(key: PublicKeyTypes) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

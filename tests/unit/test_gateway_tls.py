"""The files of a TLS server: what is taken, what is refused, and what happens when they change."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from camserve.errors import InvalidOption
from camserve.gateway.ops.settings import Settings
from camserve.gateway.ops.tls import certificates

CA = trustme.CA()


class Files:
    def __init__(self, folder: Path, client_ca: bool = False) -> None:
        self.cert, self.key, self.ca = folder / "tls.crt", folder / "tls.key", folder / "ca.crt"
        self.client_ca = self.ca if client_ca else None
        self.issue()
        CA.cert_pem.write_to_path(self.ca)

    def issue(self) -> bytes:
        """A new pair; returns the certificate."""
        pair = CA.issue_cert("localhost", "127.0.0.1")
        self.key.write_bytes(pair.private_key_pem.bytes())
        self.cert.write_bytes(b"".join(blob.bytes() for blob in pair.cert_chain_pems))
        return self.cert.read_bytes()

    def read(self):
        settings = Settings(tls_cert=self.cert, tls_key=self.key, tls_client_ca=self.client_ca)
        return certificates(settings, every_s=0)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_without_tls_there_are_none():
    assert certificates(Settings()) is None


def test_the_pair_is_read_with_its_end(files: Files):
    found = files.read().get()
    assert (found.chain, found.key, found.client_ca) == (files.cert.read_bytes(), files.key.read_bytes(), None)
    leaf = x509.load_pem_x509_certificates(found.chain)[0]
    assert found.expires_unix_s == leaf.not_valid_after_utc.timestamp()


def test_the_authorities_of_clients_are_read(tmp_path: Path):
    files = Files(tmp_path, client_ca=True)
    assert files.read().get().client_ca == CA.cert_pem.bytes()
    files.ca.write_text("nobody")
    with pytest.raises(InvalidOption, match=r"CAMSERVE_TLS_CLIENT_CA=.*ca\.crt must hold certificates in PEM"):
        files.read()


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("cert", b"", r"CAMSERVE_TLS_CERT=.*tls\.crt must hold certificates in PEM .* got 0 bytes"),
        ("cert", b"-----BEGIN CERTIFICATE-----\nMIIB", "must hold certificates in PEM"),
        ("key", b"nonsense", r"CAMSERVE_TLS_KEY=.*tls\.key must hold a private key in PEM .* got 8 bytes"),
        ("key", CA.private_key_pem.bytes(), r"tls\.key is not the key of the first certificate in .*tls\.crt"),
        ("key", None, r"cannot read .*tls\.key: No such file"),
    ],
)
def test_bad_files_stop_the_start_by_name(files: Files, name: str, content: bytes | None, text: str):
    path = getattr(files, name)
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(InvalidOption, match=text):
        files.read()


def test_a_key_with_a_passphrase_is_refused(files: Files):
    key = load_pem_private_key(files.key.read_bytes(), None)
    files.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"pass")))
    with pytest.raises(InvalidOption, match="a key without a passphrase"):
        files.read()


def test_a_rotated_pair_is_taken_whole_or_not_at_all(files: Files, caplog: pytest.LogCaptureFixture):
    found, old, old_key = files.read(), files.cert.read_bytes(), files.key.read_bytes()
    new = files.issue()
    new_key = files.key.read_bytes()
    files.key.write_bytes(old_key)  # the certificate has come, its key has not
    for _ in range(3):
        assert (found.get().chain, found.get().key) == (old, old_key)
    problems = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(problems) == 1
    assert "is not the key of the first certificate" in problems[0].getMessage()
    files.key.write_bytes(new_key)
    assert (found.get().chain, found.get().key) == (new, new_key)


def test_a_folder_that_is_swapped_by_a_link_is_followed(tmp_path: Path):
    """As Kubernetes does it: ..data is a link to a folder of its own for each generation."""
    for generation in ("one", "two"):
        (tmp_path / generation).mkdir()
        Files(tmp_path / generation)
    link = tmp_path / "..data"
    link.symlink_to("one")
    settings = Settings(tls_cert=link / "tls.crt", tls_key=link / "tls.key")
    found = certificates(settings, every_s=0)
    assert found.get().chain == (tmp_path / "one/tls.crt").read_bytes()
    new = tmp_path / "..new"
    new.symlink_to("two")
    new.rename(link)
    assert found.get().chain == (tmp_path / "two/tls.crt").read_bytes()

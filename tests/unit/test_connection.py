"""How clients reach servers: local or not, files, tokens, and the command line's options for them."""

from __future__ import annotations

import hashlib
import tomllib
from pathlib import Path

import pytest
import trustme

from camserve import cli, client, connection
from camserve.connection import Tls, credentials, is_local, metadata, read_token
from camserve.errors import InvalidOption


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:8500",
        "127.8.9.10:1",
        "localhost:8500",
        "localhost",
        "[::1]:8500",
        "dns:///localhost:8500",
        "ipv4:127.0.0.1:8500",
        "ipv6:[::1]:8500",
        "unix:/run/camserve.sock",
    ],
)
def test_addresses_of_this_machine(address: str):
    assert is_local(address)
    assert credentials(address, None, "secret") is None


@pytest.mark.parametrize(
    "address",
    [
        "camserve.example:8500",
        "10.0.0.1:8500",
        "0.0.0.0:8500",
        "127.evil.example:8500",
        "127.0.0.1.evil.example:8500",
        "localhost.example:8500",
        "[2001:db8::1]:8500",
        "dns:///camserve:8500",
        "dns://resolver.example/localhost:8500",
        "unix.example:8500",
        "ipv4:127.0.0.1:1,10.0.0.1:1",
        "",
    ],
)
def test_a_token_does_not_leave_the_machine_in_plain_text(address: str):
    assert not is_local(address)
    assert credentials(address, None, None) is None
    with pytest.raises(InvalidOption, match="a token goes over TLS"):
        credentials(address, None, "secret")


def test_a_token_may_leave_over_tls(tmp_path: Path):
    trustme.CA().cert_pem.write_to_path(tmp_path / "ca.pem")
    assert credentials("camserve.example:443", Tls(ca=tmp_path / "ca.pem"), "secret") is not None
    assert credentials("camserve.example:443", Tls(), "secret") is not None


def test_a_certificate_needs_its_key_and_files_must_be_there(tmp_path: Path):
    with pytest.raises(InvalidOption, match="belong together"):
        Tls(cert="client.pem")
    with pytest.raises(InvalidOption, match=r"cannot read .*none\.pem: No such file"):
        Tls(ca=tmp_path / "none.pem").credentials()


def test_the_metadata_have_the_token_and_a_bad_one_is_not_sent():
    assert metadata(None) == ()
    assert metadata("camserve_x") == (("authorization", "Bearer camserve_x"),)
    for bad in ("", "a b", "a\n", "ä"):
        with pytest.raises(InvalidOption, match="printable ASCII"):
            metadata(bad)


def test_a_token_file_may_end_with_a_line_end(tmp_path: Path):
    (tmp_path / "token").write_text("camserve_x\n")
    assert read_token(tmp_path / "token") == "camserve_x"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list:
    """Arguments of the client that the command line makes; it gets no further."""
    calls: list = []

    def make(address: str, **options: object) -> None:
        calls.append((address, options))
        raise InvalidOption("enough")

    monkeypatch.setattr(client, "Client", make)
    return calls


@pytest.mark.parametrize("command", [["models"], ["explain", "cat.png"]])
def test_the_command_line_has_tls_and_tokens(command: list[str], made: list, tmp_path: Path):
    (tmp_path / "token").write_text("camserve_x\n")
    options = ["--address", "a:1", "--tls-ca", "ca.pem", "--tls-cert", "c.pem", "--tls-key", "k.pem"]
    assert cli.run([*command, *options, "--token-file", str(tmp_path / "token")]) == 2
    assert made[0][0] == "a:1"
    assert made[0][1]["tls"] == Tls(Path("ca.pem"), Path("c.pem"), Path("k.pem"))
    assert made[0][1]["token"] == "camserve_x"


def test_the_command_line_may_trust_public_authorities_or_use_plain_text(made: list):
    cli.run(["models", "--tls"])
    cli.run(["models"])
    assert [options["tls"] for _, options in made] == [Tls(), None]


def test_a_token_in_plain_text_is_refused_by_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "token").write_text("camserve_x")
    assert cli.run(["models", "--address", "a.example:1", "--token-file", str(tmp_path / "token")]) == 2
    assert "a token goes over TLS" in capsys.readouterr().err


def test_the_command_makes_a_token(capsys: pytest.CaptureFixture[str]):
    assert cli.run(["token", "radiology", "--priority", "normal", "--requests-per-s", "2"]) == 0
    out, err = capsys.readouterr()
    secret = err.strip().rpartition(" ")[2]
    entry = tomllib.loads(out)["tokens"]["radiology"]
    assert entry == {"sha256": hashlib.sha256(secret.encode()).hexdigest(), "priority": "normal", "requests_per_s": 2}
    assert secret not in out
    assert cli.run(["token", "a b"]) == 2
    assert cli.run(["token", "a", "--max-requests", "0"]) == 2


def test_both_clients_have_the_same_arguments():
    for kind in (client.Client, client.AsyncClient):
        with pytest.raises(InvalidOption, match="a token goes over TLS"):
            kind("camserve.example:443", token="x")
    assert connection.Tls is client.Tls

"""Defines the options by which a command reaches a server, and the command that makes tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from camserve.cli.extras import needs_extra

if TYPE_CHECKING:
    from camserve.client import Client
    from camserve.connection import Tls

DEFAULT_ADDRESS = "127.0.0.1:8500"
_Command = TypeVar("_Command", bound=Callable[..., Any])
_FILE = click.Path(path_type=Path)
_OPTIONS = (
    click.option("--address", default=DEFAULT_ADDRESS, show_default=True, help="Of the server."),
    click.option("--tls", is_flag=True, help="The server has TLS, with a certificate of a public authority."),
    click.option("--tls-ca", type=_FILE, metavar="PEM", help="It has TLS, with a certificate of these authorities."),
    click.option("--tls-cert", type=_FILE, metavar="PEM", help="It has mutual TLS: what is shown to it."),
    click.option("--tls-key", type=_FILE, metavar="PEM", help="Of --tls-cert."),
    click.option("--token-file", type=_FILE, metavar="FILE", help="It wants a bearer token: the file with its secret."),
)


@dataclass(frozen=True)
class Connection:
    """Holds what the options of a connection say."""

    address: str
    tls: bool
    tls_ca: Path | None
    tls_cert: Path | None
    tls_key: Path | None
    token_file: Path | None

    def client(self, timeout_s: float | None) -> Client:
        """Returns a client of the server.

        Raises:
            InvalidOption: a file cannot be read, or a token would go out in plain text.
        """
        from camserve.client import Client
        from camserve.connection import read_token

        token = None if self.token_file is None else read_token(self.token_file)
        return Client(self.address, timeout_s=timeout_s, tls=self._tls(), token=token)

    def _tls(self) -> Tls | None:
        from camserve.connection import Tls

        files = (self.tls_ca, self.tls_cert, self.tls_key)
        return Tls(*files) if self.tls or any(files) else None


def connection_options(command: _Command) -> _Command:
    """Gives a command the options of a connection; it is then called with `connection`."""

    @functools.wraps(command)
    def called(**options: Any) -> Any:
        found = Connection(**{name: options.pop(name) for name in Connection.__dataclass_fields__})
        return command(connection=found, **options)

    for option in reversed(_OPTIONS):
        called = option(called)
    return called  # type: ignore[return-value]  # it takes the place of the command


@click.command()
@click.argument("name")
@click.option(
    "--priority",
    type=click.Choice(["interactive", "normal", "batch"]),
    help="Best class that it may ask for.  [default: interactive]",
)
@click.option("--requests-per-s", type=float, help="Explain calls in a second, in the long run.  [default: any number]")
@click.option("--burst", type=int, help="Calls at once after a pause.  [default: those of a second]")
@click.option(
    "--max-requests", type=int, help="Requests of a model taken on at once.  [default: the server's, or half]"
)
@click.option(
    "--max-waiting-s", type=float, help="Seconds of predicted work that wait.  [default: the server's, or half]"
)
def token(name: str, **bounds: Any) -> None:
    """Make a bearer token for NAME.

    Prints the secret once, on stderr, and on stdout the entry for the file that CAMSERVE_TOKENS names:

        camserve token radiology >> tokens.toml
    """
    with needs_extra("gateway"):
        from camserve.gateway.api.access import new_token

        secret, entry = new_token(name, **bounds)
        click.echo(f"secret of {name}, shown this once: {secret}", err=True)
        click.echo(entry, nl=False)

"""Bearer tokens: a TOML file that says who may call. It holds hashes, and `camserve token` writes its entries.

A secret is 256 random bits. So a plain SHA-256 keeps it: there is nothing to guess that salt or a slow hash would
protect, as there is with passwords.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import re
import secrets
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from camserve.errors import InvalidOption
from camserve.gateway.access import Caller
from camserve.gateway.reloaded import Reloaded
from camserve.types import Priority

_NAME = re.compile("[A-Za-z0-9_-]{1,64}")  # a key that TOML lets stand without quotes

_SECRET_BYTES = 32
_SECRET_PREFIX = "camserve_"  # lets scanners of repositories find one that was committed


class Entry(BaseModel):
    """One token, `[tokens.NAME]` in the file. A bound that is not set does not hold."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")] = Field(
        description="64 hexadecimal digits in lower case, the SHA-256 of the secret"
    )
    priority: Priority = Field("interactive", description="interactive, normal or batch: the best class it may ask for")
    requests_per_s: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="a number above 0: explain calls in a second"
    )
    burst: int | None = Field(None, ge=1, description="a whole number from 1: calls at once after a pause")
    max_requests: int | None = Field(None, ge=1, description="a whole number from 1: requests of a model at once")
    max_waiting_queries: int | None = Field(
        None, ge=1, description="a whole number from 1: masked queries that wait for a model"
    )

    def caller(self, name: str) -> Caller:
        """Whom the token stands for. Without a burst it is what comes in a second."""
        return Caller(
            name=name,
            priority=self.priority,
            requests_per_s=self.requests_per_s,
            burst=self.burst or max(1, math.ceil(self.requests_per_s or 1)),
            max_requests=self.max_requests,
            max_waiting_queries=self.max_waiting_queries,
        )


@dataclass(frozen=True)
class Token:
    """A caller, and the hash of its secret."""

    digest: bytes
    caller: Caller


def token_file(path: Path, every_s: float = 1.0) -> Reloaded[tuple[Token, ...]]:
    """The tokens of a file, read again when it changes.

    Raises:
        InvalidOption: it cannot be read, or is bad; the text names the entry.
    """
    return Reloaded("tokens", [path], partial(_parsed, path), every_s)


def parse_tokens(path: Path, content: bytes) -> tuple[Token, ...]:
    """The tokens of a file's content.

    Raises:
        InvalidOption: it is no TOML, an entry is bad, or two have the same secret.
    """
    try:
        tables = tomllib.loads(content.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidOption(f"tokens in {path}: {error}") from None
    entries = tables.pop("tokens", None)
    if tables or not isinstance(entries, dict):  # an empty file may be one that is just being written
        raise InvalidOption(f"tokens in {path}: there must be tables [tokens.NAME], or [tokens] for nobody at all")
    found = tuple(_token(path, name, entry) for name, entry in entries.items())
    if len({token.digest for token in found}) < len(found):
        raise InvalidOption(f"tokens in {path}: two of them have the same sha256")
    return found


def identify(tokens: Sequence[Token], secret: str) -> Caller | None:
    """Whose secret it is; None: nobody's. It takes as long whichever token it is, and however much of it is right."""
    digest = _digest(secret)
    found = None
    for token in tokens:
        if hmac.compare_digest(token.digest, digest):
            found = token.caller
    return found


def new_token(name: str, **bounds: object) -> tuple[str, str]:
    """A new secret, and its entry for the file, which does not hold it.

    Args:
        name: of whoever gets the secret: letters, digits, "_" and "-".
        bounds: fields of `Entry`; None among them means "not set".

    Raises:
        InvalidOption: a name or a bound of another form.
    """
    secret = _SECRET_PREFIX + secrets.token_urlsafe(_SECRET_BYTES)
    given = {key: value for key, value in bounds.items() if value is not None}
    fields = {"sha256": _digest(secret).hex(), **given}
    _token(None, name, fields)
    return secret, "\n".join(_lines(name, fields)) + "\n"


def _lines(name: str, fields: dict[str, object]) -> Iterator[str]:
    yield f"[tokens.{name}]"
    for key, value in fields.items():
        yield f'{key} = "{value}"' if isinstance(value, str) else f"{key} = {value}"


def _parsed(path: Path, contents: Sequence[bytes]) -> tuple[Token, ...]:
    return parse_tokens(path, contents[0])


def _token(path: Path | None, name: str, fields: object) -> Token:
    where = f"tokens in {path}: " if path else ""
    if not _NAME.fullmatch(name):
        raise InvalidOption(f"{where}a token's name is 1..64 letters, digits, '_' and '-', got {name!r}")
    try:
        entry = Entry.model_validate(fields, strict=True)
    except ValidationError as error:
        raise InvalidOption(f"{where}{name}: {'; '.join(_problems(error))}") from None
    return Token(bytes.fromhex(entry.sha256), entry.caller(name))


def _problems(error: ValidationError) -> Iterator[str]:
    for problem in error.errors():
        key = str(problem["loc"][0]) if problem["loc"] else ""
        field = Entry.model_fields.get(key)
        if not key:
            yield "it must be a table"
        elif field is None:
            yield f"unknown {key!r}; there are {', '.join(Entry.model_fields)}"
        elif problem["type"] == "missing":
            yield f"{key} is missing: {field.description}"
        else:
            got = f"{len(str(problem['input']))} characters" if key == "sha256" else repr(problem["input"])
            yield f"{key} must be {field.description}; got {got}"  # perhaps the secret itself stands there


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()

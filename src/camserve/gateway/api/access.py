"""Says who may call, and what a caller may ask for: callers, their rates, and the file of their bearer tokens.

`camserve.gateway.api.auth` finds the caller of a call by its token; what handles the call then asks `caller()`. The
TOML file of the tokens holds hashes, and `camserve token` writes its entries. A secret is 256 random bits. So a plain
SHA-256 keeps it: there is nothing to guess that salt or a slow hash would protect, as there is with passwords.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import re
import secrets
import tomllib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from camserve.errors import InvalidOption, Overloaded
from camserve.gateway.api.status import Context
from camserve.gateway.ops.watched_files import Reloaded
from camserve.planning import CLASSES, Owner
from camserve.types import Priority

_NAME = re.compile("[A-Za-z0-9_-]{1,64}")  # a key that TOML lets stand without quotes

_SECRET_BYTES = 32
_SECRET_PREFIX = "camserve_"  # lets scanners of repositories find one that was committed


BESIDE_OTHERS = 0.5
"""Part of what the server takes on at once that one token has, where there are others: they always find room."""


@dataclass(frozen=True)
class Caller:
    """One who calls, with bounds on all calls with its token together; None stands for no bound of its own."""

    name: str = ""
    """Name of the token; empty for everybody where nobody needs a token."""
    priority: Priority = "interactive"
    """The best class that the caller may ask for."""
    requests_per_s: float | None = None
    """Number of explain calls in a second, in the long run."""
    burst: int = 1
    """Number of calls that may come at once after a pause."""
    max_requests: int | None = None
    """Number of requests that are taken on at once, for each model."""
    max_waiting_s: float | None = None
    """Seconds of one worker's predicted work that may wait, for each model."""
    part: float = 1.0
    """Part of what the server takes on at once, for bounds that are None."""

    @property
    def owner(self) -> Owner:
        """The caller as the planner knows it: the owner of its requests."""
        return Owner(self.name, self.max_requests, self.max_waiting_s, self.part)

    def capped(self, asked: Priority) -> Priority:
        """Returns the class that is asked for, or the best that is allowed where that is worse."""
        return max(asked, self.priority, key=CLASSES.index)


ANYONE = Caller()
"""The caller of every call where tokens are off."""

_caller: ContextVar[Caller] = ContextVar("camserve_caller", default=ANYONE)


def caller() -> Caller:
    """Returns who made the call that is being answered; `ANYONE` where tokens are off."""
    return _caller.get()


def party_of(context: Context) -> str:
    """Returns who takes turns with others at a call: its token, or its connection where tokens are off."""
    return caller().name or context.peer()


def set_caller(found: Caller) -> None:
    """Sets who made a call; to be called once, in the task that answers it."""
    _caller.set(found)


class Rates:
    """Bounds the rate of each caller by a token bucket, with the bounds that the caller has at the moment of a call."""

    def __init__(self) -> None:
        self._buckets: dict[str, tuple[float, float]] = {}  # (calls left, when that was)

    def check(self, who: Caller, now_s: float) -> None:
        """Counts a call.

        Raises:
            Overloaded: the call is one too many; the hint says when there is room for one.
        """
        if who.requests_per_s is None:
            return
        left, then_s = self._buckets.get(who.name, (math.inf, now_s))
        left = min(left + (now_s - then_s) * who.requests_per_s, float(who.burst))
        self._buckets[who.name] = (left, now_s) if left < 1 else (left - 1, now_s)
        if left < 1:
            raise Overloaded(
                f"at most {who.requests_per_s:g} requests per second of {who.name}, {who.burst} at once; "
                "try again later",
                (1 - left) / who.requests_per_s,
                "token_rate",
            )


class Entry(BaseModel):
    """One token, which is `[tokens.NAME]` in the file. A bound that is not set does not hold."""

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
    max_waiting_s: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="a number above 0: seconds of predicted work that wait for a model"
    )

    def caller(self, name: str) -> Caller:
        """Returns the caller that the token stands for; its burst is the calls of a second unless it is set."""
        return Caller(
            name=name,
            priority=self.priority,
            requests_per_s=self.requests_per_s,
            burst=self.burst or max(1, math.ceil(self.requests_per_s or 1)),
            max_requests=self.max_requests,
            max_waiting_s=self.max_waiting_s,
        )


@dataclass(frozen=True)
class Token:
    """A caller with the hash of its secret."""

    digest: bytes
    caller: Caller


def token_file(path: Path, every_s: float = 1.0) -> Reloaded[tuple[Token, ...]]:
    """Returns the tokens of a file, which is read again when it changes.

    Raises:
        InvalidOption: the file cannot be read, or is bad; the text names the entry.
    """
    return Reloaded("tokens", [path], partial(_parsed, path), every_s)


def parse_tokens(path: Path, content: bytes) -> tuple[Token, ...]:
    """Returns the tokens that the content of a file has.

    Raises:
        InvalidOption: the content is no TOML, an entry is bad, or two have the same secret.
    """
    try:
        tables = tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:  # no TOML; also numbers of 5000 digits, and brackets in brackets
        raise InvalidOption(f"tokens in {path}: {error}") from None
    entries = tables.pop("tokens", None)
    if tables or not isinstance(entries, dict):  # an empty file may be one that is just being written
        raise InvalidOption(f"tokens in {path}: there must be tables [tokens.NAME], or [tokens] for nobody at all")
    found = tuple(_token(path, name, entry) for name, entry in entries.items())
    if len({token.digest for token in found}) < len(found):
        raise InvalidOption(f"tokens in {path}: two of them have the same sha256")
    if len(found) > 1:
        found = tuple(replace(token, caller=replace(token.caller, part=BESIDE_OTHERS)) for token in found)
    return found


def identify(tokens: Sequence[Token], secret: str) -> Caller | None:
    """Returns the caller whose secret it is; None where it is nobody's."""
    digest = _digest(secret)
    found = None
    # Every token is compared, in constant time: how long this takes tells neither which one fits nor how much of it.
    for token in tokens:
        if hmac.compare_digest(token.digest, digest):
            found = token.caller
    return found


def new_token(name: str, **bounds: object) -> tuple[str, str]:
    """Returns a new secret, and its entry for the file, which does not hold it.

    Args:
        name: name of whoever gets the secret: letters, digits, "_" and "-".
        bounds: fields of `Entry`; None means "not set".

    Raises:
        InvalidOption: the name or a bound has another form.
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
    """Yields what is wrong with an entry, with what is allowed; pydantic's own texts would show the input."""
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
            # A sha256 is not shown: the secret itself may stand there by mistake.
            got = f"{len(str(problem['input']))} characters" if key == "sha256" else repr(problem["input"])
            yield f"{key} must be {field.description}; got {got}"


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()

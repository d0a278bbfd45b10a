"""Reads settings from defaults, one TOML file, environment variables and flags, of which the later wins.

The gateway and the worker have a class of settings each, with a table in the file and a prefix in the environment. What
is unknown or bad stops the start; the text names the setting, where it was set, its value and what is expected.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import ValidationError
from pydantic_settings import BaseSettings

from camserve.errors import InvalidOption

PREFIX = "CAMSERVE_"
FILE_VARIABLE = "CAMSERVE_CONFIG"
"""Variable with the path of the file, which counts where no flag names one."""

TABLES = ("gateway", "worker")

# Kubernetes puts these into every pod of a namespace that has a Service named camserve or camserve-something. No
# setting may have such a name: hence `metrics_listen` and not `metrics_port`.
KUBERNETES = re.compile(r"_SERVICE_(HOST|PORT(_\w+)?)$|_PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?$")

_SECRET = re.compile("key|token|secret|password", re.IGNORECASE)
_HIDDEN = "(hidden)"
_FILES = (".toml", ".pem", ".crt", ".cer", ".key")


class Layered(BaseSettings):
    """Holds settings that `load` can fill. A value that is given to the constructor wins over the environment."""

    table: ClassVar[str]
    """Name of the table in the file."""
    others: ClassVar[frozenset[str]] = frozenset()
    """Variables with this prefix that belong to others; those that end with "_" are beginnings of names."""

    @classmethod
    def variable(cls, name: str) -> str:
        """Returns the environment variable of a setting."""
        return f"{cls.model_config['env_prefix']}{name.upper()}"

    @classmethod
    def load(cls, file: Path | None = None, /, **flags: Any) -> Self:
        """Returns the settings from the file, the environment and flags.

        Args:
            file: a TOML file; None: the one that `CAMSERVE_CONFIG` names, if it does.
            flags: values that win over everything; None means "not given".

        Raises:
            InvalidOption: something is unknown or not of the expected form; the text names all of it.
        """
        cls._check_names(os.environ)
        table = read_file(file).get(cls.table, {})
        given = {name: value for name, value in table.items() if not os.environ.get(cls.variable(name))}
        flags = {name: value for name, value in flags.items() if value is not None}
        where = {name: f"{cls.table}.{name} in {file_path(file)}" for name in given} | dict.fromkeys(flags, "a flag")
        try:
            return cls(**(given | flags))
        except ValidationError as error:
            problems = [cls._sentence(dict(problem), where) for problem in error.errors()]
            raise InvalidOption("; ".join(problems)) from None

    def lines(self, file: Path | None = None) -> Iterator[str]:
        """Yields the lines of a commented TOML table of the settings, with meaning and origin; secrets are hidden."""
        table = read_file(file).get(self.table, {})
        yield f"[{self.table}]"
        for name, field in type(self).model_fields.items():
            origin, value = self._origin(name, table, file), getattr(self, name)
            line = f"# {name} = (unset)" if value is None else f"{name} = {_toml(shown(name, value))}"
            yield f"# {field.description}"
            yield f"{line}  # from {origin}" if origin else line

    def _origin(self, name: str, table: Mapping[str, Any], file: Path | None) -> str:
        """Returns where the value was set; "" for a default."""
        if os.environ.get(self.variable(name)):
            return self.variable(name)
        if name in table:
            return str(file_path(file))
        return ""

    @classmethod
    def _check_names(cls, environ: Mapping[str, str]) -> None:
        known = [cls.variable(name) for name in cls.model_fields]
        prefix = cls.model_config["env_prefix"]
        for variable in environ:
            if variable.startswith(prefix) and variable not in known and not cls._is_of_others(variable):
                near = difflib.get_close_matches(variable, known, n=1, cutoff=0.8)  # the prefix alone makes 0.6 alike
                hint = f"; did you mean {near[0]}?" if near else "; `camserve config` lists all of them"
                raise InvalidOption(f"unknown setting {variable}={shown(variable, environ[variable])!r}{hint}")

    @classmethod
    def _is_of_others(cls, variable: str) -> bool:
        own = (variable == FILE_VARIABLE, variable in cls.others, KUBERNETES.search(variable))
        return any(own) or any(variable.startswith(other) for other in cls.others if other.endswith("_"))

    @classmethod
    def _sentence(cls, problem: Mapping[str, Any], where: Mapping[str, str]) -> str:
        if not problem["loc"]:
            return str(problem["msg"]).removeprefix("Value error, ")
        name = str(problem["loc"][0])
        field = cls.model_fields.get(name)
        if field is None:
            near = difflib.get_close_matches(name, cls.model_fields, n=1)
            return f"{where[name]}: unknown setting" + (f"; did you mean {near[0]}?" if near else "")
        origin = where.get(name)
        label = f"{cls.variable(name)}={shown(name, problem['input'])!r}"
        place = f" ({origin})" if origin else ""
        return f"{label}{place}: {problem['msg']} ({field.description})"


def file_path(file: Path | None) -> Path | None:
    """Returns the file of settings: the argument, else what `CAMSERVE_CONFIG` says."""
    named = os.environ.get(FILE_VARIABLE)
    return file or (Path(named) if named else None)


def read_file(file: Path | None) -> dict[str, dict[str, Any]]:
    """Returns the tables of the file by name; none without a file.

    Raises:
        InvalidOption: it cannot be read, is no TOML, or has something besides the tables `gateway` and `worker`.
    """
    path = file_path(file)
    if path is None:
        return {}
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidOption(f"cannot read the settings in {path}: {error}") from None
    for name, table in found.items():
        if name not in TABLES or not isinstance(table, dict):
            raise InvalidOption(f"{path}: settings are in the tables [gateway] and [worker], got {name!r}")
    return found


def shown(name: str, value: Any) -> Any:
    """Returns the value, or "(hidden)" where it may be a secret, by its name and because it is no path."""
    if not _SECRET.search(name) or value in (None, ""):
        return value
    text = str(value)
    is_path = text.startswith(("/", "./", "../")) or Path(text).suffix in _FILES
    return value if is_path and "\n" not in text else _HIDDEN


def _toml(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value if isinstance(value, (bool, int, float)) else str(value))

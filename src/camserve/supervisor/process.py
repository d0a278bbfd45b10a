"""Runs TorchServe as a child process: starts it, watches it until its workers are ready, stops it without leftovers.

Everything that TorchServe writes is in one private directory, which is removed with it. The JVM is told to stop when
this process dies; what is left of its process group is killed.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import deque
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from camserve.addresses import bound_socket, reached
from camserve.archive import ensure_archive
from camserve.errors import CamserveError, Unavailable
from camserve.supervisor.config import HOST, Addresses, command, environment, properties, render
from camserve.supervisor.java import find_java
from camserve.supervisor.settings import WorkerSettings
from camserve.supervisor.state import worker_states

_log = logging.getLogger("camserve.torchserve")
"""Log of what TorchServe and its workers write, line by line."""

_POLL_S = 0.1
_WATCH_S = 1.0
_START_ATTEMPTS = 3
_QUIET_S, _WORDS_S = 0.3, 2.0
"""Seconds without a line after which all is said of a load that failed, and the most that are waited for them."""
_TAIL_LINES = 200
_SHOWN_LINES = 40

_FAILURES = ("Load model failed", "Failed to load model", "Backend worker error")
"""Texts of a load that failed: TorchServe tries again, but the load fails again."""

_LEVELS = {"ERROR": logging.ERROR, "WARN": logging.WARNING, "DEBUG": logging.DEBUG}
"""Levels by the word that a line of the JVM begins with; every other line is INFO."""

_PORT_TAKEN = ("Address already in use", "Failed to bind to address")

# Runs in the child before Java takes its place (same process id): asks for SIGTERM when the parent dies, where the
# kernel can do that. Not as `preexec_fn`, which may deadlock in a process with threads, such as those of gRPC.
_DIE_WITH_PARENT = """
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 15)  # PR_SET_PDEATHSIG, SIGTERM
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent process has died")
os.execv(sys.argv[2], sys.argv[2:])
"""


class TorchServe:
    """Runs one TorchServe; as a context manager it is ready inside, and gone afterwards."""

    def __init__(self, options: WorkerSettings) -> None:
        self._options = options
        self._addresses = Addresses("", "", "", "", "")
        self._directory: Path | None = None
        self._lock: int | None = None
        self._unpacked: list[Path] = []
        """Files of the archives, as TorchServe has unpacked them."""
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._failed = asyncio.Event()
        self._heard_s = 0.0  # when the last line of the log came

    @property
    def grpc_address(self) -> str:
        """Address of the gRPC inference service, "host:port"."""
        return reached(self._addresses.grpc_inference)

    @property
    def backend(self) -> str:
        """Name of the backend as the setting `upstreams` has it, "host:grpc_port:management_port"."""
        return f"{self.grpc_address}:{self._addresses.management.rpartition(':')[2]}"

    @property
    def inference_url(self) -> str:
        """URL of the REST API for plain clients: `<inference_url>/predictions/<model>`."""
        return f"http://{reached(self._addresses.inference)}"

    @property
    def management_url(self) -> str:
        """URL of the management API, which tells the state of the workers: `<management_url>/models/<model>`."""
        return f"http://{reached(self._addresses.management)}"

    @property
    def metrics_url(self) -> str:
        """URL of the Prometheus metrics of TorchServe itself."""
        return f"http://{reached(self._addresses.metrics)}/metrics"

    @property
    def pid(self) -> int | None:
        """Process id of the JVM, which is also that of the process group of its workers; None when not started."""
        return self._process.pid if self._process else None

    @property
    def log_tail(self) -> str:
        """The last lines that TorchServe and its workers wrote."""
        return "\n".join(list(self._tail)[-_SHOWN_LINES:])

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Starts the JVM and waits until every worker of every model is ready.

        Raises:
            NotFound: no Java, no TorchServe, or no such archive.
            InvalidOption: a given port is taken.
            Unavailable: a model does not load, or it takes too long; the text has the log's last lines.
        """
        for name in self._options.models:
            await asyncio.to_thread(ensure_archive, name, self._options.store)
        java = await asyncio.to_thread(find_java)
        for _ in range(_START_ATTEMPTS - 1):
            with suppress(_PortTaken):  # somebody took a port between our look and TorchServe's: look again
                await self._start_once(java)
                return
        await self._start_once(java)

    async def wait(self) -> int:
        """Waits until the JVM exits, and returns its exit code."""
        if self._process is None:
            raise RuntimeError("TorchServe is not started")
        return await self._process.wait()

    async def until_bereft(self) -> Unavailable:
        """Returns, once a model has no worker and none will come back, the error that says why.

        TorchServe starts a worker that died again and again, from the archive that it unpacked when it began. Somebody
        may have emptied that folder meanwhile; then only another TorchServe can help. Else a worker has as long as at
        the start, `start_timeout_s`.
        """
        away_since_s = dict[str, float]()
        while True:
            await asyncio.sleep(_WATCH_S)
            now_s = time.monotonic()
            for model in self._options.models:
                if await asyncio.to_thread(self._may_have_worker, model):
                    away_since_s.pop(model, None)
                elif any(not path.exists() for path in self._unpacked):
                    return self._failure(f"no worker of {model} can come back: its unpacked archive was deleted")
                elif now_s - away_since_s.setdefault(model, now_s) > self._options.start_timeout_s:
                    return self._failure(f"no worker of {model} came back in {self._options.start_timeout_s:g} s")

    async def stop(self, grace_s: float | None = None) -> None:
        """Stops the JVM and its workers: in peace, then by force. Does nothing when it is not started.

        Args:
            grace_s: seconds to stop in peace; None: `stop_timeout_s` of the settings.
        """
        if self._process is not None:
            await self._stop_processes(self._process, self._options.stop_timeout_s if grace_s is None else grace_s)
            self._process = None
        if self._reader is not None:
            await self._reader
            self._reader = None
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    async def _start_once(self, java: Path) -> None:
        self._addresses = bound_addresses(self._options)
        self._tail.clear()
        self._failed.clear()
        try:
            await self._spawn(java)
            async with asyncio.timeout(self._options.start_timeout_s):
                await self._until_ready()
            assert self._directory is not None
            self._unpacked = list(Path(self._directory, "models").rglob("*"))
        except TimeoutError:
            await self.stop(0)  # nobody's request is running
            raise self._failure(f"TorchServe is not ready after {self._options.start_timeout_s:g} s") from None
        except BaseException:
            await self.stop(0)
            raise

    async def _spawn(self, java: Path) -> None:
        # Unix sockets live here, whose paths may have about 100 characters.
        parent = "/tmp" if len(tempfile.gettempdir()) > 60 else None
        self._directory = Path(tempfile.mkdtemp(prefix="camserve-", dir=parent))
        # Cleaners of temporary folders (systemd-tmpfiles) leave a folder alone as long as somebody holds a lock on it.
        self._lock = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(self._lock, fcntl.LOCK_SH)
        config = render(properties(self._options, self._addresses))
        (self._directory / "config.properties").write_text(config, encoding="ascii")
        line = command(java, self._directory, self._options)
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *line),
            cwd=self._directory,
            env=environment(self._directory, self._options),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,  # a group of its own: a terminal's Ctrl-C reaches only us
        )
        self._reader = asyncio.create_task(self._read(self._process))

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        rest = b""
        while chunk := await process.stdout.read(2**16):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self._take(line)
        self._take(rest)

    def _take(self, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip()
        if not text:
            return
        self._tail.append(text)
        self._heard_s = time.monotonic()
        _log.log(_LEVELS.get(text.partition(" ")[0], logging.INFO), "%s", text)
        if any(failure in text for failure in _FAILURES):
            self._failed.set()

    async def _until_ready(self) -> None:
        assert self._process is not None
        waiting = set(self._options.models)
        while waiting:
            if self._process.returncode is not None:
                raise await self._exited()
            if self._failed.is_set():
                await self._last_words()
                raise self._failure(f"a model does not load ({', '.join(sorted(waiting))})")
            waiting = {model for model in waiting if not await asyncio.to_thread(self._all_ready, model)}
            if waiting:
                await asyncio.sleep(_POLL_S)

    async def _last_words(self) -> None:
        """Returns once the log is quiet: the JVM may say that a load failed before it passes on the worker's reason."""
        end_s = time.monotonic() + _WORDS_S
        while (wait_s := min(self._heard_s + _QUIET_S, end_s) - time.monotonic()) > 0:
            await asyncio.sleep(wait_s)

    def _may_have_worker(self, model: str) -> bool:
        """Tells whether a worker of the model is READY; TorchServe may also be too busy to say."""
        try:
            return "READY" in worker_states(self.management_url, model, timeout_s=5)
        except (OSError, ValueError):
            return True

    def _all_ready(self, model: str) -> bool:
        try:
            states = worker_states(self.management_url, model, timeout_s=5)
        except (OSError, ValueError):  # not up yet
            return False
        return len(states) == self._options.workers and set(states) == {"READY"}

    async def _exited(self) -> CamserveError:
        assert self._process is not None
        assert self._reader is not None
        await self._reader
        if any(sign in self.log_tail for sign in _PORT_TAKEN):
            return _PortTaken(self._text("a port that TorchServe was given is taken"))
        return self._failure(f"TorchServe exited with code {self._process.returncode} while it started")

    def _failure(self, what: str) -> Unavailable:
        return Unavailable(self._text(what))

    def _text(self, what: str) -> str:
        return f"{what}; the last lines of its log:\n{self.log_tail}"

    async def _stop_processes(self, process: asyncio.subprocess.Process, grace_s: float) -> None:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.terminate()
            with suppress(TimeoutError):  # it waits without a limit for open calls
                await asyncio.wait_for(process.wait(), grace_s)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # workers that outlived the JVM, and the JVM itself
        await process.wait()


class _PortTaken(Unavailable):
    """Another process took a port between our look for free ones and TorchServe's start."""


def bound_addresses(options: WorkerSettings) -> Addresses:
    """Returns the addresses of the settings, with a port that is free now for each port 0.

    Raises:
        InvalidOption: a given port is taken, or an address is not of this machine.
    """
    wanted = (options.inference_listen, options.management_listen, options.metrics_listen, options.grpc_listen)
    with ExitStack() as stack:  # all at once, so that no two are the same
        return Addresses(*(_bound(stack, address) for address in (*wanted, f"{HOST}:0")))


def check_free(address: str) -> None:
    """Checks that a server can listen on "host:port".

    Raises:
        InvalidOption: the port is taken, or the address is not of this machine.
    """
    bound_socket(address).close()


def _bound(stack: ExitStack, address: str) -> str:
    """Returns the address with its port filled in; the port stays taken until the stack is closed."""
    listener = stack.enter_context(bound_socket(address))
    return f"{address.rpartition(':')[0]}:{listener.getsockname()[1]}"

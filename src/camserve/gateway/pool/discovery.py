"""Finds the TorchServes behind a gateway. A backend is one of them: an address, with a connection of its own.

Names are resolved again and again: behind the name of a headless Service of Kubernetes backends come and go.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

from camserve.gateway.pool.torchserve import Backend, TorchServeBackend

_log = logging.getLogger(__name__)


class Pool(Mapping[str, Backend]):
    """Holds the connections of now, by the name of their backend.

    Args:
        find: returns the names of all backends. Raises OSError when nobody can tell; the known ones then stay.
        connect: returns a connection to a backend.
    """

    def __init__(self, find: Callable[[], Awaitable[Sequence[str]]], connect: Callable[[str], Backend]) -> None:
        self._find = find
        self._connect = connect
        self._backends: dict[str, Backend] = {}

    def __getitem__(self, name: str) -> Backend:
        return self._backends[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._backends)

    def __len__(self) -> int:
        return len(self._backends)

    async def look(self) -> Mapping[str, Backend]:
        """Connects to new backends; takes out those that are gone and returns them, to be closed by the caller."""
        try:
            found = await self._find()
        except OSError as error:
            _log.warning("looking for TorchServe: %s", error)
            return {}
        gone = {name: self._backends.pop(name) for name in list(self._backends) if name not in found}
        for name in found:
            if name not in self._backends:
                self._backends[name] = self._connect(name)
        return gone

    async def close(self) -> None:
        """Closes every connection."""
        backends, self._backends = self._backends, {}
        for backend in backends.values():
            await backend.close()


def fixed(backends: Mapping[str, Backend]) -> Pool:
    """Returns a pool whose backends never change."""

    async def find() -> Sequence[str]:
        return list(backends)

    return Pool(find, backends.__getitem__)


def torchserves(addresses: Sequence[str]) -> Pool:
    """Returns the pool of TorchServes at "host:grpc_port:management_port"; a host name stands for all its addresses."""

    async def find() -> Sequence[str]:
        resolved = await asyncio.gather(*map(_resolved, addresses))
        return list(dict.fromkeys(name for some in resolved for name in some))

    return Pool(find, _torchserve)


def _torchserve(name: str) -> Backend:
    host, grpc_port, management_port = name.rsplit(":", 2)
    return TorchServeBackend(f"{host}:{grpc_port}", f"http://{host}:{management_port}")


async def _resolved(address: str) -> list[str]:
    """Returns "host:..." as "address:..." for each address of the host, sorted."""
    host, ports = address.rsplit(":", 2)[0].strip("[]"), address.rsplit(":", 2)[1:]
    found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    hosts = sorted({str(entry[4][0]) for entry in found})
    return [":".join([f"[{one}]" if ":" in one else one, *ports]) for one in hosts]

"""The TorchServes behind a gateway. A place is one of them: an address, with a connection of its own.

Names are resolved again and again: behind the name of a headless Service of Kubernetes places come and go.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

from camserve.gateway.upstream import TorchServeUpstream, Upstream

_log = logging.getLogger(__name__)


class Places(Mapping[str, Upstream]):
    """The connections of now, by place.

    Args:
        find: the places that there are. Raises OSError when nobody can tell; then those known stay.
        connect: a connection to a place.
    """

    def __init__(self, find: Callable[[], Awaitable[Sequence[str]]], connect: Callable[[str], Upstream]) -> None:
        self._find = find
        self._connect = connect
        self._upstreams: dict[str, Upstream] = {}

    def __getitem__(self, place: str) -> Upstream:
        return self._upstreams[place]

    def __iter__(self) -> Iterator[str]:
        return iter(self._upstreams)

    def __len__(self) -> int:
        return len(self._upstreams)

    async def look(self) -> Mapping[str, Upstream]:
        """Connects to new places; those that are gone are taken out and returned, still to be closed."""
        try:
            found = await self._find()
        except OSError as error:
            _log.warning("looking for TorchServe: %s", error)
            return {}
        gone = {place: self._upstreams.pop(place) for place in list(self._upstreams) if place not in found}
        for place in found:
            if place not in self._upstreams:
                self._upstreams[place] = self._connect(place)
        return gone

    async def close(self) -> None:
        """Closes every connection."""
        upstreams, self._upstreams = self._upstreams, {}
        for upstream in upstreams.values():
            await upstream.close()


def fixed(upstreams: Mapping[str, Upstream]) -> Places:
    """Places that never change."""

    async def find() -> Sequence[str]:
        return list(upstreams)

    return Places(find, upstreams.__getitem__)


def torchserves(addresses: Sequence[str]) -> Places:
    """TorchServes at "host:grpc_port:management_port"; a host name stands for every address it resolves to."""

    async def find() -> Sequence[str]:
        resolved = await asyncio.gather(*map(_resolved, addresses))
        return list(dict.fromkeys(place for some in resolved for place in some))

    return Places(find, _torchserve)


def _torchserve(place: str) -> Upstream:
    host, grpc_port, management_port = place.rsplit(":", 2)
    return TorchServeUpstream(f"{host}:{grpc_port}", f"http://{host}:{management_port}")


async def _resolved(address: str) -> list[str]:
    """ "host:..." as "address:..." for each address of the host, sorted."""
    host, ports = address.rsplit(":", 2)[0].strip("[]"), address.rsplit(":", 2)[1:]
    found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    hosts = sorted({str(entry[4][0]) for entry in found})
    return [":".join([f"[{one}]" if ":" in one else one, *ports]) for one in hosts]

"""Understands "host:port" as the settings have it: of either family, an IPv6 address in brackets."""

from __future__ import annotations

import ipaddress
import socket
from contextlib import suppress

from camserve.errors import InvalidOption

EVERYWHERE = ("0.0.0.0", "[::]")
"""Hosts of a listener that takes connections to every address of the machine."""

_LOOPBACK = "127.0.0.1"


def is_loopback(address: str) -> bool:
    """Returns whether "host:port" is reached from this machine only."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def reached(address: str) -> str:
    """Returns the host:port at which this machine reaches a listener: loopback for one that takes every address."""
    host, _, port = address.rpartition(":")
    return f"{_LOOPBACK}:{port}" if host in EVERYWHERE else address


def bound_socket(address: str) -> socket.socket:
    """Returns a TCP socket that is bound to "host:port" and does not listen yet; port 0: chosen by the OS.

    A host with addresses of both families gets that of IPv4. On "[::]" IPv4 is served as well, and alone where the
    machine has no IPv6, as gRPC does it.

    Raises:
        InvalidOption: the port is taken, or the address is not of this machine.
    """
    host, _, port = address.rpartition(":")
    try:
        try:
            return _bound(host.strip("[]"), int(port))
        except OSError:
            if host != "[::]" or has_ipv6():
                raise
            return _bound("0.0.0.0", int(port))
    except (OSError, OverflowError, UnicodeError) as error:
        raise InvalidOption(f"cannot listen on {address}: {getattr(error, 'strerror', None) or error}") from None


def _bound(host: str, port: int) -> socket.socket:
    if port > 0xFFFF:
        raise OSError("a port is at most 65535")  # getaddrinfo would take the rest of a division
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, where = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections in TIME_WAIT do not count
        if family == socket.AF_INET6:
            with suppress(OSError):
                bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        bound.bind(where)
    except BaseException:
        bound.close()
        raise
    return bound


def has_ipv6() -> bool:
    """Tells whether the kernel gives sockets of IPv6 an address."""
    try:
        with socket.socket(socket.AF_INET6) as tried:
            tried.bind(("::1", 0))
            return True
    except OSError:
        return False

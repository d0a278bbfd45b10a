"""Addresses of both families, as the settings have them."""

import socket

import pytest

from camserve import addresses
from camserve.addresses import bound_socket, is_loopback, reached
from camserve.errors import InvalidOption
from camserve.gateway.pool.discovery import torchserves

IPV6 = pytest.mark.skipif(not addresses.has_ipv6(), reason="this machine has no IPv6")


def test_a_server_on_every_address_is_reached_on_loopback():
    assert [reached(address) for address in ("0.0.0.0:7070", "[::]:1", "10.0.0.5:2", "[::1]:3")] == [
        "127.0.0.1:7070",
        "127.0.0.1:1",
        "10.0.0.5:2",
        "[::1]:3",
    ]


def test_loopback_is_known_in_both_families():
    here = ("127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "localhost:1")
    elsewhere = ("0.0.0.0:1", "[::]:1", "10.0.0.1:1", "[2001:db8::1]:1", "example.org:1")
    assert all(map(is_loopback, here))
    assert not any(map(is_loopback, elsewhere))


@pytest.mark.parametrize(
    ("address", "host"),
    [
        ("127.0.0.1:0", "127.0.0.1"),
        ("localhost:0", "127.0.0.1"),
        ("0.0.0.0:0", "127.0.0.1"),
        pytest.param("[::1]:0", "::1", marks=IPV6),
        pytest.param("[::]:0", "::1", marks=IPV6),
        ("[::]:0", "127.0.0.1"),
    ],
)
def test_a_socket_is_bound_in_the_family_of_its_address(address: str, host: str):
    with bound_socket(address) as bound:
        bound.listen()
        with socket.create_connection((host, bound.getsockname()[1]), timeout=30):
            pass


def test_every_address_is_that_of_ipv4_where_there_is_no_ipv6(monkeypatch: pytest.MonkeyPatch):
    made = socket.socket

    def without_ipv6(family: int = -1, *arguments: int, **options: object) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(97, "Address family not supported by protocol")
        return made(family, *arguments, **options)

    monkeypatch.setattr(socket, "socket", without_ipv6)
    with bound_socket("[::]:0") as bound:
        assert bound.family == socket.AF_INET
    with pytest.raises(InvalidOption, match=r"cannot listen on \[::1\]:0: Address family not supported"):
        bound_socket("[::1]:0")


@pytest.mark.parametrize("host", ["127.0.0.1", pytest.param("[::1]", marks=IPV6), pytest.param("[::]", marks=IPV6)])
def test_a_taken_port_is_told(host: str):
    with bound_socket(f"{host}:0") as taken:
        taken.listen()
        address = f"{host}:{taken.getsockname()[1]}"
        with pytest.raises(InvalidOption, match="Address already in use"):
            bound_socket(address)


@pytest.mark.parametrize("address", ["192.0.2.1:0", "nowhere.invalid:0", "127.0.0.1:99999"])
def test_an_address_that_is_not_here_is_told(address: str):
    with pytest.raises(InvalidOption, match=f"cannot listen on {address}"):
        bound_socket(address)


async def test_torchserves_are_found_in_both_families():
    pool = torchserves(["[::1]:7070:8081", "127.0.0.1:7070:8081", "[2001:db8::0:1]:1:2"])
    await pool.look()
    assert list(pool) == ["[::1]:7070:8081", "127.0.0.1:7070:8081", "[2001:db8::1]:1:2"]
    await pool.close()

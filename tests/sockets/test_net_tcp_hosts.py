"""A few of the same things over real sockets on this machine."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest
import trio

from net import addresses, errors
from net.addresses import Multiaddr
from net.host import open_host
from net.identity import Identity
from net.limits import Limits
from net.mux.base import Stream
from net.ping import ping_once
from net.security.base import Security
from net.security.noise import NoiseSecurity
from net.security.tls import TlsSecurity
from net.swarm import Connection
from tests.net_helpers import echo, receive_count, seeded

ANY = addresses.parse("/ip4/127.0.0.1/tcp/0")


@pytest.mark.parametrize("make", [NoiseSecurity, TlsSecurity])
async def test_megabytes_go_and_come_back_beside_pings(make: Callable[[Identity], Security]) -> None:
    async def answer(connection: Connection, stream: Stream) -> None:
        await echo(stream)

    one, two = seeded(1), seeded(2)
    async with (
        open_host(one, listen=[ANY], securities=[make(one)]) as server,
        open_host(two, securities=[make(two)]) as client,
    ):
        server.handle("/echo/1", answer)
        (address,) = server.addresses
        data = bytes(range(251)) * 12_000
        with trio.fail_after(30):
            async with client.stream(server.peer_id, ["/echo/1"], [address]) as stream, trio.open_nursery() as nursery:
                nursery.start_soon(stream.send_all, data)
                assert await ping_once(client, server.peer_id) < 5
                assert await receive_count(stream, len(data)) == data
        (connection,) = client.swarm.connections
        assert connection.remote == address
        assert connection.security == make(one).protocol_id


async def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(errors.AddressError, match=rf"port {port} .*in use"):
            async with open_host(seeded(1), listen=[Multiaddr(f"/ip4/127.0.0.1/tcp/{port}")]):
                pytest.fail("it must not come up")


async def test_a_refused_port_says_so() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = Multiaddr(f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}")
        async with open_host(seeded(1)) as host:
            with pytest.raises(errors.DialError, match="refused"):
                await host.connect(seeded(2).peer_id, [address])


async def test_a_listener_that_says_nothing_is_left_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = Multiaddr(f"/ip4/127.0.0.1/tcp/{silent.getsockname()[1]}")
        async with open_host(seeded(1), limits=Limits(dial_s=0.2)) as host:
            with trio.fail_after(5), pytest.raises(errors.DialError, match="no answer within"):
                await host.connect(seeded(2).peer_id, [address])


async def test_a_peer_that_hangs_up_rudely_is_gone_and_costs_nothing() -> None:
    async with open_host(seeded(1), listen=[ANY]) as server, open_host(seeded(2)) as client:
        (address,) = server.addresses
        where = addresses.host_port(address)
        assert where is not None
        for wire in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\x05\xff\xfe\xfd\xfc\n", bytes(100_000)):
            stream = await trio.open_tcp_stream(*where)
            stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # close means RST
            with trio.move_on_after(5):
                try:
                    await stream.send_all(wire)
                except trio.BrokenResourceError:
                    pass  # it hung up first
            await stream.aclose()
        with trio.fail_after(10):
            await client.connect(server.peer_id, [address])
            assert await ping_once(client, server.peer_id) < 5
            while server.swarm._counts.total > 1:
                await trio.lowlevel.checkpoint()
        assert server.swarm._handshakes == 0

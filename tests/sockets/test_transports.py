"""Every transport through the conformance suite, and what is WebSocket's alone."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager

import ifaddr
import pytest
import trio

from net.addresses import Multiaddr
from net.transports.base import Accept, Arrived, RawConnection
from net.transports.memory import MemoryNetwork
from net.transports.quic import QuicTransport
from net.transports.socket_stream import SocketStream
from net.transports.tcp import TcpTransport
from net.transports.websocket import WebSocketTransport
from tests.net_helpers import PlainChannel, seeded
from tests.transport_conformance import Rig, TransportConformance

TCP = Multiaddr("/ip4/127.0.0.1/tcp/0")
WEBSOCKET = Multiaddr("/ip4/127.0.0.1/tcp/0/ws")
MEMORY = Multiaddr("/memory/0")
QUIC = Multiaddr("/ip4/127.0.0.1/udp/0/quic-v1")
OTHERS = [Multiaddr("/ip4/127.0.0.1/udp/4001/quic-v1/webtransport"), Multiaddr("/ip4/127.0.0.1/tcp/4001/tls/ws")]


@asynccontextmanager
async def nobody_tcp() -> AsyncIterator[Multiaddr]:
    """A port that is taken, so that nobody else listens there, and does not listen."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield Multiaddr(f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}")


@asynccontextmanager
async def nobody_websocket() -> AsyncIterator[Multiaddr]:
    async with nobody_tcp() as address:
        yield address.encapsulate(Multiaddr("/ws"))


@asynccontextmanager
async def nobody_quic() -> AsyncIterator[Multiaddr]:
    """A port that hears one stranger alone: the system refuses what others send there."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.connect(("127.0.0.1", 9))
        yield Multiaddr(f"/ip4/127.0.0.1/udp/{taken.getsockname()[1]}/quic-v1")


@asynccontextmanager
async def babbling_quic(words: bytes) -> AsyncIterator[Multiaddr]:
    """Answers every datagram with the same words, if there are any."""

    async def babble(udp: trio.socket.SocketType) -> None:
        while True:
            _, who = await udp.recvfrom(65_536)
            if words:
                await udp.sendto(words, who)

    with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        await udp.bind(("127.0.0.1", 0))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(babble, udp)
            yield Multiaddr(f"/ip4/127.0.0.1/udp/{udp.getsockname()[1]}/quic-v1")
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def nobody_memory() -> AsyncIterator[Multiaddr]:
    yield Multiaddr("/memory/4711")


class TestTcp(TransportConformance):
    def rig(self) -> Rig:
        return Rig(
            make=TcpTransport,
            anywhere=TCP,
            foreign=[MEMORY, WEBSOCKET, QUIC, *OTHERS],
            nobody=nobody_tcp,
            abrupt=None,  # the kernel ends a killed program's connections as if it had closed them
        )


class TestWebSocket(TransportConformance):
    def rig(self) -> Rig:
        return Rig(
            make=WebSocketTransport,
            anywhere=WEBSOCKET,
            foreign=[MEMORY, TCP, QUIC, *OTHERS],
            nobody=nobody_websocket,
            abrupt=trio.BrokenResourceError,  # there was no close frame
        )


class TestQuic(TransportConformance):
    def rig(self) -> Rig:
        return Rig(
            make_for=QuicTransport,
            anywhere=QUIC,
            foreign=[MEMORY, TCP, WEBSOCKET, *OTHERS],
            nobody=nobody_quic,
            abrupt=None,  # streams are ended by whoever drops them
            babbling=babbling_quic,
        )


class TestMemory(TransportConformance):
    network: MemoryNetwork

    def setup_method(self) -> None:
        self.network = MemoryNetwork()

    def rig(self) -> Rig:
        return Rig(
            make=self.network.transport,
            anywhere=MEMORY,
            foreign=[TCP, WEBSOCKET, QUIC, *OTHERS],
            nobody=nobody_memory,
            abrupt=None,  # as TCP
        )


async def _socket_pair() -> tuple[SocketStream, SocketStream]:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        dialled = await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1])
        return SocketStream(dialled), SocketStream(await listener.accept())


async def _dial_from(port: int, to: int) -> SocketStream:
    made = trio.socket.socket()
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        await made.bind(("127.0.0.1", port))
        await made.connect(("127.0.0.1", to))
    except BaseException:
        made.close()
        raise
    return SocketStream(trio.SocketStream(made))


async def test_an_abandoned_connection_leaves_its_port_to_the_next_one() -> None:
    """The others are gone: they acknowledge no end. Here, they never take the connection that waits for them. (One that
    is closed alone keeps the port for a while, on most kernels and at most times.)
    """
    with free_port() as ours, silent_port() as to:
        second = await _dial_from(ours, to)
        PlainChannel(second, seeded(1).peer_id).abandon()
        await second.aclose()
        third = await _dial_from(ours, to)
        await third.aclose()
        third.abandon()  # which a closed one takes calmly


@contextmanager
def silent_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        yield silent.getsockname()[1]


@contextmanager
def free_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as spare:
        port = spare.getsockname()[1]
    yield port


async def test_dials_at_once_go_out_from_one_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("net.transports.tcp._is_this_machine", lambda ip: False)
    transport = TcpTransport()
    local: list[Multiaddr | None] = []

    async def dial(to: int) -> None:
        connection = await transport.dial(Multiaddr(f"/ip4/127.0.0.1/tcp/{to}"))
        assert isinstance(connection, RawConnection)
        local.append(connection.local)
        await connection.stream.aclose()

    with ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        async with trio.open_nursery() as nursery:
            for server in servers:
                nursery.start_soon(dial, server.getsockname()[1])
    assert len(local) == 3
    assert len(set(local)) == 1


async def test_a_socket_takes_no_more_than_it_is_told_to_hold_unsent() -> None:
    near, far = await _socket_pair()

    def stuffed() -> int:
        """Bytes that a peer that does not read has been sent, by the time that the socket says: wait."""
        taken = 0
        while sent := near.try_send(bytes(64 * 1024)):
            taken += sent
        return taken

    near.limit_unsent(64 * 1024)
    stuffed()
    near.limit_unsent(256 * 1024)
    assert 64 * 1024 <= stuffed() <= 256 * 1024
    near.limit_unsent(None)
    assert stuffed() > 0
    await near.aclose()
    await far.aclose()


def _outer_ip() -> str:
    found = (ip.ip for adapter in ifaddr.get_adapters() for ip in adapter.ips if isinstance(ip.ip, str))
    return next((ip for ip in found if not ip.startswith("127.")), "")


@pytest.mark.skipif(not _outer_ip(), reason="this machine has no address but its own")
@pytest.mark.parametrize("listens", [True, False])
async def test_all_dials_go_out_from_one_port(listens: bool) -> None:
    async def hold(arrived: Arrived) -> None:
        assert isinstance(arrived, RawConnection)
        async with arrived.stream:
            await trio.sleep_forever()

    ours = TcpTransport()
    anywhere = Multiaddr("/ip4/0.0.0.0/tcp/0")
    async with trio.open_nursery() as nursery:
        ports = [await _port(nursery, TcpTransport(), anywhere, hold) for _ in range(2)]
        own = await _port(nursery, ours, anywhere, hold) if listens else None
        targets = [Multiaddr(f"/ip4/{_outer_ip()}/tcp/{port}") for port in ports]
        dialled = [await ours.dial(target) for target in [*targets, targets[0]]]
        first, second, again = [str(each.local).rpartition("/")[2] for each in dialled]
        assert first == second
        assert again != first  # that one is taken by the connection that is there
        assert own in (None, first)
        for each in dialled:
            await each.stream.aclose()
        nursery.cancel_scope.cancel()


async def _port(nursery: trio.Nursery, transport: TcpTransport, address: Multiaddr, accept: Accept) -> str:
    (bound,) = await nursery.start(transport.listen, address, accept)
    return str(bound).rpartition("/")[2]

"""Every transport through the conformance suite, and what is WebSocket's alone."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from net.addresses import Multiaddr
from net.transports.memory import MemoryNetwork
from net.transports.quic import QuicTransport
from net.transports.socket_stream import SocketStream
from net.transports.tcp import TcpTransport
from net.transports.websocket import WebSocketTransport
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

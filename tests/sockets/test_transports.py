"""Every transport through the conformance suite, and what is WebSocket's alone."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from net.addresses import Multiaddr
from net.transports.memory import MemoryNetwork
from net.transports.socket_stream import SocketStream
from net.transports.tcp import TcpTransport
from net.transports.websocket import WebSocketTransport
from tests.transport_conformance import Rig, TransportConformance

TCP = Multiaddr("/ip4/127.0.0.1/tcp/0")
WEBSOCKET = Multiaddr("/ip4/127.0.0.1/tcp/0/ws")
MEMORY = Multiaddr("/memory/0")
OTHERS = [Multiaddr("/ip4/127.0.0.1/udp/4001/quic-v1"), Multiaddr("/ip4/127.0.0.1/tcp/4001/tls/ws")]


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
async def nobody_memory() -> AsyncIterator[Multiaddr]:
    yield Multiaddr("/memory/4711")


class TestTcp(TransportConformance):
    def rig(self) -> Rig:
        return Rig(
            make=TcpTransport,
            anywhere=TCP,
            foreign=[MEMORY, WEBSOCKET, *OTHERS],
            nobody=nobody_tcp,
            abrupt=None,  # the kernel ends a killed program's connections as if it had closed them
        )


class TestWebSocket(TransportConformance):
    def rig(self) -> Rig:
        return Rig(
            make=WebSocketTransport,
            anywhere=WEBSOCKET,
            foreign=[MEMORY, TCP, *OTHERS],
            nobody=nobody_websocket,
            abrupt=trio.BrokenResourceError,  # there was no close frame
        )


class TestMemory(TransportConformance):
    network: MemoryNetwork

    def setup_method(self) -> None:
        self.network = MemoryNetwork()

    def rig(self) -> Rig:
        return Rig(
            make=self.network.transport,
            anywhere=MEMORY,
            foreign=[TCP, WEBSOCKET, *OTHERS],
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

"""One face for two stacks, so that a scenario is written once: Raceme's host, and py-libp2p's own.

The stock stack is what ``libp2p.new_host`` gives with Noise alone, its Yamux and its swarm: documented options, nothing
patched. In memory it runs over a transport given by ``new_host(transports=)``, with its own socket adapter on top.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import Any, Protocol

import pytest
import trio
from libp2p import new_host
from libp2p.abc import IListener, ITransport
from libp2p.crypto.x25519 import create_new_key_pair
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection as StockRawConnection
from libp2p.network.stream.exceptions import StreamEOF
from libp2p.peer.peerinfo import PeerInfo
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as StockNoise
from libp2p.transport.exceptions import OpenConnectionError

import net.host
from net import errors
from net.addresses import Multiaddr
from net.identity import PeerId
from net.mux.base import Stream as MuxStream
from net.swarm import Connection
from net.transports.base import Arrived, RawConnection
from net.transports.memory import MemoryTransport
from tests.net_helpers import MEMORY_ANY, seeded

PROTOCOL = "/defects/1"
PART_BYTES = 64 * 1024
NOWHERE = Multiaddr("/memory/999999")


class Broken(Exception):
    """A stream or a connection that could not be had, or ended without the peer's meaning it."""


class Stream(Protocol):
    """A stream of either stack."""

    async def receive(self) -> bytes:
        """What has come; ``b""`` at the end that the peer meant.

        Raises:
            Broken: any other end.
        """

    async def send(self, data: bytes) -> None:
        """Raises:
        Broken: it cannot be sent any more.
        """

    async def end(self) -> None:
        """Say that nothing more will come."""

    async def reset(self) -> None: ...


Handler = Callable[[Stream], Awaitable[None]]


class Host(Protocol):
    """A host of either stack, listening in memory unless it only dials."""

    peer_id: PeerId
    address: Multiaddr  # where it listens; ``NOWHERE`` when it only dials

    async def connect(self, peer_id: PeerId, address: Multiaddr) -> None:
        """Raises:
        Broken: no connection.
        """

    async def open(self, peer_id: PeerId) -> Stream:
        """A stream, its protocol agreed, over the connection that is there.

        Raises:
            Broken: no stream.
        """

    async def disconnect(self, peer_id: PeerId) -> None:
        """Close the connection, whatever its peer does or does not do."""


class Stack(Protocol):
    """How to have a host."""

    name: str

    def host(
        self, number: int, transport: MemoryTransport | None, handler: Handler
    ) -> AbstractAsyncContextManager[Host]:
        """A running host with the identity ``seeded(number)``; ``handler`` serves its streams.

        Without a transport it does not listen, and dials TCP.
        """


async def echo(stream: Stream) -> None:
    """Give back what comes, until its end."""
    while data := await stream.receive():
        await stream.send(data)
    await stream.end()


async def hold(stream: Stream) -> None:
    """Accept a stream, never read it."""
    await trio.sleep_forever()


async def receive_count(stream: Stream, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = await stream.receive()
        assert part, f"a clean end after {len(data)} of {count} bytes"
        data += part
    return bytes(data)


async def receive_no_more(stream: Stream) -> None:
    """The stream has broken, and says so."""
    try:
        data = await stream.receive()
    except Broken:
        return
    raise AssertionError(f"{len(data)} bytes more" if data else "a clean end")


async def ask(host: Host, peer_id: PeerId, data: bytes) -> None:
    """One message to an echo and back, on a stream of its own."""
    stream = await host.open(peer_id)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.send, data)
        assert await receive_count(stream, len(data)) == data
    await stream.end()


# Raceme's


@contextmanager
def _ours_translated() -> Iterator[None]:
    try:
        yield
    except (errors.NetError, trio.ClosedResourceError) as error:
        raise Broken(f"{type(error).__name__}: {error}") from error


class _OurStream:
    def __init__(self, stream: MuxStream) -> None:
        self._stream = stream

    async def receive(self) -> bytes:
        with _ours_translated():
            return await self._stream.receive_some(PART_BYTES)

    async def send(self, data: bytes) -> None:
        with _ours_translated():
            await self._stream.send_all(data)

    async def end(self) -> None:
        await self._stream.send_eof()

    async def reset(self) -> None:
        self._stream.reset()


class _OurHost:
    def __init__(self, host: net.host.Host) -> None:
        self._host = host
        self.peer_id = host.peer_id
        self.address = host.addresses[0] if host.addresses else NOWHERE

    async def connect(self, peer_id: PeerId, address: Multiaddr) -> None:
        with _ours_translated():
            await self._host.connect(peer_id, [address])

    async def open(self, peer_id: PeerId) -> Stream:
        with _ours_translated():
            return _OurStream(await self._host.open_stream(peer_id, [PROTOCOL]))

    async def disconnect(self, peer_id: PeerId) -> None:
        connection = self._host.swarm.connection(peer_id)
        assert connection is not None
        connection.mux.close()
        await trio.lowlevel.checkpoint()


class OurStack:
    name = "ours"

    @asynccontextmanager
    async def host(self, number: int, transport: MemoryTransport | None, handler: Handler) -> AsyncIterator[Host]:
        async def serve(connection: Connection, stream: MuxStream) -> None:
            with _reraised_cause():
                await handler(_OurStream(stream))

        async with net.host.open_host(
            seeded(number),
            listen=[] if transport is None else [MEMORY_ANY],
            transports=None if transport is None else [transport],
        ) as host:
            host.handle(PROTOCOL, serve)
            yield _OurHost(host)


@contextmanager
def _reraised_cause() -> Iterator[None]:
    """A handler's ``Broken`` as the error that it stands for, which is what a handler of this stack would let out."""
    try:
        yield
    except Broken as error:
        assert error.__cause__ is not None
        raise error.__cause__ from None


# py-libp2p's


@contextmanager
def _stock_translated() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # it has no base of its own for what a peer can cause
        raise Broken(f"{type(error).__name__}: {error}") from error


class _StockStream:
    def __init__(self, stream: Any) -> None:
        self._stream = stream

    async def receive(self) -> bytes:
        with _stock_translated():
            try:
                data: bytes = await self._stream.read(PART_BYTES)
            except StreamEOF:
                return b""
            return data

    async def send(self, data: bytes) -> None:
        with _stock_translated():
            await self._stream.write(data)

    async def end(self) -> None:
        with _stock_translated():
            await self._stream.close_write()

    async def reset(self) -> None:
        await self._stream.reset()


class _StockHost:
    def __init__(self, host: Any, address: Multiaddr) -> None:
        self._host = host
        self.peer_id: PeerId = host.get_id()
        self.address = address

    async def connect(self, peer_id: PeerId, address: Multiaddr) -> None:
        with _stock_translated():
            await self._host.connect(PeerInfo(peer_id, [address]))

    async def open(self, peer_id: PeerId) -> Stream:
        with _stock_translated():
            return _StockStream(await self._host.new_stream(peer_id, [PROTOCOL]))

    async def disconnect(self, peer_id: PeerId) -> None:
        await self._host.disconnect(peer_id)


class StockStack:
    """``all_securities``: what comes when one does not choose, where Noise is the first choice but not the only one."""

    name = "stock"

    def __init__(self, *, all_securities: bool = False) -> None:
        self._all_securities = all_securities

    @asynccontextmanager
    async def host(self, number: int, transport: MemoryTransport | None, handler: Handler) -> AsyncIterator[Host]:
        key_pair = seeded(number).key_pair
        memory = None if transport is None else _StockMemory(transport)
        noise = {NOISE: StockNoise(key_pair, noise_privkey=create_new_key_pair().private_key)}
        host = new_host(
            key_pair=key_pair,
            sec_opt=None if self._all_securities else noise,
            transports=None if memory is None else [memory],
        )

        async def serve(stream: Any) -> None:
            try:
                await handler(_StockStream(stream))
            except Broken:  # any exception of a handler ends this host: spare it those that we expect
                await stream.reset()

        async def run(*, task_status: trio.TaskStatus[None]) -> None:
            async with host.run(listen_addrs=[] if memory is None else [MEMORY_ANY]):
                host.set_stream_handler(PROTOCOL, serve)
                task_status.started()
                await trio.sleep_forever()

        async with trio.open_nursery() as nursery:
            await nursery.start(run)
            yield _StockHost(host, NOWHERE if memory is None else memory.bound)
            nursery.cancel_scope.cancel()


class _StockMemory(ITransport):  # type: ignore[misc]  # libp2p has no types
    """A memory transport as py-libp2p wants one."""

    def __init__(self, transport: MemoryTransport) -> None:
        self.transport = transport
        self.bound = NOWHERE

    async def dial(self, address: Multiaddr) -> Any:
        try:
            raw = await self.transport.dial(Multiaddr(f"/memory/{address.value_for_protocol('memory')}"))
        except errors.DialError as error:
            raise OpenConnectionError(str(error)) from error
        return StockRawConnection(TrioTCPStream(raw.stream), True)

    def create_listener(self, handler: Callable[[Any], Awaitable[None]]) -> Any:
        return _StockListener(self, handler)

    def can_dial(self, address: Multiaddr) -> bool:
        return "memory" in {protocol.name for protocol in address.protocols()}

    can_listen = can_dial

    def protocols(self) -> list[str]:
        return ["memory"]


class _StockListener(IListener):  # type: ignore[misc]  # libp2p has no types
    """Lives in a system task, as py-libp2p's TCP listener does."""

    def __init__(self, transport: _StockMemory, handler: Callable[[Any], Awaitable[None]]) -> None:
        self._transport = transport
        self._handler = handler
        self._scope = trio.CancelScope()

    async def listen(self, address: Multiaddr) -> None:
        async def accept(raw: Arrived) -> None:
            if not isinstance(raw, RawConnection):
                raise TypeError("the memory transport gives byte streams")
            await self._handler(TrioTCPStream(raw.stream))

        async def serve(task_status: trio.TaskStatus[Any]) -> None:
            await self._transport.transport.listen(address, accept, task_status=task_status)

        listening = trio.Event()

        async def run() -> None:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    (self._transport.bound,) = await nursery.start(serve)
                    listening.set()

        trio.lowlevel.spawn_system_task(run)
        await listening.wait()

    def get_addrs(self) -> tuple[Multiaddr, ...]:
        return (self._transport.bound,)

    async def close(self) -> None:
        self._scope.cancel()


# Which must fail


@contextmanager
def fails_on_stock(stack: Stack, *how: type[Exception], match: str = "") -> Iterator[None]:
    """Let the block pass on ours; on stock it must fail with one of ``how`` that says ``match``.

    So a scenario that the stock component survives is an error: it would prove nothing.
    """
    if stack.name == "ours":
        yield
        return
    try:
        yield
    except Exception as error:
        if not any(isinstance(leaf, how) and match in str(leaf) for leaf in _leaves(error)):
            raise
    else:
        pytest.fail(f"the stock component passes: no {' or '.join(kind.__name__ for kind in how)}")


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
    return [error]

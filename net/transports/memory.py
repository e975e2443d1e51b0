"""In-process connections, ``/memory/N``: for tests and simulation, under real or virtual time.

They behave as TCP's do: a sender waits when nobody reads, and whoever vanishes seems to have closed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import trio

from net.addresses import Multiaddr
from net.errors import AddressError, DialError
from net.identity import PeerId
from net.io import SingleUse, check_max_bytes
from net.transports.base import Accept, RawConnection

BACKLOG = 64  # connections that wait to be accepted
PIPE_BYTES = 256 * 1024  # on their way in one direction, about what a kernel's socket holds


class MemoryNetwork:
    """One closed world of memory addresses. Transports of the same network reach each other."""

    def __init__(self) -> None:
        self._listeners: dict[int, trio.MemorySendChannel[tuple[MemoryStream, Multiaddr]]] = {}
        self._ports = itertools.count(1)
        self._dialers = itertools.count(1_000_000_000)

    def transport(self) -> MemoryTransport:
        return MemoryTransport(self)


def memory_stream_pair() -> tuple[MemoryStream, MemoryStream]:
    """The two ends of a connection."""
    up, down = _Pipe(), _Pipe()
    return MemoryStream(down, up), MemoryStream(up, down)


class MemoryTransport:
    def __init__(self, network: MemoryNetwork) -> None:
        self._network = network

    def can_dial(self, address: Multiaddr) -> bool:
        return _port(address) is not None

    async def dial(self, address: Multiaddr, peer_id: PeerId | None = None) -> RawConnection:
        port = _port(address)
        listener = None if port is None else self._network._listeners.get(port)
        await trio.lowlevel.checkpoint()
        if listener is None:
            raise DialError(f"{address}: nobody listens there")
        ours, theirs = memory_stream_pair()
        local = Multiaddr(f"/memory/{next(self._network._dialers)}")
        try:
            listener.send_nowait((theirs, local))
        except (trio.WouldBlock, trio.BrokenResourceError) as error:
            raise DialError(f"{address}: refused") from error
        return RawConnection(stream=ours, local=local, remote=address)

    async def listen(
        self,
        address: Multiaddr,
        accept: Accept,
        *,
        task_status: trio.TaskStatus[Sequence[Multiaddr]] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        port = _port(address)
        if port is None:
            raise AddressError(f"{address} is no memory address")
        if port == 0:
            port = next(self._network._ports)
        if port in self._network._listeners:
            raise AddressError(f"{address} is in use")
        here = Multiaddr(f"/memory/{port}")
        send, receive = trio.open_memory_channel[tuple[MemoryStream, Multiaddr]](BACKLOG)
        self._network._listeners[port] = send
        try:
            async with trio.open_nursery() as nursery:
                task_status.started([here])
                async for stream, remote in receive:
                    nursery.start_soon(accept, RawConnection(stream=stream, local=here, remote=remote))
        finally:
            del self._network._listeners[port]
            while receive.statistics().current_buffer_used:  # who dialled meanwhile must not wait for an answer
                stream, _ = receive.receive_nowait()
                stream.close()
            receive.close()


class _Pipe:
    """One direction of a connection. ``changed`` wakes both of its ends."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.sender_left = False
        self.receiver_left = False
        self.changed = trio.lowlevel.ParkingLot()


class MemoryStream(trio.abc.Stream):
    """One end of a connection.

    Cancellation: of ``send_all``, an unknown part was sent; of ``receive_some``, nothing is lost.
    """

    def __init__(self, incoming: _Pipe, outgoing: _Pipe) -> None:
        self._incoming = incoming
        self._outgoing = outgoing
        self._sending = SingleUse("sending on this stream")
        self._receiving = SingleUse("receiving from this stream")

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        pipe = self._outgoing
        with self._sending:
            await trio.lowlevel.checkpoint()
            view = memoryview(data).cast("B")
            while True:
                if pipe.sender_left:
                    raise trio.ClosedResourceError("this stream was closed here")
                if pipe.receiver_left:
                    raise trio.BrokenResourceError("the other end was closed")
                room = PIPE_BYTES - len(pipe.data)
                if view and room > 0:
                    pipe.data += view[:room]
                    view = view[room:]
                    pipe.changed.unpark_all()
                elif view:
                    await pipe.changed.park()
                else:
                    return

    async def wait_send_all_might_not_block(self) -> None:
        pipe = self._outgoing
        with self._sending:
            await trio.lowlevel.checkpoint()
            while not (pipe.receiver_left or pipe.sender_left) and len(pipe.data) >= PIPE_BYTES:
                await pipe.changed.park()
            if pipe.sender_left:
                raise trio.ClosedResourceError("this stream was closed here")

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        check_max_bytes(max_bytes)
        pipe = self._incoming
        with self._receiving:
            await trio.lowlevel.checkpoint()
            while True:
                if pipe.receiver_left:
                    raise trio.ClosedResourceError("this stream was closed here")
                if pipe.data:
                    part = bytes(pipe.data[:max_bytes])
                    del pipe.data[: len(part)]
                    pipe.changed.unpark_all()
                    return part
                if pipe.sender_left:
                    return b""
                await pipe.changed.park()

    def close(self) -> None:
        """As ``aclose``, at once."""
        self._outgoing.sender_left = True
        self._incoming.receiver_left = True
        self._incoming.data.clear()
        self._outgoing.changed.unpark_all()
        self._incoming.changed.unpark_all()

    async def aclose(self) -> None:
        self.close()
        await trio.lowlevel.checkpoint()


def _port(address: Multiaddr) -> int | None:
    parts = [(protocol.name, value) for protocol, value in address.items()]
    if len(parts) == 1 and parts[0][0] == "memory" and parts[0][1] is not None:
        return int(parts[0][1])
    return None

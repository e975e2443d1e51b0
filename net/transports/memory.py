"""In-process connections, ``/memory/N``: for tests and simulation, under real or virtual time."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import trio
import trio.testing

from net.addresses import Multiaddr
from net.errors import AddressError, DialError
from net.transports.base import Accept, RawConnection


class MemoryNetwork:
    """One closed world of memory addresses. Transports of the same network reach each other."""

    def __init__(self) -> None:
        self._listeners: dict[int, trio.MemorySendChannel[RawConnection]] = {}
        self._ports = itertools.count(1)
        self._dialers = itertools.count(1_000_000_000)

    def transport(self) -> MemoryTransport:
        return MemoryTransport(self)


class MemoryTransport:
    def __init__(self, network: MemoryNetwork) -> None:
        self._network = network

    def can_dial(self, address: Multiaddr) -> bool:
        return _port(address) is not None

    async def dial(self, address: Multiaddr) -> RawConnection:
        port = _port(address)
        listener = None if port is None else self._network._listeners.get(port)
        await trio.lowlevel.checkpoint()
        if listener is None:
            raise DialError(f"{address}: nobody listens there")
        ours, theirs = trio.testing.memory_stream_pair()
        local = Multiaddr(f"/memory/{next(self._network._dialers)}")
        try:
            listener.send_nowait(RawConnection(stream=theirs, local=address, remote=local))
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
        send, receive = trio.open_memory_channel[RawConnection](64)
        self._network._listeners[port] = send
        try:
            async with receive, trio.open_nursery() as nursery:
                task_status.started([Multiaddr(f"/memory/{port}")])
                async for raw in receive:
                    nursery.start_soon(accept, raw)
        finally:
            del self._network._listeners[port]


def _port(address: Multiaddr) -> int | None:
    parts = [(protocol.name, value) for protocol, value in address.items()]
    if len(parts) == 1 and parts[0][0] == "memory" and parts[0][1] is not None:
        return int(parts[0][1])
    return None

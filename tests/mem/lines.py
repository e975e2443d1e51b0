"""Machines whose line into the memory network can be cut: what they say vanishes, and nobody is told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import trio

from net.addresses import Multiaddr
from net.identity import PeerId
from net.transports.base import Accept, RawConnection
from net.transports.memory import MemoryNetwork, MemoryTransport


class Line:
    """One machine's. ``is_up`` says whether new connections come about; ``lose`` makes those that there are dead;
    ``stall`` has everything wait, new connections too, until ``resume``; ``bytes_per_s`` is what each of them carries
    out of it, where that is limited."""

    def __init__(self, bytes_per_s: float | None = None) -> None:
        self.is_up = True
        self.bytes_per_s = bytes_per_s
        self._streams: list[_LineStream] = []
        self._resumed: trio.Event | None = None

    def lose(self) -> None:
        """As when the machine goes to another network: its connections lead nowhere, but new ones can be had."""
        for stream in self._streams:
            stream.is_lost = True

    def cut(self) -> None:
        """The machine is gone, without a word."""
        self.is_up = False
        self.lose()

    def stall(self) -> None:
        """As when the machine is stopped, or cut off for a while: nothing is lost, and nothing arrives."""
        if self._resumed is None:
            self._resumed = trio.Event()

    def resume(self) -> None:
        """Everything arrives."""
        if self._resumed is not None:
            self._resumed.set()
            self._resumed = None

    async def passable(self) -> None:
        """Wait while it is stalled."""
        while self._resumed is not None:
            await self._resumed.wait()

    def carry(self, raw: RawConnection) -> RawConnection:
        stream = _LineStream(raw.stream, self)
        stream.is_lost = not self.is_up
        self._streams.append(stream)
        return RawConnection(stream=stream, local=raw.local, remote=raw.remote)


class LineTransport(MemoryTransport):
    """A memory transport behind a line. ``rebound`` counts how often it was told that the network has changed."""

    def __init__(self, network: MemoryNetwork, line: Line | None = None) -> None:
        super().__init__(network)
        self.line = line or Line()
        self.rebound = 0

    def rebind(self) -> None:
        self.rebound += 1

    async def dial(self, address: Multiaddr, peer_id: PeerId | None = None) -> RawConnection:
        if not self.line.is_up:
            await trio.sleep_forever()
        return self.line.carry(await super().dial(address, peer_id))

    async def listen(
        self,
        address: Multiaddr,
        accept: Accept,
        *,
        task_status: trio.TaskStatus[Sequence[Multiaddr]] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        async def behind_the_line(arrived: Any) -> None:
            await accept(self.line.carry(arrived))

        await super().listen(address, behind_the_line, task_status=task_status)


class _LineStream(trio.abc.Stream):
    def __init__(self, stream: trio.abc.Stream, line: Line) -> None:
        self._stream = stream
        self._line = line
        self.is_lost = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        if self._line.bytes_per_s is not None:
            await trio.sleep(len(data) / self._line.bytes_per_s)
        await self._line.passable()
        if not self.is_lost:
            await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()
        if not self.is_lost:
            await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        data = b""
        if not self.is_lost:
            data = bytes(await self._stream.receive_some(max_bytes))
            await self._line.passable()
        if self.is_lost:  # perhaps meanwhile
            await trio.sleep_forever()
        return data

    async def aclose(self) -> None:
        if self.is_lost:
            await trio.lowlevel.checkpoint()
        else:
            await self._stream.aclose()

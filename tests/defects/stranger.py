"""What a host meets: a peer that keeps to no rules above the secure channel, and a line that can stop passing bytes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from net import errors, multistream
from net.addresses import Multiaddr
from net.io import receive_exactly
from net.mux.driver import PROTOCOL_ID as YAMUX
from net.mux.frames import HEADER_BYTES, Flags, Header, Type
from net.security.base import SecureChannel
from net.security.noise import NoiseSecurity
from net.transports.base import RawConnection
from net.transports.memory import MemoryNetwork
from tests.defects.stacks import PROTOCOL, Broken, Host
from tests.net_helpers import MEMORY_ANY, seeded

LINE_BYTES = 64 * 1024  # pass at once,
LINE_DELAY_S = 0.010  # after so long: 6.5 MB/s
LINE_LIFE_S = 120.0  # then it is cut, which frees a stock host that waits where it cannot be cancelled
# What a dialler says on a new stream, and a host that speaks the protocol says back.
SPEAKS = b"\x13/multistream/1.0.0\n" + bytes([len(PROTOCOL) + 1]) + PROTOCOL.encode() + b"\n"


class Stranger:
    """A dialler that has done both handshakes, Noise and Yamux, and from then on sends what it likes."""

    def __init__(self, channel: SecureChannel) -> None:
        self._channel = channel

    @staticmethod
    async def takes_security(network: MemoryNetwork, host: Host, protocol_id: str) -> bool:
        """Whether the host would go on with this security protocol."""
        raw = await network.transport().dial(host.address)
        try:
            await multistream.propose(raw.stream, [protocol_id])
        except errors.ProtocolNotSupported:
            return False
        finally:
            await raw.stream.aclose()
        return True

    @classmethod
    async def dial(cls, network: MemoryNetwork, host: Host, number: int = 1000) -> Stranger:
        """Raises:
        NetError: the host does not let us in.
        """
        raw = await network.transport().dial(host.address)
        security = NoiseSecurity(seeded(number))
        await multistream.propose(raw.stream, [security.protocol_id])
        channel = await security.outbound(raw.stream, host.peer_id)
        await multistream.propose(channel, [YAMUX])
        return cls(channel)

    async def send(self, header: Header, body: bytes = b"") -> None:
        await self._channel.send_all(header.encode() + body)

    async def open(self, stream_id: int, data: bytes = b"") -> None:
        """Open a stream, and send ``data`` on it."""
        await self.send(Header(Type.WINDOW_UPDATE, Flags.SYN, stream_id, 0))
        if data:
            await self.send(Header(Type.DATA, Flags.NONE, stream_id, len(data)), data)

    async def receive(self) -> tuple[Header, bytes]:
        """The next frame.

        Raises:
            ConnectionLost: the host has hung up.
        """
        header = Header.decode(await receive_exactly(self._channel, HEADER_BYTES))
        body = await receive_exactly(self._channel, header.length) if header.type is Type.DATA else b""
        return header, body

    async def receive_data(self, stream_id: int, count: int) -> bytes:
        """So many bytes of one stream, whatever else comes between."""
        data = bytearray()
        while len(data) < count:
            header, body = await self.receive()
            if header.stream_id == stream_id:
                if header.flags & (Flags.FIN | Flags.RST):
                    raise Broken(f"stream {stream_id} ended after {len(data)} of {count} bytes")
                data += body
        return bytes(data)

    async def frames_until_pong(self) -> list[Header]:
        """Everything that the host says in answer to what it was sent so far."""
        await self.send(Header(Type.PING, Flags.SYN, 0, 77))
        frames: list[Header] = []
        while True:
            header, _ = await self.receive()
            if header == Header(Type.PING, Flags.ACK, 0, 77):
                return frames
            frames.append(header)

    async def ask(self, stream_id: int, data: bytes) -> None:
        """``data`` to the host's echo and back, on a new stream."""
        await self.open(stream_id, SPEAKS + data)
        assert await self.receive_data(stream_id, len(SPEAKS) + len(data)) == SPEAKS + data

    async def aclose(self) -> None:
        await self._channel.aclose()


class Line:
    """A stretch of network before a host: a little slow, as they are."""

    def __init__(self, address: Multiaddr) -> None:
        self.address = address
        self._open = trio.Event()
        self._open.set()
        self.was_cut = trio.Event()

    def stop(self) -> None:
        """Pass nothing on, and lose nothing: a network that stands still for a while."""
        self._open = trio.Event()

    def go_on(self) -> None:
        self._open.set()

    async def carry(self, source: trio.abc.Stream, sink: trio.abc.Stream) -> None:
        while True:
            await self._open.wait()
            data = await source.receive_some(LINE_BYTES)
            await trio.sleep(LINE_DELAY_S)
            await self._open.wait()
            if not data:
                return
            await sink.send_all(data)

    async def live(self) -> None:
        await trio.sleep(LINE_LIFE_S)
        self.was_cut.set()


@asynccontextmanager
async def line_to(network: MemoryNetwork, host: Host) -> AsyncIterator[Line]:
    """A line whose other end is ``host``."""

    async def accept(near: RawConnection) -> None:
        far = await network.transport().dial(host.address)
        async with near.stream, far.stream, trio.open_nursery() as nursery:

            async def one_way(source: trio.abc.Stream, sink: trio.abc.Stream) -> None:
                try:
                    await line.carry(source, sink)
                except trio.BrokenResourceError:
                    pass  # that end has hung up: so does the line
                nursery.cancel_scope.cancel()

            nursery.start_soon(one_way, near.stream, far.stream)
            nursery.start_soon(one_way, far.stream, near.stream)
            await line.was_cut.wait()
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        (address,) = await nursery.start(network.transport().listen, MEMORY_ANY, accept)
        line = Line(address)
        nursery.start_soon(line.live)
        yield line
        nursery.cancel_scope.cancel()

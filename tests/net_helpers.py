"""What the tests of ``net`` share: two Yamux cores and the wires between them, channels in memory, hosts in memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import trio
import trio.testing

from net.addresses import Multiaddr
from net.host import Host, open_host
from net.identity import Identity, PeerId
from net.limits import Limits
from net.mux import core as yamux
from net.mux.base import Stream
from net.mux.driver import YamuxConnection, YamuxStream
from net.mux.frames import HEADER_BYTES, Header, Type
from net.security.base import Buffer, SecureChannel, Security
from net.transports.base import Transport
from net.transports.memory import MemoryNetwork, MemoryTransport

MEMORY_ANY = Multiaddr("/memory/0")
UNREADABLE_ADDRESS = "*\x07eth0\u2603".encode()  # the library writes it out, but cannot take it apart


def seeded(number: int) -> Identity:
    """The same identity for the same number."""
    return Identity.generate(number.to_bytes(32, "big"))


# Yamux cores


class CorePair:
    """A dialler's core and a listener's, joined by two wires. ``check`` holds after every step."""

    def __init__(self, settings: yamux.YamuxSettings | None = None) -> None:
        self.now = 0.0
        self.cores = {
            "client": yamux.YamuxCore(client=True, now=0.0, settings=settings),
            "server": yamux.YamuxCore(client=False, now=0.0, settings=settings),
        }
        self.wires = {"client": bytearray(), "server": bytearray()}  # what this side has sent, not delivered yet
        self.events: dict[str, list[yamux.Event]] = {"client": [], "server": []}

    @staticmethod
    def other(side: str) -> str:
        return "server" if side == "client" else "client"

    def pump(self, side: str, max_bytes: int = 1 << 30) -> int:
        """Put what ``side`` has to send on its wire."""
        data = b"".join(self.cores[side].data_to_send(max_bytes))
        self.wires[side] += data
        self.check()
        return len(data)

    def deliver(self, side: str, count: int | None = None) -> list[yamux.Event]:
        """Give the other side ``count`` bytes of what ``side`` has put on the wire (all by default)."""
        wire = self.wires[side]
        part = bytes(wire[: len(wire) if count is None else count])
        del wire[: len(part)]
        events = self.cores[self.other(side)].receive_data(part, self.now) if part else []
        self.events[self.other(side)] += events
        self.check()
        return events

    def settle(self) -> None:
        """Everything that can flow without a reader consuming, flows."""
        while self.pump("client") + self.pump("server"):
            self.deliver("client")
            self.deliver("server")

    def check(self) -> None:
        """Each receiver's window is the sender's, plus what is on its way; and the books are right."""
        for side, core in self.cores.items():
            peer = self.cores[self.other(side)]
            for inbound in (True, False):
                assert core._counts[inbound] == sum(s.inbound is inbound for s in core._streams.values())
            data = in_flight(peer, bytes(self.wires[side]), Type.DATA)
            own = b"".join(peer._control)
            updates = in_flight(core, bytes(self.wires[self.other(side)]) + own, Type.WINDOW_UPDATE)
            for stream_id, stream in core._streams.items():
                theirs = peer._streams.get(stream_id)
                if theirs is None:
                    continue
                assert stream.send_window >= 0
                assert theirs.receive_window == stream.send_window + data[stream_id] + updates[stream_id]
                assert 0 <= theirs.receive_window <= theirs.window_size <= core.settings.max_window_bytes
                assert stream.outgoing_bytes == sum(map(len, stream.outgoing))


def in_flight(receiver: yamux.YamuxCore, wire: bytes, kind: Type) -> dict[int, int]:
    """Bytes of data, or of window, on their way to ``receiver``, which may be inside a frame; by stream."""
    found: dict[int, int] = defaultdict(int)
    wire = receiver._incoming + wire
    position = receiver._body_left
    if kind is Type.DATA:
        found[receiver._body_stream] += receiver._body_left
    while len(wire) - position >= HEADER_BYTES:
        header = Header.decode(wire, position)
        position += HEADER_BYTES
        if header.type is kind:
            found[header.stream_id] += header.length
        if header.type is Type.DATA:
            position += header.length
    return found


# Channels and connections in memory


class PlainChannel(SecureChannel):
    """A secure channel without the security."""

    def __init__(self, stream: trio.abc.Stream, remote_peer: PeerId) -> None:
        super().__init__(stream)
        self.remote_peer = remote_peer

    def _encrypt(self, pieces: Sequence[Buffer]) -> list[memoryview]:
        return [memoryview(b"".join(pieces))] if any(pieces) else []

    async def receive_batch(self) -> Sequence[bytes]:
        data = await self._stream.receive_some()
        return [bytes(data)] if data else []

    async def aclose(self) -> None:
        await self._stream.aclose()


class Tap(trio.abc.Stream):
    """A stream whose sent bytes pass through ``change(index of the send, data)``."""

    def __init__(self, stream: trio.abc.Stream, change: Callable[[int, bytes], bytes]) -> None:
        self._stream = stream
        self._change = change
        self._sends = 0

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        changed = self._change(self._sends, bytes(data))
        self._sends += 1
        await self._stream.send_all(changed)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        return bytes(await self._stream.receive_some(max_bytes))

    async def aclose(self) -> None:
        await self._stream.aclose()


OnStream = Callable[[YamuxStream], Awaitable[None]]


async def refuse(stream: YamuxStream) -> None:
    stream.reset()


async def echo(stream: Stream) -> None:
    """Give back what comes, until its end."""
    while data := await stream.receive_some():
        await stream.send_all(data)
    await stream.aclose()


async def receive_all(stream: trio.abc.ReceiveStream) -> bytes:
    data = bytearray()
    while part := await stream.receive_some():
        data += part
    return bytes(data)


async def receive_count(stream: trio.abc.ReceiveStream, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = await stream.receive_some(count - len(data))
        assert part, f"ended after {len(data)} of {count} bytes"
        data += part
    return bytes(data)


@asynccontextmanager
async def mux_pair(
    on_server: OnStream = echo,
    on_client: OnStream = refuse,
    *,
    lockstep: bool = False,
    settings: yamux.YamuxSettings | None = None,
) -> AsyncIterator[tuple[YamuxConnection, YamuxConnection]]:
    """Two running Yamux connections; ``lockstep`` wires hold nothing: a send waits for its reader."""
    make = trio.testing.lockstep_stream_pair if lockstep else trio.testing.memory_stream_pair
    near, far = make()
    client = YamuxConnection(PlainChannel(near, seeded(2).peer_id), client=True, settings=settings)
    server = YamuxConnection(PlainChannel(far, seeded(1).peer_id), client=False, settings=settings)
    async with trio.open_nursery() as nursery:
        await nursery.start(client.run, on_client)
        await nursery.start(server.run, on_server)
        yield client, server
        nursery.cancel_scope.cancel()


# Hosts in memory


@asynccontextmanager
async def memory_hosts(
    count: int,
    *,
    network: MemoryNetwork | None = None,
    limits: Limits | None = None,
    securities: Callable[[Identity], Sequence[Security]] | None = None,
    transport: Callable[[MemoryNetwork], Transport] = MemoryTransport,
) -> AsyncIterator[list[Host]]:
    """Listening hosts of one memory network, with the same identities each time."""
    network = network or MemoryNetwork()
    async with AsyncExitStack() as stack:
        hosts = []
        for number in range(1, count + 1):
            identity = seeded(number)
            host = await stack.enter_async_context(
                open_host(
                    identity,
                    listen=[MEMORY_ANY],
                    transports=[transport(network)],
                    limits=limits,
                    securities=None if securities is None else securities(identity),
                )
            )
            hosts.append(host)
        yield hosts

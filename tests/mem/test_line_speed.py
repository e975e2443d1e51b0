"""The speed of a line, as messages over real connections show it, under virtual time."""

from __future__ import annotations

import pytest
from trio.testing import MockClock

from net.addresses import parse
from net.host import open_host
from net.mux.base import Stream
from net.rpc.framing import Message, Tensor, encode
from net.rpc.messages import MessageStream
from net.swarm import Connection
from net.transports.memory import MemoryNetwork
from tests.mem.lines import Line, LineTransport
from tests.net_helpers import seeded

MIB = 1 << 20


async def measured(bytes_per_s: float | None, *sizes: int) -> float | None:
    """What is known of a line after messages of these sizes, sent one after another."""
    network = MemoryNetwork()

    async def read(_: Connection, stream: Stream) -> None:
        messages = MessageStream(stream)
        while await messages.receive() is not None:
            pass

    async with (
        open_host(seeded(1), listen=[parse("/memory/0")], transports=[network.transport()]) as peer,
        open_host(seeded(2), transports=[LineTransport(network, Line(bytes_per_s))]) as host,
    ):
        peer.handle("/test", read)
        connection = await host.connect(peer.peer_id, peer.addresses)
        for _ in range(2):  # two streams know what one has found out
            stream = await host.open_stream_over(connection, ["/test"])
            messages = MessageStream(stream, connection.line)
            for size in sizes:
                await messages.send(
                    encode(Message(header={}, tensors=[Tensor(dtype="u8", shape=(size,), data=bytes(size))]))
                )
            await stream.aclose()
            sizes = ()
        return messages.line.bytes_per_s


@pytest.mark.parametrize("bytes_per_s", [1e5, 1e6, 2e7])
@pytest.mark.parametrize("sizes", [[3 * MIB], [MIB // 2] * 6], ids=["one-long", "several"])
async def test_a_slow_line_shows(bytes_per_s: float, sizes: list[int], autojump_clock: MockClock) -> None:
    assert await measured(bytes_per_s, *sizes) == pytest.approx(bytes_per_s, rel=0.15)


async def test_what_is_short_says_nothing_and_neither_does_a_fast_line(autojump_clock: MockClock) -> None:
    assert await measured(1e6, *[50_000] * 2) is None
    assert await measured(None, 3 * MIB) is None

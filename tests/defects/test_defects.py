"""The defects of py-libp2p's host, swarm and Yamux for which ``net`` has components of its own.

Each scenario runs on both stacks: ours must pass it, and the stock one must fail it in the way that is written there,
so that every test here is known to catch what it is for. Time is virtual wherever no process is involved, and the hosts
are joined by a line that takes a little of it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from net import errors
from net.mux import core as yamux
from net.mux.frames import Flags, Header, Type
from net.transports.base import RawConnection
from net.transports.memory import MemoryNetwork
from tests.defects.process import BEGINNING, peer_process
from tests.defects.stacks import (
    NOWHERE,
    Broken,
    Handler,
    Host,
    OurStack,
    Stack,
    StockStack,
    Stream,
    ask,
    echo,
    fails_on_stock,
    hold,
    receive_count,
    receive_no_more,
)
from tests.defects.stranger import SPEAKS, Line, Stranger, line_to
from tests.net_helpers import MEMORY_ANY, seeded

NEVER_S = 60.0  # of virtual time: reached only when nothing moves any more
STREAMS_LIMIT = 256  # of one connection, in each direction; both stacks' default
SIX_BYTES = b"\x05\xff\xfe\xfd\xfc\n"  # a multistream message that is not UTF-8


@pytest.fixture(params=[OurStack(), StockStack()], ids=lambda stack: stack.name)
def stack(request: pytest.FixtureRequest) -> Stack:
    found: Stack = request.param
    return found


class Pair(NamedTuple):
    """Two hosts of one stack, connected."""

    client: Host
    server: Host
    line: Line

    async def open(self) -> Stream:
        return await self.client.open(self.server.peer_id)


@asynccontextmanager
async def connected(stack: Stack, on_server: Handler, on_client: Handler = hold) -> AsyncIterator[Pair]:
    network = MemoryNetwork()
    async with (
        stack.host(1, network.transport(), on_server) as server,
        line_to(network, server) as line,
        stack.host(2, network.transport(), on_client) as client,
    ):
        await client.connect(server.peer_id, line.address)
        yield Pair(client, server, line)


# What a stranger can do


async def test_six_bytes_from_a_stranger_cost_one_stream(stack: Stack, autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    with fails_on_stock(stack, UnicodeDecodeError):  # it ends the host
        async with stack.host(1, network.transport(), echo) as host:
            stranger = await Stranger.dial(network, host)
            await stranger.open(1, SIX_BYTES)
            await stranger.ask(3, b"no harm done")


async def test_a_thousand_inbound_connections_one_after_another(stack: Stack, autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    with fails_on_stock(stack, AssertionError, match="deaf after 250 connections"):
        async with stack.host(1, network.transport(), echo) as host:
            for served in range(1000):
                try:
                    stranger = await Stranger.dial(network, host, 1000 + served)
                except errors.NetError as error:
                    raise AssertionError(f"deaf after {served} connections") from error
                await stranger.ask(1, b"good morning")
                await stranger.aclose()
                await trio.sleep(1)  # virtual: no two of them overlap


async def test_a_flood_beyond_the_window_is_cut_off(stack: Stack, autojump_clock: MockClock) -> None:
    """Nobody reads the stream, so that the window alone bounds what the host must keep in memory."""
    frame = bytes(yamux.INITIAL_WINDOW_BYTES // 4)
    network = MemoryNetwork()
    with fails_on_stock(stack, AssertionError, match="parked 8 MiB"):
        async with stack.host(1, network.transport(), hold) as host:
            stranger = await Stranger.dial(network, host)
            await stranger.open(1, SPEAKS)
            assert await stranger.receive_data(1, len(SPEAKS)) == SPEAKS
            with pytest.raises((trio.BrokenResourceError, errors.ConnectionLost)):
                for _ in range(2**23 // len(frame)):
                    await stranger.send(Header(Type.DATA, Flags.NONE, 1, len(frame)), frame)
                await stranger.frames_until_pong()  # the host has taken all of it
                raise AssertionError("parked 8 MiB in a window of 256 KiB")


async def test_a_flood_of_streams_is_refused_beyond_the_limit(stack: Stack, autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    with fails_on_stock(stack, AssertionError, match="1000 streams accepted, 0 refused"):
        async with stack.host(1, network.transport(), hold) as host:
            stranger = await Stranger.dial(network, host)
            for number in range(1000):
                await stranger.open(2 * number + 1, SPEAKS)
            answers = await stranger.frames_until_pong()
            accepted = sum(bool(answer.flags & Flags.ACK) for answer in answers)
            refused = sum(bool(answer.flags & Flags.RST) for answer in answers)
            assert (accepted, refused) == (STREAMS_LIMIT, 1000 - STREAMS_LIMIT), (
                f"{accepted} streams accepted, {refused} refused"
            )


@pytest.mark.parametrize("stack", [OurStack(), StockStack(all_securities=True)], ids=lambda stack: stack.name)
async def test_plaintext_is_not_spoken(stack: Stack, autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    with fails_on_stock(stack, AssertionError):
        async with stack.host(1, network.transport(), hold) as host:
            assert await Stranger.takes_security(network, host, "/noise")
            assert not await Stranger.takes_security(network, host, "/plaintext/2.0.0")


# Streams


async def test_a_handler_that_fails_costs_its_own_stream(stack: Stack, autojump_clock: MockClock) -> None:
    async def divide(stream: Stream) -> None:
        await stream.send(bytes([100 // (await stream.receive())[0]]))

    with fails_on_stock(stack, ZeroDivisionError):  # it ends the host
        async with connected(stack, divide) as pair:
            stream = await pair.open()
            await stream.send(b"\0")
            await receive_no_more(stream)
            stream = await pair.open()
            await stream.send(b"\5")
            assert await stream.receive() == b"\x14"


async def test_bulk_both_ways_with_new_streams_does_not_deadlock(stack: Stack, autojump_clock: MockClock) -> None:
    """The network stands still at first, so that both sides have much to send when it goes on."""
    with fails_on_stock(stack, Broken, match="the other end was closed"):  # by the line, after all that time
        async with connected(stack, echo, echo) as pair, trio.open_nursery() as nursery:

            async def bulk(stream: Stream) -> None:
                nursery.start_soon(stream.send, bytes(500_000))
                await receive_count(stream, 500_000)

            async def questions(near: Host, far: Host) -> None:
                for _ in range(10):
                    await ask(near, far.peer_id, b"a small question")

            both_ways = ((pair.client, pair.server), (pair.server, pair.client))
            streams = [await near.open(far.peer_id) for near, far in both_ways for _ in range(8)]
            pair.line.stop()
            for stream in streams:
                nursery.start_soon(bulk, stream)
            for near, far in both_ways:
                for _ in range(8):
                    nursery.start_soon(questions, near, far)
            await trio.testing.wait_all_tasks_blocked()
            pair.line.go_on()


async def test_a_cancelled_write_leaves_the_connection_whole(stack: Stack, autojump_clock: MockClock) -> None:
    """Cancelled while the network stands still, which leaves a frame half sent."""
    with fails_on_stock(stack, Broken, match="failed to open a stream"):  # the connection is dead
        async with connected(stack, echo) as pair:
            streams = [await pair.open() for _ in range(3)]
            pair.line.stop()
            with trio.move_on_after(1) as scope:
                async with trio.open_nursery() as nursery:
                    for stream in streams:
                        nursery.start_soon(stream.send, bytes(1_000_000))
            assert scope.cancelled_caught
            pair.line.go_on()
            with trio.fail_after(NEVER_S):
                await ask(pair.client, pair.server.peer_id, b"unharmed")


async def test_a_slow_reader_loses_nothing(stack: Stack, autojump_clock: MockClock) -> None:
    data = bytes(range(250)) * 80_000  # more than the largest window
    assert len(data) > yamux.YamuxSettings().max_window_bytes

    async def send(stream: Stream) -> None:
        await stream.send(data)
        await stream.end()

    with fails_on_stock(stack, Broken, match="StreamReset"):  # and what was not sent yet is lost
        async with connected(stack, send) as pair:
            stream = await pair.open()
            await trio.sleep(20)
            assert await receive_count(stream, len(data)) == data
            assert await stream.receive() == b""


async def test_the_peers_reset_is_no_end(stack: Stack, autojump_clock: MockClock) -> None:
    async def give_up(stream: Stream) -> None:
        await stream.send(b"half an answer")
        await stream.receive()
        await stream.reset()

    with fails_on_stock(stack, AssertionError, match="a clean end"):
        async with connected(stack, give_up) as pair:
            stream = await pair.open()
            assert await stream.receive() == b"half an answer"
            await stream.send(b"and the other half?")
            with trio.fail_after(NEVER_S):
                await receive_no_more(stream)


async def test_the_stream_beyond_the_limit_fails_at_once(stack: Stack, autojump_clock: MockClock) -> None:
    with fails_on_stock(stack, trio.TooSlowError):  # it waits for ever
        async with connected(stack, hold) as pair:
            for _ in range(STREAMS_LIMIT):
                await pair.open()
            with trio.fail_after(NEVER_S), pytest.raises(Broken):
                await pair.open()


async def test_a_peer_that_does_not_read_can_be_left(stack: Stack, autojump_clock: MockClock) -> None:
    broken = 0

    async def send(stream: Stream) -> None:
        nonlocal broken
        with pytest.raises(Broken):
            await stream.send(bytes(1_000_000))
        broken += 1

    with fails_on_stock(stack, trio.TooSlowError):  # its goodbye waits for the write that waits for the peer
        async with connected(stack, hold) as pair:
            streams = [await pair.open() for _ in range(3)]
            pair.line.stop()
            with trio.fail_after(2):
                async with trio.open_nursery() as nursery:
                    for stream in streams:
                        nursery.start_soon(send, stream)
                    await trio.testing.wait_all_tasks_blocked()
                    await pair.client.disconnect(pair.server.peer_id)
            assert broken == len(streams)


# Dialling


async def test_a_silent_listener_holds_nobody_up(stack: Stack, autojump_clock: MockClock) -> None:
    async def say_nothing(raw: RawConnection) -> None:
        await trio.sleep_forever()

    network = MemoryNetwork()
    with fails_on_stock(stack, trio.TooSlowError):
        async with stack.host(2, network.transport(), hold) as client, trio.open_nursery() as nursery:
            (silent,) = await nursery.start(network.transport().listen, MEMORY_ANY, say_nothing)
            with trio.fail_after(10), pytest.raises(Broken):
                await client.connect(seeded(1).peer_id, silent)
            nursery.cancel_scope.cancel()


async def test_a_dial_takes_no_longer_than_the_network(stack: Stack, autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    with fails_on_stock(stack, AssertionError, match="took 0.25 s"):
        async with (
            stack.host(1, network.transport(), hold) as server,
            stack.host(2, network.transport(), hold) as client,
        ):
            began = trio.current_time()
            await client.connect(server.peer_id, server.address)
            took_s = trio.current_time() - began
            assert took_s < 0.1, f"took {took_s:.2f} s over a network without delay"


async def test_a_peer_that_comes_up_later_is_dialled_again(stack: Stack, autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    with fails_on_stock(stack, Broken, match="negative cache"):
        async with stack.host(2, network.transport(), hold) as client:
            with pytest.raises(Broken):
                await client.connect(seeded(1).peer_id, NOWHERE)
            async with stack.host(1, network.transport(), hold) as server:
                await client.connect(server.peer_id, server.address)


# Peers that are processes: real sockets, real signals


async def test_a_killed_peer_is_no_end_of_a_stream(stack: Stack) -> None:
    with fails_on_stock(stack, AssertionError, match="a clean end"), peer_process() as peer:
        async with stack.host(2, None, hold) as client:
            await client.connect(peer.address.peer_id, peer.address.address)
            stream = await client.open(peer.address.peer_id)
            assert await receive_count(stream, len(BEGINNING)) == BEGINNING
            peer.kill()
            with trio.fail_after(5):
                await receive_no_more(stream)


@pytest.fixture
def clock() -> MockClock:
    """Real time, which a test may let run faster."""
    return MockClock(rate=1)


async def test_a_stopped_peer_is_found_dead_within_ten_seconds(stack: Stack, clock: MockClock) -> None:
    with fails_on_stock(stack, trio.TooSlowError), peer_process() as peer:
        async with stack.host(2, None, hold) as client:
            await client.connect(peer.address.peer_id, peer.address.address)
            stream = await client.open(peer.address.peer_id)
            assert await receive_count(stream, len(BEGINNING)) == BEGINNING
            peer.stop()
            clock.rate = 4
            with trio.fail_after(10 + 2):  # two, which are half a real second, for a machine that is busy
                await receive_no_more(stream)

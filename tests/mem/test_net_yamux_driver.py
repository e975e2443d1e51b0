"""Yamux over a channel in memory: cancellation, ends and resets, silent peers, pressure."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from net import errors
from net.mux import core as yamux
from net.mux.driver import GOODBYE_S, LINGER_S, YamuxConnection, YamuxStream
from net.mux.frames import HEADER_BYTES, Flags, Header, Type
from net.transports.base import RawConnection
from net.transports.memory import memory_stream_pair
from tests.mem.lines import Line
from tests.net_helpers import (
    MEMORY_ANY,
    PlainChannel,
    Tap,
    echo,
    mux_pair,
    receive_all,
    receive_count,
    refuse,
    seeded,
)


async def ask(connection: YamuxConnection, data: bytes) -> bytes:
    """One message there and back on a stream of its own."""
    stream = connection.open_stream()
    async with trio.open_nursery() as nursery:

        async def send() -> None:
            await stream.send_all(data)
            await stream.send_eof()

        nursery.start_soon(send)
        answer = await receive_all(stream)
    await stream.aclose()
    return answer


async def hold(stream: YamuxStream) -> None:
    """Accept a stream, never read it."""
    await trio.sleep_forever()


async def settled() -> None:
    """Let everything run that can."""
    await trio.testing.wait_all_tasks_blocked()


@pytest.mark.parametrize("size", [0, 1, 70_000, 3_000_000])
async def test_echo(size: int, autojump_clock: MockClock) -> None:
    async with mux_pair() as (client, _):
        data = bytes(range(256)) * (size // 256) + bytes(size % 256)
        assert await ask(client, data) == data


async def test_either_side_opens_streams(autojump_clock: MockClock) -> None:
    async with mux_pair(on_client=echo) as (client, server):
        assert await ask(server, b"from the listener") == b"from the listener"
        assert await ask(client, b"from the dialler") == b"from the dialler"


@pytest.mark.parametrize("lockstep", [False, True])
async def test_bulk_both_ways_and_new_streams_do_not_deadlock(lockstep: bool, autojump_clock: MockClock) -> None:
    answers: list[bytes] = []
    all_answered = trio.Event()

    async def many(connection: YamuxConnection, mark: bytes) -> None:
        for _ in range(20):
            answers.append(await ask(connection, mark * 1000))
            if len(answers) == 160:
                all_answered.set()

    async with (
        mux_pair(on_client=echo, lockstep=lockstep) as (client, server),
        trio.open_nursery() as nursery,
    ):
        for connection, mark in ((client, b"c"), (server, b"s")):
            nursery.start_soon(many, connection, mark)
            for _ in range(3):
                nursery.start_soon(many, connection, mark * 300)
        with trio.fail_after(60):  # virtual: reached only when nothing moves any more
            await all_answered.wait()
    assert {len(answer) for answer in answers} == {1000, 300_000}


async def test_a_cancelled_send_costs_nothing_but_its_own_message(autojump_clock: MockClock) -> None:
    async with mux_pair(on_server=hold, on_client=echo, lockstep=True) as (client, server):
        bulk = client.open_stream()
        with trio.move_on_after(1) as scope:
            await bulk.send_all(bytes(5_000_000))
        assert scope.cancelled_caught
        with trio.fail_after(5):
            assert await ask(server, b"still here") == b"still here"
        bulk.reset()
        await settled()
        assert not client.is_closed and not server.is_closed


async def test_a_cancelled_receive_loses_nothing(autojump_clock: MockClock) -> None:
    async with mux_pair() as (client, _):
        stream = client.open_stream()
        with trio.move_on_after(1) as scope:
            await stream.receive_some()
        assert scope.cancelled_caught
        await stream.send_all(b"complete")
        assert await receive_count(stream, 8) == b"complete"


async def test_the_peers_reset_is_no_end(autojump_clock: MockClock) -> None:
    async with mux_pair(on_server=refuse) as (client, _):
        stream = client.open_stream()
        with pytest.raises(errors.StreamReset):
            await stream.receive_some()
        with pytest.raises(errors.StreamReset):
            await stream.send_all(b"x")


async def test_the_peers_end_is_empty_and_final(autojump_clock: MockClock) -> None:
    async def answer(stream: YamuxStream) -> None:
        await stream.send_all(b"all of it")
        await stream.aclose()

    async with mux_pair(on_server=answer) as (client, _):
        stream = client.open_stream()
        assert await receive_all(stream) == b"all of it"
        assert await stream.receive_some() == b""


async def test_the_end_of_the_connection_is_no_end_of_a_stream(autojump_clock: MockClock) -> None:
    async with mux_pair(on_server=hold) as (client, server):
        stream = client.open_stream()
        await settled()
        server.close()
        with pytest.raises(errors.ConnectionLost):
            await stream.receive_some()
        with pytest.raises(errors.ConnectionLost):
            await stream.send_all(b"x")
        await settled()
        with pytest.raises(errors.ConnectionLost):
            client.open_stream()


async def test_what_arrived_before_the_connection_broke_can_be_read(autojump_clock: MockClock) -> None:
    async def answer(stream: YamuxStream) -> None:
        await stream.send_all(b"last words")
        await stream.send_eof()
        await trio.sleep_forever()

    async with mux_pair(on_server=answer) as (client, server):
        stream = client.open_stream()
        await settled()
        server.close()
        await settled()
        assert client.is_closed
        assert await receive_all(stream) == b"last words"


async def test_a_stream_closed_here_says_so(autojump_clock: MockClock) -> None:
    async with mux_pair() as (client, _):
        for close in (True, False):
            stream = client.open_stream()
            await stream.send_all(b"echo this")
            await settled()
            if close:
                await stream.aclose()
            else:
                stream.reset()
            with pytest.raises(trio.ClosedResourceError):
                await stream.receive_some()
            with pytest.raises(trio.ClosedResourceError):
                await stream.send_all(b"x")


async def test_closing_wakes_a_task_that_waits(autojump_clock: MockClock) -> None:
    async with mux_pair(on_server=hold) as (client, _):
        stream = client.open_stream()
        async with trio.open_nursery() as nursery:

            async def wait() -> None:
                with pytest.raises(trio.ClosedResourceError):
                    await stream.receive_some()

            nursery.start_soon(wait)
            await settled()
            await stream.aclose()


async def test_a_silent_peer_is_found_out_within_ten_seconds(autojump_clock: MockClock) -> None:
    near, _far = trio.testing.lockstep_stream_pair()  # nobody reads or writes at the far end: a stopped process
    client = YamuxConnection(PlainChannel(near, seeded(1).peer_id), client=True)
    async with trio.open_nursery() as nursery:
        await nursery.start(client.run, refuse)
        stream = client.open_stream()
        began = trio.current_time()
        with pytest.raises(errors.ConnectionLost, match="stopped answering"):
            await stream.receive_some()
        assert trio.current_time() - began <= 10
    assert trio.current_time() - began <= 12  # run has ended by itself
    assert client.is_closed


class Noted(PlainChannel):
    """Notes how it ends."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        super().__init__(stream, seeded(1).peer_id)
        self.events: list[str] = []

    def abandon(self) -> None:
        self.events.append("abandon")

    async def aclose(self) -> None:
        self.events.append("close")
        await super().aclose()


async def test_the_connection_to_a_silent_peer_is_abandoned(autojump_clock: MockClock) -> None:
    near, _far = memory_stream_pair()
    channel = Noted(near)
    client = YamuxConnection(channel, client=True)
    async with trio.open_nursery() as nursery:
        await nursery.start(client.run, refuse)
    assert channel.events[:2] == ["abandon", "close"]


async def test_a_connection_that_is_closed_says_goodbye(autojump_clock: MockClock) -> None:
    near, far = memory_stream_pair()
    channel = Noted(near)
    client = YamuxConnection(channel, client=True)
    async with trio.open_nursery() as nursery:
        await nursery.start(client.run, refuse)
        client.close()
    assert set(channel.events) == {"close"}
    assert await far.receive_some()  # its last words


@asynccontextmanager
async def cuttable_pair(bytes_per_s: float = math.inf) -> AsyncIterator[tuple[YamuxConnection, Line]]:
    """A connection to a peer that echoes, over a line that can be cut, and is as slow as that."""
    near, far = memory_stream_pair()
    line = Line()
    raw = line.carry(RawConnection(stream=near, local=None, remote=MEMORY_ANY))
    stream = Slowed(raw.stream, bytes_per_s)
    client = YamuxConnection(PlainChannel(stream, seeded(2).peer_id), client=True)
    server = YamuxConnection(PlainChannel(far, seeded(1).peer_id), client=False)
    async with trio.open_nursery() as nursery:
        await nursery.start(client.run, refuse)
        await nursery.start(server.run, echo)
        await settled()
        yield client, line
        nursery.cancel_scope.cancel()


class Slowed(Tap):
    """A stream that takes its time with what is sent."""

    def __init__(self, stream: trio.abc.Stream, bytes_per_s: float) -> None:
        super().__init__(stream, lambda _, data: data)
        self._bytes_per_s = bytes_per_s

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.sleep(len(data) / self._bytes_per_s)
        await super().send_all(data)


@pytest.mark.parametrize("checks", [1, 3])
async def test_a_check_finds_out_a_silent_peer_within_a_second(checks: int, autojump_clock: MockClock) -> None:
    async with cuttable_pair() as (client, line):
        stream = client.open_stream()
        await stream.send_all(b"hello")
        assert await receive_count(stream, 5) == b"hello"
        await trio.sleep(1)
        line.cut()
        began = trio.current_time()
        for _ in range(checks):
            client.check()
            await trio.sleep(0.2)
        with pytest.raises(errors.ConnectionLost, match="stopped answering"):
            await stream.receive_some()
        assert trio.current_time() - began == pytest.approx(1, abs=0.01)


async def test_a_check_wakes_who_sleeps_until_the_next_ping(autojump_clock: MockClock) -> None:
    """The answer is due long before anything else is."""
    async with cuttable_pair() as (client, line):
        await trio.sleep(0.1)
        line.cut()
        began = trio.current_time()
        client.check()
        await until_closed(client)
        assert trio.current_time() - began == pytest.approx(1, abs=0.1)
        client.check()  # which a dead connection takes calmly


async def until_closed(connection: YamuxConnection) -> None:
    while not connection.is_closed:  # noqa: ASYNC110 - nothing else tells
        await trio.sleep(0.05)


@pytest.mark.parametrize("bytes_per_s", [math.inf, yamux.SLOW_BYTES_PER_S])
async def test_who_answers_stays_also_under_bulk(bytes_per_s: float, autojump_clock: MockClock) -> None:
    async with cuttable_pair(bytes_per_s) as (client, _), trio.open_nursery() as nursery:
        stream = client.open_stream()
        nursery.start_soon(stream.send_all, bytes(2_000_000))
        nursery.start_soon(receive_count, stream, 2_000_000)
        for _ in range(100):
            client.check()
            await trio.sleep(0.25)
        assert not client.is_closed
        nursery.cancel_scope.cancel()


async def test_an_idle_peer_that_lives_is_kept(autojump_clock: MockClock) -> None:
    async with mux_pair() as (client, server):
        await trio.sleep(300)
        assert not client.is_closed and not server.is_closed
        assert await ask(client, b"good morning") == b"good morning"
        assert client.round_trip_s is not None


async def test_a_slow_reader_loses_nothing_and_holds_one_window(autojump_clock: MockClock) -> None:
    received: list[bytes] = []

    async def slow(stream: YamuxStream) -> None:
        while data := await stream.receive_some():
            assert sum(map(len, stream._received)) <= 16 * 1024 * 1024
            received.append(data)
            await trio.sleep(1)
        await stream.aclose()

    async with mux_pair(on_server=slow) as (client, server):
        stream = client.open_stream()
        await settled()
        data = bytes(range(256)) * 10_000
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                await stream.send_all(data)
                await stream.send_eof()

            nursery.start_soon(send)
            await settled()
            (inbound,) = server._streams.values()
            # The first window was taken at once, so that it has doubled; since then nobody reads.
            assert sum(map(len, inbound._received)) <= 2 * yamux.INITIAL_WINDOW_BYTES
        assert await stream.receive_some() == b""
    assert b"".join(received) == data


async def test_a_reader_that_stops_holds_up_its_own_stream_only(autojump_clock: MockClock) -> None:
    async with mux_pair(on_server=hold, on_client=echo) as (client, server):
        stuck = client.open_stream()
        with trio.move_on_after(20) as scope:
            await stuck.send_all(bytes(2_000_000))
        assert scope.cancelled_caught
        (inbound,) = server._streams.values()
        assert sum(map(len, inbound._received)) == yamux.INITIAL_WINDOW_BYTES
        assert await ask(server, b"others go on") == b"others go on"


async def test_closed_streams_are_forgotten_by_both_sides(autojump_clock: MockClock) -> None:
    async with mux_pair() as (client, server):
        for _ in range(300):
            await ask(client, b"x")
        await settled()
        for connection in (client, server):
            assert connection.open_streams == 0
            assert connection._core._streams == {}
            assert connection._serving == 0


async def test_a_stream_closed_with_unread_data_does_not_stop_its_peer(autojump_clock: MockClock) -> None:
    sent_all = trio.Event()

    async def send(stream: YamuxStream) -> None:
        await stream.send_all(bytes(1_000_000))
        await stream.aclose()
        sent_all.set()

    async with mux_pair(on_server=send) as (client, server):
        stream = client.open_stream()
        await settled()  # a window full, unread
        await stream.aclose()
        with trio.fail_after(LINGER_S / 2):
            await sent_all.wait()
        await settled()
        assert client._core._streams == server._core._streams == {}


async def test_a_closed_stream_that_the_peer_keeps_open_is_reset_after_a_minute(autojump_clock: MockClock) -> None:
    outcome: list[Exception] = []

    async def never_ends(stream: YamuxStream) -> None:
        assert await stream.receive_some() == b""
        try:
            while True:
                await trio.sleep(1)
                await stream.send_all(b"on and on")
        except errors.StreamReset as error:
            outcome.append(error)

    async with mux_pair(on_server=never_ends) as (client, server):
        stream = client.open_stream()
        await stream.aclose()
        await trio.sleep(LINGER_S / 2)
        assert not outcome
        await trio.sleep(LINGER_S)
        assert len(outcome) == 1
        assert client._core._streams == server._core._streams == {}


async def test_a_closed_stream_whose_peer_ended_and_never_reads_is_reset_after_a_minute(
    autojump_clock: MockClock,
) -> None:
    async def ends_and_never_reads(stream: YamuxStream) -> None:
        await trio.sleep(1)  # after we have closed
        await stream.send_eof()
        await trio.sleep_forever()

    async with mux_pair(on_server=ends_and_never_reads) as (client, _):
        stream = client.open_stream()
        await stream.send_all(bytes(yamux.INITIAL_WINDOW_BYTES + 1000))
        await settled()
        await stream.aclose()
        await trio.sleep(LINGER_S * 2)
        assert client._core._streams == {}


async def test_close_sends_what_waits_and_ends_run_on_both_sides(autojump_clock: MockClock) -> None:
    received: list[bytes] = []

    async def collect(stream: YamuxStream) -> None:
        received.append(await receive_all(stream))

    near, far = trio.testing.memory_stream_pair()
    client = YamuxConnection(PlainChannel(near, seeded(2).peer_id), client=True)
    server = YamuxConnection(PlainChannel(far, seeded(1).peer_id), client=False)
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            await nursery.start(client.run, refuse)
            await nursery.start(server.run, collect)
            stream = client.open_stream()
            await stream.send_all(b"to the end")
            await stream.send_eof()
            client.close()
            assert client.is_closed
    assert received in ([b"to the end"], [])  # the handler may be cancelled with its connection
    assert server.is_closed


async def test_a_peer_that_pings_and_does_not_read_cannot_hold_a_closed_connection(autojump_clock: MockClock) -> None:
    near, far = memory_stream_pair()
    client = YamuxConnection(PlainChannel(near, seeded(1).peer_id), client=True)

    async def ping() -> None:
        for number in range(100):
            await far.send_all(Header(Type.PING, Flags.SYN, 0, number).encode())
            await trio.sleep(3)

    async def send(stream: YamuxStream) -> None:
        with pytest.raises(errors.ConnectionLost):
            await stream.send_all(bytes(1_000_000))

    async with trio.open_nursery() as pinging:
        pinging.start_soon(ping)
        async with trio.open_nursery() as nursery:
            await nursery.start(client.run, refuse)
            for _ in range(3):
                nursery.start_soon(send, client.open_stream())
            await trio.sleep(20)
            assert not client.is_closed
            began = trio.current_time()
            client.close()
        assert trio.current_time() - began <= GOODBYE_S
        pinging.cancel_scope.cancel()


async def test_a_connection_whose_peer_goes_away_takes_no_new_streams(autojump_clock: MockClock) -> None:
    async with mux_pair() as (client, server):
        server._core.go_away()
        server._wake_writer.set()
        await settled()
        assert client.is_closed
        with pytest.raises(errors.LimitExceeded):
            client.open_stream()


async def test_a_broken_protocol_ends_the_connection_with_its_reason(autojump_clock: MockClock) -> None:
    near, far = trio.testing.memory_stream_pair()
    client = YamuxConnection(PlainChannel(near, seeded(2).peer_id), client=True)
    async with trio.open_nursery() as nursery:
        await nursery.start(client.run, refuse)
        stream = client.open_stream()
        await settled()
        await far.send_all(b"\xff" * HEADER_BYTES)
        with pytest.raises(errors.RemoteProtocolError):
            await stream.receive_some()
    wire = await receive_all(far)
    assert Header.decode(wire, len(wire) - HEADER_BYTES) == Header(Type.GO_AWAY, Flags.NONE, 0, 1)


async def test_streams_opened_and_reset_at_once_do_not_pile_up_handlers(autojump_clock: MockClock) -> None:
    running = most = 0

    async def busy(stream: YamuxStream) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await trio.sleep(1000)

    near, far = trio.testing.memory_stream_pair()
    settings = yamux.YamuxSettings(max_inbound_streams=10)
    server = YamuxConnection(PlainChannel(far, seeded(1).peer_id), client=False, settings=settings)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run, busy)
        for number in range(100):
            stream_id = 2 * number + 1
            await near.send_all(
                Header(Type.DATA, Flags.SYN, stream_id, 0).encode()
                + Header(Type.DATA, Flags.RST, stream_id, 0).encode()
            )
            await settled()
        assert most == 10
        assert not server.is_closed
        nursery.cancel_scope.cancel()


async def test_cancelling_run_fails_its_streams_and_closes_the_channel(autojump_clock: MockClock) -> None:
    near, far = trio.testing.memory_stream_pair()
    client = YamuxConnection(PlainChannel(near, seeded(2).peer_id), client=True)
    async with trio.open_nursery() as nursery:
        await nursery.start(client.run, refuse)
        stream = client.open_stream()
        await settled()
        nursery.cancel_scope.cancel()
    with pytest.raises(errors.ConnectionLost):
        await stream.receive_some()
    wire = await receive_all(far)  # ends, therefore closed
    assert Header.decode(wire, len(wire) - HEADER_BYTES).type is Type.GO_AWAY


async def test_frames_that_came_with_the_last_words_of_the_negotiation_count(autojump_clock: MockClock) -> None:
    """Whoever reads the channel before the muxer does may be given a batch of which it needs the first record alone."""

    class Batches(PlainChannel):
        """The first record and what follows it are one batch."""

        async def receive_batch(self) -> Sequence[bytes]:
            data = b"".join(await super().receive_batch())
            return [data[:5], data[5:]] if data.startswith(b"words") else [data][: len(data)]

    near, far = trio.testing.memory_stream_pair()
    channel = Batches(near, seeded(1).peer_id)
    opened = trio.Event()

    async def on_stream(stream: YamuxStream) -> None:
        opened.set()
        stream.reset()

    await far.send_all(b"words" + Header(Type.WINDOW_UPDATE, Flags.SYN, 2, 0).encode())
    assert await channel.receive_some(5) == b"words"
    async with trio.open_nursery() as nursery:
        await nursery.start(YamuxConnection(channel, client=True).run, on_stream)
        await opened.wait()
        nursery.cancel_scope.cancel()

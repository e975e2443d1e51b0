"""Measuring lines: what comes of it, and what strangers get who ask for too much."""

from __future__ import annotations

import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from net import errors, perf
from net.host import Host
from net.mux.base import Stream
from net.perf import MAX_BYTES, PROTOCOL_ID, PerfBudget, PerfLimits, Transfer, measure_bytes_per_s, serve_perf, transfer
from net.swarm import Connection
from tests.mem.test_relay import three
from tests.net_helpers import memory_hosts, receive_all, seeded

KIB, MIB = 1 << 10, 1 << 20
SLOW = PerfLimits(bytes_per_s=100 * KIB)
Handler = Callable[[Connection, Stream], Awaitable[None]]


@asynccontextmanager
async def two(limits: PerfLimits | None = None, handler: Handler | None = None) -> AsyncIterator[tuple[Host, Host]]:
    """One who measures, connected with one who serves within ``limits``, or with ``handler``."""
    async with memory_hosts(2) as (one, other):
        if handler is not None:
            other.handle(PROTOCOL_ID, handler)
        else:
            serve_perf(other, limits)
        await one.connect(other.peer_id, other.addresses)
        yield one, other


async def ask(host: Host, peer: Host, wanted: int) -> Stream:
    """A stream on which so many bytes were asked for.

    Raises:
        StreamReset: it was refused at once.
    """
    stream = await host.open_stream(peer.peer_id, [PROTOCOL_ID])
    await stream.send_all(wanted.to_bytes(8, "big"))
    return stream


# Measuring


@pytest.mark.parametrize(("up", "down"), [(0, 0), (1, 0), (0, 1), (100_000, 300_000), (MAX_BYTES, MAX_BYTES)])
async def test_bytes_go_there_and_back(up: int, down: int, autojump_clock: MockClock) -> None:
    async with two() as (one, other):
        result = await transfer(one, other.peer_id, send_bytes=up, receive_bytes=down)
        assert (result.sent_bytes, result.received_bytes) == (up, down)
        assert result.bytes_per_s >= 0


async def test_a_line_is_as_fast_as_it_is(autojump_clock: MockClock) -> None:
    async with two(SLOW) as (one, other):
        result = await transfer(one, other.peer_id, send_bytes=MIB, receive_bytes=MIB, timeout_s=60)
        assert result.seconds == pytest.approx(2 * MIB / SLOW.bytes_per_s, rel=0.1)
        assert await measure_bytes_per_s(one, other.peer_id) == pytest.approx(SLOW.bytes_per_s, rel=0.1)


@pytest.mark.parametrize(("rate", "streams"), [(100 * KIB, 1), (MIB, 2), (64 * MIB, 3)])
async def test_a_fast_line_is_measured_with_more(rate: int, streams: int, autojump_clock: MockClock) -> None:
    sizes = []

    async with two(PerfLimits(bytes_per_s=rate)) as (one, other):
        original = perf.transfer

        async def counted(host: Host, peer_id: object, **sizes_of: int) -> Transfer:
            sizes.append(sizes_of["send_bytes"])
            return await original(one, other.peer_id, **sizes_of)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(perf, "transfer", counted)
            assert await measure_bytes_per_s(one, other.peer_id) == pytest.approx(rate, rel=0.2)
    assert sizes == list(perf.SIZES_BYTES[:streams])


async def test_who_measures_often_is_sent_elsewhere(autojump_clock: MockClock) -> None:
    limits = replace(SLOW, streams_per_peer_per_minute=2)
    async with two(limits) as (one, other):
        for _ in range(2):
            assert await measure_bytes_per_s(one, other.peer_id) > 0
        with pytest.raises(errors.PeerFailed, match="does not measure its line now"):
            await measure_bytes_per_s(one, other.peer_id)
        await trio.sleep(perf.MINUTE_S)
        assert await measure_bytes_per_s(one, other.peer_id) > 0


async def test_what_was_measured_stands_when_more_is_refused(autojump_clock: MockClock) -> None:
    async with two(PerfLimits(streams_per_peer_per_minute=1)) as (one, other):
        assert await measure_bytes_per_s(one, other.peer_id) > 0


async def test_a_peer_that_does_not_measure_is_told(autojump_clock: MockClock) -> None:
    async with memory_hosts(2) as (one, other):
        await one.connect(other.peer_id, other.addresses)
        with pytest.raises(errors.ProtocolNotSupported):
            await measure_bytes_per_s(one, other.peer_id)


@pytest.mark.parametrize("sizes", [(-1, 0), (0, -1), (2**64, 0), (0, 2**64)])
async def test_sizes_that_are_none(sizes: tuple[int, int], autojump_clock: MockClock) -> None:
    async with two() as (one, other):
        with pytest.raises(ValueError, match="expected 0 to"):
            await transfer(one, other.peer_id, send_bytes=sizes[0], receive_bytes=sizes[1])


async def test_relays_are_not_measured(autojump_clock: MockClock) -> None:
    async with three() as world:
        serve_perf(world.far)
        await world.near.connect(world.far.peer_id, [world.at])
        with pytest.raises(errors.DialError, match="through a relay alone"):
            await measure_bytes_per_s(world.near, world.far.peer_id)
        with pytest.raises(errors.StreamReset):  # nor for who asks all the same
            stream = await ask(world.near, world.far, 0)
            await stream.send_eof()
            await receive_all(stream)


# Peers that misbehave towards who serves


@pytest.mark.parametrize("wanted", [MAX_BYTES + 1, 2**63, 2**64 - 1])
async def test_a_claim_costs_nothing(wanted: int, autojump_clock: MockClock) -> None:
    async with two() as (one, other):
        tracemalloc.start()
        try:
            with pytest.raises(errors.StreamReset):
                await receive_all(await ask(one, other, wanted))
            assert tracemalloc.get_traced_memory()[1] < MIB
        finally:
            tracemalloc.stop()
        await transfer(one, other.peer_id, send_bytes=0, receive_bytes=MAX_BYTES)  # the next one is served


async def test_who_sends_more_than_it_may_is_cut_off(autojump_clock: MockClock) -> None:
    async with two() as (one, other):
        with pytest.raises(errors.PeerFailed, match="broke off"):
            await transfer(one, other.peer_id, send_bytes=MAX_BYTES + 1, receive_bytes=0)
        await transfer(one, other.peer_id, send_bytes=MAX_BYTES, receive_bytes=0)


@pytest.mark.parametrize("first", [b"", b"\0\0\0", bytes(8), bytes(100)])
async def test_who_never_ends_is_not_waited_for(first: bytes, autojump_clock: MockClock) -> None:
    async with two() as (one, other):
        stream = await one.open_stream(other.peer_id, [PROTOCOL_ID])
        if first:
            await stream.send_all(first)
        began = trio.current_time()
        with pytest.raises(errors.StreamReset):
            await receive_all(stream)
        assert trio.current_time() - began == pytest.approx(PerfLimits().stream_s, abs=0.1)
        await transfer(one, other.peer_id, send_bytes=1, receive_bytes=1)


async def test_who_ends_before_it_has_asked_gets_nothing(autojump_clock: MockClock) -> None:
    async with two() as (one, other):
        stream = await one.open_stream(other.peer_id, [PROTOCOL_ID])
        await stream.send_all(bytes(7))
        await stream.send_eof()
        with pytest.raises(errors.StreamReset):
            await receive_all(stream)


async def test_who_does_not_read_holds_its_place_for_so_long(autojump_clock: MockClock) -> None:
    async with two() as (one, other):
        stream = await ask(one, other, MAX_BYTES)
        await stream.send_eof()
        with pytest.raises(errors.PeerFailed):  # one at a time of each peer
            await transfer(one, other.peer_id, send_bytes=1, receive_bytes=1)
        await trio.sleep(PerfLimits().stream_s)
        await transfer(one, other.peer_id, send_bytes=1, receive_bytes=1)
        stream.reset()


async def test_there_are_few_places(autojump_clock: MockClock) -> None:
    async with memory_hosts(4) as (server, *others):
        serve_perf(server)
        for other in others:
            await other.connect(server.peer_id, server.addresses)
        streams = [await ask(other, server, 1) for other in others[:2]]
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(errors.StreamReset):
            await receive_all(await ask(others[2], server, 1))
        for stream in streams:
            await stream.send_eof()
            assert len(await receive_all(stream)) == 1


async def test_all_together_are_paced(autojump_clock: MockClock) -> None:
    async with memory_hosts(3) as (server, *others):
        serve_perf(server, SLOW)
        began = trio.current_time()

        async def measure(host: Host) -> None:
            await host.connect(server.peer_id, server.addresses)
            await transfer(host, server.peer_id, send_bytes=200 * KIB, receive_bytes=200 * KIB)

        async with trio.open_nursery() as nursery:
            for other in others:
                nursery.start_soon(measure, other)
        assert trio.current_time() - began == pytest.approx(8.0, rel=0.1)


# Peers that misbehave towards who measures


def answers(count: int, *, ends: bool = True, reads: bool = True) -> Handler:
    """One that sends ``count`` bytes, whatever was asked for."""

    async def handler(connection: Connection, stream: Stream) -> None:
        if reads:
            await receive_all(stream)
        await stream.send_all(bytes(count))
        if not ends:
            await trio.sleep_forever()

    return handler


@pytest.mark.parametrize(
    ("handler", "words"),
    [
        (answers(0), "1000 bytes less"),
        (answers(999), "1 bytes less"),
        (answers(1001), "more than the 1000"),
        (answers(50 * MIB), "more than the 1000"),
        (answers(0, ends=False), "took more than 7 s"),
        (answers(1000, ends=False), "took more than 7 s"),
        (answers(1000, reads=False, ends=False), "took more than 7 s"),
    ],
)
async def test_a_peer_that_answers_something_else_is_named(
    handler: Handler, words: str, autojump_clock: MockClock
) -> None:
    async with two(handler=handler) as (one, other):
        with pytest.raises(errors.PeerFailed, match=words) as caught:
            await transfer(one, other.peer_id, send_bytes=MIB, receive_bytes=1000, timeout_s=7)
        assert caught.value.peer_id == other.peer_id
        (connection,) = one.swarm.connections
        assert connection.mux.open_streams == 0


async def test_a_lost_connection_is_told(autojump_clock: MockClock) -> None:
    async def leaves(connection: Connection, stream: Stream) -> None:
        connection.mux.close()

    async with two(handler=leaves) as (one, other):
        with pytest.raises(errors.ConnectionLost):
            await transfer(one, other.peer_id, send_bytes=MIB, receive_bytes=1)


async def test_a_cancelled_measurement_leaves_nothing(autojump_clock: MockClock) -> None:
    async with two(SLOW) as (one, other):
        with trio.move_on_after(3) as scope:
            await transfer(one, other.peer_id, send_bytes=MIB, receive_bytes=MIB)
        assert scope.cancelled_caught
        await trio.testing.wait_all_tasks_blocked()
        for host in (one, other):
            (connection,) = host.swarm.connections
            assert connection.mux.open_streams == 0
        await trio.sleep(MIB / SLOW.bytes_per_s)  # what has come is read at its pace, and only then the reset is seen
        await transfer(one, other.peer_id, send_bytes=1, receive_bytes=1)


# What is given in a minute


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.floats(0, 30), st.integers(0, 4), st.integers(0, 2**64 - 1) | st.integers(0, 120)), max_size=60
    )
)
def test_a_budget_is_kept_over_every_minute(asked: list[tuple[float, int, int]]) -> None:
    limits = PerfLimits(max_bytes=100, streams_per_minute=6, streams_per_peer_per_minute=2, bytes_per_minute=250)
    budget = PerfBudget(limits)
    now, given_ = 0.0, list[tuple[float, int, int]]()
    for pause_s, peer, wanted in asked:
        now += pause_s
        count = 0
        try:
            with budget.stream(seeded(peer + 1).peer_id, now):
                try:
                    budget.promise(wanted, now)
                    count = wanted
                except errors.LimitExceeded:
                    pass
                given_.append((now, peer, count))
        except errors.LimitExceeded:
            pass
        minute = [each for each in given_ if each[0] > now - perf.MINUTE_S]
        assert len(minute) <= limits.streams_per_minute
        assert all(sum(each[1] == number for each in minute) <= 2 for number in range(5))
        assert sum(each[2] for each in minute) <= limits.bytes_per_minute
        assert all(each[2] <= limits.max_bytes for each in minute)
        assert len(budget._begun) <= limits.streams_per_minute
        assert len(budget._promised) <= limits.streams_per_minute
        assert budget._open == set()


def test_a_budget_is_there_for_who_asks_for_little() -> None:
    budget = PerfBudget(PerfLimits(streams=2))
    one, other, third = (seeded(number).peer_id for number in (1, 2, 3))
    with budget.stream(one, 0.0), budget.stream(other, 0.0):
        for late in (one, third):
            with pytest.raises(errors.LimitExceeded, match="2 measurements are going on"), budget.stream(late, 0.0):
                pytest.fail("there is no place")
    with budget.stream(third, 0.0), budget.stream(one, 0.0):
        pass

"""QUIC connections over a wire in memory, under virtual time: credit, ends, silence, loss, datagram sizes."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from net.errors import ConnectionLost, LimitExceeded, StreamReset
from net.mux.base import Stream
from net.security.certificate import make_credentials
from net.transports.quic import core
from net.transports.quic.connection import (
    CHECK_S,
    DEAD_AFTER_S,
    GOODBYE_S,
    LINGER_S,
    MAX_OUTBOUND_STREAMS,
    STREAM_SEND_BUFFER_BYTES,
    QuicConnection,
    QuicStream,
)
from net.transports.quic.core import INITIAL_WINDOW_BYTES, MAX_INBOUND_STREAMS, QuicCore, configure
from net.transports.quic.endpoint import _connection_id
from net.transports.quic.udp import Address
from tests.net_helpers import receive_all, receive_count, seeded

CLIENT, SERVER = seeded(1), seeded(2)
CREDENTIALS = {True: make_credentials(CLIENT), False: make_credentials(SERVER)}
ADDRESSES: dict[bool, Address] = {True: ("192.0.2.1", 1), False: ("192.0.2.2", 2)}
DELAY_S = 0.01


@dataclass
class Wire:
    """What one side sends; an endpoint without a socket.

    ``passes`` says which datagrams arrive.
    """

    nursery: trio.Nursery
    address: Address
    passes: Callable[[bytes], bool] = lambda _: True
    far: QuicConnection | None = None
    sent: list[int] = field(default_factory=list)
    is_full: bool = False
    asked: int = 0

    def send(self, connection: QuicConnection, datagrams: Sequence[tuple[bytes, Address]]) -> None:
        for data, _ in datagrams:
            self.sent.append(len(data))
            if self.passes(data):
                self.nursery.start_soon(self._deliver, data)

    async def _deliver(self, data: bytes) -> None:
        await trio.sleep(DELAY_S)
        if self.far is not None and not self.far.ended.is_set():
            self.far.receive([data], self.address)
            self.far.transmit()

    def can_send(self) -> bool:
        self.asked += 1
        return not self.is_full or self.asked > 10_000  # which lets a loop that spins come to its end

    def add_id(self, connection: QuicConnection, connection_id: bytes) -> None: ...

    def drop_id(self, connection_id: bytes) -> None: ...

    def forget(self, connection: QuicConnection, last_words: bytes | None) -> None: ...


@dataclass(kw_only=True)
class Pair:
    near: QuicConnection
    far: QuicConnection
    up: Wire
    down: Wire
    nursery: trio.Nursery

    def cut(self) -> None:
        """Nothing arrives any more."""
        self.up.passes = self.down.passes = lambda _: False

    async def streams(self) -> tuple[Stream, Stream]:
        """A stream, and its other end, once the first byte has told of it."""
        ours = self.near.open_stream()
        await ours.send_all(b"!")
        theirs = await arrivals[self.far].receive()
        assert await theirs.receive_some(1) == b"!"
        return ours, theirs


arrivals: dict[QuicConnection, trio.MemoryReceiveChannel[Stream]] = {}


@asynccontextmanager
async def pair(passes: Callable[[bytes], bool] = lambda _: True) -> AsyncIterator[Pair]:
    async with trio.open_nursery() as nursery:
        up = Wire(nursery, ADDRESSES[True], passes)
        down = Wire(nursery, ADDRESSES[False], passes)
        client = QuicCore(configure(CREDENTIALS[True], client=True))
        server = QuicCore(
            configure(CREDENTIALS[False], client=False),
            original_destination_connection_id=client.original_destination_connection_id,
        )
        near, far = QuicConnection(client, up), QuicConnection(server, down)
        up.far, down.far = far, near
        near.connect(ADDRESSES[False])
        await trio.sleep(DELAY_S)
        for connection in (near, far):
            nursery.start_soon(connection.keep_time)
        await near.established.wait()
        await far.established.wait()
        assert (near.peer_id, far.peer_id) == (SERVER.peer_id, CLIENT.peer_id)
        for connection in (near, far):
            send, arrivals[connection] = trio.open_memory_channel[Stream](1000)

            async def take(stream: Stream, send: trio.MemorySendChannel[Stream] = send) -> None:
                send.send_nowait(stream)
                await trio.sleep_forever()

            await nursery.start(connection.run, take)
        try:
            yield Pair(near=near, far=far, up=up, down=down, nursery=nursery)
        finally:
            with trio.CancelScope(shield=True):  # as an endpoint does
                for connection in (near, far):
                    connection.close()
                    await connection.ended.wait()
                    del arrivals[connection]
            nursery.cancel_scope.cancel()


# Time


async def test_a_peer_that_stops_answering_is_found_in_ten_seconds(autojump_clock: trio.abc.Clock) -> None:
    async with pair() as joined:
        ours, _ = await joined.streams()
        joined.cut()
        start = trio.current_time()
        with pytest.raises(ConnectionLost, match="stopped answering"):
            await ours.receive_some()
        assert trio.current_time() - start <= DEAD_AFTER_S + 0.1 < 10


async def test_it_is_found_also_while_we_send(autojump_clock: trio.abc.Clock) -> None:
    async with pair() as joined:
        ours, _ = await joined.streams()
        await trio.sleep(3)
        joined.cut()
        start = trio.current_time()
        with pytest.raises(ConnectionLost):
            while True:
                await ours.send_all(bytes(100_000))
        assert trio.current_time() - start < 10


@pytest.mark.parametrize("checks", [1, 4])
async def test_a_check_finds_out_a_silent_peer_within_a_second(checks: int, autojump_clock: trio.abc.Clock) -> None:
    async with pair() as joined:
        ours, _ = await joined.streams()
        await trio.sleep(3)
        joined.cut()
        start = trio.current_time()
        for _ in range(checks):
            joined.near.check()
            await trio.sleep(0.2)
        with pytest.raises(ConnectionLost, match="stopped answering"):
            await ours.receive_some()
        assert trio.current_time() - start == pytest.approx(CHECK_S, abs=0.01)
        joined.near.check()  # which a dead connection takes calmly


async def test_who_answers_a_check_stays_also_under_bulk(autojump_clock: trio.abc.Clock) -> None:
    chance = random.Random(7)
    async with pair(lambda _: chance.random() > 0.05) as joined:
        ours, theirs = await joined.streams()
        joined.nursery.start_soon(ours.send_all, bytes(1_000_000))
        joined.nursery.start_soon(receive_count, theirs, 1_000_000)
        for _ in range(100):
            joined.near.check()
            joined.far.check()
            await trio.sleep(0.3)
        assert not joined.near.is_closed and not joined.far.is_closed


async def test_silence_is_no_death(autojump_clock: trio.abc.Clock) -> None:
    async with pair() as joined:
        ours, theirs = await joined.streams()
        await trio.sleep(600)
        await ours.send_all(b"still here")
        assert await receive_count(theirs, 10) == b"still here"


async def test_closing_waits_a_second_at_most(autojump_clock: trio.abc.Clock) -> None:
    async with pair() as joined:
        ours, _ = await joined.streams()
        await ours.send_all(bytes(100_000))
        joined.cut()
        start = trio.current_time()
        joined.near.close()
        await joined.near.ended.wait()
        assert trio.current_time() - start == pytest.approx(GOODBYE_S, abs=0.01)
        with pytest.raises(ConnectionLost):
            await ours.receive_some()


async def test_last_words_arrive_before_the_close(autojump_clock: trio.abc.Clock) -> None:
    async with pair() as joined:
        ours, theirs = await joined.streams()
        data = random.Random(1).randbytes(300_000)
        await ours.send_all(data)
        await ours.aclose()
        joined.near.close()
        assert await receive_all(theirs) == data
        await joined.far.ended.wait()
        with pytest.raises(ConnectionLost, match="closed by the other side"):
            joined.far.open_stream()
        with pytest.raises(ConnectionLost, match="was closed"):
            joined.near.open_stream()


# Credit


async def test_a_reader_that_stops_holds_one_window(autojump_clock: trio.abc.Clock) -> None:
    async with pair() as joined:
        ours, theirs = await joined.streams()
        sent = 0

        async def send() -> None:
            nonlocal sent
            with suppress(ConnectionLost):  # at the test's end
                while True:
                    await ours.send_all(bytes(10_000))
                    sent += 10_000

        joined.nursery.start_soon(send)
        await trio.sleep(60)
        assert joined.far.core.unread_bytes <= INITIAL_WINDOW_BYTES
        assert sent <= INITIAL_WINDOW_BYTES + STREAM_SEND_BUFFER_BYTES + 20_000
        beside, beside_far = await joined.streams()  # and holds up nobody else
        await beside.send_all(bytes(500_000))
        assert len(await receive_count(beside_far, 500_000)) == 500_000
        before = sent
        await receive_count(theirs, 600_000)  # reading gives credit
        await trio.sleep(5)
        assert sent > before


async def test_what_nobody_reads_gives_its_credit_back(autojump_clock: trio.abc.Clock) -> None:
    async with pair() as joined:
        for _ in range(20):
            ours, theirs = await joined.streams()
            await ours.send_all(bytes(200_000))
            await trio.sleep(1)
            await theirs.aclose()
            await ours.send_all(bytes(2_000_000))  # dropped, but nobody waits for it
            await ours.aclose()
        await trio.sleep(5)
        assert joined.far.core.unread_bytes == 0
        assert joined.near.open_streams == 0


async def test_windows_grow_with_a_quick_reader(autojump_clock: trio.abc.Clock) -> None:
    async with pair() as joined:
        ours, theirs = await joined.streams()
        assert isinstance(theirs, QuicStream)
        joined.nursery.start_soon(ours.send_all, bytes(40_000_000))
        await receive_count(theirs, 40_000_000)
        assert theirs._window_bytes >= 4 * INITIAL_WINDOW_BYTES


async def test_windows_stay_with_a_slow_reader(autojump_clock: trio.abc.Clock) -> None:
    async with pair() as joined:
        ours, theirs = await joined.streams()
        assert isinstance(theirs, QuicStream)
        joined.nursery.start_soon(ours.send_all, bytes(10_000_000))
        for _ in range(20):
            await receive_count(theirs, 500_000)
            await trio.sleep(1)
        assert theirs._window_bytes == INITIAL_WINDOW_BYTES


# Ends of streams


async def test_half_a_stream_can_end(autojump_clock: trio.abc.Clock) -> None:
    async with pair() as joined:
        ours, theirs = await joined.streams()
        await ours.send_eof()
        await ours.send_eof()
        assert await receive_all(theirs) == b""
        await theirs.send_all(b"answer")
        await theirs.send_eof()
        assert await receive_all(ours) == b"answer"
        with pytest.raises(trio.ClosedResourceError):
            await ours.send_all(b"more")
        await trio.sleep(1)
        assert joined.near.open_streams == joined.far.open_streams == 0


async def test_a_reset_breaks_both_directions(autojump_clock: trio.abc.Clock) -> None:
    async with pair() as joined:
        ours, theirs = await joined.streams()
        await ours.send_all(b"before")
        await trio.sleep(1)
        ours.reset()
        ours.reset()
        await trio.sleep(1)
        assert await theirs.receive_some() == b"before"
        for broken in (theirs.receive_some, lambda: theirs.send_all(b"x")):
            with pytest.raises(StreamReset):
                await broken()
        with pytest.raises(trio.ClosedResourceError):
            await ours.receive_some()
        await theirs.aclose()
        assert joined.near.open_streams == joined.far.open_streams == 0
        assert not joined.near.core._streams and not joined.far.core._streams


async def test_a_peer_that_reads_no_more_can_still_answer(autojump_clock: trio.abc.Clock) -> None:
    """go's Close is both: it ends sending and asks for nothing more."""
    async with pair() as joined:
        ours, theirs = await joined.streams()
        await theirs.send_all(b"the answer")
        joined.far.core.stop(0)
        await theirs.send_eof()
        await trio.sleep(1)
        assert await receive_all(ours) == b"the answer"
        with pytest.raises(StreamReset, match="reads no more"):
            await ours.send_all(b"x")
        await ours.aclose()


async def test_a_closed_stream_is_refused_after_a_minute(autojump_clock: trio.abc.Clock) -> None:
    async with pair() as joined:
        ours, theirs = await joined.streams()
        await theirs.aclose()
        await ours.send_all(b"unwanted")
        await trio.sleep(LINGER_S + 10)
        with pytest.raises(StreamReset):
            await ours.send_all(b"unwanted")


async def test_cancelling_loses_nothing(autojump_clock: trio.abc.Clock) -> None:
    async with pair() as joined:
        ours, theirs = await joined.streams()
        with trio.move_on_after(1):
            await theirs.receive_some()
        with trio.move_on_after(5) as scope:
            await ours.send_all(bytes(10_000_000))
        assert scope.cancelled_caught
        ours.reset()
        again, again_far = await joined.streams()
        await again.send_all(b"goes on")
        assert await receive_count(again_far, 7) == b"goes on"


# Limits


async def test_streams_are_counted(autojump_clock: trio.abc.Clock) -> None:
    async with pair() as joined:
        opened = [joined.near.open_stream() for _ in range(MAX_OUTBOUND_STREAMS)]
        with pytest.raises(LimitExceeded):
            joined.near.open_stream()
        for stream in opened:
            await stream.send_all(b"x")
        await trio.sleep(1)
        assert joined.far.open_streams == MAX_INBOUND_STREAMS
        opened[0].reset()
        await trio.sleep(1)
        late = joined.near.open_stream()  # its handler is still at work with the one that was reset
        await late.send_all(b"x")
        with pytest.raises(StreamReset):
            await late.receive_some()


# The network


async def test_losses_are_made_good(autojump_clock: trio.abc.Clock) -> None:
    chance = random.Random(7)
    async with pair(lambda _: chance.random() > 0.05) as joined:
        ours, theirs = await joined.streams()
        data = chance.randbytes(2_000_000)
        joined.nursery.start_soon(ours.send_all, data)
        assert await receive_count(theirs, len(data)) == data


@pytest.mark.parametrize(("largest", "found"), [(1300, 1200), (1480, 1452), (9000, 8952), (65_000, core.LADDER[-1])])
async def test_datagrams_grow_to_what_the_path_carries(
    autojump_clock: trio.abc.Clock, largest: int, found: int
) -> None:
    async with pair(lambda data: len(data) <= largest) as joined:
        ours, theirs = await joined.streams()
        for _ in range(30):
            await ours.send_all(bytes(50_000))
            await receive_count(theirs, 50_000)
            await trio.sleep(0.3)
        assert joined.near.core.datagram_bytes == joined.far.core.datagram_bytes == found
        assert joined.near.core._loss._cc.congestion_window >= 12_000  # what was tried in vain is no congestion


async def test_a_path_that_swallows_large_datagrams_gets_small_ones(autojump_clock: trio.abc.Clock) -> None:
    async with pair() as joined:
        ours, theirs = await joined.streams()
        await ours.send_all(bytes(500_000))
        await receive_count(theirs, 500_000)
        await trio.sleep(1)
        assert joined.near.core.datagram_bytes == core.LADDER[-1]
        joined.up.passes = joined.down.passes = lambda data: len(data) <= 1300
        data = random.Random(3).randbytes(300_000)
        joined.nursery.start_soon(ours.send_all, data)
        assert await receive_count(theirs, len(data)) == data
        assert joined.near.core.datagram_bytes == core.BASE_DATAGRAM_BYTES


@given(st.binary(max_size=60))
def test_headers_of_any_bytes_can_be_looked_at(data: bytes) -> None:
    name = _connection_id(data)
    assert name is None or name in data


@settings(max_examples=25, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=1500), min_size=1, max_size=20), st.booleans(), st.randoms())
def test_garbage_that_names_a_connection_is_ignored(junk: list[bytes], short: bool, chance: random.Random) -> None:
    async def main() -> None:
        async with pair() as joined:
            ours, theirs = await joined.streams()
            name = joined.far.core.host_cid
            for data in junk:
                header = bytes([0x40 | chance.randrange(64)]) + name
                if not short:
                    header = bytes([0xC0 | chance.randrange(64)]) + b"\0\0\0\1" + bytes([len(name)]) + name
                joined.far.receive([header + data], ADDRESSES[True])
                joined.far.transmit()
            await ours.send_all(b"unharmed")
            assert await receive_count(theirs, 8) == b"unharmed"

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


async def test_gaps_count_as_unread(autojump_clock: trio.abc.Clock) -> None:
    """A byte at the end of a window costs its sender nothing, and us the window: what waits for the bytes before it
    gets no credit of the connection's back, however many streams there are."""
    async with pair() as joined:
        held = 0
        for _ in range(2 * core.CONNECTION_WINDOW_BYTES // INITIAL_WINDOW_BYTES):
            if joined.near.is_closed:
                break
            ours = joined.near.open_stream()
            assert isinstance(ours, QuicStream)
            sender = joined.near.core._streams[ours.stream_id].sender
            sender._buffer_start = sender._buffer_stop = sender.highest_offset = INITIAL_WINDOW_BYTES - 1
            with suppress(ConnectionLost):
                await ours.send_all(b"x")
            await trio.sleep(4 * DELAY_S)
            held = max(held, sum(len(each.receiver._buffer) for each in joined.far.core._streams.values()))
        assert held <= core.CONNECTION_WINDOW_BYTES
        assert joined.far.is_closed  # it broke the rules


# Beside a stream that talks


@asynccontextmanager
async def beside_talk() -> AsyncIterator[Pair]:
    """A pair that is never silent, so that nothing is left to be done while nobody says anything."""
    async with pair() as joined:
        talk, _ = await joined.streams()

        async def chatter() -> None:
            with suppress(ConnectionLost):  # at the test's end
                while True:
                    await talk.send_all(b".")
                    await trio.sleep(1)

        joined.nursery.start_soon(chatter)
        yield joined


async def test_closed_streams_are_forgotten_while_others_talk(autojump_clock: trio.abc.Clock) -> None:
    async with beside_talk() as joined:
        for _ in range(20):
            ours, theirs = await joined.streams()
            await theirs.aclose()  # answered and closed before the asker has ended
            await trio.sleep(0.1)
            await ours.aclose()
            await trio.sleep(0.5)
        assert joined.near._closed_here == joined.far._closed_here == {}
        assert len(joined.near.core._streams) == len(joined.far.core._streams) == 1


async def test_a_closed_stream_is_refused_after_a_minute_while_others_talk(autojump_clock: trio.abc.Clock) -> None:
    async with beside_talk() as joined:
        ours, theirs = await joined.streams()
        await theirs.aclose()
        await ours.send_all(b"unwanted")
        await trio.sleep(LINGER_S + 1)
        with pytest.raises(StreamReset):
            await ours.send_all(b"unwanted")


@contextmanager
def full_socket(joined: Pair) -> Iterator[None]:
    """Nothing of the near side's can leave for a while."""
    joined.up.is_full, joined.up.asked = True, 0
    try:
        yield
    finally:
        joined.up.is_full = False
        joined.near.transmit()  # as the endpoint does when there is room again
    assert joined.up.asked < 1000  # and in the meantime nobody spins


async def test_a_full_socket_is_waited_for_without_spinning(autojump_clock: trio.abc.Clock) -> None:
    async with pair() as joined:
        ours, theirs = await joined.streams()
        with full_socket(joined):
            await ours.send_all(b"late")
            await trio.sleep(3)
        assert await receive_count(theirs, 4) == b"late"


async def test_closing_with_a_full_socket_waits_a_second_at_most(autojump_clock: trio.abc.Clock) -> None:
    async with pair() as joined:
        ours, _ = await joined.streams()
        with full_socket(joined), trio.fail_after(10):
            await ours.send_all(bytes(1000))
            start = trio.current_time()
            joined.near.close()
            await joined.near.ended.wait()
        assert trio.current_time() - start == pytest.approx(GOODBYE_S, abs=0.02)


async def test_a_peers_parting_words_are_one_line(autojump_clock: trio.abc.Clock) -> None:
    async with pair() as joined:
        joined.near.core.close(error_code=1, frame_type=6, reason_phrase="bad\n\x1b[2Jworse" + 400 * "!")
        joined.near.transmit()
        await joined.far.ended.wait()
        told = str(joined.far.failure)
        assert "bad  [2Jworse!" in told
        assert told.isprintable() and len(told) < 300

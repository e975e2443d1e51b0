"""Yamux without I/O: order, windows, turns, bounds, and what a hostile peer may not do."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from net.errors import LimitExceeded, LocalProtocolError, RemoteProtocolError
from net.mux import core as yamux
from net.mux.core import INITIAL_WINDOW_BYTES, YamuxCore, YamuxSettings
from net.mux.frames import HEADER_BYTES, Flags, GoAway, Header, Type
from tests.net_helpers import CorePair

PATTERN = bytes(range(251)) * 4200  # a prime period: what is lost, doubled or moved shows


def pattern(stream_id: int, offset: int, count: int) -> bytes:
    start = (offset + 13 * stream_id) % 251
    return PATTERN[start : start + count]


def frames(data: bytes) -> list[tuple[Header, bytes]]:
    found = []
    position = 0
    while position < len(data):
        header = Header.decode(data, position)
        position += HEADER_BYTES
        length = header.length if header.type is Type.DATA else 0
        found.append((header, data[position : position + length]))
        position += length
    return found


def opened(pair: CorePair) -> int:
    """A stream from client to server that both know and the server has accepted."""
    stream_id = pair.cores["client"].open_stream(pair.now)
    pair.pump("client")
    assert pair.deliver("client") == [yamux.StreamOpened(stream_id)]
    pair.cores["server"].accept(stream_id)
    pair.settle()
    return stream_id


def server() -> YamuxCore:
    return YamuxCore(client=False, now=0.0)


def sent(core: YamuxCore) -> list[tuple[Header, bytes]]:
    return frames(b"".join(core.data_to_send(1 << 30)))


# Frames


@given(
    st.sampled_from(Type),
    st.integers(0, 15),
    st.integers(1, 2**32 - 1),
    st.integers(0, 2**32 - 1),
)
def test_headers_round_trip(kind: Type, flags: int, stream_id: int, length: int) -> None:
    header = Header(kind, flags, stream_id if kind < Type.PING else 0, length)
    encoded = header.encode()
    assert len(encoded) == HEADER_BYTES
    assert Header.decode(b"xyz" + encoded, 3) == header


@pytest.mark.parametrize(
    "raw",
    [
        struct.pack(">BBHII", 1, 0, 0, 1, 0),  # version
        struct.pack(">BBHII", 0, 4, 0, 1, 0),  # type
        struct.pack(">BBHII", 0, 0, 16, 1, 0),  # flags
        struct.pack(">BBHII", 0, 0, 0, 0, 0),  # data for no stream
        struct.pack(">BBHII", 0, 2, 1, 1, 0),  # a ping for a stream
        struct.pack(">BBHII", 0, 3, 0, 7, 0),  # going away on a stream
    ],
)
def test_malformed_headers_are_the_peers_fault(raw: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        server().receive_data(raw, 0.0)


@given(st.binary(max_size=200))
def test_garbage_raises_nothing_but_remote_protocol_error(data: bytes) -> None:
    core = server()
    try:
        core.receive_data(data, 0.0)
    except RemoteProtocolError:
        return
    assert len(core._incoming) < 200 + HEADER_BYTES


# Streams


def test_data_arrives_split_anywhere_and_in_order() -> None:
    pair = CorePair()
    stream_id = opened(pair)
    pair.cores["client"].send(stream_id, b"raceme" * 100)
    pair.cores["client"].end(stream_id)
    pair.pump("client")
    events: list[yamux.Event] = []
    while pair.wires["client"]:
        events += pair.deliver("client", 1)
    assert b"".join(e.data for e in events if isinstance(e, yamux.DataReceived)) == b"raceme" * 100
    assert events[-1] == yamux.StreamEnded(stream_id)


def test_both_ends_ended_forgets_the_stream() -> None:
    pair = CorePair()
    stream_id = opened(pair)
    for side in ("client", "server"):
        assert pair.cores[side].is_open(stream_id)
        pair.cores[side].end(stream_id)
        pair.settle()
    assert [core._streams for core in pair.cores.values()] == [{}, {}]
    assert [core._counts for core in pair.cores.values()] == [{True: 0, False: 0}] * 2


def test_reset_ends_both_directions_and_drops_what_waits() -> None:
    pair = CorePair()
    stream_id = opened(pair)
    pair.cores["client"].send(stream_id, b"x" * 1000)
    pair.cores["client"].reset(stream_id)
    pair.settle()
    assert pair.events["server"][-1] == yamux.StreamReset(stream_id)
    assert not any(isinstance(event, yamux.DataReceived) for event in pair.events["server"])
    assert not pair.cores["server"].is_open(stream_id)


def test_sending_after_the_end_is_our_bug() -> None:
    pair = CorePair()
    stream_id = opened(pair)
    pair.cores["client"].end(stream_id)
    with pytest.raises(LocalProtocolError):
        pair.cores["client"].send(stream_id, b"late")


def test_data_on_its_way_to_a_stream_that_we_reset_is_dropped() -> None:
    pair = CorePair()
    stream_id = opened(pair)
    pair.cores["client"].send(stream_id, b"x" * 1000)
    pair.pump("client")
    pair.cores["server"].reset(stream_id)
    assert pair.deliver("client") == []


@pytest.mark.parametrize("kind", [Type.DATA, Type.WINDOW_UPDATE])
def test_a_stream_may_be_opened_by_either_frame(kind: Type) -> None:
    core = server()
    assert core.receive_data(Header(kind, Flags.SYN, 1, 0).encode(), 0.0) == [yamux.StreamOpened(1)]


def test_stream_numbers_of_ours_are_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="a number of ours"):
        server().receive_data(Header(Type.DATA, Flags.SYN, 2, 0).encode(), 0.0)


def test_opening_a_stream_twice_is_refused() -> None:
    syn = Header(Type.DATA, Flags.SYN, 1, 0).encode()
    with pytest.raises(RemoteProtocolError, match="twice"):
        server().receive_data(syn + syn, 0.0)


def test_data_after_the_end_is_refused() -> None:
    core = server()
    core.receive_data(Header(Type.DATA, Flags.SYN | Flags.FIN, 1, 0).encode(), 0.0)
    with pytest.raises(RemoteProtocolError, match="after the end"):
        core.receive_data(Header(Type.DATA, Flags.NONE, 1, 1).encode() + b"x", 0.0)


def test_the_stream_beyond_the_limit_is_reset_and_the_connection_goes_on() -> None:
    core = server()
    for number in range(256):
        assert core.receive_data(Header(Type.DATA, Flags.SYN, 2 * number + 1, 0).encode(), 0.0)
    assert core.receive_data(Header(Type.DATA, Flags.SYN, 513, 0).encode(), 0.0) == []
    assert sent(core) == [(Header(Type.WINDOW_UPDATE, Flags.RST, 513, 0), b"")]
    core.receive_data(Header(Type.DATA, Flags.RST, 1, 0).encode(), 0.0)
    assert core.receive_data(Header(Type.DATA, Flags.SYN, 515, 0).encode(), 0.0) == [yamux.StreamOpened(515)]


def test_our_own_limit_fails_fast() -> None:
    core = YamuxCore(client=True, now=0.0, settings=YamuxSettings(max_outbound_streams=2))
    assert [core.open_stream(0.0), core.open_stream(0.0)] == [1, 3]
    with pytest.raises(LimitExceeded, match="2 streams"):
        core.open_stream(0.0)
    core.reset(1)
    assert core.open_stream(0.0) == 5


def test_going_away_refuses_new_streams_on_both_sides() -> None:
    pair = CorePair()
    pair.cores["server"].go_away()
    pair.settle()
    assert pair.events["client"] == [yamux.PeerGoesAway(GoAway.NORMAL)]
    assert not pair.cores["client"].takes_streams
    with pytest.raises(LimitExceeded):
        pair.cores["client"].open_stream(0.0)
    assert pair.cores["server"].receive_data(Header(Type.DATA, Flags.SYN, 1, 0).encode(), 0.0) == []
    assert [header.flags for header, _ in sent(pair.cores["server"])] == [Flags.RST]


# Windows


def test_a_sender_stops_at_the_window_until_its_reader_reads() -> None:
    pair = CorePair()
    stream_id = opened(pair)
    total = INITIAL_WINDOW_BYTES + 100_000
    pair.cores["client"].send(stream_id, b"x" * total)
    pair.settle()
    got = sum(len(e.data) for e in pair.events["server"] if isinstance(e, yamux.DataReceived))
    # All of it: a peer that loses count of what it gave (go-yamux 4.0.1, when it grows a window) waits for the rest.
    assert got == INITIAL_WINDOW_BYTES
    assert pair.cores["client"].unsent(stream_id) == total - got
    pair.cores["server"].consumed(stream_id, got, pair.now)
    pair.settle()
    assert pair.cores["client"].unsent(stream_id) == 0
    assert pair.events["client"] == [yamux.WindowOpened(stream_id)]


@pytest.mark.parametrize("pieces", [[INITIAL_WINDOW_BYTES + 1], [INITIAL_WINDOW_BYTES, 1]])
def test_more_than_the_window_is_refused(pieces: list[int]) -> None:
    core = server()
    core.receive_data(Header(Type.DATA, Flags.SYN, 1, 0).encode(), 0.0)
    with pytest.raises(RemoteProtocolError, match="room for"):
        for size in pieces:
            core.receive_data(Header(Type.DATA, Flags.NONE, 1, size).encode() + bytes(size), 0.0)


def test_a_flood_is_refused_at_its_header_not_after_its_body() -> None:
    core = server()
    with pytest.raises(RemoteProtocolError):
        core.receive_data(Header(Type.DATA, Flags.SYN, 1, 2**32 - 1).encode(), 0.0)
    with pytest.raises(RemoteProtocolError):
        server().receive_data(Header(Type.DATA, Flags.NONE, 99, 2**31).encode(), 0.0)  # a stream that never was


def test_a_window_beyond_four_gib_is_refused() -> None:
    core = server()
    core.receive_data(Header(Type.DATA, Flags.SYN, 1, 0).encode(), 0.0)
    with pytest.raises(RemoteProtocolError, match="4 GiB"):
        core.receive_data(Header(Type.WINDOW_UPDATE, Flags.NONE, 1, 2**32 - 1).encode(), 0.0)


def measure_round_trip(pair: CorePair, seconds: float) -> None:
    """Let the server's keepalive ping be answered after ``seconds``."""
    pair.now += pair.cores["server"].settings.keepalive_s
    pair.cores["client"]._heard_at = pair.now
    assert pair.cores["server"].tick(pair.now)
    pair.pump("server")
    pair.deliver("server")
    pair.pump("client")
    pair.now += seconds
    (answered,) = pair.deliver("client")
    assert isinstance(answered, yamux.PingAnswered)
    assert answered.round_trip_s == pytest.approx(seconds)


@pytest.mark.parametrize("limit", [1024 * 1024, 700_000])
def test_the_window_of_a_quick_reader_grows_up_to_its_limit(limit: int) -> None:
    pair = CorePair(YamuxSettings(max_window_bytes=limit))
    measure_round_trip(pair, 0.1)
    stream_id = opened(pair)
    sizes = []
    for _ in range(8):
        pair.cores["client"].send(stream_id, bytes(2 * limit))
        pair.settle()
        stream = pair.cores["server"]._streams[stream_id]
        pair.cores["server"].consumed(stream_id, stream.window_size - stream.receive_window, pair.now)
        pair.settle()
        sizes.append(pair.cores["server"]._streams[stream_id].window_size)
    assert sizes[0] == 2 * INITIAL_WINDOW_BYTES
    assert sizes[-1] == max(sizes) == limit


def grown(pair: CorePair, size: int) -> int:
    """A stream whose server has a window of ``size`` by now; the last moment is ``pair.now``."""
    stream_id = opened(pair)
    listener = pair.cores["server"]
    while listener._streams[stream_id].window_size < size:
        consume(pair, stream_id, after=0.0)
    return stream_id


def consume(pair: CorePair, stream_id: int, *, after: float) -> int:
    """Fill the server's window, take all of it ``after`` seconds; what the window is then."""
    listener = pair.cores["server"]
    size = listener._streams[stream_id].window_size
    pair.cores["client"].send(stream_id, bytes(max(0, 2 * size - pair.cores["client"].unsent(stream_id))))
    pair.settle()
    pair.now += after
    stream = listener._streams[stream_id]
    listener.consumed(stream_id, stream.window_size - stream.consumed - stream.receive_window, pair.now)
    pair.settle()
    return listener._streams[stream_id].window_size


def test_a_window_that_holds_a_queue_shrinks_while_somebody_talks() -> None:
    pair = CorePair()
    measure_round_trip(pair, 0.1)
    stream_id, short = grown(pair, 8 * INITIAL_WINDOW_BYTES), opened(pair)
    assert consume(pair, stream_id, after=0.3) == 8 * INITIAL_WINDOW_BYTES  # nobody waits behind it
    sizes = []
    for _ in range(8):
        pair.cores["client"].send(short, b"hello")
        sizes.append(consume(pair, stream_id, after=0.3))
    assert sizes[-1] == INITIAL_WINDOW_BYTES
    assert sizes == sorted(sizes, reverse=True)


def test_a_window_that_a_path_needs_stays_while_somebody_talks() -> None:
    pair = CorePair()
    measure_round_trip(pair, 0.1)
    stream_id, short = grown(pair, 8 * INITIAL_WINDOW_BYTES), opened(pair)
    for _ in range(8):
        pair.cores["client"].send(short, b"hello")
        assert consume(pair, stream_id, after=0.15) == 8 * INITIAL_WINDOW_BYTES


def test_on_the_shortest_paths_two_milliseconds_make_a_window_grow() -> None:
    pair = CorePair()
    measure_round_trip(pair, 0.00001)
    stream_id = opened(pair)
    assert consume(pair, stream_id, after=0.0019) == 2 * INITIAL_WINDOW_BYTES
    assert consume(pair, stream_id, after=0.0021) == 2 * INITIAL_WINDOW_BYTES


def test_the_window_of_a_slow_reader_stays() -> None:
    pair = CorePair()
    stream_id = opened(pair)
    measure_round_trip(pair, 0.1)
    for _ in range(4):
        pair.cores["client"].send(stream_id, bytes(INITIAL_WINDOW_BYTES))
        pair.settle()
        pair.now += 1.0
        pair.cores["server"].consumed(stream_id, INITIAL_WINDOW_BYTES, pair.now)
        pair.settle()
    assert pair.cores["server"]._streams[stream_id].window_size == INITIAL_WINDOW_BYTES


# Turns


def test_a_small_message_waits_for_one_frame_of_a_large_one() -> None:
    pair = CorePair()
    bulk, small = opened(pair), opened(pair)
    client = pair.cores["client"]
    client._streams[bulk].send_window = 1 << 30
    client.send(bulk, bytes(4 * 1024 * 1024))
    client.data_to_send(1)  # under way
    client.send(small, b"s" * 1024)
    order = [header.stream_id for header, _ in frames(b"".join(client.data_to_send(1 << 20)))]
    assert order.index(small) <= 1


def test_open_streams_take_turns() -> None:
    pair = CorePair()
    client = pair.cores["client"]
    ids = [opened(pair) for _ in range(3)]
    for stream_id in ids:
        client.send(stream_id, bytes(200_000))
    turns = [header for _ in range(6) for header, _ in frames(b"".join(client.data_to_send(70_000)))]
    assert [header.stream_id for header in turns] == ids + ids
    assert {header.length for header in turns} == {70_000}  # a fair share for each


def test_short_messages_go_first_and_leave_bulk_a_little() -> None:
    pair = CorePair()
    client = pair.cores["client"]
    bulk, *short = [opened(pair) for _ in range(5)]
    client.send(bulk, bytes(200_000))
    for stream_id in short:
        client.send(stream_id, bytes(20_000))
    sizes = [[(each.stream_id, each.length) for each, _ in frames(b"".join(client.data_to_send(50_000)))]]
    first, second, third, fourth = short
    assert [stream_id for stream_id, _ in sizes[0]] == [first, second, third, bulk]
    assert sizes[0][-1] == (bulk, yamux.MIN_FRAME_BYTES)
    rest = [each.stream_id for each, _ in sent(client)]
    assert rest.index(fourth) < rest.index(bulk)


def test_what_is_left_of_bulk_is_no_short_message() -> None:
    pair = CorePair()
    client = pair.cores["client"]
    bulk, other = opened(pair), opened(pair)
    client.send(bulk, bytes(150_000))
    client.send(other, bytes(150_000))
    client.data_to_send(140_000)
    assert client.unsent(bulk) < yamux.SHORT_BYTES
    assert not client.is_talking
    assert [each.stream_id for each, _ in sent(client)] == [other, bulk]


def test_bulk_is_not_sent_in_crumbs() -> None:
    pair = CorePair()
    stream_id = opened(pair)
    pair.cores["client"].send(stream_id, bytes(1_000_000))
    (only,) = [header.length for header, _ in sent(pair.cores["client"])]
    assert only == INITIAL_WINDOW_BYTES > YamuxSettings().max_frame_bytes


def test_the_end_of_a_message_fits_into_what_is_left_of_a_window() -> None:
    pair = CorePair()
    client = pair.cores["client"]
    stream_id = opened(pair)
    client.send(stream_id, bytes(INITIAL_WINDOW_BYTES))
    client.end(stream_id)
    pair.settle()
    assert client.unsent(stream_id) == 0
    assert pair.events["server"][-1] == yamux.StreamEnded(stream_id)


def test_talk_is_what_is_short_and_passes_with_bulk() -> None:
    pair = CorePair()
    client, listener = pair.cores["client"], pair.cores["server"]
    bulk, short = opened(pair), opened(pair)
    client.send(short, bytes(1000))
    pair.settle()
    assert client.is_talking and listener.is_talking
    for _ in range(yamux.TALK_TURNS):
        client.send(bulk, bytes(yamux.SHORT_BYTES + 1))
        pair.settle()
        listener.consumed(bulk, yamux.SHORT_BYTES + 1, pair.now)
        pair.settle()
    assert not client.is_talking and not listener.is_talking


def test_control_frames_go_before_data() -> None:
    pair = CorePair()
    stream_id = opened(pair)
    pair.cores["client"].send(stream_id, bytes(200_000))
    pair.cores["client"].receive_data(Header(Type.PING, Flags.SYN, 0, 7).encode(), 0.0)
    assert sent(pair.cores["client"])[0] == (Header(Type.PING, Flags.ACK, 0, 7), b"")


def test_a_large_frame_and_its_header_fill_four_records() -> None:
    pair = CorePair()
    stream_id = opened(pair)
    pair.cores["client"]._streams[stream_id].send_window = 1 << 30
    pair.cores["client"].send(stream_id, bytes(600_000))
    assert [HEADER_BYTES + len(body) for _, body in sent(pair.cores["client"])[:2]] == [4 * 65_519] * 2


# Pings, keepalive, bounds


def test_pings_are_answered() -> None:
    core = server()
    assert core.receive_data(Header(Type.PING, Flags.SYN, 0, 1234).encode(), 0.0) == []
    assert sent(core) == [(Header(Type.PING, Flags.ACK, 0, 1234), b"")]


def test_an_answer_to_no_ping_is_ignored() -> None:
    core = server()
    assert core.receive_data(Header(Type.PING, Flags.ACK, 0, 1).encode(), 0.0) == []
    assert core.round_trip_s is None


def test_tick_pings_and_tells_the_dead() -> None:
    core = server()
    assert core.deadline() == 0.0  # the round trip is wanted at once: windows grow by it
    assert core.tick(0.0)
    assert [header.type for header, _ in sent(core)] == [Type.PING]
    core.receive_data(Header(Type.PING, Flags.ACK, 0, 1).encode(), 0.25)
    assert core.round_trip_s == 0.25
    assert core.tick(3.9)
    assert not core.has_data_to_send
    assert core.tick(4.0)
    assert [header.type for header, _ in sent(core)] == [Type.PING]
    core.receive_data(Header(Type.PING, Flags.ACK, 0, 2).encode(), 4.5)
    assert core.round_trip_s == pytest.approx(0.3)  # smoothed
    assert core.tick(13.4)
    assert not core.tick(13.5)


def test_any_byte_is_a_sign_of_life() -> None:
    core = server()
    core.receive_data(b"\0", 8.0)
    assert core.tick(16.9)
    assert not core.tick(17.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda number: Header(Type.PING, Flags.SYN, 0, number).encode(),
        lambda number: (
            Header(Type.DATA, Flags.SYN, 2 * number + 1, 0).encode()
            + Header(Type.DATA, Flags.RST, 2 * number + 1, 0).encode()
        ),
    ],
    ids=["pings", "streams"],
)
def test_a_peer_that_asks_and_does_not_read_is_cut_off(make: object) -> None:
    assert callable(make)
    core = YamuxCore(client=False, now=0.0, settings=YamuxSettings(max_control_frames=100))
    with pytest.raises(RemoteProtocolError, match="does not read"):
        for number in range(101):
            for event in core.receive_data(make(number)[:HEADER_BYTES], 0.0):
                assert isinstance(event, yamux.StreamOpened)
                core.accept(event.stream_id)
            core.receive_data(make(number)[HEADER_BYTES:], 0.0)
    assert len(core._control) <= 100


def test_what_we_do_ourselves_is_never_blamed_on_a_peer_that_does_not_read() -> None:
    core = YamuxCore(client=True, now=0.0, settings=YamuxSettings(max_control_frames=3))
    ids = [core.open_stream(0.0) for _ in range(3)]
    with pytest.raises(LimitExceeded, match="does not read"):
        core.open_stream(0.0)
    for stream_id in ids:
        core.reset(stream_id)
    assert core.tick(4.0)
    core.go_away()
    assert len(sent(core)) == 8


# Checks


def checked(round_trip_s: float = 0.1) -> YamuxCore:
    """A core that has measured the round trip, at 1 s."""
    core = server()
    assert core.tick(0.0)
    sent(core)
    core.receive_data(Header(Type.PING, Flags.ACK, 0, 1).encode(), round_trip_s)
    assert core.tick(1.0)
    return core


@pytest.mark.parametrize(("round_trip_s", "patience_s"), [(0.1, 1.0), (0.25, 1.0), (0.5, 2.0), (0.9, 3.6)])
def test_a_check_waits_a_second_or_four_round_trips(round_trip_s: float, patience_s: float) -> None:
    core = checked(round_trip_s)
    core.check(2.0)
    assert [header.type for header, _ in sent(core)] == [Type.PING]
    assert core.deadline() == pytest.approx(2.0 + patience_s, abs=0.001)
    assert core.tick(core.deadline() - 0.001)
    assert not core.tick(core.deadline())


def test_a_check_waits_longer_where_no_round_trip_is_known() -> None:
    core = server()
    core.check(0.0)
    assert core.tick(2.999)
    assert not core.tick(3.0)


def test_any_byte_answers_a_check() -> None:
    core = checked()
    core.check(2.0)
    core.receive_data(b"\0", 2.9)
    assert core.tick(3.2)
    assert core.tick(2.9 + 8.9)  # from here on, silence counts as ever
    assert not core.tick(2.9 + 9.0)


def test_a_check_while_another_waits_changes_nothing() -> None:
    core = checked()
    core.check(2.0)
    sent(core)
    before = core.deadline()
    core.check(2.5)
    assert (core.deadline(), core.has_data_to_send) == (before, False)
    assert not core.tick(before)


def test_a_ping_that_waits_already_is_question_enough() -> None:
    core = checked()
    assert core.tick(4.0)
    sent(core)
    core.check(4.5)
    assert not core.has_data_to_send
    assert core.deadline() == pytest.approx(5.5, abs=0.001)


def test_what_was_sent_before_lengthens_a_check_until_it_is_confirmed() -> None:
    core = checked()
    for _ in range(2):
        core.send(core.open_stream(1.0), bytes(INITIAL_WINDOW_BYTES))
    bulk = sum(HEADER_BYTES + len(body) for _, body in sent(core))
    core.check(2.0)
    (ping,) = sent(core)
    assert core._answer_by == pytest.approx(2.0 + 1.0 + bulk / yamux.SLOW_BYTES_PER_S, abs=0.001)
    core.receive_data(Header(Type.PING, Flags.ACK, 0, ping[0].length).encode(), 3.9)
    core.check(3.9)  # behind nothing any more, but with another round trip
    assert core.round_trip_s is not None
    assert core._answer_by == pytest.approx(3.9 + 4 * core.round_trip_s, abs=0.001)


def test_a_program_that_slept_gives_its_peer_another_chance() -> None:
    core = checked()
    core.check(2.0)
    late = 3.0 + yamux.LATE_S
    assert core.tick(late + 0.001)
    assert core.tick(late + 0.99)
    assert not core.tick(late + 1.01)
    core = checked()
    core.check(2.0)
    assert not core.tick(late - 0.01)  # a little late is not asleep


@given(
    st.integers(yamux.SLOW_BYTES_PER_S, 10 * yamux.SLOW_BYTES_PER_S),
    st.floats(0.001, 0.8),
    st.lists(st.tuples(st.floats(0.0, 2.0), st.sampled_from(["check", "bulk", "both"]), st.integers(1, 200_000))),
)
def test_who_is_behind_a_slow_line_is_never_taken_for_dead(
    bytes_per_s: int, delay_s: float, events: list[tuple[float, str, int]]
) -> None:
    """It answers each ping when that has come through all that was sent before, and says nothing else."""
    core = YamuxCore(client=True, now=0.0, settings=YamuxSettings(dead_after_s=1e6))
    stream_id = core.open_stream(0.0)
    core._streams[stream_id].send_window = 1 << 40
    now = free_at = 0.0
    answers: list[tuple[float, bytes]] = []

    def put() -> None:
        nonlocal free_at
        for header, body in sent(core):
            free_at = max(now, free_at) + (HEADER_BYTES + len(body)) / bytes_per_s
            if header.type is Type.PING:
                answers.append((free_at + delay_s, Header(Type.PING, Flags.ACK, 0, header.length).encode()))

    for pause_s, kind, size in [*events, (60.0, "check", 1)]:
        until = now + pause_s
        while (due := min([core.deadline(), *(at for at, _ in answers)])) <= until:
            now = max(now, due)
            if answers and answers[0][0] <= now:
                core.receive_data(answers.pop(0)[1], now)
            assert core.tick(now)
            put()
        now = until
        if kind != "check":
            core.send(stream_id, bytes(size))
            put()
        if kind != "bulk":
            core.check(now)
            put()


# Everything at once


class TwoCores(RuleBasedStateMachine):
    """Any order of opening, sending, ending, resetting, reading, and bytes that come through in pieces."""

    streams: Bundle[int] = Bundle("streams")
    sides = st.sampled_from(["client", "server"])
    sizes = st.sampled_from([1, 100, 70_000, 300_000])

    @initialize()
    def start(self) -> None:
        self.pair = CorePair(YamuxSettings(max_window_bytes=512 * 1024))
        self.sent: dict[tuple[str, int], int] = {}
        self.received: dict[tuple[str, int], int] = {}
        self.unread: dict[tuple[str, int], int] = {}
        self.ended: set[tuple[str, int]] = set()
        self.seen_end: set[tuple[str, int]] = set()
        self.reset_ids: set[int] = set()

    @rule(target=streams, side=sides)
    def open(self, side: str) -> int:
        return self.pair.cores[side].open_stream(self.pair.now)

    def _can_send(self, side: str, stream_id: int) -> bool:
        return (
            self.pair.cores[side].is_open(stream_id)
            and (side, stream_id) not in self.ended
            and stream_id not in self.reset_ids
        )

    @rule(side=sides, stream_id=streams, size=sizes)
    def send(self, side: str, stream_id: int, size: int) -> None:
        if self._can_send(side, stream_id):
            offset = self.sent.get((side, stream_id), 0)
            self.pair.cores[side].send(stream_id, pattern(stream_id, offset, size))
            self.sent[side, stream_id] = offset + size

    @rule(side=sides, stream_id=streams)
    def end(self, side: str, stream_id: int) -> None:
        if self._can_send(side, stream_id):
            self.pair.cores[side].end(stream_id)
            self.ended.add((side, stream_id))

    @rule(side=sides, stream_id=streams)
    def reset(self, side: str, stream_id: int) -> None:
        if self.pair.cores[side].is_open(stream_id):
            self.pair.cores[side].reset(stream_id)
            self.reset_ids.add(stream_id)

    @rule(side=sides, stream_id=streams)
    def read(self, side: str, stream_id: int) -> None:
        self.pair.cores[side].consumed(stream_id, self.unread.pop((side, stream_id), 0), self.pair.now)

    @rule(side=sides, max_bytes=st.sampled_from([1, 10_000, 1 << 20]))
    def pump(self, side: str, max_bytes: int) -> None:
        self.pair.pump(side, max_bytes)

    @rule(side=sides, count=st.one_of(st.integers(1, 40), st.integers(1, 1 << 20)))
    def deliver(self, side: str, count: int) -> None:
        self._take(self.pair.other(side), self.pair.deliver(side, count))

    @rule(seconds=st.sampled_from([0.001, 0.1, 4.0]))
    def wait(self, seconds: float) -> None:
        self.pair.now += seconds
        for core in self.pair.cores.values():
            core._heard_at = self.pair.now  # nobody dies here
            assert core.tick(self.pair.now)

    def _take(self, side: str, events: list[yamux.Event]) -> None:
        for event in events:
            if isinstance(event, yamux.DataReceived):
                key = (side, event.stream_id)
                offset = self.received.get(key, 0)
                assert key not in self.seen_end
                assert event.data == pattern(event.stream_id, offset, len(event.data))
                self.received[key] = offset + len(event.data)
                self.unread[key] = self.unread.get(key, 0) + len(event.data)
            elif isinstance(event, yamux.StreamEnded):
                self.seen_end.add((side, event.stream_id))
            elif isinstance(event, yamux.StreamOpened):
                self.pair.cores[side].accept(event.stream_id)
            elif isinstance(event, yamux.StreamReset):
                assert event.stream_id in self.reset_ids

    @invariant()
    def books_are_right(self) -> None:
        self.pair.check()

    def teardown(self) -> None:
        if not hasattr(self, "pair"):
            return
        for side, core in self.pair.cores.items():
            for stream_id in list(core._streams):
                if self._can_send(side, stream_id):
                    self.end(side, stream_id)
        for _ in range(10_000):
            moved = 0
            for side in ("client", "server"):
                moved += self.pair.pump(side) + len(self.pair.wires[side])
                other = self.pair.other(side)
                self._take(other, self.pair.deliver(side))
                for key in [key for key in self.unread if key[0] == other]:
                    self.read(*key)
                for stream_id in list(self.pair.cores[other]._streams):
                    if self._can_send(other, stream_id):
                        self.end(other, stream_id)
            if not moved:
                break
        else:
            raise AssertionError("never settles")
        for (side, stream_id), count in self.sent.items():
            if stream_id not in self.reset_ids:
                assert self.received.get((self.pair.other(side), stream_id), 0) == count
        for core in self.pair.cores.values():
            assert core._counts == {True: 0, False: 0}
            assert not core._streams
            assert not core.has_data_to_send


TwoCores.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_two_cores = TwoCores.TestCase

"""Yamux without I/O: bytes and the time go in; events and bytes come out.

The driver feeds ``receive_data`` and acts on the events, calls the stream methods, and sends what
``data_to_send`` gives. Small things first: control frames before data, streams with little to send before
those with bulk, which take turns and always move on a little.

Flow control: each side may have at most one window of bytes on its way in a stream. Ours is enforced:
a peer that sends more than it was given has broken the protocol. How it grows and shrinks is ``_next_window``.
"""

from __future__ import annotations

import enum
import math
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from net.errors import LimitExceeded, LocalProtocolError, RemoteProtocolError
from net.mux.frames import HEADER_BYTES, Flags, GoAway, Header, Type
from net.security.base import RECORD_BYTES

INITIAL_WINDOW_BYTES = 256 * 1024  # the specification's
SHORT_BYTES = RECORD_BYTES  # a stream with no more than this to send goes before those with more
TALK_TURNS = 64  # of bulk, out or in, that count as beside the last short message
QUICK_S = 0.002  # on the shortest paths; there, round trips are too short to tell
MIN_FRAME_BYTES = 4096  # of the turn of a stream with more
LATE_S = 0.5  # a look at the clock that comes so much later than it should is not the peer's fault
DOUBT_SHARE = 0.4  # of the time that an answer to ``check`` may take at most; nearly all come sooner
SLOW_BYTES_PER_S = 128 * 1024  # of a home's line: what was sent before a question delays the answer
FORGOTTEN_FRAME_BYTES = 1024 * 1024  # one frame that was on its way when we reset its stream


@dataclass(frozen=True, kw_only=True)
class YamuxSettings:
    """Bounds of one connection."""

    max_window_bytes: int = 16 * 1024 * 1024  # go-yamux
    max_inbound_streams: int = 256  # go-libp2p
    max_outbound_streams: int = 256
    max_control_frames: int = 4096  # answers waiting to be sent; more means that the peer does not read
    max_frame_bytes: int = 4 * RECORD_BYTES - HEADER_BYTES  # fills four records with its header
    keepalive_s: float = 4.0
    dead_after_s: float = 9.0  # without a single byte
    check_s: float = 1.0  # for the answer to ``check``, or four round trips, and the time that what is on its way takes


class State(enum.Enum):
    """A stream's half-closed states, by who has ended sending."""

    OPEN = "open"
    LOCAL_ENDED = "we ended"
    REMOTE_ENDED = "they ended"


class StreamOpened(NamedTuple):
    """The peer opened a stream; answer with ``accept`` or ``reset``."""

    stream_id: int


class DataReceived(NamedTuple):
    stream_id: int
    data: bytes | memoryview


class StreamEnded(NamedTuple):
    """The peer has sent all it will."""

    stream_id: int


class StreamReset(NamedTuple):
    stream_id: int


class WindowOpened(NamedTuple):
    """There is room to send again."""

    stream_id: int


class PingAnswered(NamedTuple):
    round_trip_s: float


class PeerGoesAway(NamedTuple):
    """The peer takes no new streams."""

    reason: int


Event = StreamOpened | DataReceived | StreamEnded | StreamReset | WindowOpened | PingAnswered | PeerGoesAway


@dataclass(frozen=True, kw_only=True)
class _Ping:
    """One that waits for its answer, and how much was sent before it."""

    number: int
    at: float
    sent_bytes: int


@dataclass(kw_only=True)
class _Stream:
    state: State = State.OPEN
    send_window: int = INITIAL_WINDOW_BYTES
    receive_window: int = INITIAL_WINDOW_BYTES  # what the peer may still send
    window_size: int = INITIAL_WINDOW_BYTES
    max_window: int
    consumed: int = 0  # by our reader, not given back yet
    updated_at: float = 0.0
    outgoing: deque[memoryview] = field(default_factory=deque)
    outgoing_bytes: int = 0
    scheduled: bool = False  # waits for its turn to send
    sends_bulk: bool = False  # what is queued was more than SHORT_BYTES at some time
    gets_bulk: bool = False  # the last frame was more than that
    ending: bool = False  # a FIN waits behind the outgoing data
    inbound: bool


class YamuxCore:
    """One connection's Yamux state.

    Args:
        client: whether we dialled. The dialler's streams are odd, the listener's even.
        now: seconds, any monotonic origin.
    """

    def __init__(self, *, client: bool, now: float, settings: YamuxSettings | None = None) -> None:
        self.settings = settings or YamuxSettings()
        self.round_trip_s: float | None = None
        self._least_round_trip_s = 0.0  # without the queues that bulk makes; 0 until measured
        self._next_id = 1 if client else 2
        self._streams: dict[int, _Stream] = {}
        self._incoming = b""  # the beginning of a header
        self._body_stream = 0  # whose data is coming,
        self._body_left = 0  # how much more of it,
        self._body_ends = False  # and whether the stream ends with it
        self._control: deque[bytes] = deque()
        # Streams with something to send, in turn; those whose turn takes little go first.
        self._short: deque[int] = deque()
        self._long: deque[int] = deque()
        self._drained: list[int] = []
        self._talk = 0  # turns left
        self._counts = {True: 0, False: 0}  # open streams by inbound
        self._ping: _Ping | None = None
        self._pings = 0
        self._sent_bytes = 0
        self._confirmed_bytes = 0  # of them; what an answered ping was sent behind
        self._answer_by = math.inf  # set by ``check``
        self._asked_at = now  # the same
        self._heard_at = now
        self._pinged_at = now - self.settings.keepalive_s  # the first tick measures the round trip
        self._going_away = False
        self._peer_going_away = False

    @property
    def doubt_at(self) -> float:
        """When a peer that was asked to show that it is there has taken most of the time that most need; infinity while
        it was not, or has.
        """
        if self._answer_by == math.inf:
            return math.inf
        return self._asked_at + DOUBT_SHARE * (self._answer_by - self._asked_at)

    @property
    def takes_streams(self) -> bool:
        """False once either side is going away."""
        return not (self._going_away or self._peer_going_away)

    # What the driver does with streams

    def open_stream(self, now: float) -> int:
        """A new stream's id; its SYN waits to be sent.

        Raises:
            LimitExceeded: as many as allowed are open, or either side is going away.
        """
        if not self.takes_streams:
            raise LimitExceeded("the connection takes no new streams: it is being closed")
        if self._counts[False] >= self.settings.max_outbound_streams:
            raise LimitExceeded(f"{self._counts[False]} streams are open to this peer, the most allowed")
        if len(self._control) >= self.settings.max_control_frames:
            raise LimitExceeded(f"{len(self._control)} frames wait for this peer, which does not read")
        stream_id = self._next_id
        self._next_id += 2
        self._add(stream_id, inbound=False, now=now)
        self._queue(Header(Type.WINDOW_UPDATE, Flags.SYN, stream_id, 0))
        return stream_id

    def accept(self, stream_id: int) -> None:
        """Tell the peer that its stream is welcome.

        Raises:
            RemoteProtocolError: the peer opens streams and does not read our answers.
        """
        if stream_id in self._streams:
            self._answer(Header(Type.WINDOW_UPDATE, Flags.ACK, stream_id, 0))

    def refuse(self, stream_id: int) -> None:
        """Tell the peer that there is no room for its stream.

        Raises: as ``accept``.
        """
        if stream_id in self._streams:
            self._remove(stream_id)
            self._answer(Header(Type.WINDOW_UPDATE, Flags.RST, stream_id, 0))

    def send(self, stream_id: int, data: bytes | bytearray | memoryview) -> None:
        """Queue ``data``, which must not change until it is sent. The driver bounds what waits (``unsent``)."""
        stream = self._streams.get(stream_id)
        if stream is None or stream.ending or stream.state is State.LOCAL_ENDED:
            raise LocalProtocolError(f"data after the end of stream {stream_id}")
        view = memoryview(data).cast("B")
        if view:
            stream.sends_bulk &= stream.outgoing_bytes > 0
            stream.outgoing.append(view)
            stream.outgoing_bytes += len(view)
            stream.sends_bulk |= stream.outgoing_bytes > SHORT_BYTES
            self._schedule(stream_id, stream)

    def unsent(self, stream_id: int) -> int:
        """Bytes queued for a stream and not sent yet."""
        stream = self._streams.get(stream_id)
        return stream.outgoing_bytes if stream is not None else 0

    def is_open(self, stream_id: int) -> bool:
        """Whether either side can still send."""
        return stream_id in self._streams

    def has_ended(self, stream_id: int) -> bool:
        """Whether our end of an open stream has been given to ``data_to_send``."""
        stream = self._streams.get(stream_id)
        return stream is not None and stream.state is State.LOCAL_ENDED

    def end(self, stream_id: int) -> None:
        """Half-close: no more data from us, after what is queued."""
        stream = self._streams.get(stream_id)
        if stream is not None and not stream.ending and stream.state is not State.LOCAL_ENDED:
            stream.ending = True
            self._schedule(stream_id, stream)

    def reset(self, stream_id: int) -> None:
        """End both directions at once and forget what was queued."""
        if stream_id in self._streams:
            self._remove(stream_id)
            self._queue(Header(Type.WINDOW_UPDATE, Flags.RST, stream_id, 0))

    def consumed(self, stream_id: int, count: int, now: float) -> None:
        """Our reader took ``count`` bytes: give the peer room for as many when half a window is due."""
        stream = self._streams.get(stream_id)
        if stream is None or stream.state is State.REMOTE_ENDED:
            return
        stream.consumed += count
        if stream.consumed < (stream.window_size - RECORD_BYTES) // 2:  # half, to the next whole record
            return
        # It shrinks by what is not given back: room once given stays the peer's.
        size = min(self._next_window(stream.window_size, now - stream.updated_at), stream.max_window)
        size = max(size, stream.window_size - stream.consumed)
        increase = stream.consumed + size - stream.window_size
        stream.window_size = size
        stream.consumed = 0
        stream.updated_at = now
        if increase:
            stream.receive_window += increase
            self._queue(Header(Type.WINDOW_UPDATE, Flags.NONE, stream_id, increase))

    def _next_window(self, size: int, half_s: float) -> int:
        """For a window of which half was used up in ``half_s``.

        A full window lasts twice that: more than some round trips of it is a queue, which short messages stand in.
        """
        quick_s, slow_s = self._least_round_trip_s, 2 * self._least_round_trip_s
        if not self.is_talking:
            quick_s, slow_s = max(slow_s, QUICK_S), math.inf
        if half_s < quick_s:
            return min(2 * size, self.settings.max_window_bytes)
        if half_s > slow_s:
            return max(size // 2, INITIAL_WINDOW_BYTES)
        return size

    def limit_window(self, stream_id: int, size: int) -> None:
        """Let the stream's window grow to ``size`` bytes at most; the initial one is always given."""
        stream = self._streams.get(stream_id)
        if stream is not None:
            stream.max_window = min(max(size, INITIAL_WINDOW_BYTES), self.settings.max_window_bytes)

    def go_away(self, reason: GoAway = GoAway.NORMAL) -> None:
        """Refuse new streams from now on, and say so."""
        if not self._going_away:
            self._going_away = True
            self._queue(Header(Type.GO_AWAY, Flags.NONE, 0, reason))

    # Time

    def deadline(self) -> float:
        """When ``tick`` wants to be called next."""
        dead_at = min(self._heard_at + self.settings.dead_after_s, self._answer_by)
        return min(self._pinged_at + self.settings.keepalive_s, dead_at)

    def tick(self, now: float) -> bool:
        """Ping when it is time. False: the peer has been silent for too long and counts as dead."""
        # Summed up as in ``deadline``: the difference may be rounded to less, and the time would never come.
        if now >= self._heard_at + self.settings.dead_after_s:
            return False
        if now >= self._answer_by + LATE_S:
            self._asked_at, self._answer_by = (
                now,
                now + self.settings.check_s,
            )  # this program was asleep; the answer may be there
        elif now >= self._answer_by:
            return False
        if now >= self._pinged_at + self.settings.keepalive_s:
            self._send_ping(now)
        return True

    def check(self, now: float) -> None:
        """Have the peer show that it is there, soon: ``tick`` is False if it has not by then."""
        if self._answer_by < math.inf:
            return
        if self._ping is None:
            self._send_ping(now)
        least_s = self.settings.check_s
        patience_s = 3 * least_s if self.round_trip_s is None else max(least_s, 4 * self.round_trip_s)
        self._asked_at = now
        self._answer_by = now + patience_s + (self._sent_bytes - self._confirmed_bytes) / SLOW_BYTES_PER_S

    def _send_ping(self, now: float) -> None:
        self._pinged_at = now
        self._pings = (self._pings + 1) & 0xFFFFFFFF
        self._ping = _Ping(number=self._pings, at=now, sent_bytes=self._sent_bytes)
        self._queue(Header(Type.PING, Flags.SYN, 0, self._pings))

    # What goes out

    @property
    def is_talking(self) -> bool:
        """Whether something short went out or came in lately, so that bulk should move in small batches beside it."""
        return self._talk > 0

    def _count_talk(self, short: bool) -> None:
        self._talk = TALK_TURNS if short else max(0, self._talk - 1)

    @property
    def has_data_to_send(self) -> bool:
        return bool(self._control or self._short or self._long)

    def data_to_send(self, max_bytes: int) -> list[bytes | memoryview]:
        """Frames worth about ``max_bytes``, the streams that have something taking turns; empty when there is none."""
        out: list[bytes | memoryview] = list(self._control)
        size = HEADER_BYTES * len(out)
        self._control.clear()
        if self._short or self._long:
            self._count_talk(bool(self._short))
        kept = MIN_FRAME_BYTES if self._long else 0  # however much is short, what is long moves on
        while self._short and size < max_bytes - kept:
            size += self._take_frame(self._short.popleft(), max_bytes - kept - size, out)
        while self._long and size < max_bytes:
            size += self._take_frame(self._long.popleft(), max(MIN_FRAME_BYTES, max_bytes - size), out)
        self._sent_bytes += size
        return out

    def drained(self) -> list[int]:
        """Streams of which something was taken since the last call."""
        drained, self._drained = self._drained, []
        return drained

    def _take_frame(self, stream_id: int, room: int, out: list[bytes | memoryview]) -> int:
        stream = self._streams.get(stream_id)
        if stream is None:
            return 0
        stream.scheduled = False
        self._drained.append(stream_id)
        most = min(stream.outgoing_bytes, stream.send_window)
        room = min(room, self.settings.max_frame_bytes, most)
        if most - room < RECORD_BYTES and room == self.settings.max_frame_bytes:
            room = most  # no crumbs: the rest would be a frame of its own
        parts: list[memoryview] = []
        count = 0
        while stream.outgoing and count < room:
            part = stream.outgoing.popleft()
            if len(part) > room - count:
                stream.outgoing.appendleft(part[room - count :])
                part = part[: room - count]
            parts.append(part)
            count += len(part)
        stream.send_window -= count
        stream.outgoing_bytes -= count
        size = 0
        if count:
            out.append(Header(Type.DATA, Flags.NONE, stream_id, count).encode())
            out += parts
            size += HEADER_BYTES + count
        if stream.ending and not stream.outgoing:
            # A frame of its own, as go-yamux does: js-libp2p throws away the body of a frame that carries FIN.
            out.append(Header(Type.WINDOW_UPDATE, Flags.FIN, stream_id, 0).encode())
            size += HEADER_BYTES
            stream.ending = False
            self._half_close(stream_id, stream, State.LOCAL_ENDED)
        self._schedule(stream_id, stream)
        return size

    # What comes in

    def receive_data(self, data: bytes | bytearray, now: float) -> list[Event]:
        """Take bytes from the wire. A frame's data is passed on as it comes, without waiting for its end.

        Raises:
            RemoteProtocolError: the peer broke the protocol; the connection must be closed.
        """
        self._heard_at, self._answer_by = now, math.inf
        events: list[Event] = []
        if self._body_left >= len(data) > 0:
            self._receive_body(data if isinstance(data, bytes) else bytes(data), events)
            return events
        data = self._incoming + data if self._incoming else bytes(data)
        view = memoryview(data)
        position = 0
        while True:
            if self._body_left:
                body = view[position : position + self._body_left]
                if not body:
                    break
                position += len(body)
                self._receive_body(body, events)
            elif len(view) - position >= HEADER_BYTES:
                header = Header.decode(data, position)
                position += HEADER_BYTES
                self._receive_header(header, now, events)
            else:
                break
        self._incoming = bytes(view[position:])
        return events

    def _receive_header(self, header: Header, now: float, events: list[Event]) -> None:
        if header.type is Type.PING:
            self._receive_ping(header, now, events)
        elif header.type is Type.GO_AWAY:
            self._peer_going_away = True
            events.append(PeerGoesAway(header.length))
        else:
            self._receive_stream_frame(header, now, events)

    def _receive_body(self, body: bytes | memoryview, events: list[Event]) -> None:
        stream = self._streams.get(self._body_stream)
        if stream is not None:
            stream.receive_window -= len(body)
            events.append(DataReceived(self._body_stream, body))
        self._body_left -= len(body)
        if not self._body_left and self._body_ends and stream is not None:
            self._receive_end(self._body_stream, stream, events)

    def _check_window(self, header: Header) -> None:
        stream = self._streams.get(header.stream_id)
        allowed = INITIAL_WINDOW_BYTES if stream is None else stream.receive_window
        if stream is None and not header.flags & Flags.SYN:
            allowed = FORGOTTEN_FRAME_BYTES
        if header.length > allowed:
            raise RemoteProtocolError(
                f"{header.length} bytes for stream {header.stream_id}, which has room for {allowed}"
            )

    def _receive_ping(self, header: Header, now: float, events: list[Event]) -> None:
        if header.flags & Flags.SYN:
            self._answer(Header(Type.PING, Flags.ACK, 0, header.length))
        elif self._ping is not None and header.length == self._ping.number:
            sample = now - self._ping.at
            self._confirmed_bytes = self._ping.sent_bytes
            self._ping = None
            self._least_round_trip_s = min(sample, self._least_round_trip_s or sample)
            previous = self.round_trip_s
            self.round_trip_s = sample if previous is None else 0.8 * previous + 0.2 * sample
            events.append(PingAnswered(sample))

    def _receive_stream_frame(self, header: Header, now: float, events: list[Event]) -> None:
        if header.type is Type.DATA:
            self._check_window(header)
            self._body_stream, self._body_left = header.stream_id, header.length
            self._body_ends = bool(header.flags & Flags.FIN)
        if header.flags & Flags.SYN and not self._receive_syn(header.stream_id, now, events):
            return
        stream = self._streams.get(header.stream_id)
        if stream is None:
            return  # reset or ended by us; the rest was on its way
        if header.flags & Flags.RST:
            self._remove(header.stream_id)
            events.append(StreamReset(header.stream_id))
            return
        if header.length and header.type is Type.WINDOW_UPDATE:
            stream.send_window += header.length
            if stream.send_window > 0xFFFFFFFF:
                raise RemoteProtocolError(f"stream {header.stream_id} was given a window beyond 4 GiB")
            self._schedule(header.stream_id, stream)
            events.append(WindowOpened(header.stream_id))
        elif header.length and stream.state is State.REMOTE_ENDED:
            raise RemoteProtocolError(f"data after the end of stream {header.stream_id}")
        elif header.length:
            more_than_short = header.length > SHORT_BYTES
            self._count_talk(not (more_than_short or stream.gets_bulk))  # the crumbs of bulk are no talk
            stream.gets_bulk = more_than_short
        if header.flags & Flags.FIN and not self._body_left:
            self._receive_end(header.stream_id, stream, events)

    def _receive_end(self, stream_id: int, stream: _Stream, events: list[Event]) -> None:
        if stream.state is not State.REMOTE_ENDED:
            events.append(StreamEnded(stream_id))
            self._half_close(stream_id, stream, State.REMOTE_ENDED)

    def _receive_syn(self, stream_id: int, now: float, events: list[Event]) -> bool:
        if stream_id % 2 == self._next_id % 2:
            raise RemoteProtocolError(f"the peer opened stream {stream_id}, a number of ours")
        if stream_id in self._streams:
            raise RemoteProtocolError(f"the peer opened stream {stream_id} twice")
        if self._going_away or self._counts[True] >= self.settings.max_inbound_streams:
            self._answer(Header(Type.WINDOW_UPDATE, Flags.RST, stream_id, 0))
            return False
        self._add(stream_id, inbound=True, now=now)
        events.append(StreamOpened(stream_id))
        return True

    # Book-keeping

    def _add(self, stream_id: int, *, inbound: bool, now: float) -> None:
        self._streams[stream_id] = _Stream(inbound=inbound, updated_at=now, max_window=self.settings.max_window_bytes)
        self._counts[inbound] += 1

    def _remove(self, stream_id: int) -> None:
        stream = self._streams.pop(stream_id)
        self._counts[stream.inbound] -= 1

    def _half_close(self, stream_id: int, stream: _Stream, side: State) -> None:
        if stream.state is State.OPEN:
            stream.state = side
        elif stream.state is not side:
            self._remove(stream_id)

    def _schedule(self, stream_id: int, stream: _Stream) -> None:
        sendable = stream.send_window > 0 if stream.outgoing else stream.ending
        if sendable and not stream.scheduled and stream_id in self._streams:
            stream.scheduled = True
            (self._long if stream.sends_bulk else self._short).append(stream_id)

    def _queue(self, header: Header) -> None:
        self._control.append(header.encode())

    def _answer(self, header: Header) -> None:
        """Queue what the peer can ask for as often as it likes."""
        if len(self._control) >= self.settings.max_control_frames:
            raise RemoteProtocolError("the peer asks for answers and does not read them")
        self._queue(header)

"""A QUIC connection as a muxer: aioquic's state machine, a timer, and the streams.

The endpoint, which owns the socket, hands in what comes and takes what is to be sent; both happen without waiting.
Semantics are those of ``net.mux.driver``, which does the same over Yamux.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import trio
from aioquic.quic import events

from net import addresses, errors
from net.addresses import Multiaddr
from net.identity import PeerId
from net.io import SingleUse, check_max_bytes
from net.mux.base import Muxer, Stream
from net.mux.core import DOUBT_SHARE
from net.security.certificate import ALPN, authenticate
from net.transports.quic.core import INITIAL_WINDOW_BYTES, MAX_INBOUND_STREAMS, QuicCore
from net.transports.quic.udp import Address

MAX_OUTBOUND_STREAMS = 256
MAX_WINDOW_BYTES = 16 * 1024 * 1024
STREAM_SEND_BUFFER_BYTES = 256 * 1024  # waiting in one stream before send_all waits too
RECEIVE_BYTES = 256 * 1024  # given to a reader at once
KEEPALIVE_S = 4.0  # of silence, after which we ask
DEAD_AFTER_S = 9.0
CHECK_S = 1.0  # for the answer to ``check``, or four round trips
GOODBYE_S = 1.0
LINGER_S = 60.0  # for the peer's end of a stream that we closed
GRAIN_S = 0.000_05  # what is due just now may not be in aioquic's sums of floats
BLOCKED_S = 0.01  # between looks at what is due while the socket is full: there is nothing to be done but to wait
MAX_REASON_CHARACTERS = 200  # of a peer's parting words, which somebody may read
LATE_S = 1.0  # a timer that fires so much later was not ours to blame the peer for
BAD_CERTIFICATE = 0x100 + 42  # RFC 9001, section 4.8: CRYPTO_ERROR with TLS's alert
NO_APPLICATION_PROTOCOL = 0x100 + 120


class Owner(Protocol):
    """What a connection asks of its endpoint."""

    def send(self, connection: QuicConnection, datagrams: Sequence[tuple[bytes, Address]]) -> None:
        """Send, now or as soon as the socket takes them."""

    def can_send(self) -> bool:
        """Whether nothing waits for the socket."""

    def add_id(self, connection: QuicConnection, connection_id: bytes) -> None: ...

    def drop_id(self, connection_id: bytes) -> None: ...

    def forget(self, connection: QuicConnection, last_words: bytes | None) -> None:
        """It has ended. ``last_words`` is what to answer a peer that does not know."""


class QuicStream(Stream):
    """See ``net.mux.base.Stream``."""

    def __init__(self, connection: QuicConnection, stream_id: int) -> None:
        self.stream_id = stream_id
        self._connection = connection
        self._received: deque[bytes | memoryview] = deque()
        self._received_bytes = 0
        self._consumed_bytes = 0  # in all
        self._window_bytes = INITIAL_WINDOW_BYTES
        self._granted_at = trio.current_time()
        self._granted_bytes = INITIAL_WINDOW_BYTES
        self._ended = self._sent_end = self._closed = False
        self._failure: errors.NetError | None = None  # of both directions
        self._stopped: errors.NetError | None = None  # of sending alone: the peer reads no more
        self._broken_off: errors.NetError | None = None  # of receiving alone
        self._readable = trio.lowlevel.ParkingLot()
        self._writable = trio.lowlevel.ParkingLot()
        self._sending = SingleUse("sending on this stream")
        self._receiving = SingleUse("receiving from this stream")

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        check_max_bytes(max_bytes)
        with self._receiving:
            await trio.lowlevel.checkpoint_if_cancelled()
            while self._closed or not self._received:
                if self._closed:
                    raise trio.ClosedResourceError("this stream was closed here")
                if self._ended:
                    return b""
                failure = self._broken_off or self._failure
                if failure is not None:
                    raise failure
                await self._readable.park()
            part = self._take(RECEIVE_BYTES if max_bytes is None else max_bytes)
            self._consume(len(part))
            return part

    def _take(self, most: int) -> bytes:
        """What has come, joined: datagrams are small, and a reader's turn costs more than a copy."""
        received = self._received
        parts: list[bytes | memoryview] = []
        room = most
        while received and room > 0:
            part = received.popleft()
            if len(part) > room:
                received.appendleft(memoryview(part)[room:])
                part = memoryview(part)[:room]
            parts.append(part)
            room -= len(part)
        only = parts[0]
        return only if len(parts) == 1 and isinstance(only, bytes) else b"".join(parts)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        with self._sending:
            await trio.lowlevel.checkpoint_if_cancelled()
            view = memoryview(data).cast("B")
            while True:
                self._check_sending()
                if self._connection.unsent(self.stream_id) > STREAM_SEND_BUFFER_BYTES:
                    await self._writable.park()
                elif not view:
                    return
                else:
                    self._connection.write(self.stream_id, view[:STREAM_SEND_BUFFER_BYTES])
                    view = view[STREAM_SEND_BUFFER_BYTES:]

    def _check_sending(self) -> None:
        if self._closed or self._sent_end:
            raise trio.ClosedResourceError("this stream was closed here")
        failure = self._stopped or self._failure
        if failure is not None:
            raise failure

    async def wait_send_all_might_not_block(self) -> None:
        with self._sending:
            await trio.lowlevel.checkpoint_if_cancelled()
            while not (self._closed or self._stopped or self._failure):
                if self._connection.unsent(self.stream_id) <= STREAM_SEND_BUFFER_BYTES:
                    return
                await self._writable.park()
            if self._closed:
                raise trio.ClosedResourceError("this stream was closed here")

    async def send_eof(self) -> None:
        """Say that nothing more will come; receiving goes on."""
        with self._sending:
            if self._closed:
                raise trio.ClosedResourceError("this stream was closed here")
            self._end_sending()
            await trio.lowlevel.checkpoint()

    def _end_sending(self) -> None:
        if not self._sent_end:
            self._sent_end = True
            if self._stopped is None and self._failure is None:
                self._connection.write(self.stream_id, b"", end=True)
            self._connection.forget_ended(self)

    def reset(self) -> None:
        if not self._closed:
            self._closed = True
            self._drop_received()
            self._connection.reset(self)
            self._wake()

    async def aclose(self) -> None:
        """End our side; what the peer still sends is dropped, and after a minute refused."""
        if not self._closed:
            self._end_sending()
            self._closed = True
            # What we never read must not stop the peer half-way through what it sends.
            self._drop_received()
            self._connection.close_stream(self)
            self._wake()
        await trio.lowlevel.checkpoint()

    @property
    def is_over(self) -> bool:
        """Whether both sides have ended."""
        return self._sent_end and (self._ended or self._broken_off is not None)

    # Called by the connection

    def feed(self, data: bytes) -> None:
        self._received.append(data)
        self._received_bytes += len(data)
        if self._readable:
            self._readable.unpark_all()

    def drop(self, count: int) -> None:
        """As if ``count`` bytes had come and been read."""
        self._received_bytes += count
        self._consume(count)

    def end(self) -> None:
        self._ended = True
        self._readable.unpark_all()

    def stop_sending(self, error: errors.NetError) -> None:
        self._stopped = self._stopped or error
        self._writable.unpark_all()

    def break_off(self, error: errors.NetError) -> None:
        self._broken_off = self._broken_off or error
        self._readable.unpark_all()

    def fail(self, error: errors.NetError) -> None:
        self._failure = self._failure or error
        self._wake()

    def let_send(self) -> None:
        if self._writable and self._connection.unsent(self.stream_id) <= STREAM_SEND_BUFFER_BYTES:
            self._writable.unpark_all()

    def _wake(self) -> None:
        self._readable.unpark_all()
        self._writable.unpark_all()

    def _drop_received(self) -> None:
        self._received.clear()
        self._consume(self._received_bytes - self._consumed_bytes)

    def _consume(self, count: int) -> None:
        """Give the peer new credit when half of the window was read; a larger one, when that went quickly."""
        self._consumed_bytes += count
        self._connection.consumed(count)
        if self._granted_bytes - self._consumed_bytes > self._window_bytes // 2 or self._ended:
            return
        now = trio.current_time()
        if now - self._granted_at < 4 * max(self._connection.round_trip_s or 0.0, 0.001):
            self._window_bytes = min(2 * self._window_bytes, MAX_WINDOW_BYTES)
        self._granted_at = now
        self._granted_bytes = self._consumed_bytes + self._window_bytes
        self._connection.grant(self.stream_id, self._granted_bytes)


class QuicConnection(Muxer):
    """Streams over one QUIC connection. Made and driven by its endpoint, which runs ``keep_time`` from the start."""

    def __init__(self, core: QuicCore, owner: Owner) -> None:
        self.core = core
        self.peer_id: PeerId | None = None
        self.established = trio.Event()  # or ended
        self.ended = trio.Event()
        self.failure: errors.NetError | None = None
        self.used_at = trio.current_time()
        self.is_running = False
        self._owner = owner
        self._streams: dict[int, QuicStream] = {}
        self._closed_here: dict[int, tuple[QuicStream, float]] = {}  # whose peer may still send, until when
        self._waiting: deque[QuicStream] = deque()  # the peer's, before ``run``
        self._serving = 0
        self._nursery: trio.Nursery | None = None
        self._on_stream: Callable[[QuicStream], Awaitable[None]] | None = None
        self._closing = False
        self._goodbye_at = float("inf")
        self._linger_at = float("inf")  # when the first stream in ``_closed_here`` is to be refused
        self._answer_by = float("inf")  # set by ``check``
        self._checked_at = trio.current_time()  # the same
        self._heard_at = trio.current_time()
        self._asked = False  # since we heard
        self._alarm = trio.CancelScope()
        self._met_at: Address | None = None

    @property
    def round_trip_s(self) -> float | None:
        return self.core.round_trip_s

    @property
    def doubt_at(self) -> float:
        if self._answer_by == float("inf"):
            return self._answer_by
        return self._checked_at + DOUBT_SHARE * (self._answer_by - self._checked_at)

    @property
    def moved_to(self) -> Multiaddr | None:
        where = None if self.core.is_client else self.core.validated_address  # only clients move (RFC 9000, section 9)
        if where is None or where == self._met_at:
            return None
        return addresses.quic(*where[:2])

    @property
    def open_streams(self) -> int:
        return len(self._streams)

    @property
    def is_closed(self) -> bool:
        return self._closing or self.failure is not None

    async def run(
        self,
        on_stream: Callable[[QuicStream], Awaitable[None]],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        self.is_running = True
        try:
            async with trio.open_nursery() as nursery:
                self._nursery, self._on_stream = nursery, on_stream
                while self._waiting:
                    self._serve(self._waiting.popleft())
                task_status.started()
                await self.ended.wait()
                nursery.cancel_scope.cancel()
        finally:
            self._nursery = None
            self.close()
            with trio.CancelScope(shield=True):
                await self.ended.wait()

    def open_stream(self) -> QuicStream:
        if self.failure is not None:
            raise self.failure
        if self._closing:
            raise errors.ConnectionLost("the connection was closed")
        ours = sum(1 for stream_id in self._streams if not self._is_peers(stream_id))
        if ours >= MAX_OUTBOUND_STREAMS:
            raise errors.LimitExceeded(f"{ours} streams are open on this connection, the most allowed")
        stream_id = self.core.get_next_available_stream_id()
        self.core.send_stream_data(stream_id, b"")  # which makes it ours; the peer learns of it with the first byte
        stream = self._streams[stream_id] = QuicStream(self, stream_id)
        self.used_at = trio.current_time()
        return stream

    def close(self) -> None:
        if self._closing or self.ended.is_set():
            return
        self._closing = True
        self._goodbye_at = trio.current_time() + (GOODBYE_S if self.is_running else 0.0)
        self._say_goodbye(trio.current_time())
        self._set_alarm()

    def _say_goodbye(self, now: float) -> None:
        """Leave, when all that was sent has arrived or has had its time."""
        if not self.ended.is_set() and (now >= self._goodbye_at or not self.core.has_unacknowledged):
            self.leave(errors.ConnectionLost("the connection was closed"))

    def leave(self, error: errors.NetError, *, code: int = 0) -> None:
        """Tell the peer that it is over, and be over."""
        if not self.ended.is_set():
            if self.core.termination is None:
                frame_type = 0x06 if code else None  # CRYPTO: the handshake is at fault
                self.core.close(error_code=code, frame_type=frame_type, reason_phrase="" if code == 0 else str(error))
            goodbye = self.core.datagrams_to_send(trio.current_time())
            self._owner.send(self, goodbye)
            self.end(error, goodbye[-1][0] if goodbye else None)

    def end(self, error: errors.NetError, last_words: bytes | None = None) -> None:
        """Be over, without a word."""
        if self.ended.is_set():
            return
        self.failure = self.failure or error
        for stream in self._streams.values():
            stream.fail(self.failure)
        self._streams.clear()
        self._closed_here.clear()
        self._waiting.clear()
        self._owner.forget(self, last_words)
        self.ended.set()
        self.established.set()
        self._alarm.cancel()

    # Time

    async def keep_time(self) -> None:
        """Act when something is due, until the connection has ended."""
        while not self.ended.is_set():
            self._alarm = trio.CancelScope()
            self._set_alarm()
            with self._alarm:
                await trio.sleep_forever()
            if not self.ended.is_set():
                self._on_alarm(trio.current_time())

    def _set_alarm(self) -> None:
        timer = self.core.get_timer()
        heard = min(self._heard_at + (DEAD_AFTER_S if self._asked else KEEPALIVE_S), self._answer_by)
        due = min(float("inf") if timer is None else timer + GRAIN_S, self._goodbye_at, self._linger_at)
        if not self._owner.can_send():
            due = max(due, trio.current_time() + BLOCKED_S)
        self._alarm.deadline = min(due, heard)

    def _on_alarm(self, now: float) -> None:
        dead_at = min(self._heard_at + DEAD_AFTER_S, self._answer_by)
        if self._asked and now >= dead_at + LATE_S:
            # We ourselves were asleep: the peer gets another chance.
            self._heard_at, self._answer_by = now - KEEPALIVE_S, max(self._answer_by, now + CHECK_S)
        elif now >= dead_at:
            self.leave(errors.ConnectionLost("the peer has stopped answering"))
            return
        if not self._asked and now >= self._heard_at + KEEPALIVE_S:
            self._asked = True
            if self.core.is_established:
                self.core.send_ping(0)
        self._refuse_lingering(now)
        self.core.handle_timer(now)
        self._handle_events()
        self.transmit()

    def check(self) -> None:
        if self.ended.is_set() or not self.core.is_established or self._answer_by < float("inf"):
            return
        self._asked = True
        patience_s = 3 * CHECK_S if self.round_trip_s is None else max(CHECK_S, 4 * self.round_trip_s)
        self._checked_at = trio.current_time()
        self._answer_by = self._checked_at + patience_s
        self.core.send_ping(0)
        self.transmit()

    def _refuse_lingering(self, now: float) -> None:
        if now < self._linger_at:
            return
        self._linger_at = float("inf")
        for stream_id, (stream, until) in self._closed_here.items():
            if now >= until:
                self.core.stop(stream_id)
                self._closed_here[stream_id] = stream, float("inf")
            else:
                self._linger_at = min(self._linger_at, until)

    # Datagrams

    def connect(self, address: Address) -> None:
        """Begin the handshake."""
        self.core.connect(address, trio.current_time())
        self.transmit()

    def receive(self, datagrams: Sequence[bytes], address: Address) -> None:
        """Take what has come; ``transmit`` must follow."""
        now = trio.current_time()
        self._heard_at, self._answer_by, self._asked = now, float("inf"), False
        self.core.receive_datagrams(datagrams, address, now)
        self._handle_events()

    def move(self) -> None:
        """Our address has changed: be known under another id there, and have the path validated (RFC 9000, 9)."""
        if self.core.is_client and self.core.is_established and not self.ended.is_set():
            self.core.change_connection_id()
            self.core.use_base_size(trio.current_time())
            self.core.send_ping(0)
            self.transmit()

    def transmit(self) -> None:
        """Send what may be sent now."""
        if self.ended.is_set():
            return
        now = trio.current_time()
        if not self._owner.can_send():
            if self._closing:
                self._say_goodbye(now)
            self._set_alarm()
            return
        datagrams = self.core.datagrams_to_send(now)
        if datagrams:
            self._owner.send(self, datagrams)
            for stream in list(self._streams.values()):
                stream.let_send()
        self._end_if_terminated()
        if self._closing:
            self._say_goodbye(now)
        self._set_alarm()

    def _end_if_terminated(self) -> None:
        reason = self.core.termination
        if reason is None or self.ended.is_set():
            return
        said = _readable(reason.reason_phrase) or f"error {reason.error_code:#x}"
        if not self.core.was_ended_by_peer:  # aioquic met something that is against the rules, or its idle timeout
            lost = reason.reason_phrase == "Idle timeout"
            kind = errors.ConnectionLost if lost else errors.RemoteProtocolError
            self.end(kind("the peer has stopped answering" if lost else f"the peer broke QUIC's rules: {said}"))
        elif reason.frame_type is None and reason.error_code == 0:
            self.end(errors.ConnectionLost("the connection was closed by the other side"))
        else:
            self.end(errors.ConnectionLost(f"the connection was closed by the other side: {said}"))

    # Events

    def _handle_events(self) -> None:
        while (event := self.core.next_event()) is not None:
            match event:
                case events.StreamDataReceived(stream_id=stream_id):
                    self._on_data(stream_id, event.data, event.end_stream)
                case events.StreamReset(stream_id=stream_id):
                    self._on_reset(stream_id)
                case events.StopSendingReceived(stream_id=stream_id):
                    stream = self._streams.get(stream_id)
                    if stream is not None:
                        stream.stop_sending(errors.StreamReset("the other side reads no more of this stream"))
                case events.HandshakeCompleted():
                    self._on_handshake()
                case events.ConnectionIdIssued(connection_id=connection_id):
                    self._owner.add_id(self, connection_id)
                case events.ConnectionIdRetired(connection_id=connection_id):
                    self._owner.drop_id(connection_id)
                case _:
                    pass  # pings, and the end, which ``termination`` tells sooner

    def _on_handshake(self) -> None:
        if self.core.alpn != ALPN:
            self.leave(errors.RemoteProtocolError("the peer does not speak libp2p"), code=NO_APPLICATION_PROTOCOL)
            return
        try:
            self.peer_id = authenticate(self.core.peer_certificate)
        except errors.RemoteProtocolError as error:
            self.leave(error, code=BAD_CERTIFICATE)
            return
        self._met_at = self.core.get_peer_address()
        self.established.set()

    def _on_data(self, stream_id: int, data: bytes, ended: bool) -> None:
        self.core.unread_bytes += len(data)
        stream = self._streams.get(stream_id)
        if stream is None:
            dropped = self._closed_here.get(stream_id)
            if dropped is not None:
                dropped[0].drop(len(data))
                if ended:
                    del self._closed_here[stream_id]
                return
            stream = self._accept(stream_id)
            if stream is None:
                self.core.unread_bytes -= len(data)
                return
        if data:
            stream.feed(data)
        if ended:
            stream.end()
            self.forget_ended(stream)

    def _on_reset(self, stream_id: int) -> None:
        """The peer gave up sending. What of both directions is left, we give up too, as Yamux does."""
        error = errors.StreamReset("the stream was reset by the other side")
        self._closed_here.pop(stream_id, None)
        stream = self._streams.pop(stream_id, None)
        if stream is not None:
            stream.break_off(error)
            stream.fail(error)
        if stream is not None or self._is_peers(stream_id):
            self.core.reset_stream(stream_id, 0)

    def _accept(self, stream_id: int) -> QuicStream | None:
        """A stream that the peer has opened, if there is room. One that its peer has given up still has its handler."""
        stream = QuicStream(self, stream_id)
        if not self._is_peers(stream_id) or self._closing:
            return None
        if self._serving + len(self._waiting) >= MAX_INBOUND_STREAMS:
            self._refuse(stream)
            return None
        self._streams[stream_id] = stream
        self.used_at = trio.current_time()
        if self._nursery is None:
            self._waiting.append(stream)
        else:
            self._serve(stream)
        return stream

    def _refuse(self, stream: QuicStream) -> None:
        if self.core.can_receive(stream.stream_id):
            self.core.stop(stream.stream_id)
            self._closed_here[stream.stream_id] = (stream, float("inf"))
        self.core.reset_stream(stream.stream_id, 0)

    def _serve(self, stream: QuicStream) -> None:
        if self._nursery is not None:
            self._serving += 1
            self._nursery.start_soon(self._handle, stream)

    async def _handle(self, stream: QuicStream) -> None:
        try:
            if self._on_stream is not None:
                await self._on_stream(stream)
        finally:
            self._serving -= 1

    def _is_peers(self, stream_id: int) -> bool:
        return (stream_id & 1 == 0) is not self.core.is_client

    # What streams call

    def unsent(self, stream_id: int) -> int:
        return self.core.unsent(stream_id)

    def write(self, stream_id: int, data: bytes | memoryview, *, end: bool = False) -> None:
        self.core.send_stream_data(stream_id, data, end_stream=end)  # type: ignore[arg-type]  # any buffer will do
        self.transmit()

    def consumed(self, count: int) -> None:
        self.core.unread_bytes -= count

    def grant(self, stream_id: int, limit: int) -> None:
        self.core.grant(stream_id, limit)
        self.transmit()

    def reset(self, stream: QuicStream) -> None:
        if self._streams.pop(stream.stream_id, None) is not None:
            self._refuse(stream)
            self.transmit()

    def close_stream(self, stream: QuicStream) -> None:
        if self._streams.pop(stream.stream_id, None) is not None and self.core.can_receive(stream.stream_id):
            until = trio.current_time() + LINGER_S
            self._closed_here[stream.stream_id] = (stream, until)
            self._linger_at = min(self._linger_at, until)

    def forget_ended(self, stream: QuicStream) -> None:
        if stream.is_over:
            self._streams.pop(stream.stream_id, None)


def _readable(phrase: str) -> str:
    """A peer's words as one short line without control characters."""
    return "".join(each if each.isprintable() else " " for each in phrase[:MAX_REASON_CHARACTERS]).strip()

"""Yamux over a secure channel: one reader, one writer, one timer, and the streams.

The writer task alone touches the channel's sending side and is never cancelled inside a frame by a
stream's user: cancelling ``send_all`` on a stream leaves at most an unfinished message on that stream.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable

import trio

from net import errors
from net.mux import core as yamux
from net.mux.base import Muxer, Stream
from net.mux.frames import GoAway
from net.security.base import RECORD_BYTES, SecureChannel

PROTOCOL_ID = "/yamux/1.0.0"
MIN_BATCH_BYTES = 16 * 1024
MAX_BATCH_BYTES = 4 * RECORD_BYTES
TARGET_BATCH_S = 0.001
STREAM_SEND_BUFFER_BYTES = 256 * 1024  # waiting in one stream before send_all waits too
GOODBYE_S = 1.0
LINGER_S = 60.0  # for the peer's end of a stream that we closed


class YamuxStream(Stream):
    def __init__(self, connection: YamuxConnection, stream_id: int) -> None:
        self.connection = connection
        self.stream_id = stream_id
        self._received: deque[bytes | memoryview] = deque()
        self._ended = False
        self._failure: errors.NetError | None = None
        self._closed = False
        self._readable = trio.lowlevel.ParkingLot()
        self._writable = trio.lowlevel.ParkingLot()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint_if_cancelled()
        while self._closed or not self._received:
            if self._closed:
                raise trio.ClosedResourceError("this stream was closed here")
            if self._ended:
                return b""
            if self._failure is not None:
                raise self._failure
            await self._readable.park()
        part = self._received.popleft()
        if max_bytes is not None and len(part) > max_bytes:
            view = memoryview(part)
            self._received.appendleft(view[max_bytes:])
            part = view[:max_bytes]
        self.connection._consumed(self.stream_id, len(part))
        return part if isinstance(part, bytes) else bytes(part)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        view = memoryview(data).cast("B")
        while True:
            if self._closed:
                raise trio.ClosedResourceError("this stream was closed here")
            if self._failure is not None:
                raise self._failure
            if self.connection._core.unsent(self.stream_id) > STREAM_SEND_BUFFER_BYTES:
                await self._writable.park()
            elif not view:
                return
            elif isinstance(view.obj, bytes):
                self.connection._send(self.stream_id, view)
                view = view[:0]
            else:  # it may change before it is sent
                self.connection._send(self.stream_id, memoryview(bytes(view[:STREAM_SEND_BUFFER_BYTES])))
                view = view[STREAM_SEND_BUFFER_BYTES:]

    async def wait_send_all_might_not_block(self) -> None:
        while self._failure is None and not self._closed:
            if self.connection._core.unsent(self.stream_id) <= STREAM_SEND_BUFFER_BYTES:
                return
            await self._writable.park()

    async def send_eof(self) -> None:
        """Say that nothing more will come; receiving goes on."""
        self.connection._end(self.stream_id)
        await trio.lowlevel.checkpoint()

    def reset(self) -> None:
        self._closed = True
        self._received.clear()
        self.connection._reset(self.stream_id)
        self._wake()

    async def aclose(self) -> None:
        """End our side; what the peer still sends is dropped, and after a minute refused."""
        await self._aclose(refuse=False)

    async def leave(self) -> None:
        await self._aclose(refuse=True)

    def limit_window(self, size: int) -> None:
        self.connection._core.limit_window(self.stream_id, size)

    async def _aclose(self, *, refuse: bool) -> None:
        if not self._closed:
            self._closed = True
            self.connection._close(self.stream_id, refuse=refuse)
            # What we never read must not stop the peer half-way through what it sends.
            self.connection._consumed(self.stream_id, sum(map(len, self._received)))
            self._received.clear()
            self._wake()
        await trio.lowlevel.checkpoint()

    def _feed(self, data: bytes | memoryview) -> None:
        self._received.append(data)
        if self._readable:
            self._readable.unpark_all()

    def _end(self) -> None:
        self._ended = True
        self._readable.unpark_all()

    def _fail(self, error: errors.NetError) -> None:
        if self._failure is None:
            self._failure = error
        self._wake()

    def _wake(self) -> None:
        self._readable.unpark_all()
        self._writable.unpark_all()


class YamuxConnection(Muxer):
    """Streams over one secure channel."""

    def __init__(self, channel: SecureChannel, *, client: bool, settings: yamux.YamuxSettings | None = None) -> None:
        self._channel = channel
        self._core = yamux.YamuxCore(client=client, now=trio.current_time(), settings=settings)
        self._streams: dict[int, YamuxStream] = {}
        self._closed_here: dict[int, float] = {}  # streams whose peer has not ended yet, until when it may
        self._left: set[int] = set()  # those of them whose peer is to know
        self._serving = 0
        self._batch_bytes = MAX_BATCH_BYTES  # as long as nobody talks beside it
        self._cut_bytes = 0  # what the channel was told last
        self._writer_scope = trio.CancelScope(shield=True)
        self._wake_writer = trio.Event()
        self._alarm = trio.CancelScope()  # around the sleep until the core's deadline
        self._failure: errors.NetError | None = None
        self._closing = False
        self.used_at = trio.current_time()  # when the last stream was opened

    @property
    def round_trip_s(self) -> float | None:
        """From keepalive pings."""
        return self._core.round_trip_s

    @property
    def doubt_at(self) -> float:
        return self._core.doubt_at

    @property
    def moved_to(self) -> None:
        return None  # what is below stays where it is

    @property
    def open_streams(self) -> int:
        return len(self._streams)

    @property
    def is_closed(self) -> bool:
        return self._closing or self._failure is not None or not self._core.takes_streams

    async def run(
        self,
        on_stream: Callable[[YamuxStream], Awaitable[None]],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._read, on_stream, nursery)
                nursery.start_soon(self._write, nursery.cancel_scope)
                nursery.start_soon(self._keep_alive, nursery.cancel_scope)
                task_status.started()
        except* errors.NetError as group:
            failure = group.exceptions[0]
            self._fail(failure if isinstance(failure, errors.NetError) else errors.ConnectionLost(str(failure)))
        finally:
            self._fail(errors.ConnectionLost("the connection was closed"))
            await trio.aclose_forcefully(self._channel)

    def open_stream(self) -> YamuxStream:
        if self._failure is not None:
            raise self._failure
        stream_id = self._core.open_stream(trio.current_time())
        stream = self._streams[stream_id] = YamuxStream(self, stream_id)
        self.used_at = trio.current_time()
        self._wake_writer.set()
        return stream

    def check(self) -> None:
        if self._failure is None:
            self._core.check(trio.current_time())
            self._alarm.deadline = self._core.deadline()
            self._kick()

    def close(self) -> None:
        self._closing = True
        self._writer_scope.deadline = min(self._writer_scope.deadline, trio.current_time() + GOODBYE_S)
        self._core.go_away()
        self._wake_writer.set()

    # The three tasks

    async def _read(self, on_stream: Callable[[YamuxStream], Awaitable[None]], nursery: trio.Nursery) -> None:
        failure: errors.NetError = errors.ConnectionLost("the connection was closed by the other side")
        try:
            # A peer's first frames may have come in one piece with its last words about what is spoken.
            while batch := self._channel.take_received() or await self._channel.receive_batch():
                now = trio.current_time()
                for data in batch:
                    for event in self._core.receive_data(data, now):
                        self._handle(event, on_stream, nursery)
                self._kick()
        except trio.BrokenResourceError as error:
            failure = errors.ConnectionLost(f"the connection broke ({error})")
        except trio.ClosedResourceError:
            pass
        except errors.RemoteProtocolError as error:
            failure = error
            self._core.go_away(GoAway.PROTOCOL_ERROR)
        self._fail(failure)
        nursery.cancel_scope.cancel()

    async def _write(self, cancel_scope: trio.CancelScope) -> None:
        """Send what there is until the connection is closed; then what is left, and goodbye.

        Shielded, so that being closed never cuts a record; ``_keep_alive`` sets the deadline when it ends.
        """
        with self._writer_scope:
            try:
                await self._write_all()
                await self._channel.aclose()  # TLS and WebSocket have goodbyes of their own
            except trio.BrokenResourceError:
                self._fail(errors.ConnectionLost("the connection broke"))
            except trio.ClosedResourceError:
                pass
        cancel_scope.cancel()

    async def _write_all(self) -> None:
        while True:
            while self._channel.has_unsent or self._core.has_data_to_send:
                started = trio.current_time()
                if not self._channel.has_unsent:
                    self._put()
                await self._channel.flush()
                self._tune_batch(trio.current_time() - started)
                self._after_sending()
                await trio.lowlevel.checkpoint()
            if self._closing:
                return
            self._wake_writer = trio.Event()
            await self._wake_writer.wait()

    def _kick(self) -> None:
        """Send now what goes at once, and leave the rest to the writer task.

        Most messages are small and find the way free: they leave here, without a turn of the event loop.
        """
        if not self._channel.has_unsent and self._core.has_data_to_send and self._failure is None:
            try:
                self._put()
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass  # the writer meets the same, and tells everybody
            else:
                self._after_sending()
        if self._channel.has_unsent or self._core.has_data_to_send or self._closing:
            self._wake_writer.set()

    def _put(self) -> None:
        """The next batch: small beside short messages, of which none should wait for much."""
        size = min(self._batch_bytes, RECORD_BYTES) if self._core.is_talking else self._batch_bytes
        if size != self._cut_bytes:
            self._cut_bytes = size
            unsent = 2 * size if size < MAX_BATCH_BYTES else None
            self._channel.limit_waiting(unsent_bytes=unsent, read_bytes=size + MAX_BATCH_BYTES)
        self._channel.put(self._core.data_to_send(size))

    def _after_sending(self) -> None:
        for stream_id in self._core.drained():
            stream = self._streams.get(stream_id)
            if stream is not None:
                if stream._writable and self._core.unsent(stream_id) <= STREAM_SEND_BUFFER_BYTES:
                    stream._writable.unpark_all()
                self._forget_ended(stream_id)

    def _tune_batch(self, seconds: float) -> None:
        """What is said next waits for the batch that is being sent: make one last about a millisecond."""
        if seconds < TARGET_BATCH_S:
            self._batch_bytes = min(2 * self._batch_bytes, MAX_BATCH_BYTES)
        elif seconds > 4 * TARGET_BATCH_S:
            self._batch_bytes = max(self._batch_bytes // 2, MIN_BATCH_BYTES)

    async def _keep_alive(self, cancel_scope: trio.CancelScope) -> None:
        try:
            while True:
                with trio.CancelScope(deadline=self._core.deadline()) as self._alarm:
                    await trio.sleep_forever()
                if not self._core.tick(trio.current_time()):
                    self._fail(errors.ConnectionLost("the peer has stopped answering"))
                    self._channel.abandon()
                    cancel_scope.cancel()
                    return
                for stream_id, until in list(self._closed_here.items()):
                    if trio.current_time() >= until or not self._core.is_open(stream_id):
                        del self._closed_here[stream_id]
                        self._left.discard(stream_id)
                        self._core.reset(stream_id)
                self._wake_writer.set()
        finally:
            self.close()

    # Events

    def _handle(
        self,
        event: yamux.Event,
        on_stream: Callable[[YamuxStream], Awaitable[None]],
        nursery: trio.Nursery,
    ) -> None:
        match event:
            case yamux.DataReceived(stream_id, data):
                if (receiver := self._streams.get(stream_id)) is not None:
                    receiver._feed(data)
                elif stream_id in self._left and self._core.has_ended(stream_id):
                    self._left.remove(stream_id)
                    self._core.reset(stream_id)
                else:
                    self._core.consumed(stream_id, len(data), trio.current_time())
            case yamux.StreamOpened(stream_id):
                # A stream that its peer has reset is not open any more, but its handler may still be at work.
                if self._serving >= self._core.settings.max_inbound_streams:
                    self._core.refuse(stream_id)
                    return
                stream = self._streams[stream_id] = YamuxStream(self, stream_id)
                self._core.accept(stream_id)
                self.used_at = trio.current_time()
                self._serving += 1
                nursery.start_soon(self._serve, on_stream, stream)
            case yamux.StreamEnded(stream_id):
                if (ended := self._streams.get(stream_id)) is not None:
                    ended._end()
                    self._forget_ended(stream_id)
            case yamux.StreamReset(stream_id):
                self._closed_here.pop(stream_id, None)
                self._left.discard(stream_id)
                if (reset := self._streams.pop(stream_id, None)) is not None:
                    reset._fail(errors.StreamReset("the stream was reset by the other side"))
            case yamux.WindowOpened(_):
                self._wake_writer.set()
            case yamux.PingAnswered() | yamux.PeerGoesAway():
                pass

    async def _serve(self, on_stream: Callable[[YamuxStream], Awaitable[None]], stream: YamuxStream) -> None:
        try:
            await on_stream(stream)
        finally:
            self._serving -= 1

    def _fail(self, error: errors.NetError) -> None:
        if self._failure is None:
            self._failure = error
            for stream in self._streams.values():
                stream._fail(error)
            self._streams.clear()

    # What streams call

    def _send(self, stream_id: int, data: memoryview) -> None:
        self._core.send(stream_id, data)
        self._kick()

    def _consumed(self, stream_id: int, count: int) -> None:
        self._core.consumed(stream_id, count, trio.current_time())
        if self._core.has_data_to_send:
            self._kick()

    def _end(self, stream_id: int) -> None:
        self._core.end(stream_id)
        self._wake_writer.set()

    def _reset(self, stream_id: int) -> None:
        self._streams.pop(stream_id, None)
        self._core.reset(stream_id)
        self._wake_writer.set()

    def _close(self, stream_id: int, *, refuse: bool) -> None:
        self._streams.pop(stream_id, None)
        self._core.end(stream_id)
        if self._core.is_open(stream_id):
            self._closed_here[stream_id] = trio.current_time() + LINGER_S
            if refuse:
                self._left.add(stream_id)
        self._wake_writer.set()

    def _forget_ended(self, stream_id: int) -> None:
        if not self._core.is_open(stream_id):
            self._streams.pop(stream_id, None)

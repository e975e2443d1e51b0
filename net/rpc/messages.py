"""Whole messages over a stream. Whoever begins one must go on at a decent pace."""

from __future__ import annotations

import trio

from net import errors
from net.mux.base import Stream
from net.rpc.framing import Decoder, Message
from net.rpc.line import LineSpeed, Waits

MIN_BYTES_PER_S = 1024  # once a message has begun: slower senders are cut off
FIRST_BYTES_S = 5.0
SLICE_BYTES = 128 * 1024  # of a long message: handed over one after another, to see when we have to wait

Pieces = list[bytes | bytearray | memoryview]


class MessageStream:
    """See the module. One task reads; several may send, whose messages are never mixed.

    Attributes:
        line: How fast the connection below is, as far as that shows.
        heard_at: When anything last came, if only a part of a message, in trio's time.
    """

    def __init__(self, stream: Stream, line: LineSpeed | None = None) -> None:
        """Take a stream.

        Args:
            stream: nobody else uses it.
            line: learns how fast the connection below is, if that shows.
        """
        self._stream = stream
        self.line = line or LineSpeed()
        self.heard_at = trio.current_time()
        self._waits = Waits(self.line)
        self._decoder = Decoder()
        self._ready: list[Message] = []
        self._sending = trio.Lock()

    async def send(self, pieces: Pieces) -> None:
        """Send a message that has been encoded.

        Raises:
            ConnectionLost, StreamReset, trio.ClosedResourceError: as ``Stream.send_all``.
        Cancellation: the message may be cut; the stream is of no use any more.
        """
        async with self._sending:
            for piece in pieces:
                whole = memoryview(piece)
                if whole.nbytes < SLICE_BYTES:
                    await self._stream.send_all(piece)
                    continue
                for start in range(0, whole.nbytes, SLICE_BYTES):
                    part, began = whole[start : start + SLICE_BYTES], trio.current_time()
                    await self._stream.send_all(part)
                    self._waits.sent(len(part), began, trio.current_time())

    async def send_bounded(self, pieces: Pieces) -> None:
        """The same to somebody who reads at a decent pace.

        Raises:
            RemoteProtocolError: they do not.
        """
        size = sum(memoryview(piece).nbytes for piece in pieces)
        with trio.move_on_after(FIRST_BYTES_S + size / MIN_BYTES_PER_S) as scope:
            await self.send(pieces)
        if scope.cancelled_caught:
            raise errors.RemoteProtocolError(f"an answer that was read slower than {MIN_BYTES_PER_S} bytes/s")

    async def receive(self) -> Message | None:
        """The next message; None at the end of the stream."""
        began: float | None = None
        received = 0
        while not self._ready:
            deadline = float("inf")
            if self._decoder.is_inside_message:
                began = trio.current_time() if began is None else began
                deadline = began + FIRST_BYTES_S + received / MIN_BYTES_PER_S
            with trio.move_on_at(deadline) as scope:
                data = await self._stream.receive_some()
            if scope.cancelled_caught:
                raise errors.RemoteProtocolError(f"a message that came slower than {MIN_BYTES_PER_S} bytes/s")
            if not data:
                if self._decoder.is_inside_message:
                    raise errors.ConnectionLost("the stream ended inside a message")
                return None
            self.heard_at = trio.current_time()
            received += len(data)
            self._ready = self._decoder.receive_data(data)
        return self._ready.pop(0)

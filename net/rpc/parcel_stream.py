"""Parcels over a stream: ``net.rpc.parcels``, driven by trio."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import trio

from net import errors
from net.mux.base import Stream
from net.rpc.framing import Message, encode
from net.rpc.line import LineSpeed
from net.rpc.messages import MessageStream
from net.rpc.parcels import Assembler, Interleaver, NoRoom, Outgoing, cut


class ParcelStream:
    """Start :meth:`run` in a nursery, which sends. One task reads; several may send, whose parcels alternate.

    Attributes:
        line: How fast the connection below is, as far as that shows.
        handed_at: When a message was last handed over, in trio's time.
    """

    def __init__(
        self,
        stream: Stream,
        line: LineSpeed | None = None,
        *,
        max_parcels: int,
        limit: Callable[[Mapping[str, Any]], int],
        take: Callable[[int], bool] = lambda _: True,
        give_back: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Take a stream.

        Args:
            stream: Nobody else uses it.
            line: Learns how fast the connection below is.
            max_parcels: See :class:`net.rpc.parcels.Assembler`; so for the others.
            limit: See there.
            take: See there.
            give_back: See there.
        """
        self._messages = MessageStream(stream, line)
        self._assembler = Assembler(max_parcels=max_parcels, limit=limit, take=take, give_back=give_back)
        self._interleaver = Interleaver()
        self._wake = trio.Event()
        self._stopped_at = trio.current_time()  # when we last stopped reading
        self.line = self._messages.line
        self.handed_at = self._stopped_at

    @property
    def heard_at(self) -> float:
        """When anything last came, if only a part of a piece of a parcel, in trio's time."""
        return self._messages.heard_at

    async def run(self) -> None:
        """Send what there is until cancelled.

        Raises:
            RemoteProtocolError: it is read too slowly.
            ConnectionLost, StreamReset, trio.ClosedResourceError: as ``Stream.send_all``.
        Cancellation: a message may be cut; the stream is of no use any more.
        """
        while True:
            message = self._interleaver.next_message()
            if message is None:
                await self._wake.wait()
                self._wake = trio.Event()
                continue
            await self._messages.send_bounded(encode(message))
            self._interleaver.sent()
            self.handed_at = trio.current_time()

    async def send(self, message: Message) -> None:
        """Have a message sent; returns when it has been.

        Raises:
            LocalProtocolError: it cannot be sent.
        Cancellation: what has not been sent of it is not; who reads must be told so, if it was longer than a piece.
        """
        sent = trio.Event()
        pieces = cut(message)
        if message.tensors:
            encode(Message(header=message.header))  # what cannot be sent is this caller's affair
        else:
            encode(message)
        outgoing = Outgoing(pieces, sent.set)
        self._interleaver.add(outgoing)
        self._wake.set()
        try:
            await sent.wait()
        finally:
            self._interleaver.remove(outgoing)

    async def receive(self) -> Message | NoRoom | None:
        """The next whole message; ``None`` at the end of the stream.

        Raises:
            RemoteProtocolError: the sender does not keep to the rules, or is too slow.
            ConnectionLost, StreamReset, trio.ClosedResourceError: the stream is broken.
        Cancellation: nothing is lost.
        """
        self._assembler.postpone(trio.current_time() - self._stopped_at)
        try:
            while True:
                with trio.move_on_at(self._assembler.deadline) as scope:
                    message = await self._messages.receive()
                if scope.cancelled_caught:
                    raise errors.RemoteProtocolError("a parcel that came too slowly")
                if message is None:
                    if self._assembler.is_inside:
                        raise errors.ConnectionLost("the stream ended inside a parcel")
                    return None
                whole = self._assembler.receive(message, trio.current_time())
                if whole is not None:
                    return whole
        finally:
            self._stopped_at = trio.current_time()

    def is_coming(self, number: int) -> bool:
        """Whether this parcel has begun, not ended, and not been passed over."""
        return self._assembler.is_coming(number)

    def drop(self, number: int) -> None:
        """The sender has given up this parcel, and sends no more of it."""
        self._assembler.drop(number)

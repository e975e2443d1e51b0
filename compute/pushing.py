"""From node to node: the stream on which a session's results go straight to the next node of its chain."""

from __future__ import annotations

from contextlib import suppress
from typing import Final

import trio

from compute.wire_forms import Sender
from net import errors
from net.host import Host
from net.identity import PeerId
from net.multistream import LazyStream
from net.protocol import session as wire
from net.rpc.framing import Message, encode
from net.rpc.line import LineSpeed
from net.rpc.messages import MessageStream

LINK_TIMEOUT_S: Final = 5.0  # for reaching the next node
SEND_TIMEOUT_S: Final = 1.5  # for it to take a result; the client can have it instead


class PushLink:
    """Our stream to the next node, for one session.

    Attributes:
        peer_id: whose node it is.
        sender: makes what it is sent.
        is_over: whether it takes nothing more.
    """

    def __init__(self, peer_id: PeerId, stream: LazyStream, line: LineSpeed, sender: Sender) -> None:
        self.peer_id = peer_id
        self.sender = sender
        self.is_over = False
        self._stream = stream
        self._messages = MessageStream(stream, line)

    @property
    def bytes_per_s(self) -> float | None:
        """Of the line there, if it has been slow enough to be noticed."""
        return self._messages.line.bytes_per_s

    @classmethod
    async def open(cls, host: Host, link: wire.Link, sender: Sender) -> PushLink:
        """Reach the next node and name the session. Whether it listens is known by :meth:`agree`.

        Args:
            host: dials.
            link: who it is.
            sender: makes what it is sent.

        Raises:
            PeerFailed: it cannot be reached in time.
        """
        try:
            with trio.fail_after(LINK_TIMEOUT_S):
                connection = await host.connect(link.peer_id, link.addresses)
                stream = await host.open_lazily_over(connection, wire.PUSH_PROTOCOL_ID)
                opened = cls(link.peer_id, stream, connection.line, sender)
                await opened.send(Message(header={"token": link.token}))
        except trio.TooSlowError as error:
            raise errors.PeerFailed(link.peer_id, f"not reached in {LINK_TIMEOUT_S:g} s") from error
        return opened

    async def agree(self) -> None:
        """Wait until the next node says that it takes what is handed on.

        Raises:
            PeerFailed: it does not, or not in time; the link is over.
        """
        try:
            with trio.fail_after(LINK_TIMEOUT_S):
                await self._stream.agree()
        except (errors.NetError, trio.TooSlowError, trio.ClosedResourceError) as error:
            self.end()
            raise errors.PeerFailed(self.peer_id, str(error) or "does not take what is handed on") from error

    async def send(self, message: Message) -> None:
        """Hand a step on.

        Raises:
            PeerFailed: it was not taken; the link is over.
        Cancellation: the link is over.
        """
        pieces = encode(message)
        sent = False
        try:
            with trio.move_on_after(SEND_TIMEOUT_S):
                await self._messages.send(pieces)
                sent = True
        except (errors.NetError, trio.ClosedResourceError) as error:
            raise errors.PeerFailed(self.peer_id, str(error) or "the stream is closed") from error
        finally:
            if not sent:
                self.end()
        if not sent:
            raise errors.PeerFailed(self.peer_id, f"took no result in {SEND_TIMEOUT_S:g} s")

    async def watch(self) -> None:
        """Notice when the other side ends it; it never says anything."""
        with suppress(errors.NetError, trio.ClosedResourceError):
            await self._messages.receive()
        self.end()

    def end(self) -> None:
        """Let it go; again is nothing."""
        if not self.is_over:
            self.is_over = True
            self._stream.reset()

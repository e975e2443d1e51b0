"""What a security protocol is, and the channel that it makes."""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import Protocol

import trio

from net.identity import PeerId
from net.transports.base import RawStream

Buffer = bytes | bytearray | memoryview

# A Noise record carries at most 65,519 bytes of plaintext; whoever writes in pieces of this size
# fills records exactly, on either protocol.
RECORD_BYTES = 65_519


class SecureChannel(trio.abc.Stream):
    """An authenticated, encrypted byte stream.

    One task may send while another receives. Sending has two steps: ``put`` encrypts and sends what goes at
    once, ``flush`` waits until the rest is gone; ``send_all`` is both. After a ``flush`` that was cancelled
    nothing more can be sent. A ``receive_some`` that is cancelled has lost nothing; it raises
    ``trio.BrokenResourceError`` when bytes were tampered with, and returns ``b""`` at the end.
    """

    remote_peer: PeerId

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._unsent: deque[memoryview] = deque()

    def put(self, pieces: Sequence[Buffer]) -> None:
        """Encrypt ``pieces`` as one run of bytes; send them now, as far as possible, if nothing waits.

        Raises:
            trio.BrokenResourceError, trio.ClosedResourceError: the connection is gone.
        """
        waiting = bool(self._unsent)
        self._unsent += self._encrypt(pieces)
        if not waiting and isinstance(self._stream, RawStream):
            while self._unsent:
                sent = self._stream.try_send(self._unsent[0])
                if sent < len(self._unsent[0]):
                    self._unsent[0] = self._unsent[0][sent:]
                    return
                self._unsent.popleft()

    @property
    def has_unsent(self) -> bool:
        """Whether ``flush`` has something to wait for."""
        return bool(self._unsent)

    async def flush(self) -> None:
        """Send all that was put. One task at a time."""
        while self._unsent:
            if isinstance(self._stream, RawStream):
                sent = self._stream.try_send(self._unsent[0])
                if not sent:
                    await self._stream.wait_send_all_might_not_block()
                    continue
            else:
                sent = len(self._unsent[0])
                await self._stream.send_all(self._unsent[0])
            if sent < len(self._unsent[0]):
                self._unsent[0] = self._unsent[0][sent:]
            else:
                self._unsent.popleft()

    async def send_all(self, data: Buffer) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        self.put([data])
        await self.flush()

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    @abstractmethod
    def _encrypt(self, pieces: Sequence[Buffer]) -> list[memoryview]:
        """What goes on the wire for ``pieces``."""


class Security(Protocol):
    """A handshake that turns a raw stream into a SecureChannel."""

    protocol_id: str

    async def outbound(self, stream: trio.abc.Stream, expected: PeerId) -> SecureChannel:
        """Handshake as the dialler.

        Raises:
            PeerIdMismatch: somebody else than ``expected`` answered.
            RemoteProtocolError: the handshake made no sense.
            ConnectionLost: the stream ended first.
        """

    async def inbound(self, stream: trio.abc.Stream) -> SecureChannel:
        """Handshake as the listener; the channel says who dialled."""

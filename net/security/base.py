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
MAX_RECORD_BYTES = 2 + 65_535  # on the wire, with Noise's length
MAX_READ_BYTES = 512 * 1024


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
        self._received: deque[bytes] = deque()  # of a batch, by ``receive_some``
        self._read_bytes = MAX_READ_BYTES

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

    def limit_waiting(self, *, unsent_bytes: int | None, read_bytes: int) -> None:
        """Let less wait on the way, for the sake of what comes behind it.

        Args:
            unsent_bytes: at most about so much waits for the network to take it; None leaves that to the system.
            read_bytes: at most so much is received and decrypted at a time, within reason.
        """
        self._read_bytes = min(max(read_bytes, 2 * MAX_RECORD_BYTES), MAX_READ_BYTES)
        if isinstance(self._stream, RawStream):
            self._stream.limit_unsent(unsent_bytes)

    def abandon(self) -> None:
        """See :meth:`net.transports.base.RawStream.abandon`."""
        if isinstance(self._stream, RawStream):
            self._stream.abandon()

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

    def take_received(self) -> Sequence[bytes]:
        """What came with the last that ``receive_some`` gave: whoever goes on with ``receive_batch`` needs it first."""
        taken = list(self._received)
        self._received.clear()
        return taken

    @abstractmethod
    async def receive_batch(self) -> Sequence[bytes]:
        """All that has come, in the pieces that it came in, waiting for some; empty at the end.

        Errors and cancellation are those of ``receive_some``.
        """

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if not self._received:
            self._received += await self.receive_batch()
            if not self._received:
                return b""
        else:
            await trio.lowlevel.checkpoint()
        plain = self._received.popleft()
        if max_bytes is not None and len(plain) > max_bytes:
            self._received.appendleft(plain[max_bytes:])
            plain = plain[:max_bytes]
        return plain

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

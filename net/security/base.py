"""What a security protocol is, and the channel that it makes."""

from __future__ import annotations

from typing import Protocol

import trio

from net.identity import PeerId

# A Noise record carries at most 65,519 bytes of plaintext; whoever writes in pieces of this size
# fills records exactly, on either protocol.
RECORD_BYTES = 65_519


class SecureChannel(trio.abc.Stream):
    """An authenticated, encrypted byte stream.

    One task may send while another receives. A ``send_all`` or ``receive_some`` that is cancelled
    leaves the channel unusable in that direction: only tasks that live as long as the channel call them.
    ``receive_some`` raises ``trio.BrokenResourceError`` when bytes were tampered with, and returns
    ``b""`` at the end.
    """

    remote_peer: PeerId


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

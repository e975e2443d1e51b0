"""Noise XX: py-libp2p's handshake, session records of our own.

Wire, after the handshake: records of a 2-byte big-endian length and that many bytes, ChaCha20-Poly1305
with a 64-bit counter as nonce; at most 65,535 bytes, of which 16 are the tag.

The session reads in large pieces and encrypts all full records of a write into one send.

Source: https://github.com/libp2p/specs/tree/master/noise
"""

from __future__ import annotations

import struct
from typing import Any, cast

import trio
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from libp2p.abc import IRawConnection
from libp2p.crypto.x25519 import create_new_key_pair as create_new_x25519_key_pair
from libp2p.security.noise.exceptions import PeerIDMismatchesPubkey
from libp2p.security.noise.patterns import PatternXX

from net.errors import ConnectionLost, PeerIdMismatch, RemoteProtocolError
from net.identity import Identity, PeerId
from net.io import receive_exactly, send
from net.security.base import RECORD_BYTES, SecureChannel

TAG_BYTES = 16
RECEIVE_BYTES = 256 * 1024


class NoiseSecurity:
    """``/noise`` for one identity."""

    protocol_id = "/noise"

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._static_key = create_new_x25519_key_pair().private_key

    async def outbound(self, stream: trio.abc.Stream, expected: PeerId) -> SecureChannel:
        return await self._handshake(stream, expected)

    async def inbound(self, stream: trio.abc.Stream) -> SecureChannel:
        return await self._handshake(stream, None)

    async def _handshake(self, stream: trio.abc.Stream, expected: PeerId | None) -> SecureChannel:
        pattern = PatternXX(self._identity.peer_id, self._identity.key_pair.private_key, self._static_key)
        raw = cast(IRawConnection, _HandshakeConnection(stream))
        try:
            if expected is None:
                session = await pattern.handshake_inbound(raw)
            else:
                # None: the library would compare and hide who really answered; we compare below.
                session = await pattern.handshake_outbound(raw, None)
        except ConnectionLost:
            raise
        except PeerIDMismatchesPubkey as error:
            raise RemoteProtocolError(f"Noise handshake: {error}") from error
        except Exception as error:  # the library raises its own, noiseprotocol's, protobuf's and cryptography's
            raise RemoteProtocolError(f"Noise handshake failed: {type(error).__name__}") from error
        remote: PeerId = session.get_remote_peer()
        if expected is not None and remote != expected:
            raise PeerIdMismatch(expected, remote)
        protocol = cast(Any, session).conn.noise_state.noise_protocol
        return NoiseChannel(
            stream,
            remote,
            send_key=protocol.cipher_state_encrypt.k,
            receive_key=protocol.cipher_state_decrypt.k,
        )


class _HandshakeConnection:
    """The read(n)/write/close face that the library's handshake wants, over a trio stream."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream

    async def read(self, count: int | None = None) -> bytes:
        return await receive_exactly(self._stream, count or 0)

    async def write(self, data: bytes) -> None:
        await send(self._stream, data)

    async def close(self) -> None:
        await self._stream.aclose()

    def get_remote_address(self) -> None:
        return None


class NoiseChannel(SecureChannel):
    """Records over a raw stream. Both nonces start at 0 after the handshake."""

    def __init__(self, stream: trio.abc.Stream, remote_peer: PeerId, *, send_key: bytes, receive_key: bytes) -> None:
        self.remote_peer = remote_peer
        self._stream = stream
        self._seal = ChaCha20Poly1305(send_key)
        self._open = ChaCha20Poly1305(receive_key)
        self._sent = 0
        self._received = 0
        self._incoming = bytearray()
        self._plain = memoryview(b"")

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data)
        out: list[bytes] = []
        for start in range(0, len(view), RECORD_BYTES):
            piece = view[start : start + RECORD_BYTES]
            sealed = self._seal.encrypt(_nonce(self._sent), piece, None)
            self._sent += 1
            out += (struct.pack(">H", len(sealed)), sealed)
        await self._stream.send_all(b"".join(out))

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        while not self._plain:
            record = self._next_record()
            if record is not None:
                self._plain = memoryview(record)
                continue
            more = await self._stream.receive_some(RECEIVE_BYTES)
            if not more:
                if self._incoming:
                    raise trio.BrokenResourceError("the stream ended inside a Noise record")
                return b""
            self._incoming += more
        end = len(self._plain) if max_bytes is None else max_bytes
        part, self._plain = bytes(self._plain[:end]), self._plain[end:]
        return part

    def _next_record(self) -> bytes | None:
        if len(self._incoming) < 2:
            return None
        end = 2 + int.from_bytes(self._incoming[:2], "big")
        if len(self._incoming) < end:
            return None
        try:
            with memoryview(self._incoming) as view:
                plain = self._open.decrypt(_nonce(self._received), view[2:end], None)
        except (InvalidTag, ValueError) as error:
            raise trio.BrokenResourceError("a Noise record failed its authentication") from error
        self._received += 1
        del self._incoming[:end]
        return plain

    async def aclose(self) -> None:
        await self._stream.aclose()


def _nonce(counter: int) -> bytes:
    return struct.pack("<4xQ", counter)

"""Noise XX: py-libp2p's handshake, session records of our own.

Wire, after the handshake: records of a 2-byte big-endian length and that many bytes, ChaCha20-Poly1305
with a 64-bit counter as nonce; at most 65,535 bytes, of which 16 are the tag.

The session reads in large pieces and encrypts all full records of a write into one send.

Source: https://github.com/libp2p/specs/tree/master/noise
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
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
from net.security.base import MAX_READ_BYTES, RECORD_BYTES, Buffer, SecureChannel
from net.transports.base import RawStream

LENGTH_BYTES = 2
TAG_BYTES = 16
_LENGTH = struct.Struct(">H")
_NONCE = struct.Struct("<4xQ")
SEND_BUFFER_BYTES = 6 * RECORD_BYTES


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
        super().__init__(stream)
        self.remote_peer = remote_peer
        self._seal = ChaCha20Poly1305(send_key)
        self._open = ChaCha20Poly1305(receive_key)
        self._sealed = 0  # records, each way
        self._opened = 0
        # Kept for the life of the channel: fresh memory of this size costs more in page faults than the cipher.
        self._plain_out = memoryview(bytearray(RECORD_BYTES))
        self._sealed_out = memoryview(bytearray(SEND_BUFFER_BYTES))
        self._incoming = memoryview(bytearray(MAX_READ_BYTES))
        self._start = self._end = 0  # of what lies in it

    def _encrypt(self, pieces: Sequence[Buffer]) -> list[memoryview]:
        size = sum(map(len, pieces))
        records = -(-size // RECORD_BYTES)
        out = self._out_buffer(size + records * (LENGTH_BYTES + TAG_BYTES))
        position = 0
        for plain in self._cut(pieces):
            body = position + LENGTH_BYTES
            end = body + len(plain) + TAG_BYTES
            _LENGTH.pack_into(out, position, end - body)
            self._seal.encrypt_into(_NONCE.pack(self._sealed), plain, None, out[body:end])
            self._sealed += 1
            position = end
        return [out[:position]] if records else []

    def _cut(self, pieces: Sequence[Buffer]) -> Iterator[memoryview]:
        """The plaintext of each record: where a piece fills one, the piece's own memory, which saves a copy."""
        filled = 0
        for piece in pieces:
            view = memoryview(piece).cast("B")
            start = 0
            while start < len(view):
                part = view[start : start + RECORD_BYTES - filled]
                start += len(part)
                if len(part) == RECORD_BYTES:
                    yield part
                    continue
                self._plain_out[filled : filled + len(part)] = part
                filled += len(part)
                if filled == RECORD_BYTES:
                    yield self._plain_out
                    filled = 0
        if filled:
            yield self._plain_out[:filled]

    def _out_buffer(self, size: int) -> memoryview:
        """Memory for ``size`` bytes of records: ours, unless it is in use or too small."""
        if self._unsent or size > len(self._sealed_out):
            return memoryview(bytearray(size))
        return self._sealed_out

    async def receive_batch(self) -> Sequence[bytes]:
        while True:
            if batch := self._decrypt_records():
                return batch
            if not await self._receive_more():
                if self._end > self._start:
                    raise trio.BrokenResourceError("the stream ended inside a Noise record")
                return []

    async def _receive_more(self) -> bool:
        """Whether anything came; what is there moves to the front of the buffer first."""
        count = self._end - self._start
        if self._start:
            self._incoming[:count] = self._incoming[self._start : self._end]
            self._start, self._end = 0, count
        if isinstance(self._stream, RawStream):
            received = await self._stream.receive_into(self._incoming[count : self._read_bytes])
        else:
            data = await self._stream.receive_some(self._read_bytes - count)
            received = len(data)
            self._incoming[count : count + received] = data
        self._end += received
        return received > 0

    def _decrypt_records(self) -> list[bytes]:
        """The plaintexts of all whole records; records of nothing are left out."""
        batch: list[bytes] = []
        while (body := self._start + LENGTH_BYTES) <= self._end:
            end = body + _LENGTH.unpack_from(self._incoming, self._start)[0]
            if end > self._end:
                break
            try:
                plain = self._open.decrypt(_NONCE.pack(self._opened), self._incoming[body:end], None)
            except (InvalidTag, ValueError) as error:
                if batch:
                    break  # what came before is good; the error comes again
                raise trio.BrokenResourceError("a Noise record failed its authentication") from error
            self._opened += 1
            self._start = end
            if plain:
                batch.append(plain)
        return batch

    async def aclose(self) -> None:
        await self._stream.aclose()

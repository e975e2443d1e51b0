"""A private swarm: who does not have its key cannot say a word to its nodes, nor understand one.

Under everything else, each direction of a connection is XSalsa20 under the swarm's key: 24 random bytes, the nonce, and
then the stream. It hides and keeps out; who the peer is, and that nobody changes a bit, is left to Noise or TLS above.

    file:  /key/swarm/psk/1.0.0/
           /base16/
           (64 hexadecimal digits)

Source: https://github.com/libp2p/specs/blob/master/pnet/Private-Networks-PSK-V1.md; XSalsa20 is Salsa20 under
HSalsa20(key, nonce[:16]), https://cr.yp.to/snuffle/xsalsa-20110204.pdf. (py-libp2p's takes Salsa20 with 8 bytes, which
nobody else understands.)
"""

from __future__ import annotations

import base64
import binascii
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path

import trio
from Crypto.Cipher import Salsa20

from net.errors import IdentityError
from net.io import SingleUse, check_max_bytes

KEY_BYTES = 32
NONCE_BYTES = 24
MAX_FILE_BYTES = 4096
HEADER = "/key/swarm/psk/1.0.0/"
MAKE = f"make one with: (echo {HEADER}; echo /base16/; openssl rand -hex 32) > FILE"
RECEIVE_BYTES = 64 * 1024


@dataclass(frozen=True)
class SwarmKey:
    secret: bytes = field(repr=False)

    @classmethod
    def load(cls, path: Path) -> SwarmKey:
        """Read a key file.

        Raises:
            IdentityError: it is missing, unreadable, or holds no such key.
        """
        try:
            with path.open("rb") as file:
                data = file.read(MAX_FILE_BYTES)
        except OSError as error:
            raise IdentityError(f"{path}: {error.strerror or error}; {MAKE}") from error
        return cls(_parse(data, path))


def _parse(data: bytes, path: Path) -> bytes:
    lines = data.decode("ascii", errors="replace").split()
    key = b""
    if len(lines) == 3 and lines[0] == HEADER:
        try:
            if lines[1] == "/base16/":
                key = bytes.fromhex(lines[2])
            elif lines[1] == "/base64/":
                key = base64.b64decode(lines[2], validate=True)
        except (ValueError, binascii.Error):
            pass  # told below
    if len(key) != KEY_BYTES:
        raise IdentityError(f"{path}: no swarm key ({HEADER}, /base16/ and 64 hexadecimal digits, a line each); {MAKE}")
    return key


class PrivateStream(trio.abc.Stream):
    """A stream under a swarm's key. Contracts are those of the stream below; what was sent in part ends sending."""

    def __init__(self, stream: trio.abc.Stream, key: SwarmKey) -> None:
        self._stream = stream
        self._key = key
        self._sender: Salsa20.Salsa20Cipher | None = None
        self._receiver: Salsa20.Salsa20Cipher | None = None
        self._nonce = bytearray()
        self._receiving = SingleUse("receiving from this stream")

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        start = b""
        if self._sender is None:
            start = os.urandom(NONCE_BYTES)
            self._sender = _cipher(self._key, start)
        await self._stream.send_all(start + self._sender.encrypt(bytes(data)))

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        check_max_bytes(max_bytes)
        with self._receiving:
            while self._receiver is None:
                part = await self._stream.receive_some(NONCE_BYTES - len(self._nonce))
                if not part:
                    return b""
                self._nonce += part
                if len(self._nonce) == NONCE_BYTES:
                    self._receiver = _cipher(self._key, bytes(self._nonce))
            return bytes(self._receiver.decrypt(bytes(await self._stream.receive_some(max_bytes or RECEIVE_BYTES))))

    async def aclose(self) -> None:
        await self._stream.aclose()


def _cipher(key: SwarmKey, nonce: bytes) -> Salsa20.Salsa20Cipher:
    return Salsa20.new(key=hsalsa20(key.secret, nonce[:16]), nonce=nonce[16:])


def hsalsa20(key: bytes, nonce: bytes) -> bytes:
    """The key of the inner Salsa20: twenty rounds, without the addition at the end, of which eight words are kept."""
    words = struct.unpack("<8I", key)
    constants = struct.unpack("<4I", b"expand 32-byte k")
    point = struct.unpack("<4I", nonce)
    x = [constants[0], *words[:4], constants[1], *point, constants[2], *words[4:], constants[3]]
    for _ in range(10):
        for column in range(4):
            _quarter(x, *(5 * column + 4 * row & 15 for row in range(4)))
        for row in range(4):
            _quarter(x, *(4 * row + (row + column) % 4 for column in range(4)))
    return struct.pack("<8I", *(x[index] for index in (0, 5, 10, 15, 6, 7, 8, 9)))


def _quarter(x: list[int], a: int, b: int, c: int, d: int) -> None:
    for target, one, other, turn in ((b, a, d, 7), (c, b, a, 9), (d, c, b, 13), (a, d, c, 18)):
        total = (x[one] + x[other]) & 0xFFFFFFFF
        x[target] ^= (total << turn | total >> (32 - turn)) & 0xFFFFFFFF

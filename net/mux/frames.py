"""Yamux frames.

Wire: a 12-byte header, big-endian: version (0), type, flags (16 bits), stream id (32), length (32).
Only DATA has a body, of ``length`` bytes; for the others ``length`` is a value: the window's increase,
the ping's opaque number, the reason for going away.

Source: https://github.com/hashicorp/yamux/blob/master/spec.md
"""

from __future__ import annotations

import enum
import struct
from typing import NamedTuple

from net.errors import RemoteProtocolError

_HEADER = struct.Struct(">BBHII")
HEADER_BYTES = _HEADER.size


class Type(enum.IntEnum):
    DATA = 0
    WINDOW_UPDATE = 1
    PING = 2
    GO_AWAY = 3


_TYPES = tuple(Type)  # by number


class Flags:
    """Bits. Plain integers: they are tested for every frame, and an ``IntFlag`` takes a microsecond each time."""

    NONE = 0
    SYN = 1
    ACK = 2
    FIN = 4
    RST = 8


class GoAway(enum.IntEnum):
    NORMAL = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2


class Header(NamedTuple):
    type: Type
    flags: int  # of Flags
    stream_id: int
    length: int

    def encode(self) -> bytes:
        return _HEADER.pack(0, self.type, self.flags, self.stream_id, self.length)

    @classmethod
    def decode(cls, data: bytes | bytearray | memoryview, offset: int = 0) -> Header:
        """Raises:
        RemoteProtocolError: unknown version, type or flags, or a stream id where none belongs.
        """
        version, type_, flags, stream_id, length = _HEADER.unpack_from(data, offset)
        if version != 0 or type_ > Type.GO_AWAY or flags > 15:
            raise RemoteProtocolError(f"a Yamux frame of version {version}, type {type_}, flags {flags}")
        header = cls(_TYPES[type_], flags, stream_id, length)
        if (stream_id == 0) != (type_ >= Type.PING):
            raise RemoteProtocolError(f"a Yamux {header.type.name} frame for stream {stream_id}")
        return header

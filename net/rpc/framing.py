"""Messages on a stream.

Wire: a 4-byte big-endian length of all that follows (at most 4 MiB), a 2-byte length of the header, the
header (a msgpack map), and the raw bytes of the tensors that its ``"t"`` describes, one after another:

    "t": [[dtype, [dimensions...]], ...]        dtype is one of ITEM_BYTES

Lengths must agree to the byte. Nothing is allocated for a message before its length is known to be allowed.
A message's own fields are under other keys of the header.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from net.errors import LocalProtocolError, RemoteProtocolError
from net.rpc import packing

MAX_FRAME_BYTES = 4 * 1024 * 1024
MAX_HEADER_BYTES = 64 * 1024 - 1
MAX_TENSORS = 8
MAX_DIMENSIONS = 4
ITEM_BYTES = {"f32": 4, "f16": 2, "bf16": 2, "i64": 8, "u8": 1}
_LENGTH = struct.Struct(">I")
_HEADER_LENGTH = struct.Struct(">H")


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """Raw little-endian, row-major values. ``compute.tensors`` makes torch tensors of them."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | bytearray | memoryview

    @property
    def n_bytes(self) -> int:
        return ITEM_BYTES[self.dtype] * math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Message:
    header: Mapping[str, Any]
    tensors: Sequence[Tensor] = ()


def encode(message: Message) -> list[bytes | bytearray | memoryview]:
    """The message as pieces to be sent one after another; tensor data is not copied.

    Raises:
        LocalProtocolError: it is larger than a frame may be, has too many tensors, or a tensor's data does not
            fit its shape.
    """
    if len(message.tensors) > MAX_TENSORS:
        raise LocalProtocolError(f"{len(message.tensors)} tensors in a message: at most {MAX_TENSORS} are sent")
    fields = dict(message.header)
    if message.tensors:
        fields["t"] = [[tensor.dtype, list(tensor.shape)] for tensor in message.tensors]
    header = packing.pack(fields)
    size = _HEADER_LENGTH.size + len(header)
    for tensor in message.tensors:
        data_bytes = memoryview(tensor.data).nbytes
        if data_bytes != tensor.n_bytes:
            raise LocalProtocolError(f"a tensor of {tensor.n_bytes} bytes with {data_bytes} bytes of data")
        size += data_bytes
    if size > MAX_FRAME_BYTES or len(header) > MAX_HEADER_BYTES:
        raise LocalProtocolError(f"a message of {size} bytes: at most {MAX_FRAME_BYTES} are sent in one piece")
    start = _LENGTH.pack(size) + _HEADER_LENGTH.pack(len(header)) + header
    return [start, *(tensor.data for tensor in message.tensors)]


class Decoder:
    """Bytes in, messages out."""

    def __init__(self, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._max_frame_bytes = max_frame_bytes
        self._buffer = bytearray()

    @property
    def is_inside_message(self) -> bool:
        """Whether a message has begun and not ended: an end of the stream now would cut it."""
        return bool(self._buffer)

    def receive_data(self, data: bytes) -> list[Message]:
        """Raises:
        RemoteProtocolError: a frame too long, or one that contradicts itself.
        """
        self._buffer += data
        messages = []
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if not _HEADER_LENGTH.size < length <= self._max_frame_bytes:
                raise RemoteProtocolError(f"a message of {length} bytes: at most {self._max_frame_bytes} are read")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                break
            frame = memoryview(bytes(memoryview(self._buffer)[_LENGTH.size : end]))
            del self._buffer[:end]
            messages.append(_parse(frame))
        return messages


def _parse(frame: memoryview) -> Message:
    (header_length,) = _HEADER_LENGTH.unpack_from(frame)
    body_start = _HEADER_LENGTH.size + header_length
    if body_start > len(frame):
        raise RemoteProtocolError("a message whose header is longer than itself")
    fields = packing.unpack(frame[_HEADER_LENGTH.size : body_start])
    specs = fields.pop("t", [])
    if not isinstance(specs, list) or len(specs) > MAX_TENSORS:
        raise RemoteProtocolError(f"tensors that are no list of at most {MAX_TENSORS}")
    tensors = []
    position = body_start
    for spec in specs:
        dtype, shape = _parse_spec(spec)
        end = position + ITEM_BYTES[dtype] * math.prod(shape)
        if end > len(frame):
            raise RemoteProtocolError("a tensor that reaches beyond its message")
        tensors.append(Tensor(dtype=dtype, shape=shape, data=frame[position:end]))
        position = end
    if position != len(frame):
        raise RemoteProtocolError(f"{len(frame) - position} bytes behind a message's tensors")
    return Message(header=fields, tensors=tensors)


def _parse_spec(spec: object) -> tuple[str, tuple[int, ...]]:
    match spec:
        case [str(dtype), list(shape)] if (
            dtype in ITEM_BYTES
            and len(shape) <= MAX_DIMENSIONS
            and all(type(size) is int and 0 <= size <= MAX_FRAME_BYTES for size in shape)
        ):
            return dtype, tuple(shape)
    raise RemoteProtocolError("a tensor without a known dtype and shape")

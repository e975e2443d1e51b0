"""``/raceme/files/1``: what is said about files. Calls and answers of ``net.rpc.lane``, several lanes at once.

    hashes  {"root": 32 bytes, "size": int, "first": int, "count": int}  ->  {} + u8 [32 * count]    count <= 16384
    piece   {"root": 32 bytes, "size": int, "index": int}                ->  {} + u8 [its size]      at most 1 MiB

Refusals: ``no-file`` (not here, or not any more), ``busy`` (come again after ``retry_after_s``), ``bad-input``.
"""

from __future__ import annotations

from typing import Any, Final

from net.errors import RemoteProtocolError
from net.files.pieces import FileId
from net.rpc.framing import Message, Tensor

PROTOCOL_ID: Final = "/raceme/files/1"
HASHES_AT_ONCE: Final = 16_384  # half a megabyte, for 16 GiB
NO_FILE: Final = "no-file"
BUSY: Final = "busy"


def fields_of(file: FileId) -> dict[str, Any]:
    """How a call names a file."""
    return {"root": file.root, "size": file.size}


def answer_with(data: bytes) -> Message:
    """An answer that is these bytes."""
    return Message(header={}, tensors=[Tensor(dtype="u8", shape=(len(data),), data=data)])


def bytes_of(answer: Message, size: int) -> memoryview:
    """The bytes that an answer is.

    Raises:
        RemoteProtocolError: it is not so many bytes.
    """
    match answer.tensors:
        case [Tensor(dtype="u8", shape=(count,), data=data)] if count == size:
            return memoryview(data)
    raise RemoteProtocolError(f"an answer that is not {size} bytes")

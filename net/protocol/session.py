"""A session on one node: calls on a lane of ``/raceme/session/1``. It ends with its stream.

    open   {"digest", "start", "end", "batch", "max_length"}  -> {"cache_tokens_left", "token"}
    resume {"token"}                                          -> {}
    step   {"position"} + hidden [batch, tokens, hidden]      -> {} + hidden [batch, tokens, hidden]

``position`` is where the step's first token stands. One that lies before the session's length sets it back:
what was there is forgotten. A stream that broke, rather than ended, leaves the session for a while: the same peer may
``resume`` it on another stream, and so may it while the first one is still there, which then has it no longer.
Refusals: ``no-session``, ``wrong-model``, ``wrong-span``, ``busy``, ``no-cache``, ``too-long``,
``bad-shape``, ``bad-dtype``, ``bad-position``, ``not-finite``, ``bad-input``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from net.errors import RemoteProtocolError
from net.protocol.announcement import MAX_BLOCKS
from net.rpc import packing

PROTOCOL_ID = "/raceme/session/1"
MAX_BATCH = 256
MAX_LENGTH = 2**20
TOKEN_BYTES = 16  # whoever guesses it would have to be the same peer, too


@dataclass(frozen=True, kw_only=True)
class Open:
    """What a client asks for: its model, blocks [start, end), rows, and the longest it may get."""

    digest: str
    start: int
    end: int
    batch: int
    max_length: int

    def to_fields(self) -> dict[str, Any]:
        return {
            "digest": self.digest,
            "start": self.start,
            "end": self.end,
            "batch": self.batch,
            "max_length": self.max_length,
        }

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Open:
        """Raises:
        RemoteProtocolError: missing or out of bounds.
        """
        end = packing.integer(fields, "end", 1, MAX_BLOCKS)
        return cls(
            digest=packing.field(fields, "digest", str, max_length=64),
            start=packing.integer(fields, "start", 0, end - 1),
            end=end,
            batch=packing.integer(fields, "batch", 1, MAX_BATCH),
            max_length=packing.integer(fields, "max_length", 1, MAX_LENGTH),
        )


def read_token(fields: Mapping[str, Any]) -> bytes:
    """Raises:
    RemoteProtocolError: no token, or one of another length.
    """
    token: bytes = packing.field(fields, "token", bytes, max_length=TOKEN_BYTES)
    if len(token) != TOKEN_BYTES:
        raise RemoteProtocolError(f"a token of {len(token)} bytes")
    return token


def read_position(fields: Mapping[str, Any]) -> int:
    """Raises:
    RemoteProtocolError: no position, or one out of bounds.
    """
    return packing.integer(fields, "position", 0, MAX_LENGTH)

"""Blocks of a model, as messages name them: ``{"digest": of the model, "start", "end"}``, for blocks [start, end)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from net.protocol.announcement import MAX_BLOCKS
from net.rpc import packing

MAX_DIGEST_CHARACTERS = 64


@dataclass(frozen=True, kw_only=True)
class ModelSpan:
    """What messages about blocks begin with.

    Attributes:
        digest: Of the model.
        start, end: Blocks [start, end).
    """

    digest: str
    start: int
    end: int

    def to_fields(self) -> dict[str, Any]:
        return {"digest": self.digest, "start": self.start, "end": self.end}


def read_span(fields: Mapping[str, Any]) -> tuple[str, int, int]:
    """The digest, and blocks [start, end).

    Raises:
        RemoteProtocolError: missing or out of bounds.
    """
    digest: str = packing.field(fields, "digest", str, max_length=MAX_DIGEST_CHARACTERS)
    end = packing.integer(fields, "end", 1, MAX_BLOCKS)
    return digest, packing.integer(fields, "start", 0, end - 1), end

"""A session on one node: messages both ways on a stream of ``/raceme/session/2``, which it ends with.

The client asks, with a number of the question's own (``"id"``) and ``"m"``, the method; an answer carries the number,
and its fields, or ``"e"`` (a code), ``"why"`` and perhaps ``"retry_after_s"``.

    open   {"digest", "start", "end", "batch", "max_length", "pads"?}    -> {"cache_tokens_left", "token", "push_token"}
    resume {"token"}                                                     -> {}
    link   {"peer", "addresses", "token"}                                -> {}
    step   {"position", "push", "keep", "order"?, "every"?} + hidden     -> {} + hidden of the last ``keep`` tokens
    resend {"position", "end", "push", "keep"}                           -> the same
    where  {"of"}                                                        -> {"state"}

``position`` is where a step's first token stands. One that lies before the session's length sets it back: what was
there is forgotten. A stream that broke, rather than ended, leaves the session for a while: the same peer may
``resume`` it on another stream, and so may it while the first one is still there, which then has it no longer.

A step with ``every`` is answered with what each of the session's blocks gives, one after another along the rows: the
last ``batch`` rows are what it gives without. It is not handed on (``push`` is 0), and its answer fits into a message.

**Push.** After ``link``, a node hands results straight to the next one, on a stream of ``/raceme/push/1``, as many
times as ``push`` says; the last one answers the client, with the number of the client's question, on the stream that
the client has to it. ``link`` names the next node and the ``push_token`` that it gave the client. A node that cannot
hand on answers itself, with the whole result and ``"unpushed"``. Whoever refuses a step that was handed on tells the
client.

    {"token"}                                         once, first; no answer but the stream's end if it is not known
    {"id", "position", "push", "keep", "order"?} + hidden

**Order.** A session's steps have rising numbers, on all its nodes together. A step whose number is not above all
before it has come late, whichever way, and is dropped: the client has done without it. ``resend`` hands on what steps
gave before, as far as the node has kept it (else ``no-history``); ``where`` is answered at once: ``unseen``,
``waiting``, ``running`` or ``done``. A message without a number is a notice: ``{"leaving": seconds}`` says how long the
session will still be served here.

Refusals: ``no-session``, ``wrong-model``, ``wrong-span``, ``busy``, ``no-cache``, ``too-long``, ``bad-shape``,
``bad-dtype``, ``bad-position``, ``not-finite``, ``bad-value``, ``bad-input``, ``no-history``, ``unreachable``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from net.addresses import Multiaddr
from net.dht import wire
from net.errors import RemoteProtocolError
from net.identity import PeerId
from net.protocol.announcement import MAX_BLOCKS
from net.rpc import packing

PROTOCOL_ID = "/raceme/session/2"
PUSH_PROTOCOL_ID = "/raceme/push/1"
MAX_BATCH = 256
MAX_LENGTH = 2**20
MAX_HOPS = 64
MAX_ID = 2**53
MAX_AHEAD = 8  # steps of one session that a node takes before the first has been done
TOKEN_BYTES = 16  # whoever guesses it would have to be the same peer, too


@dataclass(frozen=True, kw_only=True)
class Open:
    """What a client asks for: its model, blocks [start, end), rows, and the longest it may get."""

    digest: str
    start: int
    end: int
    batch: int
    max_length: int
    pads: tuple[int, ...] | None = None

    def to_fields(self) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "digest": self.digest,
            "start": self.start,
            "end": self.end,
            "batch": self.batch,
            "max_length": self.max_length,
        }
        if self.pads is not None:
            fields["pads"] = list(self.pads)
        return fields

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Open:
        """Raises:
        RemoteProtocolError: missing or out of bounds.
        """
        end = packing.integer(fields, "end", 1, MAX_BLOCKS)
        batch = packing.integer(fields, "batch", 1, MAX_BATCH)
        return cls(
            digest=packing.field(fields, "digest", str, max_length=64),
            start=packing.integer(fields, "start", 0, end - 1),
            end=end,
            batch=batch,
            max_length=packing.integer(fields, "max_length", 1, MAX_LENGTH),
            pads=_integers(fields, "pads", batch, MAX_LENGTH) if "pads" in fields else None,
        )


@dataclass(frozen=True, kw_only=True)
class Link:
    """Who is next: where to reach it, and the token that it gave the client for this."""

    peer_id: PeerId
    addresses: tuple[Multiaddr, ...]
    token: bytes

    def to_fields(self) -> dict[str, Any]:
        return {
            "peer": self.peer_id.to_bytes(),
            "addresses": wire.write_addresses(self.addresses),
            "token": self.token,
        }

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Link:
        """Raises:
        RemoteProtocolError: missing or malformed.
        """
        peer_id = packing.field(fields, "peer", bytes, max_length=wire.MAX_PEER_ID_BYTES)
        if not peer_id:
            raise RemoteProtocolError("a link to nobody")
        return cls(
            peer_id=PeerId(peer_id), addresses=wire.read_addresses(fields, "addresses"), token=read_token(fields)
        )


@dataclass(frozen=True, kw_only=True)
class Step:
    """Where a step's tokens stand, and what becomes of its result.

    Attributes:
        id: The question's number.
        position: Of the first token.
        push: How many more nodes it is handed on to.
        keep: How many tokens' results the last one answers with, at the end; 0 for none.
        order: For beam search: the row that each row was before.
        every: Whether results of every block are wanted.
    """

    id: int
    position: int
    push: int = 0
    keep: int = MAX_LENGTH
    order: tuple[int, ...] | None = None
    every: bool = False

    def to_fields(self) -> dict[str, Any]:
        fields: dict[str, Any] = {"id": self.id, "position": self.position, "push": self.push, "keep": self.keep}
        if self.order is not None:
            fields["order"] = list(self.order)
        if self.every:
            fields["every"] = True
        return fields

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Step:
        """Raises:
        RemoteProtocolError: missing or out of bounds.
        """
        order = None
        if "order" in fields:
            rows = packing.field(fields, "order", list, max_length=MAX_BATCH)
            order = _integers(fields, "order", len(rows), MAX_BATCH)
        step = cls(
            id=read_id(fields),
            position=packing.integer(fields, "position", 0, MAX_LENGTH),
            push=packing.integer(fields, "push", 0, MAX_HOPS),
            keep=packing.integer(fields, "keep", 0, MAX_LENGTH),
            order=order,
            every=packing.field(fields, "every", bool) if "every" in fields else False,
        )
        if step.every and step.push:
            raise RemoteProtocolError("results of every block are not handed on")
        return step


def read_id(fields: Mapping[str, Any], name: str = "id") -> int:
    """Raises:
    RemoteProtocolError: no number of a question.
    """
    return packing.integer(fields, name, 1, MAX_ID)


def read_end(fields: Mapping[str, Any], position: int) -> int:
    """Raises:
    RemoteProtocolError: no end, or one that is not behind ``position``.
    """
    return packing.integer(fields, "end", position + 1, MAX_LENGTH)


def read_token(fields: Mapping[str, Any], name: str = "token") -> bytes:
    """Raises:
    RemoteProtocolError: no token, or one of another length.
    """
    token: bytes = packing.field(fields, name, bytes, max_length=TOKEN_BYTES)
    if len(token) != TOKEN_BYTES:
        raise RemoteProtocolError(f"a token of {len(token)} bytes")
    return token


def _integers(fields: Mapping[str, Any], name: str, count: int, below: int) -> tuple[int, ...]:
    values = packing.field(fields, name, list, max_length=count)
    if len(values) != count or not all(type(value) is int and 0 <= value < below for value in values):
        raise RemoteProtocolError(f"{name!r} is no list of {count} numbers below {below}")
    return tuple(values)

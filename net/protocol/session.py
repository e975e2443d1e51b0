"""A session on one node: messages both ways on a stream of ``/raceme/session/2``, which it ends with.

The client asks, with a number of the question's own (``"id"``) and ``"m"``, the method; an answer carries the number,
and its fields, or ``"e"`` (a code), ``"why"`` and perhaps ``"retry_after_s"``.

    tune   {"digest", "start", "end", "at", what it is...} + numbers [m], f32    -> {}
    open   {"digest", "start", "end", "batch", "max_length", "push_token", "pads"?, "form"?, "codecs"?, "measures"?,
            "tuned"?}                                                    -> {"cache_tokens_left", "token", "form"?}
    resume {"token"}                                                     -> {}
    link   {"peer", "addresses", "token", "codecs"?}                     -> {}
    step   {"position", "push", "keep", "order"?, "every"?} + hidden     -> {} + hidden of the last ``keep`` tokens
    resend {"position", "end", "push", "keep"}                           -> the same
    where  {"of"}                                                        -> {"state"}
    sent   {}                                                            -> {"form", "tokens", "bytes", "error"?}

The client need not wait for the answer to ``open`` before it asks for more, nor for that to ``link``: a step that is to
be handed on waits a little for the next node to be reached.

**Tuning.** What the session adds within its blocks for itself alone comes before an ``open`` that is ``tuned``, in
pieces: ``at`` is the index of the first of a piece's numbers, in one vector for all of these blocks, and 0 begins anew.
Each piece says what it is a tuning of, and what it is: ``compute.tuning`` has these fields, and the order of numbers.
After a refusal, of a piece or of ``open``, the node has none of it any more.

``position`` is where a step's first token stands. One that lies before the session's length sets it back: what was
there is forgotten. A stream that broke, rather than ended, leaves the session for a while: the same peer may
``resume`` it on another stream, and so may it while the first one is still there, which then has it no longer.

A step with ``every`` is answered with what each of the session's blocks gives, one after another along the rows: the
last ``batch`` rows are what it gives without. It is not handed on (``push`` is 0), and its answer fits into a message.

**Push.** After ``link``, a node hands results straight to the next one, on a stream of ``/raceme/push/1``, as many
times as ``push`` says; the last one answers the client, with the number of the client's question, on the stream that
the client has to it. ``link`` names the next node and the ``push_token`` with which the client opens the session
there; who comes before that waits a little for it. A node that cannot hand on answers itself, with the whole result and
``"unpushed"``. Whoever refuses a step that was handed on tells the client.

    {"token"}                                         once, first; no answer but the stream's end if it is not known
    {"id", "position", "push", "keep", "order"?} + hidden

**Hidden states** are one tensor, in the form that the session was opened with (``float32`` if it names none) when they
come from a node, whoever gets them; what comes to it says itself which form it has. In one of floats this is a tensor
of that type, [b, t, d]. Whatever else they are, int8 or compressed, is bytes (``u8``, [n]), and beside the message's
other fields:

    {"form", "tokens", "codec"?}                ``tokens`` is t; b and d are the session's

``codecs`` are those that whoever names them can undo. Nodes announce theirs, and ``link`` passes on the next node's.
``sent`` is what the node has sent of the session, all ways together; with ``measures`` also how large its error is,
relative to it.

**Order.** A session's steps have rising numbers, on all its nodes together. A step whose number is not above all
before it has come late, whichever way, and is dropped: the client has done without it. ``resend`` hands on what steps
gave before, as far as the node has kept it (else ``no-history``); ``where`` is answered at once: ``unseen``,
``waiting``, ``running`` or ``done``. A message without a number is a notice: ``{"leaving": seconds}`` says how long the
session will still be served here.

Refusals: ``no-session``, ``wrong-model``, ``wrong-span``, ``busy``, ``no-cache``, ``too-long``, ``bad-shape``,
``bad-dtype``, ``bad-position``, ``not-finite``, ``bad-value``, ``bad-input``, ``no-history``, ``unreachable``.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from net.addresses import Multiaddr
from net.dht import wire
from net.errors import RemoteProtocolError
from net.identity import PeerId
from net.protocol.announcement import read_codecs
from net.protocol.span import ModelSpan, read_span
from net.rpc import packing

PROTOCOL_ID = "/raceme/session/2"
PUSH_PROTOCOL_ID = "/raceme/push/1"
MAX_BATCH = 256
MAX_LENGTH = 2**20
MAX_HOPS = 64
MAX_ID = 2**53
MAX_NUMBERS = 2**40  # of a tuning; nodes have bounds of their own
MAX_FORM_CHARACTERS = 16
MAX_ERROR = 1e3  # of what is sent, relative to it: there is no more
FORM = "float32"  # of sessions that name none
MAX_AHEAD = 8  # steps of one session that a node takes before the first has been done
TOKEN_BYTES = 16  # whoever guesses it would have to be the same peer, too


@dataclass(frozen=True, kw_only=True)
class Open(ModelSpan):
    """What a client asks for.

    Attributes:
        batch: Rows.
        max_length: The longest it may get.
        pads: With how many tokens of padding each row begins.
        push_token: Who knows it may hand steps on to the session.
        form: In which its results travel.
        codecs: Which the client can undo.
        measures: Whether to find out how large the form's error is.
        tuned: Whether what has come before is added within the blocks.
    """

    batch: int
    max_length: int
    pads: tuple[int, ...] | None = None
    push_token: bytes = field(default_factory=lambda: secrets.token_bytes(TOKEN_BYTES))
    form: str = FORM
    codecs: tuple[str, ...] = ()
    measures: bool = False
    tuned: bool = False

    def to_fields(self) -> dict[str, Any]:
        fields = {
            **super().to_fields(),
            "batch": self.batch,
            "max_length": self.max_length,
            "push_token": self.push_token,
            "form": self.form,
            "codecs": list(self.codecs),
        }
        if self.pads is not None:
            fields["pads"] = list(self.pads)
        if self.measures:
            fields["measures"] = True
        if self.tuned:
            fields["tuned"] = True
        return fields

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Open:
        """Raises:
        RemoteProtocolError: missing or out of bounds.
        """
        digest, start, end = read_span(fields)
        batch = packing.integer(fields, "batch", 1, MAX_BATCH)
        return cls(
            digest=digest,
            start=start,
            end=end,
            batch=batch,
            max_length=packing.integer(fields, "max_length", 1, MAX_LENGTH),
            pads=_integers(fields, "pads", batch, MAX_LENGTH) if "pads" in fields else None,
            push_token=read_token(fields, "push_token"),
            form=_form(fields),
            codecs=read_codecs(fields),
            measures=packing.field({"measures": False, **fields}, "measures", bool),
            tuned=packing.field({"tuned": False, **fields}, "tuned", bool),
        )


@dataclass(frozen=True, kw_only=True)
class Tune(ModelSpan):
    """Of what a piece of a tuning is; what the tuning is stands beside it.

    Attributes:
        at: Which number is the piece's first.
    """

    at: int

    def to_fields(self) -> dict[str, Any]:
        return {**super().to_fields(), "at": self.at}

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Tune:
        """Raises:
        RemoteProtocolError: missing or out of bounds.
        """
        digest, start, end = read_span(fields)
        return cls(digest=digest, start=start, end=end, at=packing.integer(fields, "at", 0, MAX_NUMBERS))


@dataclass(frozen=True, kw_only=True)
class Opened:
    """What a node answers.

    Attributes:
        token: By which the session can be resumed.
        form: In which its results will travel.
    """

    token: bytes
    form: str = FORM

    def to_fields(self) -> dict[str, Any]:
        return {"token": self.token, "form": self.form}

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Opened:
        """Raises:
        RemoteProtocolError: missing or out of bounds.
        """
        return cls(token=read_token(fields), form=_form(fields))


@dataclass(frozen=True, kw_only=True)
class Link:
    """Who is next: where to reach it, the token by which the client opens the session there, and which codecs it can
    undo.
    """

    peer_id: PeerId
    addresses: tuple[Multiaddr, ...]
    token: bytes
    codecs: tuple[str, ...] = ()

    def to_fields(self) -> dict[str, Any]:
        return {
            "peer": self.peer_id.to_bytes(),
            "addresses": wire.write_addresses(self.addresses),
            "token": self.token,
            "codecs": list(self.codecs),
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
            peer_id=PeerId(peer_id),
            addresses=wire.read_addresses(fields, "addresses"),
            token=read_token(fields),
            codecs=read_codecs(fields),
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


@dataclass(frozen=True, kw_only=True)
class Sent:
    """What one side has sent of a session.

    Attributes:
        form: In which.
        tokens: Of all rows.
        n_bytes: Of their hidden states.
        error: Root mean square of what was lost, relative to that of the values; ``None`` if it was not measured.
    """

    form: str
    tokens: int
    n_bytes: int
    error: float | None = None

    @property
    def bytes_per_token(self) -> float:
        """The average; 0 before anything was sent."""
        return self.n_bytes / self.tokens if self.tokens else 0.0

    def __str__(self) -> str:
        """For people: ``int8, 132 bytes a token, error 0.66 %``."""
        lost = "" if self.error is None else f", error {100 * self.error:.2g} %"
        return f"{self.form}, {self.bytes_per_token:.0f} bytes a token{lost}"

    def to_fields(self) -> dict[str, Any]:
        fields: dict[str, Any] = {"form": self.form, "tokens": self.tokens, "bytes": self.n_bytes}
        if self.error is not None:
            fields["error"] = self.error
        return fields

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Sent:
        """Raises:
        RemoteProtocolError: missing or out of bounds.
        """
        return cls(
            form=_form(fields),
            tokens=packing.integer(fields, "tokens", 0, MAX_ID),
            n_bytes=packing.integer(fields, "bytes", 0, MAX_ID),
            error=packing.number(fields, "error", 0.0, MAX_ERROR) if "error" in fields else None,
        )


def read_tokens(fields: Mapping[str, Any]) -> int:
    """Raises:
    RemoteProtocolError: no number of tokens of hidden states that travel as bytes.
    """
    return packing.integer(fields, "tokens", 1, MAX_LENGTH)


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


def _form(fields: Mapping[str, Any]) -> str:
    return packing.field({"form": FORM, **fields}, "form", str, max_length=MAX_FORM_CHARACTERS)


def _integers(fields: Mapping[str, Any], name: str, count: int, below: int) -> tuple[int, ...]:
    values = packing.field(fields, name, list, max_length=count)
    if len(values) != count or not all(type(value) is int and 0 <= value < below for value in values):
        raise RemoteProtocolError(f"{name!r} is no list of {count} numbers below {below}")
    return tuple(values)

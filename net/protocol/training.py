"""Training calls: whole sequences through blocks of one node, forwards and back, on a stream of ``/raceme/train/1``.

The client asks, with a number of the question's own (``"id"``) and ``"m"``, the method; an answer carries the number,
and its fields, or ``"e"`` (a code), ``"why"`` and perhaps ``"retry_after_s"``. Questions and answers are parcels
(``net.rpc.parcels``), for their tensors may be larger than a frame. Each question is answered once, in any order.

    tune      {"digest", "start", "end", "key", form fields...} + flat [n], f32   -> {}
    forward   {"digest", "start", "end", "rows", "tokens", "form", "key"?} + hidden   -> {} + hidden
    backward  the same + hidden, gradient                    -> {} + gradient of hidden [+ gradient of flat [n], f32]
    where     {"of"}                                         -> {"state"}, at once: waiting, running or unseen
    cancel    {"of"}                                         -> nothing; the call is answered, if it was not already,
                                                                and anything of it had come

**Hidden states**, and gradients with respect to them, are [rows, tokens, d], as bytes (``u8``, [n]) of the form that
the question names, without compression; see ``compute.wire_forms``.

**Tunings** are what the client trains inside of blocks [start, end). ``flat`` has all of it; which numbers mean what
follows from the form fields, see ``compute.tuning``. ``key`` is a SHA-256 of form, blocks and numbers, by which calls
name a tuning. A stream keeps the last 4, less where memory is scarce; a call that names one that is not there is
refused with ``no-tuning``. A call may follow its tuning without waiting for the answer.

A client has at most 4 questions under way (``where`` and ``cancel`` not counted); what is asked beyond is not read. One
that it has cancelled counts until it is answered. Of a call that is cancelled while it is being sent, or refused, no
more need be sent: ``cancel`` ends it.

A node keeps nothing between two calls. It holds as many bytes for a call as its question or its answer carries,
whichever are more, and puts off (``busy``) what it has no room for. Refusals: those of ``net.protocol.session``, and
``no-tuning``, ``cancelled``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from net.errors import RemoteProtocolError
from net.protocol import session
from net.protocol.span import ModelSpan, read_span
from net.rpc import packing

PROTOCOL_ID: Final = "/raceme/train/1"
MAX_CALLS: Final = 4  # of one stream at once
MAX_CALL_BYTES: Final = 256 << 20  # a sequence of 2,048 tokens and its gradient, 14,336 wide, in float32
MAX_TUNINGS: Final = 4  # that a stream keeps
KEY_BYTES: Final = 32
MAX_ROWS: Final = session.MAX_BATCH
STATES: Final = frozenset({"waiting", "running", "unseen"})


@dataclass(frozen=True, kw_only=True)
class Work(ModelSpan):
    """What a call is about: which sequences, through what.

    Attributes:
        rows: Sequences.
        tokens: Of each.
        form: In which hidden states travel, both ways.
        key: Of the tuning; ``None`` for none.
    """

    rows: int
    tokens: int
    form: str = session.FORM
    key: bytes | None = None

    def to_fields(self) -> dict[str, Any]:
        fields = {**super().to_fields(), "rows": self.rows, "tokens": self.tokens, "form": self.form}
        if self.key is not None:
            fields["key"] = self.key
        return fields

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Work:
        """Raises:
        RemoteProtocolError: missing or out of bounds.
        """
        digest, start, end = read_span(fields)
        return cls(
            digest=digest,
            start=start,
            end=end,
            rows=packing.integer(fields, "rows", 1, MAX_ROWS),
            tokens=packing.integer(fields, "tokens", 1, session.MAX_LENGTH),
            form=packing.field(fields, "form", str, max_length=session.MAX_FORM_CHARACTERS),
            key=read_key(fields) if "key" in fields else None,
        )


@dataclass(frozen=True, kw_only=True)
class Tune(ModelSpan):
    """Of which blocks a tuning is, and its key; its form fields stand beside these.

    Attributes:
        key: Its name.
    """

    key: bytes

    def to_fields(self) -> dict[str, Any]:
        return {**super().to_fields(), "key": self.key}

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Tune:
        """Raises:
        RemoteProtocolError: missing or out of bounds.
        """
        digest, start, end = read_span(fields)
        return cls(digest=digest, start=start, end=end, key=read_key(fields))


def read_key(fields: Mapping[str, Any]) -> bytes:
    """Raises:
    RemoteProtocolError: no key, or one of another length.
    """
    key: bytes = packing.field(fields, "key", bytes, max_length=KEY_BYTES)
    if len(key) != KEY_BYTES:
        raise RemoteProtocolError(f"a key of {len(key)} bytes")
    return key


def read_state(fields: Mapping[str, Any]) -> str:
    """Raises:
    RemoteProtocolError: none that a call can be in.
    """
    state = packing.field(fields, "state", str, max_length=16)
    if state not in STATES:
        raise RemoteProtocolError(f"a call is {state!r}")
    return state

"""What clients and nodes tell each other of forms and codecs: read as it was written, bounded, and optional."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from net.errors import RemoteProtocolError
from net.identity import PeerId
from net.protocol import session as wire
from net.protocol.announcement import MAX_CODEC_CHARACTERS, MAX_CODECS
from net.protocol.session import (
    MAX_ERROR,
    MAX_FORM_CHARACTERS,
    MAX_ID,
    MAX_LENGTH,
    Link,
    Open,
    Opened,
    Sent,
)
from net.rpc import packing

NAMES = st.text(max_size=MAX_FORM_CHARACTERS)
CODECS = st.lists(NAMES, max_size=MAX_CODECS).map(tuple)
TOKENS = st.binary(min_size=wire.TOKEN_BYTES, max_size=wire.TOKEN_BYTES)
ASKED = Open(digest="d", start=0, end=4, batch=1, max_length=8)
JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(), st.lists(st.text(max_size=40))
)


def travelled(fields: dict[str, Any]) -> dict[str, Any]:
    return packing.unpack(packing.pack(fields))


@given(form=NAMES, codecs=CODECS, measures=st.booleans(), tuned=st.booleans(), batch=st.integers(1, 3))
def test_what_is_asked_for_is_read(form: str, codecs: tuple[str, ...], measures: bool, tuned: bool, batch: int) -> None:
    asked = Open(
        digest="d", start=1, end=4, batch=batch, max_length=8, form=form, codecs=codecs, measures=measures, tuned=tuned
    )
    assert Open.from_fields(travelled(asked.to_fields())) == asked


@given(token=TOKENS, form=NAMES)
def test_what_is_answered_is_read(token: bytes, form: str) -> None:
    opened = Opened(token=token, form=form)
    assert Opened.from_fields(travelled(opened.to_fields())) == opened


@given(token=TOKENS, codecs=CODECS)
def test_links_are_read(token: bytes, codecs: tuple[str, ...]) -> None:
    link = Link(peer_id=PeerId(b"somebody"), addresses=(), token=token, codecs=codecs)
    assert Link.from_fields(travelled(link.to_fields())) == link


@given(
    form=NAMES,
    tokens=st.integers(0, MAX_ID),
    n_bytes=st.integers(0, MAX_ID),
    error=st.none() | st.floats(0, MAX_ERROR),
)
def test_what_was_sent_is_read(form: str, tokens: int, n_bytes: int, error: float | None) -> None:
    sent = Sent(form=form, tokens=tokens, n_bytes=n_bytes, error=error)
    assert Sent.from_fields(travelled(sent.to_fields())) == sent
    assert str(sent).startswith(f"{form}, ")


def test_those_who_say_nothing_of_forms_are_understood() -> None:
    fields = ASKED.to_fields()
    for name in ("form", "codecs", "measures"):
        fields.pop(name, None)
    assert Open.from_fields(fields) == ASKED
    assert (ASKED.form, ASKED.codecs, ASKED.measures) == ("float32", (), False)
    token = bytes(wire.TOKEN_BYTES)
    assert Opened.from_fields({"token": token}) == Opened(token=token)


@given(
    end=st.integers(1, 70),
    at=st.integers(0, wire.MAX_NUMBERS),
    others=st.dictionaries(st.sampled_from(["id", "rank", "scale", "targets"]), st.integers(-(2**63), 2**64 - 1)),
)
def test_what_a_tuning_is_of_is_read_beside_what_it_is(end: int, at: int, others: dict[str, int]) -> None:
    tune = wire.Tune(digest="d", start=end - 1, end=end, at=at)
    assert wire.Tune.from_fields(travelled({**others, **tune.to_fields()})) == tune


@given(name=st.sampled_from(["digest", "start", "end", "at"]), junk=JUNK)
def test_anything_else_that_a_tuning_may_be_of_is_read_or_refused(name: str, junk: Any) -> None:
    tune = wire.Tune(digest="d", start=0, end=4, at=0)
    try:
        read = wire.Tune.from_fields(tune.to_fields() | {name: junk})
    except RemoteProtocolError:
        return
    assert 0 <= read.start < read.end and 0 <= read.at <= wire.MAX_NUMBERS and len(read.digest) <= 64


@given(name=st.sampled_from(["form", "codecs", "measures", "tuned"]), junk=JUNK)
def test_anything_else_is_read_or_refused(name: str, junk: Any) -> None:
    try:
        asked = Open.from_fields(ASKED.to_fields() | {name: junk})
    except RemoteProtocolError:
        return
    assert len(asked.form) <= MAX_FORM_CHARACTERS
    assert len(asked.codecs) <= MAX_CODECS
    assert all(len(codec) <= MAX_CODEC_CHARACTERS for codec in asked.codecs)
    assert asked.measures in (True, False) and asked.tuned in (True, False)


@given(name=st.sampled_from(["form", "tokens", "bytes", "error"]), junk=JUNK)
def test_anything_else_said_to_have_been_sent_is_read_or_refused(name: str, junk: Any) -> None:
    try:
        sent = Sent.from_fields(Sent(form="int8", tokens=1, n_bytes=2, error=0.5).to_fields() | {name: junk})
    except RemoteProtocolError:
        return
    assert 0 <= sent.tokens <= MAX_ID and 0 <= sent.n_bytes <= MAX_ID
    assert sent.error is not None and 0 <= sent.error <= MAX_ERROR


@pytest.mark.parametrize("tokens", [0, -1, MAX_LENGTH + 1, True, 1.0, "1", None])
def test_a_number_of_tokens_is_one(tokens: Any) -> None:
    with pytest.raises(RemoteProtocolError):
        wire.read_tokens({"tokens": tokens})
    assert wire.read_tokens({"tokens": MAX_LENGTH}) == MAX_LENGTH


def test_what_was_sent_in_words() -> None:
    assert str(Sent(form="int8", tokens=10, n_bytes=1320, error=0.0066)) == "int8, 132 bytes a token, error 0.66 %"
    assert str(Sent(form="float32", tokens=0, n_bytes=0)) == "float32, 0 bytes a token"

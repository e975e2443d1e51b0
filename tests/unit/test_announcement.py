"""What nodes announce of round trips and of what waits: optional, bounded, small."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from net import records
from net.addresses import parse
from net.dht.wire import MAX_ADDRESSES
from net.errors import RecordError, RemoteProtocolError
from net.files.pieces import MAX_FILE_BYTES, FileId
from net.identity import Identity, PeerId
from net.protocol.announcement import (
    KIND,
    MAX_CODEC_CHARACTERS,
    MAX_CODECS,
    MAX_ROUND_TRIP_S,
    MAX_ROUND_TRIPS,
    MAX_WAITING,
    NodeAnnouncement,
)
from net.records import MAX_REMEMBERED_BYTES
from tests.unit.announcements import node, peer

KEY = bytes(32)
OWN = Identity.generate(bytes(32))


def announced(offer: NodeAnnouncement) -> NodeAnnouncement:
    """As others read it, out of a signed record."""
    envelope = records.sign(OWN, KIND, offer.to_body(), key=KEY, ttl_s=120).envelope
    return NodeAnnouncement.from_record(records.verify(envelope, key=KEY))


def own(offer: NodeAnnouncement, **changes: Any) -> NodeAnnouncement:
    return replace(offer, peer_id=OWN.peer_id, **changes)


@given(
    st.dictionaries(st.binary(min_size=1, max_size=64).map(PeerId), st.floats(0, MAX_ROUND_TRIP_S), max_size=32),
    st.floats(0, MAX_WAITING),
    st.lists(st.text(max_size=MAX_CODEC_CHARACTERS), max_size=MAX_CODECS).map(tuple),
    st.none() | st.builds(FileId, st.binary(min_size=32, max_size=32), st.integers(0, MAX_FILE_BYTES)),
)
def test_they_are_read_as_they_were_announced(
    round_trips: dict[PeerId, float], waiting: float, codecs: tuple[str, ...], files: FileId | None
) -> None:
    offer = own(node(1, 0, 4), round_trips=round_trips, waiting=waiting, codecs=codecs, files=files)
    assert announced(offer) == offer


def test_those_who_say_nothing_of_it_are_understood() -> None:
    body = node(1, 0, 4).to_body()
    assert not {"round_trips", "waiting", "codecs", "files"} & body.keys()
    offer = NodeAnnouncement._parse(peer(1), body)
    assert (offer.round_trips, offer.waiting, offer.codecs, offer.files) == ({}, 0.0, (), None)
    assert hash(offer) == hash(replace(offer, round_trips={peer(2): 0.1}))
    assert offer != replace(offer, round_trips={peer(2): 0.1})


def test_no_more_is_announced_than_is_read() -> None:
    many = {PeerId(bytes([number])): 0.1 for number in range(100)}
    offer = announced(own(node(1, 0, 4), round_trips=many))
    assert list(offer.round_trips) == list(many)[:MAX_ROUND_TRIPS]


def test_the_largest_is_small() -> None:
    far = {PeerId(bytes([0, 36, 8, 1, 18, 32, *[number] * 32])): 1 / 3 for number in range(MAX_ROUND_TRIPS)}
    relay = f"/ip6/2001:db8::1/udp/65535/quic-v1/p2p/{peer(3)}/p2p-circuit"
    offer = own(node(1, 0, 4), round_trips=far, waiting=1 / 3, addresses=(parse(relay),) * MAX_ADDRESSES, next=(0, 8))
    offer = replace(offer, files=FileId(bytes(32), MAX_FILE_BYTES))
    record = records.sign(OWN, KIND, offer.to_body(), key=KEY, ttl_s=120)
    assert len(record.envelope) < MAX_REMEMBERED_BYTES


@pytest.mark.parametrize(
    "bad",
    [
        {"codecs": None},
        {"codecs": [1]},
        {"codecs": ["x"] * (MAX_CODECS + 1)},
        {"codecs": ["x" * (MAX_CODEC_CHARACTERS + 1)]},
        {"round_trips": None},
        {"round_trips": []},
        {"round_trips": {"text": 0.1}},
        {"round_trips": {b"": 0.1}},
        {"round_trips": {bytes(65): 0.1}},
        {"round_trips": {b"a": -0.1}},
        {"round_trips": {b"a": MAX_ROUND_TRIP_S + 1}},
        {"round_trips": {b"a": math.nan}},
        {"round_trips": {b"a": True}},
        {"round_trips": {b"a": None}},
        {"round_trips": {bytes([number]): 0.1 for number in range(MAX_ROUND_TRIPS + 1)}},
        {"files": None},
        {"files": []},
        {"files": [bytes(32)]},
        {"files": [bytes(31), 1]},
        {"files": ["0" * 32, 1]},
        {"files": [bytes(32), -1]},
        {"files": [bytes(32), True]},
        {"files": [bytes(32), MAX_FILE_BYTES + 1]},
        {"files": [bytes(32), 1, 1]},
        {"waiting": -1.0},
        {"waiting": MAX_WAITING + 1},
        {"waiting": math.inf},
        {"waiting": math.nan},
        {"waiting": "1"},
        {"waiting": None},
    ],
    ids=str,
)
def test_what_is_out_of_bounds_is_no_announcement(bad: dict[str, Any]) -> None:
    body = {**own(node(1, 0, 4)).to_body(), **bad}
    with pytest.raises(RemoteProtocolError):
        NodeAnnouncement._parse(peer(1), body)
    record = records.sign(OWN, KIND, body, key=KEY, ttl_s=120)
    with pytest.raises(RecordError):
        NodeAnnouncement.from_record(record)

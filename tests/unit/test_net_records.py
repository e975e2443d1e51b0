"""Signed records, the store that keeps them, and the identities that sign them."""

from __future__ import annotations

import errno
import os
import stat
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from libp2p.peer.envelope import Envelope, make_unsigned, unmarshal_envelope

from net import records
from net.dht.store import MAX_RECORD_BYTES, MAX_RECORDS_PER_KEY, REMEMBER_SEQUENCE_S, RecordStore
from net.errors import IdentityError, RecordError
from net.identity import Identity, PeerId
from net.records import CLOCK_SKEW_S, DOMAIN, PAYLOAD_TYPE, Record, sign, verify
from net.rpc import packing
from tests.net_helpers import seeded

ALICE, EVE = seeded(21), seeded(22)
KEY = bytes(32)


def seal(signer: Identity, fields: dict[str, Any], domain: str = DOMAIN, payload_type: bytes = PAYLOAD_TYPE) -> bytes:
    payload = packing.pack(fields)
    return bytes(
        Envelope(
            public_key=signer.key_pair.public_key,
            payload_type=payload_type,
            raw_payload=payload,
            signature=signer.sign(make_unsigned(domain, payload_type, payload)),
        ).marshal_envelope()
    )


def fields(**changes: Any) -> dict[str, Any]:
    return {
        "v": 1,
        "kind": "node",
        "key": b"k" * 32,
        "peer": ALICE.peer_id.to_bytes(),
        "seq": 7,
        "issued": 1_000_000,
        "ttl": 120,
        "body": {"model": "bloom"},
        **changes,
    }


# Records


def test_a_record_round_trips() -> None:
    record = sign(ALICE, "node", {"model": "bloom"}, key=b"k" * 32, ttl_s=120)
    again = verify(record.envelope)
    assert again == record
    assert (again.kind, again.peer_id, again.body, again.ttl_s) == ("node", ALICE.peer_id, {"model": "bloom"}, 120)


def test_what_the_fields_below_change_is_good_otherwise() -> None:
    assert verify(seal(ALICE, fields()), now_s=1_000_000).sequence == 7


@pytest.mark.parametrize(
    "changes",
    [
        {"v": 2},
        {"kind": 5},
        {"kind": "k" * 65},
        {"peer": "text"},
        {"peer": bytes(65)},
        {"peer": EVE.peer_id.to_bytes()},  # signed by Alice, about Eve
        {"seq": -1},
        {"seq": "7"},
        {"seq": True},
        {"issued": 2**41},
        {"ttl": 0},
        {"ttl": 301},
        {"body": []},
    ],
)
def test_malformed_fields_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(RecordError):
        verify(seal(ALICE, fields(**changes)), now_s=1_000_000)


@pytest.mark.parametrize("missing", sorted(fields()))
def test_missing_fields_are_refused(missing: str) -> None:
    with pytest.raises(RecordError):
        verify(seal(ALICE, {k: v for k, v in fields().items() if k != missing}), now_s=1_000_000)


def test_a_record_about_another_is_refused() -> None:
    with pytest.raises(RecordError, match="somebody else signed"):
        verify(seal(EVE, fields()), now_s=1_000_000)


def test_a_swapped_public_key_is_refused() -> None:
    payload = packing.pack(fields())
    envelope = Envelope(
        public_key=ALICE.key_pair.public_key,
        payload_type=PAYLOAD_TYPE,
        raw_payload=payload,
        signature=EVE.sign(make_unsigned(DOMAIN, PAYLOAD_TYPE, payload)),
    )
    with pytest.raises(RecordError):
        verify(envelope.marshal_envelope(), now_s=1_000_000)


def test_a_signature_for_another_purpose_proves_nothing() -> None:
    with pytest.raises(RecordError):
        verify(seal(ALICE, fields(), domain="libp2p-peer-record"), now_s=1_000_000)
    with pytest.raises(RecordError):
        verify(seal(ALICE, fields(), payload_type=b"\x03\x01"), now_s=1_000_000)


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_any_changed_bit_is_noticed(data: st.DataObject) -> None:
    good = seal(ALICE, fields())
    position = data.draw(st.integers(0, len(good) - 1))
    changed = bytearray(good)
    changed[position] ^= 1 << data.draw(st.integers(0, 7))
    try:
        record = verify(bytes(changed), now_s=1_000_000)
    except RecordError:
        return
    assert (record.peer_id, record.sequence, record.body) == (ALICE.peer_id, 7, {"model": "bloom"})


@given(st.binary(max_size=200))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(RecordError):
        verify(data)


@pytest.mark.parametrize(
    ("offset", "good"),
    [
        (0, True),
        (-CLOCK_SKEW_S, True),
        (-CLOCK_SKEW_S - 1, False),
        (120 + CLOCK_SKEW_S, True),
        (121 + CLOCK_SKEW_S, False),
    ],
)
def test_clocks_may_differ_by_an_hour_and_no_more(offset: int, good: bool) -> None:
    envelope = seal(ALICE, fields())
    if good:
        assert verify(envelope, now_s=1_000_000 + offset).sequence == 7
    else:
        with pytest.raises(RecordError, match="expired"):
            verify(envelope, now_s=1_000_000 + offset)


def test_records_have_a_largest_size() -> None:
    with pytest.raises(RecordError):
        verify(bytes(records.MAX_ENVELOPE_BYTES + 1))
    with pytest.raises(RecordError):
        sign(ALICE, "node", {"x": bytes(records.MAX_ENVELOPE_BYTES)}, key=b"k" * 32, ttl_s=120)


def test_a_record_is_believed_only_under_the_key_it_was_signed_for() -> None:
    record = sign(ALICE, "node", {}, key=b"k" * 32, ttl_s=120)
    assert verify(record.envelope, key=b"k" * 32).sequence == record.sequence
    with pytest.raises(RecordError, match="signed for another key"):
        verify(record.envelope, key=b"l" * 32)


def test_the_same_bytes_are_checked_once_but_for_key_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    envelope = seal(ALICE, fields(seq=77))
    opened = []

    def count(data: bytes) -> Envelope:
        opened.append(data)
        return unmarshal_envelope(data)

    monkeypatch.setattr(records, "unmarshal_envelope", count)
    first = verify(envelope, now_s=1_000_000)
    assert verify(bytes(bytearray(envelope)), key=b"k" * 32, now_s=1_000_000) == first
    assert len(opened) == 1
    with pytest.raises(RecordError, match="signed for another key"):
        verify(envelope, key=b"l" * 32, now_s=1_000_000)
    with pytest.raises(RecordError, match="expired"):
        verify(envelope, now_s=1_000_121 + CLOCK_SKEW_S)
    for _ in range(2):  # nothing is remembered of what was refused
        with pytest.raises(RecordError):
            verify(envelope[:-1] + bytes([envelope[-1] ^ 1]), now_s=1_000_000)
    assert len(opened) == 3


def test_large_envelopes_are_not_kept_in_memory() -> None:
    held = records._read_once.cache_info().currsize
    verify(seal(ALICE, fields(body={"x": bytes(records.MAX_REMEMBERED_BYTES)})), now_s=1_000_000)
    assert records._read_once.cache_info().currsize == held
    assert records._read_once.cache_info().maxsize == records.REMEMBERED


# The store


def make(number: int = 1, sequence: int = 1, ttl_s: int = 100, **body: Any) -> Record:
    return Record(
        kind="node",
        key=b"k" * 32,
        peer_id=PeerId(b"\x00\x04" + number.to_bytes(4, "big")),
        sequence=sequence,
        issued_s=0,
        ttl_s=ttl_s,
        body=body,
        envelope=b"%d %d %r" % (number, sequence, body and 1),
    )


def test_the_store_keeps_the_newest_of_each_subject() -> None:
    store = RecordStore()
    store.put(KEY, make(sequence=1), 0.0)
    store.put(KEY, make(sequence=3), 1.0)
    store.put(KEY, make(2), 1.0)
    assert [(record.peer_id, record.sequence) for record in store.get(KEY, 2.0)] == [
        (make(1).peer_id, 3),
        (make(2).peer_id, 1),
    ]
    for sequence in (2, 3):
        with pytest.raises(RecordError, match="known already"):
            store.put(KEY, make(sequence=sequence, other=True), 2.0)
    store.put(KEY, make(sequence=3), 2.0)  # the very same again is no offence
    assert store.get(bytes(31) + b"\1", 2.0) == []


def test_the_same_record_again_does_not_live_longer() -> None:
    store = RecordStore()
    store.put(KEY, make(), 0.0)
    store.put(KEY, make(), 99.0)
    assert store.get(KEY, 100.0) == []


def test_a_withdrawal_hides_and_keeps_older_records_out() -> None:
    store = RecordStore()
    store.put(KEY, make(sequence=5), 0.0)
    store.put(KEY, make(sequence=6, withdrawn=True), 0.0)
    assert store.get(KEY, 0.0) == []
    with pytest.raises(RecordError):
        store.put(KEY, make(sequence=5), 1.0)
    store.put(KEY, make(sequence=7), 1.0)
    assert len(store.get(KEY, 1.0)) == 1


def test_records_expire_by_the_stores_own_clock_and_do_not_come_back() -> None:
    store = RecordStore()
    store.put(KEY, make(ttl_s=100), 1000.0)
    assert len(store.get(KEY, 1099.9)) == 1
    assert store.get(KEY, 1100.0) == []
    store.expire(1100.0)
    with pytest.raises(RecordError):
        store.put(KEY, make(ttl_s=100), 1101.0)


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 300), st.floats(0, 50)), max_size=12), st.data())
def test_expiring_forgets_what_is_due_and_nothing_else(puts: list[tuple[int, int, float]], data: st.DataObject) -> None:
    store, now = RecordStore(), 0.0
    due: dict[PeerId, float] = {}
    for sequence, (number, ttl_s, later_s) in enumerate(puts):
        now += later_s
        store.put(KEY, make(number, sequence=sequence, ttl_s=ttl_s), now)
        due[make(number).peer_id] = now + ttl_s
    for later_s in data.draw(st.lists(st.floats(0, 200), max_size=5)):
        now += later_s
        store.expire(now)
        alive = {entry.record.peer_id for entry in store._keys.get(KEY, {}).values() if entry.record is not None}
        assert alive == {peer_id for peer_id, until in due.items() if now < until}
        assert len(store._keys.get(KEY, {})) == len(due)
    store.expire(now + REMEMBER_SEQUENCE_S)
    assert store._keys == {}


def test_numbers_are_forgotten_in_the_end() -> None:
    store = RecordStore()
    store.put(KEY, make(sequence=5), 0.0)
    store.expire(REMEMBER_SEQUENCE_S)
    assert store._keys == {}


def test_a_full_key_takes_no_newcomer_while_all_its_records_live() -> None:
    store = RecordStore()
    for number in range(MAX_RECORDS_PER_KEY):
        store.put(KEY, make(number), 0.0)
    with pytest.raises(RecordError, match="under this key"):
        store.put(KEY, make(MAX_RECORDS_PER_KEY), 1.0)
    store.put(KEY, make(0, sequence=2), 1.0)  # those who are there may renew
    store.put(b"\1" * 32, make(MAX_RECORDS_PER_KEY), 1.0)  # other keys have room


def test_what_has_gone_does_not_keep_newcomers_out() -> None:
    store = RecordStore()
    for number in range(MAX_RECORDS_PER_KEY):
        store.put(KEY, make(number), float(number) / 1024)
    store.put(KEY, make(MAX_RECORDS_PER_KEY), 500.0)
    assert [record.peer_id for record in store.get(KEY, 500.0)] == [make(MAX_RECORDS_PER_KEY).peer_id]
    assert len(store._keys[KEY]) == MAX_RECORDS_PER_KEY


def test_a_record_that_no_answer_could_carry_is_not_kept() -> None:
    record = make()
    large = Record(**{**vars(record), "envelope": bytes(MAX_RECORD_BYTES + 1)})
    with pytest.raises(RecordError, match="bytes"):
        RecordStore().put(KEY, large, 0.0)


# Identities


def test_an_identity_lasts_in_a_file_that_only_its_owner_reads(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "node.key"
    first = Identity.load(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    first.close()
    second = Identity.load(path)
    assert second.peer_id == first.peer_id
    assert second.key_pair.public_key.verify(b"x", first.sign(b"x"))


def test_a_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    Identity.load(path).close()
    path.chmod(0o640)
    with pytest.raises(IdentityError, match="chmod 600"):
        Identity.load(path)


def test_a_key_in_use_is_refused_until_it_is_given_back(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    first = Identity.load(path)
    with pytest.raises(IdentityError, match="in use by another process"):
        Identity.load(path)
    first.close()
    Identity.load(path).close()


@pytest.mark.parametrize("content", [b"garbage", b"\x08\x01\x12\x40", os.urandom(64)])
def test_a_file_that_is_no_key_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "node.key"
    path.touch(0o600)
    path.write_bytes(content)
    with pytest.raises(IdentityError, match="not a libp2p Ed25519 private key"):
        Identity.load(path)
    assert path.read_bytes() == content


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    """It may be what is left of a key: making another one in its place would change who we are without a word."""
    path = tmp_path / "node.key"
    path.touch(0o600)
    with pytest.raises(IdentityError, match="is empty; put the key back, or delete the file"):
        Identity.load(path)
    assert path.read_bytes() == b""


def test_a_new_key_is_there_as_a_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(IdentityError, match="No space left on device"):
            Identity.load(tmp_path / "node.key")
    assert list(tmp_path.iterdir()) == []
    Identity.load(tmp_path / "node.key").close()
    assert [path.name for path in tmp_path.iterdir()] == ["node.key"]


def test_a_folder_is_no_key(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="directory"):
        Identity.load(tmp_path)


def test_a_failed_load_leaves_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    path.touch(0o600)
    path.write_bytes(b"garbage")
    for _ in range(2):
        with pytest.raises(IdentityError, match="not a libp2p"):
            Identity.load(path)


def test_default_takes_the_first_identity_that_nobody_uses(tmp_path: Path) -> None:
    first, second = Identity.default(tmp_path, "node"), Identity.default(tmp_path, "node")
    assert [first.path, second.path] == [tmp_path / "node.key", tmp_path / "node-1.key"]
    first.close()
    assert Identity.default(tmp_path, "node").peer_id == first.peer_id
    with pytest.raises(IdentityError, match="all 2 identities"):
        Identity.default(tmp_path, "node", slots=2)


def test_sequences_rise_across_restarts_even_when_the_clock_goes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "node.key"
    seen = []
    for clock in (2000.0, 2000.0, 500.0, 3000.0):
        monkeypatch.setattr(time, "time", lambda clock=clock: clock)
        identity = Identity.load(path)
        seen += [identity.next_sequence(), identity.next_sequence()]
        identity.close()
    assert seen == sorted(set(seen))
    assert seen[0] == 2_000_000
    assert seen[-2] == 3_000_000


def test_a_spoilt_sequence_file_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    Identity.load(path).close()
    (tmp_path / "node.key.seq").write_text("seven")
    with pytest.raises(IdentityError, match=r"node\.key\.seq does not hold a number; delete it"):
        Identity.load(path)

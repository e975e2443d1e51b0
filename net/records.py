"""Signed records: what a peer says of itself, in a form that others can pass on.

A record travels in libp2p's signed envelope (RFC 0002), under a domain of ours, so that a signature made
for one purpose proves nothing for another. Its payload is msgpack:

    {"v": 1, "kind": str, "key": bytes, "peer": bytes, "seq": int, "issued": int, "ttl": int, "body": map}

``key`` is where it lies in the DHT, ``issued`` in Unix seconds, ``ttl`` in seconds.

A record is believed only when the signer is its subject, its ``seq`` is greater than that of the record
held, and it has not expired. Clocks may differ by an hour; within that, receivers count the ``ttl`` on a
clock of their own.

Source: https://github.com/libp2p/specs/blob/master/RFC/0002-signed-envelopes.md
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from libp2p.peer.envelope import Envelope, make_unsigned, unmarshal_envelope

from net.errors import RecordError, RemoteProtocolError, StaleRecord
from net.identity import Identity, PeerId
from net.rpc import packing

DOMAIN = "raceme-record"
PAYLOAD_TYPE = b"/raceme/record"
VERSION = 1
MAX_ENVELOPE_BYTES = 64 * 1024
MAX_TTL_S = 300
CLOCK_SKEW_S = 3600
REMEMBERED = 4096  # envelopes whose signature was good; a look-up is handed each record by twenty servers
MAX_REMEMBERED_BYTES = 4096  # of one of them


@dataclass(frozen=True, kw_only=True)
class Record:
    """A record whose signature has been checked, beside the bytes that prove it."""

    kind: str
    key: bytes  # of the DHT under which it lies; nowhere else is it believed
    peer_id: PeerId
    sequence: int
    issued_s: int
    ttl_s: int
    body: Mapping[str, Any]
    envelope: bytes


def sign(identity: Identity, kind: str, body: Mapping[str, Any], *, key: bytes, ttl_s: int) -> Record:
    """A new record of ``identity`` about itself."""
    fields = {
        "v": VERSION,
        "kind": kind,
        "key": key,
        "peer": identity.peer_id.to_bytes(),
        "seq": identity.next_sequence(),
        "issued": int(time.time()),
        "ttl": ttl_s,
        "body": body,
    }
    payload = packing.pack(fields)
    envelope = Envelope(
        public_key=identity.key_pair.public_key,
        payload_type=PAYLOAD_TYPE,
        raw_payload=payload,
        signature=identity.sign(make_unsigned(DOMAIN, PAYLOAD_TYPE, payload)),
    ).marshal_envelope()
    if len(envelope) > MAX_ENVELOPE_BYTES:
        raise RecordError(f"a record of {len(envelope)} bytes: at most {MAX_ENVELOPE_BYTES} are carried")
    return verify(envelope)


def verify(data: bytes, *, key: bytes | None = None, now_s: float | None = None) -> Record:
    """Check an envelope and read its record.

    Args:
        data: the envelope.
        key: of the DHT, under which it was found; None for a record that was not looked up.
        now_s: Unix time; the clock's by default.

    Raises:
        RecordError: too large, malformed, badly signed, signed by another than its subject or for another
            key, or expired by more than clocks may differ (a ``StaleRecord``).
    """
    if len(data) > MAX_ENVELOPE_BYTES:
        raise RecordError(f"a record of {len(data)} bytes: at most {MAX_ENVELOPE_BYTES} are read")
    record = _read_once(data) if len(data) <= MAX_REMEMBERED_BYTES else _read(data)
    if key is not None and record.key != key:
        raise RecordError(f"a record of {record.peer_id} that was signed for another key")
    now = time.time() if now_s is None else now_s
    if not record.issued_s - CLOCK_SKEW_S <= now <= record.issued_s + record.ttl_s + CLOCK_SKEW_S:
        message = f"a record of {record.peer_id} that expired, or is from the future"
        raise StaleRecord(message, record.issued_s - now)
    return record


def _read(data: bytes) -> Record:
    """What an envelope says, if its subject signed it: all that is true of these bytes at any time, anywhere."""
    try:
        envelope = unmarshal_envelope(data)
        envelope.validate(DOMAIN)
    except Exception as error:  # protobuf's, the library's and the key type's own errors
        raise RecordError(f"no valid signed envelope: {error}") from error
    if envelope.payload_type != PAYLOAD_TYPE:
        raise RecordError("an envelope of another type")
    try:
        fields = packing.unpack(envelope.raw_payload)
        record = Record(
            kind=packing.field(fields, "kind", str, max_length=64),
            key=packing.field(fields, "key", bytes, max_length=64),
            peer_id=PeerId(packing.field(fields, "peer", bytes, max_length=64)),
            sequence=packing.integer(fields, "seq", 0, 2**63),
            issued_s=packing.integer(fields, "issued", 0, 2**40),
            ttl_s=packing.integer(fields, "ttl", 1, MAX_TTL_S),
            body=packing.field(fields, "body", dict),
            envelope=data,
        )
    except RemoteProtocolError as error:
        raise RecordError(f"a malformed record: {error}") from error
    if fields.get("v") != VERSION:
        raise RecordError(f"a record of version {fields.get('v')!r}, not {VERSION}")
    if PeerId.from_pubkey(envelope.public_key) != record.peer_id:
        raise RecordError(f"a record about {record.peer_id} that somebody else signed")
    return record


_read_once = functools.lru_cache(maxsize=REMEMBERED)(_read)

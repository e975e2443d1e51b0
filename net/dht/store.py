"""Signed records kept for others, by key and subject. No I/O; bounded; forgets by a clock of its own.

A withdrawal is handed out like a record until it expires, so that whoever looks sees that older ones are void.
The number of the last record of each subject outlives the record, so that an older one does not come back;
only when its place is wanted for a newcomer's record is such a number forgotten early.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from net.errors import RecordError
from net.identity import PeerId
from net.records import CLOCK_SKEW_S, MAX_TTL_S, Record

MAX_RECORD_BYTES = 40 * 1024  # so that one fits into an answer whose header is at most 64 KiB
MAX_RECORDS = 16_384
MAX_RECORDS_PER_KEY = 1024
REMEMBER_SEQUENCE_S = MAX_TTL_S + 2 * CLOCK_SKEW_S  # after that, its own expiry refuses an old record


@dataclass
class _Entry:
    record: Record | None
    sequence: int
    expires: float
    forget: float = field(default=0.0)

    @property
    def is_gone(self) -> bool:
        return self.record is None or is_withdrawal(self.record)


class RecordStore:
    """Times are seconds of any monotonic clock."""

    def __init__(self) -> None:
        self._keys: dict[bytes, dict[PeerId, _Entry]] = {}
        self._next_expiry = math.inf  # nothing is to be forgotten before

    def put(self, key: bytes, record: Record, now: float) -> None:
        """Keep a verified record.

        Raises:
            RecordError: an older or equal one than we have seen, one that is too large, or no room.
        """
        if len(record.envelope) > MAX_RECORD_BYTES:
            raise RecordError(f"a record of {len(record.envelope)} bytes: at most {MAX_RECORD_BYTES} are kept")
        self.expire(now)
        entries = self._keys.get(key, {})
        entry = entries.get(record.peer_id)
        if entry is not None and record.sequence <= entry.sequence:
            if entry.record is not None and record.envelope == entry.record.envelope:
                return  # the same again: nothing to refuse
            raise RecordError(f"record {record.sequence} of {record.peer_id}: {entry.sequence} is known already")
        if entry is None:
            if len(entries) >= MAX_RECORDS_PER_KEY and not _drop_oldest_tombstone(entries):
                raise RecordError(f"{len(entries)} records lie under this key, the most kept")
            if sum(map(len, self._keys.values())) >= MAX_RECORDS:
                raise RecordError(f"{MAX_RECORDS} records are kept here, the most allowed")
        expires = now + record.ttl_s
        self._keys.setdefault(key, {})[record.peer_id] = _Entry(
            record=record,
            sequence=record.sequence,
            expires=expires,
            forget=now + REMEMBER_SEQUENCE_S,
        )
        self._next_expiry = min(self._next_expiry, expires)

    def get(self, key: bytes, now: float) -> list[Record]:
        """The records under ``key`` that have neither expired nor been withdrawn."""
        return [record for record in self.get_all(key, now) if not is_withdrawal(record)]

    def get_all(self, key: bytes, now: float) -> list[Record]:
        """The same, with the withdrawals that have not expired."""
        return [
            entry.record
            for entry in self._keys.get(key, {}).values()
            if entry.record is not None and now < entry.expires
        ]

    def expire(self, now: float) -> None:
        if now < self._next_expiry:
            return
        self._next_expiry = math.inf
        for key, entries in list(self._keys.items()):
            for peer_id, entry in list(entries.items()):
                if now >= entry.forget:
                    del entries[peer_id]
                    continue
                if now >= entry.expires:
                    entry.record = None
                self._next_expiry = min(self._next_expiry, entry.expires if entry.record else entry.forget)
            if not entries:
                del self._keys[key]


def is_withdrawal(record: Record) -> bool:
    """Whether its subject takes back what it said under the key before."""
    return bool(record.body.get("withdrawn"))


def _drop_oldest_tombstone(entries: dict[PeerId, _Entry]) -> bool:
    """Make room by forgetting a number whose record is gone. False: all records are alive."""
    tombstones = [peer_id for peer_id, entry in entries.items() if entry.is_gone]
    if not tombstones:
        return False
    del entries[min(tombstones, key=lambda peer_id: entries[peer_id].forget)]
    return True

"""What one look-up makes of the records it is handed, without I/O: which are believed.

Of each subject the newest counts, a withdrawal too. A signature proves who said it, not that it still holds: whoever
has kept the last record of a server that died can hand it out for as long as clocks may differ. So a record that has
expired by our clock (or that comes from its future) is believed only when at least half of the nearest servers that
answered have it: honest ones count its ``ttl`` from when they took it, and forget it then. With clocks that agree, no
server is found longer than its ``ttl``; with clocks that do not, the many decide.
"""

from __future__ import annotations

from collections.abc import Collection

from net.dht.store import is_withdrawal
from net.identity import PeerId
from net.records import Record

FUTURE_S = 10  # what clocks that are kept by the network differ by, at most


class Gathering:
    """Args:
    kind: the records that are wanted; others are passed over.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._newest: dict[PeerId, Record] = {}
        self._witnesses: dict[PeerId, set[PeerId]] = {}

    def take(self, holder: PeerId, record: Record) -> None:
        """``holder`` handed out a record whose signature has been checked."""
        if record.kind != self._kind:
            return
        subject = record.peer_id
        known = self._newest.get(subject)
        if known is None or record.sequence > known.sequence:
            self._newest[subject] = record
        self._witnesses.setdefault(subject, set()).add(holder)

    def believed(self, nearest: Collection[PeerId], now_s: float) -> list[Record]:
        """The records to go by.

        Args:
            nearest: the servers nearest to the key that answered.
            now_s: Unix time.
        """
        return [
            record
            for subject, record in self._newest.items()
            if not is_withdrawal(record)
            and (
                record.issued_s - FUTURE_S <= now_s <= record.issued_s + record.ttl_s
                or 2 * len(self._witnesses[subject].intersection(nearest)) >= len(nearest)
            )
        ]

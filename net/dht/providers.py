"""Who provides what, kept for others: content keys to peers that say they have it. No I/O; bounded.

Nothing here is signed: a peer is believed to be who it is (it has told us itself, over a connection of its own), and
to be where it says. One network cannot fill a key, nor one peer the store; who is in stays until it fails to renew.

Source: https://github.com/libp2p/specs/blob/master/kad-dht/README.md#content-provider-advertisement-and-discovery
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from net.addresses import ip_group
from net.dht.table import Contact
from net.errors import RecordError
from net.identity import PeerId

TTL_S = 48 * 3600.0  # the specification's
MAX_PER_KEY = 128
MAX_PER_KEY_AND_GROUP = 8
MAX_PER_PROVIDER = 2048
MAX_ENTRIES = 65_536


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    contact: Contact
    group: str | None
    expires: float


class ProviderStore:
    """Times are seconds of any monotonic clock."""

    def __init__(self, *, ttl_s: float = TTL_S, max_entries: int = MAX_ENTRIES) -> None:
        self._ttl_s = ttl_s
        self._max_entries = max_entries
        self._keys: dict[bytes, dict[PeerId, _Entry]] = {}
        self._of: Counter[PeerId] = Counter()  # how many keys each provides
        self._next_expiry = math.inf

    def __len__(self) -> int:
        return self._of.total()

    def put(self, key: bytes, provider: Contact, now: float) -> None:
        """``provider`` says that it has ``key``, from ``provider.seen_at``; anew, or for the first time.

        Raises:
            RecordError: there is no room for it.
        """
        self.expire(now)
        entries = self._keys.get(key, {})
        group = None if provider.seen_at is None else ip_group(provider.seen_at)
        others = [entry for peer_id, entry in entries.items() if peer_id != provider.peer_id]
        if len(others) >= MAX_PER_KEY:
            raise RecordError(f"{len(others)} peers provide this key, the most kept")
        if group is not None and sum(entry.group == group for entry in others) >= MAX_PER_KEY_AND_GROUP:
            raise RecordError(f"{MAX_PER_KEY_AND_GROUP} peers of {group} provide this key, the most kept")
        if provider.peer_id not in entries:
            if self._of[provider.peer_id] >= MAX_PER_PROVIDER:
                raise RecordError(f"{provider.peer_id} provides {MAX_PER_PROVIDER} keys, the most kept")
            if len(self) >= self._max_entries:
                raise RecordError(f"{self._max_entries} entries are kept here, the most allowed")
            self._of[provider.peer_id] += 1
        expires = now + self._ttl_s
        self._keys.setdefault(key, {})[provider.peer_id] = _Entry(contact=provider, group=group, expires=expires)
        self._next_expiry = min(self._next_expiry, expires)

    def drop(self, key: bytes, peer_id: PeerId) -> None:
        """Forget that the peer provides it."""
        entries = self._keys.get(key, {})
        if entries.pop(peer_id, None) is not None:
            self._forget(peer_id)
        if not entries:
            self._keys.pop(key, None)

    def get(self, key: bytes, now: float) -> list[Contact]:
        """Who provides it, the latest renewed last."""
        entries = [entry for entry in self._keys.get(key, {}).values() if now < entry.expires]
        return [entry.contact for entry in sorted(entries, key=lambda entry: entry.expires)]

    def expire(self, now: float) -> None:
        if now < self._next_expiry:
            return
        for key, entries in list(self._keys.items()):
            for peer_id in [peer_id for peer_id, entry in entries.items() if now >= entry.expires]:
                self.drop(key, peer_id)
        left = (entry.expires for entries in self._keys.values() for entry in entries.values())
        self._next_expiry = min(left, default=math.inf)

    def _forget(self, peer_id: PeerId) -> None:
        self._of[peer_id] -= 1
        if not self._of[peer_id]:
            del self._of[peer_id]

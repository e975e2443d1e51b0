"""The routing table: servers that we know, more of them the nearer they are. No I/O.

Bounds against one stranger filling it: ``k`` per bucket, three per IP group in all and two in a bucket.
Servers that have answered stay; a newcomer takes the place only of one that has failed since.

Source: Maymounkov and Mazieres, Kademlia (2002), 2.4; limits as in go-libp2p-kad-dht.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from net.addresses import Multiaddr, ip_group
from net.dht import keys
from net.identity import PeerId

K = 20
PER_IP_GROUP = 3
PER_IP_GROUP_AND_BUCKET = 2


@dataclass(frozen=True, kw_only=True)
class Contact:
    """A DHT server and where it is.

    Attributes:
        seen_at: where it called from, which it cannot make up; None when it has not.
    """

    peer_id: PeerId
    addresses: tuple[Multiaddr, ...]
    seen_at: Multiaddr | None = None

    @cached_property
    def position(self) -> int:
        """Where it is among the keys."""
        return int.from_bytes(keys.of_peer(self.peer_id), "big")

    @cached_property
    def groups(self) -> frozenset[str]:
        """The IP groups it occupies (loopback has none)."""
        known = self.addresses if self.seen_at is None else (*self.addresses, self.seen_at)
        return frozenset(group for address in known if (group := ip_group(address)))


@dataclass(kw_only=True)
class _Slot:
    contact: Contact
    failures: int = 0


class RoutingTable:
    def __init__(self, own: PeerId) -> None:
        self._own = own
        self._key = keys.of_peer(own)
        self._buckets: dict[int, dict[PeerId, _Slot]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._buckets.values()))

    def __contains__(self, peer_id: PeerId) -> bool:
        return peer_id in self._buckets.get(self._bucket(peer_id), {})

    @property
    def contacts(self) -> list[Contact]:
        return [slot.contact for bucket in self._buckets.values() for slot in bucket.values()]

    def add(self, contact: Contact) -> bool:
        """Take note of a server that has answered or called. False: there is no room for it."""
        if contact.peer_id == self._own or not contact.addresses:
            return False
        index = self._bucket(contact.peer_id)
        bucket = self._buckets.setdefault(index, {})
        known = bucket.pop(contact.peer_id, None)
        if known is not None and contact.seen_at is None:
            contact = replace(contact, seen_at=known.contact.seen_at)
        if not self._is_diverse(contact, bucket):
            if known is not None:
                bucket[contact.peer_id] = known  # at its old addresses
            return False
        if len(bucket) >= K:
            failed = [peer for peer, slot in bucket.items() if slot.failures]
            if not failed:
                return False
            del bucket[max(failed, key=lambda peer: bucket[peer].failures)]
        bucket[contact.peer_id] = _Slot(contact=contact)
        return True

    def failed(self, peer_id: PeerId) -> None:
        """It did not answer: out at the second time, or before when its place is wanted."""
        bucket = self._buckets.get(self._bucket(peer_id), {})
        slot = bucket.get(peer_id)
        if slot is not None:
            slot.failures += 1
            if slot.failures >= 2:
                del bucket[peer_id]

    def remove(self, peer_id: PeerId) -> None:
        self._buckets.get(self._bucket(peer_id), {}).pop(peer_id, None)

    def closest(self, target: bytes, count: int = K) -> list[Contact]:
        """The ``count`` known servers nearest to ``target``."""
        place = int.from_bytes(target, "big")
        return sorted(self.contacts, key=lambda contact: contact.position ^ place)[:count]

    def refresh_targets(self, random_bytes: bytes) -> Sequence[bytes]:
        """Keys to look up so that the buckets stay full: our own, and a random one."""
        return [self._key, random_bytes]

    def _bucket(self, peer_id: PeerId) -> int:
        return keys.common_prefix(self._key, keys.of_peer(peer_id))

    def _is_diverse(self, contact: Contact, bucket: dict[PeerId, _Slot]) -> bool:
        for group in contact.groups:
            here = sum(group in slot.contact.groups for slot in bucket.values())
            everywhere = sum(group in other.groups for other in self.contacts)
            if here >= PER_IP_GROUP_AND_BUCKET or everywhere >= PER_IP_GROUP:
                return False
        return True

"""The routing table: servers that we know, more of them the nearer they are. No I/O.

Bounds against one stranger filling it: ``k`` per bucket, three per IP group in all and two in a bucket.
Servers that have answered stay; a newcomer takes the place only of one that has failed since.

Source: Maymounkov and Mazieres, Kademlia (2002), 2.4; limits as in go-libp2p-kad-dht.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from net.addresses import Multiaddr, ip_group
from net.dht import keys
from net.identity import PeerId
from net.nat import endpoints

K = 20
PER_IP_GROUP = 3
PER_IP_GROUP_AND_BUCKET = 2


_ip_group = functools.lru_cache(maxsize=4096)(ip_group)


def _position(peer_id: PeerId) -> int:
    return int.from_bytes(keys.of_peer(peer_id), "big")


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
        return _position(self.peer_id)

    @cached_property
    def groups(self) -> frozenset[str]:
        """The IP groups it occupies: of its public addresses, or if it has none, of all (loopback has none).

        Private addresses are the same in many homes, and one relay stands before many of them.
        """
        known = self.addresses if self.seen_at is None else (*self.addresses, self.seen_at)
        return _ip_groups(filter(endpoints.is_public, known)) or _ip_groups(known)


def _ip_groups(known: Iterable[Multiaddr]) -> frozenset[str]:
    return frozenset(group for address in known if (group := _ip_group(address)))


def closest(target: bytes, contacts: Iterable[Contact], count: int = K) -> list[Contact]:
    """The ``count`` nearest to ``target``, nearest first, nobody twice."""
    place = int.from_bytes(target, "big")
    by_distance = {contact.position ^ place: contact for contact in contacts}
    return [by_distance[distance] for distance in sorted(by_distance)[:count]]


@dataclass(kw_only=True)
class _Slot:
    contact: Contact
    failures: int = 0


class _Bucket(dict[PeerId, _Slot]):
    """Slots by peer, and how many of them each IP group occupies."""

    def __init__(self) -> None:
        super().__init__()
        self.groups: Counter[str] = Counter()


class RoutingTable:
    def __init__(self, own: PeerId) -> None:
        self._own = own
        self._key = keys.of_peer(own)
        self._place = int.from_bytes(self._key, "big")
        self._buckets: dict[int, _Bucket] = {}
        self._groups: Counter[str] = Counter()  # over all buckets

    def __len__(self) -> int:
        return sum(map(len, self._buckets.values()))

    def __contains__(self, peer_id: PeerId) -> bool:
        return self._slot(peer_id) is not None

    @property
    def contacts(self) -> list[Contact]:
        return [slot.contact for bucket in self._buckets.values() for slot in bucket.values()]

    def add(self, contact: Contact) -> bool:
        """Take note of a server that has answered or called. False: there is no room for it."""
        if contact.peer_id == self._own or not contact.addresses:
            return False
        bucket = self._buckets.setdefault(self._distance_bits(contact.position), _Bucket())
        known = bucket.get(contact.peer_id)
        if known is not None:
            if contact.seen_at is None and known.contact.seen_at is not None:
                contact = replace(contact, seen_at=known.contact.seen_at)
            if contact == known.contact:
                known.failures = 0
                return True
            self._count(bucket, known.contact, -1)
        failed = [peer for peer, slot in bucket.items() if slot.failures] if len(bucket) >= K else []
        if known is None and len(bucket) >= K and not failed:
            return False
        if not self._is_diverse(contact, bucket):
            if known is not None:
                self._count(bucket, known.contact, 1)  # at its old addresses
            return False
        if known is None and failed:
            self._drop(bucket, max(failed, key=lambda peer: bucket[peer].failures))
        bucket[contact.peer_id] = _Slot(contact=contact)
        self._count(bucket, contact, 1)
        return True

    def failed(self, peer_id: PeerId) -> None:
        """It did not answer: out at the second time, or before when its place is wanted."""
        slot = self._slot(peer_id)
        if slot is not None:
            slot.failures += 1
            if slot.failures >= 2:
                self.remove(peer_id)

    def remove(self, peer_id: PeerId) -> None:
        bucket = self._buckets.get(self._distance_bits(_position(peer_id)))
        if bucket is not None and peer_id in bucket:
            self._drop(bucket, peer_id)

    def closest(self, target: bytes, count: int = K) -> list[Contact]:
        """The ``count`` known servers nearest to ``target``."""
        return closest(target, self.contacts, count)

    def _slot(self, peer_id: PeerId) -> _Slot | None:
        return self._buckets.get(self._distance_bits(_position(peer_id)), {}).get(peer_id)

    def _distance_bits(self, position: int) -> int:
        """The bucket: how many bits are left when the common prefix is taken away."""
        return (self._place ^ position).bit_length()

    def _drop(self, bucket: _Bucket, peer_id: PeerId) -> None:
        self._count(bucket, bucket.pop(peer_id).contact, -1)

    def _count(self, bucket: _Bucket, contact: Contact, change: int) -> None:
        for counts in (bucket.groups, self._groups):
            for group in contact.groups:
                counts[group] += change
                if not counts[group]:
                    del counts[group]

    def _is_diverse(self, contact: Contact, bucket: _Bucket) -> bool:
        return all(
            bucket.groups[group] < PER_IP_GROUP_AND_BUCKET and self._groups[group] < PER_IP_GROUP
            for group in contact.groups
        )

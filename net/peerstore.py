"""Where peers are: addresses that we have used ourselves apart from those we have only heard of. Bounded."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from net.addresses import Multiaddr
from net.identity import PeerId

MAX_PEERS = 4096
MAX_ADDRESSES_PER_PEER = 16


@dataclass
class _Entry:
    confirmed: OrderedDict[Multiaddr, None] = field(default_factory=OrderedDict)
    hearsay: OrderedDict[Multiaddr, None] = field(default_factory=OrderedDict)


class Peerstore:
    """The least recently touched peer goes first when it is full."""

    def __init__(self, max_peers: int = MAX_PEERS) -> None:
        self._max_peers = max_peers
        self._entries: OrderedDict[PeerId, _Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def addresses(self, peer_id: PeerId) -> list[Multiaddr]:
        """Confirmed ones first, the latest before."""
        entry = self._entries.get(peer_id)
        if entry is None:
            return []
        return list(dict.fromkeys([*reversed(entry.confirmed), *reversed(entry.hearsay)]))

    def confirm(self, peer_id: PeerId, address: Multiaddr) -> None:
        """An authenticated connection was made there."""
        self._put(self._entry(peer_id).confirmed, [address])

    def hear(self, peer_id: PeerId, addresses: Iterable[Multiaddr]) -> None:
        """Somebody says that the peer is there."""
        self._put(self._entry(peer_id).hearsay, addresses)

    def _entry(self, peer_id: PeerId) -> _Entry:
        entry = self._entries.setdefault(peer_id, _Entry())
        self._entries.move_to_end(peer_id)
        while len(self._entries) > self._max_peers:
            self._entries.popitem(last=False)
        return entry

    @staticmethod
    def _put(store: OrderedDict[Multiaddr, None], addresses: Iterable[Multiaddr]) -> None:
        for address in addresses:
            store[address] = None
            store.move_to_end(address)
            while len(store) > MAX_ADDRESSES_PER_PEER:
                store.popitem(last=False)

"""Budgets that strangers meet. Each fails fast and says which budget it was.

Figures: go-libp2p's resource manager defaults, unless a comment says otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from net.addresses import Multiaddr, ip_group, relay_of
from net.errors import LimitExceeded
from net.identity import PeerId


@dataclass(frozen=True, kw_only=True)
class Limits:
    """All budgets of one host."""

    connections: int = 1000
    connections_per_peer: int = 8
    connections_per_ip_group: int = 8
    # Through one relay, which carries strangers from anywhere: their IPs are not known, and its own says nothing of
    # them. Inbound they come through relays of our choice alone, of which there are few. Ours.
    connections_per_relay: int = 64
    handshakes: int = 128  # connections whose peer is not known yet; ours
    inbound_streams_per_connection: int = 256
    handshake_s: float = 15.0
    negotiate_s: float = 10.0
    dial_s: float = 4.0  # one address; ours
    dial_private_s: float = 1.5  # the same at a private address, until something answers: it is near, or not there
    dial_stagger_s: float = 0.1  # between the starts of two addresses of one peer; ours
    relay_delay_s: float = 0.5  # before a relayed address, behind direct ones


class ConnectionCounts:
    """Who holds how many connections. Slots are held by ``with`` and so cannot outlive a connection."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._groups: Counter[str] = Counter()
        self._peers: Counter[bytes] = Counter()
        self.total = 0

    @contextmanager
    def connection(self, remote: Multiaddr) -> Iterator[None]:
        """Hold one slot for a connection from or to ``remote``.

        Raises:
            LimitExceeded: no slot is left in all, or for the address's IP group, or for the relay it leads through.
        """
        relay = relay_of(remote)
        group = ip_group(remote) if relay is None else f"the relay {relay.peer_id}"
        most = self._limits.connections_per_ip_group if relay is None else self._limits.connections_per_relay
        if self.total >= self._limits.connections:
            raise LimitExceeded(f"{self.total} connections are open, the most allowed in all")
        if group is not None and self._groups[group] >= most:
            raise LimitExceeded(f"{self._groups[group]} connections with {group} are open, the most allowed")
        self.total += 1
        if group is not None:
            self._groups[group] += 1
        try:
            yield
        finally:
            self.total -= 1
            if group is not None:
                _release(self._groups, group)

    @contextmanager
    def peer(self, peer_id: PeerId) -> Iterator[None]:
        """Hold one slot for a connection with ``peer_id``.

        Raises:
            LimitExceeded: the peer has its share.
        """
        key = peer_id.to_bytes()
        if self._peers[key] >= self._limits.connections_per_peer:
            raise LimitExceeded(f"{self._peers[key]} connections with {peer_id} are open, the most allowed")
        self._peers[key] += 1
        try:
            yield
        finally:
            _release(self._peers, key)


K = TypeVar("K")


def _release(counts: Counter[K], key: K) -> None:
    counts[key] -= 1
    if counts[key] <= 0:
        del counts[key]

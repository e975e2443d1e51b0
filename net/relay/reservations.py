"""What a relay has promised to whom: reservations and circuits, counted. No I/O.

A peer with a reservation can be asked for circuits as long as it is connected; a peer without one may ask for circuits
to those who have one. Each budget is counted by peer, by IP group, and in all; who is refused is told which one it was.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from net.errors import NetError
from net.identity import PeerId
from net.relay.wire import Status
from net.transports.base import TrafficLimit


@dataclass(frozen=True, kw_only=True)
class RelayLimits:
    """Budgets of one relay. Figures: go-libp2p's, unless a comment says otherwise."""

    reservations: int = 128
    reservations_per_ip_group: int = 8
    reservation_s: float = 3600.0
    circuits: int = 512  # ours; with the window below, they hold 1.3 GiB at the very worst
    circuits_per_peer: int = 16
    circuits_per_ip_group: int = 8  # of those who ask for them; ours
    # Ours. One connection carries all that two peers have to say, and a second may come up while they dial each other
    # at once. Where many users share one target's link, nobody gets more of it by opening more circuits.
    circuits_per_pair: int = 2
    circuit_window_bytes: int = 1024 * 1024  # in each direction on their way into the relay; ours: 12.5 MB/s at 80 ms
    circuit_idle_s: float = 120.0  # without a byte either way; muxers ping every 30 s at most; ours
    # What others cut at, after 128 KiB and 2 minutes, is not limited: a fair share of ``bytes_per_s`` is enough.
    circuit_limit: TrafficLimit | None = None
    bytes_per_s: float | None = None  # forwarded in all; None: what the machine can do


class Refused(NetError):
    """A budget or a rule says no.

    Attributes:
        status: what the peer is told.
    """

    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True, kw_only=True)
class _Reservation:
    expires_at: float
    group: str | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Circuit:
    """A slot. ``group`` is the IP group of ``source``, None where groups do not count."""

    source: PeerId
    target: PeerId
    group: str | None


class Reservations:
    """``now`` is seconds of any monotonic clock."""

    def __init__(self, limits: RelayLimits) -> None:
        self._limits = limits
        self._held: dict[PeerId, _Reservation] = {}
        self._circuits: set[Circuit] = set()
        self._by_peer: Counter[PeerId] = Counter()
        self._by_group: Counter[str] = Counter()
        self._by_pair: Counter[tuple[PeerId, PeerId]] = Counter()

    def __contains__(self, peer_id: object) -> bool:
        return peer_id in self._held

    @property
    def peers(self) -> list[PeerId]:
        """Who holds a reservation, perhaps one that has ended since ``expire`` was called."""
        return list(self._held)

    @property
    def circuits(self) -> int:
        return len(self._circuits)

    def reserve(self, peer_id: PeerId, group: str | None, now: float) -> float:
        """Give or renew a reservation: when it ends.

        Raises:
            Refused: there is no room for another.
        """
        self.expire(now)
        others = [held for other, held in self._held.items() if other != peer_id]
        if len(others) >= self._limits.reservations:
            raise Refused(Status.RESERVATION_REFUSED, f"{len(others)} peers hold reservations, the most allowed")
        same = sum(held.group == group for held in others)
        if group is not None and same >= self._limits.reservations_per_ip_group:
            raise Refused(Status.RESERVATION_REFUSED, f"{same} peers of {group} hold reservations, the most allowed")
        expires_at = now + self._limits.reservation_s
        self._held[peer_id] = _Reservation(expires_at=expires_at, group=group)
        return expires_at

    def holds(self, peer_id: PeerId, now: float) -> bool:
        held = self._held.get(peer_id)
        return held is not None and now < held.expires_at

    def drop(self, peer_id: PeerId) -> None:
        """It is gone. Its circuits end by themselves."""
        self._held.pop(peer_id, None)

    def clear(self) -> None:
        """Nobody holds a reservation any more."""
        self._held.clear()

    def expire(self, now: float) -> None:
        """Forget the reservations that have ended."""
        for peer_id in [each for each, held in self._held.items() if now >= held.expires_at]:
            del self._held[peer_id]

    def open_circuit(self, source: PeerId, target: PeerId, group: str | None, now: float) -> Circuit:
        """A slot for a circuit that ``source``, of IP ``group``, asks for. Give it back with ``close_circuit``.

        Raises:
            Refused: the target has no reservation, or a budget is used up.
        """
        if source == target:
            raise Refused(Status.PERMISSION_DENIED, "a circuit from a peer to itself")
        if not self.holds(target, now):
            raise Refused(Status.NO_RESERVATION, f"{target} has no reservation")
        limits = self._limits
        counts: list[tuple[str, int, int]] = [
            ("in all", len(self._circuits), limits.circuits),
            (f"with {source}", self._by_peer[source], limits.circuits_per_peer),
            (f"with {target}", self._by_peer[target], limits.circuits_per_peer),
            ("between these two", self._by_pair[source, target], limits.circuits_per_pair),
        ]
        if group is not None:
            counts.append((f"from {group}", self._by_group[group], limits.circuits_per_ip_group))
        for what, count, most in counts:
            if count >= most:
                raise Refused(Status.RESOURCE_LIMIT_EXCEEDED, f"{count} circuits are open {what}, the most allowed")
        circuit = Circuit(source=source, target=target, group=group)
        self._circuits.add(circuit)
        self._count(circuit, 1)
        return circuit

    def close_circuit(self, circuit: Circuit) -> None:
        """Again is nothing."""
        if circuit in self._circuits:
            self._circuits.remove(circuit)
            self._count(circuit, -1)

    def _count(self, circuit: Circuit, change: int) -> None:
        self._by_peer[circuit.source] += change
        self._by_peer[circuit.target] += change
        self._by_pair[circuit.source, circuit.target] += change
        if circuit.group is not None:
            self._by_group[circuit.group] += change
        if change < 0:
            for counter in (self._by_peer, self._by_pair, self._by_group):
                for key in [key for key, count in counter.items() if not count]:
                    del counter[key]

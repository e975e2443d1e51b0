"""Reservations for a host that others cannot reach: as many as are wanted, at relays that it finds by itself.

While we have fewer than that, known peers are asked, those that we are connected with first: whoever speaks the hop
protocol and grants a reservation is our relay until the connection or the reservation ends, and is then replaced.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from net import errors
from net.addresses import PeerAddress, ip_group, is_relayed
from net.identity import PeerId
from net.transports.circuit import CircuitTransport, Reservation

if TYPE_CHECKING:
    from net.dht.service import Dht
    from net.host import Host

__all__ = ["Candidates", "RelayClient", "RelayClientSettings", "known_servers"]

logger = logging.getLogger(__name__)

MAX_DOUBLINGS = 16  # of a pause, which has a limit long before

Candidates = Callable[[], Awaitable[Iterable[PeerAddress]]]


@dataclass(frozen=True, kw_only=True)
class RelayClientSettings:
    """How hard to look. All are our own figures."""

    attempt_s: float = 5.0  # for one candidate, from the dial to the reservation
    attempts: int = 3  # side by side for each reservation that is missing: one that does not answer holds nobody up
    candidates_s: float = 10.0  # for the candidates to be named
    search_s: float = 10.0  # before candidates are asked for again when all known ones have failed
    steady_s: float = 10.0  # a reservation that was held for so long was a good one: its relay is asked again at once
    backoff_s: float = 2.0  # before a candidate that failed is tried again; doubled each time that somebody else is
    # there (where nobody is, our own network is down, and whoever answers first tells that it is mended),
    max_backoff_s: float = 3600.0  # up to this
    max_candidates: int = 64  # remembered


@dataclass(kw_only=True)
class _Candidate:
    relay: PeerAddress
    failures: int = 0  # since it held a reservation for long
    not_before: float = -math.inf


@dataclass(kw_only=True, eq=False)
class _Slot:
    """An attempt, or with ``reservation`` what came of it."""

    relay: PeerAddress
    scope: trio.CancelScope
    reservation: Reservation | None = None
    since: float = math.inf  # when that was made


class RelayClient:
    """Keeps reservations while ``run`` runs; ``want`` says how many. Their addresses are in ``host.addresses``.

    Args:
        host: has a ``CircuitTransport``.
        candidates: names peers that may be relays, best first; asked when those known are not enough.
        settings: how hard to look.

    Raises:
        LocalProtocolError: the host cannot listen through relays.
    """

    def __init__(self, host: Host, candidates: Candidates, settings: RelayClientSettings | None = None) -> None:
        self._host = host
        self._circuits = _circuit_transport(host)
        self._name_candidates = candidates
        self._settings = settings or RelayClientSettings()
        self._known: OrderedDict[PeerId, _Candidate] = OrderedDict()
        self._slots: dict[PeerId, _Slot] = {}
        self._wanted = 0
        self._changed = trio.Event()

    @property
    def reservations(self) -> list[Reservation]:
        """What we have now."""
        return [slot.reservation for slot in self._slots.values() if slot.reservation is not None]

    def want(self, count: int) -> None:
        """Have ``count`` reservations from now on: 0 for who can be reached, 2 for who cannot."""
        self._wanted = count
        self._changed.set()

    def network_changed(self) -> None:
        """Whoever could not be reached before may be reached now."""
        for candidate in self._known.values():
            candidate.failures, candidate.not_before = 0, -math.inf
        self._changed.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Get, renew and replace reservations until cancelled; what is announced follows by itself."""
        try:
            async with trio.open_nursery() as nursery:
                task_status.started()
                while True:
                    self._changed = trio.Event()
                    await self._adjust(nursery)
                    with trio.CancelScope(deadline=self._next_at()):
                        await self._changed.wait()
        finally:
            self._slots.clear()
            self._announce()

    # Deciding

    def _missing(self) -> int:
        return self._wanted - len(self.reservations)

    def _next_at(self) -> float:
        """When there is something to do, should nothing happen."""
        if self._missing() <= 0:
            return math.inf
        now = trio.current_time()
        waiting = [each.not_before for each in self._known.values() if each.relay.peer_id not in self._slots]
        return min(now + self._settings.search_s, *(at for at in waiting if at > now), math.inf)

    async def _adjust(self, nursery: trio.Nursery) -> None:
        """Begin what attempts are due, or let go what is too much."""
        missing = self._missing()
        if missing <= 0:
            slots = sorted(self._slots.values(), key=lambda slot: slot.reservation is not None)
            for slot in slots[: len(slots) - self._wanted]:  # attempts first
                slot.scope.cancel()
            return
        due = self._due()
        if not due and len(self._slots) == len(self.reservations):
            await self._ask_for_candidates()
            due = self._due()
        attempts = missing * self._settings.attempts - (len(self._slots) - len(self.reservations))
        for candidate in due[: max(0, attempts)]:
            slot = self._slots[candidate.relay.peer_id] = _Slot(relay=candidate.relay, scope=trio.CancelScope())
            nursery.start_soon(self._hold, candidate, slot)

    def _due(self) -> list[_Candidate]:
        """Whom to ask now: those we are connected with first, and such as are not in one network with our relays."""
        now = trio.current_time()
        groups = {ip_group(each.relay.address) for each in self.reservations} - {None}

        def badness(candidate: _Candidate) -> tuple[int, bool, bool]:
            connected = self._host.swarm.connection(candidate.relay.peer_id) is not None
            return candidate.failures, ip_group(candidate.relay.address) in groups, not connected

        free = [
            each for each in self._known.values() if each.relay.peer_id not in self._slots and now >= each.not_before
        ]
        return sorted(free, key=badness)

    async def _ask_for_candidates(self) -> None:
        found: Iterable[PeerAddress] = ()
        try:
            with trio.move_on_after(self._settings.candidates_s):
                found = await self._name_candidates()
        except errors.NetError as error:
            logger.warning("no relays could be looked for: %s", error)
        for relay in found:
            if relay.peer_id == self._host.peer_id or is_relayed(relay.address):
                continue
            known = self._known.setdefault(relay.peer_id, _Candidate(relay=relay))
            known.relay = relay
            self._known.move_to_end(relay.peer_id)
        while len(self._known) > self._settings.max_candidates:
            self._known.popitem(last=False)

    # Holding

    async def _hold(self, candidate: _Candidate, slot: _Slot) -> None:
        """One slot, from the attempt to its end: the boundary for what its relay does."""
        try:
            with slot.scope:
                await self._reserve(candidate, slot)
        except* errors.NetError as group:
            now = trio.current_time()
            if now - slot.since >= self._settings.steady_s:
                candidate.failures = 0
                candidate.not_before = now
            else:
                is_dead = isinstance(group.exceptions[0], errors.DialError)
                nobody_is_there = is_dead and not self._host.swarm.connections
                doublings = 0 if nobody_is_there else min(candidate.failures, MAX_DOUBLINGS)
                pause_s = self._settings.backoff_s * 2.0**doublings
                candidate.failures += 1
                candidate.not_before = now + min(pause_s, self._settings.max_backoff_s)
            if slot.reservation is not None:
                self._host.swarm.check()  # not the relay but our own network may have failed
            logger.info("%s: %s", candidate.relay.peer_id, group.exceptions[0])
        finally:
            if self._slots.get(candidate.relay.peer_id) is slot:
                del self._slots[candidate.relay.peer_id]
            self._announce()
            self._changed.set()

    async def _reserve(self, candidate: _Candidate, slot: _Slot) -> None:
        relay = candidate.relay
        async with trio.open_nursery() as nursery:
            with trio.move_on_after(self._settings.attempt_s) as attempt:
                await self._host.connect(relay.peer_id, [relay.address])
                if self._missing() <= 0:
                    return  # others were faster
                slot.reservation = await nursery.start(self._circuits.reserve, relay, self._host.swarm.accept)
            if attempt.cancelled_caught:
                raise errors.PeerFailed(relay.peer_id, f"no reservation within {self._settings.attempt_s:g} s")
            slot.since = trio.current_time()
            self._announce()
            self._changed.set()

    def _announce(self) -> None:
        found = [address for each in self.reservations for address in each.addresses]
        self._host.relayed = list(dict.fromkeys(found))


def known_servers(dht: Dht, bootstrap: Sequence[PeerAddress] = ()) -> Candidates:
    """Candidates for ``RelayClient``: the bootstrap nodes, then the servers in the routing table."""

    async def name() -> list[PeerAddress]:
        contacts = [
            PeerAddress(address=address, peer_id=contact.peer_id)
            for contact in dht.table.contacts
            for address in contact.addresses[:1]
        ]
        return [*reversed(contacts), *bootstrap]  # the last ones named are remembered longest

    return name


def _circuit_transport(host: Host) -> CircuitTransport:
    for transport in host.swarm.transports:
        if isinstance(transport, CircuitTransport):
            return transport
    raise errors.LocalProtocolError("the host has no CircuitTransport: it cannot listen through relays")

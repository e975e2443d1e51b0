"""How far nodes are from here: what connections measure anyway, and a look at some others in the background.

Nobody waits for it. A chain is chosen by what is known at the time, and a session that runs moves when more is known.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import trio

from net import errors
from net.host import Host
from net.identity import PeerId
from net.ping import ping_once
from net.protocol.announcement import NodeAnnouncement

logger = logging.getLogger(__name__)

MOST: Final = 32  # nodes that are looked at: each costs a connection
AT_A_TIME: Final = 4
ROUND: Final = 8  # nodes that are looked at together, and then nobody for ...
EVERY_S: Final = 20.0
AGAIN_S: Final = 300.0  # before one is looked at again, whether or not it answered
KEEP_S: Final = 1800.0  # for which a measurement is better than a guess
LOOK_S: Final = 3.0  # for one of them


@dataclass(frozen=True, kw_only=True)
class Sighting:
    """What was found of a node, and when.

    Attributes:
        round_trip_s: ``None`` if it did not answer.
    """

    at: float
    round_trip_s: float | None


class Candidates:
    """Whom to look at, and what came of it. No I/O; times are seconds on any clock that does not go back."""

    def __init__(self, shuffled: Callable[[list[PeerId]], list[PeerId]]) -> None:
        """Begin with nothing.

        Args:
            shuffled: puts some in another order.
        """
        self._shuffled = shuffled
        self._seen: dict[PeerId, Sighting] = {}
        self._round_at = -math.inf

    def choose(self, nodes: Sequence[NodeAnnouncement], connected: set[PeerId], now: float) -> list[PeerId]:
        """The next ones to be looked at, which are then taken to be under way; mostly none.

        Half of them are those that announce that they compute the fastest, the others are any.
        """
        self._seen = {peer: each for peer, each in self._seen.items() if now - each.at < KEEP_S}
        if now - self._round_at < EVERY_S:
            return []
        room = min(ROUND, MOST - len(self._seen))
        due = [node for node in nodes if node.peer_id not in connected and self._is_due(node.peer_id, now)]
        due.sort(key=lambda node: -node.decode_tokens_per_s * (node.end - node.start))
        peers = list(dict.fromkeys(node.peer_id for node in due))
        known = [peer for peer in peers if peer in self._seen]  # they take no further room
        fresh = [peer for peer in peers if peer not in self._seen]
        fastest = max(0, room) // 2
        chosen = [*fresh[:fastest], *self._shuffled(fresh[fastest:])][: max(0, room)]
        chosen += known[: ROUND - len(chosen)]
        if chosen:
            self._round_at = now
        for peer in chosen:
            before = self._seen.get(peer)
            self._seen[peer] = Sighting(at=now, round_trip_s=None if before is None else before.round_trip_s)
        return chosen

    def _is_due(self, peer: PeerId, now: float) -> bool:
        seen = self._seen.get(peer)
        return seen is None or now - seen.at >= AGAIN_S

    def found(self, peer: PeerId, round_trip_s: float | None, now: float) -> None:
        """What came of a look; ``None`` if nothing did."""
        self._seen[peer] = Sighting(at=now, round_trip_s=round_trip_s)

    def round_trip_s(self, peer: PeerId) -> float | None:
        """As far as is known."""
        seen = self._seen.get(peer)
        return None if seen is None else seen.round_trip_s


class Nearness:
    """See the module. Belongs to one event loop."""

    def __init__(self, host: Host, nursery: trio.Nursery) -> None:
        """Begin with what connections know.

        Args:
            host: whose connections are asked, and who dials.
            nursery: for looks that nobody waits for.
        """
        self._host = host
        self._nursery = nursery
        self._candidates = Candidates(lambda peers: random.sample(peers, len(peers)))

    def round_trips(self, peers: Iterable[PeerId]) -> Mapping[PeerId, float]:
        """In seconds, of those of whom it is known."""
        return {peer: seconds for peer in peers if (seconds := self._round_trip_s(peer)) is not None}

    def relayed(self, peers: Iterable[PeerId]) -> Mapping[PeerId, bool]:
        """Whether the connection with each goes through a relay, where there is one."""
        connections = ((peer, self._host.swarm.connection(peer)) for peer in peers)
        return {peer: connection.relayed for peer, connection in connections if connection is not None}

    def _round_trip_s(self, peer: PeerId) -> float | None:
        connection = self._host.swarm.connection(peer)
        measured = None if connection is None else connection.mux.round_trip_s
        return self._candidates.round_trip_s(peer) if measured is None else measured

    def look_at(self, nodes: Sequence[NodeAnnouncement]) -> None:
        """Measure some of them soon, if that has not been done lately. At most ``ROUND`` in ``EVERY_S``, and ``MOST``
        in all, whatever is asked for.

        Args:
            nodes: those that a session may come to use.
        """
        connected = {connection.peer_id for connection in self._host.swarm.connections}
        chosen = set(self._candidates.choose(nodes, connected, trio.current_time()))
        if chosen:
            addressed = {node.peer_id: node for node in nodes if node.peer_id in chosen}
            self._nursery.start_soon(self._look_at_all, list(addressed.values()))

    async def _look_at_all(self, nodes: list[NodeAnnouncement]) -> None:
        places = trio.CapacityLimiter(AT_A_TIME)
        async with trio.open_nursery() as nursery:
            for node in nodes:
                nursery.start_soon(self._look_at_one, node, places)

    async def _look_at_one(self, node: NodeAnnouncement, places: trio.CapacityLimiter) -> None:
        round_trip_s = None
        async with places:
            with trio.move_on_after(LOOK_S):
                try:
                    await self._host.connect(node.peer_id, node.addresses)
                    round_trip_s = await ping_once(self._host, node.peer_id, timeout_s=LOOK_S)
                except errors.NetError as error:
                    logger.info("no round trip measured with %s: %s", node.peer_id, error)
        self._candidates.found(node.peer_id, round_trip_s, trio.current_time())

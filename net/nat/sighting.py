"""Where a relay sees the ports of ours that nobody has seen so far.

A host that has come to its relay over TCP knows no address at which it could be met over QUIC, and the other way
round; likewise with IPv4 and IPv6. Two peers whose ways to the relay differed could tell each other nothing of use. So
each dials the relay once more for every kind of address that it listens on and has not been seen at, asks, and leaves.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

import trio

from net import errors
from net.addresses import Multiaddr, relay_of
from net.host import Host
from net.identify import identify_over
from net.identity import PeerId
from net.nat import endpoints
from net.swarm import Connection

logger = logging.getLogger(__name__)

KINDS = {(ip, *above) for ip in ("ip4", "ip6") for above in (("tcp",), ("udp", "quic-v1"))}
LOOK_S = 10.0  # all of a look
FRESH_S = 90.0  # routers forget after 120 s; a TCP port of ours can be used for the same way again after 60 s
LEAVE_LOOKS, LEAVE_S = 10, 0.5  # while others use the connection, it is not ours to close


class RelaySights:
    """What relays have told lately.

    Args:
        host: whose ports.
        can_meet: whether an address may lead across two NATs.
    """

    def __init__(self, host: Host, can_meet: Callable[[Multiaddr], bool]) -> None:
        self._host = host
        self._can_meet = can_meet
        self._seen: dict[tuple[str, ...], tuple[Multiaddr, float]] = {}
        self._looking: set[tuple[str, ...]] = set()

    @property
    def addresses(self) -> list[Multiaddr]:
        """Where we have been seen."""
        now = trio.current_time()
        return [address for address, at in self._seen.values() if now - at < FRESH_S]

    def forget(self) -> None:
        """The network has changed: none of it holds any more."""
        self._seen.clear()

    async def look(self, relayed: Connection, known: Iterable[Multiaddr]) -> None:
        """Have the relay that carries a connection see what is missing among ``known``."""
        found = {endpoints.shape(address) for address in [*known, *self.addresses] if self._can_meet(address)}
        listening = {endpoints.shape(address) for address in self._host.listening}
        missing = (listening & KINDS) - found - self._looking
        relay = relay_of(relayed.remote)
        connection = None if relay is None else self._host.swarm.connection(relay.peer_id)
        if not missing or connection is None:
            return
        self._looking |= missing
        try:
            with trio.move_on_after(LOOK_S):
                message = await identify_over(self._host, connection)
                told = [address for data in message.listen_addrs if (address := endpoints.parse(data)) is not None]
                async with trio.open_nursery() as nursery:
                    for kind in missing:
                        there = [each for each in told if endpoints.shape(each) == kind and self._can_meet(each)]
                        nursery.start_soon(self._see, connection.peer_id, kind, there[:1])
        except errors.NetError as error:
            logger.debug("%s does not say where else it is: %s", connection.peer_id, error)
        finally:
            self._looking -= missing

    async def _see(self, relay: PeerId, kind: tuple[str, ...], there: Sequence[Multiaddr]) -> None:
        try:
            connection = await self._host.swarm.punch(relay, there, listener=False)
            try:
                message = await identify_over(self._host, connection)
                seen = endpoints.parse(message.observed_addr)
                if seen is not None and endpoints.shape(seen) == kind and self._is_from_listener(connection):
                    self._seen[kind] = seen, trio.current_time()
            finally:
                await _leave(connection)
        except errors.NetError as error:
            logger.debug("%s cannot tell where it sees us: %s", relay, error)

    def _is_from_listener(self, connection: Connection) -> bool:
        """Whether it was dialled from a port that we listen on: another one is mapped elsewhere."""
        ours = None if connection.local is None else endpoints.read(connection.local)
        ports = {(each.transport, each.port) for each in map(endpoints.read, self._host.listening) if each is not None}
        return ours is not None and (ours.transport, ours.port) in ports


async def _leave(connection: Connection) -> None:
    """End it, unless others have found a use for it."""
    for _ in range(LEAVE_LOOKS):
        if not connection.mux.open_streams:
            connection.mux.close()
            return
        await trio.sleep(LEAVE_S)

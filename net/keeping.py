"""Which of a peer's connections is used, and which connections are let go. No I/O.

Two peers that dial each other at once have two connections for a moment. Both use the same one, and the peer with the
lower PeerId closes the other when its streams have ended: were both to decide, they might each close one. A direct
connection is used rather than one through a relay, whichever is older, so that new streams move to it at once.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import TYPE_CHECKING

from net.identity import PeerId
from net.limits import Limits

if TYPE_CHECKING:
    from net.swarm import Connection

SIMULTANEOUS_S = 5.0  # connections whose ages differ by less were dialled at once
GRACE_S = 10.0  # after its last stream was opened, an idle connection may still be wanted
FULL, EASED = 0.9, 0.8  # of the connections allowed: where letting go begins, and how far it goes


def preferred(connections: Sequence[Connection], me: PeerId) -> Connection:
    """The one that both sides use: a direct one, if there is any; of these the newest, since whoever dialled it knew of
    no other that works; of those that were dialled at once, the lower PeerId's."""
    connections = [each for each in connections if not each.relayed] or connections
    newest = max(connection.since for connection in connections)
    recent = [connection for connection in connections if newest - connection.since < SIMULTANEOUS_S]
    return min(recent, key=lambda connection: (_dialler(connection, me), -connection.since))


def decides(me: PeerId, peer_id: PeerId) -> bool:
    """Whether it is ours to close a needless connection with ``peer_id``."""
    return bool(me.to_bytes() < peer_id.to_bytes())


def superfluous(connections: Sequence[Connection], me: PeerId) -> list[Connection]:
    """Of one peer's connections, those that can be closed now: not preferred, and nobody uses them."""
    best = preferred(connections, me) if connections else None
    return [each for each in connections if each is not best and not each.mux.open_streams]


def prunable(
    connections: Sequence[Connection], limits: Limits, now: float, kept: Sequence[Container[PeerId]] = ()
) -> list[Connection]:
    """Idle connections to close when nearly all that are allowed are open, the longest unused first; none with those
    who are in one of ``kept``."""
    if len(connections) <= FULL * limits.connections:
        return []
    idle = [each for each in connections if not each.mux.open_streams and now - each.mux.used_at >= GRACE_S]
    idle = [each for each in idle if not any(each.peer_id in some for some in kept)]
    idle.sort(key=lambda connection: connection.mux.used_at)
    return idle[: len(connections) - int(EASED * limits.connections)]


def _dialler(connection: Connection, me: PeerId) -> bytes:
    return bytes((me if connection.outbound else connection.peer_id).to_bytes())

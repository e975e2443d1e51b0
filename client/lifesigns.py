"""Which nodes have not shown that they are there when they were asked to: nobody should be sent there in a hurry.

A node that is lost is often not lost alone. So as soon as one does not answer, all that are connected and could be used
are asked to show that they are there, which costs a ping each; who does not is known before it is needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import trio

from net.host import Host
from net.identity import PeerId
from net.swarm import Connection

MOST: Final = 32  # that are asked
KEEP_S: Final = 10.0  # for which it matters that somebody did not answer


class LifeSigns:
    """See the module. Belongs to one event loop."""

    def __init__(self, host: Host) -> None:
        """Begin with nothing.

        Args:
            host: whose connections are asked.
        """
        self._swarm = host.swarm
        self._asked: dict[PeerId, tuple[Connection, float]] = {}  # and when

    def ask(self, peers: Iterable[PeerId]) -> None:
        """Have those that are connected show that they are there."""
        now = trio.current_time()
        self._asked = {peer: asked for peer, asked in self._asked.items() if now < asked[1] + KEEP_S}
        for peer in list(peers)[:MOST]:
            connection = self._swarm.connection(peer)
            if connection is not None:
                self._asked[peer] = connection, now
                connection.mux.check()

    def missed(self, peers: Iterable[PeerId]) -> dict[PeerId, str]:
        """Those that were asked lately, have not answered, and have not been met again since."""
        now = trio.current_time()
        return {peer: "has not shown that it is there" for peer in peers if self._is_missed(peer, now)}

    def _is_missed(self, peer: PeerId, now: float) -> bool:
        connection, asked_at = self._asked.get(peer, (None, -KEEP_S))
        if connection is None or now >= asked_at + KEEP_S or now < connection.mux.doubt_at:
            return False
        return self._swarm.connection(peer) in (None, connection)

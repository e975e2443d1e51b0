"""Which nodes have not shown that they are there when they were asked to: nobody should be sent there in a hurry.

A node that is lost is often not lost alone. So as soon as one does not answer, all that are connected and could be used
are asked to show that they are there, which costs a ping each; who does not is known before it is needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import trio

from net.host import Host
from net.identity import PeerId
from net.mux.base import Muxer
from net.swarm import Connection

SILENT_S: Final = 0.35  # without an answer, or so many round trips, and a node may be gone:
SILENT_ROUND_TRIPS: Final = 2.5
UNMEASURED_S: Final = 0.75  # the same where no round trip is known
MOST: Final = 32  # that are asked
KEEP_S: Final = 10.0  # for which it matters that somebody did not answer


def silent_after_s(mux: Muxer) -> float:
    """For how long an answer may be waited for."""
    round_trip_s = mux.round_trip_s
    return UNMEASURED_S if round_trip_s is None else max(SILENT_S, SILENT_ROUND_TRIPS * round_trip_s)


@dataclass(frozen=True, kw_only=True)
class _Asked:
    connection: Connection
    at: float

    def is_missed(self, now: float) -> bool:
        mux = self.connection.mux
        return mux.heard_at < self.at and now >= self.at + silent_after_s(mux)


class LifeSigns:
    """See the module. Belongs to one event loop."""

    def __init__(self, host: Host) -> None:
        """Begin with nothing.

        Args:
            host: whose connections are asked.
        """
        self._swarm = host.swarm
        self._asked: dict[PeerId, _Asked] = {}

    def ask(self, peers: Iterable[PeerId]) -> None:
        """Have those that are connected show that they are there."""
        now = trio.current_time()
        for peer in list(peers)[:MOST]:
            connection, before = self._swarm.connection(peer), self._asked.get(peer)
            if connection is None or (before is not None and before.connection is connection and self._waits(before)):
                continue
            self._asked[peer] = _Asked(connection=connection, at=now)
            connection.mux.check()

    def missed(self, peers: Iterable[PeerId]) -> dict[PeerId, str]:
        """Those that were asked, have not answered, and have not been met again since."""
        now = trio.current_time()
        self._asked = {peer: asked for peer, asked in self._asked.items() if now < asked.at + KEEP_S}
        return {peer: "has not shown that it is there" for peer in peers if self._is_missed(peer, now)}

    def _is_missed(self, peer: PeerId, now: float) -> bool:
        asked = self._asked.get(peer)
        if asked is None:
            return False
        current = self._swarm.connection(peer)
        return asked.is_missed(now) and (current is None or current is asked.connection)

    def _waits(self, asked: _Asked) -> bool:
        return asked.connection.mux.heard_at < asked.at

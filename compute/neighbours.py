"""What a node tells those who choose chains, beside its speed: how near those are that may come before and after it,
and how much waits here.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Awaitable, Callable, Iterable
from contextlib import aclosing
from typing import Final

import trio

from net.errors import NetError
from net.host import Host
from net.identity import PeerId
from net.ping import ping
from net.protocol.announcement import MAX_ROUND_TRIP_S, NodeAnnouncement

logger = logging.getLogger(__name__)

MOST: Final = 8  # nodes that are measured at a time
PINGS: Final = 3  # each time; the shortest counts
ROUND_S: Final = 10.0  # for all of them
PING_S: Final = 3.0
NEWEST: Final = 0.5  # what the newest measurement counts
FIRST_AFTER_S: Final = 2.0
EVERY_S: Final = 30.0  # as often as announcements are renewed
JITTER: Final = 0.25  # either way, so that nodes that came together do not measure together

SAMPLE_S: Final = 1.0
WAITING_MEMORY_S: Final = 30.0
WAITING_STEP: Final = 0.1  # what is announced is rounded to it

Find = Callable[[], Awaitable[list[NodeAnnouncement]]]


class Neighbours:
    """Round trips to nodes that serve the block before our span or the one after it.

    Args:
        host: whose connections are measured.
        find: the other nodes that serve the same model.
        span: ours, [start, end); None while nothing is served.

    Attributes:
        round_trips: in seconds, of those measured last and still there.
    """

    def __init__(self, host: Host, find: Find, span: Callable[[], tuple[int, int] | None]) -> None:
        self._host = host
        self._find = find
        self._span = span
        self.round_trips: dict[PeerId, float] = {}

    async def watch(self, found: Callable[[], None]) -> None:
        """Measure soon, then now and then, until cancelled.

        Args:
            found: called when nodes were measured that had not been before.
        """
        pause_s = FIRST_AFTER_S
        while True:
            await trio.sleep(pause_s * random.uniform(1 - JITTER, 1 + JITTER))
            pause_s = EVERY_S
            before = set(self.round_trips)
            try:
                await self.measure()
            except NetError as error:
                logger.info("no neighbours found: %s", error)
            if not before.issuperset(self.round_trips):
                found()

    async def measure(self) -> None:
        """Once, those next to us: the nearest known ones, and some others; within ``ROUND_S``.

        Who does not answer is forgotten, and so is who is not next to us any more.

        Raises:
            NetError: nobody can be looked up.
        """
        span = self._span()
        if span is None:
            self.round_trips = {}
            return
        chosen = self._choose(beside(span, await self._find()))
        measured: dict[PeerId, float] = {}
        with trio.move_on_after(ROUND_S):
            async with trio.open_nursery() as nursery:
                for node in chosen:
                    nursery.start_soon(self._measure, node, measured)
        self.round_trips = {
            peer: seconds if (old := self.round_trips.get(peer)) is None else old + NEWEST * (seconds - old)
            for peer, seconds in measured.items()
        }

    def _choose(self, nodes: list[NodeAnnouncement]) -> list[NodeAnnouncement]:
        """Three quarters are the nearest that we know, so that it is mostly the same ones who are announced."""
        known = sorted(
            (node for node in nodes if node.peer_id in self.round_trips),
            key=lambda node: self.round_trips[node.peer_id],
        )
        kept = known[: MOST * 3 // 4]
        others = [node for node in nodes if node not in kept]
        return [*kept, *random.sample(others, min(MOST - len(kept), len(others)))]

    async def _measure(self, node: NodeAnnouncement, measured: dict[PeerId, float]) -> None:
        try:
            await self._host.connect(node.peer_id, node.addresses)
            async with aclosing(ping(self._host, node.peer_id, timeout_s=PING_S)) as round_trips:
                for _ in range(PINGS):
                    seconds = await anext(round_trips)
                    measured[node.peer_id] = min(seconds, measured.get(node.peer_id, MAX_ROUND_TRIP_S))
        except NetError as error:
            logger.info("no round trip measured with %s: %s", node.peer_id, error)


def beside(span: tuple[int, int], nodes: Iterable[NodeAnnouncement]) -> list[NodeAnnouncement]:
    """Those that serve the block before the span or the one after it, and serve by now."""
    start, end = span
    return [
        node
        for node in nodes
        if node.state == "online" and (node.start < start <= node.end or node.start <= end < node.end)
    ]


class Waiting:
    """How many steps wait or run here on average, over the last half minute.

    Args:
        count: how many do now.
    """

    def __init__(self, count: Callable[[], int]) -> None:
        self._count = count
        self._average = 0.0

    @property
    def average(self) -> float:
        """Rounded, so that hardly any load is none."""
        return round(round(self._average / WAITING_STEP) * WAITING_STEP, 6)

    def note(self, count: int, seconds: float) -> None:
        """So many, so long after the last time."""
        self._average += (count - self._average) * (1.0 - math.exp(-seconds / WAITING_MEMORY_S))

    async def watch(self) -> None:
        """Count now and then, until cancelled; at random moments, so as not to keep step with what is counted."""
        while True:
            seconds = random.uniform(0.5, 1.5) * SAMPLE_S
            await trio.sleep(seconds)
            self.note(self._count(), seconds)

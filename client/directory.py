"""Who serves what, as far as we know: a look-up that is not waited for where what was found a moment ago will do.

A look-up asks some twenty servers and goes on without those that are silent only after a while, so it takes seconds
just when nodes have gone. Whoever has lost a node knows which one to avoid, and needs the others at once.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from net import errors
from net.protocol.announcement import NodeAnnouncement

logger = logging.getLogger(__name__)

RECENT_S: Final = 1.0  # what was found so lately counts as found now
USABLE_S: Final = 90.0  # and this is better than to wait


class Directory:
    """What all nodes announce."""

    def __init__(self, look_up: Callable[[], Awaitable[list[NodeAnnouncement]]], nursery: trio.Nursery) -> None:
        """Begin empty.

        Args:
            look_up: finds them.
            nursery: for look-ups that nobody waits for.
        """
        self._look_up = look_up
        self._nursery = nursery
        self._found: list[NodeAnnouncement] = []
        self._found_at = float("-inf")
        self._looking = trio.Lock()

    async def nodes(self, *, fresh: bool = True) -> list[NodeAnnouncement]:
        """All nodes.

        Args:
            fresh: Whether to wait for a look-up; else what was found before will do, and is renewed meanwhile.

        Raises:
            NetError: nobody could be asked.
        """
        age_s = trio.current_time() - self._found_at
        if fresh or age_s > USABLE_S:
            await self._renew()
        elif age_s > RECENT_S and not self._looking.locked():
            self._nursery.start_soon(self._try_to_renew)
        return self._found

    async def _renew(self) -> None:
        asked_at = trio.current_time()
        async with self._looking:  # of those who wait at the same time, one looks
            if self._found_at < asked_at:
                self._found = await self._look_up()
                self._found_at = trio.current_time()

    async def _try_to_renew(self) -> None:
        try:
            await self._renew()
        except errors.NetError as error:
            logger.info("no look-up: %s", error)

"""The queue of ``fairness.py`` under trio: wait for the turn of a piece."""

from __future__ import annotations

from collections.abc import Hashable

import trio

from net.relay.fairness import Bucket, FairQueue

SLICE_BYTES = 64 * 1024  # forwarded in one round of the event loop where nothing else limits
BURST_S = 0.005  # of the rate at once: timers are not finer than a millisecond or so


class Turns:
    """Turns for all circuits of a relay, in order of ``FairQueue``.

    Args:
        bytes_per_s: forwarded in all; None: the machine's own limit, which is shared as well.
    """

    def __init__(self, bytes_per_s: float | None) -> None:
        self._queue: FairQueue[tuple[trio.Event, int]] = FairQueue()
        self._bucket = None if bytes_per_s is None else Bucket(bytes_per_s, BURST_S, trio.current_time())
        self._left = SLICE_BYTES
        self._wake = trio.Event()

    async def take(self, user: Hashable, size: int) -> None:
        """Return when ``size`` bytes of ``user`` may be forwarded. While nobody waits, that is at once.

        Cancellation: the turn is lost, and counted.
        """
        if not self._queue and self._may_spend():
            self._queue.charge(user, size)
            self._spend(size)
            return
        turn = trio.Event()
        ticket = self._queue.push(user, size, (turn, size))
        self._wake.set()
        try:
            await turn.wait()
        except trio.Cancelled:
            if not turn.is_set():
                self._queue.give_up(ticket)
            raise

    async def run(self) -> None:
        """Give turns until cancelled."""
        while True:
            if not self._queue:
                self._wake = trio.Event()
                await self._wake.wait()
            await self._refill()
            while self._queue and self._may_spend():
                turn, size = self._queue.pop()
                self._spend(size)
                turn.set()

    async def _refill(self) -> None:
        if self._bucket is None:
            await trio.lowlevel.checkpoint()
            self._left = SLICE_BYTES
        else:
            await trio.sleep_until(self._bucket.ready_at(trio.current_time()))

    def _may_spend(self) -> bool:
        now = trio.current_time()
        return self._left > 0 if self._bucket is None else self._bucket.ready_at(now) <= now

    def _spend(self, size: int) -> None:
        if self._bucket is None:
            self._left -= size
        else:
            self._bucket.spend(size, trio.current_time())

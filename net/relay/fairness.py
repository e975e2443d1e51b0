"""Whose bytes a relay forwards next. No I/O.

Start-time fair queueing: of all who wait, the one goes first whose user has had the least of late. A user is whoever
opened the circuit; how many circuits it has makes no difference. Over any time in which two users always have something
waiting, what they are given differs by no more than two pieces, whatever the others do.

Source: P. Goyal, H. M. Vin, H. Cheng, "Start-time Fair Queueing", SIGCOMM 1996.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")
PIECE_COST_BYTES = 256  # that a piece costs beside its bytes: many small ones are work as well
TIDY_USERS = 64  # finish tags of those who left are looked for when there are so many, and twice what was left


@dataclass(order=True)
class Ticket(Generic[T]):
    """A place in the queue."""

    start: float
    number: int
    user: Hashable = field(compare=False)
    item: T = field(compare=False)
    given_up: bool = field(default=False, compare=False)


class FairQueue(Generic[T]):
    """Pieces that wait, ``item`` standing for each."""

    def __init__(self) -> None:
        self._waiting: list[Ticket[T]] = []
        self._given_up = 0
        self._virtual = 0.0  # the start tag of what was served last
        self._finish: dict[Hashable, float] = {}  # of each user's last piece
        self._numbers = itertools.count()
        self._tidy_at = TIDY_USERS

    def __len__(self) -> int:
        return len(self._waiting) - self._given_up

    def push(self, user: Hashable, size: int, item: T) -> Ticket[T]:
        """Queue a piece of ``size`` bytes."""
        ticket = Ticket(start=self._tag(user, size), number=next(self._numbers), user=user, item=item)
        heapq.heappush(self._waiting, ticket)
        return ticket

    def charge(self, user: Hashable, size: int) -> None:
        """Count a piece that is served at once because nobody waits."""
        self._virtual = max(self._virtual, self._tag(user, size))
        if len(self._finish) >= self._tidy_at:  # and nobody is owed anything
            self._virtual = max(self._finish.values())
            self._finish.clear()

    def pop(self) -> T:
        """Serve the next.

        Raises:
            IndexError: nobody waits.
        """
        while True:
            ticket = heapq.heappop(self._waiting)
            if not ticket.given_up:
                self._virtual = max(self._virtual, ticket.start)
                self._tidy()
                return ticket.item
            self._given_up -= 1

    def give_up(self, ticket: Ticket[T]) -> None:
        """Its owner left. It stays counted: who asks and leaves gains nothing. Once, and not after it was served."""
        ticket.given_up = True
        self._given_up += 1

    def _tag(self, user: Hashable, size: int) -> float:
        start = max(self._virtual, self._finish.get(user, 0.0))
        self._finish[user] = start + size + PIECE_COST_BYTES
        return start

    def _tidy(self) -> None:
        if len(self._finish) >= self._tidy_at:
            self._finish = {user: tag for user, tag in self._finish.items() if tag > self._virtual}
            self._tidy_at = max(TIDY_USERS, 2 * len(self._finish))


class Bucket:
    """Bytes that may be forwarded by now, at ``bytes_per_s``. The last piece may overdraw it."""

    def __init__(self, bytes_per_s: float, burst_s: float, now: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._burst_s = burst_s
        self._paid_until = now - burst_s  # when all that was spent will have been earned

    def ready_at(self, now: float) -> float:
        """When there is something to spend: ``now``, or later."""
        return max(now, self._paid_until)

    def spend(self, size: int, now: float) -> None:
        self._paid_until = max(self._paid_until, now - self._burst_s) + size / self._bytes_per_s

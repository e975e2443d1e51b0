"""Servers that others named and that did not answer: not asked again for a while. No I/O; bounded.

Whoever makes up contacts so costs us one call for each, and not one in every look-up. Which addresses were tried is
part of it: a wrong address for somebody keeps nobody from asking him at the right one.
"""

from __future__ import annotations

from net.addresses import Multiaddr
from net.dht.table import Contact
from net.identity import PeerId

MAX_NAMES = 1024  # the oldest go first


class Backoff:
    """Times are seconds of any monotonic clock."""

    def __init__(self, wait_s: float) -> None:
        self._wait_s = wait_s
        self._silent: dict[PeerId, tuple[tuple[Multiaddr, ...], float]] = {}  # until when, oldest first

    def __len__(self) -> int:
        return len(self._silent)

    def note(self, contact: Contact, now: float) -> None:
        """It did not answer at these addresses."""
        self._silent.pop(contact.peer_id, None)
        self._silent[contact.peer_id] = (contact.addresses, now + self._wait_s)
        if len(self._silent) > MAX_NAMES:
            del self._silent[next(iter(self._silent))]

    def forgive(self, peer_id: PeerId) -> None:
        """It has been heard of, from itself."""
        self._silent.pop(peer_id, None)

    def clear(self) -> None:
        """None of it holds any more."""
        self._silent.clear()

    def holds(self, contact: Contact, now: float) -> bool:
        """Whether it is too early to ask it again."""
        addresses, until = self._silent.get(contact.peer_id, ((), now))
        return now < until and addresses == contact.addresses

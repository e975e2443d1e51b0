"""Memory for what peers send before it is of use: so much for all of them, so much for each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable


class Room:
    """For bytes that have come. Not for several threads.

    Attributes:
        peer_bytes: Most of one peer.
        taken: Bytes held.
    """

    def __init__(self, all_bytes: int, peer_bytes: int) -> None:
        """Begin empty.

        Args:
            all_bytes: Most of all peers together.
            peer_bytes: Most of one.
        """
        self._all_bytes = all_bytes
        self.peer_bytes = peer_bytes
        self.taken = 0
        self._taken: Counter[Hashable] = Counter()

    def take(self, peer: Hashable, count: int) -> bool:
        """Hold so many bytes more, if there is room for them."""
        if self.taken + count > self._all_bytes or self._taken[peer] + count > self.peer_bytes:
            return False
        self.taken += count
        self._taken[peer] += count
        return True

    def give_back(self, peer: Hashable, count: int) -> None:
        """They are held no longer."""
        self.taken -= count
        self._taken[peer] -= count
        if not self._taken[peer]:
            del self._taken[peer]

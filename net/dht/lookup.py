"""One iterative look-up, without I/O: who to ask next, and when it is over.

The driver asks those that ``next_queries`` names (at most ``alpha`` at a time), and tells what came of it.
It is over when the ``k`` nearest that are known and have not failed have all answered, or when as many were
asked as may be: whoever makes up ever nearer names does not keep it going.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable

from net.dht import keys
from net.dht.table import Contact, K
from net.identity import PeerId

ALPHA = 10
MAX_CANDIDATES = 400  # known at once; the farthest go first
MAX_QUERIES = 200  # an honest network of a thousand servers takes about 40


class _State(enum.Enum):
    NEW = 0
    ASKED = 1
    ANSWERED = 2
    FAILED = 3


class Lookup:
    """Args:
    own: us; never asked.
    target: the key whose neighbours are wanted.
    start: servers already known.
    """

    def __init__(self, own: PeerId, target: bytes, start: Iterable[Contact], *, k: int = K, alpha: int = ALPHA) -> None:
        self.target = target
        self._own = own
        self._k = k
        self._alpha = alpha
        self._contacts: dict[PeerId, Contact] = {}
        self._states: dict[PeerId, _State] = {}
        self._distances: dict[PeerId, int] = {}
        self._queries = 0
        self._learn(start)

    def next_queries(self) -> list[Contact]:
        """Whom to ask now; they count as asked from here on."""
        asked = sum(state is _State.ASKED for state in self._states.values())
        chosen: list[PeerId] = []
        for peer_id in self._nearest():
            if asked + len(chosen) >= self._alpha or self._queries + len(chosen) >= MAX_QUERIES:
                break
            if self._states[peer_id] is _State.NEW:
                chosen.append(peer_id)
        self._queries += len(chosen)
        for peer_id in chosen:
            self._states[peer_id] = _State.ASKED
        return [self._contacts[peer_id] for peer_id in chosen]

    def answered(self, peer_id: PeerId, closer: Iterable[Contact]) -> None:
        self._states[peer_id] = _State.ANSWERED
        self._learn(closer)

    def failed(self, peer_id: PeerId) -> None:
        self._states[peer_id] = _State.FAILED

    @property
    def is_done(self) -> bool:
        waiting = {_State.ASKED} if self._queries >= MAX_QUERIES else {_State.ASKED, _State.NEW}
        return not any(self._states[peer_id] in waiting for peer_id in self._nearest())

    @property
    def closest(self) -> list[Contact]:
        """The nearest servers that answered."""
        answered = [peer_id for peer_id, state in self._states.items() if state is _State.ANSWERED]
        return [self._contacts[p] for p in sorted(answered, key=self._distances.__getitem__)[: self._k]]

    def _nearest(self) -> list[PeerId]:
        alive = [peer_id for peer_id, state in self._states.items() if state is not _State.FAILED]
        return sorted(alive, key=self._distances.__getitem__)[: self._k]

    def _learn(self, contacts: Iterable[Contact]) -> None:
        for contact in contacts:
            peer_id = contact.peer_id
            if peer_id == self._own or peer_id in self._states:
                continue
            self._contacts[peer_id] = contact
            self._states[peer_id] = _State.NEW
            self._distances[peer_id] = keys.distance(keys.of_peer(peer_id), self.target)
            if len(self._states) > MAX_CANDIDATES:
                unasked = [peer_id for peer_id, state in self._states.items() if state is _State.NEW]
                self._forget(max(unasked, key=self._distances.__getitem__))

    def _forget(self, peer_id: PeerId) -> None:
        for known in (self._contacts, self._states, self._distances):
            del known[peer_id]

"""One iterative look-up, without I/O: who to ask next, and when it is over.

The driver asks those that ``next_queries`` names (at most ``alpha`` at a time), and tells what came of it.
It is over when the ``k`` nearest that are known and have not failed have all answered, or when as many were
asked as may be: whoever makes up ever nearer names does not keep it going.

A look-up may go several ways at once that share nothing but what they find: each path has contacts of its own and
a part of the budgets, and nobody is asked by two. Servers that name only each other, or nobody that is there, so
mislead the paths that meet them first, and no other.

Source: Baumgart and Mies, S/Kademlia (2007), 4.4.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable

from net.dht import keys
from net.dht.table import Contact, K
from net.identity import PeerId

ALPHA = 10
MAX_CANDIDATES = 400  # known at once, over all paths; the farthest go first
MAX_QUERIES = 200  # over all paths; an honest network of a thousand servers takes about 40


class _State(enum.Enum):
    ASKED = 1
    SLOW = 2  # asked, no answer yet: nobody waits for it, it may still come
    ANSWERED = 3
    FAILED = 4


_PASSED_OVER = {_State.SLOW, _State.FAILED}


class _Path:
    """Those that one path has heard of, and how many of them it has asked."""

    def __init__(self, states: dict[PeerId, _State]) -> None:
        self.contacts: dict[PeerId, Contact] = {}
        self.distances: dict[PeerId, int] = {}
        self.under_way: set[PeerId] = set()
        self.queries = 0
        self._states = states

    def nearest(self, k: int) -> list[PeerId]:
        alive = [peer_id for peer_id in self.contacts if self._states.get(peer_id) not in _PASSED_OVER]
        return sorted(alive, key=self.distances.__getitem__)[:k]

    def learn(self, contact: Contact, distance: int, max_candidates: int) -> None:
        self.contacts[contact.peer_id] = contact
        self.distances[contact.peer_id] = distance
        if len(self.contacts) > max_candidates:
            unasked = [peer_id for peer_id in self.contacts if peer_id not in self._states]
            if unasked:
                farthest = max(unasked, key=self.distances.__getitem__)
                del self.contacts[farthest], self.distances[farthest]


class Lookup:
    """Args:
    own: us; never asked.
    target: the key whose neighbours are wanted.
    start: servers already known; dealt out to the paths, nearest first.
    paths: how many ways to go.
    """

    def __init__(
        self, own: PeerId, target: bytes, start: Iterable[Contact], *, k: int = K, alpha: int = ALPHA, paths: int = 1
    ) -> None:
        self.target = target
        self._own = own
        self._k = k
        self._alpha = alpha
        self._states: dict[PeerId, _State] = {}  # of those asked, by whichever path
        self._askers: dict[PeerId, _Path] = {}
        self._paths = [_Path(self._states) for _ in range(paths)]
        self._place = int.from_bytes(target, "big")
        ordered = sorted(start, key=lambda contact: contact.position ^ self._place)
        self._deal(ordered, self._paths)

    def next_queries(self) -> list[Contact]:
        """Whom to ask now; they count as asked from here on."""
        free = self._alpha - sum(len(path.under_way) for path in self._paths)
        share = -(-self._alpha // len(self._paths))
        waiting = {id(path): self._unasked(path) for path in self._paths}
        chosen: list[Contact] = []
        progress = True
        while progress:
            progress = False
            for path in self._paths:
                if len(chosen) >= free:
                    return chosen
                if len(path.under_way) >= share or path.queries >= MAX_QUERIES // len(self._paths):
                    continue
                peer_id = next((each for each in waiting[id(path)] if each not in self._states), None)
                if peer_id is None:
                    continue
                self._states[peer_id] = _State.ASKED
                self._askers[peer_id] = path
                path.under_way.add(peer_id)
                path.queries += 1
                chosen.append(path.contacts[peer_id])
                progress = True
        return chosen

    def answered(self, peer_id: PeerId, closer: Iterable[Contact]) -> None:
        path = self._settle(peer_id, _State.ANSWERED)
        # Who knew too few to begin with gets all its paths from the first answer.
        self._deal(closer, [path, *(other for other in self._paths if other is not path and not other.contacts)])

    def failed(self, peer_id: PeerId) -> None:
        self._settle(peer_id, _State.FAILED)

    def slow(self, peer_id: PeerId) -> None:
        """It has not answered for long: go on without it. It may still answer or fail."""
        if self._states[peer_id] is _State.ASKED:
            self._settle(peer_id, _State.SLOW)

    @property
    def is_done(self) -> bool:
        """Whether no answer is waited for. Slow ones are waited for while few have answered."""
        states = list(self._states.values())
        if _State.ASKED in states:
            return not any(
                self._states.get(peer_id) is _State.ASKED for path in self._paths for peer_id in path.nearest(self._k)
            ) and not any(map(self._may_ask, self._paths))
        if _State.SLOW in states and 2 * states.count(_State.ANSWERED) < self._k:
            return False
        return not any(map(self._may_ask, self._paths))

    @property
    def unanswered(self) -> list[PeerId]:
        """Those that were asked, have not answered, and have not failed yet."""
        return [peer_id for peer_id, state in self._states.items() if state in (_State.ASKED, _State.SLOW)]

    @property
    def closest(self) -> list[Contact]:
        """The nearest servers that answered."""
        answered = [
            self._askers[peer_id].contacts[peer_id]
            for peer_id, state in self._states.items()
            if state is _State.ANSWERED
        ]
        return sorted(answered, key=lambda contact: contact.position ^ self._place)[: self._k]

    def _unasked(self, path: _Path) -> list[PeerId]:
        return [peer_id for peer_id in path.nearest(self._k) if peer_id not in self._states]

    def _may_ask(self, path: _Path) -> bool:
        return path.queries < MAX_QUERIES // len(self._paths) and bool(self._unasked(path))

    def _settle(self, peer_id: PeerId, state: _State) -> _Path:
        self._states[peer_id] = state
        path = self._askers[peer_id]
        path.under_way.discard(peer_id)
        return path

    def _deal(self, contacts: Iterable[Contact], paths: list[_Path]) -> None:
        turn = 0
        for contact in contacts:
            if contact.peer_id == self._own:
                continue
            path = paths[turn % len(paths)]
            turn += 1
            if contact.peer_id not in path.contacts:
                distance = keys.distance(keys.of_peer(contact.peer_id), self.target)
                path.learn(contact, distance, MAX_CANDIDATES // len(self._paths))

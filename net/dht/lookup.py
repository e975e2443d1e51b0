"""One iterative look-up, without I/O: who to ask next, and when it is over.

The driver asks those that ``next_queries`` names, tells what came of it, and calls ``pass_time`` at ``deadline``.
At most ``alpha`` questions are under way that are younger than ``patience_s``; it goes on without the answer of who
has not given one for ``slow_s``, unless few others have, and after half of that once ``k`` have. It is over when the
``k`` nearest that are known and have neither failed nor been slow have all answered, or when as many were asked as
may be: whoever makes up ever nearer names does not keep it going.

A look-up may go several ways at once that share nothing but what they find: each path has contacts of its own and
a part of the budgets, and nobody is asked by two. Servers that name only each other, or nobody that is there, so
mislead the paths that meet them first, and no other.

Source: Baumgart and Mies, S/Kademlia (2007), 4.4.
"""

from __future__ import annotations

import enum
import math
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from net.dht.table import Contact, K
from net.errors import LocalProtocolError
from net.identity import PeerId

ALPHA = 10
PATIENCE_S = 0.5  # a made-up name holds up the others no longer than this
SLOW_S = 2.0
MAX_CANDIDATES = 400  # known at once, over all paths; the farthest go first
MAX_QUERIES = 200  # over all paths; an honest network of a thousand servers takes about 40


class _State(enum.Enum):
    UNASKED = 0
    ASKED = 1
    LATE = 2  # no answer yet: still waited for, but others are asked in its stead
    SLOW = 3  # nobody waits for it any more, it may still come
    ANSWERED = 4
    FAILED = 5


_WAITED_FOR = (_State.ASKED, _State.LATE)
_PASSED_OVER = (_State.SLOW, _State.FAILED)


@dataclass(kw_only=True, eq=False, slots=True)
class _Candidate:
    """A server that some path has heard of. It is asked once, by whichever path comes first."""

    peer_id: PeerId
    distance: int
    state: _State = _State.UNASKED
    asked_at: float = 0.0
    asker: _Path | None = None


class _Path:
    """Those that one path has heard of, and how many of them it has asked."""

    def __init__(self, max_candidates: int, max_queries: int) -> None:
        self.contacts: dict[PeerId, Contact] = {}  # as this path was told
        self.under_way = 0
        self.queries = 0
        self._ordered: list[_Candidate] = []  # nearest first
        self._max_candidates = max_candidates
        self._max_queries = max_queries

    def learn(self, contact: Contact, candidate: _Candidate) -> None:
        self.contacts[contact.peer_id] = contact
        insort(self._ordered, candidate, key=lambda each: each.distance)
        if len(self._ordered) > self._max_candidates:
            unasked = (n for n in reversed(range(len(self._ordered))) if self._ordered[n].state is _State.UNASKED)
            farthest = next(unasked, None)
            if farthest is not None:
                del self.contacts[self._ordered.pop(farthest).peer_id]

    def nearest(self, k: int) -> Iterator[_Candidate]:
        return islice((each for each in self._ordered if each.state not in _PASSED_OVER), k)

    def next_unasked(self, k: int) -> _Candidate | None:
        if self.queries >= self._max_queries:
            return None
        return next((each for each in self.nearest(k) if each.state is _State.UNASKED), None)

    def is_done(self, k: int) -> bool:
        may_ask = self.queries < self._max_queries
        return not any(
            each.state in _WAITED_FOR or (may_ask and each.state is _State.UNASKED) for each in self.nearest(k)
        )


class Lookup:
    """Args:
    own: us; never asked.
    target: the key whose neighbours are wanted.
    start: servers already known; dealt out to the paths, nearest first.
    paths: how many ways to go.
    """

    def __init__(
        self,
        own: PeerId,
        target: bytes,
        start: Iterable[Contact],
        *,
        k: int = K,
        alpha: int = ALPHA,
        paths: int = 1,
        patience_s: float = PATIENCE_S,
        slow_s: float = SLOW_S,
    ) -> None:
        self.target = target
        self._own = own
        self._k = k
        self._alpha = alpha
        self._patience_s = patience_s
        self._slow_s = slow_s
        self._candidates: dict[PeerId, _Candidate] = {}
        self._asked: list[_Candidate] = []
        self._punctual: deque[_Candidate] = deque()  # those asked, in that order; who may still become late is there
        self._late: deque[_Candidate] = deque()  # likewise, who may still become slow
        self._n_answered = 0
        self._paths = [_Path(MAX_CANDIDATES // paths, MAX_QUERIES // paths) for _ in range(paths)]
        self._place = int.from_bytes(target, "big")
        self._deal(sorted(start, key=self._distance), self._paths)

    def next_queries(self, now: float) -> list[Contact]:
        """Whom to ask now; they count as asked from here on."""
        free = self._alpha - sum(path.under_way for path in self._paths)
        share = -(-self._alpha // len(self._paths))
        chosen: list[Contact] = []
        waiting = list(self._paths)
        while waiting and len(chosen) < free:
            for path in list(waiting):
                candidate = path.next_unasked(self._k) if path.under_way < share else None
                if candidate is None:
                    waiting.remove(path)
                elif len(chosen) < free:
                    chosen.append(self._ask(candidate, path, now))
        return chosen

    def answered(self, peer_id: PeerId, closer: Iterable[Contact]) -> None:
        path = self._settle(self._candidates[peer_id], _State.ANSWERED)
        self._n_answered += 1
        # Who knew too few to begin with gets all its paths from the first answer.
        self._deal(closer, [path, *(other for other in self._paths if other is not path and not other.contacts)])

    def failed(self, peer_id: PeerId) -> None:
        self._settle(self._candidates[peer_id], _State.FAILED)

    def pass_time(self, now: float) -> None:
        """Go on without those who have not answered for too long. They may still answer or fail."""
        for candidate in _due(self._punctual, _State.ASKED, self._patience_s, now):
            self._settle(candidate, _State.LATE)
            self._late.append(candidate)
        for candidate in _due(self._late, _State.LATE, self._limit_s, now):
            self._settle(candidate, _State.SLOW)

    @property
    def deadline(self) -> float:
        """When ``pass_time`` changes something next."""
        times = [
            queue[0].asked_at + limit_s
            for queue, limit_s in ((self._punctual, self._patience_s), (self._late, self._limit_s))
            if queue
        ]
        return min(times, default=math.inf)

    @property
    def is_done(self) -> bool:
        """Whether no answer is waited for. Slow ones are waited for while few have answered."""
        if not all(path.is_done(self._k) for path in self._paths):
            return False
        return 2 * self._n_answered >= self._k or not self.slow

    @property
    def slow(self) -> list[Contact]:
        """Those that were waited for in vain, and have not failed since."""
        return self._contacts(lambda candidate: candidate.state is _State.SLOW)

    @property
    def closest(self) -> list[Contact]:
        """The nearest servers that answered."""
        answered = self._contacts(lambda candidate: candidate.state is _State.ANSWERED)
        return sorted(answered, key=self._distance)[: self._k]

    @property
    def _limit_s(self) -> float:
        return self._slow_s if self._n_answered < self._k else self._slow_s / 2

    def _contacts(self, wanted: Callable[[_Candidate], bool]) -> list[Contact]:
        return [each.asker.contacts[each.peer_id] for each in self._asked if each.asker is not None and wanted(each)]

    def _distance(self, contact: Contact) -> int:
        return contact.position ^ self._place

    def _ask(self, candidate: _Candidate, path: _Path, now: float) -> Contact:
        candidate.state, candidate.asked_at, candidate.asker = _State.ASKED, now, path
        path.under_way += 1
        path.queries += 1
        self._asked.append(candidate)
        self._punctual.append(candidate)
        return path.contacts[candidate.peer_id]

    def _settle(self, candidate: _Candidate, state: _State) -> _Path:
        path = candidate.asker
        if path is None:
            raise LocalProtocolError(f"{candidate.peer_id} was not asked")
        if candidate.state is _State.ASKED:
            path.under_way -= 1
        candidate.state = state
        return path

    def _deal(self, contacts: Iterable[Contact], paths: list[_Path]) -> None:
        turn = 0
        for contact in contacts:
            if contact.peer_id == self._own:
                continue
            path = paths[turn % len(paths)]
            turn += 1
            if contact.peer_id not in path.contacts:
                candidate = self._candidates.get(contact.peer_id)
                if candidate is None:
                    candidate = _Candidate(peer_id=contact.peer_id, distance=self._distance(contact))
                    self._candidates[contact.peer_id] = candidate
                path.learn(contact, candidate)


def _due(queue: deque[_Candidate], state: _State, limit_s: float, now: float) -> Iterator[_Candidate]:
    """Take out those in ``state`` that were asked ``limit_s`` ago, and those that are in another by now."""
    # The sum is the same as in ``deadline``, to the bit: waking there must lead on.
    while queue and (queue[0].state is not state or queue[0].asked_at + limit_s <= now):
        candidate = queue.popleft()
        if candidate.state is state:
            yield candidate

"""The state of run-ahead speculation: what is asked, what is under way, what is there already. No I/O, no clock.

The caller asks for tokens one step at a time, each when it has the result of the last, and gets what such steps give.
Behind this, *the line* is what the nodes are sent: the tokens that were asked for, and after them drafted ones, in
pieces, of which several may be under way. If the caller asks for the token that stands next in the line, its result is
there or on its way; if it asks for another, the session is set back to there, and whatever is under way from there on
is waited for by nobody.

::

    ask(p, [x])  -> HandOut            x stood at p and its result is here
                 -> (nothing)          x stood at p and its result will come
                 -> SetBack(p), Send   something else stood at p
                 -> Send               nothing stood at p
    result(n)    -> HandOut, if it was waited for
    drafted(...)    a slow drafter has finished what ``WantDraft`` asked of it
    failed()     -> SetBack, Send      all that was under way is lost; what is waited for is sent again

After each of these, further pieces may be sent (``Send``) and drafts wanted (``WantDraft``).

What is asked for in one step is sent in one piece: alone if it has several tokens, as its bits may depend on that, and
with drafted tokens behind it if it has one. Nodes work on pieces in the order in which they are sent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Final, Generic, TypeVar

from client.drafting.base import Draft, Drafter
from client.drafting.policy import NOTHING, Choice, DraftPolicy

T = TypeVar("T")

_AT_ONCE: Final = 64  # tokens that the quick drafter is asked for: they may serve for several pieces
_FEW: Final = 8  # tokens left of a draft when another is asked for


@dataclass(frozen=True, kw_only=True)
class Send:
    """Send these tokens, the first of which stands at ``position``. Results come under ``number``."""

    number: int
    position: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class SetBack:
    """The session's tokens from ``position`` on are void, sent or not. The next piece says so to the nodes."""

    position: int


@dataclass(frozen=True, kw_only=True)
class HandOut(Generic[T]):
    """The caller's step has its result: tokens [start, stop) of the piece whose result ``payload`` is."""

    payload: T
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class WantDraft:
    """Have the slow drafter continue ``ids`` by ``count`` tokens, beside everything else, and tell ``drafted``."""

    ids: list[int]
    count: int


@dataclass(kw_only=True)
class _Piece:
    number: int
    position: int
    end: int
    sent_at: float
    expected_at: float | None
    is_first: bool  # nothing was under way when it was sent
    is_measured: bool
    is_plain: bool  # as it would have been sent without any speculation
    is_void: bool = False


@dataclass(kw_only=True)
class _Result(Generic[T]):
    position: int
    end: int
    payload: T


@dataclass(frozen=True, kw_only=True)
class _Asked:
    position: int
    end: int
    at: float
    is_plain: bool


@dataclass(kw_only=True)
class _Guess:
    """A drafter's last draft: its tokens stand at ``start`` and after, sent or not."""

    start: int
    tokens: tuple[int, ...]
    grades: tuple[int, ...]


@dataclass(kw_only=True)
class _Request:
    start: int
    is_void: bool = False


@dataclass(frozen=True, kw_only=True)
class _Mark:
    """By whom a token of the line was drafted."""

    drafter: str
    grade: int
    chance: float


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """What a drafter has to continue the line with."""

    drafter: str
    tokens: tuple[int, ...] = ()
    grades: tuple[int, ...] = ()
    chances: list[float] = field(default_factory=list)


class RunAhead(Generic[T]):
    """See the module. ``T`` is what a piece's results are kept as.

    Attributes:
        limit: tokens that the session may come to hold; drafts keep within it.
    """

    def __init__(
        self, policy: DraftPolicy, *, quick: Drafter | None = None, slow: str | None = None, limit: int
    ) -> None:
        """Begin with an empty session.

        Args:
            policy: knows all drafters by name.
            quick: takes microseconds; asked here.
            slow: the name of one that takes longer; asked for with ``WantDraft``.
            limit: see the class.
        """
        self.limit = limit
        self._policy = policy
        self._quick = quick
        self._slow = slow
        self._ids: list[int] = []  # the line
        self._asked = 0  # tokens of it that were asked for
        self._ready = 0  # tokens of it that have results
        self._marks: dict[int, _Mark] = {}  # of those not asked for yet
        self._results: deque[_Result[T]] = deque()  # that may still be handed out
        self._under_way: deque[_Piece] = deque()  # void ones, too: their results will come
        self._waiting: _Asked | None = None
        self._guesses: dict[str, _Guess] = {}
        self._tried_at = -1  # the line's length when the quick drafter was asked last
        self._request: _Request | None = None
        self._next_number = 0
        self._last_result_at = 0.0
        self._handed_out_at: float | None = None

    @property
    def position(self) -> int:
        """Tokens that were asked for: what the session holds as far as the caller knows."""
        return self._asked

    # Events

    def ask(self, position: int, tokens: Sequence[int], now: float) -> list[Send | SetBack | HandOut[T] | WantDraft]:
        """The caller's next step: ``tokens``, of which the first stands at ``position``.

        Raises:
            ValueError: the last step has no result yet, no tokens, or a position behind what was asked for.
        """
        if self._waiting is not None or not tokens or not 0 <= position <= self._asked:
            raise ValueError(f"a step of {len(tokens)} tokens at {position}, with {self._asked} asked for")
        if self._handed_out_at is not None:
            self._policy.observe_own(now - self._handed_out_at)
            self._handed_out_at = None
        is_next = position == self._asked and len(tokens) == 1
        if is_next:
            self._judge(position, tokens[0])
        if is_next and position < len(self._ids) and self._ids[position] == tokens[0]:
            self._marks.pop(position, None)
            self._asked += 1
            self._waiting = _Asked(position=position, end=self._asked, at=now, is_plain=False)
            return [*self._hand_out(now), *self._run_ahead(now)]
        actions: list[Send | SetBack | HandOut[T] | WantDraft] = [*self._set_back(position)]
        if not is_next:  # guesses are judged token by token
            self._guesses.clear()
            if self._request is not None:
                self._request.is_void = True
        self._ids += tokens
        self._asked = len(self._ids)
        choice, candidate = self._choose_appended() if len(tokens) == 1 else (NOTHING, None)
        is_plain = not choice.count and not self._under_way
        self._waiting = _Asked(position=position, end=self._asked, at=now, is_plain=is_plain)
        if candidate is not None:
            self._append(candidate, choice.count)
        actions.append(self._send(position, now, is_plain=is_plain, is_measured=len(tokens) == 1))
        return [*actions, *self._run_ahead(now)]

    def result(self, number: int, payload: T, now: float) -> list[Send | SetBack | HandOut[T] | WantDraft]:
        """A piece has come back. They come in the order in which they were sent.

        Raises:
            ValueError: another piece is to come first.
        """
        if not self._under_way or self._under_way[0].number != number:
            raise ValueError(f"a result for piece {number}, which is not the first of those under way")
        piece = self._under_way.popleft()
        if piece.is_measured:
            size, seconds = piece.end - piece.position, now - piece.sent_at
            if piece.is_first:
                self._policy.observe_alone(size, seconds)
            else:
                self._policy.observe_behind(size, seconds, now - self._last_result_at)
        self._last_result_at = now
        if not piece.is_void:
            self._results.append(_Result(position=piece.position, end=piece.end, payload=payload))
            self._ready = piece.end
        return [*self._hand_out(now), *self._run_ahead(now)]

    def drafted(self, draft: Draft, seconds: float, now: float) -> list[Send | SetBack | HandOut[T] | WantDraft]:
        """The slow drafter has done what was asked of it, in ``seconds``.

        Raises:
            ValueError: nothing was asked of it.
        """
        if self._request is None or self._slow is None:
            raise ValueError("a draft that nobody asked for")
        request, self._request = self._request, None
        self._policy.observe_draft(self._slow, len(draft.tokens), seconds)
        if not request.is_void and draft.tokens:
            self._guesses[self._slow] = _Guess(start=request.start, tokens=draft.tokens, grades=draft.grades)
            for position in range(request.start, self._asked):  # asked for while it was being drafted
                self._judge_guess(self._slow, position, self._ids[position])
        return self._run_ahead(now)

    def failed(self, now: float) -> list[Send | SetBack | HandOut[T] | WantDraft]:
        """The chain is another one, with the session as of the first token without a result: all under way is lost."""
        self._under_way.clear()
        self._policy.forget_costs()
        asked = self._ids[self._ready : self._asked]
        actions: list[Send | SetBack | HandOut[T] | WantDraft] = [*self._set_back(self._ready)]
        if asked:  # and waited for: who asks has the results of all before
            position = len(self._ids)
            self._ids += asked
            self._asked = len(self._ids)
            actions.append(self._send(position, now, is_plain=False, is_measured=False))
        return actions

    def abandon(self) -> list[SetBack]:
        """The caller no longer waits: its step has not been."""
        if self._waiting is None:
            return []
        position, self._waiting = self._waiting.position, None
        return self._set_back(position)

    def begin_with(self, ids: Sequence[int]) -> None:
        """The session has these tokens already, which nobody will ask for again."""
        self._ids = list(ids)
        self._asked = self._ready = len(self._ids)

    def cut(self, position: int) -> list[SetBack]:
        """The caller forgets all tokens from ``position`` on."""
        self._waiting = None
        return self._set_back(position)

    def drop_void(self) -> None:
        """Void pieces will not come back after all: the session drops what it has been set back behind."""
        self._under_way = deque(piece for piece in self._under_way if not piece.is_void)

    # The line

    def _set_back(self, position: int) -> list[SetBack]:
        """Cut the line to ``position``."""
        had = len(self._ids)
        del self._ids[position:]
        self._asked, self._ready = min(self._asked, position), min(self._ready, position)
        self._marks = {at: mark for at, mark in self._marks.items() if at < position}
        while self._results and self._results[-1].position >= position:
            self._results.pop()
        if self._results:
            self._results[-1].end = min(self._results[-1].end, position)
        for piece in self._under_way:
            piece.is_void = piece.is_void or piece.end > position
        self._guesses = {name: guess for name, guess in self._guesses.items() if guess.start <= position}
        if self._request is not None and self._request.start > position:
            self._request.is_void = True
        self._tried_at = -1
        return [SetBack(position=position)] if had > position else []

    def _append(self, candidate: _Candidate, count: int) -> None:
        """Take the first ``count`` tokens of a draft into the line."""
        for token, grade, chance in zip(
            candidate.tokens[:count], candidate.grades[:count], candidate.chances[:count], strict=True
        ):
            self._marks[len(self._ids)] = _Mark(drafter=candidate.drafter, grade=grade, chance=chance)
            self._ids.append(token)

    def _send(self, position: int, now: float, *, is_plain: bool = False, is_measured: bool = True) -> Send:
        """Send the line from ``position`` on."""
        size = len(self._ids) - position
        arrival_s = self._policy.arrival_s(size, last_s=self._last_s(now)) if is_measured else None
        self._under_way.append(
            _Piece(
                number=self._next_number,
                position=position,
                end=len(self._ids),
                sent_at=now,
                expected_at=None if arrival_s is None else now + arrival_s,
                is_first=not self._under_way,
                is_measured=is_measured,
                is_plain=is_plain,
            )
        )
        self._next_number += 1
        return Send(number=self._next_number - 1, position=position, tokens=tuple(self._ids[position:]))

    def _hand_out(self, now: float) -> list[HandOut[T]]:
        """What is waited for, if it is here."""
        asked = self._waiting
        if asked is None or self._ready < asked.end:
            return []
        while self._results[0].end <= asked.position:
            self._results.popleft()
        result = self._results[0]
        self._waiting, self._handed_out_at = None, now
        if asked.end - asked.position == 1:
            self._policy.observe_wait(now - asked.at, plain=asked.is_plain)
        return [
            HandOut(payload=result.payload, start=asked.position - result.position, stop=asked.end - result.position)
        ]

    # Drafts

    def _judge(self, position: int, token: int) -> None:
        """The token at ``position`` is known: say who had guessed it."""
        mark = self._marks.get(position)
        if mark is not None:
            self._policy.observe_guess(mark.drafter, mark.grade, self._ids[position] == token)
        for name in list(self._guesses):
            self._judge_guess(name, position, token, is_counted=mark is None or mark.drafter != name)

    def _judge_guess(self, name: str, position: int, token: int, *, is_counted: bool = True) -> None:
        guess = self._guesses.get(name)
        if guess is None or position < guess.start:
            return
        index = position - guess.start
        if index >= len(guess.tokens):
            del self._guesses[name]
            return
        hit = guess.tokens[index] == token
        if is_counted:
            self._policy.observe_guess(name, guess.grades[index], hit)
        if not hit:
            del self._guesses[name]

    def _candidates(self) -> list[_Candidate]:
        """What drafters have to continue the line with."""
        room = self.limit - len(self._ids)
        if room < 1:
            return []
        quick = self._quick
        if quick is not None and self._tried_at != len(self._ids) and len(self._rest(quick.name).tokens) < _FEW:
            self._tried_at = len(self._ids)
            draft = quick.propose(self._ids, _AT_ONCE)
            if draft.tokens:
                self._guesses[quick.name] = _Guess(start=len(self._ids), tokens=draft.tokens, grades=draft.grades)
        return [
            _Candidate(
                drafter=rest.drafter,
                tokens=rest.tokens[:room],
                grades=rest.grades[:room],
                chances=self._policy.chances(rest.drafter, rest.grades[:room]),
            )
            for rest in map(self._rest, self._guesses)
            if rest.tokens
        ]

    def _rest(self, name: str) -> _Candidate:
        """What of a drafter's last draft continues the line."""
        guess = self._guesses.get(name)
        if guess is None or guess.start > len(self._ids):
            return _Candidate(drafter=name)
        index = len(self._ids) - guess.start
        first = max(guess.start, self._asked)  # before that, it was judged
        if tuple(self._ids[first:]) != guess.tokens[first - guess.start : index]:
            return _Candidate(drafter=name)
        return _Candidate(drafter=name, tokens=guess.tokens[index:], grades=guess.grades[index:])

    def _choose_appended(self) -> tuple[Choice, _Candidate | None]:
        best: tuple[Choice, _Candidate | None] = (NOTHING, None)
        for candidate in self._candidates():
            choice = self._policy.appended(candidate.chances)
            if choice.worth > best[0].worth:
                best = choice, candidate
        return best

    def _run_ahead(self, now: float) -> list[Send | SetBack | HandOut[T] | WantDraft]:
        """Send what is probably going to be asked for next, while there is such a thing and it pays."""
        actions: list[Send | SetBack | HandOut[T] | WantDraft] = []
        rival = 0.0
        while True:
            candidates = self._candidates()
            rival = max((rest.chances[0] for rest in candidates if rest.drafter != self._slow), default=0.0)
            best: tuple[Choice, _Candidate | None] = (NOTHING, None)
            live = [piece for piece in self._under_way if not piece.is_void]
            if len(live) < self._policy.settings.max_depth and all(piece.expected_at is not None for piece in live):
                verdict_s = None
                if live and live[0].expected_at is not None:
                    verdict_s = max(live[0].expected_at - now, 0.0)
                for candidate in candidates:
                    choice = self._policy.ahead(
                        candidate.chances, chance=self._chance, verdict_s=verdict_s, last_s=self._last_s(now)
                    )
                    if choice.worth > best[0].worth:
                        best = choice, candidate
            if best[1] is None:
                break
            position = len(self._ids)
            self._append(best[1], best[0].count)
            actions.append(self._send(position, now))
        if self._slow is not None and self._request is None and not self._rest(self._slow).tokens and self._ids:
            count = self._policy.wanted(self._slow, chance=self._chance, rival=rival)
            count = min(count, self.limit - len(self._ids))
            if count > 0:
                self._request = _Request(start=len(self._ids))
                actions.append(WantDraft(ids=list(self._ids), count=count))
        return actions

    @property
    def _chance(self) -> float:
        """That all of the line will be asked for."""
        return prod(mark.chance for mark in self._marks.values())

    def _last_s(self, now: float) -> float:
        """Until all that is under way has come back; below 0 if nothing is."""
        if not self._under_way:
            return -1e9
        expected_at = self._under_way[-1].expected_at
        return 0.0 if expected_at is None else max(expected_at - now, 0.0)

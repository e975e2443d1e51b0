"""Who may hold how much of the cache. Bookkeeping only: no tensors, no I/O.

Memory comes in *slots*: room for ``length`` tokens of ``rows`` rows in every block that a session runs, the length
being one of a few buckets. The budget counts ``rows * length``. A session begins without a slot and is given a
longer one as it grows; its step is ``reserve``, run, ``commit`` (or ``abort``), and between the first and the last its
slot stays where it is. Whatever else happens, the driver learns from the :class:`Change` that each call returns::

    for slot in change.freed:      zero it and let it go, first: what is granted may be the same again
    if change.granted:             make it, and copy ``change.copies`` into it
    for slot in change.left:       zero it and let it go: the session has moved out
    for session in change.ended:   forget it; its client comes back, here or elsewhere, and replays

Leases
    Each use renews a session's lease. One that has run out is anybody's for the taking; after ``keep_s`` it ends in
    any case. A peer may fill the whole cache while nobody else wants any. Once somebody does who holds less than
    a share, whoever holds more than a share gives back: the longest unused session first, and no session within a
    step, which then ends after it. Until the one who wanted has come back, or ``want_s`` is over, nobody grows
    beyond a share into what it is waiting for.

Prefixes
    The first tokens of a session can be offered under a digest of what determines them: the hidden states that came
    in, and how they were cut. Another session of the same peer (of any, if that is allowed), with as many rows and
    over the same blocks, may begin there: it reads the first tokens in the other's slot, and has the rest in a slot of
    its own. A slot is kept as long as anybody reads it. Who offered and wants to write where others read, or to grow,
    moves on: it keeps reading there, too, and has the rest elsewhere. A step that puts rows into another order has a
    new slot of its own for all.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Final

from compute.errors import BadInput, OutOfCache

RETRY_SOON_S: Final = 0.25  # steps that run now hold what will be free; they take less
RETRY_MOST_S: Final = 60.0
MAX_PREFIXES_PER_SLOT: Final = 32  # of 64 tokens each: BLOOM's 2,048


@dataclass(frozen=True, kw_only=True)
class SlotSettings:
    """Bounds of the cache.

    Attributes:
        cache_tokens: Tokens in all slots together, rows counted apart.
        lengths: Buckets of slots' lengths, rising.
        max_sessions: Open sessions.
        max_sessions_per_peer: Of one peer.
        share: Of the cache, for one peer while others want in.
        lease_s: After so long without use a session may be ended for anybody's sake.
        keep_s: After so long it is ended.
        want_s: How long room is held for who was refused: it was told to come back sooner than that.
        share_between_peers: Whether a session may begin with what another peer's session offers. What it reads there
            counts for that peer. By the time that its steps take, a peer can find out what others have asked.
    """

    cache_tokens: int = 16_384
    lengths: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)
    max_sessions: int = 256
    max_sessions_per_peer: int = 4
    share: float = 0.25
    lease_s: float = 60.0
    keep_s: float = 600.0
    want_s: float = 2.0
    share_between_peers: bool = False

    def __post_init__(self) -> None:
        """Check the bounds.

        Raises:
            ValueError: Lengths do not rise, a bound is not positive, or ``share`` is no part of 1.
        """
        if not self.lengths or self.lengths[0] < 1 or any(a >= b for a, b in itertools.pairwise(self.lengths)):
            raise ValueError(f"lengths are {self.lengths}, expected rising lengths")
        if min(self.cache_tokens, self.max_sessions, self.max_sessions_per_peer) < 1:
            raise ValueError("there must be room for at least one session")
        if not 0 < self.share <= 1 or not 0 < self.lease_s <= self.keep_s or self.want_s <= RETRY_SOON_S:
            raise ValueError(
                "a share is at most 1, a lease ends before it is kept no more, room is held until asked for"
            )


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Room for ``rows`` rows of ``length`` tokens. ``index`` tells it from others of its shape, and is used again."""

    rows: int
    length: int
    index: int

    @property
    def tokens(self) -> int:
        """What the budget counts."""
        return self.rows * self.length


@dataclass(frozen=True, kw_only=True)
class Copy:
    """Tokens ``[start, stop)`` of a session, from one slot into another.

    ``source_first`` and ``target_first`` are the tokens that stand first in them.
    """

    source: Slot
    source_first: int
    target_first: int
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Change:
    """What the driver has to do, in this order.

    Attributes:
        freed: Slots to be zeroed and let go.
        granted: A slot to be made for the session that asked.
        copies: What to copy into it.
        left: Slots that the session had before, to be zeroed and let go.
        ended: Sessions that are gone.
    """

    freed: tuple[Slot, ...] = ()
    granted: Slot | None = None
    copies: tuple[Copy, ...] = ()
    left: tuple[Slot, ...] = ()
    ended: tuple[Hashable, ...] = ()


class NoRoom(OutOfCache):
    """The cache is taken, or the peer has its share of it or its number of sessions.

    Attributes:
        retry_after_s: When there may be room.
        change: What was done towards it, for the driver to follow.
    """

    def __init__(self, message: str, retry_after_s: float, change: Change | None = None) -> None:
        """Make the error; ``retry_after_s`` is brought within bounds."""
        super().__init__(message)
        self.retry_after_s = min(max(retry_after_s, RETRY_SOON_S), RETRY_MOST_S)
        self.change = change or Change()


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a session's tokens are: ``[0, shared)`` in ``shared_slot``, the rest in ``slot``."""

    shared_slot: Slot | None
    shared: int
    slot: Slot | None
    length: int


@dataclass(eq=False)
class _Holding:
    """A slot that is given out."""

    slot: Slot
    peer: Hashable
    owner: Hashable | None
    readers: set[Hashable] = field(default_factory=set)
    prefixes: dict[int, Hashable] = field(default_factory=dict)  # tokens -> key in the directory


@dataclass(eq=False)
class _Session:
    key: Hashable
    peer: Hashable
    rows: int
    max_length: int
    group: Hashable
    used_at: float
    length: int = 0
    shared: int = 0
    source: _Holding | None = None  # where the first ``shared`` tokens are
    own: _Holding | None = None  # where those after them are
    busy: bool = False
    leaving: bool = False  # closed while its step runs
    owed: bool = False  # to be ended after its step, if somebody still wants in then


class Slots:
    """The books. ``now`` is in seconds and never goes back."""

    def __init__(self, settings: SlotSettings | None = None) -> None:
        """Begin with everything free."""
        self.settings = settings or SlotSettings()
        self.used_tokens = 0
        self._sessions: dict[Hashable, _Session] = {}
        self._held: Counter[Hashable] = Counter()  # tokens by peer
        self._open: Counter[Hashable] = Counter()  # sessions by peer
        self._wants: dict[Hashable, tuple[int, float]] = {}  # peer: tokens, until when
        self._directory: dict[Hashable, _Holding] = {}
        self._free: dict[tuple[int, int], list[int]] = {}  # indexes of a shape that were used before
        self._made: Counter[tuple[int, int]] = Counter()

    @property
    def free_tokens(self) -> int:
        """Not given out."""
        return self.settings.cache_tokens - self.used_tokens

    @property
    def share_tokens(self) -> int:
        """What one peer may hold while others want in."""
        return int(self.settings.cache_tokens * self.settings.share)

    def held_tokens(self, peer: Hashable) -> int:
        """By all slots that were given out on a peer's account."""
        return self._held[peer]

    def sessions(self, peer: Hashable | None = None) -> int:
        """Open ones, of one peer or in all."""
        return len(self._sessions) if peer is None else self._open[peer]

    def place(self, session: Hashable) -> Place:
        """Where a session's tokens are.

        Raises:
            BadInput: ``no-session``.
        """
        known = self._session(session)
        source = known.source.slot if known.source else None
        own = known.own.slot if known.own else None
        return Place(shared_slot=source, shared=known.shared, slot=own, length=known.length)

    def open(
        self, session: Hashable, peer: Hashable, *, rows: int, max_length: int, now: float, group: Hashable = None
    ) -> Change:
        """Open a session, which holds nothing yet.

        Args:
            session: A key that no open session has.
            peer: On whose account.
            rows: Of every step.
            max_length: Most tokens of a row.
            now: The time.
            group: What it runs; prefixes are shared within it.

        Raises:
            BadInput: ``bad-value``: ``rows`` or ``max_length`` is less than 1; ``too-long``: no slot is as long, or
                one token of so many rows is more than the cache.
            NoRoom: The peer has its number of sessions, or all together have.
            ValueError: The session is open.
        """
        if session in self._sessions:
            raise ValueError(f"session {session!r} is open already")
        if rows < 1 or max_length < 1:
            raise BadInput("bad-value", f"{rows} rows of {max_length} tokens, expected at least 1")
        if max_length > self.settings.lengths[-1]:
            raise BadInput("too-long", f"max_length is {max_length}, at most {self.settings.lengths[-1]} is served")
        if rows > self.settings.cache_tokens:
            raise BadInput("too-long", f"{rows} rows are more than the whole cache")
        change = self._make_place(peer, now)
        self._sessions[session] = _Session(session, peer, rows, max_length, group, now)
        self._open[peer] += 1
        return change

    def reserve(self, session: Hashable, position: int, tokens: int, now: float, *, anew: bool = False) -> Change:
        """Make room for a step of ``tokens`` tokens at ``position``, and forget what the session has from there on.

        Until :meth:`commit` or :meth:`abort` the session is within its step.

        Args:
            session: Which.
            position: Of the step's first token.
            tokens: How many.
            now: The time.
            anew: Have everything copied into a new slot that nobody else reads: the rows are about to change.

        Raises:
            BadInput: ``no-session``; ``bad-shape``; ``bad-position``: a gap; ``too-long``.
            NoRoom: There is none; the session is as before.
            ValueError: The session is within a step.
        """
        known = self._session(session)
        if known.busy:
            raise ValueError(f"session {session!r} is within a step")
        end = position + tokens
        if tokens < 1:
            raise BadInput("bad-shape", "a step needs at least one token")
        if not 0 <= position <= known.length:
            raise BadInput("bad-position", f"a step at {position}, but the session has {known.length} tokens")
        if end > known.max_length:
            raise BadInput("too-long", f"{position} + {tokens} tokens are more than the session's {known.max_length}")
        if known.rows * end > self.settings.cache_tokens:
            raise BadInput("too-long", f"{known.rows} rows of {end} tokens are more than the whole cache")
        settle = self._begin_anew if anew else self._settle
        change = settle(known, position, end, now)
        if known.own is not None:
            self._withdraw(known.own, position)
        known.length = position
        known.busy = True
        return change

    def commit(self, session: Hashable, length: int, now: float) -> Change:
        """The step has written everything up to ``length``.

        Raises:
            ValueError: The session is not within a step, or has no room for so many.
        """
        known = self._stepping(session)
        room = known.shared + (known.own.slot.length if known.own else 0)
        if not known.length <= length <= room:
            raise ValueError(f"cannot commit {length} tokens: {known.length} before, room for {room}")
        known.length = length
        return self._end_step(known, now)

    def abort(self, session: Hashable, now: float) -> Change:
        """The step failed, or was given up: the session has what lies before its position.

        Raises:
            ValueError: The session is not within a step.
        """
        return self._end_step(self._stepping(session), now)

    def set_back(self, session: Hashable, position: int, now: float) -> None:
        """Forget what a session has from ``position`` on; its room stays.

        Raises:
            BadInput: ``no-session``; ``bad-position``: it has less.
            ValueError: The session is within a step.
        """
        known = self._session(session)
        if known.busy:
            raise ValueError(f"session {session!r} is within a step")
        if not 0 <= position <= known.length:
            raise BadInput("bad-position", f"back to {position}, but the session has {known.length} tokens")
        known.length = position
        known.used_at = now

    def reset(self, session: Hashable, now: float) -> Change:
        """Make a session as it was when it was opened.

        Raises:
            BadInput: ``no-session``.
            ValueError: The session is within a step.
        """
        known = self._session(session)
        if known.busy:
            raise ValueError(f"session {session!r} is within a step")
        known.length = 0
        known.used_at = now
        return Change(freed=tuple(self._give_back(known)))

    def close(self, session: Hashable) -> Change:
        """End a session; one within a step is gone after it. An unknown one is no error."""
        known = self._sessions.get(session)
        if known is None:
            return Change()
        if known.busy:
            known.leaving = True
            return Change()
        return Change(freed=tuple(self._remove(known)))

    def expire(self, now: float) -> Change:
        """End what nobody has used for ``keep_s``."""
        old = [each for each in self._sessions.values() if not each.busy and now - each.used_at >= self.settings.keep_s]
        return self._end(old)

    # Prefixes

    def offer(self, session: Hashable, tokens: int, digest: bytes) -> bool:
        """Let others begin with a session's first ``tokens`` tokens.

        Returns:
            Whether they may: not if the session itself began with somebody else's, or offers many already.

        Raises:
            BadInput: ``no-session``.
            ValueError: The session has fewer tokens.
        """
        known = self._session(session)
        if not 1 <= tokens <= known.length:
            raise ValueError(f"cannot offer {tokens} of {known.length} tokens")
        holding = known.own
        if known.shared or holding is None or len(holding.prefixes) >= MAX_PREFIXES_PER_SLOT:
            return False
        key = self._prefix_key(known, tokens, digest)
        if key in self._directory or tokens in holding.prefixes:
            return False
        holding.prefixes[tokens] = key
        self._directory[key] = holding
        return True

    def begin_with(self, session: Hashable, digests: Iterable[tuple[int, bytes]], now: float) -> int:
        """Begin a session with tokens that another has, of the same peer unless all may share; or go on with more of
        these.

        Args:
            session: One without tokens of its own.
            digests: What it is about to write: digests of its first tokens, for several numbers of them.
            now: The time.

        Returns:
            How many it now has: the most that are there, or as many as before.

        Raises:
            BadInput: ``no-session``.
            ValueError: The session has begun already.
        """
        known = self._session(session)
        if known.busy or known.own or known.length != known.shared:
            raise ValueError(f"session {session!r} has begun already")
        for tokens, digest in sorted(digests, reverse=True):
            holding = self._directory.get(self._prefix_key(known, tokens, digest))
            if holding is None or not known.shared < tokens <= known.max_length:
                continue
            if known.source not in (None, holding):
                continue
            known.source = holding
            holding.readers.add(known.key)
            known.shared = known.length = tokens
            known.used_at = now
            return tokens
        return known.shared

    def _prefix_key(self, known: _Session, tokens: int, digest: bytes) -> Hashable:
        whose = () if self.settings.share_between_peers else (known.peer,)
        return (*whose, known.group, known.rows, tokens, digest)

    # Steps

    def _session(self, session: Hashable) -> _Session:
        known = self._sessions.get(session)
        if known is None or known.leaving:
            raise BadInput("no-session", "no such session, or it is closed")
        return known

    def _stepping(self, session: Hashable) -> _Session:
        known = self._sessions.get(session)
        if known is None or not known.busy:
            raise ValueError(f"session {session!r} is not within a step")
        return known

    def _end_step(self, known: _Session, now: float) -> Change:
        known.busy = False
        known.used_at = now
        if known.leaving:
            return Change(freed=tuple(self._remove(known)))
        owed, known.owed = known.owed, False
        if owed and self._wanted(known.peer, now) and self._held[known.peer] > self.share_tokens:
            return self._end([known])
        return Change()

    def _bucket(self, tokens: int, rows: int) -> int:
        """The least length that holds so many tokens, or all that the cache has where that is more."""
        length = next(length for length in self.settings.lengths if length >= tokens)
        return min(length, self.settings.cache_tokens // rows)

    # Where a session's tokens are

    def _settle(self, known: _Session, position: int, end: int, now: float) -> Change:
        """Give a session a slot that ``[position, end)`` can be written to, and that nobody else reads there."""
        old = known.own
        if old is not None and old.readers:  # then the session shares nobody's, and the slot begins with token 0
            read = max(self._sessions[reader].shared for reader in old.readers)
            if read <= position and end <= old.slot.length:
                return Change()
            return self._move_on(known, old, min(position, read), position, end, now)
        shared = min(known.shared, position)
        if old is not None and end - shared <= old.slot.length:
            return Change(freed=tuple(self._share_only(known, shared)))
        length = self._bucket(end - shared, known.rows)
        ended, freed = self._find_room(known, known.rows * (length - (old.slot.length if old else 0)), now)
        copied = old is not None and known.shared < position
        first = known.shared
        freed += self._share_only(known, shared)
        left: Slot | None = None
        prefixes: dict[int, Hashable] = {}
        if old is not None:
            if not shared:
                prefixes = dict(old.prefixes)
            left = self._release(old)
        known.own = new = self._grant(known, length)
        for tokens, key in prefixes.items():
            new.prefixes[tokens] = key
            self._directory[key] = new
        copies: list[Copy] = []
        if copied and left is not None:
            copies.append(Copy(source=left, source_first=first, target_first=shared, start=shared, stop=position))
        return Change(
            freed=tuple(freed),
            granted=new.slot,
            copies=tuple(copies),
            left=() if left is None else (left,),
            ended=tuple(ended),
        )

    def _move_on(self, known: _Session, old: _Holding, shared: int, position: int, end: int, now: float) -> Change:
        """Leave a slot to those who read it, read there as they do, and have the rest elsewhere."""
        length = self._bucket(end - shared, known.rows)
        ended, freed = self._find_room(known, known.rows * length, now)
        known.own = self._grant(known, length)
        old.owner = None
        if shared:
            known.source, known.shared = old, shared
            old.readers.add(known.key)
        left = () if old.readers else (self._release(old),)  # who read it may just have been ended
        copies: list[Copy] = []
        if shared < position:
            copies.append(Copy(source=old.slot, source_first=0, target_first=shared, start=shared, stop=position))
        return Change(freed=tuple(freed), granted=known.own.slot, copies=tuple(copies), left=left, ended=tuple(ended))

    def _begin_anew(self, known: _Session, position: int, end: int, now: float) -> Change:
        """Have all tokens before ``position`` in a new slot, and neither read nor offer any other."""
        length = self._bucket(end, known.rows)
        own, source, shared = known.own, known.source, min(known.shared, position)
        leaves = own.slot.tokens if own is not None and not own.readers else 0
        ended, freed = self._find_room(known, known.rows * length - leaves, now)
        copies: list[Copy] = []
        if source is not None and shared:
            copies.append(Copy(source=source.slot, source_first=0, target_first=0, start=0, stop=shared))
        if own is not None and shared < position:
            first = known.shared
            copies.append(Copy(source=own.slot, source_first=first, target_first=0, start=shared, stop=position))
        new = self._grant(known, length)  # before anything is given back, which it must not be
        left = self._give_back(known)
        known.own = new
        return Change(freed=tuple(freed), granted=new.slot, copies=tuple(copies), left=tuple(left), ended=tuple(ended))

    def _share_only(self, known: _Session, shared: int) -> list[Slot]:
        """Read no more than the first ``shared`` tokens in another's slot."""
        known.shared = shared
        if shared or known.source is None:
            return []
        source, known.source = known.source, None
        return self._stop_reading(known, source)

    def _stop_reading(self, known: _Session, source: _Holding) -> list[Slot]:
        source.readers.discard(known.key)
        return [] if source.readers or source.owner is not None else [self._release(source)]

    def _withdraw(self, holding: _Holding, position: int) -> None:
        """What lies beyond is overwritten: it is no prefix any more."""
        for tokens in [each for each in holding.prefixes if each > position]:
            self._directory.pop(holding.prefixes.pop(tokens), None)

    # Who may have room

    def _find_room(self, known: _Session, extra: int, now: float) -> tuple[list[Hashable], list[Slot]]:
        """Room for ``extra`` tokens, made if need be at the cost of those who have no right to theirs.

        Returns:
            Sessions that ended for it, and their slots.

        Raises:
            NoRoom: There is none, or it is held for others.
        """
        peer = known.peer
        within = self._held[peer] + extra <= self.share_tokens
        reserved = self._wanted(peer, now)
        ended: list[Hashable] = []
        freed: list[Slot] = []
        if extra > 0:
            for each in self._to_be_ended(known, within, now):
                if self.free_tokens - reserved >= extra:
                    break
                if self._lease_is_over(each, now) or self._held[each.peer] > self.share_tokens:
                    ended.append(each.key)
                    freed += self._remove(each)
            if self.free_tokens - reserved < extra:
                retry_after_s = self._ask_for_room(peer, extra + reserved, within, now)
                if within:
                    self._wants[peer] = (extra, now + self.settings.want_s)
                raise NoRoom(
                    f"{extra} more cache slots are needed, {max(0, self.free_tokens - reserved)} of "
                    f"{self.settings.cache_tokens} are free for this peer",
                    retry_after_s,
                    Change(freed=tuple(freed), ended=tuple(ended)),
                )
        self._wants.pop(peer, None)
        return ended, freed

    def _to_be_ended(self, known: _Session, within: bool, now: float) -> list[_Session]:
        """Whose slots may be taken, the longest unused first: of leases that are over, and for who holds less than a
        share, of those who hold more.
        """
        idle = [each for each in self._sessions.values() if not each.busy and each is not known]
        over = [each for each in idle if self._lease_is_over(each, now)]
        hogs = [each for each in idle if within and each.peer != known.peer and not self._lease_is_over(each, now)]
        return sorted(over, key=lambda each: each.used_at) + sorted(hogs, key=lambda each: each.used_at)

    def _ask_for_room(self, peer: Hashable, needed: int, within: bool, now: float) -> float:
        """Have steps that run be the last of their sessions, where that makes room; when to come again."""
        held_until = [until for other, (_, until) in self._wants.items() if other != peer and until > now]
        if not within:
            return min([self._next_lease_s(now), *(until - now for until in held_until)])
        coming = self.free_tokens
        held = self._held.copy()
        for each in sorted(self._sessions.values(), key=lambda each: each.used_at):
            if coming >= needed:
                break
            if each.busy and each.own is not None and each.peer != peer and held[each.peer] > self.share_tokens:
                each.owed = True
                coming += each.own.slot.tokens
                held[each.peer] -= each.own.slot.tokens
        return RETRY_SOON_S if coming >= needed else self._next_lease_s(now)

    def _wanted(self, peer: Hashable, now: float) -> int:
        """What is held for others; for who waits as well, only what others asked for before."""
        self._wants = {other: want for other, want in self._wants.items() if want[1] > now}
        before = itertools.takewhile(lambda other: other != peer, self._wants)
        return sum(self._wants[other][0] for other in before)

    def _lease_is_over(self, each: _Session, now: float) -> bool:
        return not each.busy and now - each.used_at >= self.settings.lease_s

    def _next_lease_s(self, now: float) -> float:
        """Until a lease is over that is not renewed."""
        return min((each.used_at + self.settings.lease_s - now for each in self._sessions.values()), default=0.0)

    def _make_place(self, peer: Hashable, now: float) -> Change:
        """Room for one more session in number, at the cost of leases that are over."""
        for count, most, whose in (
            (self._open[peer], self.settings.max_sessions_per_peer, peer),
            (len(self._sessions), self.settings.max_sessions, None),
        ):
            if count < most:
                continue
            mine = [each for each in self._sessions.values() if whose is None or each.peer == whose]
            oldest = min((each for each in mine if not each.busy), key=lambda each: each.used_at, default=None)
            if oldest is not None and self._lease_is_over(oldest, now):
                return self._end([oldest])
            retry_after_s = self.settings.lease_s if oldest is None else oldest.used_at + self.settings.lease_s - now
            raise NoRoom(f"{count} sessions {'of this peer ' if whose else ''}are open already", retry_after_s)
        return Change()

    # Giving and taking

    def _grant(self, known: _Session, length: int) -> _Holding:
        shape = (known.rows, length)
        used_before = self._free.get(shape)
        if used_before:
            index = heapq.heappop(used_before)
        else:
            index = self._made[shape]
            self._made[shape] += 1
        slot = Slot(rows=known.rows, length=length, index=index)
        self.used_tokens += slot.tokens
        self._held[known.peer] += slot.tokens
        return _Holding(slot, known.peer, known.key)

    def _release(self, holding: _Holding) -> Slot:
        self._withdraw(holding, -1)
        slot = holding.slot
        self.used_tokens -= slot.tokens
        self._held[holding.peer] -= slot.tokens
        if not self._held[holding.peer]:
            del self._held[holding.peer]
        heapq.heappush(self._free.setdefault((slot.rows, slot.length), []), slot.index)
        return slot

    def _remove(self, known: _Session) -> list[Slot]:
        """End a session; what others read stays."""
        del self._sessions[known.key]
        self._open[known.peer] -= 1
        if not self._open[known.peer]:
            del self._open[known.peer]
        return self._give_back(known)

    def _give_back(self, known: _Session) -> list[Slot]:
        """Leave a session without a place; what others read stays."""
        freed: list[Slot] = []
        if known.source is not None:
            source, known.source, known.shared = known.source, None, 0
            freed += self._stop_reading(known, source)
        if known.own is not None:
            own, known.own = known.own, None
            own.owner = None
            if not own.readers:
                freed.append(self._release(own))
        return freed

    def _end(self, sessions: list[_Session]) -> Change:
        freed = [slot for each in sessions for slot in self._remove(each)]
        return Change(freed=tuple(freed), ended=tuple(each.key for each in sessions))

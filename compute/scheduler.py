"""Who runs next: decode steps in batches, prefill in pieces, training in the gaps. No I/O, no torch.

The driver submits jobs, asks for a batch whenever the model is free, and says what it took::

    ticket = scheduler.submit(Job(peer=..., session=..., kind=Kind.DECODE, passes=24), now)
    batch = scheduler.next_batch(now)           # None: nothing to do
    over = scheduler.done(batch, took_s, now)   # tickets that are finished, failed or no longer wanted

Which tier runs
    Decode before prefill before training; but a lower tier with work has a guaranteed share of the time. While it waits
    it earns that share of what the others use, and when it has earned its next slice it goes first. What it gets while
    the tiers above have nothing to do costs it nothing. Prefill and training are cut into slices that take no longer
    than ``decode_wait_s``, by measured times, and decode steps that wait are never made to wait for several slices
    that take longer than that together. Nothing waits for company: a batch takes what is ready.

Which peer's work
    Within a tier, start-time fair queueing by measured seconds: however many sessions a peer has and however its
    work is cut, peers who always wait get the same. What a batch took is split among its rows. A peer whose turn it
    is, but whose step does not fit into what is left of a batch, begins the next one.

How work is cut
    A job is ``units`` of ``unit_tokens`` tokens, each of which goes through ``passes`` blocks. Units are tokens of
    a row for prefill (``unit_tokens`` then is the number of rows), and sequences for training. A slice is a run of
    units through a run of passes: first as many units as a chunk holds, and where these are too slow for one slice,
    that chunk some passes at a time. Chunks of a job start where the last one ended, and their sizes come from
    ``chunk_tokens``; where a kernel's bits depend on how many rows it sees, give it one size only.

Source: P. Goyal, H. M. Vin, H. Cheng, "Start-time Fair Queueing", SIGCOMM 1996.
"""

from __future__ import annotations

import enum
import heapq
import itertools
import math
from collections import Counter, deque
from collections.abc import Collection, Hashable, Iterator
from dataclasses import dataclass, field, replace
from typing import Final

from compute.errors import EngineBusy
from compute.estimates import TIERS, Estimates, Kind, Tier

GUESS_S: Final = 1e-5  # a token's pass, before any was measured; used for fairness alone
RATE_WEIGHT: Final = 0.2  # of a new measurement in a tier's seconds per token and pass
USE_FADES_S: Final = 2.0  # over which time a tier's use is averaged
CREDIT_S: Final = 1.0  # a tier that waits saves up its share of this long, and at least a slice
RETRY_LEAST_S: Final = 0.05
RETRY_MOST_S: Final = 60.0
RETRY_UNKNOWN_S: Final = 1.0  # before anything was measured
TIDY_PEERS: Final = 64  # tags of peers who left are looked for when there are so many, and twice what was left


@dataclass(frozen=True, kw_only=True)
class SchedulerSettings:
    """Bounds and shares of a scheduler.

    Attributes:
        buckets: Rows that a decode batch is padded to, rising; the last is the most that one holds. 32 is where
            fused 4-bit kernels of GPUs end.
        chunk_tokens: Sizes of prefill chunks, rising; all rows together.
        decode_wait_s: What a decode step waits at most for other tiers' slices, as far as those can be cut.
        prefill_share: Of the time, for prefill while it has work.
        training_share: Of the time, for training while it has work. Decode is guaranteed the rest.
        max_waiting: Most jobs that wait or run.
        max_waiting_per_peer: Most jobs of one peer: four sessions, and a few steps ahead in each.
        decode_max_wait_s: A decode step that would wait longer is refused: the client has other nodes.
        prefill_max_wait_s: Likewise, beyond the time that it takes alone.
        training_max_wait_s: Likewise.
    """

    buckets: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    chunk_tokens: tuple[int, ...] = (128, 256, 512)
    decode_wait_s: float = 0.03
    prefill_share: float = 0.2
    training_share: float = 0.1
    max_waiting: int = 256
    max_waiting_per_peer: int = 16
    decode_max_wait_s: float = 2.0
    prefill_max_wait_s: float = 20.0
    training_max_wait_s: float = 60.0

    def __post_init__(self) -> None:
        """Check the bounds.

        Raises:
            ValueError: Sizes do not rise from 1, shares leave decode nothing, or a bound is not positive.
        """
        for name, sizes in (("buckets", self.buckets), ("chunk_tokens", self.chunk_tokens)):
            if not sizes or sizes[0] < 1 or any(a >= b for a, b in itertools.pairwise(sizes)):
                raise ValueError(f"{name} are {sizes}, expected rising sizes")
        if min(self.prefill_share, self.training_share) <= 0 or self.prefill_share + self.training_share >= 1:
            raise ValueError("the shares of prefill and training must be positive and leave something for decode")
        if self.max_waiting < 1 or self.max_waiting_per_peer < 1:
            raise ValueError("at least one job must be allowed to wait")
        if min(self.decode_wait_s, *self.max_wait_s.values()) <= 0:
            raise ValueError("waits must be positive")

    @property
    def shares(self) -> dict[Tier, float]:
        """Of the time, by tier."""
        lower = {Tier.PREFILL: self.prefill_share, Tier.TRAINING: self.training_share}
        return {Tier.DECODE: 1.0 - sum(lower.values()), **lower}

    @property
    def max_wait_s(self) -> dict[Tier, float]:
        """By tier."""
        return {
            Tier.DECODE: self.decode_max_wait_s,
            Tier.PREFILL: self.prefill_max_wait_s,
            Tier.TRAINING: self.training_max_wait_s,
        }


class Refused(EngineBusy):
    """Too much waits already.

    Attributes:
        retry_after_s: When there should be room, by what is queued and what such work has taken.
    """

    def __init__(self, message: str, retry_after_s: float) -> None:
        """Make the error; ``retry_after_s`` is brought within bounds."""
        super().__init__(message)
        self.retry_after_s = min(max(retry_after_s, RETRY_LEAST_S), RETRY_MOST_S)


@dataclass(frozen=True, kw_only=True)
class Job:
    """Something to run.

    Attributes:
        peer: On whose account.
        session: Jobs of one session run one after another, in the order of submission. Work without a session
            brings a key of its own.
        kind: What it does.
        units: How many parts it may be cut into: tokens for prefill, sequences for training. Decode: 1.
        unit_tokens: Tokens in each. Decode: rows, several tokens of one row counting as several.
        passes: Blocks that each unit goes through.
        group: Only decode steps of the same group (the same blocks) share a batch.
    """

    peer: Hashable
    session: Hashable
    kind: Kind
    units: int = 1
    unit_tokens: int = 1
    passes: int = 1
    group: Hashable = None

    @property
    def work(self) -> int:
        """Tokens times passes."""
        return self.units * self.unit_tokens * self.passes


class State(enum.Enum):
    """Where a ticket is; the last three are for good."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(eq=False)
class Ticket:
    """A job's place. To be read, not changed.

    Attributes:
        job: What was submitted.
        number: Rises with each submission.
        state: See :class:`State`.
        unit: First unit that is not through all passes.
        chunk_end: Unit after the chunk that is between passes; equal to ``unit`` if none is.
        passed: Passes that this chunk is through.
        unwanted: Cancelled while it ran: what runs is finished, nothing more is started.
    """

    job: Job
    number: int
    state: State = State.WAITING
    unit: int = 0
    chunk_end: int = 0
    passed: int = 0
    unwanted: bool = False

    @property
    def work_left(self) -> int:
        """Tokens times passes, still to do."""
        job = self.job
        return ((job.units - self.unit) * job.passes - (self.chunk_end - self.unit) * self.passed) * job.unit_tokens


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Units ``[start, stop)`` of a ticket's job, through passes ``[first_pass, last_pass)``."""

    ticket: Ticket
    start: int
    stop: int
    first_pass: int
    last_pass: int

    @property
    def tokens(self) -> int:
        """In each pass."""
        return (self.stop - self.start) * self.ticket.job.unit_tokens

    @property
    def work(self) -> int:
        """Tokens times passes."""
        return self.tokens * (self.last_pass - self.first_pass)


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """What to run at once.

    Attributes:
        kind: Of all its slices.
        slices: Decode: steps of different sessions; else one.
        rows: Tokens in a pass, all slices together.
        bucket: Decode: what ``rows`` is to be padded to; else ``rows``.
        began: When it was handed out.
    """

    kind: Kind
    slices: tuple[Slice, ...]
    rows: int
    bucket: int
    began: float
    _charged: tuple[float, ...] = field(repr=False)
    _beside: frozenset[Tier] = field(repr=False)  # tiers that wait while it runs


class _Queue:
    """One tier: what is ready, by peer, and what each peer has been given."""

    def __init__(self) -> None:
        self.ready: dict[Hashable, dict[int, Ticket]] = {}
        self.work: dict[Hashable, int] = {}  # tokens times passes, of all that waits or runs
        self.rate_s: float | None = None  # seconds per token and pass
        self.credit_s = 0.0
        self._promised: dict[Hashable, float] = {}  # peers that were sent away, and when they were told to come again
        self._tags: dict[Hashable, float] = {}
        self._virtual = 0.0  # the latest start tag that was served
        self._tidy_at = TIDY_PEERS
        self._use = 0.0
        self._use_at = 0.0

    def add_work(self, peer: Hashable, work: int) -> None:
        left = self.work.get(peer, 0) + work
        if left:
            self.work[peer] = left
            return
        self.work.pop(peer, None)
        if not self.work:  # nobody is owed anything
            self._tags.clear()

    def make_ready(self, ticket: Ticket) -> None:
        peer = ticket.job.peer
        if peer not in self.ready:
            if peer in self._tags or not self.ready:
                start = max(self._tags.get(peer, 0.0), self._virtual)
            else:  # who is new stands level with who waits, not before: else ever new ones could starve one
                start = max(self._virtual, min(self._tags[each] for each in self.ready))
            self.ready[peer] = {}
            self._tags[peer] = start
            self._tidy()
        self.ready[peer][ticket.number] = ticket

    def take(self, ticket: Ticket) -> None:
        """It is no longer ready."""
        peer = ticket.job.peer
        del self.ready[peer][ticket.number]
        if not self.ready[peer]:
            del self.ready[peer]

    def serve(self, ticket: Ticket, cost_s: float) -> None:
        """Take it, and charge its peer."""
        peer = ticket.job.peer
        self.take(ticket)
        self._virtual = max(self._virtual, self._tags[peer])
        self._tags[peer] += cost_s

    def settle(self, peer: Hashable, difference_s: float) -> None:
        """It took more, or less, than was charged."""
        if peer in self._tags:
            self._tags[peer] += difference_s

    def in_order(self) -> Iterator[Ticket]:
        """What is ready, the next first; a peer's turn comes again as if each had been served."""
        rate_s = GUESS_S if self.rate_s is None else self.rate_s
        lines: dict[Hashable, deque[int]] = {}
        heads = [(self._tags[peer], min(tickets), peer) for peer, tickets in self.ready.items()]
        heapq.heapify(heads)
        while heads:
            tag, number, peer = heads[0]
            ticket = self.ready[peer][number]
            if peer not in lines:
                lines[peer] = deque(sorted(self.ready[peer]))
            line = lines[peer]
            line.popleft()
            if line:
                heapq.heapreplace(heads, (tag + ticket.work_left * rate_s, line[0], peer))
            else:
                heapq.heappop(heads)
            yield ticket

    def note_use(self, took_s: float, work: int, now: float) -> None:
        rate_s = took_s / work
        self.rate_s = rate_s if self.rate_s is None else self.rate_s + RATE_WEIGHT * (rate_s - self.rate_s)
        self._use = self.use(now) + 1.0 - math.exp(-took_s / USE_FADES_S)
        self._use_at = now

    def promise(self, peer: Hashable, earliest: float, takes_s: float, now: float) -> float:
        """When a peer that is sent away should come again: one after another, and who asks often gains nothing."""
        self._promised = {each: when for each, when in self._promised.items() if when > now}
        when = self._promised.pop(peer, None) or max([earliest, *(each + takes_s for each in self._promised.values())])
        self._promised[peer] = when
        return when

    def use(self, now: float) -> float:
        """Of the time, lately."""
        return self._use * math.exp(-max(0.0, now - self._use_at) / USE_FADES_S)

    def _tidy(self) -> None:
        if len(self._tags) >= self._tidy_at:
            kept = {peer: tag for peer, tag in self._tags.items() if tag > self._virtual or peer in self.work}
            self._tags = kept
            self._tidy_at = max(TIDY_PEERS, 2 * len(kept))


@dataclass(eq=False)
class _Session:
    """Its jobs in order; the first may be running."""

    line: deque[Ticket] = field(default_factory=deque)


class Scheduler:
    """Decides; never waits, never looks at a clock. ``now`` is in seconds and never goes back."""

    def __init__(self, settings: SchedulerSettings | None = None) -> None:
        """Begin with nothing measured; :attr:`estimates` may be taught before."""
        self.settings = settings or SchedulerSettings()
        self.estimates = Estimates()
        self._shares = self.settings.shares
        self._max_wait_s = self.settings.max_wait_s
        self._queues = {tier: _Queue() for tier in TIERS}
        self._sessions: dict[Hashable, _Session] = {}
        self._per_peer: Counter[Hashable] = Counter()
        self._numbers = itertools.count()
        self._running: set[Batch] = set()
        self._held_s = 0.0  # for how long slices of lower tiers have kept decode steps waiting

    def __len__(self) -> int:
        """Jobs that wait or run."""
        return self._per_peer.total()

    def waiting(self, peer: Hashable) -> int:
        """Jobs of a peer that wait or run."""
        return self._per_peer[peer]

    def submit(self, job: Job, now: float) -> Ticket:
        """Queue a job.

        Raises:
            Refused: The peer, or all together, have too much waiting, or the job would wait too long.
            ValueError: A job of nothing, or a decode step that no batch can hold.
        """
        self._check(job)
        self._admit(job, now)
        ticket = Ticket(job, next(self._numbers))
        self._per_peer[job.peer] += 1
        self._queues[job.kind.tier].add_work(job.peer, job.work)
        session = self._sessions.setdefault(job.session, _Session())
        session.line.append(ticket)
        if len(session.line) == 1:
            self._queues[job.kind.tier].make_ready(ticket)
        return ticket

    def next_batch(self, now: float) -> Batch | None:
        """What to run now; its sessions are busy until :meth:`done`. ``None`` if nothing is ready."""
        tiers = [tier for tier in TIERS if self._queues[tier].ready]
        if not tiers:
            return None
        tier = self._choose(tiers)
        if tier is Tier.DECODE:
            self._held_s = 0.0
            slices = self._decode_slices()
        else:
            slices = [self._slice(next(self._queues[tier].in_order()))]
        kind = slices[0].ticket.job.kind
        rows = sum(each.tokens for each in slices)
        queue = self._queues[tier]
        rate_s = GUESS_S if queue.rate_s is None else queue.rate_s
        charged = tuple(each.work * rate_s for each in slices)
        for each, cost_s in zip(slices, charged, strict=True):
            each.ticket.state = State.RUNNING
            queue.serve(each.ticket, cost_s)
        batch = Batch(
            kind=kind,
            slices=tuple(slices),
            rows=rows,
            bucket=self._bucket(kind, rows),
            began=now,
            _charged=charged,
            _beside=frozenset(each for each in TIERS if self._queues[each].ready),
        )
        self._running.add(batch)
        return batch

    def withdraw(self, batch: Batch, tickets: Collection[Ticket]) -> Batch | None:
        """Take tickets out of a batch that has not begun: they have failed, and cost nothing.

        Returns:
            The batch without them, which takes its place; ``None`` if nothing is left to run.

        Raises:
            ValueError: The batch does not run.
        """
        if batch not in self._running:
            raise ValueError("this batch does not run")
        self._running.remove(batch)
        kept: list[tuple[Slice, float]] = []
        for each, charged_s in zip(batch.slices, batch._charged, strict=True):
            if each.ticket in tickets:
                self._queues[batch.kind.tier].settle(each.ticket.job.peer, -charged_s)
                self._end(each.ticket, State.FAILED)
            else:
                kept.append((each, charged_s))
        if not kept:
            return None
        rows = sum(each.tokens for each, _ in kept)
        rest = replace(
            batch,
            slices=tuple(each for each, _ in kept),
            rows=rows,
            bucket=self._bucket(batch.kind, rows),
            _charged=tuple(charged_s for _, charged_s in kept),
        )
        self._running.add(rest)
        return rest

    def done(self, batch: Batch, took_s: float, now: float, failed: Collection[Ticket] = ()) -> tuple[Ticket, ...]:
        """Say that a batch has run.

        Args:
            batch: What :meth:`next_batch` gave.
            took_s: What it took.
            now: The time.
            failed: Tickets in it that are not to go on. Who failed has used its time all the same.

        Returns:
            Tickets in it that are over: finished, failed, or cancelled while they ran. The others wait for their
            next slice.

        Raises:
            ValueError: The batch does not run.
        """
        if batch not in self._running:
            raise ValueError("this batch does not run")
        self._running.remove(batch)
        took_s = max(took_s, 0.0)
        tier = batch.kind.tier
        queue = self._queues[tier]
        work = sum(each.work for each in batch.slices)
        if len(failed) < len(batch.slices):  # what fails as a whole says nothing about what such work takes
            passes = batch.slices[0].last_pass - batch.slices[0].first_pass
            self.estimates.learn(batch.kind, batch.bucket, passes, took_s)
        queue.note_use(took_s, work, now)
        for each, charged_s in zip(batch.slices, batch._charged, strict=True):
            queue.settle(each.ticket.job.peer, took_s * each.work / work - charged_s)
        over = [each.ticket for each in batch.slices if self._advance(each, failed)]
        self._earn(batch, took_s)
        if tier is not Tier.DECODE and self._queues[Tier.DECODE].ready:
            self._held_s += took_s
        return tuple(over)

    def cancel(self, ticket: Ticket) -> bool:
        """Nobody wants the result any more.

        Returns:
            Whether the job is over now. If not, a slice of it runs, and :meth:`done` will say that it is over; or it
            was over before.
        """
        if ticket.state is State.RUNNING:
            ticket.unwanted = True
            return False
        if ticket.state is not State.WAITING:
            return False
        self._drop(ticket)
        return True

    def forget_session(self, session: Hashable) -> tuple[Ticket, ...]:
        """Cancel all that a session has.

        Returns:
            What is over now; what runs is not among it.
        """
        known = self._sessions.get(session)
        return () if known is None else tuple(each for each in reversed(list(known.line)) if self.cancel(each))

    def wait_s(self, job: Job, now: float) -> float:
        """How long ``job`` would wait, beyond what it takes alone; 0 while nothing was measured.

        By the time that its peer has got this much more, every other peer has got no more than that.
        """
        queue = self._queues[job.kind.tier]
        own = queue.work.get(job.peer, 0)
        most = own + job.work
        others = sum(min(work, most) for peer, work in queue.work.items() if peer != job.peer)
        return self._running_s(now) + self._drain_s(job, own + others) / self._share(job.kind.tier, now)

    # Admission

    def _check(self, job: Job) -> None:
        if min(job.units, job.unit_tokens, job.passes) < 1:
            raise ValueError(f"a job of {job.units} x {job.unit_tokens} tokens and {job.passes} passes")
        if job.kind is Kind.DECODE and (job.units > 1 or job.unit_tokens > self.settings.buckets[-1]):
            raise ValueError(f"a decode step of {job.units} x {job.unit_tokens} rows fits into no batch")

    def _admit(self, job: Job, now: float) -> None:
        if self._per_peer[job.peer] >= self.settings.max_waiting_per_peer:
            oldest = min(
                (each for known in self._sessions.values() for each in known.line if each.job.peer == job.peer),
                key=lambda each: each.number,
            )
            ends_s = self._ends_s(oldest, now)
            raise Refused(f"{self._per_peer[job.peer]} steps of this peer wait already", ends_s)
        if len(self) >= self.settings.max_waiting:
            soonest = min(self._ends_s(known.line[0], now) for known in self._sessions.values())
            raise Refused(f"{len(self)} steps wait already", soonest)
        wait_s = self.wait_s(job, now)
        most_s = self._max_wait_s[job.kind.tier]
        if wait_s > most_s:
            queue = self._queues[job.kind.tier]
            alone_s = self._drain_s(job, job.work) / self._share(job.kind.tier, now)
            when = queue.promise(job.peer, now + wait_s - most_s, alone_s, now)
            raise Refused(f"the step would wait {wait_s:.1f} s", when - now)

    def _ends_s(self, ticket: Ticket, now: float) -> float:
        """When a ticket at the head of its peer's work will be over."""
        tier = ticket.job.kind.tier
        queue = self._queues[tier]
        if queue.rate_s is None:
            return RETRY_UNKNOWN_S
        left = ticket.work_left
        others = sum(min(work, left) for peer, work in queue.work.items() if peer != ticket.job.peer)
        if ticket.job.kind is Kind.DECODE:  # it runs in a batch with others, the last of those ahead
            step_s = self.estimates.seconds(Kind.DECODE, self._bucket_of(others + left, ticket.job), ticket.job.passes)
            ahead_s = self._drain_s(ticket.job, others) + (step_s or 0.0)
        else:
            ahead_s = (left + others) * queue.rate_s
        return self._running_s(now) + ahead_s / self._share(tier, now)

    def _drain_s(self, job: Job, work: int) -> float:
        """Seconds of the tier's own time until ``work`` that is ahead of ``job`` is done."""
        if job.kind is Kind.DECODE:
            most = self.settings.buckets[-1]
            batches = work // (job.passes * most)
            step_s = self.estimates.seconds(Kind.DECODE, most, job.passes) if batches else 0.0
            return batches * (step_s or 0.0)
        return work * (self._queues[job.kind.tier].rate_s or 0.0)

    def _bucket_of(self, work: int, job: Job) -> int:
        rows = work // job.passes
        return next((size for size in self.settings.buckets if size >= rows), self.settings.buckets[-1])

    def _running_s(self, now: float) -> float:
        """How long the batches that run still need."""
        left_s = 0.0
        for batch in self._running:
            passes = batch.slices[0].last_pass - batch.slices[0].first_pass
            left_s += max(0.0, (self.estimates.seconds(batch.kind, batch.bucket, passes) or 0.0) + batch.began - now)
        return left_s

    def _share(self, tier: Tier, now: float) -> float:
        """Of the time, what the tier gets when it has work: its own, and what those before it leave."""
        taken = sum(self._queues[each].use(now) for each in TIERS if each < tier)
        taken += sum(self._shares[each] for each in TIERS if each > tier and self._queues[each].work)
        return min(1.0, max(self._shares[tier], 1.0 - taken))

    # Which tier

    def _choose(self, tiers: list[Tier]) -> Tier:
        """The first, unless a lower one has earned its next slice; of several, who has earned most beyond it."""
        best, most_s = tiers[0], 0.0
        for tier in tiers[1:]:
            cost_s = self._next_cost_s(tier)
            beyond_s = self._queues[tier].credit_s - cost_s
            if tiers[0] is Tier.DECODE and self._held_s and self._held_s + cost_s > self.settings.decode_wait_s:
                continue
            if beyond_s >= most_s:
                best, most_s = tier, beyond_s
        return best

    def _next_cost_s(self, tier: Tier) -> float:
        """What the tier's next slice costs; 0 while nothing was measured, so that it soon is."""
        each = self._slice(next(self._queues[tier].in_order()))
        return self.estimates.seconds(each.ticket.job.kind, each.tokens, each.last_pass - each.first_pass) or 0.0

    def _earn(self, batch: Batch, took_s: float) -> None:
        """Tiers that waited meanwhile earn their share; the batch's own has spent it."""
        for tier in TIERS:
            if tier is Tier.DECODE:  # gets what the others have not earned
                continue
            queue = self._queues[tier]
            earned_s = took_s * self._shares[tier] if tier in batch._beside or tier is batch.kind.tier else 0.0
            spent_s = took_s if tier is batch.kind.tier else 0.0
            most_s = CREDIT_S * self._shares[tier]
            if queue.ready:
                most_s = max(most_s, self._next_cost_s(tier))
            queue.credit_s = min(max(queue.credit_s + earned_s - spent_s, 0.0), most_s)

    # Which slices

    def _decode_slices(self) -> list[Slice]:
        """Whose turn it is, and whoever else fits."""
        free = self.settings.buckets[-1]
        slices: list[Slice] = []
        passed_over: set[Hashable] = set()  # peers; were their small steps taken, a large one could wait for ever
        group: Hashable = None
        for ticket in self._queues[Tier.DECODE].in_order():
            job = ticket.job
            if not slices:
                group = (job.group, job.passes)
            if job.peer in passed_over or (job.group, job.passes) != group or job.unit_tokens > free:
                passed_over.add(job.peer)
                continue
            slices.append(Slice(ticket=ticket, start=0, stop=1, first_pass=0, last_pass=job.passes))
            free -= job.unit_tokens
            if not free:
                break
        return slices

    def _slice(self, ticket: Ticket) -> Slice:
        """The next part of a job that takes no longer than decode steps may wait, if it can be cut so small."""
        job = ticket.job
        stop = ticket.chunk_end if ticket.chunk_end > ticket.unit else self._chunk_end(ticket)
        tokens = (stop - ticket.unit) * job.unit_tokens
        pass_s = self.estimates.seconds(job.kind, tokens, 1)
        passes = 1 if pass_s is None else int(min(job.passes, self.settings.decode_wait_s / max(pass_s, 1e-9)))
        last = min(job.passes, ticket.passed + max(1, passes))
        return Slice(ticket=ticket, start=ticket.unit, stop=stop, first_pass=ticket.passed, last_pass=last)

    def _bucket(self, kind: Kind, rows: int) -> int:
        """What a batch of so many rows is padded to."""
        return next(size for size in self.settings.buckets if size >= rows) if kind is Kind.DECODE else rows

    def _chunk_end(self, ticket: Ticket) -> int:
        """The largest chunk that goes through all passes in one slice, else the smallest."""
        job = ticket.job
        for size in reversed(self.settings.chunk_tokens):
            end = min(job.units, ticket.unit + max(1, size // job.unit_tokens))
            seconds = self.estimates.seconds(job.kind, (end - ticket.unit) * job.unit_tokens, job.passes)
            if seconds is not None and seconds <= self.settings.decode_wait_s:
                break
        return end

    # Where jobs stand

    def _advance(self, each: Slice, failed: Collection[Ticket]) -> bool:
        """A slice has run; whether its job is over."""
        ticket, job = each.ticket, each.ticket.job
        queue = self._queues[job.kind.tier]
        before = ticket.work_left
        if each.last_pass == job.passes:
            ticket.unit, ticket.chunk_end, ticket.passed = each.stop, each.stop, 0
        else:
            ticket.chunk_end, ticket.passed = each.stop, each.last_pass
        queue.add_work(job.peer, ticket.work_left - before)
        if ticket in failed:
            state = State.FAILED
        elif ticket.unit == job.units:
            state = State.FINISHED
        elif ticket.unwanted:
            state = State.CANCELLED
        else:
            ticket.state = State.WAITING
            queue.make_ready(ticket)
            return False
        self._end(ticket, state)
        return True

    def _drop(self, ticket: Ticket) -> None:
        """It waits, and will not run (again)."""
        if self._sessions[ticket.job.session].line[0] is ticket:
            self._queues[ticket.job.kind.tier].take(ticket)
        self._end(ticket, State.CANCELLED)

    def _end(self, ticket: Ticket, state: State) -> None:
        """Count it no longer, and let the session's next one be ready."""
        job = ticket.job
        ticket.state = state
        self._per_peer[job.peer] -= 1
        if not self._per_peer[job.peer]:
            del self._per_peer[job.peer]
        if ticket.work_left:
            self._queues[job.kind.tier].add_work(job.peer, -ticket.work_left)
        session = self._sessions[job.session]
        was_head = session.line[0] is ticket
        session.line.remove(ticket)
        if not session.line:
            del self._sessions[job.session]
        elif was_head:
            follower = session.line[0]
            self._queues[follower.job.kind.tier].make_ready(follower)

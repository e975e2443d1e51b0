"""Who runs next, on a model that is a cost function and a clock that is a number."""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from compute.estimates import Estimates, Kind, Tier
from compute.scheduler import Batch, Job, Refused, Scheduler, SchedulerSettings, State, Ticket

PASSES = 24
MANY = SchedulerSettings(max_waiting=4096, max_waiting_per_peer=4096, decode_max_wait_s=1e6, prefill_max_wait_s=1e6)
PASS_TOKEN_S = {Kind.PREFILL: 10e-6, Kind.FORWARD: 10e-6, Kind.BACKWARD: 20e-6}


def cost_s(batch: Batch) -> float:
    """A decode step of 24 blocks takes 8 to 14 ms; prefill 0.24 ms a token."""
    part = batch.slices[0]
    passes = part.last_pass - part.first_pass
    if batch.kind is Kind.DECODE:
        return passes * (0.33e-3 + 8e-6 * batch.bucket)
    return passes * (0.1e-3 + PASS_TOKEN_S[batch.kind] * batch.rows)


class Simulation:
    """One model, and clients that send when they are told to."""

    def __init__(self, options: SchedulerSettings = MANY, cost: Callable[[Batch], float] = cost_s) -> None:
        self.scheduler = Scheduler(options)
        self.cost = cost
        self.now = 0.0
        self.batches: list[Batch] = []
        self.time: dict[Tier, float] = dict.fromkeys(Tier, 0.0)
        self.given: defaultdict[Hashable, float] = defaultdict(float)  # seconds by peer
        self.waits: dict[Hashable, list[float]] = {}  # of each step, by session: from submission to result
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._then: dict[Ticket, Callable[[], None]] = {}
        self._asked: dict[Ticket, float] = {}
        self._busy = False

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), what))

    def submit(self, job: Job, then: Callable[[], None] = lambda: None) -> Ticket:
        ticket = self.scheduler.submit(job, self.now)
        self._then[ticket] = then
        self._asked[ticket] = self.now
        return ticket

    def client(self, job: Job, think_s: float = 0.0, start: float = 0.0) -> None:
        """Sends the same again ``think_s`` after each result."""

        def send() -> None:
            self.submit(job, lambda: self.at(self.now + think_s, send))

        self.at(start, send)

    def run(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            self.now, _, what = heapq.heappop(self._events)
            what()
            if self._events and self._events[0][0] == self.now:
                continue  # what happens at once is seen at once
            if not self._busy and (batch := self.scheduler.next_batch(self.now)) is not None:
                self._busy = True
                self.batches.append(batch)
                took = self.cost(batch)
                self.at(self.now + took, lambda batch=batch, took=took: self._done(batch, took))  # type: ignore[misc]
        self.now = until

    def _done(self, batch: Batch, took_s: float) -> None:
        self._busy = False
        self.time[batch.kind.tier] += took_s
        for each in batch.slices:
            self.given[each.ticket.job.peer] += took_s * each.work / sum(one.work for one in batch.slices)
        for ticket in self.scheduler.done(batch, took_s, self.now):
            self.waits.setdefault(ticket.job.session, []).append(self.now - self._asked[ticket])
            self._then.pop(ticket)()


def decode(peer: Hashable, session: Hashable = None, rows: int = 1, **more: Any) -> Job:
    return Job(peer=peer, session=(peer, session), kind=Kind.DECODE, unit_tokens=rows, passes=PASSES, **more)


def prefill(peer: Hashable, session: Hashable = None, tokens: int = 1024, rows: int = 1) -> Job:
    key = (peer, session, "prefill")
    return Job(peer=peer, session=key, kind=Kind.PREFILL, units=tokens, unit_tokens=rows, passes=PASSES)


def training(peer: Hashable, session: Hashable = None, sequences: int = 4, backward: bool = False) -> Job:
    kind = Kind.BACKWARD if backward else Kind.FORWARD
    key = (peer, session, "training")
    return Job(peer=peer, session=key, kind=kind, units=sequences, unit_tokens=512, passes=PASSES)


def percentile(values: list[float], part: float) -> float:
    return sorted(values)[int(part * (len(values) - 1))]


# Batches


def test_a_lone_step_runs_at_once_and_alone() -> None:
    world = Simulation()
    world.client(decode("one"), think_s=0.05)
    world.run(60)
    alone_s = PASSES * (0.33e-3 + 8e-6)
    assert len(world.batches) > 1000
    assert all((batch.rows, batch.bucket) == (1, 1) for batch in world.batches)
    assert max(world.waits["one", None]) == pytest.approx(alone_s)


def test_a_batch_takes_what_is_ready_in_the_least_bucket() -> None:
    for count, bucket in [(1, 1), (2, 2), (3, 4), (5, 8), (16, 16), (17, 32), (32, 32)]:
        scheduler = Scheduler(MANY)
        for number in range(count):
            scheduler.submit(decode(number), 0.0)
        batch = scheduler.next_batch(0.0)
        assert batch is not None
        assert (batch.rows, batch.bucket, len(batch.slices)) == (count, bucket, count)
        assert scheduler.next_batch(0.0) is None


def test_what_turns_out_not_to_be_possible_is_withdrawn_and_costs_nothing() -> None:
    scheduler = Scheduler(MANY)
    tickets = [scheduler.submit(decode(number), 0.0) for number in range(3)]
    after = scheduler.submit(decode(0), 0.0)
    batch = scheduler.next_batch(0.0)
    assert batch is not None
    rest = scheduler.withdraw(batch, tickets[:1])
    assert rest is not None
    assert [each.ticket for each in rest.slices] == tickets[1:]
    assert (rest.rows, rest.bucket, tickets[0].state, after.state) == (2, 2, State.FAILED, State.WAITING)
    with pytest.raises(ValueError, match="does not run"):
        scheduler.withdraw(batch, tickets)
    assert scheduler.done(rest, 0.01, 0.01) == tuple(tickets[1:])
    assert scheduler._queues[Tier.DECODE]._tags[0] == 0.0  # the peer whose step was withdrawn owes nothing
    last = scheduler.next_batch(0.01)
    assert last is not None and last.slices[0].ticket is after
    assert scheduler.withdraw(last, [after]) is None
    assert (len(scheduler), scheduler._running) == (0, set())


def test_a_batch_holds_no_more_than_its_rows_and_one_group() -> None:
    scheduler = Scheduler(MANY)
    for number in range(3):
        scheduler.submit(decode(number, rows=12), 0.0)
    for number in range(3, 6):
        scheduler.submit(decode(number, group="other"), 0.0)
    first, second, third = (scheduler.next_batch(0.0) for _ in range(3))
    assert first is not None
    assert second is not None
    assert third is not None
    assert sorted(each.rows for each in (first, second, third)) == [3, 12, 24]
    for batch in (first, second, third):
        assert len({each.ticket.job.group for each in batch.slices}) == 1


def test_steps_of_a_session_keep_their_order_and_never_share_a_batch() -> None:
    scheduler = Scheduler(MANY)
    tickets = [scheduler.submit(decode("one"), 0.0) for _ in range(3)]
    for expected in tickets:
        batch = scheduler.next_batch(0.0)
        assert batch is not None
        assert [each.ticket for each in batch.slices] == [expected]
        assert scheduler.next_batch(0.0) is None
        assert scheduler.done(batch, 0.01, 0.0) == (expected,)


def test_a_step_of_many_rows_is_not_passed_over_for_ever() -> None:
    """Its peer's small steps, and another peer that is always back at once, could fill every batch without it."""
    world = Simulation(replace(MANY, buckets=(1, 2, 4)))
    world.client(decode("other"))
    for number in range(6):
        world.client(decode("same", number))
    world.client(decode("same", "large", rows=4))
    world.run(10)
    assert len(world.waits["same", "large"]) > 50
    assert max(world.waits["same", "large"]) < 0.2


@pytest.mark.parametrize("job", [decode("x", rows=33), replace(decode("x"), units=2), prefill("x", tokens=0)])
def test_what_cannot_run_is_not_queued(job: Job) -> None:
    with pytest.raises(ValueError, match=r"job|step"):
        Scheduler().submit(job, 0.0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"buckets": ()},
        {"buckets": (2, 1)},
        {"chunk_tokens": (0, 1)},
        {"prefill_share": 0.9},
        {"training_share": 0.0},
        {"max_waiting": 0},
        {"decode_wait_s": 0.0},
    ],
)
def test_settings_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"rising|share|job|waits"):
        SchedulerSettings(**wrong)


# Slices


def run_alone(job: Job, options: SchedulerSettings = MANY) -> list[Batch]:
    world = Simulation(options)
    world.submit(job)
    world.at(0.0, lambda: None)
    world.run(1e6)
    return world.batches


@given(
    kind=st.sampled_from([Kind.PREFILL, Kind.FORWARD, Kind.BACKWARD]),
    units=st.integers(1, 1500),
    unit_tokens=st.integers(1, 600),
    passes=st.integers(1, 40),
    wait_s=st.floats(0.001, 0.5),
)
@settings(max_examples=60, deadline=None)
def test_slices_cover_a_job_once_and_in_order(
    kind: Kind, units: int, unit_tokens: int, passes: int, wait_s: float
) -> None:
    job = Job(peer=1, session=1, kind=kind, units=units, unit_tokens=unit_tokens, passes=passes)
    unit, passed, stop = 0, 0, 0
    for batch in run_alone(job, replace(MANY, decode_wait_s=wait_s)):
        (part,) = batch.slices
        assert (part.start, part.first_pass) == (unit, passed)
        assert part.stop == stop or not passed
        assert part.tokens <= max(512, unit_tokens)
        stop, passed = part.stop, part.last_pass
        if passed == passes:
            unit, passed = stop, 0
    assert (unit, passed) == (units, 0)


def test_chunks_are_as_large_as_the_wait_allows() -> None:
    sizes = {}
    for wait_s in (0.020, 0.035, 0.070, 0.2):
        batches = run_alone(prefill("one", tokens=20_480), replace(MANY, decode_wait_s=wait_s))
        late = batches[len(batches) // 2 :]
        assert max(cost_s(batch) for batch in late) <= 1.01 * wait_s
        part = late[0].slices[0]
        sizes[wait_s] = (part.tokens, part.last_pass - part.first_pass)
    assert sizes[0.020][0] == 128
    assert sizes[0.020][1] < PASSES
    assert [sizes[wait_s] for wait_s in (0.035, 0.070, 0.2)] == [(128, 24), (256, 24), (512, 24)]


def test_one_size_of_chunk_gives_the_same_cuts_whatever_it_takes() -> None:
    for cost in (lambda batch: 1e-5, lambda batch: 0.5):
        world = Simulation(replace(MANY, chunk_tokens=(256,)), cost)
        world.submit(prefill("one", tokens=1000))
        world.at(0.0, lambda: None)
        world.run(1e6)
        assert sorted({(each.slices[0].start, each.slices[0].stop) for each in world.batches}) == [
            (0, 256),
            (256, 512),
            (512, 768),
            (768, 1000),
        ]


# Tiers


def busy_world(options: SchedulerSettings = MANY, sessions: int = 16, think_s: float = 0.02) -> Simulation:
    world = Simulation(options)
    for number in range(sessions):
        world.client(decode(f"user-{number}"), think_s=think_s, start=0.001 * number)
    for number in range(3):
        world.client(prefill(f"reader-{number}", tokens=2048))
        world.client(training(f"tuner-{number}", backward=number == 0))
    return world


def test_decode_steps_wait_at_most_for_a_slice_beside_prefill_and_training() -> None:
    world = busy_world()
    world.run(60)
    waits = [each for key, values in world.waits.items() for each in values[20:] if len(key) == 2]  # type: ignore[arg-type]
    step_s = PASSES * (0.33e-3 + 8e-6 * 16)
    assert len(waits) > 5000
    assert percentile(waits, 0.95) <= MANY.decode_wait_s + 2 * step_s
    assert max(waits) <= 2 * MANY.decode_wait_s + 2 * step_s


def test_decode_goes_first_and_each_tier_keeps_its_share() -> None:
    """All three have more than enough to do."""
    world = busy_world(sessions=50, think_s=0.0)
    world.run(5)
    before = world.time.copy()
    world.run(25)
    share = {tier: (world.time[tier] - before[tier]) / 20 for tier in Tier}
    assert share[Tier.DECODE] >= 0.68
    assert 0.19 <= share[Tier.PREFILL] <= 0.22
    assert 0.09 <= share[Tier.TRAINING] <= 0.12
    assert longest_wait_s(world.batches[500:]) <= 1.05 * MANY.decode_wait_s


def longest_wait_s(batches: list[Batch]) -> float:
    """Of decode steps, always waiting, for what others were given meanwhile."""
    longest_s, wait_s = 0.0, 0.0
    for batch in batches:
        wait_s = 0.0 if batch.kind is Kind.DECODE else wait_s + cost_s(batch)
        longest_s = max(longest_s, wait_s)
    return longest_s


def test_prefill_goes_before_training_which_keeps_its_share() -> None:
    world = busy_world(sessions=0)
    world.run(30)
    assert 0.09 <= world.time[Tier.TRAINING] / 30 <= 0.12
    assert sum(world.time.values()) == pytest.approx(30, rel=0.01)


def test_short_slices_beside_long_decode_steps_keep_their_share() -> None:
    """Several of them have to go before one decode step, and may, since they are short together."""

    def cost(batch: Batch) -> float:
        return 0.1 if batch.kind is Kind.DECODE else 0.004

    world = Simulation(cost=cost)
    for number in range(40):
        world.client(decode(f"user-{number}"))
    for number in range(30):
        world.client(prefill(f"reader-{number}", tokens=40))
    world.run(60)
    assert 0.18 <= world.time[Tier.PREFILL] / 60 <= 0.22


def test_training_fills_the_gaps() -> None:
    world = Simulation()
    world.client(decode("user"), think_s=0.1)
    world.client(training("tuner", sequences=64))
    world.run(30)
    assert world.time[Tier.TRAINING] > 0.85 * 30
    assert sum(world.time.values()) == pytest.approx(30, rel=0.01)
    assert percentile(world.waits["user", None][5:], 0.95) <= 0.03 + 2 * PASSES * 0.34e-3


def test_what_was_done_in_gaps_costs_nothing_later() -> None:
    world = Simulation()
    world.client(prefill("reader", tokens=2048))
    world.run(20)
    for number in range(64):
        world.client(decode(number), start=20)
    before = world.time.copy()
    world.run(22)
    assert (world.time[Tier.PREFILL] - before[Tier.PREFILL]) / 2 >= 0.17


def test_what_was_earned_for_work_that_left_is_not_kept() -> None:
    scheduler = Scheduler(MANY)

    def run(least_s: float, decode_s: float) -> float:
        """Decode steps, always waiting, for so long; what training took meanwhile."""
        took = {Tier.DECODE: 0.0, Tier.TRAINING: 0.0}
        for number in range(2):
            scheduler.submit(decode("user", number), 0.0)
        while took[Tier.DECODE] < least_s:
            batch = scheduler.next_batch(0.0)
            assert batch is not None
            if batch.kind is Kind.DECODE:
                scheduler.submit(decode("user", 0), 0.0)
            took_s = decode_s if batch.kind is Kind.DECODE else 0.01
            took[batch.kind.tier] += took_s
            scheduler.done(batch, took_s, 0.0)
        return took[Tier.TRAINING]

    scheduler.estimates.learn(Kind.FORWARD, 512, 1, 10.0)
    slow = scheduler.submit(training("tuner"), 0.0)
    assert run(80.0, 2.0) == 0.0
    scheduler.cancel(slow)
    for _ in range(100):
        scheduler.estimates.learn(Kind.FORWARD, 512, 1, 0.01)
    scheduler.submit(training("tuner", sequences=1000), 0.0)
    assert run(4.0, 0.1) <= 1.3 * 0.1 * 4.0 + 0.1


# Peers


def test_a_hog_with_fifty_sessions_gets_no_more_than_others_who_always_wait() -> None:
    """Four peers and 32 rows: whoever has 50 sessions fills what the others leave, and they lose nothing by it."""
    world = Simulation(replace(MANY, buckets=(1, 2, 4)))
    for number in range(50):
        world.client(decode("hog", number))
    for number in range(7):
        world.client(decode(f"honest-{number}"))
    world.run(30)
    honest = [world.given[f"honest-{number}"] for number in range(7)]
    assert max(honest) / min(honest) < 1.05
    assert world.given["hog"] == pytest.approx(min(honest), rel=0.1)


def test_an_honest_step_is_in_the_next_batch_beside_a_hog() -> None:
    world = Simulation()
    for number in range(50):
        world.client(decode("hog", number))
    world.client(decode("honest"), think_s=0.013)
    world.run(30)
    step_s = PASSES * (0.33e-3 + 8e-6 * 32)
    assert max(world.waits["honest", None]) <= 2 * step_s + 1e-9


@pytest.mark.parametrize("make", [prefill, training])
def test_cost_counts_and_not_the_number_of_jobs(make: Callable[..., Job]) -> None:
    world = Simulation()
    small, large = (40, 2048) if make is prefill else (1, 32)
    for number in range(20):
        world.client(make("hog", number, small))
    world.client(make("honest", 0, large))
    world.run(60)
    assert world.given["hog"] == pytest.approx(world.given["honest"], rel=0.1)


def test_what_it_took_is_charged_and_not_what_was_guessed() -> None:
    """One peer's tokens cost ten times the other's, which only measuring shows."""

    def cost(batch: Batch) -> float:
        dear = batch.slices[0].ticket.job.peer == "dear"
        return batch.slices[0].work * (1e-4 if dear else 1e-5)

    world = Simulation(replace(MANY, chunk_tokens=(128,)), cost)
    for peer in ("dear", "cheap"):
        world.client(prefill(peer, tokens=128))
    world.run(60)
    assert world.given["dear"] == pytest.approx(world.given["cheap"], rel=0.15)


def test_who_comes_late_is_owed_nothing_and_owes_nothing() -> None:
    world = Simulation()
    for number in range(4):
        world.client(prefill("early", number))
    world.client(prefill("late"), start=20.0)
    world.run(20)
    before = world.given.copy()
    world.run(40)
    assert world.given["late"] == pytest.approx(world.given["early"] - before["early"], rel=0.1)


def test_ever_new_peers_do_not_starve_one_that_waits() -> None:
    scheduler = Scheduler(MANY)
    waits = scheduler.submit(prefill("waits", tokens=1000), 0.0)
    for number in range(1000):
        scheduler.submit(prefill(number, tokens=100), 0.0)
        while scheduler.waiting(number):
            batch = scheduler.next_batch(0.0)
            assert batch is not None
            scheduler.done(batch, 0.001, 0.0)
    assert waits.state is State.FINISHED


def test_peers_that_left_are_forgotten() -> None:
    scheduler = Scheduler(MANY)
    scheduler.submit(prefill("stays", tokens=10**8), 0.0)
    for number in range(2000):
        scheduler.submit(prefill(number, tokens=1), 0.0)
        while scheduler.waiting(number):
            batch = scheduler.next_batch(0.0)
            assert batch is not None
            scheduler.done(batch, 0.001, 0.0)
    queue = scheduler._queues[Tier.PREFILL]
    assert len(queue._tags) <= 200
    assert len(queue.work) <= 2
    assert len(scheduler._sessions) <= 2


# Admission


def test_a_peer_may_have_so_many_steps_waiting() -> None:
    scheduler = Scheduler(SchedulerSettings(max_waiting_per_peer=3))
    for number in range(3):
        scheduler.submit(decode("hog", number), 0.0)
    with pytest.raises(Refused, match="3 steps of this peer") as caught:
        scheduler.submit(decode("hog", 4), 0.0)
    assert caught.value.code == "busy"
    scheduler.submit(decode("honest"), 0.0)
    batch = scheduler.next_batch(0.0)
    assert batch is not None
    scheduler.done(batch, 0.01, 0.01)
    scheduler.submit(decode("hog", 4), 0.01)


def test_so_many_steps_may_wait_in_all() -> None:
    scheduler = Scheduler(SchedulerSettings(max_waiting=3))
    for number in range(3):
        scheduler.submit(decode(number), 0.0)
    with pytest.raises(Refused, match="3 steps wait"):
        scheduler.submit(decode(4), 0.0)


class Asking:
    """Sends until it is let in, coming again when it was told to."""

    def __init__(self, world: Simulation, job: Job, start: float) -> None:
        self.world, self.job, self.start = world, job, start
        self.refusals = 0
        self.admitted_at: float | None = None
        self.finished_at: float | None = None
        world.at(start, self.ask)

    def ask(self) -> None:
        try:
            self.world.submit(self.job, self.finish)
        except Refused as refused:
            self.refusals += 1
            self.world.at(self.world.now + refused.retry_after_s, self.ask)
        else:
            self.admitted_at = self.world.now

    def finish(self) -> None:
        self.finished_at = self.world.now


@pytest.mark.parametrize("beside", [0, 16])
def test_prefill_that_would_wait_too_long_is_told_when_to_come_again(beside: int) -> None:
    options = SchedulerSettings(prefill_max_wait_s=5.0)
    world = Simulation(options)
    for number in range(beside):
        world.client(decode(f"user-{number}"), think_s=0.05)
    asking = [Asking(world, prefill(number, tokens=2048), 1 + 0.01 * number) for number in range(60)]
    world.run(200)
    alone_s = 2048 * PASSES * 10e-6
    assert sum(each.refusals > 0 for each in asking) > 30
    for each in asking:
        assert each.admitted_at is not None
        assert each.finished_at is not None
        assert each.finished_at - each.admitted_at <= 2.5 * options.prefill_max_wait_s + 2 * alone_s
    assert max(each.refusals for each in asking) <= 12
    # The machine was never idle for want of those who had been sent away.
    assert sum(world.time.values()) >= 0.95 * 60 * alone_s
    assert max(each.finished_at or 0.0 for each in asking) <= 1.6 * 60 * alone_s + 5


def test_retry_after_is_when_there_is_room() -> None:
    """Steps of a peer that has its number waiting are let in when it said, and not a second later."""
    world = Simulation(replace(MANY, max_waiting_per_peer=4))
    for number in range(20):
        world.client(prefill(f"reader-{number}", tokens=8192))
    world.run(20)
    for number in range(4):
        world.submit(prefill("one", number, tokens=1024))
    with pytest.raises(Refused) as caught:
        world.submit(prefill("one", 5, tokens=1024))
    said_s = caught.value.retry_after_s
    began = world.now
    while world.scheduler.waiting("one") == 4:
        world.run(world.now + 0.01)
    assert 0.5 * (world.now - began) <= said_s <= 2.0 * (world.now - began)


def test_waits_are_foreseen_beside_decode() -> None:
    world = busy_world(sessions=50, think_s=0.0)
    world.run(10)
    job = prefill("late", tokens=2048)
    foreseen_s = world.scheduler.wait_s(job, world.now)
    world.submit(job)
    world.run(60)
    (took_s,) = world.waits[job.session]
    assert 0.5 * took_s <= foreseen_s <= 2.0 * took_s


def test_decode_steps_are_refused_only_when_the_wait_is_long() -> None:
    scheduler = Scheduler(SchedulerSettings(max_waiting=4096, decode_max_wait_s=1.0))
    for _ in range(10):
        scheduler.estimates.learn(Kind.DECODE, 32, PASSES, 0.1)
    admitted = 0
    with pytest.raises(Refused, match="would wait"):
        for number in range(4096):
            scheduler.submit(decode(number), 0.0)
            admitted += 1
    assert 10 * 32 <= admitted <= 12 * 32


# Cancelling


def test_a_cancelled_step_that_waits_is_dropped_and_the_next_one_runs() -> None:
    scheduler = Scheduler()
    first = scheduler.submit(decode("one"), 0.0)
    second = scheduler.submit(decode("one"), 0.0)
    assert scheduler.cancel(first)
    assert not scheduler.cancel(first)
    batch = scheduler.next_batch(0.0)
    assert batch is not None
    assert [each.ticket for each in batch.slices] == [second]
    assert first.state is State.CANCELLED


def test_a_cancelled_step_that_runs_is_finished() -> None:
    scheduler = Scheduler()
    ticket = scheduler.submit(decode("one"), 0.0)
    batch = scheduler.next_batch(0.0)
    assert batch is not None
    assert not scheduler.cancel(ticket)
    assert scheduler.done(batch, 0.01, 0.01) == (ticket,)
    assert ticket.state is State.FINISHED
    assert len(scheduler) == 0


def test_a_cancelled_prefill_ends_after_the_slice_that_runs() -> None:
    scheduler = Scheduler()
    ticket = scheduler.submit(prefill("one", tokens=4096), 0.0)
    batch = scheduler.next_batch(0.0)
    assert batch is not None
    scheduler.cancel(ticket)
    assert scheduler.done(batch, 0.01, 0.01) == (ticket,)
    assert ticket.state is State.CANCELLED
    assert scheduler.next_batch(0.01) is None


def test_one_that_fails_does_not_go_on_and_the_others_do() -> None:
    scheduler = Scheduler()
    good, bad = (scheduler.submit(decode(peer), 0.0) for peer in ("good", "bad"))
    batch = scheduler.next_batch(0.0)
    assert batch is not None
    assert set(scheduler.done(batch, 0.01, 0.01, failed=[bad])) == {good, bad}
    assert (good.state, bad.state) == (State.FINISHED, State.FAILED)
    with pytest.raises(ValueError, match="does not run"):
        scheduler.done(batch, 0.01, 0.01)


def test_forgetting_a_session_leaves_nothing_behind() -> None:
    scheduler = Scheduler()
    job = prefill("one", tokens=4096)
    running = scheduler.submit(job, 0.0)
    batch = scheduler.next_batch(0.0)
    assert batch is not None
    waiting = {scheduler.submit(job, 0.0), scheduler.submit(job, 0.0)}
    assert set(scheduler.forget_session(job.session)) == waiting
    assert scheduler.done(batch, 0.01, 0.01) == (running,)
    assert (len(scheduler), scheduler.next_batch(0.01)) == (0, None)
    assert not scheduler._queues[Tier.PREFILL].work


# Estimates


def test_estimates_follow_what_is_measured() -> None:
    estimates = Estimates()
    assert estimates.seconds(Kind.DECODE, 1, 1) is None
    estimates.learn(Kind.DECODE, 8, 10, 0.1)
    assert estimates.seconds(Kind.DECODE, 8, 20) == pytest.approx(0.2)
    assert estimates.seconds(Kind.DECODE, 1, 10) == pytest.approx(0.1)  # fewer rows cost no less
    assert estimates.seconds(Kind.DECODE, 32, 10) == pytest.approx(0.4)
    for _ in range(40):
        estimates.learn(Kind.DECODE, 8, 10, 0.3)
    assert estimates.seconds(Kind.DECODE, 8, 10) == pytest.approx(0.3, rel=0.01)
    estimates.learn(Kind.PREFILL, 256, 1, 0.256)
    assert estimates.seconds(Kind.PREFILL, 100, 2) == pytest.approx(0.2)


def test_one_pause_of_the_machine_does_not_make_it_slow() -> None:
    estimates = Estimates()
    for took_s in [0.01] * 10 + [60.0]:
        estimates.learn(Kind.DECODE, 1, 1, took_s)
    assert (estimates.seconds(Kind.DECODE, 1, 1) or 0.0) < 0.02


# Everything at once


class AnyOrder(RuleBasedStateMachine):
    """Sessions of a few peers in any order of sending, running, failing and leaving."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(SchedulerSettings(max_waiting=24, max_waiting_per_peer=10))
        self.now = 0.0
        self.batch: Batch | None = None
        self.open: list[Ticket] = []
        self.order: dict[Hashable, list[Ticket]] = {}

    @rule(
        peer=st.integers(0, 2),
        session=st.integers(0, 3),
        kind=st.sampled_from(Kind),
        units=st.integers(1, 700),
        unit_tokens=st.integers(1, 32),
        passes=st.sampled_from([1, 6, 24]),
    )
    def submit(self, peer: int, session: int, kind: Kind, units: int, unit_tokens: int, passes: int) -> None:
        job = Job(
            peer=peer,
            session=(peer, session),
            kind=kind,
            units=1 if kind is Kind.DECODE else units,
            unit_tokens=unit_tokens,
            passes=passes,
        )
        try:
            ticket = self.scheduler.submit(job, self.now)
        except Refused as refused:
            assert 0 < refused.retry_after_s <= 60
            mine = sum(each.job.peer == peer for each in self.open)
            assert len(self.open) == 24 or mine == 10 or self.scheduler.wait_s(job, self.now) > 2
        else:
            self.open.append(ticket)
            self.order.setdefault(job.session, []).append(ticket)

    @precondition(lambda self: self.batch is None)
    @rule()
    def start(self) -> None:
        self.batch = self.scheduler.next_batch(self.now)
        assert (self.batch is None) == (not self.open)
        if self.batch is None:
            return
        sessions = [each.ticket.job.session for each in self.batch.slices]
        assert len(set(sessions)) == len(sessions)
        assert self.batch.rows == sum(each.tokens for each in self.batch.slices) <= max(512, self.batch.bucket)
        for each in self.batch.slices:
            assert self.order[each.ticket.job.session][0] is each.ticket
            assert not each.ticket.unwanted

    @precondition(lambda self: self.batch is not None)
    @rule(took_ms=st.integers(0, 200), fails=st.booleans())
    def end(self, took_ms: int, fails: bool) -> None:
        assert self.batch is not None
        self.now += took_ms / 1000
        failed = [self.batch.slices[0].ticket] if fails else []
        over = self.scheduler.done(self.batch, took_ms / 1000, self.now, failed)
        for each in self.batch.slices:
            finished = each.stop == each.ticket.job.units and each.last_pass == each.ticket.job.passes
            assert (each.ticket in over) == (finished or each.ticket.unwanted or each.ticket in failed)
        for ticket in over:
            self.forget(ticket)
        self.batch = None

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.open))
        if self.scheduler.cancel(ticket):
            self.forget(ticket)
        else:
            assert ticket.state is State.RUNNING

    @rule(peer=st.integers(0, 2), session=st.integers(0, 3))
    def leave(self, peer: int, session: int) -> None:
        for ticket in self.scheduler.forget_session((peer, session)):
            self.forget(ticket)
        assert all(each.unwanted for each in self.open if each.job.session == (peer, session))

    def forget(self, ticket: Ticket) -> None:
        assert ticket.state in (State.FINISHED, State.FAILED, State.CANCELLED)
        self.open.remove(ticket)
        self.order[ticket.job.session].remove(ticket)

    @invariant()
    def the_books_are_right(self) -> None:
        scheduler = self.scheduler
        assert len(scheduler) == len(self.open)
        for tier in Tier:
            queue = scheduler._queues[tier]
            mine = [each for each in self.open if each.job.kind.tier is tier]
            assert sum(queue.work.values()) == sum(each.work_left for each in mine)
            assert all(work > 0 for work in queue.work.values())
            ready = {each for tickets in queue.ready.values() for each in tickets.values()}
            assert ready <= set(mine)
        heads = {line[0] for line in self.order.values() if line}
        ready = {e for tier in Tier for t in scheduler._queues[tier].ready.values() for e in t.values()}
        assert ready == {each for each in heads if each.state is State.WAITING}

    def teardown(self) -> None:
        """What is left runs to its end."""
        if self.batch is not None:
            self.end(1, False)
        for _ in range(200_000):
            self.start()
            if self.batch is None:
                break
            self.end(1, False)
        assert not self.open
        assert not self.scheduler._sessions


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)

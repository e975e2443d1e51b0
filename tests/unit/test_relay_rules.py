"""A relay's rules without any I/O: fair turns, who may have what, vouchers, and addresses through relays."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from net import addresses, keeping
from net.addresses import Multiaddr, PeerAddress
from net.errors import LimitExceeded, RecordError
from net.identity import PeerId
from net.limits import ConnectionCounts, Limits
from net.relay import vouchers
from net.relay.fairness import PIECE_COST_BYTES, TIDY_USERS, Bucket, FairQueue
from net.relay.reservations import Circuit, Refused, RelayLimits, Reservations
from net.relay.wire import Status
from net.swarm import Connection
from tests.net_helpers import seeded

RELAY = seeded(70)
PEERS = [seeded(number).peer_id for number in range(71, 79)]
DIRECT = Multiaddr("/ip4/203.0.113.7/tcp/4001")
AT_RELAY = PeerAddress(address=DIRECT, peer_id=RELAY.peer_id)
MAX_PIECE = 65_536


# Fairness


@given(
    circuits=st.lists(st.integers(1, 16), min_size=2, max_size=12),
    largest=st.lists(st.sampled_from([1, 100, 1_000, 30_000, MAX_PIECE]), min_size=12, max_size=12),
    seed=st.integers(0, 2**32),
)
def test_users_who_always_wait_get_the_same(circuits: list[int], largest: list[int], seed: int) -> None:
    """However many circuits each has, and however it cuts its bytes."""
    chance = random.Random(seed)
    queue: FairQueue[tuple[int, int]] = FairQueue()
    given_bytes: Counter[int] = Counter()

    def ask(user: int) -> None:
        size = chance.randint(1, largest[user])
        queue.push(user, size, (user, size))

    for user, count in enumerate(circuits):
        for _ in range(count):
            ask(user)
    for _ in range(2_000):
        user, size = queue.pop()
        given_bytes[user] += size + PIECE_COST_BYTES
        ask(user)
        costs = [given_bytes[user] for user in range(len(circuits))]
        assert max(costs) - min(costs) <= 2 * (MAX_PIECE + PIECE_COST_BYTES)


def test_one_hog_among_ten_leaves_the_others_their_share() -> None:
    queue: FairQueue[int] = FairQueue()
    served: Counter[int] = Counter()
    for user in [*range(9), *[9] * 64]:
        queue.push(user, MAX_PIECE, user)
    for _ in range(10_000):
        user = queue.pop()
        served[user] += 1
        queue.push(user, MAX_PIECE, user)
    assert min(served[user] for user in range(9)) >= 0.99 * 10_000 / 10


def test_who_comes_late_is_served_next_and_is_owed_nothing() -> None:
    queue: FairQueue[str] = FairQueue()
    for _ in range(100):
        queue.push("hog", MAX_PIECE, "hog")
    for _ in range(50):
        queue.pop()
    for _ in range(10):
        queue.push("late", 100, "late")
    order = [queue.pop() for _ in range(12)]
    assert order.index("late") <= 1
    assert order.count("late") == 10  # a hundred of its pieces are one of the hog's
    assert order.count("hog") == 2


def test_who_leaves_the_queue_is_passed_over() -> None:
    queue: FairQueue[str] = FairQueue()
    ticket = queue.push("gone", 1, "gone")
    queue.push("here", 1, "here")
    queue.give_up(ticket)
    assert len(queue) == 1
    assert queue.pop() == "here"
    assert len(queue) == 0
    with pytest.raises(IndexError):
        queue.pop()


def test_users_of_long_ago_are_forgotten() -> None:
    queue: FairQueue[int] = FairQueue()
    for user in range(100_000):
        queue.charge(user, 1_000)
    assert len(queue._finish) <= 2 * TIDY_USERS


@given(
    st.lists(st.tuples(st.integers(1, MAX_PIECE), st.floats(0, 0.1)), max_size=200), st.sampled_from([1e4, 1e6, 1e9])
)
def test_a_bucket_never_gives_more_than_its_rate(pieces: list[tuple[int, float]], rate: float) -> None:
    now, burst_s, spent = 1000.0, 0.005, 0
    bucket = Bucket(rate, burst_s, now)
    for size, pause_s in pieces:
        now = bucket.ready_at(now + pause_s)
        bucket.spend(size, now)
        spent += size
        assert spent <= (now - 1000.0 + burst_s) * rate + size + 1e-3


# Reservations


class Promises(RuleBasedStateMachine):
    """Whatever is asked for, no budget is ever exceeded, and nothing is counted that has ended."""

    def __init__(self) -> None:
        super().__init__()
        self.limits = RelayLimits(
            reservations=4,
            reservations_per_ip_group=2,
            reservation_s=100.0,
            circuits=6,
            circuits_per_peer=4,
            circuits_per_ip_group=3,
            circuits_per_pair=2,
        )
        self.core = Reservations(self.limits)
        self.now = 0.0
        self.open: list[Circuit] = []
        self.groups: dict[PeerId, tuple[str | None, float]] = {}

    @rule(peer=st.sampled_from(PEERS), group=st.sampled_from([None, "a", "b"]))
    def reserve(self, peer: PeerId, group: str | None) -> None:
        try:
            until = self.core.reserve(peer, group, self.now)
        except Refused as refused:
            assert refused.status == Status.RESERVATION_REFUSED
        else:
            assert until == self.now + 100.0
            self.groups[peer] = (group, until)

    @rule(source=st.sampled_from(PEERS), whom=st.sampled_from(PEERS), group=st.sampled_from([None, "a", "b"]))
    def connect(self, source: PeerId, whom: PeerId, group: str | None) -> None:
        target = whom
        try:
            self.open.append(self.core.open_circuit(source, target, group, self.now))
        except Refused as refused:
            held = target in self.groups and self.groups[target][1] > self.now
            assert (refused.status == Status.NO_RESERVATION) == (not held and source != target)
        else:
            assert self.groups[target][1] > self.now

    @rule(chance=st.randoms())
    def close(self, chance: random.Random) -> None:
        if self.open:
            circuit = self.open.pop(chance.randrange(len(self.open)))
            self.core.close_circuit(circuit)
            self.core.close_circuit(circuit)

    @rule(peer=st.sampled_from(PEERS))
    def leave(self, peer: PeerId) -> None:
        self.core.drop(peer)
        self.groups.pop(peer, None)

    @rule(seconds=st.floats(0, 60))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.groups = {peer: held for peer, held in self.groups.items() if held[1] > self.now}

    @invariant()
    def nothing_is_exceeded(self) -> None:
        limits, held = self.limits, Counter(group for group, until in self.groups.values() if until > self.now)
        assert sum(held.values()) <= limits.reservations
        assert all(count <= limits.reservations_per_ip_group for group, count in held.items() if group)
        assert self.core.circuits == len(self.open) <= limits.circuits
        ends = Counter(peer for circuit in self.open for peer in (circuit.source, circuit.target))
        assert all(count <= limits.circuits_per_peer for count in ends.values())
        assert dict(self.core._by_peer) == dict(ends)
        pairs = Counter((circuit.source, circuit.target) for circuit in self.open)
        assert all(count <= limits.circuits_per_pair for count in pairs.values())
        groups = Counter(circuit.group for circuit in self.open if circuit.group)
        assert all(count <= limits.circuits_per_ip_group for count in groups.values())
        self.core.expire(self.now)
        assert set(self.core.peers) == set(self.groups)


TestPromises = Promises.TestCase
TestPromises.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_full_relay_renews() -> None:
    core = Reservations(RelayLimits(reservations=1))
    core.reserve(PEERS[0], "a", 0.0)
    assert core.reserve(PEERS[0], "b", 10.0) == 3610.0
    with pytest.raises(Refused, match="the most allowed"):
        core.reserve(PEERS[1], "c", 10.0)
    core.reserve(PEERS[1], "c", 3610.0)  # the other has ended


# Vouchers


def test_a_voucher_holds_for_whom_it_names() -> None:
    data = vouchers.issue(RELAY, PEERS[0], 10_000)
    vouchers.check(data, relay=RELAY.peer_id, peer_id=PEERS[0], now_s=9_000.0)
    vouchers.check(data, relay=RELAY.peer_id, peer_id=PEERS[0], now_s=13_000.0)  # clocks differ
    for change, reason in (
        ({"peer_id": PEERS[1]}, "another peer"),
        ({"relay": PEERS[1]}, "signed"),
        ({"now_s": 13_601.0}, "expired"),
    ):
        given_: dict[str, Any] = {"relay": RELAY.peer_id, "peer_id": PEERS[0], "now_s": 9_000.0, **change}
        with pytest.raises(RecordError, match=reason):
            vouchers.check(data, **given_)


def test_a_voucher_that_names_another_relay_is_refused() -> None:
    class Liar:
        """Signs with its own key, and says that it is somebody else."""

        peer_id = PEERS[3]
        key_pair = RELAY.key_pair
        sign = RELAY.sign

    data = vouchers.issue(cast("Any", Liar), PEERS[0], 10_000)
    with pytest.raises(RecordError, match="another relay"):
        vouchers.check(data, relay=RELAY.peer_id, peer_id=PEERS[0], now_s=9_000.0)


@given(st.data())
def test_a_forged_voucher_is_refused(data: st.DataObject) -> None:
    good = bytearray(vouchers.issue(RELAY, PEERS[0], 10_000))
    position = data.draw(st.integers(0, len(good) - 1))
    good[position] ^= data.draw(st.integers(1, 255))
    with pytest.raises(RecordError):
        vouchers.check(bytes(good), relay=RELAY.peer_id, peer_id=PEERS[0], now_s=9_000.0)


@given(st.binary(max_size=300))
def test_noise_is_no_voucher(data: bytes) -> None:
    with pytest.raises(RecordError):
        vouchers.check(data, relay=RELAY.peer_id, peer_id=PEERS[0], now_s=0.0)


# Addresses, limits and preference


def test_addresses_through_relays() -> None:
    circuit = addresses.relayed_by(AT_RELAY)
    assert str(circuit) == f"{DIRECT}/p2p/{RELAY.peer_id}/p2p-circuit"
    assert addresses.relay_of(circuit) == AT_RELAY
    assert addresses.is_relayed(circuit)
    whole = addresses.parse_peer(f"{circuit}/p2p/{PEERS[0]}")
    assert whole == PeerAddress(address=circuit, peer_id=PEERS[0])
    twice = Multiaddr(f"{circuit}/p2p/{PEERS[0]}/p2p-circuit")
    for other in (DIRECT, twice, Multiaddr(f"{circuit}/p2p/{PEERS[0]}"), Multiaddr("/ip4/203.0.113.7/p2p-circuit")):
        assert addresses.relay_of(other) is None


def test_strangers_through_one_relay_are_counted_apart_from_its_network() -> None:
    limits = Limits(connections_per_ip_group=2, connections_per_relay=3)
    counts = ConnectionCounts(limits)
    circuit = addresses.relayed_by(AT_RELAY)
    held = [counts.connection(where) for where in (circuit, circuit, circuit, DIRECT, DIRECT)]
    for each in held:
        each.__enter__()
    for where, reason in ((circuit, "with the relay"), (DIRECT, "203.0.113.7")):
        with pytest.raises(LimitExceeded, match=reason), counts.connection(where):
            pass
    for each in held:
        each.__exit__(None, None, None)
    assert counts.total == 0


class IdleMux:
    open_streams = 0
    used_at = 0.0


def connection(remote: Multiaddr, *, outbound: bool, since: float) -> Connection:
    return Connection(
        peer_id=PEERS[1],
        remote=remote,
        local=None,
        security="",
        outbound=outbound,
        mux=cast("Any", IdleMux()),
        since=since,
    )


@given(
    st.lists(
        st.tuples(st.booleans(), st.booleans(), st.floats(0, 100)), min_size=1, max_size=6, unique_by=lambda x: x[2]
    )
)
def test_a_direct_connection_is_preferred_by_both_sides(made: list[tuple[bool, bool, float]]) -> None:
    """Whatever the ages, and whoever dialled."""
    me, other = PEERS[0], PEERS[1]
    circuit = addresses.relayed_by(AT_RELAY)
    ours = [
        connection(circuit if relayed else DIRECT, outbound=outbound, since=since) for relayed, outbound, since in made
    ]
    theirs = [replace(each, peer_id=me, outbound=not each.outbound, ended=each.ended) for each in ours]
    best = keeping.preferred(ours, me)
    assert best.relayed == all(relayed for relayed, _, _ in made)
    assert ours.index(best) == theirs.index(keeping.preferred(theirs, other))
    assert best not in keeping.superfluous(ours, me)


def test_connections_that_are_kept_are_not_let_go() -> None:
    idle = [replace(connection(DIRECT, outbound=True, since=0.0), peer_id=peer) for peer in PEERS]
    limits = Limits(connections=8)
    assert {each.peer_id for each in keeping.prunable(idle, limits, 100.0)} == set(PEERS[:2])
    kept = [set(PEERS[:1]), {PEERS[2]: None}]
    assert {each.peer_id for each in keeping.prunable(idle, limits, 100.0, kept)} == {PEERS[1], PEERS[3]}

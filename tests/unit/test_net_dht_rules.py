"""The DHT without a network: table, look-up, and what its messages may hold."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from net import addresses
from net.addresses import Multiaddr
from net.dht import keys, wire
from net.dht.backoff import MAX_NAMES, Backoff
from net.dht.gathering import Gathering
from net.dht.lookup import ALPHA, MAX_CANDIDATES, MAX_QUERIES, Lookup
from net.dht.table import PER_IP_GROUP, Contact, K, RoutingTable
from net.errors import RemoteProtocolError
from net.identity import PeerId
from net.records import Record
from net.rpc import packing

OWN = PeerId(b"\x00\x04self")
TARGET = keys.of_name("target")


def contact(number: int, host: str | None = None) -> Contact:
    where = "/memory/1" if host is None else f"/ip4/{host}/tcp/4001"
    return Contact(peer_id=PeerId(b"\x00\x08" + number.to_bytes(8, "big")), addresses=(Multiaddr(where),))


def bucket_of(table: RoutingTable, each: Contact) -> int:
    return keys.common_prefix(keys.of_peer(OWN), keys.of_peer(each.peer_id))


def in_bucket(index: int, count: int) -> list[Contact]:
    """Contacts that share exactly ``index`` leading bits with us."""
    table = RoutingTable(OWN)
    found: list[Contact] = []
    number = 0
    while len(found) < count:
        number += 1
        if bucket_of(table, contact(number)) == index:
            found.append(contact(number))
    return found


# The table


def test_a_bucket_holds_k_and_keeps_those_that_answer() -> None:
    table = RoutingTable(OWN)
    them = in_bucket(0, K + 1)
    assert [table.add(each) for each in them] == [True] * K + [False]
    assert len(table) == K
    assert them[-1].peer_id not in table
    assert table.add(in_bucket(1, 1)[0])


def test_a_newcomer_takes_the_place_of_one_that_failed() -> None:
    table = RoutingTable(OWN)
    them = in_bucket(0, K + 1)
    for each in them[:K]:
        table.add(each)
    table.failed(them[3].peer_id)
    assert them[3].peer_id in table
    assert table.add(them[K])
    assert them[3].peer_id not in table
    assert len(table) == K


def test_two_failures_are_enough_and_an_answer_makes_good() -> None:
    table = RoutingTable(OWN)
    one, two = in_bucket(0, 2)
    for each in (one, two):
        table.add(each)
        table.failed(each.peer_id)
    table.add(two)
    for each in (one, two):
        table.failed(each.peer_id)
    assert [each.peer_id in table for each in (one, two)] == [False, True]
    table.remove(two.peer_id)
    table.failed(two.peer_id)
    assert len(table) == 0


def test_one_network_gets_two_places_in_a_bucket_and_three_in_all() -> None:
    table = RoutingTable(OWN)
    crowd = [Contact(peer_id=each.peer_id, addresses=contact(0, "203.0.113.7").addresses) for each in in_bucket(0, 3)]
    assert [table.add(each) for each in crowd] == [True, True, False]
    taken = 2
    for index in range(1, 5):
        (peer,) = in_bucket(index, 1)
        taken += table.add(Contact(peer_id=peer.peer_id, addresses=crowd[0].addresses))
    assert taken == PER_IP_GROUP
    assert table.add(Contact(peer_id=crowd[2].peer_id, addresses=contact(0, "203.0.113.8").addresses))


def test_whoever_goes_leaves_its_network_the_place() -> None:
    table = RoutingTable(OWN)
    crowd = [Contact(peer_id=each.peer_id, addresses=contact(0, "203.0.113.7").addresses) for each in in_bucket(0, 4)]
    elsewhere = contact(0, "203.0.113.9").addresses
    assert [table.add(each) for each in crowd] == [True, True, False, False]
    table.remove(crowd[0].peer_id)
    assert [table.add(each) for each in crowd] == [True, True, False, False]
    assert table.add(dataclasses.replace(crowd[1], addresses=elsewhere))  # moving leaves it too
    assert table.add(crowd[2])
    assert not table.add(crowd[3])
    for _ in range(2):
        table.failed(crowd[2].peer_id)
    assert table.add(crowd[3])


def test_neither_ourselves_nor_those_without_address_get_in() -> None:
    table = RoutingTable(OWN)
    assert not table.add(Contact(peer_id=OWN, addresses=contact(1).addresses))
    assert not table.add(Contact(peer_id=contact(1).peer_id, addresses=()))
    assert len(table) == 0


def test_closest_is_sorted_by_distance() -> None:
    table = RoutingTable(OWN)
    them = [contact(number) for number in range(40)]
    kept = [each for each in them if table.add(each)]
    expected = sorted(kept, key=lambda each: keys.distance(keys.of_peer(each.peer_id), TARGET))
    assert table.closest(TARGET, 7) == expected[:7]
    assert table.closest(TARGET) == expected[:K]


@given(st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32))
def test_distance_is_a_metric_and_agrees_with_prefixes(a: bytes, b: bytes) -> None:
    assert keys.distance(a, b) == keys.distance(b, a)
    assert (keys.distance(a, b) == 0) == (a == b)
    bits_a, bits_b = f"{int.from_bytes(a):0256b}", f"{int.from_bytes(b):0256b}"
    common = next((n for n in range(256) if bits_a[n] != bits_b[n]), 256)
    assert keys.common_prefix(a, b) == common


# Look-ups in a simulated network


class World:
    """Servers with tables made as real ones are: everybody has met some of the others."""

    def __init__(self, count: int, seed: int = 1) -> None:
        self.random = random.Random(seed)
        self.contacts = [contact(number) for number in range(count)]
        self.tables = {each.peer_id: RoutingTable(each.peer_id) for each in self.contacts}
        for each in self.contacts:
            for other in self.random.sample(self.contacts, min(count, 200)):
                self.tables[each.peer_id].add(other)
        # everybody has looked itself up
        for each in self.contacts:
            near = sorted(self.contacts, key=self.distance_to(keys.of_peer(each.peer_id)))[: K + 1]
            for other in near:
                self.tables[each.peer_id].add(other)
        self.asked: list[PeerId] = []

    @staticmethod
    def distance_to(target: bytes) -> Callable[[Contact], int]:
        return lambda each: keys.distance(keys.of_peer(each.peer_id), target)

    def closest(self, target: bytes, alive: set[PeerId] | None = None) -> list[Contact]:
        them = [each for each in self.contacts if alive is None or each.peer_id in alive]
        return sorted(them, key=self.distance_to(target))[:K]

    def run(self, lookup: Lookup, dead: frozenset[PeerId] = frozenset()) -> None:
        """Answers come in any order, at most ALPHA are under way."""
        under_way: list[Contact] = []
        while True:
            under_way += lookup.next_queries(0.0)
            assert len(under_way) <= ALPHA
            if not under_way:
                return
            peer_id = under_way.pop(self.random.randrange(len(under_way))).peer_id
            assert peer_id not in self.asked
            self.asked.append(peer_id)
            if peer_id in dead:
                lookup.failed(peer_id)
            else:
                lookup.answered(peer_id, self.tables[peer_id].closest(lookup.target))


@pytest.fixture(scope="module")
def world() -> World:
    return World(400)


@pytest.mark.parametrize("seed", range(5))
def test_a_look_up_finds_the_closest_of_hundreds(world: World, seed: int) -> None:
    world.random = random.Random(seed)
    world.asked = []
    target = keys.of_name(f"key {seed}")
    lookup = Lookup(OWN, target, world.random.sample(world.contacts, 3))
    world.run(lookup)
    assert lookup.is_done
    assert lookup.closest == world.closest(target)
    assert len(world.asked) <= 60


@pytest.mark.parametrize("seed", range(5))
def test_the_dead_are_skipped(world: World, seed: int) -> None:
    world.random = random.Random(seed)
    world.asked = []
    target = keys.of_name(f"key {seed}")
    dead = frozenset(each.peer_id for each in world.random.sample(world.contacts, 120))
    start = [each for each in world.contacts if each.peer_id not in dead][:3]
    lookup = Lookup(OWN, target, start)
    world.run(lookup, dead)
    assert lookup.is_done
    found = [each.peer_id for each in lookup.closest]
    assert not dead.intersection(found)
    alive = {each.peer_id for each in world.contacts} - dead
    expected = [each.peer_id for each in world.closest(target, alive)]
    assert found[:10] == expected[:10]


def test_a_look_up_without_anybody_is_over_at_once() -> None:
    lookup = Lookup(OWN, TARGET, [])
    assert (lookup.next_queries(0.0), lookup.is_done, lookup.closest) == ([], True, [])


def test_everybody_dead_ends_a_look_up(world: World) -> None:
    world.asked = []
    lookup = Lookup(OWN, TARGET, world.contacts[:30])
    world.run(lookup, frozenset(each.peer_id for each in world.contacts))
    assert lookup.is_done
    assert lookup.closest == []
    assert len(world.asked) == 30


def test_we_are_never_asked() -> None:
    us = Contact(peer_id=OWN, addresses=contact(1).addresses)
    lookup = Lookup(OWN, TARGET, [us, contact(1)])
    (first,) = lookup.next_queries(0.0)
    lookup.answered(first.peer_id, [us])
    assert lookup.next_queries(0.0) == []
    assert lookup.is_done


def test_servers_that_make_up_names_without_end_do_not_keep_a_look_up_going() -> None:
    lookup = Lookup(OWN, TARGET, [contact(0)])
    asked = 0
    made_up = 1
    while queries := lookup.next_queries(0.0):
        for each in queries:
            asked += 1
            lookup.answered(each.peer_id, [contact(number) for number in range(made_up, made_up + K)])
            made_up += K
    assert lookup.is_done
    assert asked <= MAX_QUERIES
    assert sum(len(path.contacts) for path in lookup._paths) <= MAX_CANDIDATES


def test_servers_that_make_up_ever_nearer_names_do_not_either() -> None:
    nearer = sorted((contact(number) for number in range(6000)), key=World.distance_to(TARGET), reverse=True)
    lookup = Lookup(OWN, TARGET, nearer[:1])
    asked = 0
    while queries := lookup.next_queries(0.0):
        for each in queries:
            asked += 1
            lookup.answered(each.peer_id, nearer[20 * asked : 20 * asked + K])
    assert lookup.is_done
    assert asked == MAX_QUERIES
    assert len(lookup.closest) == K
    assert sum(len(path.contacts) for path in lookup._paths) <= MAX_CANDIDATES


def test_far_names_do_not_crowd_out_near_ones() -> None:
    them = sorted((contact(number) for number in range(1000)), key=World.distance_to(TARGET))
    lookup = Lookup(OWN, TARGET, them[-1:])
    (first,) = lookup.next_queries(0.0)
    lookup.answered(first.peer_id, them[-MAX_CANDIDATES:])
    (*_, second) = lookup.next_queries(0.0)
    lookup.answered(second.peer_id, them[:1])
    assert lookup.next_queries(0.0)[0] == them[0]


# Disjoint paths


class Liars(World):
    """A share of the servers works together: each names only the same twenty, made to lie nearer than anybody honest.

    Those twenty answer, and name each other.
    """

    def __init__(self, count: int, share: float, seed: int) -> None:
        super().__init__(count, seed)
        self.hostile = {each.peer_id for each in self.random.sample(self.contacts, round(count * share))}
        self.crowd = [contact(number) for number in range(100_000, 110_000)]

    def honest_found(self, target: bytes, paths: int) -> int:
        """How many of the ten nearest honest servers a newcomer's look-up asks that knows five."""
        names = sorted(self.crowd, key=self.distance_to(target))[:K]
        lookup = Lookup(OWN, target, self.random.sample(self.contacts, 5), paths=paths)
        asked: set[PeerId] = set()
        under_way: list[Contact] = []
        while under_way := under_way + lookup.next_queries(0.0):
            peer_id = under_way.pop(self.random.randrange(len(under_way))).peer_id
            assert peer_id not in asked
            asked.add(peer_id)
            is_honest = peer_id in self.tables and peer_id not in self.hostile
            lookup.answered(peer_id, self.tables[peer_id].closest(target) if is_honest else names)
        assert lookup.is_done
        honest = {each.peer_id for each in self.contacts} - self.hostile
        return len({each.peer_id for each in self.closest(target, honest)[:10]} & asked)


def test_paths_that_share_nothing_find_honest_servers_that_one_path_misses() -> None:
    liars = Liars(400, 0.2, seed=3)
    targets = [keys.of_name(f"key {number}") for number in range(40)]
    one, three = ([liars.honest_found(target, paths) for target in targets] for paths in (1, 3))
    half = [sum(found >= 5 for found in founds) / len(targets) for founds in (one, three)]
    assert half[0] <= 0.6  # they see at least five of ten
    assert half[1] >= 0.8
    assert min(three) > min(one) == 0


def test_no_path_asks_or_follows_what_another_was_told() -> None:
    them = [contact(number) for number in range(100)]
    lookup = Lookup(OWN, TARGET, them[:3], paths=3)
    starts = lookup.next_queries(0.0)
    assert {each.peer_id for each in starts} == {each.peer_id for each in them[:3]}
    lookup.answered(starts[0].peer_id, them[3:23])
    lookup.answered(starts[1].peer_id, them[3:23])  # the same: nobody twice
    seen = [each.peer_id for each in lookup.next_queries(0.0)]
    assert len(seen) == len(set(seen)) <= ALPHA
    assert {len(path.contacts) for path in lookup._paths} == {1, 21}
    assert [path.queries for path in lookup._paths if len(path.contacts) == 1] == [1]


def test_one_known_server_is_enough_for_all_paths() -> None:
    lookup = Lookup(OWN, TARGET, [contact(0)], paths=3)
    (first,) = lookup.next_queries(0.0)
    lookup.answered(first.peer_id, [contact(number) for number in range(1, 13)])
    assert sorted(len(path.contacts) for path in lookup._paths) == [4, 4, 5]
    asked = lookup.next_queries(0.0)
    assert len(asked) == ALPHA
    for each in asked:
        lookup.answered(each.peer_id, [])
    for each in lookup.next_queries(0.0):
        lookup.failed(each.peer_id)
    assert lookup.is_done
    assert len(lookup.closest) == 11


def test_names_that_lead_nowhere_use_up_one_paths_budget_alone() -> None:
    lookup = Lookup(OWN, TARGET, [contact(number) for number in range(3)], paths=3)
    made_up = 100
    misled = lookup.next_queries(0.0)[0].peer_id
    queries = [misled]
    asked = 0
    lookup.answered(misled, [contact(number) for number in range(made_up, made_up + K)])
    while queries := [each.peer_id for each in lookup.next_queries(0.0)]:
        for peer_id in queries:
            asked += 1
            made_up += K
            lookup.answered(peer_id, [contact(number) for number in range(made_up, made_up + K)])
    assert asked <= MAX_QUERIES // 3
    assert max(path.queries for path in lookup._paths) <= MAX_QUERIES // 3


def test_the_slow_are_neither_waited_for_nor_lost() -> None:
    them = sorted((contact(number) for number in range(40)), key=World.distance_to(TARGET))
    lookup = Lookup(OWN, TARGET, them[:30], patience_s=0.5, slow_s=2.0)
    stuck = lookup.next_queries(0.0)
    assert stuck == them[:ALPHA]
    assert lookup.deadline == 0.5
    lookup.pass_time(0.4)
    assert lookup.next_queries(0.4) == []
    lookup.pass_time(0.5)
    others = lookup.next_queries(0.5)
    assert others == them[ALPHA : 2 * ALPHA]
    for each in others:
        lookup.answered(each.peer_id, [])
    lookup.pass_time(1.9)
    assert (lookup.next_queries(1.9), lookup.is_done, lookup.deadline) == ([], False, 2.0)
    lookup.pass_time(2.0)
    more = lookup.next_queries(2.0)  # in the place of those that are passed over
    assert more == them[2 * ALPHA : 30]
    for each in more[:-1]:
        lookup.answered(each.peer_id, [])
    assert not lookup.is_done
    lookup.failed(more[-1].peer_id)
    assert lookup.is_done
    assert lookup.slow == stuck
    lookup.answered(stuck[0].peer_id, [])
    assert lookup.closest[0] == stuck[0]
    assert lookup.slow == stuck[1:]


def test_where_many_have_answered_the_others_are_waited_for_half_as_long() -> None:
    them = sorted((contact(number) for number in range(K + 2)), key=World.distance_to(TARGET))
    lookup = Lookup(OWN, TARGET, them, alpha=K + 2, paths=2, slow_s=2.0)
    assert len(lookup.next_queries(0.0)) == K + 2
    for each in them[2:-1]:
        lookup.answered(each.peer_id, [])
    lookup.pass_time(1.0)
    assert (lookup.is_done, lookup.deadline) == (False, 2.0)
    lookup.answered(them[-1].peer_id, [])
    assert (lookup.is_done, lookup.deadline) == (False, 1.0)
    lookup.pass_time(1.0)
    assert lookup.is_done
    assert lookup.slow == them[:2]


def test_who_was_asked_just_now_is_not_blamed_when_the_look_up_ends() -> None:
    them = sorted((contact(number) for number in range(K + 1)), key=World.distance_to(TARGET))
    lookup = Lookup(OWN, TARGET, them[1:], alpha=K)
    early = lookup.next_queries(0.0)
    for each in early[1:]:
        lookup.answered(each.peer_id, them[:1])
    lookup.pass_time(2.0)
    assert lookup.slow == early[:1]
    assert lookup.next_queries(2.0) == them[:1]
    lookup.pass_time(3.9)
    assert lookup.slow == early[:1]


def test_where_few_answer_the_slow_are_waited_for() -> None:
    lookup = Lookup(OWN, TARGET, [contact(0), contact(1)])
    lookup.next_queries(0.0)
    lookup.pass_time(100.0)
    assert lookup.deadline == math.inf
    assert not lookup.is_done
    lookup.answered(contact(0).peer_id, [])
    assert not lookup.is_done
    lookup.failed(contact(1).peer_id)
    assert lookup.is_done


@given(st.floats(0, 1e6), st.floats(0.001, 10), st.floats(0.001, 10))
def test_time_that_passes_at_a_deadline_always_leads_on(asked_at: float, patience_s: float, slow_s: float) -> None:
    lookup = Lookup(OWN, TARGET, [contact(0)], patience_s=patience_s, slow_s=slow_s)
    lookup.next_queries(asked_at)
    for _ in range(2):
        lookup.pass_time(lookup.deadline)
    assert lookup.deadline == math.inf
    assert lookup.slow == [contact(0)]


# Back-off


def test_who_did_not_answer_is_left_alone_for_a_while_at_those_addresses() -> None:
    backoff = Backoff(60.0)
    silent, elsewhere = contact(1, "203.0.113.1"), contact(1, "203.0.113.2")
    backoff.note(silent, 100.0)
    assert [backoff.holds(silent, now) for now in (100.0, 159.9, 160.0)] == [True, True, False]
    assert not backoff.holds(elsewhere, 100.0)
    assert not backoff.holds(contact(2), 100.0)
    backoff.forgive(silent.peer_id)
    assert not backoff.holds(silent, 100.0)
    backoff.forgive(silent.peer_id)


def test_made_up_names_push_out_only_older_ones() -> None:
    backoff = Backoff(60.0)
    for number in range(MAX_NAMES + 1):
        backoff.note(contact(number), float(number) / MAX_NAMES)
    assert len(backoff) == MAX_NAMES
    assert not backoff.holds(contact(0), 2.0)
    assert backoff.holds(contact(1), 2.0)
    assert backoff.holds(contact(MAX_NAMES), 2.0)


# What is believed


def record(subject: int, sequence: int, issued_s: int, **body: object) -> Record:
    return Record(
        kind="node",
        key=TARGET,
        peer_id=contact(subject).peer_id,
        sequence=sequence,
        issued_s=issued_s,
        ttl_s=120,
        body=body,
        envelope=b"",
    )


HOLDERS = [contact(number).peer_id for number in range(900, 910)]


def believed(now_s: float, *held: tuple[int, Record]) -> list[Record]:
    """``held``: how many of the ten holders hand out which record."""
    gathering = Gathering("node")
    for count, each in held:
        for holder in HOLDERS[:count]:
            gathering.take(holder, each)
    return gathering.believed(HOLDERS, now_s)


def test_one_holder_is_enough_for_a_record_that_has_not_expired() -> None:
    fresh = record(1, 1, 1000)
    assert believed(1000, (1, fresh)) == believed(1120, (1, fresh)) == believed(990, (1, fresh)) == [fresh]


@pytest.mark.parametrize("now_s", [1121, 1000 + 3600, 989, 1000 - 3600])
def test_one_that_has_expired_by_our_clock_needs_half_of_the_holders(now_s: float) -> None:
    skewed = record(1, 1, 1000)
    assert believed(now_s, (5, skewed)) == [skewed]
    assert believed(now_s, (4, skewed)) == []


def test_holders_that_are_not_near_have_no_voice_in_that() -> None:
    gathering = Gathering("node")
    for number in range(20):
        gathering.take(contact(number).peer_id, record(1, 1, 1000))
    assert gathering.believed(HOLDERS, 5000) == []


def test_who_was_withdrawn_does_not_come_back_through_an_older_record() -> None:
    assert believed(1000, (9, record(1, 1, 1000)), (1, record(1, 2, 1000, withdrawn=True))) == []
    anew = record(1, 3, 1001)
    assert believed(1001, (9, record(1, 2, 1000, withdrawn=True)), (1, anew)) == [anew]


# Messages


@given(st.binary(max_size=64))
def test_any_bytes_are_an_address_that_can_be_used_or_the_peers_fault(data: bytes) -> None:
    try:
        (address,) = wire.read_addresses({"a": [data]}, "a")
    except RemoteProtocolError:
        return
    addresses.host_port(address)
    addresses.websocket_host_port(address)
    addresses.ip_group(address)
    assert hash(address) == hash(Multiaddr(str(address)))


@pytest.mark.parametrize(
    "peers",
    [
        None,
        [[b"", []]],
        [[bytes(65), []]],
        [["text", []]],
        [[b"id"]],
        [b"id"],
        [[b"id", [b"\xff\xff"]]],
        [[b"id", [bytes(129)]]],
        [[b"id", [b"\x04\x7f\0\0\1\x06\x0f\xa1"] * 9]],
        [[b"id", []]] * (K + 1),
    ],
)
def test_malformed_contacts_are_the_peers_fault(peers: object) -> None:
    with pytest.raises(RemoteProtocolError):
        wire.read_contacts({"peers": peers})


def test_contacts_round_trip() -> None:
    them = [contact(number, f"203.0.113.{number}") for number in range(K)]
    fields = packing.unpack(packing.pack({"peers": wire.write_contacts(them)}))
    assert wire.read_contacts(fields) == them


@pytest.mark.parametrize("key", [None, "x" * 32, bytes(31), bytes(33)])
def test_keys_have_one_length(key: object) -> None:
    with pytest.raises(RemoteProtocolError):
        wire.read_key({"key": key})


def test_where_a_peer_calls_from_counts_whatever_it_claims() -> None:
    """Names and loopback have no IP group, and anybody can claim any address: the connection tells."""
    table = RoutingTable(OWN)
    called_from = Multiaddr("/ip4/203.0.113.9/tcp/1")
    for each in [in_bucket(index, 1)[0] for index in range(PER_IP_GROUP + 1)]:
        table.add(dataclasses.replace(each, seen_at=called_from))
    assert len(table) == PER_IP_GROUP
    settled = table.contacts[0]
    crowded = dataclasses.replace(in_bucket(5, 1)[0], addresses=(Multiaddr("/ip4/198.51.100.1/tcp/1"),))
    assert table.add(crowded)
    assert not table.add(dataclasses.replace(crowded, seen_at=called_from))  # moving there is refused,
    assert crowded.peer_id in table  # staying is not
    assert table.add(dataclasses.replace(settled, seen_at=None))
    assert next(c for c in table.contacts if c.peer_id == settled.peer_id).seen_at == called_from


def test_homes_with_equal_private_addresses_are_not_one_network() -> None:
    table = RoutingTable(OWN)
    for index in range(4 * PER_IP_GROUP):
        (each,) = in_bucket(index % 8, index // 8 + 1)[index // 8 :]
        places = (f"/ip4/45.1.{index}.1/tcp/4001", "/ip4/172.17.0.1/tcp/4001")
        table.add(dataclasses.replace(each, addresses=tuple(map(Multiaddr, places))))
    assert len(table) == 4 * PER_IP_GROUP


def test_homes_behind_one_relay_are_not_one_network() -> None:
    table = RoutingTable(OWN)
    relay = f"/ip4/45.1.0.1/tcp/4001/p2p/{OWN}/p2p-circuit"
    for index in range(2 * PER_IP_GROUP):
        (each,) = in_bucket(index % 8, index // 8 + 1)[index // 8 :]
        places = (Multiaddr("/ip4/192.168.1.10/tcp/4001"), Multiaddr(relay))
        called_from = Multiaddr(f"/ip4/45.2.{index}.1/tcp/4001")
        table.add(dataclasses.replace(each, addresses=places, seen_at=called_from))
    assert len(table) == 2 * PER_IP_GROUP
    for number in range(2 * PER_IP_GROUP):  # who shows no address of its own stands where the relay stands
        table.add(dataclasses.replace(in_bucket(9, number + 1)[number], addresses=(Multiaddr(relay),)))
    assert len(table) <= 3 * PER_IP_GROUP

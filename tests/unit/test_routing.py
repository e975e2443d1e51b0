"""Chains: over the blocks that are wanted, in order, the cheapest of all, never of two kinds of numerics."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client import pricing
from client.errors import MissingBlocks
from client.routing import (
    Hop,
    Measurements,
    Pin,
    Wishes,
    better_chain,
    choose_chain,
    fill,
    is_clearly_better,
    runs_without,
    seconds_per_token,
    spell_runs,
    spread,
)
from net.identity import PeerId
from net.protocol.announcement import NodeAnnouncement
from tests.unit.announcements import FULL, INT8, node, peer


def spans(chain: Sequence[Hop]) -> list[tuple[int, int]]:
    return [(hop.start, hop.end) for hop in chain]


def peers(chain: Sequence[Hop]) -> list[int]:
    numbers = {peer(number): number for number in range(16)}
    return [numbers[hop.node.peer_id] for hop in chain]


def test_one_node_that_has_all() -> None:
    chain = choose_chain([node(1, 0, 8)])
    assert (peers(chain), spans(chain)) == ([1], [(0, 8)])


def test_few_fat_hops_where_round_trips_rule_and_many_fast_ones_where_computing_does() -> None:
    fast, fat = [node(n, n, n + 1, speed=1e3) for n in range(8)], [node(8, 0, 4, speed=20), node(9, 4, 8, speed=20)]
    near = Measurements(round_trips={peer(n): 0.001 for n in range(10)})
    assert peers(choose_chain([*fast, *fat])) == [8, 9]  # 0.1 s of computing, against six times 25 ms
    assert peers(choose_chain([*fast, *fat], measured=near)) == [*range(8)]
    slow = [node(8, 0, 4, speed=0.1), node(9, 4, 8, speed=0.1)]
    assert peers(choose_chain([*fast, *slow])) == [*range(8)]


def test_the_faster_of_two_equal_chains() -> None:
    slow, fast = node(1, 0, 4, speed=5), node(2, 0, 4, speed=6)
    for offered in ([slow, fast], [fast, slow]):
        assert peers(choose_chain([*offered, node(3, 4, 8)])) == [2, 3]


def test_the_faster_of_two_that_overlap_takes_more() -> None:
    chain = choose_chain([node(1, 0, 6, speed=1), node(2, 2, 8, speed=100)])
    assert (peers(chain), spans(chain)) == ([1, 2], [(0, 2), (2, 8)])
    chain = choose_chain([node(1, 0, 6, speed=100), node(2, 2, 8, speed=1)])
    assert (peers(chain), spans(chain)) == ([1, 2], [(0, 6), (6, 8)])


def test_a_speed_of_nothing_is_slow_and_no_error() -> None:
    assert peers(choose_chain([node(1, 0, 8, speed=0.0), node(2, 0, 8, speed=1e-9)])) in ([1], [2])
    assert peers(choose_chain([node(1, 0, 8, speed=0.0), node(2, 0, 8, speed=1.0)])) == [2]


def test_failed_peers_are_left_out() -> None:
    offered = [node(1, 0, 8), node(2, 0, 4), node(3, 4, 8)]
    assert peers(choose_chain(offered)) == [1]
    assert peers(choose_chain(offered, avoid={peer(1): "silent"})) == [2, 3]


def test_numerics_are_not_mixed() -> None:
    mixed = [node(1, 0, 4), node(2, 4, 8, numerics=INT8)]
    with pytest.raises(MissingBlocks, match="different numerics, and none of these covers all blocks") as caught:
        choose_chain(mixed)
    assert caught.value.missing == []
    assert peers(choose_chain([*mixed, node(3, 0, 6, numerics=INT8)])) == [3, 2]
    assert peers(choose_chain([*mixed, node(3, 4, 8)])) == [1, 3]


def test_the_better_class_of_numerics() -> None:
    offered = [node(1, 0, 4), node(2, 4, 8), node(3, 0, 8, numerics=INT8)]
    assert peers(choose_chain(offered)) == [3]


def test_missing_blocks_are_named_with_what_to_do() -> None:
    with pytest.raises(MissingBlocks) as caught:
        choose_chain([node(1, 1, 3), node(2, 5, 7)])
    assert caught.value.missing == [(0, 1), (3, 5), (7, 8)]
    assert str(caught.value) == (
        "nobody serves blocks 0:1, 3:5, 7:8 of some-bloom; start a node with: "
        "raceme serve some-bloom --blocks 0:1 --bootstrap ADDR"
    )


def test_blocks_of_nodes_that_failed_are_named_with_the_reason() -> None:
    offered = [node(1, 0, 4), node(2, 3, 6), node(3, 4, 8)]
    with pytest.raises(MissingBlocks) as caught:
        choose_chain(offered, avoid={peer(3): "no answer in 60 s", peer(2): "busy"})
    assert caught.value.missing == [(4, 8)]
    assert str(caught.value) == (
        f"blocks 4:8 of some-bloom are announced, but the nodes that serve them fail ({peer(2)}: busy); wait for "
        f"them, or start another with: raceme serve some-bloom --blocks 4:8 --bootstrap ADDR"
    )


def test_blocks_that_were_never_served_come_before_those_that_failed() -> None:
    with pytest.raises(MissingBlocks, match="nobody serves blocks 4:8") as caught:
        choose_chain([node(1, 0, 4)], avoid={peer(1): "silent"})
    assert caught.value.missing == [(4, 8)]


def test_runs_are_spelled_as_the_command_takes_them() -> None:
    assert runs_without(5, [node(1, 1, 2, blocks=5)]) == [(0, 1), (2, 5)]
    assert runs_without(2, []) == [(0, 2)]
    assert runs_without(5, [node(1, 0, 5, blocks=5)]) == []
    assert spell_runs([(0, 1), (2, 5)]) == "0:1, 2:5"


@st.composite
def swarms(draw: st.DrawFn, most_blocks: int = 10, most_nodes: int = 8) -> list[NodeAnnouncement]:
    blocks = draw(st.integers(1, most_blocks))
    nodes = []
    for number in range(draw(st.integers(1, most_nodes))):
        start = draw(st.integers(0, blocks - 1))
        end = draw(st.integers(start + 1, blocks))
        speed = draw(st.sampled_from([0.0, 1.0, 7.0, 100.0]))
        numerics = draw(st.sampled_from([FULL, INT8]))
        nodes.append(node(number, start, end, blocks=blocks, speed=speed, numerics=numerics))
    return nodes


@given(swarms(), st.sets(st.integers(0, 7)))
def test_a_chain_covers_everything_once_and_exists_if_it_can(nodes: list[NodeAnnouncement], failed: set[int]) -> None:
    avoid = {peer(number): "failed" for number in failed}
    usable = [n for n in nodes if n.peer_id not in avoid]
    blocks = nodes[0].blocks
    possible = any(not runs_without(blocks, [n for n in usable if n.numerics == kind]) for kind in (FULL, INT8))
    try:
        chain = choose_chain(nodes, avoid=avoid)
    except MissingBlocks as error:
        assert not possible
        assert "\n" not in str(error)
        assert all(runs_without(blocks, usable)[i] == run for i, run in enumerate(error.missing)) or all(
            runs_without(blocks, nodes)[i] == run for i, run in enumerate(error.missing)
        )
        return
    assert possible
    assert [block for hop in chain for block in range(hop.start, hop.end)] == list(range(blocks))
    assert all(hop.node.start <= hop.start < hop.end <= hop.node.end for hop in chain)
    assert len({hop.node.numerics for hop in chain}) == 1
    assert avoid.keys().isdisjoint(hop.node.peer_id for hop in chain)


# Prices

EXACT = 1e-9


def model_price(chain: Sequence[Hop], wishes: Wishes, measured: Measurements, *, whole: bool = True) -> float:
    """What ``pricing`` says in words, once more, hop by hop; without the way back if the chain is not ``whole``."""
    if not chain:
        return 0.0

    def far(peer_id: PeerId) -> float:
        return measured.round_trips.get(peer_id, pricing.CLIENT_RTT_S)

    def to_client(peer_id: PeerId) -> float:
        line = measured.bytes_per_s.get(peer_id)
        return far(peer_id) / 2 + (wishes.hidden_bytes / line if line else 0.0)

    def way(sender: NodeAnnouncement | None, receiver: NodeAnnouncement | None) -> float:
        if sender is None or receiver is None:
            known = sender or receiver
            assert known is not None
            return to_client(known.peer_id)
        a, b = sender.peer_id, receiver.peer_id
        if a == b:
            return 0.0
        if not wishes.push or (a, b) in measured.unreachable:
            return to_client(a) + to_client(b) + pricing.OVERHEAD_S
        said = [m.round_trips[p] for m, p in ((sender, b), (receiver, a)) if p in m.round_trips]
        seconds = max(said) if said else min((far(a) + far(b)) / 2, pricing.NODE_RTT_S)
        if a in measured.round_trips and b in measured.round_trips:
            seconds = max(seconds, abs(far(a) - far(b)) / 2)
        return seconds / 2

    total = 0.0
    along = [wishes.before, *(hop.node for hop in chain), *([wishes.after] if whole else [])]
    for sender, receiver in itertools.pairwise(along):
        total += way(sender, receiver)
    for hop in chain:
        known, peer_id = hop.node, hop.node.peer_id
        block = 1 / (known.end - known.start) / max(known.decode_tokens_per_s, 1e-3)
        block = measured.step_s.get(peer_id, block) * wishes.work
        block *= 1 + pricing.WAITING * measured.waiting.get(peer_id, known.waiting)
        total += (hop.end - hop.start) * block + pricing.OVERHEAD_S
        total += pricing.RELAY_S * measured.relayed.get(peer_id, known.reachability == "relay-only")
        total += pricing.LEAVING_S * (known.next is not None)
        total += pricing.FAILURE_S * measured.failure_chance.get(peer_id, 0.0)
        left = min(known.cache_tokens_left, known.max_length)
        total += pricing.NO_CACHE_S * (left < wishes.cache_tokens)
        if left < 2 * wishes.cache_tokens:
            total += pricing.SCARCE_CACHE_S * (2 - left / wishes.cache_tokens)
    return total


def replay_price(chain: Sequence[Hop], wishes: Wishes) -> float:
    held = {(hop.node.peer_id, hop.start, hop.end) for hop in wishes.kept}
    anew = [hop for hop in chain if held and (hop.node.peer_id, hop.start, hop.end) not in held]
    return sum(hop.end - hop.start for hop in anew) / chain[0].node.blocks * wishes.replay_s / wishes.tokens_left


def least(nodes: Sequence[NodeAnnouncement], wishes: Wishes, measured: Measurements) -> float | None:
    """The price of the best of all chains, by trying them all but those that begin with what is dearer already."""
    best: float | None = None
    last = nodes[0].blocks if wishes.end is None else wishes.end

    def extend(chain: list[Hop], block: int) -> None:
        nonlocal best
        if block == last:
            price = model_price(chain, wishes, measured) + replay_price(chain, wishes)
            best = price if best is None else min(best, price)
            return
        for each in nodes:
            if chain and each.numerics != chain[0].node.numerics:
                continue
            if wishes.numerics not in (None, each.numerics):
                continue
            for end in range(block + 1, last + 1):
                if not (each.start <= block and end <= each.end and wishes.permits(each, end - 1)):
                    break
                longer = [*chain, Hop(node=each, start=block, end=end)]
                begun = model_price(longer, wishes, measured, whole=False) + replay_price(longer, wishes)
                if best is None or begun < best:
                    extend(longer, end)

    extend([], wishes.start)
    return best


def random_swarm(seed: int) -> tuple[list[NodeAnnouncement], Wishes, Measurements]:
    """Up to ten nodes with prices of every kind, and what is wanted of them."""
    some = random.Random(seed)
    blocks, count = some.randint(2, 6), some.randint(3, 10)

    def one_in(n: int) -> bool:
        return some.randrange(n) == 0

    def figures(draw: Callable[[], float]) -> dict[PeerId, float]:
        return {peer(number): draw() for number in range(count) if not one_in(3)}

    nodes = []
    for number in range(count):
        start = 0 if one_in(3) else some.randrange(blocks)
        offer = node(
            number,
            start,
            blocks if one_in(3) else some.randint(start + 1, blocks),
            blocks=blocks,
            speed=some.choice([0.0, 2.0, 20.0, 500.0]),
            numerics=INT8 if one_in(8) else FULL,
            cache=some.choice([0, 60, 1000]),
            reachability="relay-only" if one_in(4) else "public",
            next=(0, 1) if one_in(6) else None,
            round_trips={n: some.uniform(0.001, 0.3) for n in range(count) if n != number and not one_in(3)},
            waiting=some.choice([0.0, 0.5, 8.0]),
        )
        nodes.append(offer)
    measured = Measurements(
        round_trips=figures(lambda: some.uniform(0.001, 0.3)),
        step_s=figures(lambda: some.uniform(0.001, 0.05)) if one_in(2) else {},
        waiting=figures(lambda: some.uniform(0, 3)) if one_in(3) else {},
        bytes_per_s=figures(lambda: some.uniform(1e5, 1e8)),
        failure_chance=figures(lambda: some.choice([0.0, 0.001, 0.1])),
        relayed={peer(number): one_in(2) for number in range(count) if one_in(3)},
        unreachable=frozenset((peer(a), peer(b)) for a in range(count) for b in range(count) if one_in(6)),
    )
    start = some.randrange(blocks) if one_in(4) else 0
    wishes = Wishes(
        start=start,
        end=some.randint(start + 1, blocks) if one_in(4) else None,
        before=nodes[0] if one_in(5) else None,
        after=nodes[-1] if one_in(5) else None,
        numerics=FULL if one_in(3) else None,
        blocked=frozenset({peer(1)}) if one_in(4) else frozenset(),
        pinned=(Pin(start=1, end=2, peer_id=nodes[0].peer_id),) if one_in(6) else (),
        push=not one_in(4),
        hidden_bytes=some.choice([0, 57_344, 4_000_000]),
        work=some.choice([1.0, 30.0]),
        cache_tokens=some.choice([0, 50, 100]),
    )
    if one_in(3):
        try:
            kept = choose_chain(nodes, wishes=wishes)
        except MissingBlocks:
            return nodes, wishes, measured
        wishes = replace(wishes, kept=tuple(kept), replay_s=some.choice([0.1, 5.0]), tokens_left=20.0)
    return nodes, wishes, measured


@pytest.mark.parametrize("seed", range(200))
def test_no_chain_of_up_to_ten_nodes_is_cheaper(seed: int) -> None:
    nodes, wishes, measured = random_swarm(seed)
    best = least(nodes, wishes, measured)
    try:
        chain = choose_chain(nodes, wishes=wishes, measured=measured)
    except MissingBlocks:
        assert best is None
        return
    assert best is not None
    price = model_price(chain, wishes, measured)
    assert seconds_per_token(chain, wishes=wishes, measured=measured) == pytest.approx(price, rel=EXACT)
    assert price + replay_price(chain, wishes) == pytest.approx(best, rel=EXACT)


@pytest.mark.parametrize("seed", range(20))
def test_the_order_of_the_nodes_does_not_matter(seed: int) -> None:
    nodes, wishes, measured = random_swarm(seed)
    same = [replace(each, peer_id=peer(number + 10)) for number, each in enumerate(nodes[:3])]  # as good as others
    shuffled = [*nodes, *same]
    try:
        chain = choose_chain([*nodes, *same], wishes=wishes, measured=measured)
    except MissingBlocks:
        return
    for _ in range(3):
        random.Random(seed).shuffle(shuffled)
        assert choose_chain(shuffled, wishes=wishes, measured=measured) == chain


def large_swarm(count: int, blocks: int) -> list[NodeAnnouncement]:
    """Nodes of every length, in all places."""
    some = random.Random(1)
    ids = [PeerId(bytes([0, 36, 8, 1, 18, 32]) + some.randbytes(32)) for _ in range(count)]
    nodes = []
    for own in ids:
        length = some.randint(2, 30)
        start = some.randint(0, blocks - length)
        offer = node(0, start, start + length, blocks=blocks, speed=some.uniform(1, 50))
        nodes.append(
            replace(offer, peer_id=own, round_trips={other: some.uniform(0.01, 0.2) for other in some.sample(ids, 8)})
        )
    return nodes


def test_a_chain_through_200_nodes_and_70_blocks_is_found_at_once() -> None:
    nodes = large_swarm(200, 70)
    everywhere = [replace(each, start=0, end=70) for each in nodes]  # all can follow upon all: the most work there is
    for offered in (nodes, everywhere):
        took = []
        for _ in range(5):
            began = time.perf_counter()
            choose_chain(offered)
            took.append(time.perf_counter() - began)
        assert min(took) < 0.5, "this takes some 10 ms"


# Measurements


def test_near_nodes_before_far_ones() -> None:
    offered = [node(1, 0, 8), node(2, 0, 8)]
    for near, far in ((1, 2), (2, 1)):
        measured = Measurements(round_trips={peer(near): 0.01, peer(far): 0.2})
        assert peers(choose_chain(offered, measured=measured)) == [near]


def test_nodes_near_each_other_before_others() -> None:
    first = node(1, 0, 4, round_trips={2: 0.2, 3: 0.01})
    second, third = node(2, 4, 8), node(3, 4, 8, round_trips={1: 0.012})
    assert peers(choose_chain([first, second, third])) == [1, 3]
    # It takes two to be near: who pretends to be is believed no more than who says otherwise.
    liar = node(3, 4, 8, round_trips={1: 0.0})
    assert peers(choose_chain([replace(first, round_trips={peer(2): 0.1, peer(3): 0.2}), second, liar])) == [1, 2]


def test_two_that_pretend_to_be_near_each_other_are_not_nearer_than_they_can_be() -> None:
    offered = [node(1, 0, 4, round_trips={2: 0.0}), node(2, 4, 8, round_trips={1: 0.0})]
    measured = Measurements(round_trips={peer(1): 0.01, peer(2): 0.41})
    ways = (0.01 + 0.41) / 2 + 0.2 / 2
    chain = choose_chain(offered, measured=measured)
    assert seconds_per_token(chain, measured=measured) == pytest.approx(ways + 0.2 + 2 * pricing.OVERHEAD_S)


def test_a_node_that_computes_faster_than_it_says() -> None:
    offered = [node(1, 0, 8, speed=10), node(2, 0, 8, speed=11)]
    assert peers(choose_chain(offered)) == [2]
    assert peers(choose_chain(offered, measured=Measurements(step_s={peer(1): 0.01}))) == [1]


def test_a_node_for_which_others_wait_is_slower() -> None:
    offered = [node(1, 0, 8, speed=12, waiting=10), node(2, 0, 8, speed=10)]
    assert peers(choose_chain(offered)) == [2]
    assert peers(choose_chain(offered, measured=Measurements(waiting={peer(1): 0.0}))) == [1]


def test_large_messages_go_over_fast_lines() -> None:
    offered = [node(1, 0, 8), node(2, 0, 8)]
    measured = Measurements(round_trips={peer(1): 0.02, peer(2): 0.04}, bytes_per_s={peer(1): 1e6, peer(2): 1e7})
    assert peers(choose_chain(offered, measured=measured)) == [1]
    assert peers(choose_chain(offered, measured=measured, wishes=Wishes(hidden_bytes=1_000_000))) == [2]


def test_relays_are_a_little_dearer() -> None:
    offered = [node(1, 0, 8, reachability="relay-only"), node(2, 0, 8)]
    assert peers(choose_chain(offered)) == [2]
    assert peers(choose_chain(offered, measured=Measurements(relayed={peer(1): False, peer(2): True}))) == [1]


def test_a_node_that_fails_now_and_then_is_used_if_it_is_much_better() -> None:
    offered = [node(1, 0, 8, speed=100), node(2, 0, 8, speed=20)]
    for chance, chosen in ((0.001, 1), (0.1, 2)):
        assert peers(choose_chain(offered, measured=Measurements(failure_chance={peer(1): chance}))) == [chosen]


def test_nodes_that_do_not_reach_each_other_are_a_detour() -> None:
    offered = [node(1, 0, 4), node(2, 4, 8), node(3, 4, 8, speed=9)]
    assert peers(choose_chain(offered)) == [1, 2]
    apart = Measurements(unreachable=frozenset({(peer(1), peer(2))}))
    assert peers(choose_chain(offered, measured=apart)) == [1, 3]
    pushed, not_pushed = Wishes(), Wishes(push=False)
    chain = choose_chain(offered[:2])
    dearer = seconds_per_token(chain, wishes=not_pushed) - seconds_per_token(chain, wishes=pushed)
    assert dearer == pytest.approx(0.025 + pricing.OVERHEAD_S)
    assert seconds_per_token(chain, measured=apart) == pytest.approx(seconds_per_token(chain, wishes=not_pushed))


# Wishes


def test_only_the_blocks_that_are_wanted() -> None:
    offered = [node(1, 1, 4), node(2, 3, 7)]
    chain = choose_chain(offered, wishes=Wishes(start=1, end=7))
    assert (chain[0].start, chain[-1].end, peers(chain)) == (1, 7, [1, 2])
    chain = choose_chain(offered, wishes=Wishes(start=2, end=6))
    assert (chain[0].start, chain[-1].end, peers(chain)) == (2, 6, [1, 2])
    assert choose_chain(offered, wishes=Wishes(start=3, end=3)) == []
    with pytest.raises(MissingBlocks) as caught:
        choose_chain(offered, wishes=Wishes(start=0, end=7))
    assert caught.value.missing == [(0, 1)]


def test_the_numerics_that_are_wanted() -> None:
    offered = [node(1, 0, 8), node(2, 0, 5, numerics=INT8), node(3, 5, 8, numerics=INT8)]
    assert peers(choose_chain(offered)) == [1]
    assert peers(choose_chain(offered, wishes=Wishes(numerics=INT8))) == [2, 3]
    with pytest.raises(MissingBlocks, match=r"blocks 5:8 .*not with the numerics") as caught:
        choose_chain(offered[:2], wishes=Wishes(numerics=INT8))
    assert caught.value.missing == [(5, 8)]


def test_peers_that_are_allowed_and_blocked() -> None:
    offered = [node(1, 0, 8), node(2, 0, 4), node(3, 4, 8), node(4, 4, 8, speed=5)]
    assert peers(choose_chain(offered, wishes=Wishes(blocked=frozenset({peer(1)})))) == [2, 3]
    assert peers(choose_chain(offered, wishes=Wishes(allowed=frozenset({peer(2), peer(4)})))) == [2, 4]
    both = Wishes(allowed=frozenset({peer(2), peer(4)}), blocked=frozenset({peer(4)}))
    with pytest.raises(MissingBlocks, match=r"blocks 4:8 .*are not to be used") as caught:
        choose_chain(offered, wishes=both)
    assert caught.value.missing == [(4, 8)]


def test_pinned_blocks() -> None:
    offered = [node(1, 0, 8, speed=100), node(2, 2, 6), node(3, 2, 6)]
    chain = choose_chain(offered, wishes=Wishes(pinned=(Pin(start=3, end=5, peer_id=peer(2)),)))
    assert (peers(chain), spans(chain)) == ([1, 2, 1], [(0, 3), (3, 5), (5, 8)])
    with pytest.raises(MissingBlocks, match=r"blocks 6:7 .*are not to be used"):
        choose_chain(offered, wishes=Wishes(pinned=(Pin(start=5, end=7, peer_id=peer(2)),)))
    with pytest.raises(MissingBlocks, match=rf"blocks 3:5 .*fail \({peer(2)}: lost"):
        wishes = Wishes(pinned=(Pin(start=3, end=5, peer_id=peer(2)),))
        choose_chain(offered, wishes=wishes, avoid={peer(2): "lost"})


@pytest.mark.parametrize(
    "make",
    [
        lambda: Wishes(start=3, end=2),
        lambda: Wishes(start=-1),
        lambda: Wishes(tokens_left=0),
        lambda: Wishes(replay_s=float("nan")),
        lambda: Wishes(cache_tokens=-1),
        lambda: Pin(start=2, end=2, peer_id=peer(1)),
        lambda: Wishes(pinned=(Pin(start=0, end=3, peer_id=peer(1)), Pin(start=2, end=4, peer_id=peer(1)))),
    ],
)
def test_wishes_that_make_no_sense(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError):
        make()


def test_where_cache_is_left() -> None:
    offered = [node(1, 0, 8, speed=12, cache=60), node(2, 0, 8)]
    assert peers(choose_chain(offered)) == [1]
    assert peers(choose_chain(offered, wishes=Wishes(cache_tokens=50))) == [2]
    assert peers(choose_chain(offered[:1], wishes=Wishes(cache_tokens=90))) == [1]  # perhaps there will be some


def test_nodes_that_stay_before_those_that_move() -> None:
    assert peers(choose_chain([node(1, 0, 8, next=(2, 4)), node(2, 0, 8)])) == [2]


# Going on with a chain


def test_a_gap_is_filled_next_to_those_who_stay() -> None:
    first, last = node(1, 0, 3, round_trips={4: 0.3, 5: 0.001}), node(2, 5, 8, round_trips={4: 0.3, 5: 0.001})
    offered = [first, last, node(4, 0, 8, speed=11), node(5, 0, 8, round_trips={1: 0.002, 2: 0.002})]
    chain = fill(offered, 3, 5, before=first, after=last)
    assert (peers(chain), spans(chain)) == ([5], [(3, 5)])
    alone = fill(offered, 3, 5, before=None, after=None)
    assert peers(alone) == [4]


def test_a_gap_is_filled_with_the_same_numerics() -> None:
    first, other = node(1, 0, 4, numerics=INT8), node(2, 4, 8)
    with pytest.raises(MissingBlocks):
        fill([first, other], 4, 8, before=first, after=None)
    assert peers(fill([first, other, node(3, 2, 8, numerics=INT8)], 4, 8, before=first, after=None)) == [3]


def test_hops_that_hold_state_are_kept_while_replaying_costs_more() -> None:
    old, better = node(1, 0, 8, speed=10), node(2, 0, 8, speed=11)
    kept = (Hop(node=old, start=0, end=8),)
    for replay_s, chosen in ((0.0, 2), (5.0, 1)):
        assert peers(choose_chain([old, better], wishes=Wishes(kept=kept, replay_s=replay_s))) == [chosen]
    # The state is for these blocks, and no others.
    wider = Wishes(kept=(Hop(node=old, start=0, end=4),), replay_s=5.0)
    assert spans(choose_chain([old], wishes=wider)) == [(0, 4), (4, 8)]


def test_a_chain_is_replaced_by_one_that_is_clearly_better() -> None:
    old = choose_chain([node(1, 0, 8, speed=10)])
    good, great = choose_chain([node(2, 0, 8, speed=11)]), choose_chain([node(3, 0, 8, speed=100)])
    assert not is_clearly_better(good, old)
    assert is_clearly_better(great, old)
    assert not is_clearly_better(old, old)
    long, short = Wishes(replay_s=1.0, tokens_left=100), Wishes(replay_s=1.0, tokens_left=5)
    assert is_clearly_better(great, old, wishes=long)  # 9 s saved
    assert not is_clearly_better(great, old, wishes=short)  # 0.45 s


def test_a_replan_moves_only_what_gains() -> None:
    old = choose_chain([node(1, 0, 4, speed=10), node(2, 4, 8, speed=10)])
    wishes = Wishes(replay_s=2.0, tokens_left=100)
    now = [node(1, 0, 4, speed=10), node(2, 4, 8, speed=10), node(3, 4, 8, speed=100), node(4, 0, 4, speed=10.5)]
    new = better_chain(now, old, wishes=wishes)
    assert new is not None
    assert peers(new) == [1, 3]
    assert better_chain(now[:2], old, wishes=wishes) is None
    assert better_chain(now[3:], old, wishes=wishes) is None  # who is not seen this time may be there all the same
    assert better_chain([], old, wishes=wishes) is None
    assert better_chain(now, old, wishes=wishes, avoid={peer(3): "failed"}) is None


def test_a_node_that_is_much_slower_now_or_has_moved_is_left() -> None:
    old = choose_chain([node(1, 0, 8, speed=10)])
    slower = better_chain([node(1, 0, 8, speed=2), node(2, 0, 8, speed=10)], old)
    assert slower is not None and peers(slower) == [2]
    faster = [node(1, 0, 8, speed=50), node(2, 0, 8, speed=60)]
    old = choose_chain(faster[:1])
    assert better_chain(faster, old) is None
    moved = better_chain([node(1, 0, 4, speed=50), faster[1]], old)
    assert moved is not None and peers(moved) == [2]


# Many batches


def test_batches_are_spread_over_chains_so_that_the_last_ends_soonest() -> None:
    offered = [node(1, 0, 8, speed=10), node(2, 0, 8, speed=10), node(3, 0, 8, speed=5)]
    shares = spread(offered, 20, wishes=Wishes(work=10.0))
    assert {tuple(peers(share.chain)): share.batches for share in shares} == {(1,): 8, (2,): 8, (3,): 4}


def test_few_batches_take_the_best_chain() -> None:
    shares = spread([node(1, 0, 8, speed=100), node(2, 0, 8, speed=1)], 3)
    assert [(peers(share.chain), share.batches) for share in shares] == [([1], 3)]
    assert spread([node(1, 0, 8)], 0) == []
    with pytest.raises(ValueError):
        spread([node(1, 0, 8)], -1)
    with pytest.raises(MissingBlocks):
        spread([node(1, 0, 7)], 2)


@pytest.mark.parametrize("seed", range(30))
def test_all_batches_are_shared_out_and_end_no_later_than_through_one_chain(seed: int) -> None:
    nodes, wishes, measured = random_swarm(seed)
    wishes = replace(wishes, kept=())
    try:
        alone = choose_chain(nodes, wishes=wishes, measured=measured)
    except MissingBlocks:
        return
    shares = spread(nodes, 32, wishes=wishes, measured=measured)
    assert sum(share.batches for share in shares) == 32
    assert len({share.chain[0].node.numerics for share in shares}) == 1

    def over(chains: Sequence[tuple[list[Hop], int]]) -> float:
        busy: dict[PeerId, float] = {}
        for chain, count in chains:
            for hop in chain:
                each = pricing.OVERHEAD_S + (hop.end - hop.start) * pricing.block_s(hop.node, wishes, measured)
                busy[hop.node.peer_id] = busy.get(hop.node.peer_id, 0.0) + count * each
        return max(
            seconds_per_token(chain, wishes=wishes, measured=measured) + max(busy[h.node.peer_id] for h in chain)
            for chain, _ in chains
        )

    # Within the rounding of one batch.
    assert over([(share.chain, share.batches) for share in shares]) <= over([(alone, 33)])

"""Chains: over the whole model, in order, the shortest first, never of two kinds of numerics."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.errors import MissingBlocks
from client.routing import Hop, choose_chain, runs_without, spell_runs
from net.protocol.announcement import NodeAnnouncement
from tests.unit.announcements import FULL, INT8, node, peer


def spans(chain: Sequence[Hop]) -> list[tuple[int, int]]:
    return [(hop.start, hop.end) for hop in chain]


def peers(chain: Sequence[Hop]) -> list[int]:
    numbers = {peer(number): number for number in range(16)}
    return [numbers[hop.node.peer_id] for hop in chain]


def seconds(chain: Sequence[Hop]) -> float:
    """For one token, from what the nodes measured on all of their blocks."""
    return sum((h.end - h.start) / (h.node.end - h.node.start) / max(h.node.decode_tokens_per_s, 1e-3) for h in chain)


def test_one_node_that_has_all() -> None:
    chain = choose_chain([node(1, 0, 8)])
    assert (peers(chain), spans(chain)) == ([1], [(0, 8)])


def test_fewest_hops_before_speed() -> None:
    fast = [node(n, n, n + 1, speed=1e6) for n in range(8)]
    assert peers(choose_chain([*fast, node(8, 0, 4, speed=0.1), node(9, 4, 8, speed=0.1)])) == [8, 9]


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


@given(swarms(most_blocks=4, most_nodes=4))
def test_no_chain_is_better(nodes: list[NodeAnnouncement]) -> None:
    """Against all ways to cut the model and to give each part to a node."""
    blocks = nodes[0].blocks
    best = min(
        (
            (len(hops), seconds(hops))
            for cuts in itertools.chain.from_iterable(
                itertools.combinations(range(1, blocks), n) for n in range(blocks)
            )
            for hops in itertools.product(
                *(
                    [Hop(node=n, start=start, end=end) for n in nodes if n.start <= start and end <= n.end]
                    for start, end in itertools.pairwise((0, *cuts, blocks))
                )
            )
            if len({hop.node.numerics for hop in hops}) == 1
        ),
        default=None,
    )
    try:
        chain = choose_chain(nodes)
    except MissingBlocks:
        assert best is None
        return
    assert best is not None
    assert len(chain) == best[0]
    assert seconds(chain) == pytest.approx(best[1])

"""A node takes what the swarm lacks most, and moves when that pays."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.routing import runs_without
from compute.placement import MARGIN, better_span, choose_span, coverage, keeps_move
from net.errors import RemoteProtocolError
from net.protocol.announcement import NodeAnnouncement
from tests.unit.announcements import node, peer


@pytest.mark.parametrize(
    ("length", "nodes", "expected"),
    [
        (8, [], (0, 8)),
        (3, [], (0, 3)),
        (1, [], (0, 1)),
        (99, [], (0, 8)),
        (0, [], (0, 1)),
        (3, [node(1, 0, 3)], (3, 6)),
        (3, [node(1, 0, 3), node(2, 3, 6)], (5, 8)),
        (2, [node(1, 0, 3), node(2, 5, 8)], (3, 5)),
        (3, [node(1, 0, 3), node(2, 5, 8)], (2, 5)),  # the gap and one more; the first of two ties
        (1, [node(1, 0, 4), node(2, 5, 8)], (4, 5)),
        (2, [node(1, 0, 8, speed=10), node(2, 0, 6, speed=10)], (6, 8)),  # covered, but least
        (4, [node(1, 0, 4, speed=100), node(2, 4, 8, speed=2)], (4, 8)),  # the slow half
        (4, [node(1, 0, 4, speed=0.0)], (4, 8)),  # who is about to join counts
        (8, [node(1, 0, 8)], (0, 8)),
    ],
)
def test_choose_span(length: int, nodes: list[NodeAnnouncement], expected: tuple[int, int]) -> None:
    assert choose_span(8, length, nodes) == expected
    assert choose_span(8, length, nodes[::-1]) == expected


def test_coverage_counts_speeds_and_at_least_one() -> None:
    assert coverage(4, [node(1, 0, 2, speed=5.0), node(2, 1, 3, speed=0.0)]) == [5.0, 6.0, 1.0, 0.0]
    assert coverage(2, [node(1, 0, 8)]) == [10.0, 10.0]  # a node that speaks of more blocks than there are


def test_missing_blocks() -> None:
    assert runs_without(4, []) == [(0, 4)]
    assert runs_without(8, [node(1, 1, 2), node(2, 4, 8)]) == [(0, 1), (2, 4)]


others = st.lists(
    st.builds(
        lambda number, start, size, speed: node(number, start, min(start + size, 12), blocks=12, speed=speed),
        st.integers(0, 15),
        st.integers(0, 11),
        st.integers(1, 12),
        st.sampled_from([0.0, 1.0, 50.0]),
    ),
    max_size=6,
)


@given(st.integers(1, 14), others)
def test_no_span_has_a_worse_served_block(length: int, nodes: list[NodeAnnouncement]) -> None:
    start, end = choose_span(12, length, nodes)
    assert 0 <= start < end <= 12
    assert end - start == min(length, 12)
    served = coverage(12, nodes)
    assert min(served[start:end]) == min(served)


@given(st.integers(1, 12), others)
def test_one_after_another_they_cover_everything(length: int, nodes: list[NodeAnnouncement]) -> None:
    joined = list(nodes)
    for _ in range(-(-12 // length) * 2):
        start, end = choose_span(12, length, joined)
        joined.append(node(0, start, end, blocks=12))
    assert runs_without(12, joined) == []


# Moving

Others = list[NodeAnnouncement]


def moving(number: int, start: int, end: int, to: tuple[int, int], *, speed: float = 10.0) -> NodeAnnouncement:
    return replace(node(number, start, end, speed=speed), next=to)


@pytest.mark.parametrize(
    ("current", "others", "expected"),
    [
        ((0, 4), [node(1, 0, 4)], (4, 8)),  # the other half
        ((2, 6), [node(1, 0, 4)], (4, 8)),
        ((0, 4), [], None),  # who leaves opens a hole
        ((0, 4), [node(1, 0, 3)], (3, 7)),  # but for one block, which it keeps
        ((0, 4), [node(1, 1, 8)], None),  # nor for anything else does it leave one that it alone serves
        ((0, 4), [node(1, 1, 4)], None),
        ((0, 4), [node(1, 0, 2), node(2, 5, 8)], (1, 5)),  # as near as closes it
        ((0, 4), [node(1, 0, 4), node(2, 4, 8)], None),  # nothing to gain
        ((0, 4), [node(1, 0, 4, speed=13), node(2, 4, 8, speed=1)], (4, 8)),
        ((0, 4), [node(1, 0, 4, speed=5), node(2, 4, 8, speed=4)], None),  # what it leaves would be as badly off
        ((0, 4), [node(1, 0, 4, speed=5.1), node(2, 4, 8, speed=4)], (4, 8)),
        ((0, 4), [node(1, 0, 4), moving(2, 0, 4, (4, 8))], None),  # somebody is about to
        ((4, 8), [node(1, 0, 8), moving(2, 4, 8, (0, 4))], None),
        ((0, 4), [node(1, 0, 4, state="joining")], None),  # who has yet to load serves nobody
        ((0, 4), [moving(1, 0, 4, (4, 8), speed=1), moving(2, 4, 8, (0, 4))], None),  # nor who has yet to come, or goes
        ((0, 4), [node(1, 0, 4), node(2, 4, 8, speed=0.0, state="joining")], (4, 8)),  # its speed is not known yet
    ],
)
def test_better_span(current: tuple[int, int], others: Others, expected: tuple[int, int] | None) -> None:
    assert better_span(8, current, 4, 10.0, others) == expected
    assert better_span(8, current, 4, 10.0, others[::-1]) == expected


def test_the_margin_is_exceeded_or_nobody_moves() -> None:
    others = [node(1, 0, 4, speed=20), node(2, 4, 8, speed=10)]
    assert better_span(8, (0, 4), 4, 2.5, others) is None
    assert better_span(8, (0, 4), 4, 2.6, others) == (4, 8)
    assert better_span(8, (0, 4), 4, 2.0, others, margin=1.1) == (4, 8)


def test_what_is_left_behind_is_not_as_badly_off_as_the_worst_was() -> None:
    """Not even where another block, as badly off, is raised instead."""
    others = [node(number, number, number + 1, speed=speed) for number, speed in enumerate([10, 30, 10, 12])]
    assert better_span(4, (0, 2), 2, 10.0, others) is None
    assert better_span(4, (0, 2), 2, 10.0, [node(0, 0, 1, speed=15.1), *others[1:]]) == (2, 4)


def test_the_nearest_of_equals() -> None:
    assert better_span(8, (5, 6), 1, 10.0, [node(1, 1, 7)]) == (7, 8)
    assert better_span(8, (2, 3), 1, 10.0, [node(1, 1, 7)]) == (0, 1)


def test_lengths_that_do_not_fit() -> None:
    assert better_span(8, (0, 8), 99, 10.0, [node(1, 0, 8)]) is None
    assert better_span(8, (0, 4), 6, 10.0, [node(1, 0, 6)]) == (2, 8)  # more than before
    assert better_span(8, (0, 4), 8, 10.0, []) == (0, 8)


def test_coverage_counts_who_moves_where_it_moves_to() -> None:
    assert coverage(4, [replace(node(1, 0, 2), next=(1, 3))]) == [0.0, 10.0, 10.0, 0.0]


def test_of_two_that_want_the_same_the_lower_peer_id_goes() -> None:
    low, high = sorted((1, 2), key=lambda number: peer(number).to_bytes())
    stays = node(3, 0, 4)
    wants = {number: moving(number, 0, 4, (4, 8)) for number in (low, high)}
    assert keeps_move(8, (0, 4), (4, 8), 10.0, peer(low), [stays, wants[high]])
    assert not keeps_move(8, (0, 4), (4, 8), 10.0, peer(high), [stays, wants[low]])
    joins = {number: node(number, 4, 8, state="joining") for number in (low, high)}
    assert keeps_move(8, (0, 4), (4, 8), 1.0, peer(low), [stays, joins[high]])
    assert not keeps_move(8, (0, 4), (4, 8), 1.0, peer(high), [stays, replace(joins[low], decode_tokens_per_s=9.0)])


def test_two_do_not_both_leave_what_they_alone_serve() -> None:
    low, high = sorted((1, 2), key=lambda number: peer(number).to_bytes())
    to = {low: (4, 6), high: (6, 8)}
    wants = {number: moving(number, 0, 4, to[number]) for number in (low, high)}
    assert keeps_move(8, (0, 4), to[low], 10.0, peer(low), [wants[high]])
    assert not keeps_move(8, (0, 4), to[high], 10.0, peer(high), [wants[low]])


MOST_MOVES = 60  # of twelve nodes; in 7,000 tries they made 17 at most
MOST_ROUNDS = 100


@st.composite
def placements(draw: st.DrawFn) -> tuple[int, Others]:
    """Up to twelve nodes of all speeds over up to forty blocks."""
    n_blocks = draw(st.integers(1, 40))
    rng = draw(st.randoms(use_true_random=False))
    nodes = []
    longest = draw(st.integers(1, n_blocks))
    for number in range(draw(st.integers(1, 12))):
        length = rng.randint(1, longest)
        start = rng.randint(0, n_blocks - length)
        speed = rng.choice([0.0, 1.0, 10.0, 10.0, 10 ** rng.uniform(-1, 4)])
        nodes.append(node(number, start, start + length, blocks=n_blocks, speed=speed))
    return n_blocks, nodes


def holes(n_blocks: int, nodes: Others) -> set[int]:
    return set(range(n_blocks)) - {block for each in nodes for block in range(each.start, each.end)}


def moved(each: NodeAnnouncement, span: tuple[int, int]) -> NodeAnnouncement:
    return replace(each, start=span[0], end=span[1], next=None)


def where_to(n_blocks: int, each: NodeAnnouncement, others: Others) -> tuple[int, int] | None:
    return better_span(n_blocks, (each.start, each.end), each.end - each.start, each.decode_tokens_per_s, others)


def come_to_rest(n_blocks: int, nodes: Others, rng: random.Random, seen: Callable[[Others], Others]) -> Others:
    """Let one at a time look, in random order, and move if it wants to, until nobody has wanted to for two rounds.

    Each move is checked. ``seen`` is what one who looks sees.
    """
    moves = rounds_at_rest = 0
    while rounds_at_rest < 2:
        rounds_at_rest += 1
        for index in rng.sample(range(len(nodes)), len(nodes)):
            view = seen(nodes)
            span = where_to(n_blocks, view[index], view[:index] + view[index + 1 :])
            if span is None:
                continue
            before = nodes
            nodes = [*nodes[:index], moved(nodes[index], span), *nodes[index + 1 :]]
            assert holes(n_blocks, nodes) <= holes(n_blocks, before)
            assert sorted(coverage(n_blocks, nodes)) > sorted(coverage(n_blocks, before))
            rounds_at_rest = 0
            moves += 1
            assert moves <= MOST_MOVES
    return nodes


@settings(deadline=None, max_examples=80)
@given(placements(), st.randoms(use_true_random=False))
def test_moves_come_to_rest_and_close_what_can_be_closed(placement: tuple[int, Others], rng: random.Random) -> None:
    n_blocks, nodes = placement
    nodes = come_to_rest(n_blocks, nodes, rng, list)
    open_ = holes(n_blocks, nodes)
    for index, each in enumerate(nodes):
        others = nodes[:index] + nodes[index + 1 :]
        length = each.end - each.start
        for start in range(n_blocks - length + 1):
            assert not holes(n_blocks, [*others, moved(each, (start, start + length))]) < open_


@settings(deadline=None, max_examples=80)
@given(placements(), st.randoms(use_true_random=False))
def test_noise_of_ten_percent_has_nobody_move_to_and_fro(placement: tuple[int, Others], rng: random.Random) -> None:
    """Every look meets other measurements, and still every move raises the coverage by the true speeds."""
    n_blocks, nodes = placement

    def noisy(nodes: Others) -> Others:
        return [
            replace(each, decode_tokens_per_s=each.decode_tokens_per_s * rng.choice([0.9, 1.1, rng.uniform(0.9, 1.1)]))
            for each in nodes
        ]

    come_to_rest(n_blocks, nodes, rng, noisy)


def test_what_the_margin_is_for() -> None:
    """With one of 1.2, an error of ten percent is enough for a move that gains nothing, and for the way back."""
    here, there = node(1, 0, 4, speed=11.0), node(2, 4, 8, speed=9.0)
    assert better_span(8, (0, 4), 4, 10.0, [here, there], margin=1.2) == (4, 8)
    here, there = node(1, 0, 4, speed=9.0), node(2, 4, 8, speed=11.0)
    assert better_span(8, (4, 8), 4, 10.0, [here, there], margin=1.2) == (0, 4)
    assert better_span(8, (4, 8), 4, 10.0, [here, there]) is None
    assert MARGIN > 1.1 / 0.9


@settings(deadline=None, max_examples=60)
@given(placements(), st.randoms(use_true_random=False))
def test_those_who_look_at_once_open_no_hole_and_come_to_rest(
    placement: tuple[int, Others], rng: random.Random
) -> None:
    """In each round some look, announce what they want, look again, and go all at once."""
    n_blocks, nodes = placement
    for _ in range(MOST_ROUNDS):
        spans = {
            index: span
            for index in range(len(nodes))
            if (span := where_to(n_blocks, nodes[index], nodes[:index] + nodes[index + 1 :])) is not None
        }
        if not spans:
            return
        looking = [index for index in spans if rng.random() < 0.7]
        announced = [replace(each, next=spans[index] if index in looking else None) for index, each in enumerate(nodes)]
        going = {
            index
            for index in looking
            if keeps_move(
                n_blocks,
                (nodes[index].start, nodes[index].end),
                spans[index],
                nodes[index].decode_tokens_per_s,
                nodes[index].peer_id,
                announced[:index] + announced[index + 1 :],
            )
        }
        if looking:
            assert min(looking, key=lambda index: nodes[index].peer_id.to_bytes()) in going
        before = holes(n_blocks, nodes)
        nodes = [moved(each, spans[index]) if index in going else each for index, each in enumerate(nodes)]
        assert holes(n_blocks, nodes) <= before
    pytest.fail("they never come to rest")


# What is said of it


def test_a_move_can_be_announced() -> None:
    offer = node(1, 0, 4)
    assert "next" not in offer.to_body()
    assert NodeAnnouncement._parse(offer.peer_id, offer.to_body()) == offer
    offer = replace(offer, next=(3, 8))
    assert NodeAnnouncement._parse(offer.peer_id, offer.to_body()) == offer


@pytest.mark.parametrize(
    "bad",
    [None, 3, "37", [], [3], [3, 8, 9], [3, 9], [-1, 3], [3, 3], [4, 3], [0, True], [0.0, 3], [[0], 3], [0, 2**63]],
)
def test_a_move_out_of_bounds_is_no_announcement(bad: object) -> None:
    offer = node(1, 0, 4)
    with pytest.raises(RemoteProtocolError):
        NodeAnnouncement._parse(offer.peer_id, {**offer.to_body(), "next": bad})

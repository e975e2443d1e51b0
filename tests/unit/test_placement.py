"""A node takes what the swarm lacks most."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.routing import runs_without
from compute.placement import choose_span, coverage
from net.protocol.announcement import NodeAnnouncement
from tests.unit.announcements import node


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

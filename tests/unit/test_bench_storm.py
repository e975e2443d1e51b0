"""The storm of ``tests/bench/faults.py``: whom it spares, what it takes for a pause, what it takes for wrong."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bench.prompts import tokens_per_round
from tests.bench.storm import PAUSE_S, Fault, Gap, Member, Storm, pauses, percentile, unequal

SPANS = ((0, 3), (0, 3), (3, 8), (3, 8), (0, 4), (4, 8))


def storm(seed: int) -> Storm:
    members = [Member(name=f"relay-{number}", span=None) for number in range(2)]
    members += [Member(name=f"node-{number}", span=span) for number, span in enumerate(SPANS)]
    return Storm(members=members, blocks=8, random=random.Random(seed))


@given(seed=st.integers(0, 2**32), heals=st.lists(st.booleans(), max_size=60))
def test_every_block_and_one_relay_are_always_spared(seed: int, heals: list[bool]) -> None:
    ours = storm(seed)
    for now, is_healing in enumerate(heals):
        ill = [fault for fault in ours.faults if fault.ended_s is None]
        if is_healing and ill:
            ours.heal(ill[0], now)
        elif (fault := ours.strike(now)) is not None:
            assert fault in ours.faults
        good = [member for member in ours.members if member.is_good]
        assert any(member.span is None for member in good)
        spans = [member.span for member in good if member.span is not None]
        assert all(any(start <= block < end for start, end in spans) for block in range(8))
        assert len(good) + len([fault for fault in ours.faults if fault.ended_s is None]) == len(ours.members)


def test_a_seed_gives_the_same_storm() -> None:
    first, second = storm(7), storm(7)
    for now in range(4):
        one, other = first.strike(now), second.strike(now)
        assert (one and (one.kind, one.member, one.lasts_s)) == (other and (other.kind, other.member, other.lasts_s))


def fault(began_s: float, ended_s: float | None) -> Fault:
    return Fault(kind="stop", member="node-0", lasts_s=1.0, began_s=began_s, ended_s=ended_s)


@pytest.mark.parametrize(
    ("effect", "counts"),
    [((4.0, 5.5), True), ((5.5, None), True), ((0.0, 20.0), True), ((3.0, 5.0), False), ((6.0, None), False)],
)
def test_a_pause_overlaps_a_fault(effect: tuple[float, float | None], counts: bool) -> None:
    gap = Gap(began_s=5.0, ended_s=6.0, after=1)
    assert (pauses([gap], [fault(*effect)]) == [gap]) is counts


def test_a_short_gap_is_no_pause() -> None:
    assert not pauses([Gap(began_s=5.0, ended_s=5.0 + PAUSE_S, after=1)], [fault(0.0, None)])


def test_percentiles_are_values_that_occurred() -> None:
    assert percentile([], 99) == 0.0
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile(list(map(float, range(1, 101))), 99) == 99.0
    assert percentile(list(map(float, range(1, 51))), 99) == 50.0


def test_wrong_tokens_are_others_missing_ones_and_ones_too_many() -> None:
    assert unequal([1, 2, 3], [1, 2, 3], is_whole=True) == 0
    assert unequal([1, 2, 3], [1, 9, 3], is_whole=True) == 1
    assert unequal([1, 2, 3], [1], is_whole=True) == 2
    assert unequal([1, 2, 3], [1], is_whole=False) == 0
    assert unequal([1], [1, 2], is_whole=False) == 1


def test_drafts_help_with_what_repeats_itself() -> None:
    assert tokens_per_round([1, 2, 3, 4, 5] * 3, [1, 2, 3, 4, 5] * 4) == 5.0
    assert tokens_per_round([1, 2, 3], [4, 5, 6]) == 1.0

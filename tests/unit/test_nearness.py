"""Which nodes a client looks at, to know how far they are."""

from __future__ import annotations

import itertools
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from client.nearness import AGAIN_S, EVERY_S, KEEP_S, MOST, ROUND, Candidates
from net.identity import PeerId
from tests.unit.session_worlds import PEERS, offer

NODES = [replace(offer(peer, 0, 4), decode_tokens_per_s=float(number)) for number, peer in enumerate(PEERS, start=1)]
FASTEST = [node.peer_id for node in reversed(NODES)]


def candidates() -> Candidates:
    return Candidates(lambda peers: peers)


def test_the_fastest_are_looked_at_first_and_not_too_many_at_once() -> None:
    looks = candidates()
    assert looks.choose(NODES, set(), 0.0) == FASTEST[:ROUND]
    assert looks.choose(NODES, set(), EVERY_S - 1) == []
    assert looks.choose(NODES, set(), EVERY_S) == FASTEST[ROUND:]
    assert looks.choose(NODES, set(), 2 * EVERY_S) == []


def test_half_of_them_are_any() -> None:
    looks = Candidates(lambda peers: peers[::-1])
    chosen = looks.choose(NODES, set(), 0.0)
    assert chosen == [*FASTEST[: ROUND // 2], *FASTEST[: -(ROUND // 2) - 1 : -1]]


def test_who_is_connected_is_not_looked_at() -> None:
    assert candidates().choose(NODES, set(PEERS), 0.0) == []


def test_what_was_found_is_known_until_it_is_old() -> None:
    looks = candidates()
    [peer] = looks.choose(NODES[:1], set(), 0.0)
    assert looks.round_trip_s(peer) is None
    looks.found(peer, 0.03, 1.0)
    assert looks.round_trip_s(peer) == 0.03
    assert looks.choose(NODES[:1], set(), AGAIN_S) == []
    assert looks.choose(NODES[:1], set(), 1.0 + AGAIN_S) == [peer]
    assert looks.round_trip_s(peer) == 0.03  # meanwhile
    looks.found(peer, None, 2.0 + AGAIN_S)
    assert looks.round_trip_s(peer) is None
    looks.choose([], set(), 2.0 + AGAIN_S + KEEP_S)
    assert looks._seen == {}


@given(st.lists(st.tuples(st.integers(0, 60), st.floats(0.1, 100.0), st.booleans()), max_size=60))
def test_few_at_a_time_and_few_in_all(looks_at: list[tuple[int, float, bool]]) -> None:
    looks = candidates()
    many = [replace(NODES[0], peer_id=PeerId(bytes([0, 36, number]))) for number in range(61)]
    now, chosen_at = 0.0, []
    for count, seconds, answers in looks_at:
        now += seconds
        chosen = looks.choose(many[:count], set(), now)
        assert len(chosen) <= ROUND
        assert len(set(chosen)) == len(chosen)
        chosen_at += [now] if chosen else []
        for peer in chosen:
            looks.found(peer, 0.01 if answers else None, now)
        assert len(looks._seen) <= MOST
    assert all(later - earlier >= EVERY_S for earlier, later in itertools.pairwise(chosen_at))

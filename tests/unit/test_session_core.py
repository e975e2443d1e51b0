"""The decisions of sessions, in a world where anything may happen in any order."""

from __future__ import annotations

import random

import pytest

from client import session_core as core
from client.core.patience import OPEN_PATIENCE_S
from client.errors import ClientError, MissingBlocks
from net.errors import NetError
from tests.unit.session_worlds import World

ALL = [(0, 2), (2, 4), (0, 3), (1, 4), (0, 1), (1, 3), (3, 4), (0, 4)]


def live(seed: int, *, fault_chance: float = 0.1, push: bool = True) -> tuple[int, int]:
    """One session's life: steps, prompts, set-backs, rows that change places, under faults. Tokens and errors."""
    chance = random.Random(seed)
    rows = chance.choice([1, 1, 1, 2, 3])
    spans = chance.sample(ALL, chance.randint(4, len(ALL)))
    world = World(seed, rows=rows, spans=[*spans, (0, 2), (2, 4)], push=push, moves=seed % 3 == 0)
    errors = 0
    max_faults = chance.choice([0, 1, 2, 4, 8])
    for _ in range(chance.randint(3, 10)):
        kind = chance.random()
        if kind < 0.1 and world.journal.end:
            position = chance.randrange(world.journal.end)
            world.journal.cut(position)
            world.core.cut(position)
        if kind > 0.8 and rows > 1 and world.journal.end:
            world.journal.reorder([chance.randrange(rows) for _ in range(rows)])
            world.core.reordered()
            count = 1
        else:
            count = chance.choice([1, 1, 1, 1, 3, 9])
        position = world.journal.end
        world.journal.add([[chance.randrange(3) for _ in range(rows)] for _ in range(count)])
        if chance.random() < 0.3:  # of a prompt, only the last results are wanted
            position = max(position, world.journal.end - chance.randint(1, 3))
        world.core.direct = seed % 3 == 0 and position % 2 == 0  # as when results of every block are wanted
        world.core.want(position)
        error = world.run_until_done(fault_chance, max_faults)
        while error is not None:  # the session is usable once they are back
            assert isinstance(error, (ClientError, NetError))
            errors += 1
            assert errors < 30
            for node in world.nodes:
                node.up = True
            world.core.want(position)
            error = world.run_until_done(fault_chance, max_faults)
        world.check(position)
        world.core.took(world.journal.end)
    return world.journal.end, errors


@pytest.mark.parametrize("part", range(10))
def test_a_thousand_sessions_under_faults(part: int) -> None:
    for seed in range(1000 * part, 1000 * (part + 1)):
        live(seed, fault_chance=0.05 + seed % 7 * 0.03, push=seed % 5 != 0)


def test_nobody_to_go_on_with() -> None:
    world = World(1, spans=[(0, 2)])
    world.journal.add([[1]])
    world.core.want(0)
    error = world.run_until_done()
    assert isinstance(error, MissingBlocks)
    assert world.now < 1.0


def test_a_node_that_is_at_it_is_not_hurried() -> None:
    world = World(1, spans=[(0, 4)] * 6)
    session, now = world.core, 0.0
    world.journal.add([[1]])
    session.want(0)
    session.advance(now)
    session.nodes_found([node.offer for node in world.nodes], now)
    keys = [action.leg for action in session.advance(now) if isinstance(action, core.Open)]
    assert keys
    for _ in range(10):  # what they are sent takes long
        now += OPEN_PATIENCE_S - 0.5
        for key in keys:
            session.opening(key, now)
        session.advance(now)
        assert [leg.key for leg in session.legs] == keys
    session.advance(now + OPEN_PATIENCE_S)
    assert [leg.key for leg in session.legs] != keys


def seconds_of_steps(*, push: bool) -> list[float | None]:
    world = World(3, spans=[(0, 2), (2, 4)], push=push)
    for count in (3, *[1] * 40):
        position = world.journal.end
        world.journal.add([[1]] * count)
        world.core.want(position)
        assert world.run_until_done() is None
        world.core.took(world.journal.end)
    assert {success.peer_id for success in world.core.successes} == {node.offer.peer_id for node in world.nodes}
    return [success.seconds for success in world.core.successes]


def test_what_a_step_says_of_one_node() -> None:
    found = seconds_of_steps(push=False)
    assert all(seconds is not None and 0 < seconds < 1 for seconds in found)
    together = seconds_of_steps(push=True)  # what several nodes took says nothing about one of them
    assert None in together

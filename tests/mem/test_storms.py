"""How long sessions pause when one node after another fails, under virtual time."""

from __future__ import annotations

import random
from collections.abc import Iterator
from unittest import mock

import pytest
import trio
from trio.testing import MockClock

from tests.bench.storm import pauses, percentile
from tests.mem.storms import Blow, storm_of

# What was done to whom, and when, in seconds from the last token, or from the beginning of a generation.
WHILE_RUNNING = {
    "killed, cut, cut, stopped": [
        Blow(at=-3.9, kind="kill", member="node-5"),
        Blow(at=0.0, kind="cut", member="node-4"),
        Blow(at=0.9, kind="cut", member="node-3"),
        Blow(at=4.7, kind="stop", member="node-1"),
        Blow(at=6.5, kind="kill", member="relay-1"),
    ],
    "left, killed, cut, stopped, stopped": [
        Blow(at=-8.7, kind="leave", member="node-2", lasts_s=8.0),
        Blow(at=-5.1, kind="kill", member="node-1", lasts_s=8.0),
        Blow(at=-0.3, kind="cut", member="node-5", lasts_s=4.0),
        Blow(at=0.0, kind="stop", member="node-0"),
        Blow(at=4.0, kind="stop", member="node-5"),
    ],
}
AT_THE_BEGINNING = {
    "cut, slow, slow, cut": [
        Blow(at=-4.3, kind="cut", member="node-4", lasts_s=8.0),
        Blow(at=-2.4, kind="slow", member="node-5", lasts_s=8.0),
        Blow(at=-0.8, kind="slow", member="node-0", lasts_s=8.0),
        Blow(at=2.3, kind="cut", member="node-2"),
    ],
    "killed, killed, cut, killed": [
        Blow(at=-9.0, kind="kill", member="node-5", lasts_s=8.0),
        Blow(at=-8.0, kind="kill", member="node-1", lasts_s=8.0),
        Blow(at=-1.7, kind="cut", member="node-3"),
        Blow(at=0.7, kind="kill", member="node-0"),
        Blow(at=1.0, kind="kill", member="relay-1"),
    ],
}


@pytest.fixture(autouse=True)
def same_again() -> Iterator[None]:
    """Every run of a seed is the same: also which of two tasks goes first."""
    random.seed(1)
    with (
        mock.patch("trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING", True),
        mock.patch("trio._core._run._r", random.Random(1)),
    ):
        yield


async def longest_pause(blows: list[Blow], *, running: bool) -> float:
    """Seconds, of a generation under way or of one that begins. The nodes that it hits are used while they are well."""
    async with storm_of(1) as (world, caller), trio.open_nursery() as nursery:
        world.prefer([blow.member for blow in blows if blow.member in world.nodes and blow.at > -5])
        await caller.generate(60, 20)  # so that something is known of nodes
        began = trio.current_time() + 10
        nursery.start_soon(world.follow, blows, began)
        if not running:
            await trio.sleep_until(began)
        await caller.generate(60, 300)
        nursery.cancel_scope.cancel()
        return max(gap.seconds for gap in caller.gaps)


@pytest.mark.parametrize(("name", "most_s"), list(zip(WHILE_RUNNING, [2.5, 1.2], strict=True)))
async def test_one_after_another_under_a_running_session(name: str, most_s: float, autojump_clock: MockClock) -> None:
    assert await longest_pause(WHILE_RUNNING[name], running=True) <= most_s


@pytest.mark.parametrize(("name", "most_s"), list(zip(AT_THE_BEGINNING, [1.3, 0.6], strict=True)))
async def test_one_after_another_before_a_first_token(name: str, most_s: float, autojump_clock: MockClock) -> None:
    assert await longest_pause(AT_THE_BEGINNING[name], running=False) <= most_s


GOAL_S = 5.0  # what is promised; these storms have 2.4 s, but tasks take turns in another order each time


@pytest.mark.parametrize("seed", range(2))
async def test_a_storm(seed: int, autojump_clock: MockClock) -> None:
    async with storm_of(seed) as (world, caller), trio.open_nursery() as nursery:
        nursery.start_soon(caller.run)
        await world.blow(per_minute=24, minutes=3)
        nursery.cancel_scope.cancel()
        found = [gap.seconds for gap in pauses(caller.gaps, world.storm.faults)]
        assert not caller.errors
        assert len(world.storm.faults) >= 60
        assert found
        assert percentile(found, 99) <= GOAL_S

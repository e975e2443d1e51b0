"""A small version of ``tests.bench.swarm``: the bars hold, and a seed replays."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.mem.simulation import Scenario, simulate

SHORT = Scenario(nodes=16, minutes=2.5, settle_s=20.0, churn=0.25, probe_s=20.0)


@pytest.mark.parametrize("seed", range(3))
def test_small_swarms_keep_their_promises(seed: int) -> None:
    outcome = simulate(seed, SHORT)
    assert outcome.finds >= 8
    assert outcome.expected >= 60
    assert outcome.found_share >= 0.999
    assert outcome.dead_gone_s <= 120
    assert (outcome.forged, outcome.older) == (0, 0)


def test_a_seed_replays() -> None:
    brief = Scenario(nodes=12, minutes=0.4, settle_s=20.0)
    one, same, other = (simulate(seed, brief) for seed in (7, 7, 8))
    assert one.trace == same.trace != other.trace


def test_a_seed_replays_in_another_process_with_other_hashes() -> None:
    program = (
        "from tests.mem.simulation import Scenario, simulate;"
        "print(simulate(7, Scenario(nodes=12, minutes=0.4, settle_s=20.0)).trace)"
    )
    traces = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert traces[0] == traces[1] != ""

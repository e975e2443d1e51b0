"""What is remembered of peers: who is avoided and for how long, what fades, what lasts on disk."""

from __future__ import annotations

import json
import logging
import math
import os
import random
import stat
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from net import reputation
from net.identity import PeerId
from net.reputation import FIRST_DELAY_S, HALF_LIFE_S, MAX_DELAY_S, MAX_PEERS, SAVE_EVERY_S, Reputation
from tests.unit.announcements import peer

ANNA, BERT = peer(1), peer(2)


class Clock:
    """Both clocks of a machine, moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.skew = 1.7e9

    def __call__(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now + self.skew


@pytest.fixture
def clock() -> Clock:
    return Clock()


def opened(path: Path | None, clock: Clock) -> Reputation:
    return Reputation(path, clock, wall_clock=clock.wall)


# Who is avoided


def test_a_peer_that_fails_is_avoided_for_twice_as_long_each_time(clock: Clock) -> None:
    known = opened(None, clock)
    assert ANNA not in known.avoided()
    delays = []
    for _ in range(14):
        known.failed(ANNA, "lost")
        delays.append(known.avoid_until(ANNA) - clock.now)
        assert ANNA in known.avoided()
        clock.now = known.avoid_until(ANNA) - 0.001
        assert ANNA in known.avoided()
        clock.now = known.avoid_until(ANNA)  # it is tried again, and fails
        assert ANNA not in known.avoided()
    assert delays[:6] == pytest.approx([1, 2, 4, 8, 16, 32])
    assert delays[-1] == MAX_DELAY_S
    assert BERT not in known.avoided()


def test_failures_at_the_same_time_count_once(clock: Clock) -> None:
    known = opened(None, clock)
    for _ in range(16):
        known.failed(ANNA, "lost")
    assert known.avoid_until(ANNA) == clock.now + FIRST_DELAY_S


def test_successes_forget(clock: Clock) -> None:
    known = opened(None, clock)
    for _ in range(4):  # 1, 2, 4, 8 s
        known.failed(ANNA, "lost")
        clock.now = known.avoid_until(ANNA)
    known.failed(ANNA, "lost")  # 16 s
    known.succeeded(ANNA)  # of another session, say
    assert ANNA not in known.avoided()
    known.failed(ANNA, "lost")
    assert known.avoid_until(ANNA) - clock.now == pytest.approx(16.0, rel=0.01)  # half of it, and doubled again
    for _ in range(5):
        known.succeeded(ANNA)
    known.failed(ANNA, "lost")
    assert known.avoid_until(ANNA) - clock.now == FIRST_DELAY_S


def test_time_forgets(clock: Clock) -> None:
    known = opened(None, clock)
    for _ in range(9):
        known.failed(ANNA, "lost")
        clock.now = known.avoid_until(ANNA)
    clock.now += 24 * HALF_LIFE_S
    known.failed(ANNA, "lost")
    assert known.avoid_until(ANNA) - clock.now == FIRST_DELAY_S


def test_those_who_are_avoided_are_known_with_what_they_did(clock: Clock) -> None:
    known = opened(None, clock)
    known.failed(ANNA, "no answer in 60 s")
    known.failed(BERT, "x" * 10_000)
    assert known.avoided() == {ANNA: "no answer in 60 s", BERT: "x" * reputation.MAX_REASON_CHARACTERS}
    clock.now += FIRST_DELAY_S
    assert known.avoided() == {}


# How often, how fast


def test_who_fails_often_is_likely_to_fail(clock: Clock) -> None:
    known = opened(None, clock)
    stranger = known.failure_chance(ANNA)
    assert 0.0 < stranger < 0.002
    for _ in range(1000):
        known.succeeded(ANNA)
    assert known.failure_chance(ANNA) < stranger
    known.failed(ANNA, "lost")
    assert known.failure_chance(ANNA) == pytest.approx(0.001, rel=0.1)
    known.failed(BERT, "lost")
    assert 0.05 < known.failure_chance(BERT) < 0.15
    clock.now += 20 * HALF_LIFE_S
    assert known.failure_chance(BERT) == pytest.approx(stranger, rel=0.01)


def test_what_is_new_counts_more(clock: Clock) -> None:
    known = opened(None, clock)
    for _ in range(100):
        known.succeeded(ANNA)
    clock.now += 3 * HALF_LIFE_S
    for _ in range(10):
        known.failed(ANNA, "lost")
    assert known.failure_chance(ANNA) == pytest.approx(10 / 32.5, rel=0.01)


def test_latencies(clock: Clock) -> None:
    known, some = opened(None, clock), random.Random(1)
    assert known.latency_s(ANNA, 0.5) is None
    for _ in range(3000):
        known.succeeded(ANNA, 5.0 if some.random() < 0.05 else some.uniform(0.09, 0.11))
    known.succeeded(ANNA)  # which says nothing about that
    middle, slow = known.latency_s(ANNA, 0.5), known.latency_s(ANNA, 0.99)
    assert middle == pytest.approx(0.1, rel=0.2)
    assert slow == pytest.approx(5.0, rel=0.2)
    for _ in range(2000):
        known.succeeded(ANNA, 0.2)
    assert known.latency_s(ANNA, 0.99) == pytest.approx(0.2, rel=0.2)


@pytest.mark.parametrize("latency_s", [-1.0, 0.0, 1e-9, 1e9, math.inf, math.nan])
def test_latencies_that_cannot_be_are_as_good_as_the_nearest_that_can(clock: Clock, latency_s: float) -> None:
    known = opened(None, clock)
    for _ in range(10):
        known.succeeded(ANNA, latency_s)
    found = known.latency_s(ANNA, 0.5)
    assert found is not None and 0 < found < 300


@given(st.lists(st.floats(1e-4, 200.0), min_size=8, max_size=100), st.floats(0.01, 1.0))
def test_a_quantile_is_near_the_true_one(latencies: list[float], quantile: float) -> None:
    clock = Clock()
    known = opened(None, clock)
    for latency_s in latencies:
        known.succeeded(ANNA, latency_s)
    found = known.latency_s(ANNA, quantile)
    if found is None:  # a little less than eight, since the first ones count less
        assert len(latencies) == 8
        return
    assert min(latencies) <= found * 1.001
    assert found <= max(latencies) * 1.2


def test_the_least_recently_seen_go_first(clock: Clock) -> None:
    known, some = opened(None, clock), random.Random(1)
    known.failed(ANNA, "lost")
    known.failed(BERT, "lost")
    for _ in range(MAX_PEERS - 1):
        known.succeeded(PeerId(some.randbytes(38)))
        known.succeeded(ANNA)
    assert len(known) == MAX_PEERS
    assert known.failure_chance(BERT) == known.failure_chance(peer(3))  # a stranger's


# On disk


def test_what_is_known_lasts(clock: Clock, tmp_path: Path) -> None:
    path = tmp_path / "new" / "peers.json"
    known = opened(path, clock)
    for _ in range(20):
        known.succeeded(ANNA, 0.3)
    for _ in range(3):
        clock.now = max(clock.now, known.avoid_until(BERT))
        known.failed(BERT, "lost")
    assert known.save()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(path.parent) == ["peers.json"]

    again = Clock()  # of another process
    again.now, again.skew = 5.0, clock.wall() - 5.0
    restored = opened(path, again)
    assert restored.failure_chance(ANNA) == pytest.approx(known.failure_chance(ANNA))
    assert restored.latency_s(ANNA, 0.5) == known.latency_s(ANNA, 0.5)
    assert restored.avoid_until(BERT) - again.now == pytest.approx(4.0, rel=0.01)
    assert restored.avoided() == {BERT: "lost"}


def test_time_goes_by_while_nobody_runs(clock: Clock, tmp_path: Path) -> None:
    path = tmp_path / "peers.json"
    known = opened(path, clock)
    for _ in range(100):
        known.failed(ANNA, "lost")
    known.save()
    clock.now += HALF_LIFE_S
    later = opened(path, clock)
    assert ANNA not in later.avoided()
    assert later.failure_chance(ANNA) == pytest.approx(known.failure_chance(ANNA)) == pytest.approx(50 / 60, rel=0.01)


@pytest.mark.parametrize("skew_s", [-1e9, 1e9])
def test_a_clock_that_was_set_wrongly_does_no_harm(clock: Clock, tmp_path: Path, skew_s: float) -> None:
    path = tmp_path / "peers.json"
    known = opened(path, clock)
    known.failed(ANNA, "lost")
    known.save()
    clock.skew += skew_s
    later = opened(path, clock)
    assert later.avoid_until(ANNA) <= clock.now + FIRST_DELAY_S
    assert (ANNA in later.avoided()) == (skew_s < 0)
    assert later.failure_chance(ANNA) <= known.failure_chance(ANNA)


def test_it_is_not_written_more_often_than_need_be(clock: Clock, tmp_path: Path) -> None:
    known = opened(tmp_path / "peers.json", clock)
    assert not known.save()  # nothing
    known.failed(ANNA, "lost")
    assert known.save()
    known.failed(ANNA, "lost")
    assert not known.save()
    assert known.save(at_once=True)
    clock.now += SAVE_EVERY_S
    assert not known.save()  # nothing new
    known.succeeded(ANNA)
    assert known.save()
    assert not opened(None, clock).save(at_once=True)


def good(path: Path, clock: Clock) -> dict[str, Any]:
    known = opened(path, clock)
    known.succeeded(ANNA, 0.1)
    known.failed(BERT, "lost")
    known.save(at_once=True)
    content: dict[str, Any] = json.loads(path.read_text())
    return content


@pytest.mark.parametrize(
    "change",
    [
        {"successes": -1.0},
        {"successes": math.nan},
        {"successes": math.inf},
        {"failures": "3"},
        {"failures": True},
        {"failures": 10**400},
        {"delay_s": 1e6},
        {"avoided_s": 1e6},
        {"age_s": -1.0},
        {"reason": 3},
        {"reason": "x" * 201},
        {"latencies": []},
        {"latencies": {"84": 1.0}},
        {"latencies": {"-1": 1.0}},
        {"latencies": {"³": 1.0}},
        {"latencies": {"1": None}},
    ],
)
def test_an_entry_out_of_bounds_is_damage(
    clock: Clock, tmp_path: Path, change: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "peers.json"
    content = good(path, clock)
    content["peers"][BERT.to_base58()].update(change)
    path.write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING):
        known = opened(path, clock)
    assert len(known) == 0
    assert "damaged" in caplog.text
    assert sorted(os.listdir(tmp_path)) == ["peers.json.damaged"]
    known.succeeded(ANNA)
    assert known.save()
    assert len(opened(path, clock)) == 1


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"version": 1, "saved_at": 1.0, "peers": []}',
        b'{"version": 2, "saved_at": 1.0, "peers": {}}',
        b'{"version": 1, "saved_at": "now", "peers": {}}',
        b'{"version": 1, "saved_at": NaN, "peers": {}}',
        b'{"version": 1, "saved_at": 1.0, "peers": {"0OIl": {}}}',
        b'{"version": 1, "saved_at": 1.0, "peers": {"QmYyQ": 7}}',
        b'{"version": 1, "saved_at": 1.0}',
        b" " * (reputation.MAX_FILE_BYTES + 1),
    ],
    ids=lambda damage: repr(damage[:60]),
)
def test_a_damaged_file_is_set_aside(clock: Clock, tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "peers.json"
    path.write_bytes(damage)
    assert len(opened(path, clock)) == 0
    assert (tmp_path / "peers.json.damaged").read_bytes() == damage


@given(st.binary(max_size=60), st.data())
def test_bytes_that_are_changed_anywhere_are_never_an_error(changed: bytes, data: st.DataObject) -> None:
    clock = Clock()
    known = opened(None, clock)
    known.succeeded(ANNA, 0.1)
    known.failed(BERT, "lost")
    content = known._snapshot().spell().encode()
    at = data.draw(st.integers(0, len(content)))
    try:
        known._read(content[:at] + changed + content[at + len(changed) :])
    except (ValueError, TypeError, KeyError, RecursionError):
        pass


def test_a_disk_that_takes_nothing_is_a_warning(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "peers.json"
    good(path, clock)
    before = path.read_bytes()

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    known = opened(path, clock)
    known.failed(ANNA, "lost")
    monkeypatch.setattr(os, "fsync", full)
    assert not known.save(at_once=True)
    assert "cannot be kept" in caplog.text
    known.failed(ANNA, "lost")
    assert not known.save(at_once=True)
    assert caplog.text.count("cannot be kept") == 1
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["peers.json"]


def test_a_folder_in_its_place_is_a_warning(clock: Clock, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    known = opened(tmp_path, clock)
    assert "cannot be read" in caplog.text
    known.failed(ANNA, "lost")
    assert ANNA in known.avoided()


async def test_the_service_keeps_it_now_and_then_and_at_the_end(tmp_path: Path) -> None:
    path, clock = tmp_path / "peers.json", Clock()
    known = opened(path, clock)
    async with trio.open_nursery() as nursery:
        await nursery.start(known.run)
        known.failed(ANNA, "lost")
        assert not path.exists()
        nursery.cancel_scope.cancel()
    assert set(opened(path, clock).avoided()) == {ANNA}


async def test_the_service_writes_what_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, clock = tmp_path / "peers.json", Clock()
    known = opened(path, clock)
    waits: list[float] = []
    ticks, again = trio.open_memory_channel[None](0)

    async def tick(seconds: float) -> None:
        waits.append(seconds)
        await again.receive()

    monkeypatch.setattr(trio, "sleep", tick)
    async with trio.open_nursery() as nursery:
        await nursery.start(known.run)
        await ticks.send(None)
        await trio.testing.wait_all_tasks_blocked()
        assert not path.exists()  # nothing has changed
        known.failed(ANNA, "lost")
        await ticks.send(None)
        with trio.fail_after(10):
            while len(waits) < 3:
                await trio.lowlevel.checkpoint()
        assert set(opened(path, clock).avoided()) == {ANNA}
        nursery.cancel_scope.cancel()

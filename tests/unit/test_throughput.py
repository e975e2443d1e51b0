"""What a node is worth: measured once a day, and announced anew when it has changed for good."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from compute.throughput import (
    FACTOR,
    MAX_AGE_S,
    MIN_VALUES,
    NEAR,
    PATIENCE_S,
    Configuration,
    Drift,
    Throughput,
    effective_tokens_per_s,
    throughput,
)

NODE = Configuration(model="d" * 64, blocks=3, linear="fp16", threads=None)
FAST = Throughput(decode_tokens_per_s=50.0, prefill_tokens_per_s=400.0, network_bytes_per_s=1e6)


class Meter:
    """Measures what it is told, and counts."""

    def __init__(self, outcome: Throughput = FAST) -> None:
        self.outcome = outcome
        self.times = 0

    async def __call__(self) -> Throughput:
        await trio.lowlevel.checkpoint()
        self.times += 1
        return self.outcome


# What is announced


def test_a_token_comes_in_and_goes_out() -> None:
    assert effective_tokens_per_s(50.0, 8 * 1024 * 20.0, 1024) == 20.0
    assert effective_tokens_per_s(50.0, 8 * 1024 * 80.0, 1024) == 50.0
    assert effective_tokens_per_s(50.0, None, 1024) == 50.0
    assert FAST.effective_tokens_per_s(14336) == pytest.approx(1e6 / (8 * 14336))
    assert FAST.effective_tokens_per_s(14336, 2) == pytest.approx(1e6 / (4 * 14336))
    with pytest.raises(ValueError, match="hidden_size is 0"):
        effective_tokens_per_s(50.0, None, 0)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
@pytest.mark.parametrize("name", ["decode_tokens_per_s", "prefill_tokens_per_s", "network_bytes_per_s"])
def test_what_is_no_speed_is_none(name: str, bad: float) -> None:
    with pytest.raises(ValueError, match=name):
        replace(FAST, **{name: bad})


# What is kept


def files(folder: Path) -> list[Path]:
    return list(folder.iterdir())


async def test_it_is_measured_once_a_day(tmp_path: Path) -> None:
    meter = Meter()
    for now, times in ((1e9, 1), (1e9 + MAX_AGE_S, 1), (1e9 + MAX_AGE_S + 1, 2), (1e9, 3), (1e9 + 60, 3)):
        assert await throughput(NODE, tmp_path / "new", meter, clock=partial(float, now)) == FAST
        assert meter.times == times
    assert await throughput(NODE, tmp_path / "new", meter, clock=lambda: 1e9 + 120, max_age_s=60) == FAST
    assert meter.times == 4
    assert len(files(tmp_path / "new")) == 1


@pytest.mark.parametrize(
    "other",
    [
        replace(NODE, model="e" * 64),
        replace(NODE, blocks=4),
        replace(NODE, linear="fp32"),
        replace(NODE, threads=1),
    ],
)
async def test_each_configuration_has_its_own(tmp_path: Path, other: Configuration) -> None:
    meter = Meter()
    await throughput(NODE, tmp_path, meter)
    await throughput(other, tmp_path, meter)
    await throughput(NODE, tmp_path, meter)
    assert meter.times == 2


async def test_without_the_network_or_a_folder_nothing_is_kept(tmp_path: Path) -> None:
    meter = Meter(replace(FAST, network_bytes_per_s=None))
    assert await throughput(NODE, tmp_path, meter) == meter.outcome
    assert files(tmp_path) == []
    assert await throughput(NODE, None, meter) == meter.outcome
    (tmp_path / "file").write_text("")
    assert await throughput(NODE, tmp_path / "file", Meter()) == FAST  # a folder that cannot be written


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        {"key": "another"},
        {"measured_at": None},
        {"measured_at": "now"},
        {"decode_tokens_per_s": 0.0},
        {"decode_tokens_per_s": math.inf},
        {"prefill_tokens_per_s": "fast"},
        {"network_bytes_per_s": None},
        {"network_bytes_per_s": math.nan},
    ],
)
async def test_a_damaged_outcome_is_measured_anew(tmp_path: Path, content: str | dict[str, object]) -> None:
    meter = Meter()
    await throughput(NODE, tmp_path, meter)
    (path,) = files(tmp_path)
    good = json.loads(path.read_text())
    path.write_text(content if isinstance(content, str) else json.dumps({**good, **content}))
    assert await throughput(NODE, tmp_path, meter) == FAST
    assert meter.times == 2
    assert json.loads(path.read_text()).keys() == good.keys()


async def test_a_measurement_that_fails_or_is_cancelled_keeps_nothing(tmp_path: Path) -> None:
    async def fails() -> Throughput:
        raise RuntimeError("no kernel")

    began = trio.Event()

    async def never() -> Throughput:
        began.set()
        await trio.sleep_forever()
        raise AssertionError

    with pytest.raises(RuntimeError, match="no kernel"):
        await throughput(NODE, tmp_path, fails)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(throughput, NODE, tmp_path, never)
        await began.wait()
        nursery.cancel_scope.cancel()
    assert files(tmp_path) == []


# Drift


def watch(drift: Drift, values: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """(when, what) was announced, of (when, what) was measured."""
    return [(now, anew) for now, value in values if (anew := drift.observe(value, now)) is not None]


def every(step_s: float, until: float, value: Callable[[float], float]) -> Iterable[tuple[float, float]]:
    return ((step * step_s, value(step * step_s)) for step in range(1, int(until / step_s) + 1))


@pytest.mark.parametrize("step_s", [0.01, 1.0, 10.0, 30.0])
@pytest.mark.parametrize("ratio", [1 / 8, 0.7, 1.4, 8.0])
def test_a_change_that_lasts_is_announced_once(ratio: float, step_s: float) -> None:
    drift = Drift(100.0, 0.0)
    [(when, anew)] = watch(drift, every(step_s, 1000.0, lambda _: 100.0 * ratio))
    assert PATIENCE_S <= when <= PATIENCE_S + max(60.0, 20 * step_s)
    assert anew == drift.announced == pytest.approx(100.0 * ratio, rel=NEAR - 1)


@pytest.mark.parametrize("ratio", [1 / 1.29, 1 / 1.2, 1.0, 1.2, 1.29])
def test_a_small_one_is_not(ratio: float) -> None:
    assert watch(Drift(100.0, 0.0), every(1.0, 10_000.0, lambda _: 100.0 * ratio)) == []


@pytest.mark.parametrize("step_s", [0.1, 1.0, 30.0, 3600.0])
@pytest.mark.parametrize("outlier", [1e-9, 1e9])
def test_an_outlier_now_and_then_is_none(outlier: float, step_s: float) -> None:
    values = every(step_s, 200 * step_s, lambda now: outlier if round(now / step_s) % 20 == 0 else 100.0)
    assert watch(Drift(100.0, 0.0), values) == []


def test_one_outlier_and_then_silence_is_none() -> None:
    drift = Drift(100.0, 0.0)
    assert watch(drift, [(1000.0, 1e9), (9000.0, 100.0), (9001.0, 100.0)]) == []


def test_few_values_are_not_enough_however_long_they_take() -> None:
    drift = Drift(100.0, 0.0)
    values = [(3600.0 * hour, 300.0) for hour in range(1, 20)]
    [(when, _)] = watch(drift, values)
    assert when >= 3600.0 * MIN_VALUES


def test_a_change_that_goes_away_is_none() -> None:
    def burst(now: float) -> float:
        return 30.0 if now % 300.0 < 50.0 else 100.0

    assert watch(Drift(100.0, 0.0), every(1.0, 3000.0, burst)) == []


def test_a_change_is_seen_through_values_that_have_not_changed() -> None:
    values = every(60.0, 3600.0, lambda now: 100.0 if now % 300.0 == 0.0 else 160.0)
    [(_, anew)] = watch(Drift(100.0, 0.0), values)
    assert 130.0 < anew < 160.0


def test_what_lies_between_near_and_far_changes_nothing() -> None:
    """A change goes on while values come back a little, and none begins there."""
    between = math.sqrt(NEAR * FACTOR)
    drift = Drift(100.0, 0.0)
    assert watch(drift, every(1.0, 500.0, lambda _: 100.0 * between)) == []
    drift = Drift(100.0, 0.0)
    [(_, anew)] = watch(drift, every(1.0, 100.0, lambda now: 100.0 * (1.5 if now < 40.0 else between)))
    assert 100.0 * NEAR < anew < 100.0 * FACTOR


def test_there_is_no_way_back_within_the_factor() -> None:
    drift = Drift(100.0, 0.0)
    assert len(watch(drift, every(1.0, 200.0, lambda _: 140.0))) == 1
    assert watch(drift, ((200.0 + now, value) for now, value in every(1.0, 500.0, lambda _: 112.0))) == []


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32), st.floats(0.05, 20.0))
def test_noise_is_no_change(seed: int, step_s: float) -> None:
    rng = random.Random(seed)
    noise = every(step_s, 500 * step_s, lambda _: 100.0 * rng.uniform(0.8, 1.25))
    assert watch(Drift(100.0, 0.0), noise) == []


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.floats(0.0, 100.0), st.floats(1e-6, 1e6)), max_size=300))
def test_it_speaks_seldom_and_only_of_what_has_changed(steps: list[tuple[float, float]]) -> None:
    """Whatever is measured: at most once in its patience, and never of what is as near as that."""
    drift = Drift(1.0, 0.0)
    now, before, spoke_at = 0.0, 1.0, 0.0
    for pause_s, value in steps:
        now += pause_s
        anew = drift.observe(value, now)
        if anew is not None:
            assert now - spoke_at >= PATIENCE_S
            assert not 1 / NEAR <= anew / before <= NEAR
            before, spoke_at = anew, now


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_what_is_no_speed_does_not_drift(bad: float) -> None:
    with pytest.raises(ValueError, match="expected a positive number"):
        Drift(bad, 0.0)
    with pytest.raises(ValueError, match="expected a positive number"):
        Drift(1.0, 0.0).observe(bad, 1.0)

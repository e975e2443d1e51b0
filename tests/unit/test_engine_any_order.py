"""Peers that open, step, go back, fail, leave, cancel and sleep, in any order and at once, on a real engine.

What the engine gives is compared, bit for bit, with the same steps on a cache of the session's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from trio.testing import MockClock

from compute.cache import KVCache
from compute.engine import Engine, EngineSettings
from compute.errors import BadInput, BadOutput, EngineBusy, OutOfCache
from compute.tuning import ServedTuning
from tests.unit.engines import hidden_states, make_span, running
from tests.unit.tunings import BOTH, make_tuning

LENGTH = 128
CHUNK = 20
SPAN = make_span()
TUNINGS = [make_tuning(BOTH), make_tuning(BOTH, seed=1), None]
SERVED = [None if each is None else ServedTuning(each, SPAN) for each in TUNINGS]
SETTINGS = EngineSettings(
    cache_tokens=512, max_length_tokens=LENGTH, max_sessions=8, max_sessions_per_peer=5, chunk_tokens=CHUNK,
    lease_s=10, keep_s=30,
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Model:
    """What a session should have."""

    rows: int
    pads: Tensor | None = None
    tuning: ServedTuning | None = None
    length: int = 0
    cache: KVCache = field(init=False)

    def __post_init__(self) -> None:
        self.cache = KVCache.alone(SPAN, self.rows, LENGTH, self.pads)

    def step(self, hidden: Tensor, position: int, order: list[int] | None) -> Tensor:
        if order is not None:
            old, pads = self.cache, None if self.cache.pads is None else self.cache.pads[order]
            self.cache = KVCache.alone(SPAN, self.rows, LENGTH, pads)
            self.cache.own.copy(old.own, 0, 0, position, torch.tensor(order))
        elif not position:
            self.cache.pads = self.pads
        tokens = hidden.shape[1]
        chunk = tokens if self.rows * tokens <= 32 else max(1, CHUNK // self.rows)
        outputs = [
            SPAN(hidden[:, start : start + chunk], self.cache, position + start, tuning=self.tuning)
            for start in range(0, tokens, chunk)
        ]
        self.length = position + tokens
        return torch.cat(outputs, dim=1)


@dataclass(frozen=True)
class Open:
    peer: str
    rows: int
    is_padded: bool
    tuning: int  # of those that there are; the last is none


@dataclass(frozen=True)
class Step:
    which: int  # of the open sessions
    back: int  # tokens
    tokens: int
    seed: int  # few of them, so that sessions begin alike
    trouble: str
    mixes: bool
    every_block: bool


@dataclass(frozen=True)
class Close:
    which: int


@dataclass(frozen=True)
class Wait:
    seconds: float


OPENS = st.builds(
    Open,
    peer=st.sampled_from(["hog", "hog", "a", "b"]),
    rows=st.integers(1, 2),
    is_padded=st.booleans(),
    tuning=st.sampled_from([0, 1, -1, -1]),
)
STEPS = st.builds(
    Step,
    which=st.integers(0, 7),
    back=st.sampled_from([0, 0, 0, 1, 5, 200]),
    tokens=st.sampled_from([1, 1, 1, 2, 9, 40, 70, 100]),
    seed=st.integers(0, 2),
    trouble=st.sampled_from(["", "", "", "", "nan-in", "nan-out", "cancel"]),
    mixes=st.booleans(),
    every_block=st.sampled_from([False, False, True]),
)
OTHERS = st.one_of(st.builds(Close, which=st.integers(0, 7)), st.builds(Wait, seconds=st.sampled_from([0.3, 6, 12])))
ROUNDS = st.lists(st.lists(st.one_of(OPENS, STEPS, STEPS, STEPS, OTHERS), min_size=1, max_size=6), max_size=8)


class World:
    def __init__(self, engine: Engine, clock: MockClock) -> None:
        self.engine = engine
        self.clock = clock
        self.models: dict[int, Model] = {}
        self.cancelled: dict[int, set[int]] = {}  # lengths that it may have

    async def open(self, what: Open) -> None:
        pads = [5, 21][: what.rows] if what.is_padded else None
        try:
            key = await self.engine.open_session(
                batch=what.rows, max_length=LENGTH, peer=what.peer, pads=pads, tuning=TUNINGS[what.tuning]
            )
        except EngineBusy as refused:
            assert refused.retry_after_s > 0
        else:
            self.models[key] = Model(what.rows, None if pads is None else torch.tensor(pads), SERVED[what.tuning])

    async def step(self, key: int, what: Step) -> None:
        model = self.models[key]
        position = max(0, model.length - what.back)
        tokens = min(what.tokens, LENGTH - position)
        if not tokens:
            return
        order = [model.rows - 1] * model.rows if what.mixes and position else None
        hidden = hidden_states(model.rows, tokens, what.seed)
        if what.trouble == "nan-in":
            hidden[-1, tokens // 2, 3] = float("nan")
        elif what.trouble == "nan-out":
            hidden *= 1e38
        before = model.length
        try:
            with trio.CancelScope() as scope:
                if what.trouble == "cancel":
                    scope.cancel()
                output = await self.engine.step(key, hidden, position, order, every_block=what.every_block)
        except (BadInput, BadOutput) as error:
            assert error.code in ("no-session", "not-finite", "bad-output")
            assert error.code == "no-session" or what.trouble
            del self.models[key]
            return
        except OutOfCache as refused:
            assert 0 < refused.retry_after_s <= 60
            assert self.engine.session_length(key) == before
            return
        if scope.cancelled_caught:  # it waited, and was taken out, or it runs, and will be rolled back
            self.cancelled[key] = {before, position, 0 if order is not None else position}
            return
        assert not what.trouble or what.trouble == "cancel"
        with torch.inference_mode():
            assert torch.equal(output[-1] if what.every_block else output, model.step(hidden, position, order))

    async def round(self, operations: list[Any]) -> None:
        keys = sorted(self.models)
        free = list(keys)
        async with trio.open_nursery() as nursery:
            for what in operations:
                if isinstance(what, Open):
                    nursery.start_soon(self.open, what)
                elif isinstance(what, Wait):
                    self.clock.jump(what.seconds)
                elif keys and (key := keys[what.which % len(keys)]) in free:
                    free.remove(key)
                    if isinstance(what, Step):
                        nursery.start_soon(self.step, key, what)
                    else:
                        del self.models[key]
                        nursery.start_soon(self.engine.close_session, key)
        await self.engine.measure(1)  # the thread is through with steps that nobody waits for
        self.check()

    def check(self) -> None:
        engine = self.engine
        for key, lengths in self.cancelled.items():
            if key in engine._sessions and key in self.models:
                assert engine.session_length(key) in lengths
                self.models[key].length = engine.session_length(key)
        self.cancelled.clear()
        stats = engine.stats
        assert stats.waiting == 0
        assert stats.sessions == engine._slots.sessions() <= 8
        assert stats.cache_used_tokens <= 512
        for key in [key for key in self.models if key not in engine._sessions]:
            del self.models[key]  # ended for others' sake, or because nobody used it
        for key, model in self.models.items():
            assert engine.session_length(key) == model.length


async def scenario(rounds: list[list[Any]], clock: MockClock) -> None:
    async with running(SPAN, SETTINGS) as engine:
        world = World(engine, clock)
        for operations in rounds:
            await world.round(operations)
        for key in list(engine._sessions):
            await engine.close_session(key)
        assert (engine.stats.sessions, engine.stats.cache_used_tokens, len(engine._scheduler)) == (0, 0, 0)
        await engine.measure(1)  # the thread is through with what came before
        await engine.measure(1)
        assert not engine._runner._memory
        assert not engine._closing
        assert not engine._tunings() and not engine._making


@settings(max_examples=60, deadline=None)
@given(rounds=ROUNDS)
def test_any_order(rounds: list[list[Any]]) -> None:
    clock = MockClock()
    trio.run(scenario, rounds, clock, clock=clock)


async def test_an_honest_session_is_admitted_within_a_second_beside_a_hog() -> None:
    """The hog fills the cache, always has steps under way, and comes back whenever a session of its is ended."""
    options = EngineSettings(cache_tokens=1024, max_length_tokens=LENGTH)

    async def hog(engine: Engine) -> None:
        while True:
            try:
                key = await engine.open_session(batch=1, max_length=LENGTH, peer="hog")
                await engine.step(key, hidden_states(1, 100), 0)
                while True:
                    await engine.step(key, hidden_states(1, 1), 100)
            except (BadInput, OutOfCache, EngineBusy):
                await trio.sleep(0.01)

    async with running(SPAN, options) as engine, trio.open_nursery() as nursery:
        for _ in range(12):
            nursery.start_soon(hog, engine)
        with trio.fail_after(20):
            while engine.stats.cache_used_tokens < 1024 - LENGTH:
                await engine.measure(1)
        for peer in ("a", "b"):
            waited_s = 0.0  # as it was told to, whatever else this machine does
            key = await engine.open_session(batch=1, max_length=LENGTH, peer=peer)
            while True:
                try:
                    await engine.step(key, hidden_states(1, 100), 0)
                    break
                except OutOfCache as refused:
                    waited_s += refused.retry_after_s
                    await trio.sleep(refused.retry_after_s)
            assert waited_s <= 1.0
            for position in range(100, 110):
                await engine.step(key, hidden_states(1, 1), position)
        nursery.cancel_scope.cancel()

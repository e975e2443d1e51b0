"""Rows that begin with padding give what they give without it, and nobody else notices."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compute.bloom import Step
from compute.cache import KVCache
from compute.engine import Engine, EngineSettings
from compute.errors import BadInput
from tests.unit.engines import GatedSpan, hidden_states, make_span, running
from tests.unit.fake_gpus import FIRST, SECOND, fake_gpus, on_gpus

SPAN = make_span()


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


class Talk:
    """A session of rows with padding, its steps, and in which order rows go on."""

    def __init__(self, pads: list[int], start: int, cuts: list[int], mixes: bool, goes_back: bool, seed: int) -> None:
        self.pads, self.start, self.mixes, self.goes_back = pads, start, mixes, goes_back
        prompt = max(pads) + 1 + cuts[0]
        self.cuts = list(itertools.accumulate([prompt, *cuts[1:]]))
        self.hidden = hidden_states(len(pads), self.cuts[-1], seed=seed)

    async def hold(self, engine: Engine) -> None:
        rows, length = len(self.pads), self.cuts[-1]
        span = SPAN.part(self.start, 3)
        session = await engine.open_session(batch=rows, max_length=length, start=self.start, pads=self.pads)
        histories = [self.hidden[row, pad : pad + 0] for row, pad in enumerate(self.pads)]  # [t, d] each
        pads = self.pads
        for start, end in itertools.pairwise([0, *self.cuts]):
            new = self.hidden[:, start:end]
            order = [(row * 2 + 1) % rows for row in range(rows)] if self.mixes and start else None
            if order is not None:
                histories, pads = [histories[old] for old in order], [pads[old] for old in order]
            elif self.goes_back and start:
                await engine.step(session, -new, start)
            given = await engine.step(session, new, start, order)
            assert bool(torch.isfinite(given).all())
            for row, pad in enumerate(pads):
                histories[row] = torch.cat([histories[row], new[row, max(0, pad - start) :]])
                alone = span(histories[row][None])[0]  # [t, d]
                shown = min(end - pad, end - start)
                close(given[row, -shown:], alone[-shown:])


TALKS = st.lists(
    st.builds(
        Talk,
        pads=st.lists(st.sampled_from([0, 0, 1, 3, 29, 45, 70]), min_size=1, max_size=4),
        start=st.integers(0, 2),
        cuts=st.lists(st.sampled_from([1, 2, 8, 40]), min_size=1, max_size=4),
        mixes=st.booleans(),
        goes_back=st.booleans(),
        seed=st.integers(0, 3),
    ),
    min_size=1,
    max_size=3,
)


async def scenario(talks: list[Talk], chunk_tokens: int) -> None:
    async with running(SPAN, EngineSettings(chunk_tokens=chunk_tokens)) as engine, trio.open_nursery() as nursery:
        for talk in talks:
            nursery.start_soon(talk.hold, engine)


@settings(max_examples=40, deadline=None)
@given(talks=TALKS, chunk_tokens=st.sampled_from([30, 256]))
def test_a_row_gives_what_it_gives_without_padding(talks: list[Talk], chunk_tokens: int) -> None:
    trio.run(scenario, talks, chunk_tokens)


async def test_padding_of_nothing_changes_no_bit_and_shares_prefixes() -> None:
    hidden = hidden_states(2, 90)
    async with running(SPAN, EngineSettings(chunk_tokens=40)) as engine:
        plain = await engine.open_session(batch=2, max_length=90)
        other = await engine.open_session(batch=2, max_length=90, pads=[0, 0])
        assert torch.equal(await engine.step(plain, hidden, 0), await engine.step(other, hidden, 0))
        assert engine._slots.place(other).shared == 80


async def test_prefixes_are_shared_among_those_with_the_same_padding() -> None:
    hidden = hidden_states(2, 100)
    given: dict[str, Tensor] = {}
    async with running(SPAN, EngineSettings(chunk_tokens=40)) as engine:
        for name, pads, shared in [
            ("none", None, 0),
            ("one", [0, 30], 0),
            ("two", [30, 0], 0),
            ("again", [0, 30], 100),
        ]:
            session = await engine.open_session(batch=2, max_length=110, pads=pads)
            given[name] = await engine.step(session, hidden, 0)
            given[name + "+"] = await engine.step(session, hidden[:, :1], 100)
            assert engine._slots.place(session).shared == shared
    assert torch.equal(given["one"], given["again"])
    assert torch.equal(given["one+"], given["again+"])
    assert not torch.equal(given["one"][1, 40:], given["none"][1, 40:])
    assert torch.equal(given["one"][0], given["none"][0])  # rows are independent


async def test_who_begins_anew_begins_with_the_padding_of_the_beginning() -> None:
    """Rows have changed places; after a failure in such a step, and at position 0, they are where they were first."""
    hidden = hidden_states(2, 12)
    gated = GatedSpan(SPAN)
    gated.gate.set()
    async with running(gated) as engine:
        session = await engine.open_session(batch=2, max_length=12, pads=[0, 5])
        first = await engine.step(session, hidden[:, :10], 0)
        await engine.step(session, hidden[:, 10:11], 10, [1, 0])
        moved = await engine.step(session, hidden[:, 11:], 11)
        assert torch.equal(await engine.step(session, hidden[:, :10], 0), first)
        await engine.step(session, hidden[:, 10:11], 10, [1, 0])
        assert torch.equal(await engine.step(session, hidden[:, 11:], 11), moved)
        gated.gate.clear()
        while gated.entered.acquire(blocking=False):
            pass
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.step, session, hidden[:, 10:11], 10, [1, 0])
            await gated.wait_entered()
            nursery.cancel_scope.cancel()
        gated.gate.set()
        assert torch.equal(await engine.step(session, hidden[:, :10], 0), first)


@pytest.mark.parametrize(
    "pads", [[0], [0, 0, 0], [0, -1], [0, 8], [0, 1.0], [0, True], [0, None], 3, "00", {0: 1, 1: 1}, [[0], [0]]]
)
async def test_what_is_no_padding_is_refused_before_anything_is_taken(pads: Any) -> None:
    async with running(SPAN, EngineSettings(max_sessions=1)) as engine:
        with pytest.raises(BadInput) as caught:
            await engine.open_session(batch=2, max_length=8, pads=pads)
        assert caught.value.code == "bad-value"
        assert engine.stats.sessions == 0
        await engine.open_session(batch=2, max_length=8, pads=[7, 0])


async def test_a_row_of_padding_alone_stays_finite_and_the_others_as_they_are() -> None:
    hidden = hidden_states(2, 40)
    async with running(SPAN) as engine:
        session = await engine.open_session(batch=2, max_length=50, pads=[0, 49])
        given = await engine.step(session, hidden * torch.tensor([1.0, 1e3])[:, None, None], 0)
    assert bool(torch.isfinite(given).all())
    close(given[:1], SPAN(hidden[:1]))


@torch.inference_mode()
def test_padding_is_wherever_a_block_is() -> None:
    with fake_gpus():
        one = make_span(linear=None)
        several = on_gpus(one, (FIRST, SECOND, SECOND))
        outputs = []
        for span in (one, several):
            cache = KVCache.alone(span, 2, 64, torch.tensor([0, 7]))
            hidden = hidden_states(2, 21).to(span.device)
            before = span(hidden[:, :20], cache)
            (after,) = span.steps([Step(hidden[:, 20:], cache, 20)])
            outputs.append(torch.cat([before.cpu(), after.cpu()], dim=1))
        assert torch.equal(*outputs)

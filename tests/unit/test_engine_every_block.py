"""What every block gives: beside other sessions, in parts, over several devices, and when something is wrong."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import trio
import trio.testing
from torch import Tensor

from compute.batch import Piece, Plan, Runner, Work
from compute.bloom import BloomSpan, SpanCache
from compute.bloom.tuned import Tuning
from compute.engine import EngineSettings
from compute.errors import BadInput, BadOutput
from compute.estimates import Kind
from compute.slots import Change, Place, Slot
from tests.unit.engines import CONFIG, GatedSpan, hidden_states, make_span, running
from tests.unit.fake_gpus import FIRST, SECOND, fake_gpus, on_gpus


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def expected(span: BloomSpan, hidden: Tensor) -> Tensor:
    """[n, b, t, d]"""
    states = []
    for index in range(len(span)):
        hidden = span(hidden, None, 0, index, index + 1)
        states.append(hidden)
    return torch.stack(states)


async def test_beside_other_sessions_it_runs_alone() -> None:
    span, hidden = GatedSpan(make_span()), hidden_states(1, 5)
    states: list[Tensor] = []
    async with running(span) as engine:
        first, second, third, asked = [await engine.open_session(batch=1, max_length=8, peer=peer) for peer in "abcd"]

        async def ask() -> None:
            states.append(await engine.step(asked, hidden, 0, every_block=True))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.step, first, hidden, 0)
            await span.wait_entered()
            nursery.start_soon(engine.step, second, hidden, 0)
            nursery.start_soon(ask)
            nursery.start_soon(engine.step, third, hidden, 0)
            await trio.testing.wait_all_tasks_blocked()
            span.gate.set()
        assert sorted(span.batches) == [1, 1, 1, 1, 2]  # the first one, three blocks, the other two
    torch.testing.assert_close(states[0], expected(make_span(), hidden), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [5, 70])
async def test_of_a_part_of_the_span_in_the_dtype_of_the_request(tokens: int, dtype: torch.dtype) -> None:
    span, hidden = make_span(), hidden_states(2, tokens).to(dtype)
    async with running(span, EngineSettings(chunk_tokens=40)) as engine:
        sessions = [await engine.open_session(batch=2, max_length=70, start=1) for _ in range(2)]
        states = await engine.step(sessions[0], hidden, 0, every_block=True)
        assert (states.shape, states.dtype) == ((2, 2, tokens, CONFIG.hidden_size), dtype)
        assert torch.equal(states[-1], await engine.step(sessions[1], hidden, 0))
    near = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(states.float(), expected(span.part(1, 3), hidden.float()), rtol=near, atol=near)


async def test_prompts_share_no_prefix_with_others() -> None:
    hidden = hidden_states(1, 100)
    async with running(make_span(), EngineSettings(chunk_tokens=40)) as engine:
        for every_block, shared in ((True, 0), (False, 0), (True, 0), (False, 80)):
            session = await engine.open_session(batch=1, max_length=100)
            given = await engine.step(session, hidden, 0, every_block=every_block)
            assert engine._slots.place(session).shared == shared
            if every_block:
                torch.testing.assert_close(given, expected(make_span(), hidden), rtol=1e-5, atol=1e-5)


async def test_more_than_a_training_step_gives_is_refused() -> None:
    settings = EngineSettings(max_batch=2, max_length_tokens=12)
    async with running(make_span(), settings) as engine:
        session = await engine.open_session(batch=2, max_length=12)
        await engine.step(session, hidden_states(2, 4), 0, every_block=True)
        with pytest.raises(BadInput, match="10 tokens after 3 blocks") as caught:
            await engine.step(session, hidden_states(2, 5), 4, every_block=True)
        assert caught.value.code == "too-long"
        await engine.step(session, hidden_states(2, 5), 4)


@pytest.mark.parametrize("tokens", [2, 60])
async def test_values_on_the_way_are_looked_at(tokens: int) -> None:
    class Astray(BloomSpan):
        """Its second block gives infinity, which the third one takes away again."""

        def forward(
            self,
            hidden: Tensor,
            cache: SpanCache | None = None,
            position: int = 0,
            first: int = 0,
            last: int | None = None,
            tuning: Tuning | None = None,
        ) -> Tensor:
            given = super().forward(hidden.nan_to_num(), cache, position, first, last, tuning)
            return given / 0 if (first, last) == (1, 2) else given

    async with running(Astray(CONFIG, 0, make_span().blocks)) as engine:  # type: ignore[arg-type]
        bad = hidden_states(2, tokens)
        bad[1, 1, 3] = float("nan")
        for hidden, error in ((hidden_states(2, tokens), BadOutput), (bad, BadInput)):
            session = await engine.open_session(batch=2, max_length=60)
            with pytest.raises(error):
                await engine.step(session, hidden, 0, every_block=True)
            assert engine.stats.sessions == 0


async def test_a_cancelled_one_is_rolled_back() -> None:
    span = GatedSpan(make_span())
    async with running(span, EngineSettings(chunk_tokens=10)) as engine:
        session = await engine.open_session(batch=1, max_length=60)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: engine.step(session, hidden_states(1, 50), 0, every_block=True))
            await span.wait_entered()
            nursery.cancel_scope.cancel()
        span.gate.set()
        await engine.step(session, hidden_states(1, 1), 0)
        assert engine.session_length(session) == 1


@torch.inference_mode()
def test_blocks_may_be_on_several_devices() -> None:
    hidden = hidden_states(1, 6)
    with fake_gpus():
        span = on_gpus(make_span(linear=None), (FIRST, SECOND, SECOND))
        slot = Slot(rows=1, length=8, index=0)
        work = Work(kind=Kind.PREFILL, span=span, hidden=hidden, every_block=True)
        work.place = Place(shared_slot=None, shared=0, slot=slot, length=0)
        runner = Runner()
        for number, (start, stop, first, last) in enumerate([(0, 4, 0, 2), (0, 4, 2, 3), (4, 6, 0, 3)]):
            piece = Piece(work=work, start=start, stop=stop, first=first, last=last)
            changes = [] if number else [(Change(granted=slot), work)]
            assert runner.run(Plan(changes=changes, pieces=[piece])) == [None]
        assert work.result().device.type == "cpu"
    torch.testing.assert_close(work.result(), expected(make_span(linear=None), hidden), rtol=1e-5, atol=1e-5)

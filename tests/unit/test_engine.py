"""One thread runs the model; the event loop stays free, and every refusal is of a kind one can act on."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import trio
import trio.testing
from torch import Tensor

from compute.bloom import BloomBlock, BloomSpan
from compute.engine import Engine, EngineSettings
from compute.errors import BadInput, BadOutput, EngineBusy, EngineError, EngineStopped, OutOfCache
from tests.unit.engines import CONFIG, GatedSpan, hidden_states, make_span, running


async def refusal(engine: Engine, session: int, hidden: Tensor, position: object) -> str:
    with pytest.raises(BadInput) as caught:
        await engine.step(session, hidden, position)  # type: ignore[arg-type]
    return caught.value.code


@pytest.mark.trio
async def test_prefill_and_decode_equal_the_whole_sequence() -> None:
    span, hidden = make_span(), hidden_states(2, 9)
    expected = span(hidden)
    async with running(span) as engine:
        session = await engine.open_session(batch=2, max_length=9)
        parts = [await engine.step(session, hidden[:, :5], 0)]
        for position in range(5, 9):
            parts.append(await engine.step(session, hidden[:, position : position + 1], position))
        assert engine.session_length(session) == 9
        assert (engine.stats.steps, engine.stats.tokens) == (5, 18)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.trio
async def test_chunks_change_nothing() -> None:
    span, hidden = make_span(), hidden_states(2, 43)
    async with running(span, EngineSettings(chunk_tokens=10)) as engine:
        session = await engine.open_session(batch=2, max_length=43)
        output = await engine.step(session, hidden, 0)
        assert (engine.stats.steps, engine.stats.tokens, engine.session_length(session)) == (1, 86, 43)
    torch.testing.assert_close(output, span(hidden), rtol=1e-5, atol=1e-5)


@pytest.mark.trio
async def test_sessions_do_not_see_each_other() -> None:
    span = make_span()
    one, two = hidden_states(1, 6, seed=1), hidden_states(2, 6, seed=2)
    results: dict[int, Tensor] = {}
    async with running(span) as engine:

        async def talk(hidden: Tensor, key: int) -> None:
            session = await engine.open_session(batch=hidden.shape[0], max_length=6)
            for position in range(6):
                results[key] = await engine.step(session, hidden[:, position : position + 1], position)
            await engine.close_session(session)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(talk, one, 1)
            nursery.start_soon(talk, two, 2)
        assert (engine.stats.cache_used_tokens, engine.stats.sessions) == (0, 0)
    torch.testing.assert_close(results[1], span(one)[:, -1:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results[2], span(two)[:, -1:], rtol=1e-5, atol=1e-5)


@pytest.mark.trio
async def test_going_back_and_replaying_gives_the_same_bits() -> None:
    hidden = hidden_states(1, 6)
    async with running(make_span()) as engine:
        session = await engine.open_session(batch=1, max_length=10)
        await engine.step(session, hidden[:, :4], 0)
        first = await engine.step(session, hidden[:, 4:5], 4)
        await engine.step(session, -hidden, 4)
        assert torch.equal(await engine.step(session, hidden[:, 4:5], 4), first)
        assert engine.session_length(session) == 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.trio
async def test_results_come_in_the_dtype_of_the_request(dtype: torch.dtype) -> None:
    async with running(make_span()) as engine:
        session = await engine.open_session(batch=1, max_length=10)
        assert (await engine.step(session, hidden_states(1, 2).to(dtype), 0)).dtype == dtype


@pytest.mark.trio
async def test_a_session_may_run_some_of_the_blocks() -> None:
    span, hidden = make_span(), hidden_states(1, 4)
    middle = span.part(1, 3)
    assert (middle.start, middle.end, span.part(0, 3)) == (1, 3, span)
    async with running(span) as engine:
        session = await engine.open_session(batch=1, max_length=4, start=1)
        output = await engine.step(session, hidden, 0)
        for start, end in [(-1, 2), (0, 4), (2, 2), (True, 2), (0, "3")]:
            with pytest.raises(BadInput) as caught:
                await engine.open_session(batch=1, max_length=4, start=start, end=end)  # type: ignore[arg-type]
            assert caught.value.code == "bad-value"
    torch.testing.assert_close(output, middle(hidden), rtol=1e-5, atol=1e-5)


@pytest.mark.trio
async def test_bad_requests_are_refused_and_the_session_lives() -> None:
    async with running(make_span()) as engine:
        session = await engine.open_session(batch=2, max_length=8)
        good = hidden_states(2, 2)
        bad = good.clone()
        bad[1, 1, 3] = float("nan")
        assert await refusal(engine, session, good.double(), 0) == "bad-dtype"
        assert await refusal(engine, session, good.long(), 0) == "bad-dtype"
        assert await refusal(engine, session, good[0], 0) == "bad-shape"
        assert await refusal(engine, session, good[:1], 0) == "bad-shape"
        assert await refusal(engine, session, good[:, :, :8], 0) == "bad-shape"
        assert await refusal(engine, session, good[:, :0], 0) == "bad-shape"
        for position in (-1, 1, True, 0.0, "0", None):
            assert await refusal(engine, session, good, position) == "bad-position"
        assert await refusal(engine, session, good, 7) == "too-long"
        for order in ([0], [0, 2], [0, True], [-1, 0]):
            with pytest.raises(BadInput) as caught:
                await engine.step(session, good, 0, order)
            assert caught.value.code == "bad-value"
        assert await refusal(engine, session + 1, good, 0) == "no-session"
        assert (engine.stats.steps, engine.stats.cache_used_tokens, engine.stats.waiting) == (0, 0, 0)
        await engine.step(session, good, 0)
        assert await refusal(engine, session, good, 3) == "bad-position"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.trio
async def test_values_that_are_not_finite_end_the_session(value: float, tokens: int) -> None:
    async with running(make_span()) as engine:
        session = await engine.open_session(batch=2, max_length=80)
        bad = hidden_states(2, tokens)
        await engine.step(session, bad.clone(), 0)
        bad[1, tokens - 1, 3] = value
        with pytest.raises(BadInput, match=r"in row 1 \(1 of 2 rows\)") as caught:
            await engine.step(session, bad, 1)
        assert caught.value.code == "not-finite"
        assert (engine.stats.sessions, engine.stats.cache_used_tokens) == (0, 0)
        assert await refusal(engine, session, hidden_states(2, 1), 0) == "no-session"


@pytest.mark.trio
async def test_bad_sessions_are_refused() -> None:
    settings = EngineSettings(max_batch=4, max_length_tokens=10, max_sessions=1)
    async with running(make_span(), settings) as engine:
        for batch, length, code in [(0, 1, "bad-value"), (5, 1, "bad-value"), (True, 1, "bad-value")]:
            with pytest.raises(BadInput) as caught:
                await engine.open_session(batch=batch, max_length=length)
            assert caught.value.code == code
        for length, code in [(0, "bad-value"), (11, "too-long")]:
            with pytest.raises(BadInput) as caught:
                await engine.open_session(batch=1, max_length=length)
            assert caught.value.code == code
        await engine.open_session(batch=4, max_length=10)
        with pytest.raises(EngineBusy):
            await engine.open_session(batch=1, max_length=1)


@pytest.mark.trio
async def test_a_full_cache_is_said_and_closing_helps() -> None:
    async with running(make_span(), EngineSettings(cache_tokens=100)) as engine:
        one = await engine.open_session(batch=1, max_length=80)
        two = await engine.open_session(batch=1, max_length=80)
        await engine.step(one, hidden_states(1, 70), 0)
        with pytest.raises(OutOfCache):
            await engine.step(two, hidden_states(1, 70), 0)
        await engine.close_session(one)
        await engine.close_session(one)
        await engine.step(two, hidden_states(1, 70), 0)
        assert await refusal(engine, one, hidden_states(1, 1), 0) == "no-session"


@pytest.mark.trio
async def test_a_result_that_is_not_finite_is_not_given_out() -> None:
    span = make_span()
    hidden = hidden_states(1, 3)
    async with running(span) as engine:
        session = await engine.open_session(batch=1, max_length=10)
        with pytest.raises(BadOutput) as caught:
            await engine.step(session, hidden * 1e38, 0)
        assert caught.value.code == "bad-output"
        assert await refusal(engine, session, hidden, 0) == "no-session"
        session = await engine.open_session(batch=1, max_length=10)
        output = await engine.step(session, hidden, 0)
    torch.testing.assert_close(output, span(hidden), rtol=1e-5, atol=1e-5)


@pytest.mark.trio
async def test_the_event_loop_stays_free_and_too_many_steps_fail_at_once() -> None:
    span = GatedSpan()
    async with running(span, EngineSettings(max_waiting=2)) as engine, trio.open_nursery() as nursery:
        session = await engine.open_session(batch=1, max_length=10)
        nursery.start_soon(engine.step, session, hidden_states(1, 1), 0)
        await span.wait_entered()
        nursery.start_soon(engine.step, session, hidden_states(1, 1), 1)
        await trio.testing.wait_all_tasks_blocked()
        assert engine.stats.waiting == 2
        with pytest.raises(EngineBusy) as caught:
            await engine.step(session, hidden_states(1, 1), 2)
        assert caught.value.code == "busy"
        with pytest.raises(EngineBusy):
            await engine.measure()
        nursery.start_soon(engine.close_session, session)  # closing is never refused
        span.gate.set()


@pytest.mark.trio
async def test_a_cancelled_step_that_waits_is_skipped() -> None:
    span = GatedSpan()
    async with running(span) as engine, trio.open_nursery() as nursery:
        session = await engine.open_session(batch=1, max_length=10)
        nursery.start_soon(engine.step, session, hidden_states(1, 1), 0)
        await span.wait_entered()
        with trio.move_on_after(0) as scope:
            await engine.step(session, hidden_states(1, 1), 1)
        assert scope.cancelled_caught
        span.gate.set()
        await engine.step(session, hidden_states(1, 2), 1)
        assert (len(span.runs), engine.session_length(session), engine.stats.waiting) == (2, 3, 0)


@pytest.mark.trio
async def test_a_cancelled_step_that_runs_stops_at_the_next_chunk() -> None:
    span, hidden = GatedSpan(), hidden_states(1, 40)
    async with running(span, EngineSettings(chunk_tokens=10)) as engine:
        session = await engine.open_session(batch=1, max_length=40)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.step, session, hidden, 0)
            await span.wait_entered()
            nursery.cancel_scope.cancel()
        assert engine.stats.waiting == 1  # it cannot be interrupted
        span.gate.set()
        output = await engine.step(session, hidden, 0)
        assert span.runs[0] == (0, 0, 1)  # a lone block, as long as nobody knows how long it takes
        assert {run[0] for run in span.runs[1:]} == {0, 10, 20, 30}
        assert [run[0] for run in span.runs[1:]] == sorted(run[0] for run in span.runs[1:])
    torch.testing.assert_close(output, make_span()(hidden), rtol=1e-5, atol=1e-5)


@pytest.mark.trio
async def test_a_cancelled_close_closes() -> None:
    async with running(make_span()) as engine:
        session = await engine.open_session(batch=1, max_length=10)
        await engine.step(session, hidden_states(1, 1), 0)
        with trio.move_on_after(0):
            await engine.close_session(session)
        other = await engine.open_session(batch=1, max_length=10)
        await engine.close_session(other)  # jobs keep their order: the first close is over now
        assert (engine.stats.cache_used_tokens, engine.stats.sessions) == (0, 0)


@pytest.mark.trio
async def test_stopping_ends_what_waits() -> None:
    span = GatedSpan()
    errors: list[str] = []
    stopping = trio.CancelScope()

    async def run(engine: Engine, *, task_status: trio.TaskStatus[None]) -> None:
        with stopping:
            await engine.run(task_status=task_status)

    async with trio.open_nursery() as nursery:
        engine = Engine(span)
        await nursery.start(run, engine)
        session = await engine.open_session(batch=1, max_length=10)

        async def step(position: int) -> None:
            with pytest.raises(EngineStopped) as caught:
                await engine.step(session, hidden_states(1, 1), position)
            errors.append(caught.value.code)

        nursery.start_soon(engine.step, session, hidden_states(1, 1), 0)
        await span.wait_entered()
        nursery.start_soon(step, 1)
        nursery.start_soon(step, 2)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(engine.close_session, session)
        await trio.testing.wait_all_tasks_blocked()
        stopping.cancel()
        await trio.testing.wait_all_tasks_blocked()
        span.gate.set()
    assert errors == ["stopped", "stopped"]
    assert (engine.stats.cache_used_tokens, engine.stats.waiting) == (0, 0)
    with pytest.raises(EngineStopped):
        await engine.open_session(batch=1, max_length=1)
    await engine.close_session(session)
    with pytest.raises(RuntimeError, match="is stopped"):
        await engine.run()


@pytest.mark.trio
async def test_a_bug_in_the_model_reaches_the_caller_and_the_thread_lives() -> None:
    class Broken(BloomSpan):
        def forward(self, hidden: Tensor, *args: Any) -> Tensor:
            if hidden.shape[1] == 1:
                raise ZeroDivisionError("a bug")
            return super().forward(hidden, *args)

    async with running(Broken(CONFIG, 0, [BloomBlock(CONFIG)])) as engine:
        session = await engine.open_session(batch=1, max_length=10)
        with pytest.raises(ZeroDivisionError):
            await engine.step(session, hidden_states(1, 1), 0)
        await engine.step(session, hidden_states(1, 2), 0)


@pytest.mark.trio
async def test_measuring_takes_nothing_from_sessions() -> None:
    async with running(make_span(), EngineSettings(cache_tokens=1, threads=1)) as engine:
        speed = await engine.measure(steps=3)
        assert min(speed.decode_tokens_per_s, speed.prefill_tokens_per_s) > 0
        assert (engine.stats.cache_used_tokens, engine.stats.steps) == (0, 0)
        with pytest.raises(ValueError, match="steps"):
            await engine.measure(0)


@pytest.mark.trio
async def test_one_thread_runs_the_model_and_ends_with_it() -> None:
    threads: set[str] = set()

    class Watched(BloomSpan):
        def forward(self, *args: Any) -> Tensor:
            threads.add(threading.current_thread().name)
            assert torch.is_inference_mode_enabled()
            return super().forward(*args)

    async with running(Watched(CONFIG, 0, [BloomBlock(CONFIG)])) as engine:
        session = await engine.open_session(batch=1, max_length=10)
        await engine.step(session, hidden_states(1, 1), 0)
        await engine.measure(1)
    assert threads == {"raceme-engine"}


def test_nonsense_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="max_waiting is 0"):
        EngineSettings(max_waiting=0)


def test_every_refusal_has_a_code() -> None:
    codes = {error.code for error in (OutOfCache("x"), EngineBusy("x"), EngineStopped("x"), BadOutput("x"))}
    assert len(codes) == 4
    assert isinstance(BadInput("bad-shape", "x"), EngineError)
    with pytest.raises(ValueError, match="unknown code"):
        BadInput("other", "x")

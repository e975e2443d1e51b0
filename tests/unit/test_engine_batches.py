"""Many sessions at once: each has the bits that it has alone, and nobody's trouble is another's."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import trio
import trio.testing
from torch import Tensor

from compute.bloom import BloomSpan
from compute.cache import SlotMemory
from compute.engine import Engine, EngineSettings
from compute.errors import BadInput, BadOutput, EngineBusy, OutOfCache
from tests.unit.engines import GatedSpan, hidden_states, make_span, running


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Barrier:
    """Nobody goes on before all are here."""

    def __init__(self, count: int) -> None:
        self.left = count
        self.all_here = trio.Event()

    async def __call__(self) -> None:
        self.left -= 1
        if not self.left:
            self.all_here.set()
        await self.all_here.wait()


async def talk(
    engine: Engine, hidden: Tensor, cuts: list[int], out: dict[Any, Tensor], key: Any, barrier: Barrier
) -> None:
    """A session that steps from cut to cut, and waits for others after the first one."""
    session = await engine.open_session(batch=hidden.shape[0], max_length=hidden.shape[1], peer=key)
    parts = []
    for start, end in zip([0, *cuts], [*cuts, hidden.shape[1]], strict=True):
        parts.append(await engine.step(session, hidden[:, start:end], start))
        if not start:
            await barrier()
    out[key] = torch.cat(parts, dim=1)
    await engine.close_session(session)


@pytest.mark.parametrize("linear", ["fp32", "fp16", "int8"])
async def test_sessions_of_all_kinds_have_the_bits_that_they_have_alone(linear: str) -> None:
    """Ragged prefills, several tokens a step, several rows; decode steps that share batches, or do not."""
    span = make_span(linear=linear)
    talks = {
        number: (hidden_states(rows, tokens + 6, seed=number), [tokens, tokens + 1, tokens + 2, tokens + 4])
        for number, (rows, tokens) in enumerate([(1, 5), (2, 50), (1, 90), (3, 17), (1, 1), (2, 33), (4, 60)])
    }
    settings = EngineSettings(chunk_tokens=40)
    alone: dict[Any, Tensor] = {}
    together: dict[Any, Tensor] = {}
    async with running(span, settings) as engine:
        for key, (hidden, cuts) in talks.items():
            await talk(engine, hidden, cuts, alone, key, Barrier(1))
    gated, barrier = GatedSpan(span), Barrier(len(talks))
    gated.gate.set()
    async with running(gated, settings) as engine:
        async with trio.open_nursery() as nursery:
            for key, (hidden, cuts) in talks.items():
                nursery.start_soon(talk, engine, hidden, cuts, together, key, barrier)
        assert (engine.stats.cache_used_tokens, engine.stats.sessions, engine.stats.waiting) == (0, 0, 0)
    assert max(gated.batches) == len(talks)
    for key, expected in alone.items():
        assert torch.equal(together[key], expected), key


async def test_what_is_ready_together_runs_together_and_a_lone_step_at_once() -> None:
    span = GatedSpan(make_span())
    async with running(span) as engine, trio.open_nursery() as nursery:
        sessions = [await engine.open_session(batch=1, max_length=8) for _ in range(4)]
        nursery.start_soon(engine.step, sessions[0], hidden_states(1, 1), 0)
        await span.wait_entered()
        assert span.batches == [1]
        for session in sessions[1:]:
            nursery.start_soon(engine.step, session, hidden_states(1, 1), 0)
        await trio.testing.wait_all_tasks_blocked()
        span.gate.set()
        await span.wait_entered()
        assert span.batches == [1, 3]


async def test_one_with_bad_values_is_left_out_of_a_batch_and_ends_alone() -> None:
    plain, hidden = make_span(), [hidden_states(1, 3, seed=number) for number in range(4)]
    bad = hidden[1][:, 2:].clone()
    bad[0, 0, 7] = float("nan")
    huge = hidden[2][:, 2:] * 1e38
    errors: dict[int, BadInput | BadOutput] = {}
    results: dict[int, Tensor] = {}
    span = GatedSpan(plain)
    span.gate.set()
    async with running(span) as engine:
        sessions = [await engine.open_session(batch=1, max_length=8, peer=number) for number in range(4)]
        for number, session in enumerate(sessions):
            await engine.step(session, hidden[number][:, :2], 0)
        span.batches.clear()

        async def step(number: int, values: Tensor) -> None:
            try:
                results[number] = await engine.step(sessions[number], values, 2)
            except (BadInput, BadOutput) as error:
                errors[number] = error

        async with trio.open_nursery() as nursery:
            for number, values in enumerate([hidden[0][:, 2:], bad, huge, hidden[3][:, 2:]]):
                nursery.start_soon(step, number, values)
        assert span.batches == [3]
        assert {number: error.code for number, error in errors.items()} == {1: "not-finite", 2: "bad-output"}
        assert (engine.stats.sessions, engine.stats.cache_used_tokens) == (2, 2 * 64)
    async with running(plain) as engine:
        for number in (0, 3):
            session = await engine.open_session(batch=1, max_length=8)
            await engine.step(session, hidden[number][:, :2], 0)
            assert torch.equal(await engine.step(session, hidden[number][:, 2:], 2), results[number])


@pytest.mark.parametrize("words", ["DefaultCPUAllocator: can't allocate memory", None])
async def test_who_has_no_memory_even_alone_ends_alone(words: str | None) -> None:
    class Tight(BloomSpan):
        """Has no memory for batches, nor for one of the sessions."""

        def together(self, steps: Any) -> Tensor:
            raise RuntimeError(words) if words else torch.OutOfMemoryError("CUDA out of memory")

        def forward(self, hidden: Tensor, *args: Any) -> Tensor:
            if hidden[0, 0, 0] == 42.0:
                raise RuntimeError(words) if words else MemoryError
            return super().forward(hidden, *args)

    inner = make_span()
    async with running(Tight(inner.config, 0, inner.blocks)) as engine:  # type: ignore[arg-type]
        sessions = [await engine.open_session(batch=1, max_length=8) for _ in range(3)]
        results: dict[int, Tensor] = {}
        errors: list[OutOfCache] = []

        async def step(number: int) -> None:
            values = hidden_states(1, 2, seed=number)
            if number == 1:
                values[0, 0, 0] = 42.0
            try:
                results[number] = await engine.step(sessions[number], values, 0)
            except OutOfCache as error:
                errors.append(error)

        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(step, number)
        assert [error.code for error in errors] == ["out-of-cache"]
        assert sorted(results) == [0, 2]
        assert (engine.stats.sessions, engine.stats.cache_used_tokens) == (2, 128)
    for number in (0, 2):
        torch.testing.assert_close(results[number], inner(hidden_states(1, 2, seed=number)), rtol=1e-5, atol=1e-5)


async def test_no_memory_for_a_slot_ends_the_session_that_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    span, hidden = make_span(), hidden_states(1, 70)
    honest = SlotMemory._zeros

    def zeros(self: SlotMemory, device: torch.device) -> Tensor:
        if self._shape[2] > 64:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 byte")
        return honest(self, device)

    monkeypatch.setattr(SlotMemory, "_zeros", zeros)
    async with running(span) as engine:
        grows = await engine.open_session(batch=1, max_length=200)
        stays = await engine.open_session(batch=1, max_length=200)
        await engine.step(grows, hidden[:, :60], 0)
        await engine.step(stays, hidden[:, :60], 0)
        with pytest.raises(OutOfCache, match="no memory"):
            await engine.step(grows, hidden[:, 60:], 60)
        assert (engine.stats.sessions, engine.stats.cache_used_tokens) == (1, 64)
        await engine.step(stays, hidden[:, 60:62], 60)


async def test_a_bug_in_a_batch_is_whose_step_has_it() -> None:
    class Broken(BloomSpan):
        def together(self, steps: Any) -> Tensor:
            raise ZeroDivisionError("a bug")

        def forward(self, hidden: Tensor, *args: Any) -> Tensor:
            if hidden[0, 0, 0] == 42.0:
                raise ZeroDivisionError("a bug")
            return super().forward(hidden, *args)

    inner = make_span()
    async with running(Broken(inner.config, 0, inner.blocks)) as engine:  # type: ignore[arg-type]
        sessions = [await engine.open_session(batch=1, max_length=8) for _ in range(2)]
        odd = hidden_states(1, 1)
        odd[0, 0, 0] = 42.0

        async def fails() -> None:
            with pytest.raises(ZeroDivisionError):
                await engine.step(sessions[0], odd, 0)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fails)
            nursery.start_soon(engine.step, sessions[1], hidden_states(1, 1), 0)
        assert [engine.session_length(session) for session in sessions] == [0, 1]


# Rollback and rows


async def test_rows_change_places_for_beams() -> None:
    """Beam search over three tokens: each row is what its own history alone would give."""
    span, hidden = make_span(), hidden_states(3, 9)
    orders = [[2, 0, 0], [1, 1, 2], [0, 2, 1]]
    async with running(span, EngineSettings(max_length_tokens=128)) as engine:
        beams = await engine.open_session(batch=3, max_length=100)
        await engine.step(beams, hidden[:, :6], 0)
        histories = [hidden[row : row + 1, :6] for row in range(3)]
        for position, order in enumerate(orders, 6):
            new = hidden[:, position : position + 1]
            output = await engine.step(beams, new, position, order)
            histories = [torch.cat([histories[old], new[row : row + 1]], dim=1) for row, old in enumerate(order)]
            for row, history in enumerate(histories):
                lone = await engine.open_session(batch=1, max_length=100)
                await engine.step(lone, history[:, :6], 0)
                for at in range(6, position):
                    await engine.step(lone, history[:, at : at + 1], at)
                assert torch.equal(await engine.step(lone, history[:, position:], position), output[row : row + 1])
                await engine.close_session(lone)
        await engine.close_session(beams)
        assert engine.stats.cache_used_tokens == 0


async def test_a_step_that_fails_while_rows_change_places_forgets_all() -> None:
    span = GatedSpan(make_span())
    span.gate.set()
    async with running(span, EngineSettings(cache_tokens=100, max_sessions_per_peer=4)) as engine:
        session = await engine.open_session(batch=1, max_length=90)
        other = await engine.open_session(batch=1, max_length=90)
        await engine.step(session, hidden_states(1, 10), 0)
        await span.wait_entered()
        with pytest.raises(OutOfCache):
            await engine.step(other, hidden_states(1, 70), 0)
        with pytest.raises(BadInput, match="has 10 tokens"):
            await engine.step(session, hidden_states(1, 1), 12, [0])
        assert engine.session_length(session) == 10  # refused, before anything changed
        await engine.close_session(other)
        span.gate.clear()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.step, session, hidden_states(1, 1), 10, [0])
            await span.wait_entered()
            nursery.cancel_scope.cancel()
        span.gate.set()
        await engine.step(session, hidden_states(1, 1), 0)
        assert engine.session_length(session) == 1


async def test_a_bug_while_rows_change_places_makes_a_session_forget_all() -> None:
    class Broken(BloomSpan):
        def forward(self, hidden: Tensor, *args: Any) -> Tensor:
            if hidden[0, 0, 0] == 42.0:
                raise ZeroDivisionError("a bug")
            return super().forward(hidden, *args)

    odd = hidden_states(2, 1)
    odd[0, 0, 0] = 42.0
    inner = make_span()
    async with running(Broken(inner.config, 0, inner.blocks)) as engine:  # type: ignore[arg-type]
        session = await engine.open_session(batch=2, max_length=8)
        expected = await engine.step(session, hidden_states(2, 3), 0)
        with pytest.raises(ZeroDivisionError):
            await engine.step(session, odd, 3, [1, 1])
        assert engine.session_length(session) == 0
        assert torch.equal(await engine.step(session, hidden_states(2, 3), 0), expected)


# Prefixes


@pytest.mark.parametrize("together", [True, False])
async def test_peers_compute_a_beginning_once_only_where_that_is_allowed(together: bool) -> None:
    prompt = hidden_states(1, 130)
    settings = EngineSettings(chunk_tokens=40, share_between_peers=together)
    async with running(make_span(), settings) as engine:
        outputs = []
        for peer in ("p", "q"):
            session = await engine.open_session(batch=1, max_length=140, peer=peer)
            outputs.append(await engine.step(session, prompt, 0))
        assert torch.equal(*outputs)
        assert engine.stats.cache_used_tokens == 256 + (64 if together else 256)


async def test_who_begins_alike_computes_the_beginning_once() -> None:
    span = GatedSpan(make_span())
    span.gate.set()
    prompt = hidden_states(1, 130)
    other = torch.cat([prompt[:, :90], hidden_states(1, 40, seed=9)], dim=1)
    settings = EngineSettings(chunk_tokens=40)
    outputs: list[Tensor] = []
    async with running(span, EngineSettings(chunk_tokens=40, share_prefixes=False)) as engine:
        for hidden in (prompt, other):
            session = await engine.open_session(batch=1, max_length=140)
            outputs.append(await engine.step(session, hidden, 0))
            outputs.append(await engine.step(session, hidden[:, :1], 130))
    async with running(span, settings) as engine:
        first = await engine.open_session(batch=1, max_length=140, peer="p")
        assert torch.equal(await engine.step(first, prompt, 0), outputs[0])
        assert engine.stats.cache_used_tokens == 256
        second = await engine.open_session(batch=1, max_length=140, peer="p")
        assert torch.equal(await engine.step(second, other, 0), outputs[2])
        assert engine.stats.cache_used_tokens == 256 + 64  # 80 tokens are shared
        third = await engine.open_session(batch=1, max_length=140, peer="p")
        await engine.close_session(first)
        assert torch.equal(await engine.step(third, prompt, 0), outputs[0])
        assert torch.equal(await engine.step(second, other[:, :1], 130), outputs[3])
        assert torch.equal(await engine.step(third, prompt[:, :1], 130), outputs[1])
        assert engine.stats.tokens == 3 * 130 + 2
        for session in (second, third):
            await engine.close_session(session)
        assert engine.stats.cache_used_tokens == 0


async def test_prompts_that_come_in_pieces_share_what_is_alike() -> None:
    """As clients send them: a chunk at a time, so that the next node begins before the last one has come."""
    prompt = hidden_states(1, 130)
    other = torch.cat([prompt[:, :90], hidden_states(1, 40, seed=9)], dim=1)

    async def in_pieces(engine: Engine, hidden: Tensor) -> tuple[int, Tensor]:
        session = await engine.open_session(batch=1, max_length=140, peer="p")
        parts = [await engine.step(session, hidden[:, at : at + 40], at) for at in range(0, 130, 40)]
        return session, torch.cat([*parts, await engine.step(session, prompt[:, :1], 130)], dim=1)

    async with running(make_span(), EngineSettings(chunk_tokens=40, share_prefixes=False)) as engine:
        expected = [(await in_pieces(engine, hidden))[1] for hidden in (prompt, other)]
    async with running(make_span(), EngineSettings(chunk_tokens=40)) as engine:
        first, output = await in_pieces(engine, prompt)
        assert torch.equal(output, expected[0])
        second, output = await in_pieces(engine, prompt)
        assert torch.equal(output, expected[0])
        third, output = await in_pieces(engine, other)
        assert torch.equal(output, expected[1])
        assert [engine._slots.place(each).shared for each in (first, second, third)] == [0, 120, 80]
        # A session that goes back writes something else behind what it shares, and offers nothing that it has not.
        await engine.step(second, other[:, 80:120], 80)
        assert torch.equal(await engine.step(second, other[:, 120:], 120), expected[1][:, 120:130])
        _, output = await in_pieces(engine, prompt)
        assert torch.equal(output, expected[0])
        await engine.step(first, other[:, 80:120], 80)
        _, output = await in_pieces(engine, prompt)
        assert torch.equal(output, expected[0])
        _, output = await in_pieces(engine, other)
        assert torch.equal(output, expected[1])


async def test_prefixes_are_not_shared_between_peers_or_by_other_rows() -> None:
    prompt = hidden_states(2, 100)
    async with running(make_span(), EngineSettings(chunk_tokens=40)) as engine:
        for number, (peer, rows) in enumerate([("p", 1), ("q", 1), ("p", 2)]):
            session = await engine.open_session(batch=rows, max_length=100, peer=peer)
            await engine.step(session, prompt[:rows], 0)
            assert engine._slots.place(session).shared == 0, number
        session = await engine.open_session(batch=1, max_length=100, peer="p")
        await engine.step(session, prompt[:1], 0)
        assert engine._slots.place(session).shared == 80


async def test_a_prefix_that_is_written_over_is_kept_for_who_reads_it() -> None:
    prompt, changed = hidden_states(1, 100), hidden_states(1, 100, seed=5)
    settings = EngineSettings(chunk_tokens=40)
    async with running(make_span(), settings) as engine:
        first = await engine.open_session(batch=1, max_length=128)
        second = await engine.open_session(batch=1, max_length=128)
        expected = await engine.step(first, prompt, 0)
        assert torch.equal(await engine.step(second, prompt, 0), expected)
        after = await engine.step(second, prompt[:, :1], 100)
        await engine.step(first, changed, 0)
        assert torch.equal(await engine.step(second, prompt[:, :1], 100), after)
        assert torch.equal(await engine.step(first, prompt, 0), expected)


async def test_a_refused_or_cancelled_step_does_not_keep_a_prefix() -> None:
    prompt = hidden_states(1, 100)
    span = GatedSpan(make_span())
    span.gate.set()
    settings = EngineSettings(chunk_tokens=40, max_waiting_per_peer=1)
    async with running(span, settings) as engine, trio.open_nursery() as nursery:
        first = await engine.open_session(batch=1, max_length=128)
        expected = await engine.step(first, prompt, 0)
        second = await engine.open_session(batch=1, max_length=128)
        span.gate.clear()
        while span.entered.acquire(blocking=False):
            pass
        nursery.start_soon(engine.step, first, prompt[:, :1], 100)
        await span.wait_entered()
        with pytest.raises(EngineBusy):
            await engine.step(second, prompt, 0)
        assert engine.session_length(second) == 0
        span.gate.set()
        await engine.measure(1)  # the other step is over
        assert torch.equal(await engine.step(second, prompt, 0), expected)
        assert engine._slots.place(second).shared == 80


# Cancellation


async def test_a_cancelled_prefill_between_slices_is_rolled_back() -> None:
    span = GatedSpan(make_span())
    prompt = hidden_states(1, 100)
    async with running(span, EngineSettings(chunk_tokens=40)) as engine:
        session = await engine.open_session(batch=1, max_length=128)
        scope = trio.CancelScope()

        async def step() -> None:
            with scope:
                await engine.step(session, prompt, 0)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(step)
            await span.wait_entered()
            scope.cancel()
        assert scope.cancelled_caught
        assert engine.stats.waiting == 1  # the slice that runs cannot be interrupted
        span.gate.set()
        output = await engine.step(session, prompt[:, :3], 0)
        assert engine.session_length(session) == 3
        assert (engine.stats.steps, engine.stats.tokens) == (1, 3)
    torch.testing.assert_close(output, make_span()(prompt[:, :3]), rtol=1e-5, atol=1e-5)


async def test_a_finished_step_that_nobody_waits_for_is_rolled_back() -> None:
    span = GatedSpan(make_span())
    async with running(span) as engine:
        session = await engine.open_session(batch=1, max_length=128)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.step, session, hidden_states(1, 2), 0)
            await span.wait_entered()
            nursery.cancel_scope.cancel()
        span.gate.set()
        await engine.close_session(await engine.open_session(batch=1, max_length=1))
        await engine.measure(1)
        assert (engine.session_length(session), engine.stats.steps) == (0, 0)


# Quotas


async def test_so_many_sessions_and_steps_of_a_peer() -> None:
    span = GatedSpan(make_span())
    settings = EngineSettings(max_sessions_per_peer=2, max_waiting_per_peer=1)
    async with running(span, settings) as engine, trio.open_nursery() as nursery:
        first, second = [await engine.open_session(batch=1, max_length=8, peer="p") for _ in range(2)]
        with pytest.raises(EngineBusy, match="of this peer") as caught:
            await engine.open_session(batch=1, max_length=8, peer="p")
        assert 59 < caught.value.retry_after_s <= 60
        other = await engine.open_session(batch=1, max_length=8, peer="q")
        nursery.start_soon(engine.step, first, hidden_states(1, 1), 0)
        await span.wait_entered()
        with pytest.raises(EngineBusy, match="of this peer") as caught:
            await engine.step(second, hidden_states(1, 1), 0)
        assert 0 < caught.value.retry_after_s <= 60
        nursery.start_soon(engine.step, other, hidden_states(1, 1), 0)
        span.gate.set()


async def test_who_holds_more_than_a_share_makes_room() -> None:
    settings = EngineSettings(cache_tokens=256, max_length_tokens=64)
    async with running(make_span(), settings) as engine:
        hog = [await engine.open_session(batch=1, max_length=64, peer="hog") for _ in range(4)]
        for session in hog:
            await engine.step(session, hidden_states(1, 60), 0)
        assert engine.stats.cache_used_tokens == 256
        honest = await engine.open_session(batch=1, max_length=64, peer="h")
        await engine.step(honest, hidden_states(1, 60), 0)
        assert engine.stats.sessions == 4
        with pytest.raises(BadInput, match="ended to make room") as caught:
            await engine.step(hog[0], hidden_states(1, 1), 60)
        assert caught.value.code == "no-session"
        with pytest.raises(OutOfCache) as refused:
            again = await engine.open_session(batch=1, max_length=64, peer="hog")
            await engine.step(again, hidden_states(1, 1), 0)
        assert refused.value.retry_after_s > 1


async def test_nobody_waits_for_a_session_that_is_ended() -> None:
    """It is within no step, but has one that waits for another peer's."""
    settings = EngineSettings(cache_tokens=64, max_length_tokens=64)
    span = GatedSpan(make_span())
    span.gate.set()
    async with running(span, settings) as engine:
        hog = await engine.open_session(batch=1, max_length=64, peer="hog")
        await engine.step(hog, hidden_states(1, 40), 0)
        honest = await engine.open_session(batch=1, max_length=16, peer="h")
        outcomes: list[str] = []

        async def step(session: int, position: int) -> None:
            try:
                await engine.step(session, hidden_states(1, 40), position)
                outcomes.append("done")
            except (BadInput, OutOfCache) as error:
                outcomes.append(error.code)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(step, hog, 0)
            nursery.start_soon(step, hog, 0)
        assert outcomes == ["done", "done"]
        assert (engine.stats.sessions, honest) == (2, honest)


# Training


@pytest.mark.parametrize("linear", [None, "fp32", "fp16"])
async def test_forward_and_backward_in_slices_are_those_of_the_whole(linear: str | None) -> None:
    span = make_span(linear=linear)
    hidden, upstream = hidden_states(3, 30), hidden_states(3, 30, seed=2)
    leaf = hidden.clone().requires_grad_(True)
    expected = span(leaf)
    expected.backward(upstream)
    assert leaf.grad is not None
    async with running(span, EngineSettings(chunk_tokens=60)) as engine:
        for _ in range(3):  # from one block at a time to as many as are fast enough
            torch.testing.assert_close(await engine.forward(hidden), expected.detach(), rtol=1e-5, atol=1e-5)
            gradient = (await engine.backward(hidden, upstream)).hidden
            torch.testing.assert_close(gradient, leaf.grad, rtol=1e-4, atol=1e-4)
        middle = await engine.forward(hidden, start=1, end=2)
    torch.testing.assert_close(middle, span.part(1, 2)(hidden), rtol=1e-5, atol=1e-5)


async def test_training_is_refused_like_steps() -> None:
    bad = hidden_states(2, 4)
    bad[1, 2, 3] = float("inf")
    good = hidden_states(2, 4)
    async with running(make_span(), EngineSettings(max_batch=2, max_length_tokens=4)) as engine:
        cases: list[tuple[Any, str]] = [
            (partial(engine.forward, bad), "not-finite"),
            (partial(engine.backward, good, bad), "not-finite"),
            (partial(engine.forward, good.double()), "bad-dtype"),
            (partial(engine.forward, good[:, :, :7]), "bad-shape"),
            (partial(engine.forward, good[:0]), "bad-shape"),
            (partial(engine.backward, good, good[:1]), "bad-shape"),
            (partial(engine.forward, hidden_states(3, 4)), "too-long"),
            (partial(engine.forward, hidden_states(1, 5)), "too-long"),
            (partial(engine.forward, good, start=2, end=2), "bad-value"),
        ]
        for call, code in cases:
            with pytest.raises(BadInput) as caught:
                await call()
            assert caught.value.code == code
        with pytest.raises(BadOutput):
            await engine.forward(good * 1e38)
        assert engine.stats.waiting == 0
        assert torch.equal(await engine.forward(good), await engine.forward(good))

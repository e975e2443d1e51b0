"""Sessions that add something of their own: each as it is alone, beside others and in any steps."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import trio
from torch import Tensor

from compute.bloom import BloomConfig, BloomSpan, Step
from compute.bloom.graphs import SpanGraphs
from compute.cache import KVCache
from compute.engine import Engine, EngineSettings
from compute.errors import BadInput, EngineBusy, OutOfCache
from compute.linear import CHECKED_ROWS
from compute.tuning import ServedTuning, SpanTuning, TuningForm
from tests.unit.engines import CONFIG, GatedSpan, hidden_states, make_span, running
from tests.unit.fake_gpus import FIRST, SECOND, fake_gpus, on_gpus
from tests.unit.test_engine_batches import Barrier
from tests.unit.tunings import ALL, BOTH, FORMS, QKV, make_tuning


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


async def talk(
    engine: Engine, hidden: Tensor, cuts: list[int], barrier: Barrier | None = None, **options: Any
) -> Tensor:
    """What a session gives that steps from cut to cut, and waits for others after the first one."""
    session = await engine.open_session(batch=hidden.shape[0], max_length=hidden.shape[1], **options)
    cuts = [0, *cuts, hidden.shape[1]]
    parts = []
    for start, end in itertools.pairwise(cuts):
        parts.append(await engine.step(session, hidden[:, start:end], start))
        if not start and barrier is not None:
            await barrier()
    await engine.close_session(session)
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("linear", [None, "fp32"])
@pytest.mark.parametrize("form", FORMS)
async def test_steps_give_what_the_whole_sequence_gives(form: TuningForm, linear: str | None) -> None:
    span, tuning, hidden = make_span(linear=linear), make_tuning(form), hidden_states(2, 60)
    expected = span(hidden, tuning=tuning)
    assert not torch.allclose(expected, span(hidden), rtol=0.01, atol=0.01)
    async with running(span, EngineSettings(chunk_tokens=40)) as engine:
        for cuts in ([50, 51, 52, 55], [2, 4, 7], [1, 2, 3, 4, 5, 6, 33]):
            given = await talk(engine, hidden, cuts, tuning=tuning)
            torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)
        middle = await talk(engine, hidden, [50], start=1, end=2, tuning=tuning)
    torch.testing.assert_close(middle, span(hidden, None, 0, 1, 2, tuning), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("linear", ["fp32", "fp16", "int8"])
async def test_several_users_in_one_batch_have_the_bits_that_they_have_alone(linear: str) -> None:
    span = make_span(linear=linear)
    users: list[tuple[Tensor, list[int], dict[str, Any]]] = []
    for number, form in enumerate([*FORMS, None, QKV, None]):
        rows, tokens = 1 + number % 3, 5 + 20 * (number % 2)
        cuts = [tokens, tokens + 1, tokens + 2, tokens + 3]
        tuning = None if form is None else make_tuning(form, seed=number)
        pads = [2 * row for row in range(rows)] if number % 2 else None
        users.append((hidden_states(rows, tokens + 6, seed=number), cuts, {"tuning": tuning, "pads": pads}))
    async with running(span, EngineSettings(chunk_tokens=40)) as engine:
        alone = [await talk(engine, hidden, cuts, **options) for hidden, cuts, options in users]
    gated, together, barrier = GatedSpan(span), dict[int, Tensor](), Barrier(len(users))
    gated.gate.set()
    async with running(gated, EngineSettings(chunk_tokens=40)) as engine, trio.open_nursery() as nursery:

        async def run(number: int) -> None:
            hidden, cuts, options = users[number]
            together[number] = await talk(engine, hidden, cuts, barrier, peer=number, **options)

        for number in range(len(users)):
            nursery.start_soon(run, number)
    assert max(gated.batches) == len(users)
    for number, expected in enumerate(alone):
        assert torch.equal(together[number], expected), number


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_rows_of_small_products_do_not_depend_on_each_other(threads: int) -> None:
    torch.set_num_threads(threads)
    for rank, width in itertools.product((1, 2, 3, 4, 7, 8, 16, 20, 64), (48, 64, 100, 1024)):
        config = BloomConfig(vocab_size=8, hidden_size=width, n_layer=1, n_head=1)
        form = TuningForm(rank=rank, targets=("query_key_value",))
        tuning = make_tuning(form, end=1, config=config, size=1.0)
        span = BloomSpan(config, 0, torch.nn.ModuleList([torch.nn.Linear(1, 1)]))  # type: ignore[arg-type]
        x = torch.randn(32, width, generator=torch.Generator().manual_seed(rank))
        with torch.inference_mode():
            low_rank = ServedTuning(tuning, span).block(0, x.device).low_rank["query_key_value"]
            alone = torch.cat([low_rank(x[row : row + 1]) for row in range(32)])
            for rows in CHECKED_ROWS:
                assert torch.equal(low_rank(x[:rows]), alone[:rows])
                assert torch.equal(low_rank(x[-rows:]), alone[-rows:])
        expected = tuning.block(0, x.device).low_rank["query_key_value"](x)
        torch.testing.assert_close(alone, expected, rtol=1e-4, atol=1e-3)


async def test_prompts_follow_rows_that_change_places_and_their_padding() -> None:
    span, tuning, hidden = make_span(), make_tuning(BOTH), hidden_states(2, 12)
    pads = [0, 3]
    async with running(span) as engine:
        session = await engine.open_session(batch=2, max_length=12, pads=pads, tuning=tuning)
        await engine.step(session, hidden[:, :5], 0)  # the second row's prompts are not through
        swapped = await engine.step(session, hidden[:, 5:], 5, order=[1, 0])
    for row, old in enumerate([1, 0]):
        text = torch.cat([hidden[old : old + 1, pads[old] : 5], hidden[row : row + 1, 5:]], dim=1)
        expected = span(text, tuning=tuning)[:, 5 - pads[old] :]
        torch.testing.assert_close(swapped[row : row + 1], expected, rtol=1e-4, atol=1e-4)


async def test_every_block_with_a_tuning() -> None:
    span, tuning, hidden = make_span(), make_tuning(BOTH), hidden_states(2, 50)
    async with running(span, EngineSettings(chunk_tokens=40)) as engine:
        session = await engine.open_session(batch=2, max_length=50, tuning=tuning)
        given = await engine.step(session, hidden, 0, every_block=True)
        plain = await engine.step(session, hidden, 0)
    assert torch.equal(given[-1], plain)
    for last in (1, 2, 3):
        torch.testing.assert_close(given[last - 1], span(hidden, None, 0, 0, last, tuning), rtol=1e-4, atol=1e-4)


async def test_prefixes_are_shared_by_those_with_the_same_tuning_alone() -> None:
    span, hidden = make_span(), hidden_states(1, 80)
    tunings = [make_tuning(BOTH), make_tuning(BOTH), make_tuning(BOTH, seed=1), None]
    expected = [span(hidden, tuning=tuning) for tuning in tunings]
    gated = GatedSpan(span)
    gated.gate.set()
    async with running(gated, EngineSettings(chunk_tokens=40)) as engine:
        runs = []
        for tuning, want in zip(tunings, expected, strict=True):
            gated.runs.clear()
            session = await engine.open_session(batch=1, max_length=81, tuning=tuning)
            torch.testing.assert_close(await engine.step(session, hidden, 0), want, rtol=1e-4, atol=1e-4)
            runs.append(len(gated.runs))
        assert runs[1] == 0 and all(runs[number] for number in (0, 2, 3))
        assert len(engine._tunings()) == 2  # what is the same is there once


async def test_a_tuning_lasts_as_long_as_its_sessions() -> None:
    span = make_span()
    tuning, other = make_tuning(QKV), make_tuning(QKV, seed=1)
    size = tuning.n_bytes
    settings = EngineSettings(tuning_bytes=3 * size, tuning_bytes_per_peer=2 * size)
    async with running(span, settings) as engine:
        first = await engine.open_session(batch=1, max_length=8, peer="a", tuning=tuning)
        second = await engine.open_session(batch=1, max_length=8, peer="a", tuning=make_tuning(QKV))
        await engine.open_session(batch=1, max_length=8, peer="a", tuning=other)
        with pytest.raises(EngineBusy, match="your sessions add"):
            await engine.open_session(batch=1, max_length=8, peer="a", tuning=make_tuning(QKV, seed=2))
        await engine.open_session(batch=1, max_length=8, peer="b", tuning=tuning)  # the same, and it is there
        with pytest.raises(EngineBusy, match="what sessions add"):
            await engine.open_session(batch=1, max_length=8, peer="c", tuning=make_tuning(BOTH, seed=2))
        with pytest.raises(BadInput) as caught:
            await engine.open_session(batch=1, max_length=8, peer="c", tuning=make_tuning(ALL))
        assert caught.value.code == "too-long"
        await engine.close_session(first)
        expected = span(hidden_states(1, 1), tuning=tuning)  # the second session still has it
        torch.testing.assert_close(await engine.step(second, hidden_states(1, 1), 0), expected, rtol=1e-4, atol=1e-4)
        for session in list(engine._sessions):
            await engine.close_session(session)
        await engine.measure(1)
        assert not engine._tunings() and not engine._making


async def test_a_peer_gets_no_more_by_opening_all_sessions_at_once() -> None:
    size, opened, refused = make_tuning(QKV).n_bytes, list[int](), list[EngineBusy]()
    async with running(make_span(), EngineSettings(tuning_bytes=9 * size, tuning_bytes_per_peer=2 * size)) as engine:

        async def open_one(seed: int) -> None:
            try:
                opened.append(
                    await engine.open_session(batch=1, max_length=8, peer="a", tuning=make_tuning(QKV, seed=seed))
                )
            except EngineBusy as error:
                refused.append(error)

        async with trio.open_nursery() as nursery:
            for seed in (0, 1, 2, 3, 0, 1):
                nursery.start_soon(open_one, seed)
        assert len(engine._tunings("a")) == 2
        assert len(refused) >= 2 and all("your sessions add" in str(error) for error in refused)
        assert not engine._making


async def test_bad_tunings_are_refused_before_anything_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = BloomConfig(vocab_size=16, hidden_size=128, n_layer=3, n_head=4)
    bad = make_tuning(BOTH).flat()
    bad[7] = float("inf")
    cases: list[tuple[SpanTuning, dict[str, int], str]] = [
        (make_tuning(QKV, config=wide), {}, "bad-shape"),
        (make_tuning(QKV, end=2), {}, "bad-value"),
        (make_tuning(QKV, start=1), {"end": 1}, "bad-value"),
        (SpanTuning.from_flat(BOTH, CONFIG, 0, 3, bad), {}, "not-finite"),
    ]
    async with running(make_span()) as engine:
        for tuning, blocks, code in cases:
            with pytest.raises(BadInput) as caught:
                await engine.open_session(batch=1, max_length=8, end=blocks.get("end"), tuning=tuning)
            assert caught.value.code == code

        def full(*_: object) -> None:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

        monkeypatch.setattr("compute.tuning._serve", full)
        with pytest.raises(OutOfCache):
            await engine.open_session(batch=1, max_length=8, tuning=make_tuning(BOTH))
        assert (engine.stats.sessions, len(engine._making), len(engine._tunings())) == (0, 0, 0)


async def test_what_a_tuning_makes_infinite_ends_that_session_alone() -> None:
    span, outcomes = GatedSpan(), dict[str, Any]()
    huge = make_tuning(QKV, size=1e18)
    async with running(span) as engine:
        sessions = {
            "huge": await engine.open_session(batch=1, max_length=8, tuning=huge),
            "tuned": await engine.open_session(batch=1, max_length=8, tuning=make_tuning(QKV)),
            "plain": await engine.open_session(batch=1, max_length=8),
            "first": await engine.open_session(batch=1, max_length=8),
        }

        async def step(name: str) -> None:
            try:
                outcomes[name] = await engine.step(sessions[name], hidden_states(1, 2), 0)
            except Exception as error:
                outcomes[name] = error

        async with trio.open_nursery() as nursery:
            nursery.start_soon(step, "first")
            await span.wait_entered()
            for name in ("huge", "tuned", "plain"):
                nursery.start_soon(step, name)
            await trio.testing.wait_all_tasks_blocked()
            span.gate.set()
        assert getattr(outcomes["huge"], "code", "") == "bad-output"
        assert engine.stats.sessions == 3
        assert torch.equal(outcomes["plain"], outcomes["first"])
        alone = await talk(engine, hidden_states(1, 2), [], tuning=make_tuning(QKV))
        assert torch.equal(outcomes["tuned"], alone)


def test_graphs_are_for_batches_without() -> None:
    span, tuning = make_span(), make_tuning(BOTH)
    played: list[int] = []

    def record(function: Any) -> Any:
        def replay() -> None:
            played.append(1)
            function()

        return replay

    span.graphs = [SpanGraphs(span, record)]
    served = ServedTuning(tuning, span)
    hidden = hidden_states(1, 2)
    with torch.inference_mode():
        for added, count in ((None, 4), (served, 0)):
            played.clear()
            given = span.decode(hidden, KVCache.alone(span, 1, 4), 0, added)
            assert len(played) == count
            torch.testing.assert_close(given, span(hidden, tuning=added), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_a_tuning_is_wherever_a_block_is() -> None:
    one, hidden, pads = make_span(linear=None), hidden_states(2, 5), torch.tensor([0, 2])
    for form in FORMS:
        tuning = make_tuning(form)
        expected = one(hidden, tuning=tuning)
        padded = one(hidden, KVCache.alone(one, 2, 5, pads), tuning=tuning)
        with fake_gpus():
            several = on_gpus(one, [FIRST, SECOND, SECOND])
            served = ServedTuning(tuning, several)
            given = several(hidden.to(FIRST), tuning=tuning)
            steps = [Step(hidden.to(FIRST), KVCache.alone(several, 2, 5, each), 0, served) for each in (None, pads)]
            decoded = several.steps(steps)
            assert {each.device for each in (given, *decoded)} == {SECOND}
            given, *decoded = (each.cpu() for each in (given, *decoded))
        torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(decoded[0], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(decoded[1], padded, rtol=1e-4, atol=1e-4)

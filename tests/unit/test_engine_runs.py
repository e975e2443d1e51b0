"""A step of a few tokens has the bits of as many steps of one, in what it gives and in what it leaves behind."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compute.bloom import BloomBlock, BloomConfig, BloomSpan, quantize
from compute.cache import KVCache
from compute.engine import Engine, EngineSettings
from compute.tuning import TARGETS, ServedTuning, SpanTuning, TuningForm
from tests.unit.engines import CONFIG, GatedSpan, hidden_states, make_span, running
from tests.unit.tunings import ALL, BOTH, PROMPTS, make_tuning

MOST = 32  # tokens of a decode step, rows counted apart
SPANS = {name: make_span(linear=name) for name in ("fp32", "fp16", "int8")}
TUNINGS = [make_tuning(ALL), make_tuning(BOTH), make_tuning(BOTH, seed=1), make_tuning(PROMPTS)]
WIDE = BloomConfig(vocab_size=16, hidden_size=1024, n_layer=1, n_head=16)  # as in bloom-560m


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Talk:
    """What a session is asked: a prompt, and then so many tokens a step."""

    def __init__(
        self, rows: int, prompt: int, runs: list[int], seed: int, padded: bool, tuning: SpanTuning | None = None
    ) -> None:
        self.rows, self.prompt, self.tuning = rows, prompt, tuning
        self.pads = [row % (prompt + 1) for row in range(rows)] if padded else None
        self.runs = [min(tokens, MOST // rows) for tokens in runs]
        new = hidden_states(rows, sum(self.runs), seed=100 + seed)
        self.hidden = torch.cat([hidden_states(rows, 90, seed=seed)[:, :prompt], new], dim=1)  # [b, t, d]

    async def hold(self, engine: Engine, runs: list[int]) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
        """What it is given, token by token, and its keys and values in the end."""
        length = self.hidden.shape[1]
        session = await engine.open_session(batch=self.rows, max_length=length, pads=self.pads, tuning=self.tuning)
        cuts = itertools.accumulate([self.prompt, *runs])
        given: list[Tensor] = []
        for start, end in itertools.pairwise([0, *cuts] if self.prompt else cuts):
            given += (await engine.step(session, self.hidden[:, start:end], start)).unbind(1)
        place = engine._slots.place(session)
        assert place.slot is not None
        shared = None if place.shared_slot is None else engine._runner._memory[place.shared_slot]
        cache = KVCache(engine._runner._memory[place.slot], shared, place.shared)
        nothing = torch.empty(self.rows, CONFIG.n_head, 0, CONFIG.head_dim)
        with torch.inference_mode():
            layers = [cache.extend(index, nothing, nothing, length) for index in range(3)]
            return given, [(keys.clone(), values.clone()) for keys, values in layers]


TALKS = st.lists(
    st.builds(
        Talk,
        rows=st.integers(1, 4),
        prompt=st.sampled_from([0, 1, 7, 33, 60, 90]),
        runs=st.lists(st.sampled_from([1, 2, 3, 5, 8, 31, 32]), min_size=1, max_size=4),
        seed=st.integers(0, 1),  # some prompts begin alike, and share a prefix
        padded=st.booleans(),
        tuning=st.sampled_from([None, None, *TUNINGS]),
    ),
    min_size=1,
    max_size=4,
)


async def scenario(span: BloomSpan, talks: list[Talk]) -> None:
    options = EngineSettings(chunk_tokens=40)
    async with running(span, options) as engine:
        expected = [await talk.hold(engine, [1] * sum(talk.runs)) for talk in talks]
    given: dict[int, tuple[list[Tensor], list[tuple[Tensor, Tensor]]]] = {}
    gated = GatedSpan(span)
    async with running(gated, options) as engine:

        async def hold(number: int) -> None:
            given[number] = await talks[number].hold(engine, talks[number].runs)

        async with trio.open_nursery() as nursery:
            for number in range(len(talks)):
                nursery.start_soon(hold, number)
            await gated.wait_entered()
            gated.gate.set()
    for number, (tokens, layers) in enumerate(expected):
        assert all(map(torch.equal, given[number][0], tokens))
        for mine, theirs in zip(given[number][1], layers, strict=True):
            assert all(map(torch.equal, mine, theirs))


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(sorted(SPANS)), talks=TALKS)
def test_runs_of_tokens_have_the_bits_of_single_ones(name: str, talks: list[Talk]) -> None:
    trio.run(scenario, SPANS[name], talks)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("name", "rank"), [*((name, 0) for name in sorted(SPANS)), ("fp32", 8), ("fp16", 5)])
@torch.inference_mode()
def test_so_they_have_in_a_wide_block_after_many_tokens(name: str, rank: int, threads: int) -> None:
    """Attention takes keys in pieces of 512."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    span = BloomSpan(WIDE, 0, [BloomBlock(WIDE)]).requires_grad_(False)
    for parameter in span.parameters():
        parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    quantize(span, name)
    form = TuningForm(rank=rank, targets=TARGETS if rank else (), prompts=510)
    tuning = ServedTuning(make_tuning(form, end=1, config=WIDE, size=0.05), span) if rank else None
    before = [torch.randn(2, 16, 1100, 64, generator=generator) for _ in "kv"]
    for position, tokens in [(0, 16), (61, 5), (505, 16), (1018, 9)]:
        hidden = torch.randn(2, tokens, 1024, generator=generator)
        caches = [KVCache.alone(span, 2, 1100) for _ in range(2)]
        for cache in caches:
            for kept, values in zip(cache.own.layers[0], before, strict=True):
                kept.copy_(values)
        singly = [
            span.decode(hidden[:, index : index + 1], caches[0], position + index, tuning) for index in range(tokens)
        ]  # [2, 1, d] each
        assert torch.equal(span.decode(hidden, caches[1], position, tuning), torch.cat(singly, dim=1))
        assert all(map(torch.equal, caches[0].own.layers[0], caches[1].own.layers[0]))
    torch.set_num_threads(1)

"""What the engine gives is what transformers gives: with padding, for beams, after every block."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
import torch
from torch import Tensor
from transformers import BloomForCausalLM, DynamicCache

from compute.bloom.head import Embeddings, Head
from compute.engine import Engine, EngineSettings
from compute.models import find_checkpoint
from tests.unit.engines import running

MAX_ERROR = 1e-5  # of the largest number: logits are some 20, and float32 has seven digits
TINY = find_checkpoint("bloom-tiny")
BLOCKS = 8


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def reference() -> BloomForCausalLM:
    folder = TINY.file("config.json").parent
    model: BloomForCausalLM = BloomForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.train(False)


class Served:
    """bloom-tiny, its blocks in an engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.embeddings: Embeddings = TINY.load_embeddings()
        self.head: Head = TINY.load_head()

    async def logits(self, session: int, ids: Tensor, position: int, order: list[int] | None = None) -> Tensor:
        with torch.inference_mode():
            hidden = await self.engine.step(session, self.embeddings(ids), position, order)
            return self.head(hidden)  # type: ignore[no-any-return]  # a module's call


@asynccontextmanager
async def serving() -> AsyncIterator[Served]:
    options = EngineSettings(chunk_tokens=40)
    async with running(TINY.load_span(0, BLOCKS, linear="fp32"), options) as engine:
        yield Served(engine)


def random_ids(rows: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(4, 2000, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def mask_of(pads: list[int], tokens: int) -> Tensor:
    """[b, t], as transformers has it."""
    return (torch.arange(tokens) >= torch.tensor(pads)[:, None]).long()


def error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1.0))


@pytest.mark.parametrize("tokens", [9, 60])  # one by one, and in chunks
async def test_rows_with_padding(tokens: int, reference: BloomForCausalLM) -> None:
    pads = [0, 3, tokens - 1]
    ids, mask = random_ids(3, tokens + 6), mask_of(pads, tokens + 6)
    with torch.inference_mode():
        expected = reference(ids, attention_mask=mask).logits
    async with serving() as served:
        session = await served.engine.open_session(batch=3, max_length=tokens + 6, pads=pads)
        parts = [await served.logits(session, ids[:, :tokens], 0)]
        for start, end in [(tokens, tokens + 1), (tokens + 1, tokens + 2), (tokens + 2, tokens + 6)]:
            parts.append(await served.logits(session, ids[:, start:end], start))
    ours = torch.cat(parts, dim=1)
    for row, pad in enumerate(pads):
        assert error(ours[row, pad:], expected[row, pad:]) <= MAX_ERROR


async def test_text_with_padding(reference: BloomForCausalLM) -> None:
    """Ids for ids, greedily."""
    pads, new = [0, 11, 4], 24
    ids = random_ids(3, 16, seed=1)
    expected = reference.generate(
        ids, attention_mask=mask_of(pads, 16), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=3
    )
    async with serving() as served:
        session = await served.engine.open_session(batch=3, max_length=64, pads=pads)
        logits = await served.logits(session, ids, 0)
        for position in range(16, 16 + new):
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
            logits = await served.logits(session, ids[:, -1:], position)
    assert torch.equal(ids, expected)


@pytest.mark.parametrize("pads", [[0, 0, 0, 0], [0, 2, 2, 7]])
async def test_rows_that_change_places(pads: list[int], reference: BloomForCausalLM) -> None:
    """As beam search has them do, at random, for 20 steps; those of one prompt or of several."""
    generator = torch.Generator().manual_seed(2)
    ids, mask = random_ids(4, 12, seed=3), mask_of(pads, 12)
    cache = DynamicCache()
    async with serving() as served:
        session = await served.engine.open_session(batch=4, max_length=32, pads=pads)
        ours = await served.logits(session, ids, 0)
        with torch.inference_mode():
            theirs = reference(ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits
        for row, pad in enumerate(pads):
            assert error(ours[row, pad:], theirs[row, pad:]) <= MAX_ERROR
        for position in range(12, 32):
            order = torch.randint(0, 4, (4,), generator=generator)
            new = random_ids(4, 1, seed=position)
            with torch.inference_mode():
                cache.reorder_cache(order)
                mask = torch.cat([mask[order], torch.ones(4, 1, dtype=torch.int64)], dim=1)
                theirs = reference(new, attention_mask=mask, past_key_values=cache, use_cache=True).logits
            ours = await served.logits(session, new, position, order.tolist())
            assert error(ours, theirs) <= MAX_ERROR


@pytest.mark.parametrize("pads", [None, [0, 5]])
async def test_what_every_block_gives(pads: list[int] | None, reference: BloomForCausalLM) -> None:
    """In chunks, in short steps and single tokens; transformers' last one has gone through the final layer norm."""
    ids = random_ids(2, 80, seed=4)
    mask = mask_of(pads or [0, 0], 80)
    with torch.inference_mode():
        expected = reference(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    cuts = [(0, 70), (70, 71), (71, 80)]
    async with serving() as served:
        engine = served.engine
        session = await engine.open_session(batch=2, max_length=80, pads=pads)
        plain = await engine.open_session(batch=2, max_length=80, pads=pads)
        parts = []
        with torch.inference_mode():
            embedded = served.embeddings(ids)
        for start, end in cuts:
            states = await engine.step(session, embedded[:, start:end], start, every_block=True)
            assert states.shape == (BLOCKS, 2, end - start, embedded.shape[2])
            assert torch.equal(states[-1], await engine.step(plain, embedded[:, start:end], start))
            parts.append(states)
        assert engine.stats.lone_steps == 0
    states = torch.cat(parts, dim=2)  # [n, b, t, d]
    with torch.inference_mode():
        ours = [embedded, *states[:-1], served.head.ln_f(states[-1])]
    for mine, theirs in zip(ours, expected, strict=True):
        for row, pad in enumerate(pads or [0, 0]):
            assert error(mine[row, pad:], theirs[row, pad:]) <= MAX_ERROR

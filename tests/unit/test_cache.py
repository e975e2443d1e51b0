"""Memory of slots: what is written, copied, put together and zeroed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compute.bloom import BloomBlock, BloomConfig, BloomSpan
from compute.cache import KVCache, SlotMemory, free_cache_tokens

CONFIG = BloomConfig(vocab_size=16, hidden_size=8, n_layer=2, n_head=2)
SPAN = BloomSpan(CONFIG, 0, [BloomBlock(CONFIG), BloomBlock(CONFIG)]).requires_grad_(False)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_memory_is_zeroed_at_first_and_at_the_end() -> None:
    memory = SlotMemory(SPAN, 3, 20)
    parts = [part for layer in memory.layers for part in layer]
    assert [tuple(part.shape) for part in parts] == [(3, 2, 20, 4)] * 4
    assert not any(part.any() for part in parts)
    cache = KVCache(memory)
    SPAN(normal(3, 7, 8), cache)
    assert memory.written == 7
    assert all(part[:, :, :7].any() and not part[:, :, 7:].any() for part in parts)
    memory.outputs[7] = normal(3, 7, 8)
    memory.wipe()
    assert not any(part.any() for part in parts)
    assert (memory.layers, memory.outputs) == ([], {})


def test_going_back_does_not_hide_what_is_to_be_zeroed() -> None:
    cache = KVCache.alone(SPAN, 1, 20)
    parts = [part for layer in cache.own.layers for part in layer]
    SPAN(normal(1, 9, 8), cache)
    SPAN(normal(1, 2, 8), cache)
    cache.own.wipe()
    assert not any(part.any() for part in parts)


def test_a_longer_slot_takes_tokens_over() -> None:
    hidden = normal(2, 12, 8)
    whole = SPAN(hidden, KVCache.alone(SPAN, 2, 12))
    short, longer = KVCache.alone(SPAN, 2, 8), KVCache.alone(SPAN, 2, 16)
    SPAN(hidden[:, :8], short)
    longer.own.copy(short.own, 0, 0, 8)
    torch.testing.assert_close(SPAN(hidden[:, 8:], longer, 8), whole[:, 8:])


def test_rows_may_change_places_on_the_way() -> None:
    hidden = normal(3, 5, 8)
    old, new = KVCache.alone(SPAN, 3, 8), KVCache.alone(SPAN, 3, 8)
    SPAN(hidden, old)
    order = torch.tensor([2, 0, 2])
    new.own.copy(old.own, 0, 0, 5, order)
    for mine, theirs in zip(new.own.layers, old.own.layers, strict=True):
        assert torch.equal(mine[0][:, :, :5], theirs[0][order][:, :, :5])
        assert torch.equal(mine[1][:, :, :5], theirs[1][order][:, :, :5])


@pytest.mark.parametrize("shared", [1, 6, 9])
def test_tokens_in_two_slots_give_the_bits_of_one(shared: int) -> None:
    hidden = normal(2, 12, 8)
    one, first = KVCache.alone(SPAN, 2, 64), KVCache.alone(SPAN, 2, 32)
    SPAN(hidden[:, :shared], one)
    SPAN(hidden[:, :shared], first)
    before = [part.clone() for layer in first.own.layers for part in layer]
    two = KVCache(SlotMemory(SPAN, 2, 16), first.own, shared)
    for start, end in ((shared, 10), (10, 11), (11, 12)):
        assert torch.equal(SPAN(hidden[:, start:end], two, start), SPAN(hidden[:, start:end], one, start))
    assert two.own.written == 12 - shared
    assert all(torch.equal(a, b) for a, b in zip(before, (p for layer in first.own.layers for p in layer), strict=True))


def test_the_cache_is_as_large_as_the_memory_for_it() -> None:
    token_bytes = (2 * 2 + 1) * 8 * 4
    assert free_cache_tokens(SPAN, lambda device: 500 * token_bytes) == 500
    assert free_cache_tokens(SPAN, lambda device: 0) == 1

"""Caches grow by need, within one budget, and go back by position."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compute.bloom import BloomBlock, BloomConfig, BloomSpan
from compute.cache import CacheBudget, KVCache
from compute.errors import BadInput, OutOfCache

CONFIG = BloomConfig(vocab_size=16, hidden_size=8, n_layer=2, n_head=2)


def make_span() -> BloomSpan:
    return BloomSpan(CONFIG, 0, [BloomBlock(CONFIG), BloomBlock(CONFIG)])


SPAN = make_span()


def advance(cache: KVCache, position: int, tokens: int) -> None:
    cache.prepare(position, tokens)
    cache.commit(position + tokens)


def test_nothing_is_taken_before_the_first_token() -> None:
    budget = CacheBudget(1000)
    cache = KVCache(SPAN, budget, batch=2, max_length=500)
    assert (cache.capacity, cache.length, budget.used_tokens) == (0, 0, 0)


def test_capacity_doubles_up_to_the_longest() -> None:
    budget = CacheBudget(1000)
    cache = KVCache(SPAN, budget, batch=2, max_length=200)
    capacities = []
    for position in range(200):
        advance(cache, position, 1)
        capacities.append(cache.capacity)
        assert budget.used_tokens == 2 * cache.capacity
    assert sorted(set(capacities)) == [64, 128, 200]
    keys, values = cache.layer(1)
    assert keys.shape == values.shape == (2, 2, 200, 4)


def test_growth_keeps_what_is_written_and_zeroes_the_rest() -> None:
    cache = KVCache(SPAN, CacheBudget(1000), batch=1, max_length=200)
    cache.prepare(0, 64)
    for index in range(2):
        for part in cache.layer(index):
            part.fill_(index + 1.0)
    cache.commit(64)
    advance(cache, 60, 70)
    for index in range(2):
        for part in cache.layer(index):
            assert torch.all(part[:, :, :60] == index + 1.0)
            assert torch.all(part[:, :, 64:] == 0.0)


def test_growth_takes_just_enough_where_twice_is_too_much() -> None:
    budget = CacheBudget(100)
    cache = KVCache(SPAN, budget, batch=1, max_length=200)
    advance(cache, 0, 64)
    advance(cache, 64, 10)
    assert (cache.capacity, budget.free_tokens) == (74, 26)


def test_a_full_budget_leaves_the_session_as_it_was() -> None:
    budget = CacheBudget(150)
    one = KVCache(SPAN, budget, batch=1, max_length=200)
    other = KVCache(SPAN, budget, batch=1, max_length=200)
    advance(one, 0, 100)
    with pytest.raises(OutOfCache, match="50 of 150 are free") as caught:
        advance(other, 0, 51)
    assert caught.value.code == "out-of-cache"
    assert (other.length, other.capacity, budget.used_tokens) == (0, 0, 100)
    with pytest.raises(OutOfCache):
        advance(one, 50, 101)
    assert (one.length, one.capacity) == (100, 100)
    one.close()
    advance(other, 0, 51)


def test_memory_that_torch_cannot_get_is_out_of_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*args: object, **kwargs: object) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    budget = CacheBudget(1000)
    cache = KVCache(SPAN, budget, batch=1, max_length=200)
    advance(cache, 0, 10)
    monkeypatch.setattr(torch, "zeros", no_memory)
    with pytest.raises(OutOfCache, match="no memory"):
        advance(cache, 10, 100)
    assert (cache.length, cache.capacity, budget.used_tokens) == (10, 64, 64)


def test_a_gap_is_refused_and_going_back_is_not() -> None:
    cache = KVCache(SPAN, CacheBudget(1000), batch=1, max_length=50)
    advance(cache, 0, 10)
    with pytest.raises(BadInput) as caught:
        advance(cache, 11, 1)
    assert caught.value.code == "bad-position"
    with pytest.raises(BadInput):
        advance(cache, -1, 1)
    advance(cache, 3, 2)
    assert cache.length == 5


def test_the_end_and_the_empty_step_are_refused() -> None:
    cache = KVCache(SPAN, CacheBudget(1000), batch=1, max_length=10)
    with pytest.raises(BadInput) as caught:
        advance(cache, 0, 11)
    assert caught.value.code == "too-long"
    with pytest.raises(BadInput) as caught:
        advance(cache, 0, 0)
    assert caught.value.code == "bad-shape"


def test_a_step_without_commit_is_as_if_gone_back() -> None:
    cache = KVCache(SPAN, CacheBudget(1000), batch=1, max_length=10)
    advance(cache, 0, 6)
    cache.prepare(4, 3)
    assert cache.length == 4
    with pytest.raises(ValueError, match="cannot commit"):
        cache.commit(3)


def test_closing_gives_everything_back_once() -> None:
    budget = CacheBudget(100)
    cache = KVCache(SPAN, budget, batch=1, max_length=50)
    advance(cache, 0, 5)
    cache.close()
    cache.close()
    assert budget.used_tokens == 0
    with pytest.raises(BadInput) as caught:
        advance(cache, 0, 1)
    assert caught.value.code == "no-session"


def test_nonsense_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="max_tokens"):
        CacheBudget(0)
    with pytest.raises(ValueError, match="at least 1"):
        KVCache(SPAN, CacheBudget(1), batch=0, max_length=1)
    with pytest.raises(ValueError, match="cannot reserve"):
        CacheBudget(1).reserve(-1)
    with pytest.raises(ValueError, match="cannot release"):
        CacheBudget(1).release(1)


STEPS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 130), st.integers(1, 130), st.booleans()), max_size=30)


@given(steps=STEPS)
def test_the_budget_is_what_sessions_hold(steps: list[tuple[int, int, int, bool]]) -> None:
    budget = CacheBudget(300)
    caches = [KVCache(SPAN, budget, batch=batch, max_length=128) for batch in (1, 2, 3)]
    for index, position, tokens, close in steps:
        cache = caches[index]
        if close:
            cache.close()
        else:
            before = cache.length
            try:
                advance(cache, position, tokens)
            except (BadInput, OutOfCache):
                assert cache.length == before
        assert 0 <= cache.length <= cache.capacity <= cache.max_length
        assert budget.used_tokens == sum(cache.batch * cache.capacity for cache in caches) <= 300

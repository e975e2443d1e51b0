"""Which devices there are, what fits onto them, and how blocks are dealt out."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compute.devices import default_dtype, read_devices, split_blocks
from compute.memory import cache_bytes, free_bytes

CPU = torch.device("cpu")
FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)
GIB = 1 << 30


def have_gpus(patch: pytest.MonkeyPatch, count: int, *, built: bool = True) -> None:
    patch.setattr(torch.backends.cuda, "is_built", lambda: built)
    patch.setattr(torch.cuda, "is_available", lambda: count > 0)
    patch.setattr(torch.cuda, "device_count", lambda: count)


# Devices


def test_devices_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    have_gpus(monkeypatch, 2)
    assert read_devices("auto") == read_devices("cuda") == (FIRST, SECOND)
    assert read_devices("cpu") == (CPU,)
    assert read_devices("cuda:1") == (SECOND,)
    assert read_devices("cuda:1, cuda:0") == (SECOND, FIRST)


def test_without_a_gpu_auto_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for built in (False, True):
        have_gpus(monkeypatch, 0, built=built)
        assert read_devices("auto") == read_devices("cpu") == (CPU,)


@pytest.mark.parametrize("text", ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "cuda:0,", "auto,cuda:0"])
def test_nonsense_names_no_devices(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    have_gpus(monkeypatch, 2)
    with pytest.raises(ValueError, match="names no devices; say auto, cpu, cuda, or GPUs such as cuda:0,cuda:1"):
        read_devices(text)


def test_devices_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    have_gpus(monkeypatch, 2)
    with pytest.raises(ValueError, match="there is no cuda:2 here; choose from cuda:0, cuda:1"):
        read_devices("cuda:0,cuda:2")
    with pytest.raises(ValueError, match="named twice"):
        read_devices("cuda:0,cuda:0")
    for text in ("cuda", "cuda:0"):
        have_gpus(monkeypatch, 0)
        with pytest.raises(ValueError, match="torch finds no GPU; see whether nvidia-smi does"):
            read_devices(text)
        have_gpus(monkeypatch, 0, built=False)
        with pytest.raises(ValueError, match="torch was installed without support for GPUs"):
            read_devices(text)


def test_the_cpu_beside_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    have_gpus(monkeypatch, 2)
    with pytest.raises(ValueError, match="blocks are on GPUs or on the CPU"):
        read_devices("cpu,cuda:0")


def test_dtypes_of_devices() -> None:
    assert (default_dtype(CPU), default_dtype(SECOND)) == (torch.float32, torch.bfloat16)


# Blocks


def test_devices_alike_get_as_many_blocks() -> None:
    assert split_blocks(8, [100, 100], 10) == [(0, 4), (4, 8)]
    assert split_blocks(8, [100, 100, 100], 10) == [(0, 3), (3, 6), (6, 8)]
    assert split_blocks(5, [100], 10) == [(0, 5)]


def test_who_has_more_memory_gets_more_blocks() -> None:
    assert split_blocks(40, [80, 24], 1) == [(0, 31), (31, 40)]
    assert split_blocks(3, [10, 100, 10], 10) == [(0, 0), (0, 3), (3, 3)]


def test_blocks_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"7 blocks of 1\.0 GB do not fit into the 4\.0 \+ 2\.9 GB .* serve fewer"):
        split_blocks(7, [4_000_000_000, 2_900_000_000], 1_000_000_000)
    assert split_blocks(6, [4_000_000_000, 2_900_000_000], 1_000_000_000) == [(0, 4), (4, 6)]
    for blocks, free in ((0, [1]), (1, [])):
        with pytest.raises(ValueError, match="blocks for"):
            split_blocks(blocks, free, 1)


@given(st.integers(1, 7), st.lists(st.integers(0, 60), min_size=1, max_size=3), st.integers(1, 12))
def test_no_other_split_leaves_blocks_more(n_blocks: int, free: list[int], block_bytes: int) -> None:
    """Where one has the least, against every other way of dealing them out."""

    def least(counts: tuple[int, ...]) -> float:
        return min(have / count for have, count in zip(free, counts, strict=True) if count)

    every = itertools.product(range(n_blocks + 1), repeat=len(free))
    best = max(least(counts) for counts in every if sum(counts) == n_blocks)
    try:
        pieces = split_blocks(n_blocks, free, block_bytes)
    except ValueError:
        assert best < block_bytes
        return
    assert [pieces[0][0], *(end for _, end in pieces)] == [0, *(start for start, _ in pieces[1:]), n_blocks]
    assert least(tuple(end - start for start, end in pieces)) == best >= block_bytes


# Memory


@pytest.mark.parametrize(("total", "reserve"), [(8 * GIB, GIB // 2), (100 * GIB, 5 * GIB)])
def test_free_memory_of_a_gpu_is_what_torch_can_have_without_a_reserve(
    total: int, reserve: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = {FIRST: (3 * GIB, 1 * GIB, 0), SECOND: (0, 0, 0)}  # free, reserved by torch, used of it
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (held[device][0], total))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: held[device][1])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: held[device][2])
    assert free_bytes(FIRST) == max(0, 4 * GIB - reserve)
    assert free_bytes(SECOND) == 0
    assert cache_bytes(FIRST) == int(free_bytes(FIRST) * 2 / 3)


def test_half_of_the_cpus_memory_is_for_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compute.memory.free_bytes", lambda device: 1000)
    assert cache_bytes(CPU) == 500

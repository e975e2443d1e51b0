"""Which devices a node computes on, and which of a span's blocks lie where."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

import torch

_GB: Final = 1e9
_BLOCKS_PART: Final = 0.7  # of free memory
_CUDA: Final = re.compile(r"cuda:([0-9]{1,3})")


def read_devices(text: str) -> tuple[torch.device, ...]:
    """The devices that a user means.

    Args:
        text: ``auto``: all GPUs, or the CPU where there is none; ``cpu``; ``cuda``: all GPUs; ``cuda:0,cuda:2``:
            these, in this order.

    Raises:
        ValueError: It is none of these, or there are no such GPUs; the message is one line that says what to do.
    """
    names = [name.strip() for name in text.split(",")]
    if names == ["cpu"] or (names == ["auto"] and not torch.cuda.is_available()):
        return (torch.device("cpu"),)
    chosen = None if names in (["auto"], ["cuda"]) else [_index(name, text) for name in names]
    there = _gpus()
    if chosen is None:
        return there
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"{text:.60}: a GPU is named twice; name each once")
    missing = [index for index in chosen if index >= len(there)]
    if missing:
        known = ", ".join(str(device) for device in there)
        raise ValueError(f"there is no cuda:{missing[0]} here; choose from {known}")
    return tuple(there[index] for index in chosen)


def _index(name: str, text: str) -> int:
    match = _CUDA.fullmatch(name)
    if match is None and name == "cpu":
        raise ValueError(f"{text!r:.60}: blocks are on GPUs or on the CPU; say cpu, or GPUs alone")
    if match is None:
        raise ValueError(f"{text!r:.60} names no devices; say auto, cpu, cuda, or GPUs such as cuda:0,cuda:1")
    return int(match[1])


def _gpus() -> tuple[torch.device, ...]:
    if not torch.backends.cuda.is_built():
        raise ValueError(
            "torch was installed without support for GPUs; install it with that (https://pytorch.org/get-started), "
            "or say cpu"
        )
    if not torch.cuda.is_available():
        raise ValueError("torch finds no GPU; see whether nvidia-smi does, and install its driver, or say cpu")
    return tuple(torch.device("cuda", index) for index in range(torch.cuda.device_count()))


def default_dtype(device: torch.device) -> torch.dtype:
    """Of hidden states, norms and cache: what a device computes fast without going out of range."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def count_fitting(free_bytes: Sequence[int], block_bytes: int) -> int:
    """How many blocks devices should take that nobody has given a number; at least one.

    Args:
        free_bytes: On each device. Blocks get their part of it, and sessions' caches and work the rest.
        block_bytes: Of a block's weights.
    """
    return max(1, sum(int(_BLOCKS_PART * free) // block_bytes for free in free_bytes))


def split_blocks(n_blocks: int, free_bytes: Sequence[int], block_bytes: int) -> list[tuple[int, int]]:
    """Cut a span into one run of blocks for each device, so that a block has as much memory as possible where it has
    least: what blocks leave is for their caches, and a session is as long as the tightest device allows.

    Args:
        n_blocks: In the span.
        free_bytes: On each device.
        block_bytes: Of a block's weights.

    Returns:
        Blocks ``[start, end)`` of each device, counted from the span's start, one after another; none of a device that
        is left out.

    Raises:
        ValueError: They do not fit; or there is no block, or no device.
    """
    if n_blocks < 1 or not free_bytes:
        raise ValueError(f"{n_blocks} blocks for {len(free_bytes)} devices")
    counts = [0] * len(free_bytes)
    for _ in range(n_blocks):  # each to where blocks will still have most
        chosen = max(range(len(counts)), key=lambda device: free_bytes[device] / (counts[device] + 1))
        counts[chosen] += 1
    if any(count * block_bytes > free for count, free in zip(counts, free_bytes, strict=True)):
        gigabytes = " + ".join(f"{free / _GB:.1f}" for free in free_bytes)
        raise ValueError(
            f"{n_blocks} blocks of {block_bytes / _GB:.1f} GB do not fit into the {gigabytes} GB of memory that are "
            "free there; serve fewer, or in a smaller form"
        )
    ends = [sum(counts[: device + 1]) for device in range(len(counts))]
    return list(zip([0, *ends], ends, strict=False))

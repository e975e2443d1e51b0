"""How much memory is free, for the CPU and for GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_UNKNOWN_BYTES = 2 << 30  # where the system does not say
# Of a GPU, for what a step needs beside weights and cache (nf4 weights written out for a prompt: 1.6 GB at 176B's
# width; scores' biases; graphs), for what lies in pieces, and for the screen that hangs on some.
_RESERVE_BYTES: Final = 512 << 20
_RESERVE_PART: Final = 0.05
# Of what is free, for caches. A slot that grows is there twice until it has been copied, and the old one has half of
# the new one's length: with two thirds, even the one slot that has all of the cache can be had. On the CPU the rest is
# also for everybody else.
_CACHE_PART: Final = {"cpu": 1 / 2, "cuda": 2 / 3}


def free_bytes(device: torch.device) -> int:
    """Bytes that may be had without pushing anybody else out.

    On the CPU, under the limit of a container if there is one. On a GPU, with what torch holds without using it, and
    without a reserve.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return max(0, free + unused - max(_RESERVE_BYTES, int(_RESERVE_PART * total)))
    try:
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        free = _UNKNOWN_BYTES
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):  # none, or "max"
        return free
    return max(0, min(free, limit - used))


def cache_bytes(device: torch.device) -> int:
    """Of these, what sessions' caches may have."""
    return int(free_bytes(device) * _CACHE_PART[device.type])

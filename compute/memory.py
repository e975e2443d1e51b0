"""How much memory is free, for the CPU and for GPUs."""

from __future__ import annotations

from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_UNKNOWN_BYTES = 2 << 30  # where the system does not say


def free_bytes(device: torch.device) -> int:
    """Bytes that may be had without pushing anybody else out, under the limit of a container if there is one."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
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

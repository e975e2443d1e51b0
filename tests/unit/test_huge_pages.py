"""Weights in huge pages."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from compute import huge_pages
from compute.huge_pages import candidates, use_huge_pages

MIB = 1 << 20
SMAPS = """\
7f0000100000-7f0004100000 rw-p 00000000 00:00 0
Size:              65536 kB
Rss:               65536 kB
AnonHugePages:         0 kB
7f1000000000-7f1004000000 rw-p 00000000 00:00 0
Rss:               10000 kB
AnonHugePages:         0 kB
7f2000000000-7f2004000000 rw-p 00000000 00:00 0
Rss:               65536 kB
AnonHugePages:     65536 kB
7f3000000000-7f3004000000 r--p 00000000 00:00 0
Rss:               65536 kB
AnonHugePages:         0 kB
7f4000000000-7f4004000000 rw-p 00000000 fe:01 1234                       /usr/lib/some.so
Rss:               65536 kB
AnonHugePages:         0 kB
7f5000000000-7f5000300000 rw-p 00000000 00:00 0
Rss:                3072 kB
AnonHugePages:         0 kB
555500000000-555502000000 rw-p 00000000 00:00 0                          [heap]
Rss:               32768 kB
AnonHugePages:      2048 kB
"""


def test_what_is_collapsed() -> None:
    """Not what is hardly used, is done already, cannot be written, is a file's, or small."""
    found = list(candidates(SMAPS.splitlines()))
    assert found == [(0x7F0000200000, 0x7F0004000000), (0x555500000000, 0x555502000000)]


def in_huge_pages(tensor: torch.Tensor) -> int:
    """Bytes of the mapping in which it is."""
    at, inside = tensor.data_ptr(), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split(" ", 1)[0]
        if "-" in head and not head.endswith(":"):
            start, end = (int(part, 16) for part in head.split("-"))
            inside = start <= at < end
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) << 10
    return 0


def test_memory_is_the_same_in_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """That the system is asked for them; whether it has them to give is its affair."""
    asked = list[tuple[int, int]]()
    collapse = huge_pages._collapse

    def record(start: int, end: int) -> bool:
        asked.append((start, end))
        return collapse(start, end)

    monkeypatch.setattr(huge_pages, "_collapse", record)
    memory = mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_DONTDUMP)  # never one mapping with a neighbour that is hardly used
    weights = torch.frombuffer(memory, dtype=torch.float32)
    torch.arange(16 * MIB, dtype=torch.float32, out=weights)
    already = in_huge_pages(weights)
    done = use_huge_pages()
    if not asked:
        pytest.skip("this system has no huge pages, or has all in them")
    middle = weights.data_ptr() + 32 * MIB
    assert already >= 60 * MIB or any(start <= middle < end for start, end in asked)
    assert 0 <= done <= sum(end - start for start, end in asked)
    assert torch.equal(weights, torch.arange(16 * MIB, dtype=torch.float32))


def test_where_the_system_never_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "_ENABLED", tmp_path / "enabled")
    assert use_huge_pages() == 0
    (tmp_path / "enabled").write_text("always madvise [never]\n")
    assert use_huge_pages() == 0

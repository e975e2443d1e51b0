"""The lab leaves nothing behind: a lab within this lab is killed with SIGKILL at work, and nothing of it is left.

What can be left of it is processes, and what processes hold: namespaces, devices, rules and mounts end with the last
process that is in them. Names of namespaces lie in the inner lab's own ``/run``.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import trio

from interop.lab.machine import ROOT
from interop.lab.namespaces import NAMES
from interop.lab.probes import Finding, finding

AT_WORK = 5  # processes: the one that waits, the first one inside, the core, and two of our nodes
START_S = 20.0
END_S = 5.0
LOOK_S = 0.05


async def run() -> AsyncGenerator[Finding, None]:
    """All findings about the end of the lab."""
    for victim in ("the one outside", "the first one inside"):
        yield finding(f"killed {victim}: processes left", 0, await _left_without(victim))
    yield finding("names of namespaces left", [], sorted(os.listdir(NAMES)))


async def _left_without(victim: str) -> int:
    """Start a lab, kill one of its processes, and count the others after a while; -1 if it never came up."""
    before = _processes()
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "interop.lab", "--only", "dials"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
    )
    try:
        if not await _until(lambda: len(_processes() - before) >= AT_WORK, START_S):
            return -1
        inside = min(_processes() - before - {process.pid})
        os.kill(process.pid if victim == "the one outside" else inside, signal.SIGKILL)
        await _until(lambda: not _processes() - before, END_S)
        return len(_processes() - before)
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


def _processes() -> set[int]:
    """All that run; those that have ended and wait to be collected do not count."""
    found = set()
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                state = Path("/proc", name, "stat").read_text().rpartition(") ")[2][0]
            except OSError:  # it has ended meanwhile
                continue
            if state != "Z":
                found.add(int(name))
    return found


async def _until(condition: Callable[[], bool], within_s: float) -> bool:
    """Whether it has come true in time; nothing tells of processes that are not our children."""
    with trio.move_on_after(within_s):
        while True:
            if condition():
                return True
            await trio.sleep(LOOK_S)
    return False

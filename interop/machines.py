"""Programs on machines of the simulated internet: our node, and foreign peers' command lines."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import trio

from interop import lab
from interop.lab import namespaces
from interop.lab.asking import Asked

RELAY = ["raceme", "relay", "--json", "--until-eof", "--no-mdns", "--no-port-mapping"]


def on(machine: lab.Machine) -> list[str]:
    """How a command line begins that is to run there."""
    return ["nsenter", f"--net={namespaces.path(machine.name)}", "--"]


@asynccontextmanager
async def our_node(machine: lab.Machine, listen: str, *, relay: str = "") -> AsyncIterator[Asked]:
    """See ``simulated_node.py``. Killed at the end of the block."""
    async with machine.process([sys.executable, "-m", "interop.simulated_node", listen, relay]) as process:
        yield Asked(process, "our node")


async def first_line(process: trio.Process) -> dict[str, Any]:
    """Raises: LabError: it ended without one."""
    async with aclosing(lines(process)) as coming:
        async for line in coming:
            return line
    raise lab.LabError("a program ended before it said anything")


async def lines(process: trio.Process) -> AsyncGenerator[dict[str, Any], None]:
    """What it prints, as JSON line by line."""
    heard = b""
    if process.stdout is not None:
        async for data in process.stdout:
            *complete, heard = (heard + data).split(b"\n")
            for line in complete:
                yield json.loads(line)

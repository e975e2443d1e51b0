"""What of the suite runs on the lab's simulated internet: ``punching.py`` and ``probing.py``.

It runs in a process of its own, which begins with ``lab.enter()`` and prints its results as lines of JSON, or the one
line ``{"cannot": WHY}``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import asdict

import trio

from interop import lab, probing, punching
from interop.machines import lines
from interop.peers.base import Driver, program
from interop.peers.fetch import FetchError
from interop.suite import Result

PARTS = (punching, probing)


async def run(drivers: Sequence[Driver]) -> AsyncGenerator[Result, None]:
    """Results as they come. Where there can be no lab, each says so."""
    names = []
    for driver in drivers:
        try:
            await trio.to_thread.run_sync(driver.fetch)
        except FetchError:
            continue  # the suite before us has told
        names.append(driver.name)
    left = [case for part in PARTS for case in part.cases(names)]
    async with program([sys.executable, "-m", "interop.simulated", *names]) as process:
        async for line in lines(process):
            if "cannot" in line and len(line) == 1:
                for case in left:
                    yield case.result(cannot=line["cannot"])
                return
            left.pop(0)
            yield Result(**line)
    for case in left:
        yield case.result(failure="the process that tries it ended early")


def main() -> None:
    try:
        lab.enter()
    except lab.LabError as error:
        print(json.dumps({"cannot": str(error)}), flush=True)
        return
    trio.run(_all, sys.argv[1:])


async def _all(names: Sequence[str]) -> None:
    for part in PARTS:
        async with aclosing(part.run(names)) as coming:
            async for result in coming:
                print(json.dumps(asdict(result)), flush=True)


if __name__ == "__main__":
    main()

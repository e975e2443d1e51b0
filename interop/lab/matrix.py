"""The 4 x 4 matrix: a node behind each kind of NAT connects to one behind each kind, through a public relay.

``connected-of-16`` counts pairs that are connected at all, ``direct-of-16`` those that get rid of the relay: 13 is
what can be had without guessing ports (``nat.can_punch``). Four pairs, of which no two share a home, are at work at a
time.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

import trio

from interop.lab import nat
from interop.lab.meetings import RTT_MS, known, meet, serve
from interop.lab.namespaces import LabError
from interop.lab.network import internet
from interop.lab.nodes import Node, Reached, node
from tests.bench.report import Figure, figure

TRANSPORTS = ("tcp", "quic")
RUNS = 10
FIRST_TRY, DIRECT_S = 0.97, 3.0  # goals: the share of the direct ones, the median
PAIRS = len(nat.KINDS) ** 2
DIRECT = sum(nat.can_punch(one, other) for one in nat.KINDS for other in nat.KINDS)


@dataclass(frozen=True, kw_only=True)
class Attempt:
    transport: str
    pair: tuple[str, str]
    run: int
    reached: Reached


async def run(*, runs: int, transports: Sequence[str] = TRANSPORTS) -> AsyncGenerator[Attempt, None]:
    """Attempts as they end: ``runs`` of each pair over each transport."""
    kinds = list(nat.KINDS)
    net = internet()
    relay_host = net.host("relay", rtt_ms=RTT_MS)
    callers = [net.home(f"{kind}-caller", nat=kind, rtt_ms=RTT_MS) for kind in kinds]
    callees = [net.home(f"{kind}-callee", nat=kind, rtt_ms=RTT_MS) for kind in kinds]
    machines = [home.host() for home in [*callers, *callees]]
    async with net.up(), AsyncExitStack() as stack:
        relay = await stack.enter_async_context(node(relay_host))
        nodes = [await stack.enter_async_context(node(machine)) for machine in machines]
        for transport in transports:
            try:
                await serve(relay, transport)
            except LabError as error:
                for attempt in _hopeless(transport, runs, str(error)):
                    yield attempt
                continue
            at = known(relay, transport)
            for number in range(runs):
                for shift in range(len(kinds)):
                    pairs = [(one, (one + shift) % len(kinds)) for one in range(len(kinds))]
                    for attempt in await _at_once(nodes, pairs, transport, at, number):
                        yield attempt
            await relay.stop()


def _hopeless(transport: str, runs: int, why: str) -> list[Attempt]:
    reached = Reached(connected=False, direct=False, why=why)
    return [
        Attempt(transport=transport, pair=(one, other), run=number, reached=reached)
        for number in range(runs)
        for one in nat.KINDS
        for other in nat.KINDS
    ]


async def _at_once(
    nodes: Sequence[Node], pairs: Sequence[tuple[int, int]], transport: str, relay: Sequence[str], number: int
) -> list[Attempt]:
    kinds = list(nat.KINDS)
    made: list[Attempt] = []

    async def attempt(one: int, other: int) -> None:
        reached = await meet(nodes[one], nodes[len(kinds) + other], transport, relay)
        made.append(Attempt(transport=transport, pair=(kinds[one], kinds[other]), run=number, reached=reached))

    async with trio.open_nursery() as nursery:
        for one, other in pairs:
            nursery.start_soon(attempt, one, other)
    return made


def figures(attempts: Sequence[Attempt]) -> list[Figure]:
    """Counts are per run of all 16 pairs; ``first-try`` is a share of the direct connections whose tries are known."""
    found = []
    for transport in dict.fromkeys(attempt.transport for attempt in attempts):
        mine = [attempt for attempt in attempts if attempt.transport == transport]
        runs = sorted({attempt.run for attempt in mine})
        connected = [float(sum(a.reached.connected for a in mine if a.run == number)) for number in runs]
        direct = [float(sum(a.reached.direct for a in mine if a.run == number)) for number in runs]
        unit = f"of {PAIRS}"
        found.append(figure(f"{transport}-connected-of-16", connected, unit, better="higher", goal=PAIRS))
        found.append(figure(f"{transport}-direct-of-16", direct, unit, better="higher", goal=DIRECT))
        tries = [a.reached.tries for a in mine if a.reached.direct and a.reached.tries is not None]
        if tries:
            share = sum(count == 1 for count in tries) / len(tries)
            found.append(figure(f"{transport}-first-try", [share], "of direct", better="higher", goal=FIRST_TRY))
        seconds = [a.reached.seconds for a in mine if a.reached.seconds is not None]
        if seconds:
            found.append(figure(f"{transport}-seconds-to-direct", seconds, "s", better="lower", goal=DIRECT_S))
    return found


def table(attempts: Sequence[Attempt], transport: str) -> list[str]:
    """Rows call, columns are called: direct / connected / attempts."""
    kinds = list(nat.KINDS)
    rows = [f"{transport:<20}" + "".join(f"{kind:>20}" for kind in kinds)]
    for one in kinds:
        cells = []
        for other in kinds:
            mine = [a.reached for a in attempts if a.transport == transport and a.pair == (one, other)]
            cells.append(f"{sum(r.direct for r in mine)} / {sum(r.connected for r in mine)} / {len(mine)}")
        rows.append(f"{one:<20}" + "".join(f"{cell:>20}" for cell in cells))
    return rows

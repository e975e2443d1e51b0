"""Two nodes that know of one relay meet: the attempt that the matrix and the paths repeat.

Each attempt has new identities and new ports.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from interop.lab.namespaces import LabError
from interop.lab.nodes import Node, Reached, address, through

RTT_MS = 50.0
RELAY_PORT = 4001
WITHIN_S = 15.0

Introduction = Callable[[Node, Node, Sequence[str]], Awaitable[Sequence[str]]]


async def by_relay(caller: Node, callee: Node, relay: Sequence[str]) -> Sequence[str]:
    """All that the caller knows is the relay."""
    return through(relay)


async def announced(caller: Node, callee: Node, relay: Sequence[str]) -> Sequence[str]:
    """The caller finds in the DHT what the callee has announced there."""
    await callee.announce()
    return await caller.find(callee)


async def serve(relay: Node, transports: str) -> None:
    """Have it relay on its public addresses. Raises: LabError when it cannot listen there."""
    await relay.start(transports, port=RELAY_PORT, serve=True)


def known(relay: Node, transports: str) -> list[str]:
    """Where a relay that serves is, for ``Node.start`` and ``through``, in the order of ``transports``."""
    ours = relay.machine.addresses
    found = []
    for name in transports.split("+"):
        host = ours.ipv6 if "6" in name else ours.ipv4
        if host is None:
            raise LabError(f"{relay.machine.name} has no address for {name}")
        found.append(f"{address(host, RELAY_PORT, name)}/p2p/{relay.peer_id}")
    return found


async def meet(
    caller: Node,
    callee: Node,
    transports: str,
    relay: Sequence[str],
    *,
    introduced: Introduction = by_relay,
    in_dht: bool = True,
) -> Reached:
    """Both start afresh with the relay; one connects to the other, of which it knows by ``introduced``; both stop.

    Unless they are ``in_dht``, they have not met before.
    """
    started = []
    try:
        for each in (callee, caller):
            await each.start(transports, relay=relay, in_dht=in_dht)
            started.append(each)
        addresses = await introduced(caller, callee, relay)
        reached = await caller.connect(callee, addresses=addresses, within_s=WITHIN_S)
        return replace(reached, tries=await callee.tries())
    except LabError as error:
        return Reached(connected=False, direct=False, why=str(error))
    finally:
        for each in started:
            await each.stop()

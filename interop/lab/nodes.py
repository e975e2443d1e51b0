"""The lab's end of ``node.py``: our nodes on machines of the simulated internet."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from interop.lab.asking import Asked
from interop.lab.machine import Machine

ADDRESSES = {
    "tcp": "/ip4/{host}/tcp/{port}",
    "quic": "/ip4/{host}/udp/{port}/quic-v1",
    "tcp6": "/ip6/{host}/tcp/{port}",
    "quic6": "/ip6/{host}/udp/{port}/quic-v1",
}


@dataclass(frozen=True, kw_only=True)
class Reached:
    """How an attempt to connect ended.

    Attributes:
        remote: where the connection that is used in the end leads, or comes from.
        seconds: until the connection was direct; None if it never was.
        tries: how many punches that took; None if none was needed, or nobody counted.
    """

    connected: bool
    direct: bool
    remote: str | None = None
    seconds: float | None = None
    tries: int | None = None
    why: str | None = None


class Node:
    """See ``node``, which makes one."""

    def __init__(self, machine: Machine, asked: Asked) -> None:
        self.machine = machine
        self.process = asked.process
        self._ask = asked.ask
        self.peer_id = ""
        self.port: int = 0

    async def start(
        self,
        transports: str = "tcp",
        *,
        port: int = 0,
        relay: Sequence[str] = (),
        serve: bool = False,
        in_dht: bool = True,
    ) -> None:
        """A fresh host with a new identity.

        Args:
            transports: names in ``ADDRESSES``, joined by ``+``: what it listens on.
            port: of all of them; 0 for any.
            relay: where it is to have a reservation, if it needs one: all that is known of one relay.
            serve: whether it relays for others.
            in_dht: whether it is a server there, and so found by whoever joins.

        Raises:
            LabError: it cannot listen there, or not reach the relay.
        """
        listen = [address("::" if "6" in name else "0.0.0.0", port, name) for name in transports.split("+")]
        started = await self._ask(do="start", listen=listen, relay=list(relay), serve=serve, in_dht=in_dht)
        self.peer_id = started["peer_id"]

    async def stop(self) -> None:
        await self._ask(do="stop")

    async def connect(self, peer: Node, *, addresses: Sequence[str] = (), within_s: float = 10.0) -> Reached:
        """Connect to another node, at addresses (without its ``/p2p/...``; with ``through``, by a relay)."""
        answer = await self._ask(do="connect", peer=peer.peer_id, addresses=list(addresses), within_s=within_s)
        return Reached(**answer)

    async def announce(self) -> None:
        """Have it say in the DHT where it is."""
        await self._ask(do="announce")

    async def find(self, peer: Node) -> list[str]:
        """What another node has announced."""
        return list((await self._ask(do="find", peer=peer.peer_id))["addresses"])

    async def reach(self, peer: Node, *, within_s: float) -> float:
        """Seconds until another node has answered at what it has announced. Raises: LabError if it does not in time."""
        return float((await self._ask(do="reach", peer=peer.peer_id, within_s=within_s))["seconds"])

    async def tries(self) -> int | None:
        """How many punches it took the node to make a connection direct; None if it has made none."""
        counted = await self._ask(do="punches")
        return int(counted["tries"]) if counted["successes"] else None

    async def ping_ms(self, peer: Node, count: int = 3) -> float:
        """The median round trip to a peer that it is connected with."""
        return float((await self._ask(do="ping", peer=peer.peer_id, count=count))["rtt_ms"])


def address(host: str, port: int, transport: str = "tcp") -> str:
    return ADDRESSES[transport].format(host=host, port=port)


def through(relay: Sequence[str]) -> list[str]:
    """Addresses of whoever has a reservation at this relay."""
    return [f"{each}/p2p-circuit" for each in relay]


@asynccontextmanager
async def node(machine: Machine) -> AsyncIterator[Node]:
    """A process on the machine that is to be one of our nodes, killed at the end of the block."""
    async with machine.process([sys.executable, "-m", "interop.lab.node"]) as process:
        yield Node(machine, Asked(process, f"the node on {machine.name}"))

"""The lab's end of ``node.py``: our nodes on machines of the simulated internet."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from interop.lab.asking import Asked
from interop.lab.machine import Machine

LISTEN = {"tcp": "/ip4/{host}/tcp/{port}", "quic": "/ip4/{host}/udp/{port}/quic-v1"}


@dataclass(frozen=True, kw_only=True)
class Reached:
    """How an attempt to connect ended.

    Attributes:
        seconds: until the connection was direct; None if it never was.
        tries: how many punches that took; None if none was needed, or nobody counted.
    """

    connected: bool
    direct: bool
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
        self, transport: str = "tcp", *, port: int = 0, relay: str | None = None, serve: bool = False
    ) -> None:
        """A fresh host with a new identity. Raises: LabError when it cannot listen there, or not reach the relay."""
        listen = LISTEN[transport].format(host="0.0.0.0", port=port)
        started = await self._ask(do="start", listen=[listen], relay=relay, serve=serve)
        self.peer_id = started["peer_id"]

    async def stop(self) -> None:
        await self._ask(do="stop")

    async def connect(
        self, peer: Node, *, addresses: Sequence[str] = (), relay: str | None = None, within_s: float = 10.0
    ) -> Reached:
        """Connect to another node, at addresses (without ``/p2p/...``) or through the relay."""
        answer = await self._ask(
            do="connect", peer=peer.peer_id, addresses=list(addresses), relay=relay, within_s=within_s
        )
        return Reached(**answer)

    async def tries(self) -> int | None:
        """How many punches it took the node to make a connection direct; None if it has made none."""
        counted = await self._ask(do="punches")
        return int(counted["tries"]) if counted["successes"] else None

    async def ping_ms(self, peer: Node, count: int = 3) -> float:
        """The median round trip to a peer that it is connected with."""
        return float((await self._ask(do="ping", peer=peer.peer_id, count=count))["rtt_ms"])


def address(host: str, port: int, transport: str = "tcp") -> str:
    return LISTEN[transport].format(host=host, port=port)


@asynccontextmanager
async def node(machine: Machine) -> AsyncIterator[Node]:
    """A process on the machine that is to be one of our nodes, killed at the end of the block."""
    async with machine.process([sys.executable, "-m", "interop.lab.node"]) as process:
        yield Node(machine, Asked(process, f"the node on {machine.name}"))

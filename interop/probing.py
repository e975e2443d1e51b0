"""AutoNAT v2 with foreign peers: who can be reached is found out by having somebody dial it back.

    ours [public address] --- theirs [public address]

A case: who asks. It passes when the asker, at a public address of the simulated internet, has been told by the other
alone that it can be reached there. go-libp2p 0.32 has only the first version of the protocol, which is not ours.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from interop import lab
from interop.machines import RELAY, first_line, on, our_node
from interop.peers import go, js
from interop.peers.base import PeerError
from interop.peers.ours import OURS
from interop.suite import Result, reasons
from net import addresses
from net.addresses import Multiaddr, PeerAddress
from net.errors import NetError
from net.nat.messages import DIAL_REQUEST_PROTOCOL

CASE_S = 60.0
VERIFIED_S = 30.0
LOOK_S = 0.1
RTT_MS = 20.0
PORT = 4001
LISTEN = f"/ip4/0.0.0.0/tcp/{PORT}"
GO_VERSION = "0.32"


@dataclass(frozen=True, kw_only=True)
class Case:
    asker: str
    asked: str

    def result(self, *, failure: str | None = None, cannot: str | None = None, took_s: float | None = None) -> Result:
        return Result(
            peer=self.asked,
            transport="autonat-v2",
            security="noise",
            direction=f"{self.asker}->{self.asked}",
            failure=failure,
            cannot=cannot,
            took_s=took_s,
            took="reachable",
        )


def cases(names: Sequence[str]) -> list[Case]:
    """All that there are with the foreign peers of these names."""
    pairs = [pair for name in names for pair in ((OURS, name), (name, OURS))]
    return [Case(asker=asker, asked=asked) for asker, asked in pairs]


async def run(names: Sequence[str]) -> AsyncGenerator[Result, None]:
    """Results as they come."""
    for case in cases(names):
        yield await _run_case(case)


async def _run_case(case: Case) -> Result:
    failure: str | None = None
    lacking: str | None = None
    took_s = 0.0
    net = lab.internet()
    ours, theirs = net.host("ours", rtt_ms=RTT_MS), net.host("theirs", rtt_ms=RTT_MS)
    try:
        with trio.fail_after(CASE_S):
            async with net.up():
                if "go" in (case.asker, case.asked):
                    lacking = await _lacking(ours, theirs)
                else:
                    took_s = await (_we_ask if case.asker == OURS else _they_ask)(ours, theirs)
    except* (NetError, PeerError, lab.LabError, OSError) as group:
        failure = "; ".join(reasons(group))
    except* trio.TooSlowError:
        failure = f"not done within {CASE_S:g} s"
    return case.result(failure=failure, cannot=lacking, took_s=None if failure or lacking else took_s)


async def _lacking(one: lab.Machine, other: lab.Machine) -> str:
    """What go-libp2p has instead, as one of its daemons learns from another."""
    options = ["-autonat", "-forceReachabilityPublic"]
    async with (
        go.daemon(LISTEN, options, within=on(one)) as asker,
        go.daemon(LISTEN, options, within=on(other)) as asked,
    ):
        where = PeerAddress(address=Multiaddr(f"/ip4/{other.address}/tcp/{PORT}"), peer_id=asked.address.peer_id)
        protocols = (await asker.identify(where)).protocols
    if DIAL_REQUEST_PROTOCOL in protocols:
        raise PeerError("it speaks AutoNAT v2 by now, and is not tried here")
    spoken = [protocol for protocol in protocols if "autonat" in protocol]
    return f"go-libp2p {GO_VERSION} does not speak {DIAL_REQUEST_PROTOCOL}, only {', '.join(spoken) or 'none of it'}"


async def _we_ask(ours: lab.Machine, theirs: lab.Machine) -> float:
    async with _js(theirs) as peer, our_node(ours, LISTEN) as node:
        began = time.monotonic()
        await node.ask(do="hello", see=[str(peer.address)])
        judged = await node.ask(do="judge")
        if judged["kind"] != "public":
            raise PeerError(f"we are {judged['kind']} now")
        return float(judged["at"] - began)


async def _they_ask(ours: lab.Machine, theirs: lab.Machine) -> float:
    async with ours.process(RELAY) as process, _js(theirs) as peer:
        us = addresses.parse_peer((await first_line(process))["address"])
        began = time.monotonic()
        await peer.join(us)
        with trio.move_on_after(VERIFIED_S):
            while peer.address.address not in await peer.verified():  # noqa: ASYNC110  nothing tells
                await trio.sleep(LOOK_S)
            return time.monotonic() - began
    raise PeerError(f"it is not sure of its address after {VERIFIED_S:g} s")


@asynccontextmanager
async def _js(machine: lab.Machine) -> AsyncIterator[js.JsPeer]:
    async with js.node(["tcp", "noise", "autonat"], within=on(machine)) as peer:
        # It tells only addresses of the machine's own network, until others have dialled it at the public one.
        bound = addresses.host_port(peer.address.address)
        if bound is None:
            raise PeerError(f"it listens at {peer.address}")
        where = Multiaddr(f"/ip4/{machine.address}/tcp/{bound[1]}")
        peer.address = PeerAddress(address=where, peer_id=peer.address.peer_id)
        yield peer

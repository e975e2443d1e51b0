"""Hole punching between our node and a foreign peer, both behind port-restricted NATs of the simulated internet.

    ours [NAT] --- relay (ours, or go's), observers (go's) --- [NAT] theirs

A case: a relay, a transport, and who calls. The call goes through the relay; whoever is called starts to punch
(DCUtR). It passes when our side has a connection to the peer that no relay carries, over which an echo is compared and
the peer pings, too. In results, ``peer`` is the relay and ``direction`` says who calls whom, as in ``relays.py``.

go-libp2p 0.32 punches once it knows where others see it, which takes four that do; hence the observers. A call of its
daemon through a relay with limits, such as its own, makes a connection over which it opens no streams; we open them.
js-libp2p 3.3 speaks DCUtR, and has no address to offer for it behind a NAT that lets no strangers in.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import trio

from interop import lab
from interop.lab.asking import Asked
from interop.machines import RELAY, first_line, on, our_node
from interop.peers import go, js
from interop.peers.base import PeerError
from interop.peers.ours import OURS
from interop.suite import Result, reasons
from net import addresses
from net.addresses import Multiaddr, PeerAddress, is_relayed, relayed_by
from net.errors import NetError
from net.identity import PeerId
from net.nat import endpoints
from net.nat.punching import PROTOCOL_ID

CASE_S = 60.0
DIRECT_S = {"go": 15.0, "js": 6.0}  # go punches for up to five seconds, three times
READY_S = 15.0  # for a foreign peer to hold its reservation, and to know where it is seen
LOOK_S = 0.1
OBSERVERS = 4
RTT_MS = 20.0
PORT = 4001
LISTEN = {"tcp": "/ip4/{ip}/tcp/{port}", "quic": "/ip4/{ip}/udp/{port}/quic-v1"}
SECURITY = {"tcp": "noise", "quic": "tls"}


@dataclass(frozen=True, kw_only=True)
class Case:
    relay: str
    transport: str
    caller: str
    called: str

    @property
    def foreign(self) -> str:
        return self.called if self.caller == OURS else self.caller

    def result(self, **outcome: object) -> Result:
        return Result(
            peer=self.relay,
            transport=f"punch-{self.transport}",
            security=SECURITY[self.transport],
            direction=f"{self.caller}->{self.called}",
            **outcome,  # type: ignore[arg-type]
        )


def cases(names: Sequence[str]) -> list[Case]:
    """All that there are with the foreign peers of these names."""
    return [
        Case(relay=relay, transport=transport, caller=caller, called=called)
        for name in names
        for relay, transport in itertools.product((OURS, "go") if name == "go" else (OURS,), LISTEN)
        for caller, called in ((OURS, name), (name, OURS))
    ]


async def run(names: Sequence[str]) -> AsyncGenerator[Result, None]:
    """Results as they come. A case that fails does not stop the others."""
    wanted = cases(names)
    if wanted:
        async with _world(with_go="go" in names) as world:
            for case in wanted:
                yield await _run_case(world, case)


@dataclass(frozen=True, kw_only=True)
class World:
    """The machines that all cases share. ``observers`` tell go-libp2p where they see it."""

    ours: lab.Host
    theirs: lab.Host
    relays: Mapping[str, tuple[lab.Machine, PeerId]]
    observers: Sequence[tuple[lab.Machine, go.GoPeer]]

    def relay(self, case: Case) -> PeerAddress:
        machine, peer_id = self.relays[case.relay]
        return PeerAddress(address=_address(machine, case.transport), peer_id=peer_id)

    def seers(self, transport: str) -> list[PeerAddress]:
        return [
            PeerAddress(address=_address(machine, transport), peer_id=peer.address.peer_id)
            for machine, peer in self.observers
        ]


def _address(machine: lab.Machine, transport: str) -> Multiaddr:
    return Multiaddr(LISTEN[transport].format(ip=machine.address, port=PORT))


@asynccontextmanager
async def _world(*, with_go: bool) -> AsyncIterator[World]:
    net = lab.internet()
    our_relay = net.host("relay", rtt_ms=RTT_MS)
    public = [net.host(f"public{number}", rtt_ms=RTT_MS) for number in range(OBSERVERS + 1)] if with_go else []
    homes = [net.home(name, nat="port-restricted", rtt_ms=RTT_MS) for name in ("near", "far")]
    ours, theirs = (home.host() for home in homes)
    async with net.up(), AsyncExitStack() as stack:
        process = await stack.enter_async_context(our_relay.process(RELAY))
        told = await first_line(process)
        relays: dict[str, tuple[lab.Machine, PeerId]] = {
            OURS: (our_relay, addresses.parse_peer(told["address"]).peer_id),
        }
        observers: list[tuple[lab.Machine, go.GoPeer]] = []
        for machine in public:
            options = [] if observers else ["-relay", "-relayService", "-forceReachabilityPublic"]
            observers.append((machine, await stack.enter_async_context(_public_go(machine, options))))
        if observers:
            their_relay, peer = observers.pop(0)
            relays["go"] = (their_relay, peer.address.peer_id)
        yield World(ours=ours, theirs=theirs, relays=relays, observers=observers)


def _public_go(machine: lab.Machine, options: Sequence[str]) -> AbstractAsyncContextManager[go.GoPeer]:
    everywhere = ",".join(LISTEN[transport].format(ip="0.0.0.0", port=PORT) for transport in LISTEN)
    return go.daemon(everywhere, options, within=on(machine))


async def _run_case(world: World, case: Case) -> Result:
    failure: str | None = None
    lacking: str | None = None
    through = relayed_by(world.relay(case))
    try:
        with trio.fail_after(CASE_S):
            async with _our_node(world, case) as (us, node), _their_node(world, case) as them:
                they, we = them.address.peer_id, PeerAddress(address=through, peer_id=us)
                began = time.monotonic()
                if case.caller != OURS:
                    await them.join(we)
                where = str(through) if case.caller == OURS else None
                try:
                    met = await node.ask(do="meet", peer=str(they), address=where, within_s=DIRECT_S[case.foreign])
                except lab.LabError as error:
                    lacking = None if isinstance(them, go.GoPeer) else await _lacking(them, error)
                    if lacking is None:
                        raise
                else:
                    await them.ping(we)  # over what connection it has
                    if is_relayed(addresses.parse(met["remote"])):
                        raise PeerError(f"it says that {met['remote']} is direct")
    except* (NetError, PeerError, lab.LabError, OSError) as group:
        failure = "; ".join(reasons(group))
    except* trio.TooSlowError:
        failure = f"not done within {CASE_S:g} s"
    if failure is not None or lacking is not None:
        return case.result(failure=failure, cannot=None if failure else lacking)
    return case.result(ping_s=met["ping_s"], took_s=met["at"] - began, took="direct")


async def _lacking(them: js.JsPeer, error: Exception) -> str | None:
    """Why js-libp2p could not, if it is for want of an address: what it tells others is what it sends as DCUtR."""
    told = await them.addresses()
    if any(endpoints.is_public(each) for each in told if not is_relayed(each)):
        return None
    direct = ", ".join(str(each).split("/p2p/")[0] for each in told if not is_relayed(each))
    return f"js-libp2p tells no public address before strangers get in there, only {direct} ({error})"


@asynccontextmanager
async def _our_node(world: World, case: Case) -> AsyncIterator[tuple[PeerId, Asked]]:
    listen = LISTEN[case.transport].format(ip="0.0.0.0", port=0)
    where = [str(world.relay(case)), *map(str, world.seers(case.transport))]
    async with our_node(world.ours, listen, relay=str(world.relay(case))) as node:
        peer = (await node.ask(do="hello", see=where))["peer"]
        await node.ask(do="reserve")
        yield PeerId.from_string(peer), node


@asynccontextmanager
async def _their_node(world: World, case: Case) -> AsyncIterator[go.GoPeer | js.JsPeer]:
    """A foreign peer behind its NAT, when it is ready to be called and to call."""
    relay = world.relay(case)
    async with AsyncExitStack() as stack:
        peer: go.GoPeer | js.JsPeer
        if case.foreign == "go":
            options = ["-autonat", "-dht", "-relay", "-autoRelay", "-relayDiscovery=false", f"-trustedRelays={relay}"]
            options.append("-forceReachabilityPrivate")
            listen = LISTEN[case.transport].format(ip="0.0.0.0", port=0)
            peer = await stack.enter_async_context(go.daemon(listen, options, within=on(world.theirs)))
        else:
            words = [case.transport, SECURITY[case.transport], str(relay), "punch"]
            peer = await stack.enter_async_context(js.node(words, within=on(world.theirs)))
        for observer in world.seers(case.transport):
            await peer.join(observer)
        with trio.move_on_after(READY_S) as scope:
            while not await _is_ready(world, peer, relay):  # noqa: ASYNC110  nothing tells
                await trio.sleep(LOOK_S)
        if scope.cancelled_caught:
            raise PeerError(f"{case.foreign} holds no reservation, or does not punch, after {READY_S:g} s")
        yield peer


async def _is_ready(world: World, peer: go.GoPeer | js.JsPeer, relay: PeerAddress) -> bool:
    """Whether it announces an address at the relay, and, if it is go's, tells others that it speaks DCUtR."""
    if isinstance(peer, js.JsPeer):
        return any(map(is_relayed, await peer.addresses()))
    peer_id, known = await peer.control.identify()
    if not any(map(is_relayed, known)):
        return False
    seer = world.observers[0][1]
    return PROTOCOL_ID in (await seer.identify(PeerAddress(address=relayed_by(relay), peer_id=peer_id))).protocols

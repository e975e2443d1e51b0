"""Which addresses two peers tell each other for hole punching: their own public ones, what relays see of ports that
nobody has seen, and private ones among neighbours."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch
from trio.testing import MockClock

from net import addresses, delimited
from net.addresses import Multiaddr, tcp
from net.host import Host, open_host
from net.io import send
from net.nat.endpoints import is_public, parse
from net.nat.punching import PROTOCOL_ID, HolePuncher
from net.nat.sighting import FRESH_S, RelaySights
from net.relay.server import RelayServer
from net.swarm import Connection
from net.transports.circuit import CircuitTransport
from tests.mem.internet import Internet, Machine
from tests.net_helpers import seeded

RELAY = [tcp("44.1.0.1", 4001), tcp("2a00:44::1", 4001)]
HOME = "192.168.1.10"
NEIGHBOUR = "192.168.1.11"


class OneFamily(Machine):
    """A machine's transport for its kind of IP alone: one host can have two."""

    def can_dial(self, address: Multiaddr) -> bool:
        where = addresses.host_port(address)
        return where is not None and (":" in where[0]) == (":" in self.ip)


def family(internet: Internet, ip: str, router: str | None = None) -> OneFamily:
    return OneFamily(internet, ip, None if router is None else internet.router(router))


@asynccontextmanager
async def a_relay(internet: Internet) -> AsyncIterator[Host]:
    machines = [family(internet, str(addresses.host_port(each)[0])) for each in RELAY]  # type: ignore[index]
    async with (
        open_host(seeded(9), listen=RELAY, transports=[*machines, CircuitTransport()]) as relay,
        trio.open_nursery() as nursery,
    ):
        await nursery.start(RelayServer(relay).run)
        yield relay
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def two(
    internet: Internet,
    near: Sequence[Machine],
    far: Sequence[Machine],
    *,
    seen_at: Sequence[Sequence[Multiaddr] | None],
) -> AsyncIterator[tuple[Host, Host, Connection]]:
    """Near has come to far through a relay; both punch, and know that they are ``seen_at``. None: does not punch."""

    def where(machines: Sequence[Machine]) -> list[Multiaddr]:
        return [tcp(machine.ip, 4001) for machine in machines]

    circuit = CircuitTransport()
    async with (
        a_relay(internet) as relay,
        open_host(seeded(1), listen=where(near), transports=[*near, CircuitTransport()]) as one,
        open_host(seeded(2), listen=where(far), transports=[*far, circuit]) as other,
        trio.open_nursery() as nursery,
    ):
        reservation = await nursery.start(circuit.reserve, relay.peer_addresses[0], other.swarm.accept)
        for host, seen in zip((one, other), seen_at, strict=True):
            if seen is not None:
                await nursery.start(HolePuncher(host, partial(list, seen)).run)
        relayed = await one.connect(other.peer_id, [reservation.addresses[0]])
        assert relayed.relayed
        yield one, other, relayed
        nursery.cancel_scope.cancel()


def used(host: Host, peer: Host) -> Multiaddr:
    connection = host.swarm.connection(peer.peer_id)
    assert connection is not None
    return connection.remote


async def test_an_address_of_ones_own_needs_nobody_who_has_seen_it(autojump_clock: MockClock) -> None:
    internet = Internet()
    near = [family(internet, "2a00:1::10"), family(internet, HOME, "45.1.0.1")]
    far = [family(internet, "2a00:2::10"), family(internet, HOME, "46.1.0.1")]
    async with two(internet, near, far, seen_at=[[], []]) as (one, other, _):
        await trio.sleep(2)
        assert used(one, other) == tcp("2a00:2::10", 4001)


async def test_neighbours_meet_at_their_private_addresses(autojump_clock: MockClock) -> None:
    internet = Internet()
    router = internet.router("45.1.0.1")
    machines = [Machine(internet, ip, router) for ip in (HOME, NEIGHBOUR)]
    seen_at = [[tcp("45.1.0.1", 30_001)], [tcp("45.1.0.1", 30_002)]]
    async with two(internet, machines[:1], machines[1:], seen_at=seen_at) as (one, other, _):
        await trio.sleep(2)
        assert used(other, one) == tcp(HOME, 4001)


@pytest.mark.parametrize(("ip", "told"), [("45.1.0.1", True), ("46.1.0.1", False)])
async def test_only_neighbours_are_told_private_addresses(ip: str, told: bool, autojump_clock: MockClock) -> None:
    internet = Internet()
    near, far = family(internet, "47.1.0.1"), family(internet, HOME, "45.1.0.1")
    async with two(internet, [near], [far], seen_at=[None, [tcp("45.1.0.1", 30_002)]]) as (one, _, relayed):
        stream = await one.open_stream_over(relayed, [PROTOCOL_ID])
        asked = HolePunch(type=HolePunch.CONNECT, ObsAddrs=[tcp(ip, 30_001).to_bytes()])
        await send(stream, delimited.frame(asked.SerializeToString()))
        answer = HolePunch()
        answer.ParseFromString(await delimited.receive(stream, 4096, "an answer"))
        assert (tcp(HOME, 4001) in map(parse, answer.ObsAddrs)) is told


async def test_the_relay_is_asked_for_what_nobody_has_seen(autojump_clock: MockClock) -> None:
    internet = Internet()
    machines = [family(internet, HOME, "45.1.0.1"), family(internet, "2a00:1::10")]
    far = family(internet, "46.1.0.1")
    known = [tcp("45.1.0.1", 30_000)]
    async with two(internet, machines, [far], seen_at=[known, []]) as (one, _, relayed):
        sights = RelaySights(one, is_public)
        await sights.look(relayed, known)
        assert sights.addresses == [tcp("2a00:1::10", 4001)]
        await trio.sleep(5)
        assert [each.remote for each in one.swarm.connections if each.peer_id == seeded(9).peer_id] == [RELAY[0]]
        dials = len(internet.dials)
        await sights.look(relayed, known)
        assert len(internet.dials) == dials
        await trio.sleep(FRESH_S)
        assert sights.addresses == []

"""Circuits through the conformance suite of transports: a relay in the middle, everything in memory."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import pytest
import trio

from net.addresses import Multiaddr, PeerAddress, parse_peer, relay_of, relayed_by
from net.errors import AddressError, DialError
from net.host import Host, open_host
from net.identity import Identity, PeerId
from net.limits import Limits
from net.nurseries import open_service_nursery
from net.relay.reservations import RelayLimits
from net.relay.server import RelayServer
from net.transports.base import Accept, RawConnection, Transport
from net.transports.circuit import CircuitTransport
from net.transports.memory import MemoryNetwork
from tests.net_helpers import MEMORY_ANY, seeded
from tests.transport_conformance import Rig, TransportConformance

MANY = RelayLimits(circuits_per_peer=1000, circuits_per_pair=1000)
ROOMY = Limits(connections_per_relay=1000)
NOBODY = seeded(98).peer_id


class World:
    """A relay, a host that dials, and a new host behind the relay for each listener.

    Attributes:
        anywhere: the relay's circuits; who listens there is given an address of its own, which names it.
    """

    def __init__(
        self, relay: PeerAddress, dialler: CircuitTransport, network: MemoryNetwork, nursery: trio.Nursery
    ) -> None:
        self.relay = relay
        self.anywhere = relayed_by(relay)
        self.dialler = dialler
        self.network = network
        self.listeners: dict[PeerId, CircuitTransport] = {}
        self._nursery = nursery

    async def new_listener(self) -> PeerId:
        return await self._nursery.start(self._run_listener)

    async def _run_listener(self, *, task_status: trio.TaskStatus[PeerId]) -> None:
        circuits = CircuitTransport()
        transports: list[Transport] = [self.network.transport(), circuits]
        async with open_host(Identity.generate(), transports=transports, limits=ROOMY) as host:
            self.listeners[host.peer_id] = circuits
            task_status.started(host.peer_id)
            await trio.sleep_forever()


class Ends:
    """The transport under test: its dialler and its listeners are different peers, as with relays they must be."""

    def __init__(self, world: World) -> None:
        self._world = world

    def can_dial(self, address: Multiaddr) -> bool:
        return self._world.dialler.can_dial(_split(address)[0])

    async def dial(self, address: Multiaddr, peer_id: PeerId | None = None) -> RawConnection:
        where, who = _split(address)
        return await self._world.dialler.dial(where, who or peer_id)

    async def listen(
        self,
        address: Multiaddr,
        accept: Accept,
        *,
        task_status: trio.TaskStatus[Sequence[Multiaddr]] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        where, who = _split(address)
        if relay_of(where) is None:
            await self._world.dialler.listen(where, accept, task_status=task_status)
        who = who or await self._world.new_listener()
        async with open_service_nursery() as nursery:
            [bound] = await nursery.start(self._world.listeners[who].listen, where, accept)
            task_status.started([Multiaddr(f"{bound}/p2p/{who}")])


def _split(address: Multiaddr) -> tuple[Multiaddr, PeerId | None]:
    """A circuit's address without whom it leads to, and whom."""
    if "/p2p-circuit/p2p/" not in str(address):
        return address, None
    named = parse_peer(str(address))
    return named.address, named.peer_id


@asynccontextmanager
async def open_world() -> AsyncIterator[World]:
    network = MemoryNetwork()
    circuits = CircuitTransport()
    async with (
        open_host(seeded(90), listen=[MEMORY_ANY], transports=[network.transport()], limits=ROOMY) as relay,
        open_host(seeded(91), transports=[network.transport(), circuits], limits=ROOMY) as _,
        trio.open_nursery() as nursery,
    ):
        await nursery.start(RelayServer(relay, MANY).run)
        yield World(relay.peer_addresses[0], circuits, network, nursery)
        nursery.cancel_scope.cancel()


def in_a_world(tests: type[TestCircuit]) -> type[TestCircuit]:
    """Run each test of the class in a world of its own. (pytest-trio starts a fixture that is no argument too late.)"""

    def wrap(test: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
        @functools.wraps(test)
        async def wrapped(self: TestCircuit, *args: object, **kwargs: object) -> None:
            async with open_world() as self.world:
                await test(self, *args, **kwargs)

        return wrapped

    for name in [name for name in dir(tests) if name.startswith("test_")]:
        setattr(tests, name, wrap(getattr(tests, name)))
    return tests


@in_a_world
class TestCircuit(TransportConformance):
    world: World

    def rig(self) -> Rig:
        return Rig(
            make=lambda: Ends(self.world),
            anywhere=self.world.anywhere,
            foreign=[MEMORY_ANY, Multiaddr(f"/memory/1/p2p/{NOBODY}"), Multiaddr("/ip4/127.0.0.1/tcp/1/p2p-circuit")],
            nobody=self.nobody,
            abrupt=None,  # a relay passes on an end as an end
        )

    @asynccontextmanager
    async def nobody(self) -> AsyncIterator[Multiaddr]:
        yield Multiaddr(f"{self.world.anywhere}/p2p/{NOBODY}")

    async def test_a_refused_dial_says_where(self) -> None:
        """And why: nobody holds a reservation there."""
        with pytest.raises(DialError, match=f"{self.world.anywhere}: the peer has no reservation at the relay"):
            await self.world.dialler.dial(self.world.anywhere, NOBODY)

    async def test_addresses_are_real_ones(self) -> None:
        """Both ends name the relay, which is all that they can know of the way."""
        rig = self.rig()
        async with self.pair() as pair:
            assert pair.bound != rig.anywhere
            for end in (pair.dialled, pair.accepted):
                assert end.remote == rig.anywhere
                assert relay_of(end.remote) == self.world.relay
        for address in rig.foreign:
            assert not Ends(self.world).can_dial(address)
            with pytest.raises((DialError, AddressError)):
                await Ends(self.world).dial(address)
            with pytest.raises(AddressError):
                await Ends(self.world).listen(address, refuse)


async def refuse(arrived: object) -> None:
    raise AssertionError("nobody can come")


async def test_a_transport_belongs_to_one_host() -> None:
    with pytest.raises(Exception, match="needs a host"):
        await CircuitTransport().dial(Multiaddr(f"/memory/1/p2p/{NOBODY}/p2p-circuit"), NOBODY)
    circuits = CircuitTransport()

    async def open_one(number: int) -> Host:
        async with open_host(seeded(number), transports=[circuits]) as host:
            return host

    await open_one(1)
    with pytest.raises(Exception, match="another host"):
        await open_one(2)

"""Leases of a router's ports over hours and weeks of a virtual clock: renewed, kept through failures, given back."""

from __future__ import annotations

import ipaddress
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import trio
from trio.testing import MockClock

from net.nat.gateway import Gateway, GatewayError, Lease, NoGateway, Port
from net.nat.mapping import FindGateway, MappingSettings, MappingState, PortMapper
from net.nat.upnp import CONFLICT, ONLY_PERMANENT, UpnpGateway
from tests.gateways import found, nothing

TCP, UDP = Port(transport="tcp", number=4001), Port(transport="udp", number=4001)
OUTER_PORT = 7001


@dataclass(kw_only=True, eq=False)
class StrictRouter:
    """It forgets a mapping when its time is over, whatever its owner believes, and gives out ports of its own choice.

    Attributes:
        granted_s: for how long it maps; 0: for good.
        refused: ports that it does not map.
        answer_s: how long it takes to answer.
        asked: when it was asked to map which port, and with which wish.
    """

    name: str = "strict"
    ip: str = "45.1.0.1"
    granted_s: float = 1200.0
    refused: set[Port] = field(default_factory=set)
    answer_s: float = 0.1
    asked: list[tuple[float, Port, int]] = field(default_factory=list)
    _until: dict[Port, float] = field(default_factory=dict)

    def is_open(self, port: Port) -> bool:
        return trio.current_time() < self._until.get(port, -1)

    async def map(self, port: Port, lifetime_s: float, *, external: int) -> Lease:
        self.asked.append((trio.current_time(), port, external))
        await trio.sleep(self.answer_s)
        if port in self.refused:
            raise GatewayError("the router refuses (no)")
        self._until[port] = trio.current_time() + (self.granted_s or float("inf"))
        return Lease(ip=ipaddress.IPv4Address(self.ip), port=OUTER_PORT, lifetime_s=self.granted_s)

    async def unmap(self, port: Port, lease: Lease) -> None:
        await trio.sleep(self.answer_s)
        self._until.pop(port, None)


@asynccontextmanager
async def mapping(find: FindGateway, ports: set[Port] | None = None) -> AsyncIterator[PortMapper]:
    mapper = PortMapper(finders=[find], settings=MappingSettings(lifetime_s=1200.0))
    async with trio.open_nursery() as nursery:
        await nursery.start(mapper.run)
        mapper.want({TCP, UDP} if ports is None else ports)
        await trio.sleep(1)
        yield mapper
        nursery.cancel_scope.cancel()


async def stays_open(router: StrictRouter, port: Port, seconds: float) -> bool:
    """Whether the router never lets go of the port, looked at every ten seconds."""
    until = trio.current_time() + seconds
    while trio.current_time() < until:
        if not router.is_open(port):
            return False
        await trio.sleep(10)
    return True


@pytest.mark.parametrize("granted_s", [80.0, 600.0, 1200.0, 86_400.0])
async def test_a_lease_is_renewed_before_it_ends_again_and_again(autojump_clock: MockClock, granted_s: float) -> None:
    router = StrictRouter(granted_s=granted_s)
    async with mapping(found(router), {TCP}) as mapper:
        assert await stays_open(router, TCP, 10 * granted_s)
        times = [when for when, _, _ in router.asked]
        pauses = [later - sooner for sooner, later in itertools.pairwise(times)]
        assert pauses == pytest.approx([granted_s / 2] * len(pauses), abs=1)
        assert len(pauses) >= 19
        wishes = [wish for _, _, wish in router.asked]
        assert wishes == [TCP.number] + [OUTER_PORT] * (len(wishes) - 1)  # the port that others know by now
        assert mapper.state is MappingState.MAPPED
    assert not router.is_open(TCP)


async def test_a_lease_for_good_is_looked_after_as_well(autojump_clock: MockClock) -> None:
    """The router may be switched off and on; then it remembers nothing."""
    router = StrictRouter(granted_s=0.0)
    async with mapping(found(router), {TCP}):
        await trio.sleep(100)
        router._until.clear()
        await trio.sleep(600)
        assert router.is_open(TCP)
    assert not router.is_open(TCP)


async def test_a_renewal_that_fails_is_tried_again(autojump_clock: MockClock) -> None:
    router = StrictRouter()
    async with mapping(found(router), {TCP}) as mapper:
        router.refused = {TCP}
        await trio.sleep(700)
        assert (mapper.state, mapper.mapped) == (MappingState.REFUSED, {})
        router.refused = set()
        await trio.sleep(180)
        assert mapper.state is MappingState.MAPPED
        assert await stays_open(router, TCP, 7200)


async def test_a_port_that_is_refused_takes_no_other_with_it(autojump_clock: MockClock) -> None:
    """However long the pauses before the router is asked again for one, the other's lease is renewed in time."""
    router = StrictRouter(refused={UDP})
    async with mapping(found(router)) as mapper:
        assert await stays_open(router, TCP, 6 * 3600)
        assert mapper.state is MappingState.MAPPED
        assert "4001/udp" in mapper.problem


async def test_weeks_without_a_router_are_no_failure(autojump_clock: MockClock) -> None:
    """Every node behind a NAT whose router gives out no ports lives so, asking twice an hour."""
    async with mapping(nothing) as mapper:
        await trio.sleep(60 * 24 * 3600)
        assert mapper.state is MappingState.NO_ROUTER


async def test_the_network_may_change_while_ports_are_being_mapped(autojump_clock: MockClock) -> None:
    old, new = StrictRouter(answer_s=5.0), StrictRouter(ip="45.2.0.2")
    here = [old]

    async def find() -> Gateway:
        await trio.lowlevel.checkpoint()
        return here[0]

    async with mapping(find) as mapper:
        assert len(old.asked) == 1  # it thinks about the first port
        here[0] = new
        mapper.network_changed()
        outer: set[str] = set()
        mapper.tell(lambda: outer.update(str(each.ip) for each in mapper.mapped.values()))
        await trio.sleep(20)
        assert outer == {"45.2.0.2"}  # what the old one granted is not announced in the new network
        assert len(mapper.mapped) == 2


async def test_the_network_may_change_while_a_router_is_looked_for(autojump_clock: MockClock) -> None:
    old, new = StrictRouter(), StrictRouter(ip="45.2.0.2")
    here: list[Gateway] = [old]

    async def find() -> Gateway:
        answer = here[0]
        await trio.sleep(3)
        return answer

    async with mapping(find) as mapper:
        here[0] = new
        mapper.network_changed()
        await trio.sleep(20)
        assert old.asked == []
        assert {str(each.ip) for each in mapper.mapped.values()} == {"45.2.0.2"}


async def test_in_a_new_network_patience_begins_anew(autojump_clock: MockClock) -> None:
    """A day without a router ends with pauses of half an hour, which are none of the next network's."""
    here: list[Gateway] = []

    async def find() -> Gateway:
        if not here:
            raise NoGateway("nobody is there")
        return here[0]

    async with mapping(find) as mapper:
        await trio.sleep(24 * 3600)
        mapper.network_changed()
        await trio.sleep(10)  # the new network is not quite up yet
        here.append(StrictRouter())
        await trio.sleep(120)
        assert mapper.state is MappingState.MAPPED


async def test_a_router_that_falls_silent_holds_up_no_other_port(autojump_clock: MockClock) -> None:
    """Giving a port back may never be answered."""
    router = StrictRouter()
    async with mapping(found(router)) as mapper:
        router.answer_s = float("inf")
        mapper.want({TCP})
        await trio.sleep(60)
        router.answer_s = 0.1
        assert await stays_open(router, TCP, 7200)


# UPnP


class FakeDevice:
    """miniupnpc's, as far as it is used."""

    lanaddr = "192.168.1.10"

    def __init__(self, *, outer_ip: str = "45.1.0.1", fails: dict[int, str] | None = None) -> None:
        self.outer_ip = outer_ip
        self.fails = fails or {}
        self.open: dict[tuple[int, str], int] = {}

    def externalipaddress(self) -> str:
        return self.outer_ip

    def addportmapping(self, number: int, transport: str, *rest: object) -> bool:
        lifetime_s = rest[-1]
        assert isinstance(lifetime_s, int)
        if lifetime_s and 0 in self.fails:
            raise Exception(self.fails[0])
        if number in self.fails:
            raise Exception(self.fails[number])
        self.open[number, transport] = lifetime_s
        return True

    def deleteportmapping(self, number: int, transport: str) -> bool:
        del self.open[number, transport]
        return True


async def test_upnp_maps_and_gives_back() -> None:
    device = FakeDevice()
    gateway = UpnpGateway(device)
    lease = await gateway.map(TCP, 1200.0, external=4001)
    assert lease == Lease(ip=ipaddress.IPv4Address("45.1.0.1"), port=4001, lifetime_s=1200.0)
    assert device.open == {(4001, "TCP"): 1200}
    await gateway.unmap(TCP, lease)
    assert device.open == {}


async def test_upnp_takes_another_port_where_one_is_taken_and_a_lease_for_good_where_there_is_no_other() -> None:
    taken = FakeDevice(fails={4001: CONFLICT})
    lease = await UpnpGateway(taken).map(TCP, 1200.0, external=4001)
    assert lease.port != 4001
    assert taken.open == {(lease.port, "TCP"): 1200}
    old = FakeDevice(fails={0: ONLY_PERMANENT})
    assert (await UpnpGateway(old).map(TCP, 1200.0, external=4001)).lifetime_s == 0.0
    with pytest.raises(GatewayError, match="InvalidArgs"):
        await UpnpGateway(FakeDevice(fails={4001: "InvalidArgs"})).map(TCP, 1200.0, external=4001)


@pytest.mark.parametrize("outer_ip", ["", "nonsense"])
async def test_upnp_leaves_no_mapping_behind_where_the_router_does_not_know_its_own_address(outer_ip: str) -> None:
    """As without a line to the internet. Nobody would ever give that mapping back."""
    device = FakeDevice(outer_ip=outer_ip)
    with pytest.raises(GatewayError):
        await UpnpGateway(device).map(TCP, 1200.0, external=4001)
    assert device.open == {}

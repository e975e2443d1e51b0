"""Ports of routers, and what nodes find out about themselves, over an internet in memory."""

from __future__ import annotations

import ipaddress
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import pytest
import trio
from trio.testing import MockClock

from net.addresses import Multiaddr, tcp
from net.host import Host, open_host
from net.nat import endpoints
from net.nat.dialback import DialBackSettings
from net.nat.gateway import Gateway, GatewayError, Lease, Port
from net.nat.mapping import FindGateway, MappingSettings, MappingState, PortMapper
from net.nat.observed import Mapping
from net.nat.reachability import Kind, Reachability, ReachabilitySettings
from tests.gateways import found, nothing
from tests.mem.internet import Internet, Machine, Router
from tests.net_helpers import seeded

PEERS = ["44.1.0.1", "44.2.0.1", "44.3.0.1"]
INNER = "192.168.1.10"
TCP, UDP = Port(transport="tcp", number=4001), Port(transport="udp", number=4001)


@dataclass(kw_only=True, eq=False)
class FakeGateway:
    """A router that says what it is told to say, and forwards in ``router``, if it has one."""

    name: str = "fake"
    ip: str = "45.1.0.1"
    router: Router | None = None
    lifetime_s: float = 1200.0
    refuses: bool = False
    is_silent: bool = False
    calls: list[tuple[float, str, Port]] = field(default_factory=list)
    open: set[Port] = field(default_factory=set)

    async def map(self, port: Port, lifetime_s: float, *, external: int) -> Lease:
        self.calls.append((trio.current_time(), "map", port))
        await self._answer()
        self.open.add(port)
        if self.router is not None:
            self.router.forwards[external] = (INNER, port.number)
        return Lease(ip=ipaddress.IPv4Address(self.ip), port=external, lifetime_s=self.lifetime_s)

    async def unmap(self, port: Port, lease: Lease) -> None:
        self.calls.append((trio.current_time(), "unmap", port))
        await self._answer()
        self.open.discard(port)
        if self.router is not None:
            del self.router.forwards[lease.port]

    async def _answer(self) -> None:
        await trio.sleep(0.1)
        if self.is_silent:
            await trio.sleep_forever()
        if self.refuses:
            raise GatewayError("the router refuses (no)")


@asynccontextmanager
async def mapping(*finders: FindGateway) -> AsyncIterator[PortMapper]:
    mapper = PortMapper(finders=finders, settings=MappingSettings(lifetime_s=1200.0))
    async with trio.open_nursery() as nursery:
        await nursery.start(mapper.run)
        mapper.want([TCP, UDP])
        await trio.sleep(1)
        yield mapper
        nursery.cancel_scope.cancel()


# The router


async def test_ports_are_mapped_renewed_at_half_their_time_and_given_back(autojump_clock: MockClock) -> None:
    gateway = FakeGateway(lifetime_s=100.0)
    async with mapping(nothing, found(gateway)) as mapper:
        assert mapper.state is MappingState.MAPPED
        assert mapper.protocol == "fake"
        assert {str(port): str(outer) for port, outer in mapper.mapped.items()} == {
            "4001/tcp": "45.1.0.1:4001/tcp",
            "4001/udp": "45.1.0.1:4001/udp",
        }
        first = [call[0] for call in gateway.calls]
        await trio.sleep(60)
        assert [round(call[0] - first[0]) for call in gateway.calls[2:]] == [50, 50]
        mapper.want([TCP])
        await trio.sleep(1)
        assert gateway.open == {TCP}
    assert gateway.open == set()


async def test_leaving_takes_two_seconds_at_most(autojump_clock: MockClock) -> None:
    gateway = FakeGateway()
    async with mapping(found(gateway)):
        gateway.is_silent = True
        began = trio.current_time()
    assert trio.current_time() - began == pytest.approx(2)


async def test_no_router_and_one_that_refuses_are_states_with_words(autojump_clock: MockClock) -> None:
    async with mapping(nothing, nothing) as mapper:
        assert mapper.state is MappingState.NO_ROUTER
        assert "no router" in mapper.problem
    gateway = FakeGateway(refuses=True)
    async with mapping(found(gateway)) as mapper:
        assert mapper.state is MappingState.REFUSED
        assert "refuses" in mapper.problem
        await trio.sleep(3600)
        assert 4 <= len(gateway.calls) <= 20  # it is asked less and less often
        gateway.refuses = False
        await trio.sleep(1800)
        assert len(mapper.mapped) == 2


async def test_a_silent_router_is_given_up_and_a_router_behind_nat_is_told(autojump_clock: MockClock) -> None:
    async with mapping(found(FakeGateway(is_silent=True))) as mapper:
        await trio.sleep(60)
        assert mapper.state is MappingState.REFUSED
        assert "no answer" in mapper.problem
    async with mapping(found(FakeGateway(ip="100.64.3.4"))) as mapper:
        assert mapper.state is MappingState.INNER
        assert "100.64.3.4" in mapper.problem


async def test_a_router_that_forgets_is_asked_again_and_another_one_is_found(autojump_clock: MockClock) -> None:
    old, new = FakeGateway(), FakeGateway(ip="45.2.0.2")
    here = [old]

    async def find() -> Gateway:
        await trio.lowlevel.checkpoint()
        return here[0]

    async with mapping(find) as mapper:
        here[0] = new
        mapper.network_changed()
        await trio.sleep(1)
        assert {outer.ip for outer in mapper.mapped.values()} == {ipaddress.ip_address("45.2.0.2")}


# A node's own picture


@dataclass(kw_only=True, eq=False)
class Node:
    host: Host
    reachability: Reachability
    wants: list[int]
    moves: list[float]  # when it was told that the network has changed
    peers: list[Host] = field(default_factory=list)  # that it has met


@asynccontextmanager
async def node_at(
    internet: Internet, machine: Machine, number: int, mapper: PortMapper | None = None, *, listens: bool = True
) -> AsyncIterator[Node]:
    outside = machine.ip if machine.behind is None else machine.behind.ip
    dial_back = DialBackSettings(transports=lambda: [internet.machine(outside)])
    listen = [tcp(machine.ip, 4001)] if listens else []
    async with open_host(seeded(number), listen=listen, transports=[machine]) as host, trio.open_nursery() as nursery:
        wants: list[int] = []
        settings = ReachabilitySettings(dial_back=dial_back)
        moves: list[float] = []
        reachability = Reachability(
            host,
            mapper=mapper,
            want=wants.append,
            moved=lambda: moves.append(trio.current_time()),
            settings=settings,
        )
        await nursery.start(reachability.run)
        yield Node(host=host, reachability=reachability, wants=wants, moves=moves)
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def among_peers(
    machine: Machine, internet: Internet, mapper: PortMapper | None = None, *, peers: int = 3
) -> AsyncIterator[Node]:
    """A node that has met some public peers."""
    async with trio.open_nursery() as nursery:
        where: list[Host] = []

        async def be_a_peer(number: int, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
            async with node_at(internet, internet.machine(PEERS[number]), 10 + number) as peer:
                where.append(peer.host)
                task_status.started()
                await trio.sleep_forever()

        for number in range(peers):
            await nursery.start(be_a_peer, number)
        async with node_at(internet, machine, 1, mapper) as node:
            for peer in where:
                await node.host.connect(peer.peer_id, peer.addresses)
            node.peers = where
            await trio.sleep(40)
            yield node
        nursery.cancel_scope.cancel()


async def test_a_public_machine_knows_it_and_wants_no_relays(autojump_clock: MockClock) -> None:
    internet = Internet()
    async with among_peers(internet.machine("45.1.0.1"), internet) as node:
        assert node.reachability.kind is Kind.PUBLIC
        assert node.host.reachability == "public"
        assert node.host.addresses == [tcp("45.1.0.1", 4001)]
        assert node.reachability.evidence.tcp is Mapping.NONE
        assert node.wants == [0]


async def test_one_peer_is_enough_to_know_that(autojump_clock: MockClock) -> None:
    internet = Internet()
    async with among_peers(internet.machine("45.1.0.1"), internet, peers=1) as node:
        assert node.reachability.kind is Kind.PUBLIC


async def test_behind_a_nat_that_keeps_its_ports_it_can_be_met(autojump_clock: MockClock) -> None:
    internet = Internet()
    async with among_peers(internet.machine(INNER, internet.router("45.1.0.1")), internet) as node:
        assert node.reachability.kind is Kind.PUNCHABLE
        (outer,) = node.reachability.sights
        assert (str(outer.ip), outer.transport) == ("45.1.0.1", "tcp")
        assert node.wants == [0, 2]
        assert node.host.addresses == [tcp(INNER, 4001)]


async def test_where_a_port_is_seen_that_nobody_listens_on_is_no_sight_to_tell(autojump_clock: MockClock) -> None:
    """As when the listening port's own way to a relay was still taken by a connection that broke."""
    internet = Internet()
    machine = internet.machine(INNER, internet.router("45.1.0.1"))
    machine.shares_port = False
    async with among_peers(machine, internet, peers=2) as node:
        assert node.reachability.sights == []
        machine.shares_port = True
        async with node_at(internet, internet.machine(PEERS[2]), 12) as peer:
            await node.host.connect(peer.host.peer_id, peer.host.addresses)
            await trio.sleep(2)
            (outer,) = node.reachability.sights
            assert outer == endpoints.read(tcp("45.1.0.1", 30_002))


async def test_who_does_not_listen_is_met_where_it_dials_from(autojump_clock: MockClock) -> None:
    internet = Internet()
    machine = internet.machine(INNER, internet.router("45.1.0.1"))
    async with (
        node_at(internet, internet.machine(PEERS[0]), 10) as peer,
        node_at(internet, machine, 1, listens=False) as client,
    ):
        await client.host.connect(peer.host.peer_id, peer.host.addresses)
        await trio.sleep(2)
        assert client.reachability.sights == [endpoints.read(tcp("45.1.0.1", 30_000))]


@pytest.mark.parametrize("peers", [1, 3])
async def test_behind_a_symmetric_nat_only_relays_are_left(autojump_clock: MockClock, peers: int) -> None:
    internet = Internet()
    router = internet.router("45.1.0.1", symmetric=True)
    async with among_peers(internet.machine(INNER, router), internet, peers=peers) as node:
        assert node.reachability.kind is Kind.RELAY_ONLY
        assert len(node.reachability.sights) == peers  # each sees another port
        assert node.wants == [0, 2]


async def test_a_port_that_somebody_forwards_is_found_out(autojump_clock: MockClock) -> None:
    internet = Internet()
    router = internet.router("45.1.0.1", symmetric=True)
    router.forwards[4001] = (INNER, 4001)
    async with among_peers(internet.machine(INNER, router), internet) as node:
        assert node.reachability.kind is Kind.PUBLIC
        assert node.host.addresses == [tcp("45.1.0.1", 4001), tcp(INNER, 4001)]


async def test_a_mapped_port_is_checked_announced_and_given_back(autojump_clock: MockClock) -> None:
    internet = Internet()
    router = internet.router("45.1.0.1", symmetric=True)
    gateway = FakeGateway(router=router)
    mapper = PortMapper(finders=[found(gateway)])
    async with among_peers(internet.machine(INNER, router), internet, mapper) as node:
        assert node.reachability.kind is Kind.MAPPED
        assert node.reachability.evidence.verdicts[tcp("45.1.0.1", 4001)].value == "reachable"
        assert node.host.addresses == [tcp("45.1.0.1", 4001), tcp(INNER, 4001)]
        assert node.wants[-1] == 0
        assert router.forwards
    assert not router.forwards


async def test_a_mapping_that_the_router_ends_is_noticed(autojump_clock: MockClock) -> None:
    internet = Internet()
    router = internet.router("45.1.0.1", symmetric=True)
    gateway = FakeGateway(router=router)
    async with among_peers(internet.machine(INNER, router), internet, PortMapper(finders=[found(gateway)])) as node:
        gateway.refuses = True
        router.forwards.clear()
        with trio.fail_after(1300):
            assert await node.reachability.wait_until(lambda kind: kind is not Kind.MAPPED) is Kind.RELAY_ONLY
        assert node.host.addresses == [tcp(INNER, 4001)]
        assert node.wants[-1] == 2


async def test_nobody_outside_is_there_to_tell(autojump_clock: MockClock) -> None:
    internet = Internet()
    router = internet.router("45.1.0.1")
    async with (
        node_at(internet, internet.machine("192.168.1.11", router), 2) as neighbour,
        node_at(internet, internet.machine(INNER, router), 1) as node,
    ):
        await node.host.connect(neighbour.host.peer_id, neighbour.host.addresses)
        await trio.sleep(100)
        assert node.reachability.kind is neighbour.reachability.kind is Kind.UNKNOWN
        assert node.wants == [0]


async def test_another_network_is_found_out_anew(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    internet = Internet()
    async with among_peers(internet.machine("45.1.0.1"), internet) as node:
        monkeypatch.setattr(node.host, "listening", [tcp("10.0.0.7", 4001)])
        for connection in node.host.swarm.connections:
            connection.mux.close()
        await trio.sleep(15)
        assert node.reachability.kind is Kind.UNKNOWN
        assert node.host.addresses == [tcp("10.0.0.7", 4001)]


@asynccontextmanager
async def behind_a_nat(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Node, Router, list[float]]]:
    """A node that needs relays, its router, and when its swarm was told of another network."""
    internet = Internet()
    router = internet.router("45.1.0.1")
    async with among_peers(internet.machine(INNER, router), internet) as node:
        told: list[float] = []
        network_changed = node.host.swarm.network_changed

        def noted() -> None:
            told.append(trio.current_time())
            network_changed()

        monkeypatch.setattr(node.host.swarm, "network_changed", noted)
        assert (node.wants, node.moves, told) == ([0, 2], [], [])
        yield node, router, told


async def meet_again(node: Node, peers: list[Host]) -> None:
    """Lose all connections, and have others."""
    for connection in node.host.swarm.connections:
        connection.mux.close()
    await trio.sleep(0.1)
    for peer in peers:
        await node.host.connect(peer.peer_id, peer.addresses)
    await trio.sleep(0.1)


async def test_who_is_seen_elsewhere_starts_over_once(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with behind_a_nat(monkeypatch) as (node, router, told):
        router.ip = "45.1.0.2"
        await meet_again(node, node.peers[:1])
        assert len(node.moves) == len(told) == 1
        assert node.host.reachability == Kind.UNKNOWN.value
        assert {str(each.ip) for each in node.reachability.sights} == {"45.1.0.2"}
        await meet_again(node, node.peers)
        await trio.sleep(60)
        assert len(node.moves) == len(told) == 1
        assert node.reachability.kind is Kind.PUNCHABLE
        assert {str(each.ip) for each in node.reachability.sights} == {"45.1.0.2"}
        assert node.wants == [0, 2]  # those that there were have been kept


async def test_who_is_seen_where_it_was_does_not_start_over(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with behind_a_nat(monkeypatch) as (node, _, told):
        for _ in range(3):
            await meet_again(node, node.peers)
            await trio.sleep(60)
        assert node.moves == told == []
        assert node.reachability.kind is Kind.PUNCHABLE


async def test_a_nat_with_many_addresses_is_not_taken_for_another_network(autojump_clock: MockClock) -> None:
    """Three peers at one IP, which see the node at three IPs of its provider's."""
    internet = Internet()
    router = internet.router("45.1.0.1")
    async with AsyncExitStack() as stack:
        peers = [
            await stack.enter_async_context(
                open_host(
                    seeded(11 + number),
                    listen=[tcp("44.1.0.1", 4001 + number)],
                    transports=[internet.machine("44.1.0.1")],
                )
            )
            for number in range(3)
        ]
        node = await stack.enter_async_context(node_at(internet, internet.machine(INNER, router), 1))
        for number, peer in enumerate(peers):
            router.ip = f"45.1.0.{number + 1}"
            await node.host.connect(peer.peer_id, peer.addresses)
            await trio.sleep(1)
        await trio.sleep(120)
        assert len(node.host.swarm.connections) == 3
        assert node.moves == []


async def test_another_own_address_starts_over_and_keeps_reservations(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with behind_a_nat(monkeypatch) as (node, _, told):
        assert node.reachability.sights
        moved_at = trio.current_time()
        monkeypatch.setattr(node.host, "listening", [tcp("10.0.0.7", 4001)])
        for connection in node.host.swarm.connections:
            connection.mux.close()
        await trio.sleep(node.reachability._settings.look_s + 0.1)
        assert len(node.moves) == len(told) == 1
        assert node.moves[0] - moved_at <= node.reachability._settings.look_s
        assert node.reachability.sights == []
        await trio.sleep(300)
        assert node.reachability.kind is Kind.UNKNOWN
        assert node.wants == [0, 2]
        assert len(node.moves) == len(told) == 1


async def test_connections_that_outlive_another_own_address_are_asked_again(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with behind_a_nat(monkeypatch) as (node, _, _):
        settings = node.reachability._settings
        monkeypatch.setattr(node.host, "listening", [tcp("192.168.1.11", 4001)])
        await trio.sleep(settings.look_s + 0.1)
        assert node.reachability.sights == []
        await trio.sleep(settings.change_s + 2 * settings.look_s)
        assert len(node.reachability.sights) == 1
        assert len(node.moves) == 1


async def test_afterwards_the_host_is_as_before(autojump_clock: MockClock) -> None:
    internet = Internet()
    async with open_host(seeded(1), listen=[tcp("45.1.0.1", 4001)], transports=[internet.machine("45.1.0.1")]) as host:
        async with trio.open_nursery() as nursery:
            await nursery.start(Reachability(host).run)
            assert len(host.swarm.watchers) == 1
            nursery.cancel_scope.cancel()
        assert host.swarm.watchers == []
        own: list[Multiaddr] = host.own_addresses
        assert host.addresses == own

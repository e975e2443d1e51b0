"""Relays between whole hosts, in memory and on a virtual clock: who gets what, what passes, what ends."""

from __future__ import annotations

import functools
import itertools
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from net import errors, identify
from net.addresses import Multiaddr, PeerAddress, relayed_by, tcp
from net.host import Host, open_host
from net.identity import Identity, PeerId
from net.mux.base import Stream
from net.mux.driver import YamuxConnection
from net.nurseries import open_service_nursery
from net.relay import vouchers, wire
from net.relay.client import RelayClient, RelayClientSettings
from net.relay.reservations import RelayLimits
from net.relay.server import RETURN_S, RelayServer
from net.relay.wire import HopMessage, Status, StopMessage
from net.swarm import Connection
from net.transports import circuit
from net.transports.base import RawConnection, TrafficLimit, Transport
from net.transports.circuit import CircuitTransport, Reservation
from net.transports.memory import MemoryNetwork, MemoryTransport
from tests.mem.lines import Line, LineTransport
from tests.net_helpers import MEMORY_ANY, receive_all, receive_count, seeded

SINK, ECHO = "/test/sink/1", "/test/echo/1"


async def settled() -> None:
    await trio.testing.wait_all_tasks_blocked()


@asynccontextmanager
async def a_host(
    network: MemoryNetwork, number: int, *, listens: bool = False, line: Line | None = None
) -> AsyncIterator[Host]:
    """One that can use relays, and by default cannot be reached without."""
    transports: list[Transport] = [LineTransport(network, line), CircuitTransport()]
    async with open_host(seeded(number), listen=[MEMORY_ANY] if listens else [], transports=transports) as host:

        async def echo(connection: Connection, stream: Stream) -> None:
            while data := await stream.receive_some():
                await stream.send_all(data)

        host.handle(ECHO, echo)
        yield host


@asynccontextmanager
async def a_relay(
    network: MemoryNetwork, number: int = 50, limits: RelayLimits | None = None, line: Line | None = None
) -> AsyncIterator[RelayServer]:
    async with a_host(network, number, listens=True, line=line) as host, trio.open_nursery() as nursery:
        server = RelayServer(host, limits)
        await nursery.start(server.run)
        yield server
        nursery.cancel_scope.cancel()


def circuits(host: Host) -> CircuitTransport:
    [found] = [each for each in host.swarm.transports if isinstance(each, CircuitTransport)]
    return found


async def reserve(host: Host, server: RelayServer, nursery: trio.Nursery) -> Reservation:
    """A reservation that lasts as long as ``nursery``, or until it is lost."""
    relay = server.host.peer_addresses[0]

    async def hold(*, task_status: trio.TaskStatus[Reservation]) -> None:
        with suppress(errors.ConnectionLost):
            await circuits(host).reserve(relay, host.swarm.accept, task_status=task_status)

    found: Reservation = await nursery.start(hold)
    return found


@dataclass(frozen=True, kw_only=True)
class Trio:
    """A relay, one who dials, and one who has a reservation."""

    server: RelayServer
    near: Host
    far: Host
    reservation: Reservation
    nursery: trio.Nursery

    @property
    def at(self) -> Multiaddr:
        return self.reservation.addresses[0]


@asynccontextmanager
async def three(limits: RelayLimits | None = None) -> AsyncIterator[Trio]:
    network = MemoryNetwork()
    async with (
        a_relay(network, limits=limits) as server,
        a_host(network, 1) as near,
        a_host(network, 2) as far,
        trio.open_nursery() as nursery,
    ):
        reservation = await reserve(far, server, nursery)
        yield Trio(server=server, near=near, far=far, reservation=reservation, nursery=nursery)
        nursery.cancel_scope.cancel()


# Meeting at a relay


async def test_two_who_cannot_be_reached_meet(autojump_clock: MockClock) -> None:
    async with three() as world:
        connection = await world.near.connect(world.far.peer_id, [world.at])
        assert (connection.peer_id, connection.relayed, connection.limit) == (world.far.peer_id, True, None)
        async with world.near.stream(world.far.peer_id, [ECHO]) as stream:
            await stream.send_all(b"through a relay")
            assert await receive_count(stream, 15) == b"through a relay"
        inbound = world.far.swarm.connection(world.near.peer_id)
        assert inbound is not None and not inbound.outbound
        assert inbound.remote == world.at == relayed_by(world.server.host.peer_addresses[0])
        assert world.server.circuits == 1
        assert {each.peer_id for each in world.server.host.swarm.connections} == {
            world.near.peer_id,
            world.far.peer_id,
        }  # it has met both, and is no end of what they say
        connection.mux.close()
        await trio.sleep(2)
        assert world.server.circuits == 0
        assert world.far.swarm.connection(world.near.peer_id) is None


async def test_listening_through_a_relay(autojump_clock: MockClock) -> None:
    """``/.../p2p-circuit`` is an address to listen on like any other."""
    network = MemoryNetwork()
    async with a_relay(network) as server, a_host(network, 1) as near:
        at = relayed_by(server.host.peer_addresses[0])
        transports: list[Transport] = [network.transport(), CircuitTransport()]
        async with open_host(seeded(2), listen=[at], transports=transports) as far:
            assert far.addresses == [at]
            await near.connect(far.peer_id, far.addresses)
        nowhere = relayed_by(PeerAddress(address=Multiaddr("/memory/777"), peer_id=seeded(9).peer_id))
        with pytest.raises(errors.AddressError, match="cannot listen on"):
            async with open_host(seeded(2), listen=[nowhere], transports=[network.transport(), CircuitTransport()]):
                pytest.fail("it must not come up")


async def test_who_leaves_says_goodbye_through_the_relay(autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    async with a_relay(network) as server, a_host(network, 1) as near:
        at = relayed_by(server.host.peer_addresses[0])
        transports: list[Transport] = [network.transport(), CircuitTransport()]
        async with open_host(seeded(2), listen=[at], transports=transports) as far:
            connection = await near.connect(far.peer_id, far.addresses)
        await connection.ended.wait()
        with pytest.raises(errors.ConnectionLost, match="closed by the other side"):
            connection.mux.open_stream()


async def test_a_direct_address_is_tried_before_a_relayed_one(autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    async with (
        a_relay(network) as server,
        a_host(network, 1) as near,
        a_host(network, 2, listens=True) as far,
        trio.open_nursery() as nursery,
    ):
        reservation = await reserve(far, server, nursery)
        known = [reservation.addresses[0], *far.addresses]
        assert not (await near.connect(far.peer_id, known)).relayed
        nursery.cancel_scope.cancel()


async def test_new_streams_move_to_a_direct_connection(autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    async with (
        a_relay(network) as server,
        a_host(network, 1) as near,
        a_host(network, 2, listens=True) as far,
        trio.open_nursery() as nursery,
    ):
        reservation = await reserve(far, server, nursery)
        relayed = await near.connect(far.peer_id, [reservation.addresses[0]])
        talk = await near.open_stream(far.peer_id, [ECHO])
        await trio.sleep(100)
        direct = await near.swarm._race(far.peer_id, far.addresses)
        for host, other in ((near, far), (far, near)):
            used = host.swarm.connection(other.peer_id)
            assert used is not None and not used.relayed
        assert near.swarm.connection(far.peer_id) is direct
        await talk.send_all(b"still there")
        assert await receive_count(talk, 11) == b"still there"
        await talk.aclose()
        await relayed.ended.wait()  # nobody uses it any more
        nursery.cancel_scope.cancel()


# What is refused


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (Status.RESERVATION_REFUSED, "gives no reservation"),
        (Status.RESOURCE_LIMIT_EXCEEDED, "no room for another circuit"),
        (Status.PERMISSION_DENIED, "does not permit"),
        (Status.CONNECTION_FAILED, "could not reach the peer"),
        (Status.NO_RESERVATION, "has no reservation"),
        (Status.MALFORMED_MESSAGE, "did not understand"),
        (Status.UNEXPECTED_MESSAGE, "did not expect"),
        (299, "status 299"),
    ],
)
async def test_every_refusal_has_its_words(status: int, words: str, autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    async with a_host(network, 50, listens=True) as relay, a_host(network, 1) as near:

        async def refuse(connection: Connection, stream: Stream) -> None:
            await wire.receive_hop(stream)
            if status in set(Status):
                answer = HopMessage(
                    type=HopMessage.STATUS, status=wire.write_status(Status(status))
                ).SerializeToString()
            else:
                answer = b"\x08\x02\x28\xab\x02"
            await stream.send_all(bytes([len(answer)]) + answer)

        relay.handle(wire.HOP, refuse)
        where = relayed_by(relay.peer_addresses[0])
        with pytest.raises(errors.DialError, match=words) as caught:
            await near.connect(seeded(2).peer_id, [where])
        assert str(where) in str(caught.value)
        with pytest.raises(errors.ReservationRefused, match=words):
            await circuits(near).reserve(relay.peer_addresses[0], near.swarm.accept)


async def test_one_that_is_no_relay_or_not_there_is_told(autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    async with a_host(network, 50, listens=True) as other, a_host(network, 1) as near:
        with pytest.raises(errors.DialError, match="no relay"):
            await near.connect(seeded(2).peer_id, [relayed_by(other.peer_addresses[0])])
        nowhere = PeerAddress(address=Multiaddr("/memory/777"), peer_id=seeded(9).peer_id)
        with pytest.raises(errors.DialError, match="nobody listens"):
            await near.connect(seeded(2).peer_id, [relayed_by(nowhere)])


async def test_a_target_that_is_gone_has_no_reservation_any_more(autojump_clock: MockClock) -> None:
    async with three() as world:
        for connection in world.far.swarm.connections:
            connection.mux.close()
        await settled()
        began = trio.current_time()
        with pytest.raises(errors.DialError, match="has no reservation"):
            await world.near.connect(world.far.peer_id, [world.at])
        assert trio.current_time() - began == pytest.approx(RETURN_S, abs=0.5)  # it might have come back
        began = trio.current_time()
        with pytest.raises(errors.DialError, match="has no reservation"):
            await world.near.connect(world.far.peer_id, [world.at])
        assert trio.current_time() - began < 0.1
        assert world.server.reservations == 0


async def test_who_comes_back_while_it_is_called_is_reached(autojump_clock: MockClock) -> None:
    async with three() as world:
        for connection in world.far.swarm.connections:
            connection.mux.close()
        await settled()

        async def come_back() -> None:
            await trio.sleep(1)
            await world.nursery.start(
                circuits(world.far).reserve, world.server.host.peer_addresses[0], world.far.swarm.accept
            )

        world.nursery.start_soon(come_back)
        began = trio.current_time()
        await world.near.connect(world.far.peer_id, [world.at])
        assert trio.current_time() - began == pytest.approx(1, abs=0.1)


async def test_limits_of_circuits_and_reservations(autojump_clock: MockClock) -> None:
    limits = RelayLimits(reservations=1, circuits_per_pair=1)
    async with three(limits) as world:
        relay = world.server.host.peer_addresses[0]
        with pytest.raises(errors.ReservationRefused):
            await circuits(world.near).reserve(relay, world.near.swarm.accept)
        first = await circuits(world.near).dial(world.at, world.far.peer_id)
        with pytest.raises(errors.DialError, match="no room for another circuit"):
            await circuits(world.near).dial(world.at, world.far.peer_id)
        await first.stream.aclose()
        await trio.sleep(world.far.limits.handshake_s + 1)
        assert world.server.circuits == 0
        await (await circuits(world.near).dial(world.at, world.far.peer_id)).stream.aclose()


@pytest.mark.parametrize(
    ("message", "status"),
    [
        (b"\xff\xff\xff", Status.MALFORMED_MESSAGE),
        (HopMessage(type=HopMessage.CONNECT).SerializeToString(), Status.MALFORMED_MESSAGE),
        (HopMessage(type=HopMessage.STATUS).SerializeToString(), Status.UNEXPECTED_MESSAGE),
        (b"", Status.UNEXPECTED_MESSAGE),
    ],
)
async def test_nonsense_is_answered(message: bytes, status: Status, autojump_clock: MockClock) -> None:
    async with three() as world:
        relay = world.server.host.peer_addresses[0]
        stream = await world.near.open_stream(relay.peer_id, [wire.HOP], [relay.address])
        await stream.send_all(bytes([len(message)]) + message)
        assert wire.status_of(await wire.receive_hop(stream)) == status


async def test_a_message_without_end_is_not_read(autojump_clock: MockClock) -> None:
    async with three() as world:
        relay = world.server.host.peer_addresses[0]
        stream = await world.near.open_stream(relay.peer_id, [wire.HOP], [relay.address])
        await stream.send_all(b"\xff\x7f" + bytes(5_000))
        assert wire.status_of(await wire.receive_hop(stream)) == Status.MALFORMED_MESSAGE
        silent = await world.near.open_stream(relay.peer_id, [wire.HOP])
        with pytest.raises(errors.StreamReset):
            await silent.receive_some()


async def test_relays_are_not_chained(autojump_clock: MockClock) -> None:
    """Who is itself reached through a relay gets neither reservation nor circuit."""
    async with three() as world:
        server = RelayServer(world.far)
        await world.nursery.start(server.run)
        await world.near.connect(world.far.peer_id, [world.at])
        behind = PeerAddress(address=world.at, peer_id=world.far.peer_id)
        with pytest.raises(errors.DialError, match="itself behind a relay"):
            await circuits(world.near).reserve(behind, world.near.swarm.accept)
        stream = await world.near.open_stream(world.far.peer_id, [wire.HOP])
        await wire.send_message(stream, HopMessage(type=HopMessage.RESERVE))
        assert wire.status_of(await wire.receive_hop(stream)) == Status.PERMISSION_DENIED


async def test_a_circuit_that_nobody_asked_for_is_refused(autojump_clock: MockClock) -> None:
    """A peer that is not our relay cannot bring us anybody."""
    network = MemoryNetwork()
    async with a_host(network, 1, listens=True) as stranger, a_host(network, 2, listens=True) as host:
        await stranger.connect(host.peer_id, host.addresses)
        connect = StopMessage(type=StopMessage.CONNECT, peer=wire.peer(seeded(3).peer_id))
        for message, status in (
            (connect, Status.PERMISSION_DENIED),
            (StopMessage(type=StopMessage.CONNECT), Status.MALFORMED_MESSAGE),
            (StopMessage(type=StopMessage.STATUS, peer=wire.peer(seeded(3).peer_id)), Status.UNEXPECTED_MESSAGE),
        ):
            stream = await stranger.open_stream(host.peer_id, [wire.STOP])
            await wire.send_message(stream, message)
            assert wire.status_of(await wire.receive_stop(stream)) == status


# Vouchers and lifetimes


@asynccontextmanager
async def a_false_relay(
    network: MemoryNetwork, voucher: Callable[[Identity, PeerId], bytes], expire: Callable[[], float]
) -> AsyncIterator[tuple[PeerAddress, list[float]]]:
    """It grants everything. Also gives when it was asked."""
    async with a_host(network, 60, listens=True) as host:
        asked: list[float] = []

        async def grant(connection: Connection, stream: Stream) -> None:
            await wire.receive_hop(stream)
            asked.append(trio.current_time())
            reservation = wire.Reservation(expire=int(expire()), voucher=voucher(host.identity, connection.peer_id))
            answer = HopMessage(type=HopMessage.STATUS, status=wire.write_status(Status.OK), reservation=reservation)
            await wire.send_message(stream, answer)

        host.handle(wire.HOP, grant)
        yield host.peer_addresses[0], asked


@pytest.mark.parametrize(
    ("voucher", "reason"),
    [
        (lambda relay, peer: vouchers.issue(seeded(3), peer, int(time.time()) + 60), "signed"),
        (lambda relay, peer: vouchers.issue(relay, seeded(3).peer_id, int(time.time()) + 60), "another peer"),
        (lambda relay, peer: vouchers.issue(relay, peer, int(time.time()) - 7200), "expired"),
        (lambda relay, peer: b"nonsense", "no valid voucher"),
    ],
    ids=["forged", "somebody else's", "expired", "nonsense"],
)
async def test_a_false_voucher_is_no_reservation(
    voucher: Callable[[Identity, PeerId], bytes], reason: str, autojump_clock: MockClock
) -> None:
    network = MemoryNetwork()
    async with (
        a_false_relay(network, voucher, lambda: time.time() + 60) as (relay, _),
        a_host(network, 1) as host,
    ):
        with pytest.raises(errors.ReservationRefused, match=reason):
            await circuits(host).reserve(relay, host.swarm.accept)


@pytest.mark.parametrize(
    ("ends_in_s", "lifetime_s"),
    [(200, 200), (60, 60), (-3000, 120), (7000, 300)],
    ids=["minutes", "one minute", "the relay's clock is behind", "it is ahead"],
)
async def test_reservations_are_renewed_in_time(
    ends_in_s: int, lifetime_s: int, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(circuit, "MAX_LIFETIME_S", 300.0)  # an hour of keepalives takes long, even on a virtual clock
    network = MemoryNetwork()
    expire = lambda: time.time() + ends_in_s + 0.5  # noqa: E731
    async with (
        a_false_relay(network, lambda *_: b"", expire) as (relay, asked),
        a_host(network, 1) as host,
        trio.open_nursery() as nursery,
    ):
        await nursery.start(circuits(host).reserve, relay, host.swarm.accept)
        await trio.sleep(3 * lifetime_s)
        pauses = [later - sooner for sooner, later in itertools.pairwise(asked)]
        assert len(pauses) >= 3
        assert pauses == pytest.approx([0.75 * lifetime_s] * len(pauses), abs=2)
        nursery.cancel_scope.cancel()


async def test_what_a_relay_says_of_its_addresses(autojump_clock: MockClock) -> None:
    """Where we met it comes first; others only if they are its own."""
    network = MemoryNetwork()
    async with a_relay(network) as server, a_host(network, 1) as host, trio.open_nursery() as nursery:
        me = server.host.peer_id
        server.host.review = lambda own: [*own, *(Multiaddr(f"/ip4/198.51.100.{n}/tcp/1") for n in range(9))]
        told = server._addresses()
        assert len(told) == 10
        server._addresses = lambda: [  # type: ignore[method-assign]
            b"nonsense",
            Multiaddr(f"/ip4/192.0.2.1/tcp/1/p2p/{seeded(3).peer_id}").to_bytes(),
            Multiaddr(f"/ip4/192.0.2.1/tcp/1/p2p/{me}/p2p-circuit/p2p/{me}").to_bytes(),
            *told,
        ]
        reservation = await reserve(host, server, nursery)
        assert reservation.addresses == tuple(
            Multiaddr(f"{where}/p2p/{me}/p2p-circuit")
            for where in (server.host.own_addresses[0], *(f"/ip4/198.51.100.{n}/tcp/1" for n in range(3)))
        )
        nursery.cancel_scope.cancel()


# What passes


@asynccontextmanager
async def raw_circuit(world: Trio) -> AsyncIterator[tuple[Stream, Stream]]:
    """The two streams at the ends of one circuit, without anything around them."""
    got, give = trio.open_memory_channel[Stream](1)[::-1]
    finish = trio.Event()

    async def take(connection: Connection, stream: Stream) -> None:
        await wire.receive_stop(stream)
        status = wire.write_status(Status.OK)
        await wire.send_message(stream, StopMessage(type=StopMessage.STATUS, status=status))
        await give.send(stream)
        await finish.wait()

    world.far.unhandle(wire.STOP)
    world.far.handle(wire.STOP, take)
    relay = world.server.host.peer_addresses[0]
    near = await world.near.open_stream(relay.peer_id, [wire.HOP], [relay.address])
    await wire.send_message(near, HopMessage(type=HopMessage.CONNECT, peer=wire.peer(world.far.peer_id)))
    far = await got.receive()
    assert wire.status_of(await wire.receive_hop(near)) == Status.OK
    yield near, far
    finish.set()


@pytest.mark.parametrize("turned", [False, True])
async def test_an_end_passes_and_the_other_direction_goes_on(turned: bool, autojump_clock: MockClock) -> None:
    async with three() as world, raw_circuit(world) as pair:
        one, two = pair[::-1] if turned else pair
        await one.send_all(b"a question")
        await one.send_eof()
        assert await receive_all(two) == b"a question"
        await trio.sleep(10)
        await two.send_all(bytes(1_000_000))
        await two.send_eof()
        assert len(await receive_all(one)) == 1_000_000
        await settled()
        assert world.server.circuits == 0


@pytest.mark.parametrize("turned", [False, True])
async def test_a_reset_passes(turned: bool, autojump_clock: MockClock) -> None:
    async with three() as world, raw_circuit(world) as pair:
        one, two = pair[::-1] if turned else pair
        await one.send_all(b"half a mess")
        await settled()
        one.reset()
        with pytest.raises(errors.StreamReset):
            await receive_all(two)
        await settled()
        assert world.server.circuits == 0


async def test_last_words_survive_a_side_that_takes_no_more(autojump_clock: MockClock) -> None:
    """One side has said all and is gone; the other hears all of it, and of its own sending that nobody is there."""
    data = random.Random(1).randbytes(1_500_000)
    async with three() as world, raw_circuit(world) as (near, far), trio.open_nursery() as nursery:

        async def speak() -> None:
            await far.send_all(data)
            await far.leave()

        async def interrupt() -> None:
            with pytest.raises(errors.StreamReset):
                while True:
                    await near.send_all(bytes(50_000))

        nursery.start_soon(speak)
        nursery.start_soon(interrupt)
        assert await receive_all(near) == data


async def test_a_lost_connection_is_a_reset_for_the_other_side(autojump_clock: MockClock) -> None:
    async with three() as world, raw_circuit(world) as (_, far):
        for connection in world.near.swarm.connections:
            connection.mux.close()
        with pytest.raises(errors.StreamReset):
            await far.receive_some()
        await settled()
        assert world.server.circuits == 0


async def test_a_relay_holds_little_for_one_who_does_not_read(autojump_clock: MockClock) -> None:
    limits = RelayLimits(circuit_window_bytes=300_000, circuit_idle_s=30)
    async with three(limits) as world, raw_circuit(world) as (near, far), trio.open_nursery() as nursery:
        sent = 0

        async def send(stream: Stream) -> None:
            nonlocal sent
            with pytest.raises(errors.StreamReset):
                while True:
                    await stream.send_all(bytes(10_000))
                    sent += 10_000

        async def read_much_then_nothing() -> None:
            await receive_count(far, 20_000_000)  # fast enough for windows to grow as far as they may

        nursery.start_soon(send, near)
        await read_much_then_nothing()
        await trio.sleep(10)
        traffic = world.server.traffic
        # Both senders' queues, both windows, and what is on its way.
        assert sent - 20_000_000 < 20_000_000
        assert traffic.bytes_in - 20_000_000 < 18_000_000
        assert world.server.circuits == 1
        await trio.sleep(30)
        assert world.server.circuits == 0  # stuck for too long


@pytest.mark.parametrize("limit", [TrafficLimit(bytes=100_000), TrafficLimit(seconds=60)])
async def test_limits_that_a_relay_sets(limit: TrafficLimit, autojump_clock: MockClock) -> None:
    async with three(RelayLimits(circuit_limit=limit)) as world:
        assert world.reservation.limit == limit
        connection = await world.near.connect(world.far.peer_id, [world.at])
        inbound = world.far.swarm.connection(world.near.peer_id)
        assert inbound is not None
        assert connection.limit == inbound.limit == limit
        stream = await world.near.open_stream(world.far.peer_id, [ECHO])
        await stream.send_all(bytes(50_000))
        await receive_count(stream, 50_000)
        if limit.bytes:
            await stream.send_all(bytes(80_000))
            with pytest.raises(errors.ConnectionLost, match="the connection broke"):
                await receive_count(stream, 80_000)
            assert world.server.traffic.bytes_in <= 2 * limit.bytes
        else:
            before = trio.current_time()
            await connection.ended.wait()
            assert trio.current_time() - before <= 61


# Shares


class Counted(trio.abc.Stream):
    """A stream whose bytes are counted."""

    def __init__(self, stream: trio.abc.Stream, count: Counter[str]) -> None:
        self._stream = stream
        self._count = count

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)
        self._count["out"] += len(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        data = bytes(await self._stream.receive_some(max_bytes))
        self._count["in"] += len(data)
        return data

    async def aclose(self) -> None:
        await self._stream.aclose()


class CountingTransport(MemoryTransport):
    def __init__(self, network: MemoryNetwork, count: Counter[str]) -> None:
        super().__init__(network)
        self._count = count

    async def listen(self, address: Multiaddr, accept: Any, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        async def counted(raw: Any) -> None:
            await accept(RawConnection(stream=Counted(raw.stream, self._count), local=raw.local, remote=raw.remote))

        await super().listen(address, counted, task_status=task_status)


async def test_a_relay_sends_hardly_more_than_it_gets(autojump_clock: MockClock) -> None:
    """On the wire, with all that security and muxers add: bulk one way, and talk both ways."""
    network, count = MemoryNetwork(), Counter[str]()
    transports = [CountingTransport(network, count)]
    async with (
        open_host(seeded(50), listen=[MEMORY_ANY], transports=transports) as relay,
        a_host(network, 1) as near,
        a_host(network, 2) as far,
        trio.open_nursery() as nursery,
    ):
        server = RelayServer(relay)
        await nursery.start(server.run)
        reservation = await reserve(far, server, nursery)
        await near.connect(far.peer_id, reservation.addresses[:1])
        for size, times in ((5_000_000, 1), (1_000, 200)):
            count.clear()
            before = server.traffic.bytes_in, server.traffic.bytes_out
            async with near.stream(far.peer_id, [ECHO]) as stream:
                for _ in range(times):
                    async with trio.open_nursery() as talk:
                        talk.start_soon(stream.send_all, bytes(size))
                        await receive_count(stream, size)
            await settled()
            assert server.traffic.bytes_in - before[0] == server.traffic.bytes_out - before[1] >= 2 * size * times
            assert count["out"] <= 1.1 * count["in"]
            print(f"{times} x {size}: {count['out'] / count['in']:.4f}")
        nursery.cancel_scope.cancel()


async def serve_sink(host: Host, received: Counter[PeerId]) -> None:
    async def sink(connection: Connection, stream: Stream) -> None:
        while data := await stream.receive_some():
            received[connection.peer_id] += len(data)

    host.handle(SINK, sink)


async def test_one_hog_among_ten_users_leaves_the_others_their_share(autojump_clock: MockClock) -> None:
    """Nine users with one circuit each and one with eight, all sending as fast as they can to different peers."""
    bytes_per_s = 2_000_000
    network, received = MemoryNetwork(), Counter[PeerId]()
    limits = RelayLimits(bytes_per_s=bytes_per_s)
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(a_relay(network, limits=limits))
        nursery = await stack.enter_async_context(trio.open_nursery())
        targets = []
        for number in range(100, 108):
            target = await stack.enter_async_context(a_host(network, number))
            await serve_sink(target, received)
            targets.append((target, await reserve(target, server, nursery)))
        users = [await stack.enter_async_context(a_host(network, number)) for number in range(1, 11)]
        hog = users[-1]

        async def push(user: Host, target: Host, at: Multiaddr) -> None:
            stream = await user.open_stream(target.peer_id, [SINK], [at])
            while True:
                await stream.send_all(bytes(100_000))

        for number, user in enumerate(users):
            chosen = targets if user is hog else [targets[number % len(targets)]]
            for target, reservation in chosen:
                nursery.start_soon(push, user, target, reservation.addresses[0])
        await until(lambda: sum(received.values()) >= 2_000_000 and len(received) == len(users), 60)
        before, began = Counter(received), trio.current_time()
        await until(lambda: sum(received.values()) >= sum(before.values()) + 10_000_000, 60)
        moved = sum(received.values()) - sum(before.values())
        assert moved / (trio.current_time() - began) == pytest.approx(bytes_per_s, rel=0.1)
        shares = {user.peer_id: (received[user.peer_id] - before[user.peer_id]) / (moved / 10) for user in users}
        print("shares:", sorted(round(share, 2) for share in shares.values()), "hog:", round(shares[hog.peer_id], 2))
        assert min(shares[user.peer_id] for user in users if user is not hog) >= 0.8
        nursery.cancel_scope.cancel()


async def test_talk_beside_a_hog_waits_little(autojump_clock: MockClock) -> None:
    """At 1 MB/s, somebody who says little is not behind what a hog has queued."""
    received = Counter[PeerId]()
    async with three(RelayLimits(bytes_per_s=1_000_000)) as world:
        await serve_sink(world.far, received)
        transports = [world.near.swarm.transports[0], CircuitTransport()]
        async with (
            world.near.stream(world.far.peer_id, [ECHO], [world.at]) as talk,
            open_host(seeded(33), transports=transports) as hog,
            trio.open_nursery() as nursery,
        ):

            async def push() -> None:
                stream = await hog.open_stream(world.far.peer_id, [SINK], [world.at])
                while True:
                    await stream.send_all(bytes(100_000))

            nursery.start_soon(push)
            await until(lambda: received[hog.peer_id] > 500_000, 20)
            began = trio.current_time()
            for _ in range(10):
                await talk.send_all(bytes(1_000))
                await receive_count(talk, 1_000)
            assert (trio.current_time() - began) / 10 < 0.3
            nursery.cancel_scope.cancel()


# Keeping reservations


def names(found: Sequence[RelayServer]) -> Callable[[], Awaitable[Iterable[PeerAddress]]]:
    async def name() -> list[PeerAddress]:
        return [server.host.peer_addresses[0] for server in found]

    return name


async def until(condition: Callable[[], object], within_s: float) -> float:
    """Seconds until it holds."""
    began = trio.current_time()
    with trio.fail_after(within_s):
        while not condition():  # noqa: ASYNC110 - nothing else tells
            await trio.sleep(0.05)
    return trio.current_time() - began


async def test_two_reservations_are_kept_and_announced(autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    async with AsyncExitStack() as stack:
        short = RelayLimits(reservation_s=100.0)
        servers = [await stack.enter_async_context(a_relay(network, number, short)) for number in (50, 51, 52)]
        plain = await stack.enter_async_context(a_host(network, 53, listens=True))
        host = await stack.enter_async_context(a_host(network, 2, listens=True))
        near = await stack.enter_async_context(a_host(network, 1))
        nursery = await stack.enter_async_context(trio.open_nursery())

        async def candidates() -> list[PeerAddress]:
            return [host.peer_addresses[0], plain.peer_addresses[0], *await names(servers)()]

        client = RelayClient(host, candidates)
        await nursery.start(client.run)
        await trio.sleep(30)
        assert client.reservations == [] and host.relayed == []  # nobody wants any
        client.want(2)
        await until(lambda: len(client.reservations) == 2, 5)
        assert len({each.relay.peer_id for each in client.reservations}) == 2
        direct, *relayed = host.addresses
        assert direct == host.own_addresses[0]
        assert relayed == [each.addresses[0] for each in client.reservations]
        await near.connect(host.peer_id, host.addresses)
        told = await identify.identify(near, host.peer_id)
        assert [Multiaddr(each) for each in told.listen_addrs] == host.addresses
        await trio.sleep(400)
        assert len(client.reservations) == 2
        assert sum(server._reservations.holds(host.peer_id, trio.current_time()) for server in servers) == 2
        client.want(0)
        await until(lambda: host.addresses == [direct], 5)
        nursery.cancel_scope.cancel()


def is_replaced(client: RelayClient, lost: PeerId) -> bool:
    relays = [each.relay.peer_id for each in client.reservations]
    return len(relays) == 2 and lost not in relays


@pytest.mark.parametrize("dead", [0, 2], ids=["", "and other candidates do not answer"])
async def test_a_relay_that_dies_is_replaced(dead: int, autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(a_relay(network, number)) for number in range(50, 56)]
        host = await stack.enter_async_context(a_host(network, 2))
        nursery = await stack.enter_async_context(trio.open_nursery())

        async def ignore(raw: object) -> None:
            await trio.sleep_forever()

        silent = []
        for number in range(dead):
            [address] = await nursery.start(network.transport().listen, MEMORY_ANY, ignore)
            silent.append(PeerAddress(address=address, peer_id=seeded(200 + number).peer_id))

        async def candidates() -> list[PeerAddress]:
            return [*silent, *await names(servers)()]

        client = RelayClient(host, candidates)
        await nursery.start(client.run)
        client.want(2)
        await until(lambda: len(client.reservations) == 2, 10)
        for _ in range(3):
            lost = client.reservations[0].relay.peer_id
            connection = host.swarm.connection(lost)
            assert connection is not None
            connection.mux.close()
            await connection.ended.wait()
            assert await until(functools.partial(is_replaced, client, lost), 5) < 5
        nursery.cancel_scope.cancel()


async def test_relays_that_refuse_are_left_alone_for_a_while(autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    async with (
        a_relay(network, limits=RelayLimits(reservations=0)) as server,
        a_host(network, 2) as host,
        trio.open_nursery() as nursery,
    ):
        asked: list[float] = []
        grant = server.host._handlers[wire.HOP]

        async def note(connection: Connection, stream: Stream) -> None:
            asked.append(trio.current_time())
            await grant(connection, stream)

        server.host._handlers[wire.HOP] = note
        client = RelayClient(host, names([server]), RelayClientSettings(backoff_s=20))
        await nursery.start(client.run)
        client.want(2)
        await trio.sleep(300)
        assert 3 <= len(asked) <= 5
        assert host.relayed == []
        nursery.cancel_scope.cancel()


async def test_a_host_without_circuits_cannot_keep_reservations() -> None:
    async with open_host(seeded(1), transports=[]) as host:
        with pytest.raises(errors.LocalProtocolError, match="no CircuitTransport"):
            RelayClient(host, names([]))


async def test_serving_ends_and_begins_again(autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    async with a_host(network, 50, listens=True) as relay, a_host(network, 2) as far, a_host(network, 1) as near:
        server = RelayServer(relay)
        for _ in range(2):
            async with trio.open_nursery() as nursery, trio.open_nursery() as holding:
                await nursery.start(server.run)
                assert wire.HOP in relay.protocols
                reservation = await reserve(far, server, holding)
                connection = await near.connect(far.peer_id, [reservation.addresses[0]])
                assert not connection.ended.is_set()
                nursery.cancel_scope.cancel()
            await connection.ended.wait()  # its circuit was reset
            assert wire.HOP not in relay.protocols
            assert (server.circuits, server.reservations) == (0, 0)
            with pytest.raises(errors.DialError, match="no relay"):
                await near.connect(far.peer_id, [relayed_by(relay.peer_addresses[0])])


async def test_a_relay_whose_clock_is_behind_is_not_asked_all_the_time(autojump_clock: MockClock) -> None:
    """By nearly as much as its reservations last, so that each seems to end at once."""
    network = MemoryNetwork()
    async with (
        a_false_relay(network, lambda *_: b"", lambda: time.time() + 1.5) as (relay, asked),
        a_host(network, 1) as host,
        trio.open_nursery() as nursery,
    ):
        await nursery.start(circuits(host).reserve, relay, host.swarm.accept)
        await trio.sleep(300)
        assert len(asked) <= 5
        nursery.cancel_scope.cancel()


async def test_a_request_that_comes_when_serving_has_ended_gets_nothing(autojump_clock: MockClock) -> None:
    """Its stream was open before. A reservation would be one that nobody keeps."""
    network = MemoryNetwork()
    async with a_host(network, 50, listens=True) as relay, a_host(network, 2) as far:
        server = RelayServer(relay)
        async with trio.open_nursery() as nursery:
            await nursery.start(server.run)
            where = relay.peer_addresses[0]
            stream = await far.open_stream(where.peer_id, [wire.HOP], [where.address])
            await settled()
            nursery.cancel_scope.cancel()
        await wire.send_message(stream, HopMessage(type=HopMessage.RESERVE))
        assert wire.status_of(await wire.receive_hop(stream)) == Status.RESERVATION_REFUSED
        assert server.reservations == 0
        stream.reset()


async def test_a_candidate_that_fails_for_weeks_is_still_asked(autojump_clock: MockClock) -> None:
    """Its pause is doubled so often that no float holds what comes of it."""
    network = MemoryNetwork()
    nowhere = PeerAddress(address=Multiaddr("/memory/777"), peer_id=seeded(9).peer_id)

    async def candidates() -> list[PeerAddress]:
        return [nowhere]

    async with a_host(network, 2) as host, trio.open_nursery() as nursery:
        client = RelayClient(host, candidates, RelayClientSettings(max_backoff_s=1.0, search_s=1.0, backoff_s=1.0))
        await nursery.start(client.run)
        client.want(2)
        await trio.sleep(5)
        known = client._known[nowhere.peer_id]
        assert known.failures >= 4
        known.failures = 1100
        await trio.sleep(5)
        assert known.failures >= 1104
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("alone", [True, False])
async def test_while_nobody_is_there_all_are_asked_again_and_again(alone: bool, autojump_clock: MockClock) -> None:
    """Our own line may be down: the first one that answers shows that it is mended."""
    network = MemoryNetwork()
    nowhere = PeerAddress(address=Multiaddr("/memory/777"), peer_id=seeded(9).peer_id)
    asked: list[float] = []

    class Noting(RelayClient):
        async def _hold(self, *arguments: Any) -> None:
            asked.append(trio.current_time())
            await super()._hold(*arguments)

    async def candidates() -> list[PeerAddress]:
        return [nowhere]

    async with a_host(network, 2) as host, a_relay(network) as friend, trio.open_nursery() as nursery:
        if not alone:
            await host.connect(friend.host.peer_id, friend.host.addresses)
        client = Noting(host, candidates)
        await nursery.start(client.run)
        client.want(2)
        await trio.sleep(60)
        assert len(asked) == pytest.approx(30 if alone else 5, abs=1)
        nursery.cancel_scope.cancel()


async def test_who_has_moved_counts_where_it_is_now(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    network = MemoryNetwork()
    limits = RelayLimits(reservations_per_ip_group=1, circuits_per_ip_group=1)
    async with (
        a_relay(network, limits=limits) as server,
        a_host(network, 1) as near,
        a_host(network, 2) as far,
        trio.open_nursery() as nursery,
    ):
        reservation = await reserve(far, server, nursery)
        monkeypatch.setattr(YamuxConnection, "moved_to", tcp("45.1.0.1", 1))
        await reserve(near, server, nursery)
        with trio.fail_after(5), pytest.raises(errors.ReservationRefused):
            async with a_host(network, 3) as third:
                await circuits(third).reserve(server.host.peer_addresses[0], third.swarm.accept)
        await near.connect(far.peer_id, reservation.addresses)
        with trio.fail_after(5), pytest.raises(errors.DialError, match="no room for another circuit"):
            async with a_host(network, 3) as third:
                await third.connect(far.peer_id, reservation.addresses)
        nursery.cancel_scope.cancel()


# Who vanishes


@pytest.mark.parametrize("at_once", [False, True])
async def test_a_relayed_address_waits_for_the_direct_ones_unless_there_is_no_time(
    at_once: bool, autojump_clock: MockClock
) -> None:
    async with three() as world:

        async def ignore(raw: object) -> None:
            await trio.sleep_forever()

        [silent] = await world.nursery.start(world.near.swarm.transports[0].listen, MEMORY_ANY, ignore)
        began = trio.current_time()
        connection = await world.near.connect(world.far.peer_id, [world.at, silent], at_once=at_once)
        assert connection.relayed
        assert trio.current_time() - began == pytest.approx(0 if at_once else world.near.limits.relay_delay_s)


async def test_a_relay_that_vanishes_is_missed_within_two_seconds(autojump_clock: MockClock) -> None:
    network, line = MemoryNetwork(), Line()
    async with a_relay(network, line=line) as server, a_host(network, 2) as host:
        with pytest.raises(errors.ConnectionLost):
            async with open_service_nursery() as nursery:
                await nursery.start(circuits(host).reserve, server.host.peer_addresses[0], host.swarm.accept)
                await trio.sleep(30.3)
                line.cut()
                began = trio.current_time()
        assert trio.current_time() - began <= 2.1
        assert host.swarm.connections == []


async def test_who_waits_for_a_target_that_comes_back_gets_it_at_once(autojump_clock: MockClock) -> None:
    """The relay asks over the target's connection, which is dead, though nobody knows that yet."""
    network, line = MemoryNetwork(), Line()
    async with (
        a_relay(network) as server,
        a_host(network, 1) as near,
        a_host(network, 2, line=line) as far,
        trio.open_nursery() as nursery,
    ):
        reservation = await reserve(far, server, nursery)
        await near.connect(server.host.peer_id, server.host.addresses)
        (old,) = far.swarm.connections
        await trio.sleep(10.1)
        line.lose()
        connected_at: list[float] = []

        async def connect() -> None:
            await near.connect(far.peer_id, reservation.addresses)
            connected_at.append(trio.current_time())

        nursery.start_soon(connect)
        await trio.sleep(0.3)
        assert not connected_at
        back_at = trio.current_time()
        await far.swarm._race(server.host.peer_id, server.host.addresses)
        old.mux.close()
        await settled()
        assert connected_at == [back_at]
        nursery.cancel_scope.cancel()


async def test_a_target_that_has_vanished_is_given_up_soon(autojump_clock: MockClock) -> None:
    network, line = MemoryNetwork(), Line()
    async with (
        a_relay(network) as server,
        a_host(network, 1) as near,
        a_host(network, 2, line=line) as far,
        trio.open_nursery() as nursery,
    ):
        reservation = await reserve(far, server, nursery)
        await trio.sleep(10)
        line.cut()
        began = trio.current_time()
        with pytest.raises(errors.DialError, match=r"has no reservation|could not reach"):
            await near.connect(far.peer_id, reservation.addresses)
        assert trio.current_time() - began <= 1.5 + RETURN_S
        nursery.cancel_scope.cancel()


# When relays are asked again


@dataclass(kw_only=True)
class Asking:
    """A relay client that wants one reservation, and when it asked ``relay``."""

    client: RelayClient
    host: Host
    relay: Host
    asked: list[float]

    def end(self) -> None:
        """The relay ends the connection."""
        for connection in self.relay.swarm.connections:
            connection.mux.close()


@asynccontextmanager
async def asking(*, dropped_after_s: float | None = None, refuses: bool = False) -> AsyncIterator[Asking]:
    """With one relay, which may end the connection some time after each grant."""
    network = MemoryNetwork()
    limits = RelayLimits(reservations=0) if refuses else None
    async with (
        a_relay(network, limits=limits) as server,
        a_host(network, 2) as host,
        trio.open_nursery() as nursery,
    ):
        asked: list[float] = []
        grant = server.host._handlers[wire.HOP]

        async def note(connection: Connection, stream: Stream) -> None:
            asked.append(trio.current_time())
            await grant(connection, stream)
            if dropped_after_s is not None:
                await trio.sleep(dropped_after_s)
                connection.mux.close()

        server.host._handlers[wire.HOP] = note
        client = RelayClient(host, names([server]))
        await nursery.start(client.run)
        client.want(1)
        yield Asking(client=client, host=host, relay=server.host, asked=asked)
        nursery.cancel_scope.cancel()


def pauses(asked: Sequence[float]) -> list[float]:
    return [later - sooner for sooner, later in itertools.pairwise(asked)]


async def test_a_reservation_that_was_held_long_is_had_again_at_once(autojump_clock: MockClock) -> None:
    async with asking() as world:
        await trio.sleep(60)
        world.end()
        assert await until(lambda: len(world.asked) == 2, 1) < 0.2
        await until(lambda: world.client.reservations, 1)


async def test_one_that_was_lost_soon_is_had_again_after_two_seconds(autojump_clock: MockClock) -> None:
    async with asking() as world:
        await trio.sleep(5)
        world.end()
        await trio.sleep(10)
        assert pauses(world.asked) == pytest.approx([5 + 2], abs=0.1)


async def test_who_fails_is_left_alone_for_twice_as_long_each_time(autojump_clock: MockClock) -> None:
    async with asking(refuses=True) as world:
        await trio.sleep(100)
        assert pauses(world.asked) == pytest.approx([2, 4, 8, 16, 32], abs=0.1)


async def test_in_another_network_all_are_asked_again_at_once(autojump_clock: MockClock) -> None:
    async with asking(refuses=True) as world:
        await trio.sleep(70)
        before = len(world.asked)
        world.client.network_changed()
        await settled()
        assert len(world.asked) == before + 1
        await trio.sleep(7)
        assert pauses(world.asked)[-2:] == pytest.approx([2, 4], abs=0.1)


@pytest.mark.parametrize(("dropped_after_s", "most"), [(0.0, 8), (9.0, 20), (11.0, 28)])
async def test_a_relay_that_grants_and_drops_is_not_asked_all_the_time(
    dropped_after_s: float, most: int, autojump_clock: MockClock
) -> None:
    async with asking(dropped_after_s=dropped_after_s) as world:
        await trio.sleep(300)
        assert 3 <= len(world.asked) <= most

"""Hole punching between hosts that nobody can dial, unless they dial each other at the same moment."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch
from trio.testing import MockClock

from net import delimited, errors
from net.addresses import Multiaddr
from net.host import Host, open_host
from net.identity import PeerId
from net.io import send
from net.mux.base import Stream
from net.nat.punching import MAX_ADDRESSES, PAUSE_S, PROTOCOL_ID, PUNCH_S, TRIES, HolePuncher
from net.ping import ping_once
from net.relay.server import RelayServer
from net.swarm import ROLE_PATIENCE_S, Connection
from net.transports.base import Accept, RawConnection
from net.transports.circuit import CircuitTransport
from net.transports.memory import MemoryNetwork, MemoryStream, memory_stream_pair
from tests.net_helpers import MEMORY_ANY, seeded

WINDOW_S = 2.0  # how long a hole stays open


@dataclass(kw_only=True)
class _Knock:
    """A dial that waits for one from the other side."""

    met: trio.Event = field(default_factory=trio.Event)
    stream: MemoryStream | None = None


@dataclass(kw_only=True)
class Nats:
    """Lets through nothing but simultaneous dials: each side's dial then gives it one end, and neither accepts."""

    closed: bool = False
    knocks: int = 0
    waiting: dict[tuple[int, int], _Knock] = field(default_factory=dict)

    async def dial(self, ours: int, theirs: int) -> MemoryStream:
        self.knocks += 1
        other = None if self.closed else self.waiting.pop((theirs, ours), None)
        if other is not None:
            near, other.stream = memory_stream_pair()
            other.met.set()
            return near
        mine = self.waiting[ours, theirs] = _Knock()
        with trio.move_on_after(WINDOW_S):
            await mine.met.wait()
        if mine.stream is None:
            self.waiting.pop((ours, theirs), None)
            raise errors.DialError("nobody answers")
        return mine.stream


class Natted:
    """``/memory/N`` behind a NAT. Numbers below 1000 are on the open internet."""

    def __init__(self, nats: Nats, network: MemoryNetwork, number: int) -> None:
        self._nats = nats
        self._open = network.transport()
        self._number = number

    def can_dial(self, address: Multiaddr) -> bool:
        return self._open.can_dial(address)

    async def dial(self, address: Multiaddr, peer_id: PeerId | None = None) -> RawConnection:
        number = int(str(address).removeprefix("/memory/"))
        if number < 1000:
            return await self._open.dial(address)
        stream = await self._nats.dial(self._number, number)
        return RawConnection(stream=stream, local=Multiaddr(f"/memory/{self._number}"), remote=address)

    async def listen(
        self, address: Multiaddr, accept: Accept, *, task_status: trio.TaskStatus[Sequence[Multiaddr]]
    ) -> None:
        raise errors.AddressError("nobody gets in here")


@dataclass(kw_only=True)
class World:
    nats: Nats
    relay: Host
    near: Host  # dials
    far: Host  # has the reservation
    near_puncher: HolePuncher
    far_puncher: HolePuncher
    at: Multiaddr
    nursery: trio.Nursery


def puncher(host: Host, number: int) -> HolePuncher:
    return HolePuncher(host, lambda: [Multiaddr(f"/memory/{number}")], can_meet=lambda address: True)


@asynccontextmanager
async def world(*, closed: bool = False, near_punches: bool = True) -> AsyncIterator[World]:
    network, nats = MemoryNetwork(), Nats(closed=closed)
    async with (
        open_host(seeded(9), listen=[MEMORY_ANY], transports=[network.transport(), CircuitTransport()]) as relay,
        open_host(seeded(1), transports=[Natted(nats, network, 1001), CircuitTransport()]) as near,
        open_host(seeded(2), transports=[Natted(nats, network, 1002), circuit := CircuitTransport()]) as far,
        trio.open_nursery() as nursery,
    ):
        await nursery.start(RelayServer(relay).run)
        reservation = await nursery.start(circuit.reserve, relay.peer_addresses[0], far.swarm.accept)
        punchers = puncher(near, 1001), puncher(far, 1002)
        for each in punchers if near_punches else punchers[1:]:
            await nursery.start(each.run)
        yield World(
            nats=nats,
            relay=relay,
            near=near,
            far=far,
            near_puncher=punchers[0],
            far_puncher=punchers[1],
            at=reservation.addresses[0],
            nursery=nursery,
        )
        nursery.cancel_scope.cancel()


async def hold(connection: Connection, stream: Stream) -> None:
    await trio.sleep_forever()


def direct(host: Host, peer: Host) -> Connection:
    connection = host.swarm.connection(peer.peer_id)
    assert connection is not None and not connection.relayed
    return connection


async def test_a_relayed_connection_becomes_direct_at_the_first_try(autojump_clock: MockClock) -> None:
    async with world() as w:
        assert (await w.near.connect(w.far.peer_id, [w.at])).relayed
        await trio.sleep(0.1)
        assert direct(w.near, w.far).outbound and not direct(w.far, w.near).outbound  # the specification's roles
        assert (w.far_puncher.tries, w.far_puncher.successes, w.near_puncher.tries) == (1, 1, 0)
        assert await ping_once(w.near, w.far.peer_id) >= 0
        await trio.sleep(60)  # by then the relayed one is let go
        assert [len(host.swarm.connections) for host in (w.near, w.far)] == [2, 2]  # one of them with the relay
        await ping_once(w.far, w.near.peer_id)


async def test_a_stream_over_the_relay_goes_on_while_new_ones_go_directly(autojump_clock: MockClock) -> None:
    async with world() as w:
        relayed = await w.near.connect(w.far.peer_id, [w.at])
        received: list[bytes] = []

        async def collect(connection: Connection, stream: Stream) -> None:
            while data := await stream.receive_some():
                received.append(data)

        w.far.handle("/collect/1", collect)
        async with w.near.stream(w.far.peer_id, ["/collect/1"]) as stream:
            for number in range(100):
                await stream.send_all(bytes([number]))
                await trio.sleep(0.5)
            assert direct(w.near, w.far)
            assert relayed.mux.open_streams == 1
        await trio.sleep(1)
        assert b"".join(received) == bytes(range(100))


async def test_nats_that_let_nothing_through_are_tried_less_and_less_often(autojump_clock: MockClock) -> None:
    async with world(closed=True) as w:
        w.far.handle("/held/1", hold)
        connection = await w.near.connect(w.far.peer_id, [w.at])
        await trio.sleep(TRIES * (PUNCH_S + PAUSE_S) + 10)
        assert w.far_puncher.tries == TRIES
        assert w.far_puncher.successes == 0
        assert w.near.swarm.connection(w.far.peer_id) is connection
        assert connection.relayed
        async with w.near.stream(w.far.peer_id, ["/held/1"]):  # a connection that nobody uses is let go
            await trio.sleep(600)
            assert w.far_puncher.tries == TRIES + 4  # after 30, 60, 120 and 240 s
            w.nats.closed = False
            await trio.sleep(600)
            assert direct(w.near, w.far)
            assert (w.far_puncher.tries, w.far_puncher.successes) == (TRIES + 5, 1)


async def test_a_relayed_connection_that_has_ended_is_not_made_direct(autojump_clock: MockClock) -> None:
    async with world(closed=True) as w:
        connection = await w.near.connect(w.far.peer_id, [w.at])
        await trio.sleep(TRIES * (PUNCH_S + PAUSE_S) + 10)
        connection.mux.close()
        await trio.sleep(1000)
        assert w.far_puncher.tries == TRIES


async def test_who_does_not_know_the_protocol_is_left_alone(autojump_clock: MockClock) -> None:
    async with world(near_punches=False) as w:
        await w.near.connect(w.far.peer_id, [w.at])
        await trio.sleep(60)
        assert (w.far_puncher.tries, w.nats.knocks) == (1, 0)


async def test_two_listeners_agree_after_a_second(autojump_clock: MockClock) -> None:
    """As with go-libp2p before its issue 3171, which takes the parts the other way round."""
    async with world(near_punches=False) as w:
        connections: list[Connection] = []

        async def punch(host: Host, peer: Host, number: int) -> None:
            connections.append(await host.swarm.punch(peer.peer_id, [Multiaddr(f"/memory/{number}")], listener=True))

        began = trio.current_time()
        with trio.move_on_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(punch, w.near, w.far, 1002)
                await trio.sleep(0.05)
                nursery.start_soon(punch, w.far, w.near, 1001)
        assert sorted(connection.outbound for connection in connections) == [False, True]
        assert ROLE_PATIENCE_S <= trio.current_time() - began < ROLE_PATIENCE_S + 1
        await ping_once(w.near, w.far.peer_id)


async def test_a_dialler_that_meets_a_dialler_gives_in(autojump_clock: MockClock) -> None:
    """As with go-libp2p before its issue 3171, when it is the one that was called."""
    async with world(near_punches=False) as w:
        connections: list[Connection] = []

        async def punch() -> None:
            connections.append(await w.near.swarm.punch(w.far.peer_id, [Multiaddr("/memory/1002")], listener=False))

        async def dial() -> None:
            connections.append(await w.far.swarm.dial(w.near.peer_id, [Multiaddr("/memory/1001")]))

        with trio.move_on_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(punch)
                nursery.start_soon(dial)
        assert {connection.peer_id: connection.outbound for connection in connections} == {
            w.near.peer_id: True,
            w.far.peer_id: False,
        }
        await ping_once(w.near, w.far.peer_id)


async def test_somebody_else_at_the_punched_address_is_refused(autojump_clock: MockClock) -> None:
    async with world(near_punches=False) as w:
        failures: list[Exception] = []

        async def punch(host: Host, peer_id: PeerId, number: int, listener: bool) -> None:
            try:
                await host.swarm.punch(peer_id, [Multiaddr(f"/memory/{number}")], listener=listener)
            except errors.NetError as error:
                failures.append(error)

        for near_listens in (True, False):
            failures.clear()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(punch, w.near, seeded(77).peer_id, 1002, near_listens)
                nursery.start_soon(punch, w.far, w.near.peer_id, 1001, not near_listens)
            assert any(isinstance(failure, errors.PeerIdMismatch) for failure in failures)
        assert w.near.swarm.connection(w.far.peer_id) is None


def message(kind: int, count: int = 1) -> bytes:
    addresses = [Multiaddr(f"/memory/{5000 + number}").to_bytes() for number in range(count)]
    return HolePunch(type=kind, ObsAddrs=addresses).SerializeToString()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "words",
    [
        delimited.frame(b"\xff" * 20),
        delimited.frame(message(HolePunch.SYNC)),
        delimited.frame(HolePunch(type=HolePunch.CONNECT, ObsAddrs=[b"none"]).SerializeToString())
        + delimited.frame(b""),
        b"\xff\xff\xff\xff\xff",
    ],
    ids=["garbage", "SYNC first", "nothing after CONNECT", "endless length"],
)
async def test_nonsense_is_answered_by_a_reset(words: bytes, autojump_clock: MockClock) -> None:
    async with world(closed=True) as w:
        relayed = await w.near.connect(w.far.peer_id, [w.at])
        stream = await w.near.open_stream_over(relayed, [PROTOCOL_ID])
        await send(stream, words)
        with pytest.raises(errors.StreamReset):
            while await stream.receive_some():
                pass
        assert await ping_once(w.near, w.far.peer_id) >= 0


async def test_punching_is_refused_over_a_direct_connection(autojump_clock: MockClock) -> None:
    async with world() as w:
        await w.near.connect(w.far.peer_id, [w.at])
        await trio.sleep(1)
        with pytest.raises(errors.StreamReset):
            await w.near.open_stream_over(direct(w.near, w.far), [PROTOCOL_ID])


async def test_a_peer_cannot_make_us_dial_as_many_as_it_likes(autojump_clock: MockClock) -> None:
    async with world(near_punches=False) as w:
        relayed = await w.near.connect(w.far.peer_id, [w.at])
        stream = await w.near.open_stream_over(relayed, [PROTOCOL_ID])
        await send(stream, delimited.frame(message(HolePunch.CONNECT, 100)))
        await delimited.receive(stream, 4096, "an answer")
        await send(stream, delimited.frame(HolePunch(type=HolePunch.SYNC).SerializeToString()))
        await trio.sleep(WINDOW_S)
        assert w.nats.knocks == MAX_ADDRESSES

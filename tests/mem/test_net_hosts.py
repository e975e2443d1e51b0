"""Hosts and their connections: dialling, limits, ends, and services that strangers use."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack, aclosing, asynccontextmanager

import pytest
import trio
import trio.testing
from libp2p.identity.identify.pb.identify_pb2 import Identify
from trio.testing import MockClock

from net import errors, identify, keeping, multistream, ping
from net.addresses import Multiaddr, tcp
from net.host import Host, open_host
from net.identity import PeerId
from net.limits import ConnectionCounts, Limits
from net.mux.base import Stream
from net.ping import ping_once
from net.swarm import Connection
from net.transports.base import RawConnection
from net.transports.memory import MemoryNetwork, MemoryTransport
from tests.mem.lines import LineTransport
from tests.net_helpers import MEMORY_ANY, echo, memory_hosts, receive_all, receive_count, seeded

NOWHERE = Multiaddr("/memory/999999")


async def settled() -> None:
    await trio.testing.wait_all_tasks_blocked()


async def ignore(raw: RawConnection) -> None:
    """A listener that accepts and says nothing."""
    await trio.sleep_forever()


# Dialling


async def test_connect_once_and_use_it_again(autojump_clock: MockClock) -> None:
    async with memory_hosts(2) as (one, two):
        connection = await one.connect(two.peer_id, two.addresses)
        assert await one.connect(two.peer_id) is connection
        await settled()
        (inbound,) = two.swarm.connections
        assert (inbound.peer_id, inbound.outbound) == (one.peer_id, False)
        assert await two.connect(one.peer_id) is inbound  # no second one for the way back
        assert one.peerstore.addresses(two.peer_id) == two.addresses


async def test_somebody_else_at_the_address_is_named(autojump_clock: MockClock) -> None:
    async with memory_hosts(2) as (one, two):
        with pytest.raises(errors.PeerIdMismatch) as caught:
            await one.connect(seeded(99).peer_id, two.addresses)
        assert caught.value.actual == two.peer_id
        await settled()
        assert one.swarm.connections == two.swarm.connections == []
        assert one.peerstore.addresses(seeded(99).peer_id) == []


async def test_nobody_at_the_address(autojump_clock: MockClock) -> None:
    async with memory_hosts(1) as (one,):
        with pytest.raises(errors.DialError, match="nobody listens"):
            await one.connect(seeded(99).peer_id, [NOWHERE])


async def test_who_dialled_a_listener_that_goes_is_told(autojump_clock: MockClock) -> None:
    """As TCP's backlog is reset."""
    transport, arrived, dialled = MemoryNetwork().transport(), list[RawConnection](), list[RawConnection]()

    async def accept(raw: RawConnection) -> None:
        arrived.append(raw)
        await raw.stream.aclose()

    async with trio.open_nursery() as nursery:
        [bound] = await nursery.start(transport.listen, MEMORY_ANY, accept)

        async def dial() -> None:
            dialled.append(await transport.dial(bound))
            if len(dialled) == 2:  # both in one turn: the listener has woken up for one of them at most
                nursery.cancel_scope.cancel()

        nursery.start_soon(dial)
        nursery.start_soon(dial)
    assert len(arrived) == 1
    for raw in dialled:
        with trio.fail_after(1):
            assert await raw.stream.receive_some() == b""


async def test_a_silent_listener_holds_nobody_up(autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    async with memory_hosts(1, network=network) as (one,), trio.open_nursery() as nursery:
        (silent,) = await nursery.start(network.transport().listen, MEMORY_ANY, ignore)
        began = trio.current_time()
        with pytest.raises(errors.DialError, match="no answer within 4 s"):
            await one.connect(seeded(99).peer_id, [silent])
        assert trio.current_time() - began == pytest.approx(one.limits.dial_s)
        nursery.cancel_scope.cancel()


async def test_dead_addresses_do_not_hold_up_a_good_one(autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    async with memory_hosts(2, network=network) as (one, two), trio.open_nursery() as nursery:
        (silent,) = await nursery.start(network.transport().listen, MEMORY_ANY, ignore)
        began = trio.current_time()
        connection = await one.connect(two.peer_id, [NOWHERE, silent, *two.addresses])
        assert trio.current_time() - began <= 3 * one.limits.dial_stagger_s
        assert connection.remote == two.addresses[0]
        await settled()
        assert [len(host.swarm.connections) for host in (one, two)] == [1, 1]
        assert one.swarm._counts.total == 1  # the attempt at the silent one is gone
        nursery.cancel_scope.cancel()


async def test_all_addresses_dead_tells_each_ones_reason(autojump_clock: MockClock) -> None:
    async with memory_hosts(2) as (one, two):
        with pytest.raises(errors.DialError) as caught:
            await one.connect(seeded(99).peer_id, [NOWHERE, two.addresses[0]])
        assert "nobody listens" in str(caught.value)
        assert str(two.peer_id) in str(caught.value)


async def test_addresses_of_no_known_kind_are_told(autojump_clock: MockClock) -> None:
    async with memory_hosts(1) as (one,):
        for known in ([], [Multiaddr("/ip4/192.0.2.1/udp/4001/quic-v1")]):
            with pytest.raises(errors.AddressError, match="no address that can be dialled"):
                await one.connect(seeded(99).peer_id, known)
        with pytest.raises(errors.DialError, match="our own"):
            await one.connect(one.peer_id, one.addresses)


async def test_listening_on_an_unknown_kind_or_a_taken_address_says_so(autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    for bad, reason in ((Multiaddr("/ip4/127.0.0.1/udp/4001/quic-v1"), "no transport"), (None, "in use")):
        async with memory_hosts(1, network=network) as (one,):
            with pytest.raises(errors.AddressError, match=reason):
                async with open_host(seeded(2), listen=[bad or one.addresses[0]], transports=[network.transport()]):
                    pytest.fail("it must not come up")


async def test_those_who_dial_one_peer_at_once_share_the_connection(autojump_clock: MockClock) -> None:
    async with memory_hosts(2) as (one, two):
        got: list[Connection] = []

        async def dial() -> None:
            got.append(await one.connect(two.peer_id, two.addresses))

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(dial)
        await settled()
        assert len({id(connection) for connection in got}) == 1
        assert len(two.swarm.connections) == 1
        assert one.swarm._dialling == {}


async def test_those_who_dial_a_dead_peer_at_once_share_the_failure(autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    async with memory_hosts(1, network=network) as (one,), trio.open_nursery() as outer:
        (silent,) = await outer.start(network.transport().listen, MEMORY_ANY, ignore)
        began = trio.current_time()

        async def dial() -> None:
            with pytest.raises(errors.DialError, match="no answer"):
                await one.connect(seeded(99).peer_id, [silent])

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(dial)
        assert trio.current_time() - began == pytest.approx(one.limits.dial_s)
        assert one.swarm._dialling == {}
        outer.cancel_scope.cancel()


async def test_who_waits_with_another_address_tries_it(autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    async with memory_hosts(2, network=network) as (one, two), trio.open_nursery() as nursery:
        (silent,) = await nursery.start(network.transport().listen, MEMORY_ANY, ignore)

        async def dial_the_silent_one() -> None:
            with pytest.raises(errors.DialError):
                await one.connect(two.peer_id, [silent])

        nursery.start_soon(dial_the_silent_one)
        await settled()
        connection = await one.connect(two.peer_id, two.addresses)
        assert connection.peer_id == two.peer_id
        nursery.cancel_scope.cancel()


async def test_a_cancelled_dial_leaves_nothing_and_hands_over(autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    async with memory_hosts(2, network=network) as (one, two), trio.open_nursery() as nursery:
        (silent,) = await nursery.start(network.transport().listen, MEMORY_ANY, ignore)
        with trio.move_on_after(1):
            await one.connect(two.peer_id, [silent])
        assert one.swarm._counts.total == 0
        assert one.swarm._dialling == {}
        await one.connect(two.peer_id, two.addresses)
        nursery.cancel_scope.cancel()


# Limits


@pytest.mark.parametrize("closer", ["dialler", "listener"])
async def test_slots_are_freed_when_connections_end(closer: str, autojump_clock: MockClock) -> None:
    async with memory_hosts(2, limits=Limits(connections=2, connections_per_peer=2)) as (one, two):
        for _ in range(300):
            connection = await one.connect(two.peer_id, two.addresses)
            await settled()
            (connection if closer == "dialler" else two.swarm.connections[0]).mux.close()
            await settled()
        for host in (one, two):
            assert host.swarm.connections == []
            assert host.swarm._counts.total == 0
            assert host.swarm._counts._peers == {}
            assert host.swarm._handshakes == 0


async def test_connections_beyond_the_total_are_refused_at_once(autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    async with (
        memory_hosts(3, network=network) as hosts,
        open_host(
            seeded(50), listen=[MEMORY_ANY], transports=[network.transport()], limits=Limits(connections=2)
        ) as server,
    ):
        for host in hosts[:2]:
            await host.connect(server.peer_id, server.addresses)
        began = trio.current_time()
        with pytest.raises(errors.DialError):
            await hosts[2].connect(server.peer_id, server.addresses)
        with pytest.raises(errors.LimitExceeded, match="2 connections are open"):
            await server.connect(hosts[2].peer_id, hosts[2].addresses)
        assert trio.current_time() == began
        hosts[0].swarm.connections[0].mux.close()
        await settled()
        await hosts[2].connect(server.peer_id, server.addresses)


async def echo_stream(_: Connection, stream: Stream) -> None:
    await echo(stream)


# Silence


@asynccontextmanager
async def on_a_line(network: MemoryNetwork, number: int) -> AsyncIterator[tuple[Host, LineTransport]]:
    """A host that can vanish."""
    transport = LineTransport(network)
    async with open_host(seeded(number), listen=[MEMORY_ANY], transports=[transport]) as host:
        yield host, transport


@pytest.mark.parametrize("how", ["check", "network_changed"])
async def test_a_check_ends_the_dead_connections_alone(how: str, autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    async with memory_hosts(2, network=network) as (one, well), on_a_line(network, 9) as (ill, transport):
        for other in (well, ill):
            await one.connect(other.peer_id, other.addresses)
        await trio.sleep(30)
        transport.line.cut()
        dead, alive = one.swarm.connection(ill.peer_id), one.swarm.connection(well.peer_id)
        assert dead is not None
        began = trio.current_time()
        getattr(one.swarm, how)()
        await dead.ended.wait()
        assert trio.current_time() - began <= 1.1
        await trio.sleep(10)
        assert one.swarm.connections == [alive]


async def test_transports_are_told_of_another_network(autojump_clock: MockClock) -> None:
    async with on_a_line(MemoryNetwork(), 9) as (host, transport):
        host.swarm.check()
        assert transport.rebound == 0
        host.swarm.network_changed()
        assert transport.rebound == 1


async def test_who_connects_again_has_its_older_connection_checked(autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    async with memory_hosts(1, network=network) as (host,), on_a_line(network, 9) as (peer, transport):
        await peer.connect(host.peer_id, host.addresses)
        await trio.sleep(30)
        (old,) = host.swarm.connections
        transport.line.lose()
        peer.swarm.connections[0].mux.close()
        await trio.sleep(2)
        assert not old.ended.is_set()  # nobody has told it, and nobody asks
        began = trio.current_time()
        await peer.connect(host.peer_id, host.addresses)
        await old.ended.wait()
        assert trio.current_time() - began <= 1.1
        assert host.swarm.connection(peer.peer_id) is not None
        assert len(host.swarm.connections) == 1


async def test_who_opens_a_stream_has_the_connection_checked(autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    async with memory_hosts(1, network=network) as (host,), on_a_line(network, 9) as (peer, transport):
        await host.connect(peer.peer_id, peer.addresses)
        await trio.sleep(30)
        transport.line.cut()
        began = trio.current_time()
        with pytest.raises(errors.ConnectionLost):
            await host.open_stream(peer.peer_id, [ping.PROTOCOL_ID])
        assert trio.current_time() - began <= 1.1


async def test_nobody_waits_for_long_at_a_private_address(autojump_clock: MockClock) -> None:
    class Silence(MemoryTransport):
        def can_dial(self, address: Multiaddr) -> bool:
            return True

        async def dial(self, address: Multiaddr, peer_id: PeerId | None = None) -> RawConnection:
            await trio.sleep_forever()

    async with open_host(seeded(1), transports=[Silence(MemoryNetwork())]) as host:
        for address, seconds in (("192.168.1.99", 1.5), ("45.9.0.1", 4.0)):
            began = trio.current_time()
            with pytest.raises(errors.DialError):
                await host.connect(seeded(2).peer_id, [tcp(address, 4001)])
            assert trio.current_time() - began == pytest.approx(seconds, abs=0.1)


# Two at once


async def dial_each_other(one: Host, two: Host) -> None:
    """Two connections, as when both dial before either hears of the other."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.connect, two.peer_id, two.addresses)
        nursery.start_soon(two.connect, one.peer_id, one.addresses)
    await settled()
    assert len(one.swarm.connections) == len(two.swarm.connections) == 2


def used(host: Host, peer: Host) -> tuple[bool, PeerId]:
    """Which of its connections a host uses with a peer: whether it dialled it itself."""
    connection = host.swarm.connection(peer.peer_id)
    assert connection is not None
    return connection.outbound, connection.peer_id


async def test_of_two_simultaneous_connections_both_sides_keep_the_same_one(autojump_clock: MockClock) -> None:
    async with memory_hosts(2) as hosts:
        low, high = sorted(hosts, key=lambda host: host.peer_id.to_bytes())
        await dial_each_other(low, high)
        assert used(low, high)[0] and not used(high, low)[0]
        await trio.sleep(2 * keeping.SIMULTANEOUS_S)
        assert [each.outbound for each in low.swarm.connections] == [True]
        assert [each.outbound for each in high.swarm.connections] == [False]
        assert await ping_once(high, low.peer_id) >= 0


async def test_a_connection_that_is_not_preferred_is_kept_as_long_as_it_is_used(autojump_clock: MockClock) -> None:
    async with memory_hosts(2) as hosts:
        low, high = sorted(hosts, key=lambda host: host.peer_id.to_bytes())
        await dial_each_other(low, high)
        (other,) = [each for each in high.swarm.connections if each.outbound]
        low.handle("/long/1", echo_stream)
        stream = other.mux.open_stream()
        await multistream.propose(stream, ["/long/1"])
        await trio.sleep(10 * keeping.SIMULTANEOUS_S)
        await stream.send_all(b"still here")
        assert await receive_count(stream, 10) == b"still here"
        assert len(high.swarm.connections) == 2
        await stream.aclose()
        await trio.sleep(2 * keeping.SIMULTANEOUS_S)
        assert len(high.swarm.connections) == len(low.swarm.connections) == 1
        assert other.mux.is_closed


async def test_a_later_connection_is_preferred_whoever_dialled_it(autojump_clock: MockClock) -> None:
    async with memory_hosts(2) as hosts:
        low, high = sorted(hosts, key=lambda host: host.peer_id.to_bytes())
        await low.connect(high.peer_id, high.addresses)
        await trio.sleep(keeping.SIMULTANEOUS_S + 1)
        later = await high.swarm._race(low.peer_id, low.addresses)  # it takes the old one for lost
        await settled()
        assert high.swarm.connection(low.peer_id) is later
        assert not used(low, high)[0]


async def test_nearly_full_a_host_lets_go_of_what_is_idle(autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    limits = Limits(connections=10)
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(
            open_host(seeded(50), listen=[MEMORY_ANY], transports=[network.transport()], limits=limits)
        )
        hosts = await stack.enter_async_context(memory_hosts(10, network=network))
        for host in hosts[:9]:
            await host.connect(server.peer_id, server.addresses)
            await trio.sleep(1)
        busy = await hosts[0].open_stream(server.peer_id, [ping.PROTOCOL_ID])
        await trio.sleep(keeping.GRACE_S)
        await ping_once(hosts[1], server.peer_id)
        assert len(server.swarm.connections) == 9
        await hosts[9].connect(server.peer_id, server.addresses)
        await trio.sleep(5)
        left = {each.peer_id for each in server.swarm.connections}
        assert left == {host.peer_id for host in hosts} - {hosts[2].peer_id, hosts[3].peer_id}
        busy.reset()


async def test_one_peer_cannot_take_all_connections(autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    async with (
        memory_hosts(1, network=network, limits=Limits(connections_per_peer=1)) as (server,),
        open_host(seeded(7), transports=[network.transport()]) as one,
        open_host(seeded(7), transports=[network.transport()]) as same,
    ):
        await one.connect(server.peer_id, server.addresses)
        connection = await same.connect(server.peer_id, server.addresses)
        await settled()
        assert connection.mux.is_closed  # the listener learns who dialled in the handshake's last message
        assert len(server.swarm.connections) == 1
        assert await ping_once(one, server.peer_id) >= 0


async def test_handshakes_under_way_are_bounded_and_time_out(autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    async with memory_hosts(1, network=network, limits=Limits(handshakes=3)) as (server,):
        raws = [await network.transport().dial(server.addresses[0]) for _ in range(5)]
        await settled()
        assert server.swarm._handshakes == 3
        for raw in raws[3:]:
            assert await raw.stream.receive_some() == b""
        began = trio.current_time()
        await receive_all(raws[0].stream)
        assert trio.current_time() - began == pytest.approx(server.limits.handshake_s)
        assert server.swarm._handshakes == server.swarm._counts.total == 0


def test_one_network_cannot_take_all_connections() -> None:
    counts = ConnectionCounts(Limits(connections_per_ip_group=2))

    def at(text: str) -> Multiaddr:
        return Multiaddr(text + "/tcp/4001")

    with counts.connection(at("/ip4/203.0.113.7")), counts.connection(at("/ip4/203.0.113.7")):
        with pytest.raises(errors.LimitExceeded, match=r"203\.0\.113\.7"), counts.connection(at("/ip4/203.0.113.7")):
            pass
        with pytest.raises(errors.LimitExceeded), counts.connection(at("/ip6/::ffff:203.0.113.7")):
            pass
        with counts.connection(at("/ip4/203.0.113.8")):
            assert counts.total == 3
    with counts.connection(at("/ip6/2001:db8:1:2::1")), counts.connection(at("/ip6/2001:db8:1:ff::1")):
        with pytest.raises(errors.LimitExceeded, match="/56"), counts.connection(at("/ip6/2001:db8:1:88::9")):
            pass
        with counts.connection(at("/ip6/2001:db8:2::1")):
            pass
    with ExitStack() as stack:
        for _ in range(10):
            stack.enter_context(counts.connection(at("/ip4/127.0.0.1")))  # this machine is no stranger's network
        assert counts.total == 10
    assert counts.total == 0
    assert counts._groups == {}


def test_a_peers_slots_come_back_after_failures() -> None:
    counts = ConnectionCounts(Limits(connections_per_peer=1))
    peer_id = seeded(1).peer_id
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), counts.peer(peer_id):
            with pytest.raises(errors.LimitExceeded, match="1 connections"), counts.peer(peer_id):
                pass
            raise ZeroDivisionError


# Ends


async def test_a_connection_that_its_peer_ends_disappears(autojump_clock: MockClock) -> None:
    async with memory_hosts(2) as (one, two):
        connection = await one.connect(two.peer_id, two.addresses)
        await settled()
        two.swarm.connections[0].mux.close()
        await settled()
        assert one.swarm.connection(two.peer_id) is None
        assert connection.mux.is_closed
        assert await one.connect(two.peer_id) is not connection


async def test_a_peer_that_stops_is_missed_in_time(autojump_clock: MockClock) -> None:
    frozen = trio.Event()
    network = MemoryNetwork()

    async def accept(raw: RawConnection) -> None:
        """Pass everything on to a real host until the cable is cut."""
        inner = await network.transport().dial(target.addresses[0])
        async with trio.open_nursery() as cable:

            async def copy(source: trio.abc.Stream, sink: trio.abc.Stream) -> None:
                while data := await source.receive_some(65536):
                    await sink.send_all(data)

            cable.start_soon(copy, raw.stream, inner.stream)
            cable.start_soon(copy, inner.stream, raw.stream)
            await frozen.wait()
            cable.cancel_scope.cancel()
        await trio.sleep_forever()

    async with memory_hosts(2, network=network) as (one, target), trio.open_nursery() as nursery:
        (proxy,) = await nursery.start(network.transport().listen, MEMORY_ANY, accept)
        await one.connect(target.peer_id, [proxy])
        assert await ping_once(one, target.peer_id) == 0
        await trio.sleep(100)
        assert one.swarm.connection(target.peer_id) is not None
        frozen.set()
        await trio.sleep(12)
        assert one.swarm.connections == target.swarm.connections == []
        nursery.cancel_scope.cancel()


async def test_a_handler_that_fails_costs_its_stream_alone(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(connection: Connection, stream: Stream) -> None:
        raise ZeroDivisionError

    async with memory_hosts(2) as (one, two):
        two.handle("/fail/1", fail)
        with caplog.at_level(logging.ERROR), pytest.raises(errors.StreamReset):
            async with one.stream(two.peer_id, ["/fail/1"], two.addresses) as stream:
                await stream.receive_some()
        assert "a handler failed" in caplog.text
        assert await ping_once(one, two.peer_id) >= 0


async def test_a_bug_while_accepting_costs_its_connection_alone(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with memory_hosts(2) as (one, two):
        with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):

            async def buggy(*_: object) -> None:
                raise ZeroDivisionError

            patch.setattr(two.swarm, "_secure", buggy)
            with pytest.raises(errors.DialError):
                await one.connect(two.peer_id, two.addresses)
        assert "failed" in caplog.text
        assert two.swarm._counts.total == 0
        assert await one.connect(two.peer_id, two.addresses)


async def test_streams_end_with_their_block(autojump_clock: MockClock) -> None:
    ends: list[object] = []

    async def collect(connection: Connection, stream: Stream) -> None:
        try:
            ends.append(await receive_all(stream))
        except errors.StreamReset as error:
            ends.append(type(error))

    async with memory_hosts(2) as (one, two):
        two.handle("/collect/1", collect)
        async with one.stream(two.peer_id, ["/unknown/1", "/collect/1"], two.addresses) as stream:
            await stream.send_all(b"whole")
        with pytest.raises(ZeroDivisionError):
            async with one.stream(two.peer_id, ["/collect/1"]) as stream:
                await stream.send_all(b"half")
                raise ZeroDivisionError
        await settled()
        assert ends == [b"whole", errors.StreamReset]
        with pytest.raises(errors.ProtocolNotSupported):
            async with one.stream(two.peer_id, ["/unknown/1"]):
                pass
        await settled()
        assert [host.swarm.connections[0].mux.open_streams for host in (one, two)] == [0, 0]


async def test_two_handlers_for_one_protocol_are_a_bug(autojump_clock: MockClock) -> None:
    async with memory_hosts(1) as (one,):
        with pytest.raises(errors.LocalProtocolError):
            one.handle(ping.PROTOCOL_ID, None)  # type: ignore[arg-type]


async def test_leaving_ends_connections_at_once(autojump_clock: MockClock) -> None:
    async with memory_hosts(1) as (one,):
        network = one.swarm._transports[0]._network  # type: ignore[attr-defined]
        async with open_host(seeded(60), listen=[MEMORY_ANY], transports=[network.transport()]) as two:
            await one.connect(two.peer_id, two.addresses)
            began = trio.current_time()
        assert trio.current_time() - began <= 1
        await settled()
        assert one.swarm.connections == []


# Ping and identify


async def test_ping_goes_on_as_long_as_asked(autojump_clock: MockClock) -> None:
    async with memory_hosts(2) as (one, two):
        await one.connect(two.peer_id, two.addresses)
        async with aclosing(ping.ping(one, two.peer_id)) as round_trips:
            assert [await anext(round_trips) for _ in range(3)] == [0, 0, 0]


def serve_instead(host: Host, protocol: str, handler: Callable[[Connection, Stream], Awaitable[None]]) -> None:
    host._handlers[protocol] = handler


@pytest.mark.parametrize(
    ("answer", "error", "reason"),
    [
        (bytes(32), errors.PeerFailed, "other bytes"),
        (bytes(31), errors.ConnectionLost, "closed"),
        (b"", errors.ConnectionLost, "closed"),
        (None, errors.PeerFailed, "no answer to a ping in 5 s"),
    ],
)
async def test_a_wrong_answer_to_a_ping_is_told(
    answer: bytes | None, error: type[errors.NetError], reason: str, autojump_clock: MockClock
) -> None:
    async def wrong(connection: Connection, stream: Stream) -> None:
        await stream.receive_some()
        if answer is None:
            await trio.sleep_forever()
        else:
            await stream.send_all(answer)

    async with memory_hosts(2) as (one, two):
        serve_instead(two, ping.PROTOCOL_ID, wrong)
        await one.connect(two.peer_id, two.addresses)
        with pytest.raises(error, match=reason):
            await ping_once(one, two.peer_id)


@pytest.mark.parametrize("sent", [0, 5, 32])
async def test_a_pinger_that_falls_silent_is_let_go(sent: int, autojump_clock: MockClock) -> None:
    async with memory_hosts(2) as (one, two):
        stream = await one.open_stream(two.peer_id, [ping.PROTOCOL_ID], two.addresses)
        if sent:
            await stream.send_all(bytes(sent))
        if sent == ping.PING_BYTES:
            assert await receive_count(stream, sent) == bytes(sent)
        began = trio.current_time()
        assert await stream.receive_some() == b""
        assert trio.current_time() - began == pytest.approx(ping.IDLE_S)
        assert two.swarm.connections[0].mux.open_streams == 0


async def test_identify_tells_who_what_and_where(autojump_clock: MockClock) -> None:
    async with memory_hosts(2) as (one, two):
        connection = await one.connect(two.peer_id, two.addresses)
        message = await identify.identify(one, two.peer_id)
        assert message.public_key == two.identity.key_pair.public_key.serialize()
        assert list(message.protocols) == two.protocols
        assert [Multiaddr(data) for data in message.listen_addrs] == two.addresses
        assert Multiaddr(message.observed_addr) == connection.local
        assert message.agent_version.startswith("raceme/")


WRONG_KEY = Identify(public_key=seeded(77).key_pair.public_key.serialize()).SerializeToString()


@pytest.mark.parametrize(
    ("wire", "error", "reason"),
    [
        (bytes([len(WRONG_KEY)]) + WRONG_KEY, errors.RemoteProtocolError, "with the key of"),
        (b"\0", errors.RemoteProtocolError, "public key"),
        (b"\x04\xff\xff\xff\xff", errors.RemoteProtocolError, "no protobuf"),
        (b"\xff\xff\xff\xff\x7f", errors.RemoteProtocolError, "more than"),
        (b"\x81\x40" + bytes(8193), errors.RemoteProtocolError, "more than"),
        (b"\x05abc", errors.ConnectionLost, "closed"),
        (None, errors.PeerFailed, "in 5 s"),
    ],
)
async def test_a_peer_that_identifies_itself_wrongly_is_told(
    wire: bytes | None, error: type[errors.NetError], reason: str, autojump_clock: MockClock
) -> None:
    async def wrong(connection: Connection, stream: Stream) -> None:
        if wire is None:
            await trio.sleep_forever()
        else:
            await stream.send_all(wire)

    async with memory_hosts(2) as (one, two):
        serve_instead(two, identify.PROTOCOL_ID, wrong)
        await one.connect(two.peer_id, two.addresses)
        with pytest.raises(error, match=reason):
            await identify.identify(one, two.peer_id)

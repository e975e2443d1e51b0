"""What makes a host reachable, together: behind a NAT it finds a relay by itself and is reached through it."""

from __future__ import annotations

from functools import partial

import trio
from trio.testing import MockClock

from net.addresses import is_relayed, relayed_by, tcp
from net.dht import keys
from net.dht.service import Dht
from net.host import open_host
from net.ping import ping_once
from net.presence import Presence, _announce_changes, run_presence
from net.relay.server import RelayServer
from net.transports.circuit import CircuitTransport
from tests.mem.internet import Internet
from tests.net_helpers import memory_hosts, seeded

OUTER = "44.1.0.1"


async def test_a_node_behind_a_nat_is_reached_through_a_relay_that_it_found(autojump_clock: MockClock) -> None:
    internet = Internet()
    inside = internet.machine("192.168.1.10", internet.router("45.1.0.1", symmetric=True))
    async with (
        open_host(
            seeded(1), listen=[tcp(OUTER, 4001)], transports=[internet.machine(OUTER), CircuitTransport()]
        ) as relay,
        open_host(seeded(2), listen=[tcp("192.168.1.10", 4001)], transports=[inside, CircuitTransport()]) as node,
        open_host(seeded(3), transports=[internet.machine("46.1.0.1"), CircuitTransport()]) as client,
        trio.open_nursery() as nursery,
    ):
        await nursery.start(RelayServer(relay).run)
        await nursery.start(Dht(relay, server=True).run)
        dht = Dht(node, server=True)
        presence: Presence = await nursery.start(partial(run_presence, node, dht, bootstrap=relay.peer_addresses))
        await dht.join(relay.peer_addresses)
        await nursery.start(dht.run)
        await trio.sleep(60)
        assert [reservation.relay.peer_id for reservation in presence.relays.reservations] == [relay.peer_id]
        assert is_relayed(node.addresses[-1])
        assert len(presence.reachability.sights) == 1
        connection = await client.connect(node.peer_id, node.addresses)
        assert connection.relayed
        assert await ping_once(client, node.peer_id) >= 0
        nursery.cancel_scope.cancel()


async def test_a_change_of_addresses_is_announced_within_two_seconds(autojump_clock: MockClock) -> None:
    async with memory_hosts(2) as (server, host), trio.open_nursery() as nursery:
        told = Dht(server, server=True)
        dht = Dht(host, server=False)
        await dht.join(server.peer_addresses)
        await nursery.start(dht.run)
        nursery.start_soon(_announce_changes, host, dht)
        key, kind = keys.of_name("raceme/test"), "node"

        async def found() -> tuple[int, list[str]]:
            [record] = await told.find(key, kind)
            return record.sequence, record.body["at"]

        await dht.announce(key, kind, lambda: {"at": [str(each) for each in host.addresses]})
        before, _ = await found()
        await trio.sleep(5)
        assert (await found())[0] == before  # what is the same is not said twice
        relayed = relayed_by(server.peer_addresses[0])
        for now in ([relayed], []):
            host.relayed = now
            await trio.sleep(2)
            assert (await found())[1] == [str(each) for each in [*host.own_addresses, *now]]
        nursery.cancel_scope.cancel()

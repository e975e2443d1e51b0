"""What makes a host reachable, together: behind a NAT it finds a relay by itself and is reached through it."""

from __future__ import annotations

from functools import partial

import trio
from trio.testing import MockClock

from net.addresses import is_relayed, tcp
from net.dht.service import Dht
from net.host import open_host
from net.ping import ping_once
from net.presence import Presence, run_presence
from net.relay.server import RelayServer
from net.transports.circuit import CircuitTransport
from tests.mem.internet import Internet
from tests.net_helpers import seeded

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

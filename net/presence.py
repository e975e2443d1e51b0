"""A host's presence on the internet: how it can be reached is found out, relays help where that is not directly, and
connections through them are made direct where two NATs allow it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import trio

from net.addresses import Multiaddr, PeerAddress
from net.dht.service import Dht
from net.host import Host
from net.nat.endpoints import Endpoint
from net.nat.mapping import PortMapper
from net.nat.punching import HolePuncher
from net.nat.reachability import Reachability
from net.nurseries import open_service_nursery
from net.relay.client import RelayClient, known_servers

ANNOUNCE_S = 1.0  # between looks whether our addresses have changed


@dataclass(frozen=True, kw_only=True)
class Presence:
    """The parts, for who wants to know."""

    reachability: Reachability
    relays: RelayClient
    puncher: HolePuncher


async def run_presence(
    host: Host,
    dht: Dht,
    *,
    bootstrap: Sequence[PeerAddress] = (),
    mapper: PortMapper | None = None,
    is_server: bool = True,
    task_status: trio.TaskStatus[Presence] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until cancelled; ``host.addresses`` follows what is found. ``started`` comes at once.

    Args:
        host: has a ``CircuitTransport``.
        dht: names servers that may be relays.
        bootstrap: others that may be.
        mapper: asks the router for ports; None for no such thing.
        is_server: whether strangers are to reach this host; a client has no use for reservations.
    """
    relays = RelayClient(host, known_servers(dht, bootstrap))

    def moved() -> None:
        relays.network_changed()
        puncher.network_changed()
        dht.network_changed()

    want = relays.want if is_server else lambda count: None
    reachability = Reachability(host, mapper=mapper, want=want, moved=moved)
    puncher = HolePuncher(host, lambda: [address for each in reachability.sights for address in _dialable(each)])
    async with open_service_nursery() as nursery:
        await nursery.start(relays.run)
        await nursery.start(reachability.run)
        await nursery.start(puncher.run)
        nursery.start_soon(_announce_changes, host, dht)
        task_status.started(Presence(reachability=reachability, relays=relays, puncher=puncher))


async def _announce_changes(host: Host, dht: Dht) -> None:
    """What is announced holds addresses: when these change, others are to know at once."""
    told = host.addresses
    while True:
        await trio.sleep(ANNOUNCE_S)
        now = host.addresses
        if now != told:
            told = now
            dht.renew()


def _dialable(endpoint: Endpoint) -> list[Multiaddr]:
    """What speaks our protocols at an endpoint that somebody saw us at."""
    text = f"/ip{endpoint.ip.version}/{endpoint.ip}/{endpoint.transport}/{endpoint.port}"
    return [Multiaddr(text if endpoint.transport == "tcp" else f"{text}/quic-v1")]

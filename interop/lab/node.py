"""One of our nodes, told what to do by lines of JSON on its standard input; it answers each with one line.

    {"do": "start", "listen": [ADDR, ...], "relay": [ADDR, ...], "serve": bool, "in_dht": bool}
        -> {"peer_id": ..., "addresses": [ADDR, ...]}
    {"do": "connect", "peer": PEERID, "addresses": [ADDR, ...], "within_s": S}
        -> {"connected": bool, "direct": bool, "remote": ADDR or null, "seconds": S or null, "why": TEXT or null}
    {"do": "announce"}                                             -> {}
    {"do": "find", "peer": PEERID}                                 -> {"addresses": [ADDR, ...]}
    {"do": "reach", "peer": PEERID, "within_s": S}                 -> {"seconds": S}
    {"do": "punches"}                                              -> {"tries": N, "successes": N}
    {"do": "ping", "peer": PEERID, "count": N}                     -> {"rtt_ms": MEDIAN}
    {"do": "stop"}                                                 -> {}

``start`` makes a new identity and new sockets, so that nothing of one attempt helps the next. With ``serve`` the node
relays for others; with ``relay``, which is one relay at all of its addresses that are known, it has a reservation there
before it answers, if it needs one. With ``in_dht`` it is one of the DHT's servers, which meet each other as they join.
``announce`` puts its addresses into the DHT, where ``find`` looks for those of another, and ``reach`` does so until
that one has answered a ping. What goes wrong is
``{"error": TEXT}``. It ends with its standard input.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any

import trio

from net import addresses
from net.dht import keys
from net.dht.service import Dht
from net.errors import NetError, PeerFailed
from net.host import Host, open_host
from net.identity import Identity, PeerId
from net.nat.reachability import Kind
from net.nurseries import open_service_nursery
from net.ping import ping, ping_once
from net.presence import Presence, run_presence
from net.relay.server import RelayServer

CIRCUIT = "/p2p-circuit"
RECORD = "lab"  # the kind of what a node announces
MAX_ORDER_BYTES = 65536
RESERVE_S = 10.0  # for a reservation
COUNTED_S = 1.0
LOOK_S = 0.02  # how often it is looked whether a relayed connection has become a direct one


async def main() -> None:
    orders = _orders()
    async with aclosing(orders):
        async for order in orders:
            if order["do"] != "start":
                _answer({"error": f"not started: {order}"})
                continue
            try:
                stopped = await _live(order, orders)
            except* NetError as group:
                _answer({"error": str(group.exceptions[0])})
            else:
                if stopped:
                    _answer({})


async def _orders() -> AsyncGenerator[dict[str, Any], None]:
    heard = b""
    async with trio.lowlevel.FdStream(os.dup(0)) as stream:
        while data := await stream.receive_some(MAX_ORDER_BYTES):
            *lines, heard = (heard + data).split(b"\n")
            for line in lines:
                yield json.loads(line)


def _answer(value: dict[str, Any]) -> None:
    print(json.dumps(value), flush=True)


async def _live(start: dict[str, Any], orders: AsyncGenerator[dict[str, Any], None]) -> bool:
    """One host, until ``stop`` (True) or the end of all orders."""
    listen = [addresses.parse(text) for text in start["listen"]]
    async with open_host(Identity.generate(), listen=listen) as host, open_service_nursery() as nursery:
        if start["serve"]:
            await nursery.start(RelayServer(host).run)
        dht = Dht(host, server=start["in_dht"])
        presence = await _present(host, dht, start["relay"], nursery)
        _answer({"peer_id": str(host.peer_id), "addresses": [str(address) for address in host.addresses]})
        async for order in orders:
            if order["do"] == "stop":
                nursery.cancel_scope.cancel()
                return True
            try:
                _answer(await _do(host, dht, presence, order))
            except NetError as error:
                _answer({"error": str(error)})
        nursery.cancel_scope.cancel()
    return False


async def _present(host: Host, dht: Dht, relay: list[str], nursery: trio.Nursery) -> Presence:
    """As a node of ours is: known to the relay, and with a reservation there where nobody can come in directly."""
    bootstrap = [addresses.parse_peer(each) for each in relay]
    presence: Presence = await nursery.start(partial(run_presence, host, dht, bootstrap=bootstrap))
    if bootstrap:
        await dht.join(bootstrap)
        with trio.move_on_after(RESERVE_S):
            while not host.relayed and presence.reachability.kind not in (Kind.PUBLIC, Kind.MAPPED):  # noqa: ASYNC110  two things, either will do
                await trio.sleep(LOOK_S)
    await nursery.start(dht.run)
    return presence


async def _do(host: Host, dht: Dht, presence: Presence, order: dict[str, Any]) -> dict[str, Any]:
    if order["do"] == "announce":
        await dht.announce(keys.of_peer(host.peer_id), RECORD, lambda: {"addresses": list(map(str, host.addresses))})
        return {}
    if order["do"] == "punches":
        with trio.move_on_after(COUNTED_S):  # the other side may know of the connection before this one does
            while not presence.puncher.successes:  # noqa: ASYNC110  nothing tells of it
                await trio.sleep(LOOK_S)
        return {"tries": presence.puncher.tries, "successes": presence.puncher.successes}
    peer = PeerId.from_string(order["peer"])
    if order["do"] == "find":
        return {"addresses": await find(dht, peer)}
    if order["do"] == "reach":
        return {"seconds": await reach_announced(host, dht, peer, order["within_s"])}
    if order["do"] == "connect":
        return await reach(host, peer, order)
    round_trips: list[float] = []
    async with aclosing(ping(host, peer)) as coming:
        async for round_trip_s in coming:
            round_trips.append(round_trip_s * 1000)
            if len(round_trips) == order["count"]:
                break
    return {"rtt_ms": statistics.median(round_trips)}


async def find(dht: Dht, peer: PeerId) -> list[str]:
    found = [each.body for each in await dht.find(keys.of_peer(peer), RECORD) if each.peer_id == peer]
    return [address for body in found for address in body["addresses"]]


async def reach_announced(host: Host, dht: Dht, peer: PeerId, within_s: float) -> float:
    """Seconds until the peer has answered a ping at an address that it announces.

    Raises:
        PeerFailed: it has not, within that time.
    """
    start = trio.current_time()
    with trio.move_on_after(within_s):
        while True:
            try:
                known = [addresses.parse(text) for text in await find(dht, peer)]
                await host.connect(peer, known)
                await ping_once(host, peer, timeout_s=1.0)
                return trio.current_time() - start
            except NetError:
                await trio.sleep(LOOK_S)
    raise PeerFailed(peer, f"not reached in {within_s:g} s")


async def reach(host: Host, peer: PeerId, order: dict[str, Any]) -> dict[str, Any]:
    """Connect at the addresses given; then wait for the connection to become direct."""
    known = [addresses.parse(text) for text in order["addresses"]]
    start = trio.current_time()
    why = None
    with trio.move_on_after(order["within_s"]) as scope:
        try:
            await host.connect(peer, known)
            await _direct(host, peer)
        except NetError as error:
            why = str(error)
    if scope.cancelled_caught:
        why = f"not direct in {order['within_s']} s"
    direct = is_direct(host, peer)
    used = host.swarm.connection(peer)
    return {
        "connected": used is not None,
        "direct": direct,
        "remote": None if used is None else str(used.remote),
        "seconds": trio.current_time() - start if direct else None,
        "why": why,
    }


async def _direct(host: Host, peer: PeerId) -> None:
    """Return when there is a connection without a relay; nothing tells of it, so one has to look."""
    while True:
        if is_direct(host, peer):
            return
        await trio.sleep(LOOK_S)


def is_direct(host: Host, peer: PeerId) -> bool:
    return any(entry.peer_id == peer and CIRCUIT not in str(entry.remote) for entry in host.swarm.connections)


if __name__ == "__main__":
    trio.run(main)

"""Our node on a machine of the simulated internet: ``... LISTEN RELAY``; the relay's address may be empty.

It answers lines of JSON with one each:

    {"do": "hello", "see": [ADDR, ...]}                      -> {"peer": PEERID}
    {"do": "reserve"}                                        -> {}
    {"do": "meet", "peer": PEERID, "address": ADDR or null, "within_s": S}
                                                             -> {"at": TIME, "remote": ADDR, "ping_s": S}
    {"do": "judge"}                                          -> {"at": TIME, "kind": KIND}

``hello``: it is connected with these. ``reserve``: it has a reservation at the relay. ``meet``: it has dialled that
peer through the relay, or waited for it to call; the connection has become direct, an echo over it came back, and so
did pings. ``judge``: others have found out whether it can be reached. ``at`` is the time of the monotonic clock at
which that was so. What goes wrong is ``{"error": TEXT}``. It ends with its standard input.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import trio

from interop.peers.base import ECHO, answer_echo, request_echo
from net import addresses, errors
from net.addresses import Multiaddr
from net.dht.service import Dht
from net.host import Host, open_host
from net.identity import Identity, PeerId
from net.nat.reachability import Kind
from net.nurseries import open_service_nursery
from net.ping import ping_once
from net.presence import Presence, run_presence
from net.swarm import Connection

RESERVED_S = 15.0
ARRIVED_S = 10.0  # for a peer that is to call
JUDGED_S = 25.0
LOOK_S = 0.01
ECHO_BYTES = 100_000
MAX_LINE_BYTES = 4096


async def main() -> None:
    listen, relay = sys.argv[1:]
    async with (
        open_host(Identity.generate(), listen=[addresses.parse(listen)]) as host,
        open_service_nursery() as nursery,
    ):
        host.handle(ECHO, lambda _, stream: answer_echo(stream))
        bootstrap = [addresses.parse_peer(relay)] if relay else []
        presence = await nursery.start(partial(run_presence, host, Dht(host, server=False), bootstrap=bootstrap))
        await _obey(host, presence)
        nursery.cancel_scope.cancel()


async def _obey(host: Host, presence: Presence) -> None:
    heard = b""
    async with trio.lowlevel.FdStream(os.dup(0)) as stream:
        while data := await stream.receive_some(MAX_LINE_BYTES):
            *lines, heard = (heard + data).split(b"\n")
            for line in lines:
                try:
                    answer = await _do(host, presence, json.loads(line))
                except errors.NetError as error:
                    answer = {"error": str(error)}
                print(json.dumps(answer), flush=True)


async def _do(host: Host, presence: Presence, order: dict[str, Any]) -> dict[str, Any]:
    match order["do"]:
        case "hello":
            for each in map(addresses.parse_peer, order["see"]):
                await host.connect(each.peer_id, [each.address])
            return {"peer": str(host.peer_id)}
        case "reserve":
            await _until(lambda: bool(host.relayed), RESERVED_S, "no reservation")
            return {}
        case "judge":
            reachability = presence.reachability
            await _until(lambda: reachability.kind is not Kind.UNKNOWN, JUDGED_S, "not judged by anybody")
            return {"at": time.monotonic(), "kind": reachability.kind.value}
        case _:
            where = None if order["address"] is None else addresses.parse(order["address"])
            return await _meet(host, PeerId.from_string(order["peer"]), where, order["within_s"])


async def _meet(host: Host, peer: PeerId, where: Multiaddr | None, within_s: float) -> dict[str, Any]:
    if where is not None and not (await host.connect(peer, [where])).relayed:
        raise errors.DialError(f"{where} led to a direct connection at once")
    await _until(lambda: host.swarm.connection(peer) is not None, ARRIVED_S, f"{peer} did not call")
    await _until(lambda: _direct(host, peer) is not None, within_s, "not direct")
    at = time.monotonic()
    async with host.stream(peer, [ECHO]) as stream:
        await request_echo(stream, os.urandom(ECHO_BYTES))
    ping_s = min([await ping_once(host, peer) for _ in range(3)])
    connection = _direct(host, peer)
    if connection is None:
        raise errors.DialError("the direct connection did not last")
    return {"at": at, "remote": str(connection.remote), "ping_s": ping_s}


def _direct(host: Host, peer: PeerId) -> Connection | None:
    """The connection that is used, if no relay carries it."""
    connection = host.swarm.connection(peer)
    return None if connection is None or connection.relayed else connection


async def _until(is_so: Callable[[], bool], within_s: float, failure: str) -> None:
    with trio.move_on_after(within_s):
        while not is_so():  # noqa: ASYNC110  nothing tells
            await trio.sleep(LOOK_S)
        return
    raise errors.DialError(f"{failure} within {within_s:g} s")


if __name__ == "__main__":
    trio.run(main)

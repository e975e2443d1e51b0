"""Circuits between three peers, every role played by each implementation that can: relay, listener, dialler.

A case: a relay; a listener that holds a reservation there; a dialler that reaches the listener through the relay, has
an echo compared and pings. At least one of the three is ours. In results, ``peer`` is the relay and ``direction`` says
who dials whom.

go-libp2p 0.32's relay cuts a circuit after 128 KiB (its daemon's option for more has no effect), and go diallers open
no streams over circuits so limited: these pairs get a small echo, and are left out.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack

import trio

from interop.peers.base import Driver, Peer, PeerError, Relaying
from interop.peers.fetch import FetchError
from interop.peers.ours import OURS, OurDriver
from interop.suite import Result, reasons
from net import errors
from net.addresses import PeerAddress, relayed_by

CASE_S = 40.0
RESERVED_S = 15.0  # for a foreign listener to hold its reservation
RETRY_S = 0.5
ECHO_BYTES, LIMITED_ECHO_BYTES = 1_000_000, 30_000


async def run(drivers: Sequence[Driver]) -> AsyncGenerator[Result, None]:
    """Results as they come. A case that fails does not stop the others."""
    by_name: dict[str, Driver] = {OURS: OurDriver()}
    for driver in drivers:
        try:
            await trio.to_thread.run_sync(driver.fetch)
        except FetchError:
            continue  # the suite before us has told
        by_name[driver.name] = driver
    for relay, listener, dialler in itertools.product(by_name, repeat=3):
        if OURS in (relay, listener, dialler) and {relay, listener, dialler} != {OURS} and _can(relay, dialler):
            yield await _run_case(by_name, relay, listener, dialler)


def _can(relay: str, dialler: str) -> bool:
    return not relay == dialler == "go"


async def _run_case(by_name: Mapping[str, Driver], relay: str, listener: str, dialler: str) -> Result:
    failure: str | None = None
    echo_s = ping_s = 0.0
    try:
        with trio.fail_after(CASE_S):
            async with AsyncExitStack() as stack:

                async def start(name: str, relaying: Relaying) -> Peer:
                    return await stack.enter_async_context(by_name[name].start("tcp", "noise", relaying))

                at = (await start(relay, Relaying(serves=True))).address
                target = await start(listener, Relaying(through=at))
                where = PeerAddress(address=relayed_by(at), peer_id=target.address.peer_id)
                source = await start(dialler, Relaying(dials=True))
                await _until_reserved(source, where)
                echo_s = await source.echo(where, LIMITED_ECHO_BYTES if relay == "go" else ECHO_BYTES)
                ping_s = min([await source.ping(where) for _ in range(3)])
    except* (errors.NetError, PeerError, OSError) as group:
        failure = "; ".join(reasons(group))
    except* trio.TooSlowError:
        failure = f"not done within {CASE_S:g} s"
    return Result(
        peer=relay,
        transport="circuit",
        security="noise",
        direction=f"{dialler}->{listener}",
        failure=failure,
        echo_s=None if failure else echo_s,
        ping_s=None if failure else ping_s,
    )


async def _until_reserved(source: Peer, where: PeerAddress) -> None:
    """Foreign listeners do not tell when they hold their reservation: try until a small echo comes back."""
    with trio.move_on_after(RESERVED_S) as scope:
        while True:
            try:
                await source.echo(where, 1)
            except (PeerError, errors.NetError):
                if trio.current_time() > scope.deadline - RETRY_S:
                    raise
                await trio.sleep(RETRY_S)
            else:
                return

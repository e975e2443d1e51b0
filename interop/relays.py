"""Circuits between three peers, every role played by each implementation that can: relay, listener, dialler.

A case: a relay; a listener that holds a reservation there; a dialler that reaches the listener through the relay, has
an echo compared and pings. At least one of the three is ours. In results, ``peer`` is the relay and ``direction`` says
who dials whom.

go-libp2p 0.32's relay cuts a circuit after 128 KiB (its daemon's option for more has no effect), and go diallers open
no streams over circuits so limited: these pairs get a small echo, and are left out.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import trio

from interop.peers.base import ECHO, NO_RELAYING, Driver, Peer, PeerError, Relaying, Sight, answer_echo, request_echo
from interop.peers.fetch import FetchError
from interop.suite import Result
from net import errors
from net.addresses import PeerAddress, parse, relayed_by
from net.host import Host, open_host
from net.identity import Identity
from net.ping import ping_once
from net.relay.server import RelayServer

OURS = "ours"
CASE_S = 40.0
RESERVED_S = 15.0  # for a foreign listener to hold its reservation
RETRY_S = 0.5
ECHO_BYTES, LIMITED_ECHO_BYTES = 1_000_000, 30_000


class OurDriver:
    """Our host behind the interface of the foreign ones."""

    name = OURS

    def fetch(self) -> None:
        """It is here."""

    @asynccontextmanager
    async def start(self, transport: str, security: str, relaying: Relaying = NO_RELAYING) -> AsyncIterator[OurPeer]:
        listen = [parse("/ip4/127.0.0.1/tcp/0")]
        if relaying.through is not None:
            listen.append(relayed_by(relaying.through))
        async with open_host(Identity.generate(), listen=listen) as host, trio.open_nursery() as nursery:
            host.handle(ECHO, lambda _, stream: answer_echo(stream))
            if relaying.serves:
                await nursery.start(RelayServer(host).run)
            yield OurPeer(host)
            nursery.cancel_scope.cancel()


class OurPeer:
    def __init__(self, host: Host) -> None:
        self._host = host
        self.address = host.peer_addresses[0]

    async def echo(self, to: PeerAddress, count: int) -> float:
        if not (await self._host.connect(to.peer_id, [to.address])).relayed:
            raise PeerError("the connection does not go through the relay")
        async with self._host.stream(to.peer_id, [ECHO]) as stream:
            return await request_echo(stream, os.urandom(count))

    async def ping(self, to: PeerAddress) -> float:
        await self._host.connect(to.peer_id, [to.address])
        return await ping_once(self._host, to.peer_id)

    async def identify(self, to: PeerAddress) -> Sight:
        raise PeerError("not needed here")


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
        failure = "; ".join(_reasons(group))
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


def _reasons(error: BaseException) -> list[str]:
    if isinstance(error, BaseExceptionGroup):
        return [reason for inner in error.exceptions for reason in _reasons(inner)]
    return [f"{type(error).__name__}: {error}"]
